//! The checkpoints of backfills, stored in the database.

use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use super::{BatchResult, Target, equal, name_literal, text_array};
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};

/// The name of the table, which is in the schema of the backfilled table.
pub(crate) const TABLE: &str = "lockkeeper_backfill";

const COLUMNS: &str = "(name pg_catalog.text PRIMARY KEY, definition pg_catalog.text NOT NULL, \
     key_order pg_catalog.text[] NOT NULL, last_key pg_catalog.text[], rows_passed pg_catalog.int8 NOT NULL DEFAULT 0, \
     rows_done pg_catalog.int8 NOT NULL DEFAULT 0, done pg_catalog.bool NOT NULL DEFAULT false, \
     started_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now(), \
     updated_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now())";

/// Identifies a backfill's checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckpointId<'a> {
    pub(crate) schema: &'a str,
    pub(crate) name: &'a str,
}

/// A backfill's checkpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpoint {
    pub(crate) definition: String,
    /// Whether the order of the key is unchanged. Otherwise other rows follow the last one.
    pub(crate) same_order: bool,
    pub(crate) last_key: Option<Vec<String>>,
    pub(crate) processed: u64,
    pub(crate) changed: u64,
    pub(crate) done: bool,
}

/// Queries the checkpoint table. `CREATE TABLE IF NOT EXISTS` requires the privilege to create it even if it exists.
///
/// The table's owner can create triggers on it, which run as the role that writes to it. So the owner must be a role
/// whose code could run as this role anyway: this role itself, or one that has all privileges of the owner of the
/// backfilled table or of the schema, such as a superuser. It is not enough that this role is a member of the owner's
/// role: a superuser is a member of every role.
pub(crate) fn find_table(target: &Target) -> String {
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

/// Whether the checkpoint table exists and can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CheckpointTable {
    Missing,
    Usable,
    /// Why it cannot be used.
    Unusable(String),
}

pub(crate) fn read_table(target: &Target, reply: &[SimpleQueryMessage]) -> CheckpointTable {
    let Some(row) = rows(reply).next() else {
        return CheckpointTable::Missing;
    };
    let table = format!("{}.{TABLE}", identifier(target.schema()));
    if !matches!(text(row, "relkind").as_deref(), Some("r" | "p")) {
        return CheckpointTable::Unusable(format!(
            "{table}, where checkpoints are kept, is not a table"
        ));
    }
    if !is_true(row, "trusted") {
        return CheckpointTable::Unusable(format!(
            "{table}, where checkpoints are kept, belongs to {:?}, whose triggers on it would run as this role; it \
             shall belong to this role, or to the owner of {} or of its schema",
            text(row, "rolname").unwrap_or_default(),
            target.table
        ));
    }
    CheckpointTable::Usable
}

pub(crate) fn create_table(schema: &str) -> String {
    format!("CREATE TABLE {}.{TABLE} {COLUMNS}", identifier(schema))
}

/// Inserts the first checkpoint of the backfill, unless it has one, and queries it.
pub(crate) fn load(id: &CheckpointId<'_>, target: &Target, definition: &str) -> String {
    let (table, name) = (id.table(), literal(id.name));
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

pub(crate) fn read_checkpoint(target: &Target, reply: &[SimpleQueryMessage]) -> Option<Checkpoint> {
    let row = rows(reply).next()?;
    Some(Checkpoint {
        definition: text(row, "definition")?,
        same_order: is_true(row, "same_order"),
        last_key: (1..=target.key.len())
            .map(|n| text(row, &format!("key_{n}")))
            .collect(),
        processed: parsed(row, "rows_passed")?,
        changed: parsed(row, "rows_done")?,
        done: is_true(row, "done"),
    })
}

/// Deletes the checkpoint.
pub(crate) fn delete(id: &CheckpointId<'_>) -> String {
    let table = id.table();
    format!(
        "DELETE FROM {table} AS c WHERE {}",
        equal("c.name", &literal(id.name))
    )
}

/// Records a batch in the batch's transaction, unless another batch has been recorded since, or another backfill has
/// begun under the name: one message. It also queries how many sessions wait for this transaction.
pub(crate) fn advance(
    id: &CheckpointId<'_>,
    before: &Checkpoint,
    result: &BatchResult,
    is_end: bool,
) -> String {
    let table = id.table();
    let known = before.last_key.iter().flatten().map(String::as_str);
    let known = equal(
        "COALESCE(c.last_key, '{}'::pg_catalog.text[])",
        &text_array(known),
    );
    let last_key = result.last_key.as_ref().map_or_else(String::new, |key| {
        format!(
            "last_key = {}, ",
            text_array(key.iter().map(String::as_str))
        )
    });
    format!(
        "UPDATE {table} AS c SET {last_key}rows_passed = {}, rows_done = {}, done = {is_end}, updated_at = pg_catalog.now() \
         WHERE {} AND {} AND {} AND {known} AND NOT c.done RETURNING true AS advanced; \
         SELECT pg_catalog.count(*) AS waiting FROM pg_catalog.pg_locks AS l WHERE NOT l.granted \
         AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(l.pid))",
        before.processed + result.processed,
        before.changed + result.changed,
        equal("c.name", &literal(id.name)),
        equal("c.definition", &literal(&before.definition)),
        equal("c.rows_passed", &before.processed.to_string()),
    )
}

/// How many sessions wait for this transaction; `None` if another process has recorded a batch.
pub(crate) fn read_advance(reply: &[SimpleQueryMessage]) -> Option<u64> {
    let mut rows = rows(reply);
    rows.next().filter(|row| is_true(row, "advanced"))?;
    parsed(rows.next()?, "waiting")
}

impl CheckpointId<'_> {
    fn table(&self) -> String {
        format!("{}.{TABLE}", identifier(self.schema))
    }
}
