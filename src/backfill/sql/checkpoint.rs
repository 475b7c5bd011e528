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
     updated_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now(), ";

/// Columns that tables of earlier versions do not have.
const LATER_COLUMNS: [&str; 2] = [
    "identity pg_catalog.jsonb",
    "filter_stays pg_catalog.bool NOT NULL DEFAULT false",
];

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
    /// Whether changed rows have matched the filter still. Then it does not tell which rows are left.
    pub(crate) filter_stays: bool,
    pub(crate) sameness: Sameness,
}

/// What of the table is as it was when the checkpoint was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sameness {
    /// The table itself, rather than another one of its name.
    pub(crate) table: bool,
    /// The columns that the definition mentions, rather than others of their names.
    pub(crate) columns: bool,
    /// Which rows are visible.
    pub(crate) rows: bool,
    /// The files of the table and its partitions: TRUNCATE replaces them, and so does what rewrites the table.
    pub(crate) files: bool,
    /// All columns and their types: if they have changed, a new file can be due to that.
    pub(crate) types: bool,
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
        "SELECT c.relkind, o.rolname, o.rolname OPERATOR(pg_catalog.=) current_user OR {} OR {} AS trusted, \
         (SELECT pg_catalog.count(*) OPERATOR(pg_catalog.=) {} FROM pg_catalog.pg_attribute AS a WHERE {} \
         AND a.attname OPERATOR(pg_catalog.=) ANY ('{{identity,filter_stays}}'::pg_catalog.name[])) AS is_current \
         FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON {} \
         JOIN pg_catalog.pg_roles AS o ON {} WHERE {} AND {}",
        can_do_as(&owner),
        can_do_as("n.nspowner"),
        LATER_COLUMNS.len(),
        equal("a.attrelid", "c.oid"),
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
    /// It is of an earlier version, and lacks columns.
    Old,
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
    if !is_true(row, "is_current") {
        return CheckpointTable::Old;
    }
    CheckpointTable::Usable
}

pub(crate) fn create_table(schema: &str) -> String {
    let later = LATER_COLUMNS.join(", ");
    format!(
        "CREATE TABLE {}.{TABLE} {COLUMNS}{later})",
        identifier(schema)
    )
}

pub(crate) fn add_columns(schema: &str) -> String {
    let columns = LATER_COLUMNS.map(|column| format!("ADD COLUMN IF NOT EXISTS {column}"));
    format!(
        "ALTER TABLE {}.{TABLE} {}",
        identifier(schema),
        columns.join(", ")
    )
}

/// What a checkpoint belongs to, from the catalogs: the table, its columns, its files, and whose rows.
fn identity(target: &Target, visible_rows: bool) -> String {
    let rows = if visible_rows {
        "current_user::pg_catalog.text"
    } else {
        "'all'::pg_catalog.text"
    };
    format!(
        "(SELECT pg_catalog.jsonb_build_object('table', t.oid::pg_catalog.int8, 'rows', {rows}, 'columns', \
         (SELECT pg_catalog.jsonb_object_agg(a.attname, \
         pg_catalog.jsonb_build_array(a.attnum, a.atttypid::pg_catalog.int8, a.atttypmod)) \
         FROM pg_catalog.pg_attribute AS a WHERE {} AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped), \
         'files', (SELECT COALESCE(pg_catalog.jsonb_object_agg(f.oid::pg_catalog.text, \
         pg_catalog.pg_relation_filenode(f.oid)::pg_catalog.int8), '{{}}'::pg_catalog.jsonb) FROM pg_catalog.pg_class AS f \
         WHERE f.oid OPERATOR(pg_catalog.=) ANY ({}::pg_catalog.oid[]) AND {})) \
         FROM pg_catalog.pg_class AS t JOIN pg_catalog.pg_namespace AS n ON {} WHERE {} AND {})",
        equal("a.attrelid", "t.oid"),
        text_array(target.oids.iter().map(u32::to_string)),
        equal("f.relkind", "'r'"),
        equal("n.oid", "t.relnamespace"),
        equal("t.relname", &name_literal(target.table.name())),
        equal("n.nspname", &name_literal(target.schema())),
    )
}

