//! The tables of fencing tokens.

use tokio_postgres::SimpleQueryMessage;

use crate::key::{KeyId, LockKey};
use crate::postgres::TableName;
use crate::postgres::sql::{is_true, literal, parsed, rows};

/// The newest token of each lock.
pub(crate) const TOKENS: &str = "lockkeeper_fencing";
/// Which server the tokens are issued by: one row.
pub(crate) const SERVER: &str = "lockkeeper_fencing_server";

/// The two tables.
#[derive(Clone, Debug)]
pub(crate) struct FencingTables {
    pub(crate) tokens: TableName,
    pub(crate) server: TableName,
}

/// The server's timeline.
///
/// `pg_control_checkpoint()` has it too, but only from the first checkpoint after a promotion on.
const TIMELINE: &str = "('x' OPERATOR(pg_catalog.||) pg_catalog.substr(\
     pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8))::pg_catalog.bit(32)::pg_catalog.int8";

/// What tells a cluster from all others: `initdb` and `pg_upgrade` make a new one, a standby has its primary's.
const SYSTEM: &str = "(SELECT c.system_identifier FROM pg_catalog.pg_control_system() AS c)";

/// What tells a database from all others of its cluster, also from one that it was copied from.
const DATABASE: &str = "(SELECT d.oid FROM pg_catalog.pg_database AS d \
     WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database()))";

/// What tells a table from the one that was dumped.
fn table_oid(table: &TableName) -> String {
    format!(
        "{}::pg_catalog.regclass::pg_catalog.oid",
        literal(&table.to_string())
    )
}

/// The tables, where they are missing.
pub(crate) fn create(tables: &FencingTables) -> String {
    let FencingTables { tokens, server } = tables;
    format!(
        "CREATE TABLE IF NOT EXISTS {tokens} (key pg_catalog.text PRIMARY KEY, \
         epoch pg_catalog.int8 NOT NULL, counter pg_catalog.int8 NOT NULL, \
         resigned pg_catalog.bool NOT NULL DEFAULT false, \
         issued_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now());\n\
         CREATE TABLE IF NOT EXISTS {server} (is_this pg_catalog.bool PRIMARY KEY DEFAULT true CHECK (is_this), \
         system_identifier pg_catalog.int8 NOT NULL, database pg_catalog.oid NOT NULL, tokens pg_catalog.oid NOT NULL, \
         timeline pg_catalog.int8 NOT NULL, base pg_catalog.int8 NOT NULL)"
    )
}

/// Whether the row `s` of the server is of the tables as they are here: this cluster, database and table.
///
/// A table that was restored from a dump has lost the tokens since, in the same cluster too.
fn is_here(tables: &FencingTables) -> String {
    format!(
        "pg_catalog.int8eq(s.system_identifier, {SYSTEM}) AND pg_catalog.oideq(s.database, {DATABASE}) \
         AND pg_catalog.oideq(s.tokens, {})",
        table_oid(&tables.tokens)
    )
}

/// The least base with which every token from now on is newer than all in the table, and than those up to the floor's epoch,
/// on the cluster that the table was set up for.
fn least_base(tables: &FencingTables, floor: Option<i64>) -> String {
    let newest = newest(tables);
    let floor = floor.map_or_else(String::new, |epoch| {
        // Infinite would be the alternative to saturating: no timeline reaches it either way.
        format!(
            ", pg_catalog.int8mi({}, {TIMELINE})",
            epoch.saturating_add(1)
        )
    });
    format!("GREATEST(0, pg_catalog.int8mi({newest}, {TIMELINE}){floor})")
}

/// The greatest epoch of all tokens that are known.
fn newest(tables: &FencingTables) -> String {
    format!(
        "COALESCE((SELECT pg_catalog.max(f.epoch) FROM {} AS f), 0)",
        tables.tokens
    )
}

