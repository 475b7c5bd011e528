//! How far a backfill has come, kept in the database.

use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use super::super::{identifier, is_true, literal, parsed, rows, text};
use super::{Done, Target, equal, name_literal, text_array};

/// The table's name, in the schema of the table that is backfilled.
pub(crate) const TABLE: &str = "lockkeeper_backfill";

const COLUMNS: &str = "(name pg_catalog.text PRIMARY KEY, definition pg_catalog.text NOT NULL, \
     key_types pg_catalog.text[] NOT NULL, last_key pg_catalog.text[], rows_passed pg_catalog.int8 NOT NULL DEFAULT 0, \
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
    pub(crate) last: Option<Vec<String>>,
    pub(crate) passed: u64,
    pub(crate) changed: u64,
    pub(crate) done: bool,
}

/// Whether there is the table. `CREATE TABLE IF NOT EXISTS` asks for the right to create one even where it exists.
pub(crate) fn exists(schema: &str) -> String {
    format!(
        "SELECT true AS is_there FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON {} WHERE {} AND {}",
        equal("n.oid", "c.relnamespace"),
        equal("c.relname", &name_literal(TABLE)),
        equal("n.nspname", &name_literal(schema)),
    )
}

pub(crate) fn is_there(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "is_there"))
}

pub(crate) fn create(schema: &str) -> String {
    format!("CREATE TABLE {}.{TABLE} {COLUMNS}", identifier(schema))
}

/// Where this backfill is, or that it begins.
pub(crate) fn load(at: &Checkpoint<'_>, target: &Target, definition: &str) -> String {
    let (table, name) = (at.table(), literal(at.name));
    let types = text_array(target.key.iter().map(|column| column.type_name.as_str()));
    let definition = literal(definition);
    let mut sql = format!(
        "INSERT INTO {table} (name, definition, key_types) VALUES ({name}, {definition}, {types}) \
         ON CONFLICT (name) DO NOTHING; SELECT c.definition, c.rows_passed, c.rows_done, c.done"
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

/// Notes a batch in its own transaction, unless another one has been noted since: one message. It tells how many wait
/// for this transaction too.
pub(crate) fn advance(at: &Checkpoint<'_>, before: &Saved, done: &Done, is_end: bool) -> String {
    let table = at.table();
    let last = done.last.as_ref().map_or_else(String::new, |last| {
        format!(
            "last_key = {}, ",
            text_array(last.iter().map(String::as_str))
        )
    });
    format!(
        "UPDATE {table} AS c SET {last}rows_passed = {}, rows_done = {}, done = {is_end}, updated_at = pg_catalog.now() \
         WHERE {} AND {} AND NOT c.done RETURNING true AS advanced; \
         SELECT pg_catalog.count(*) AS waiting FROM pg_catalog.pg_locks AS l WHERE NOT l.granted \
         AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(l.pid))",
        before.passed + done.passed,
        before.changed + done.changed,
        equal("c.name", &literal(at.name)),
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