/// Columns of a query that compare the identity `n.identity` with that of the checkpoint `c`.
fn compare(definition: &str) -> String {
    let part = |of: &str, name: &str| format!("{of}.identity OPERATOR(pg_catalog.->) '{name}'");
    let same = |name: &str| {
        format!(
            "({}) OPERATOR(pg_catalog.=) ({})",
            part("c", name),
            part("n", name)
        )
    };
    let none_differs = |name: &str, what: &str, which: &str| {
        format!(
            "NOT EXISTS (SELECT FROM pg_catalog.jsonb_each({}) AS b (name, value) \
             JOIN pg_catalog.jsonb_each({}) AS a (name, value) ON {} \
             WHERE (b.value{what}) OPERATOR(pg_catalog.<>) (a.value{what}){which})",
            part("c", name),
            part("n", name),
            equal("a.name", "b.name"),
        )
    };
    let is_mentioned = format!(
        " AND pg_catalog.strpos(pg_catalog.lower({}), pg_catalog.lower(a.name)) OPERATOR(pg_catalog.>) 0",
        literal(definition)
    );
    format!(
        "{} AS same_table, {} AS same_rows, {} AS same_types, {} AS same_columns, {} AS same_files",
        same("table"),
        same("rows"),
        same("columns"),
        none_differs("columns", " OPERATOR(pg_catalog.->) 0", &is_mentioned),
        none_differs("files", "", ""),
    )
}

fn read_sameness(row: &tokio_postgres::SimpleQueryRow) -> Sameness {
    Sameness {
        table: is_true(row, "same_table"),
        columns: is_true(row, "same_columns"),
        rows: is_true(row, "same_rows"),
        files: is_true(row, "same_files"),
        types: is_true(row, "same_types"),
    }
}

/// Makes the checkpoint one of the table as it is now.
pub(crate) fn adopt(id: &CheckpointId<'_>, target: &Target, visible_rows: bool) -> String {
    format!(
        "UPDATE {} AS c SET identity = {} WHERE {}",
        id.table(),
        identity(target, visible_rows),
        equal("c.name", &literal(id.name))
    )
}

/// Whether one of the rows before the checkpoint was last changed by the transaction that wrote the checkpoint: VACUUM
/// FULL and CLUSTER keep that, and rows that were loaded again do not have it.
pub(crate) fn has_kept_rows(id: &CheckpointId<'_>, target: &Target, last_key: &[String]) -> String {
    let Target { table, greater, .. } = target;
    let key = target
        .key
        .iter()
        .map(|column| format!("{} USING {greater}", identifier(&column.name)));
    let descending: Vec<_> = key.collect();
    // Not after the last key.
    format!(
        "{}SELECT EXISTS (SELECT FROM (SELECT r.xmin FROM {table} AS r WHERE NOT {} {greater} {} ORDER BY {} LIMIT 200) AS r \
         JOIN {} AS c ON r.xmin OPERATOR(pg_catalog.=) c.xmin WHERE {}) AS kept",
        super::batch::settings(target, true),
        target.columns(),
        target.value(last_key),
        descending.join(", "),
        id.table(),
        equal("c.name", &literal(id.name)),
    )
}

pub(crate) fn read_kept_rows(reply: &[SimpleQueryMessage]) -> Option<bool> {
    rows(reply).next().map(|row| is_true(row, "kept"))
}

/// Whether row-level security hides rows of the table from this role.
pub(crate) fn row_security(target: &Target) -> String {
    format!(
        "SELECT pg_catalog.row_security_active({}::pg_catalog.regclass) AS active",
        literal(&target.table.to_string())
    )
}

pub(crate) fn read_row_security(reply: &[SimpleQueryMessage]) -> Option<bool> {
    rows(reply).next().map(|row| is_true(row, "active"))
}