/// Whether the row of the server is as [`adopt`] leaves it.
pub(crate) fn is_adopted(tables: &FencingTables, floor: Option<i64>) -> String {
    format!(
        "SELECT EXISTS (SELECT FROM {} AS s WHERE {} AND pg_catalog.int8ge(s.base, {})) AS yes",
        tables.server,
        is_here(tables),
        least_base(tables, floor)
    )
}

/// Has this server issue the tokens: two statements of one transaction.
///
/// The lock waits for the tokens that are being issued, which know the base as it was, and keeps others from it.
///
/// The timeline of another cluster begins anew, at 1 at the lowest, so there the base is the newest epoch. And it is at least
/// the epoch in which the row was written: there may have been tokens since that the table does not have.
pub(crate) fn adopt(tables: &FencingTables, floor: Option<i64>) -> String {
    let FencingTables { tokens, server } = tables;
    let (newest, least) = (newest(tables), least_base(tables, floor));
    let (is_here, tokens_oid) = (is_here(tables), table_oid(tokens));
    format!(
        "LOCK TABLE {tokens} IN SHARE ROW EXCLUSIVE MODE;\n\
         INSERT INTO {server} AS s (system_identifier, database, tokens, timeline, base) \
         VALUES ({SYSTEM}, {DATABASE}, {tokens_oid}, {TIMELINE}, GREATEST({newest}, {least}))\n\
         ON CONFLICT (is_this) DO UPDATE SET system_identifier = EXCLUDED.system_identifier, \
         database = EXCLUDED.database, tokens = EXCLUDED.tokens, timeline = EXCLUDED.timeline, \
         base = CASE WHEN {is_here} THEN GREATEST(s.base, {least}) \
         ELSE GREATEST(pg_catalog.int8pl(s.base, s.timeline), EXCLUDED.base) END"
    )
}

/// The same in one statement, which needs no transaction around it.
pub(crate) fn adopt_alone(tables: &FencingTables, floor: Option<i64>) -> String {
    let block = format!("BEGIN\n{};\nEND", adopt(tables, floor));
    format!("DO LANGUAGE plpgsql {}", literal(&block))
}

/// Waits in line with all who issue or check tokens of the lock, until the end of the transaction.
///
/// The row's lock alone is not fair: who shares it overtakes who waits to update it.
fn stand_in_line(key: KeyId, function: &str) -> String {
    let key = LockKey::from(("lockkeeper fencing", key_name(key)));
    let key = key.as_i64().unwrap_or_default();
    format!("SELECT pg_catalog.{function}(('{key}')::pg_catalog.int8)")
}

/// Alone.
const ALONE: &str = "pg_advisory_xact_lock";
/// Together with all who check.
const SHARED: &str = "pg_advisory_xact_lock_shared";

/// The key as the table has it.
fn key_name(key: KeyId) -> String {
    match key {
        KeyId::Int8(key) => key.to_string(),
        KeyId::Int4(first, second) => format!("({first}, {second})"),
    }
}

fn key_text(key: KeyId) -> String {
    literal(&key_name(key))
}

/// What has the next commit survive a crash of this server.
const DURABLE: &str = "SELECT pg_catalog.set_config('synchronous_commit', 'local', true) \
     WHERE pg_catalog.texteq(pg_catalog.current_setting('synchronous_commit'), 'off')";

/// Issues the next token of a lock: one message. No row where the server is not the one of the tables, or the table has a
/// token of a later epoch than this server's.
pub(crate) fn issue(tables: &FencingTables, key: KeyId) -> String {
    let FencingTables { tokens, server } = tables;
    let (line, is_here, key) = (stand_in_line(key, ALONE), is_here(tables), key_text(key));
    format!(
        "{DURABLE}; {line}; WITH old AS MATERIALIZED (SELECT f.epoch, f.counter, f.resigned FROM {tokens} AS f \
         WHERE pg_catalog.texteq(f.key, {key})), \
         here AS MATERIALIZED (SELECT pg_catalog.int8pl(s.base, {TIMELINE}) AS epoch FROM {server} AS s \
         WHERE {is_here}), \
         issued AS (INSERT INTO {tokens} AS f (key, epoch, counter) SELECT {key}, here.epoch, 1 FROM here \
         ON CONFLICT (key) DO UPDATE SET epoch = EXCLUDED.epoch, counter = pg_catalog.int8pl(f.counter, 1), \
         resigned = false, issued_at = pg_catalog.now() WHERE pg_catalog.int8le(f.epoch, EXCLUDED.epoch) \
         RETURNING f.epoch, f.counter) \
         SELECT issued.epoch, issued.counter, old.epoch AS old_epoch, old.counter AS old_counter, \
         old.resigned AS old_resigned FROM issued LEFT JOIN old ON true"
    )
}

