//! How far a backfill has come, kept in the database.

use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use super::{Done, Target, equal, name_literal, text_array};
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};

/// The table's name, in the schema of the table that is backfilled.
pub(crate) const TABLE: &str = "lockkeeper_backfill";

const COLUMNS: &str = "(name pg_catalog.text PRIMARY KEY, definition pg_catalog.text NOT NULL, \
     key_order pg_catalog.text[] NOT NULL, last_key pg_catalog.text[], rows_passed pg_catalog.int8 NOT NULL DEFAULT 0, \
     rows_done pg_catalog.int8 NOT NULL DEFAULT 0, done pg_catalog.bool NOT NULL DEFAULT false, \
     started_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now(), \
     updated_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now())";

/// One backfill's row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checkpoint<'a> {
    pub(crate) schema: &'a str,
    pub(crate) name: &'a str,
}

/// What is kept in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saved {
    pub(crate) definition: String,
    /// Whether the key is ordered as it was: otherwise the rows behind the last one are others.
    pub(crate) same_order: bool,
    pub(crate) last: Option<Vec<String>>,
    pub(crate) passed: u64,
    pub(crate) changed: u64,
    pub(crate) done: bool,
}

/// The checkpoints' table, where there is one: `CREATE TABLE IF NOT EXISTS` asks for the right to create one even then.
///
/// Whoever owns it can give it triggers, which run as the role that writes to it. So its owner must be somebody whose code
/// would run anyway: this role, or one that can do all that the owner of the backfilled table or of the schema can, as
/// superusers can. That this role is a member of the owner's is not enough: a superuser is a member of all.
pub(crate) fn look_for(target: &Target) -> String {
    let can_do_as = |owner: &str| format!("pg_catalog.pg_has_role(c.relowner, {owner}, 'MEMBER')");
    let owner = format!(
        "(SELECT t.relowner FROM pg_catalog.pg_class AS t WHERE {} AND {})",
        equal("t.relnamespace", "n.oid"),
        equal("t.relname", &name_literal(target.table.name()))
    );
    format!(
        "SELECT c.relkind, o.rolname, o.rolname OPERATOR(pg_catalog.=) current_user OR {} OR {} AS trusted \
         FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON {} \
         JOIN pg_catalog.pg_roles AS o ON {} WHERE {} AND {}",
        can_do_as(&owner),
        can_do_as("n.nspowner"),
        equal("n.oid", "c.relnamespace"),
        equal("o.oid", "c.relowner"),
        equal("c.relname", &name_literal(TABLE)),
        equal("n.nspname", &name_literal(target.schema())),
    )
}

/// Whether there is the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Missing,
    Usable,
    /// Why it is not used.
    Flaw(String),
}

pub(crate) fn seen(target: &Target, reply: &[SimpleQueryMessage]) -> Table {
    let Some(row) = rows(reply).next() else {
        return Table::Missing;
    };
    let table = format!("{}.{TABLE}", identifier(target.schema()));
    if !matches!(text(row, "relkind").as_deref(), Some("r" | "p")) {
        return Table::Flaw(format!(
            "{table}, where checkpoints are kept, is not a table"
        ));
    }
    if !is_true(row, "trusted") {
        return Table::Flaw(format!(
            "{table}, where checkpoints are kept, belongs to {:?}, whose triggers on it would run as this role; it \
             shall belong to this role, or to the owner of {} or of its schema",
            text(row, "rolname").unwrap_or_default(),
            target.table
        ));
    }
    Table::Usable
}

pub(crate) fn create(schema: &str) -> String {
    format!("CREATE TABLE {}.{TABLE} {COLUMNS}", identifier(schema))
}

/// Where this backfill is, or that it begins.
pub(crate) fn load(at: &Checkpoint<'_>, target: &Target, definition: &str) -> String {
    let (table, name) = (at.table(), literal(at.name));
    let order = text_array(target.key.iter().map(|column| column.order.as_str()));
    let definition = literal(definition);
    let mut sql = format!(
        "INSERT INTO {table} (name, definition, key_order) VALUES ({name}, {definition}, {order}) \
         ON CONFLICT (name) DO NOTHING; SELECT c.definition, {} AS same_order, c.rows_passed, c.rows_done, c.done",
        equal("c.key_order", &order)
    );
    for n in 1..=target.key.len() {
        // Infallible: writing to a String.
        let _ = write!(sql, ", c.last_key[{n}] AS key_{n}");
    }
    let _ = write!(sql, " FROM {table} AS c WHERE {}", equal("c.name", &name));
    sql
}

pub(crate) fn loaded(target: &Target, reply: &[SimpleQueryMessage]) -> Option<Saved> {
    let row = rows(reply).next()?;
    Some(Saved {
        definition: text(row, "definition")?,
        same_order: is_true(row, "same_order"),
        last: (1..=target.key.len())
            .map(|n| text(row, &format!("key_{n}")))
            .collect(),
        passed: parsed(row, "rows_passed")?,
        changed: parsed(row, "rows_done")?,
        done: is_true(row, "done"),
    })
}

/// Forgets where it was.
pub(crate) fn forget(at: &Checkpoint<'_>) -> String {
    let table = at.table();
    format!(
        "DELETE FROM {table} AS c WHERE {}",
        equal("c.name", &literal(at.name))
    )
}

/// Notes a batch in its own transaction, unless another one has been noted since, or another backfill has begun under
/// the name: one message. It tells how many wait for this transaction too.
pub(crate) fn advance(at: &Checkpoint<'_>, before: &Saved, done: &Done, is_end: bool) -> String {
    let table = at.table();
    let known = before.last.iter().flatten().map(String::as_str);
    let known = equal(
        "COALESCE(c.last_key, '{}'::pg_catalog.text[])",
        &text_array(known),
    );
    let last = done.last.as_ref().map_or_else(String::new, |last| {
        format!(
            "last_key = {}, ",
            text_array(last.iter().map(String::as_str))
        )
    });
    format!(
        "UPDATE {table} AS c SET {last}rows_passed = {}, rows_done = {}, done = {is_end}, updated_at = pg_catalog.now() \
         WHERE {} AND {} AND {} AND {known} AND NOT c.done RETURNING true AS advanced; \
         SELECT pg_catalog.count(*) AS waiting FROM pg_catalog.pg_locks AS l WHERE NOT l.granted \
         AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(l.pid))",
        before.passed + done.passed,
        before.changed + done.changed,
        equal("c.name", &literal(at.name)),
        equal("c.definition", &literal(&before.definition)),
        equal("c.rows_passed", &before.passed.to_string()),
    )
}

/// How many wait for this transaction; `None` where somebody else has noted a batch.
pub(crate) fn advanced(reply: &[SimpleQueryMessage]) -> Option<u64> {
    let mut rows = rows(reply);
    rows.next().filter(|row| is_true(row, "advanced"))?;
    parsed(rows.next()?, "waiting")
}

impl Checkpoint<'_> {
    fn table(&self) -> String {
        format!("{}.{TABLE}", identifier(self.schema))
    }
}