/// Inserts the first checkpoint of the backfill, unless it has one, and queries it.
pub(crate) fn load(
    id: &CheckpointId<'_>,
    target: &Target,
    definition: &str,
    visible_rows: bool,
) -> String {
    let (table, name) = (id.table(), literal(id.name));
    let order = text_array(target.key.iter().map(|column| column.order.as_str()));
    let identity = identity(target, visible_rows);
    let text = literal(definition);
    let mut sql = format!(
        "INSERT INTO {table} (name, definition, key_order, identity) VALUES ({name}, {text}, {order}, {identity}) \
         ON CONFLICT (name) DO NOTHING; \
         SELECT c.definition, {} AS same_order, c.rows_passed, c.rows_done, c.done, c.filter_stays, {}",
        equal("c.key_order", &order),
        compare(definition),
    );
    for n in 1..=target.key.len() {
        // Infallible: writing to a String.
        let _ = write!(sql, ", c.last_key[{n}] AS key_{n}");
    }
    let _ = write!(
        sql,
        " FROM {table} AS c CROSS JOIN (SELECT {identity} AS identity) AS n WHERE {}",
        equal("c.name", &name)
    );
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
        filter_stays: is_true(row, "filter_stays"),
        sameness: read_sameness(row),
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
/// begun under the name: one message. It also queries how many sessions wait for this transaction, and whether the table
/// is the one that the checkpoint belongs to: the batch has locked it.
pub(crate) fn advance(
    id: &CheckpointId<'_>,
    target: &Target,
    before: &Checkpoint,
    result: &BatchResult,
    step: BatchStep,
) -> String {
    let table = id.table();
    let BatchStep {
        is_done,
        is_check,
        visible_rows,
    } = step;
    let processed = if is_check { 0 } else { result.processed };
    let known = before.last_key.iter().flatten().map(String::as_str);
    let known = equal(
        "COALESCE(c.last_key, '{}'::pg_catalog.text[])",
        &text_array(known),
    );
    let last_key = result.last_key.as_ref().filter(|_| !is_check);
    let last_key = last_key.map_or_else(String::new, |key| {
        format!(
            "last_key = {}, ",
            text_array(key.iter().map(String::as_str))
        )
    });
    format!(
        "UPDATE {table} AS c SET {last_key}rows_passed = {}, rows_done = {}, done = {is_done}, \
         filter_stays = c.filter_stays OR {}, updated_at = pg_catalog.now() \
         WHERE {} AND {} AND {} AND {known} AND NOT c.done RETURNING true AS advanced; \
         SELECT (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks AS l WHERE NOT l.granted \
         AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids(l.pid))) AS waiting, {} \
         FROM {table} AS c CROSS JOIN (SELECT {} AS identity) AS n WHERE {}",
        before.processed + processed,
        before.changed + result.changed,
        result.still_matching > 0,
        equal("c.name", &literal(id.name)),
        equal("c.definition", &literal(&before.definition)),
        equal("c.rows_passed", &before.processed.to_string()),
        compare(&before.definition),
        identity(target, visible_rows),
        equal("c.name", &literal(id.name)),
    )
}

/// What a batch is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchStep {
    pub(crate) is_done: bool,
    /// Whether it is of the final check, which passes the rows once more.
    pub(crate) is_check: bool,
    pub(crate) visible_rows: bool,
}

/// How many sessions wait for this transaction, and whether the table is still the same; `None` if another process has
/// recorded a batch.
pub(crate) fn read_advance(reply: &[SimpleQueryMessage]) -> Option<(u64, Sameness)> {
    let mut rows = rows(reply);
    rows.next().filter(|row| is_true(row, "advanced"))?;
    let row = rows.next()?;
    Some((parsed(row, "waiting")?, read_sameness(row)))
}

impl CheckpointId<'_> {
    fn table(&self) -> String {
        format!("{}.{TABLE}", identifier(self.schema))
    }
}