/// A token that was issued, and the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IssuedRow {
    pub(crate) token: (i64, i64),
    pub(crate) before: Option<(i64, i64)>,
    /// Whether the holder of the one before has given the lock up in order.
    pub(crate) resigned: bool,
}

pub(crate) fn read_issued(reply: &[SimpleQueryMessage]) -> Option<IssuedRow> {
    let row = rows(reply).find(|row| parsed::<i64>(row, "counter").is_some())?;
    let before = parsed(row, "old_epoch").zip(parsed(row, "old_counter"));
    Some(IssuedRow {
        token: (parsed(row, "epoch")?, parsed(row, "counter")?),
        before,
        resigned: is_true(row, "old_resigned"),
    })
}

/// Notes that the tenure with this token has ended in order: one message.
pub(crate) fn resign(tables: &FencingTables, key: KeyId, (epoch, counter): (i64, i64)) -> String {
    format!(
        "{DURABLE}; {}; UPDATE {} AS f SET resigned = true WHERE pg_catalog.texteq(f.key, {}) \
         AND pg_catalog.int8eq(f.epoch, ('{epoch}')::pg_catalog.int8) \
         AND pg_catalog.int8eq(f.counter, ('{counter}')::pg_catalog.int8)",
        stand_in_line(key, ALONE),
        tables.tokens,
        key_text(key)
    )
}

/// The newest token of a lock, unless it is older than this one. Until the end of the transaction who issues the next one waits
/// for it.
///
/// The row is locked so that a transaction whose snapshot is older than the row fails. An older row is not: two who have both
/// shared it could not both update it.
pub(crate) fn newest_locked(
    tables: &FencingTables,
    key: KeyId,
    (epoch, counter): (i64, i64),
) -> String {
    format!(
        "{}; SELECT f.epoch, f.counter FROM {} AS f WHERE pg_catalog.texteq(f.key, {}) \
         AND (pg_catalog.int8gt(f.epoch, ('{epoch}')::pg_catalog.int8) \
         OR pg_catalog.int8eq(f.epoch, ('{epoch}')::pg_catalog.int8) \
         AND pg_catalog.int8ge(f.counter, ('{counter}')::pg_catalog.int8)) FOR SHARE",
        stand_in_line(key, SHARED),
        tables.tokens,
        key_text(key)
    )
}

pub(crate) fn read_newest(reply: &[SimpleQueryMessage]) -> Option<(i64, i64)> {
    rows(reply).find_map(|row| parsed(row, "epoch").zip(parsed(row, "counter")))
}

/// Notes a token that another server has issued, unless the table has a newer one.
pub(crate) fn note(tables: &FencingTables, key: KeyId, (epoch, counter): (i64, i64)) -> String {
    format!(
        "INSERT INTO {} AS f (key, epoch, counter) VALUES ({}, ('{epoch}')::pg_catalog.int8, \
         ('{counter}')::pg_catalog.int8) \
         ON CONFLICT (key) DO UPDATE SET epoch = EXCLUDED.epoch, counter = EXCLUDED.counter, resigned = false \
         WHERE pg_catalog.int8lt(f.epoch, EXCLUDED.epoch) \
         OR pg_catalog.int8eq(f.epoch, EXCLUDED.epoch) AND pg_catalog.int8lt(f.counter, EXCLUDED.counter)",
        tables.tokens,
        key_text(key)
    )
}
