//! What must be known of a server once.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use crate::postgres::sql::{
    COMMIT, Message, is_false, is_true, literal, parsed, rows, setting_duration, text,
};

/// The server that a connection leads to.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    /// Tells one running server from another: the postmaster's start.
    pub(crate) identity: Arc<str>,
    pub(crate) deadlock_timeout: Duration,
    pub(crate) is_standby: bool,
    pub(crate) database: Arc<str>,
    pub(crate) denied: Denied,
}

/// What the connection's role may not read. What is not known counts as allowed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Denied {
    pub(crate) pg_locks: bool,
    pub(crate) pg_control_system: bool,
}

/// The columns of [`server`], behind others.
///
/// The names are looked up, not cast: an engine that has none of that name gives NULL.
pub(crate) const SERVER: &str = ", pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) AS server, \
     pg_catalog.current_setting('deadlock_timeout') AS deadlock_timeout, \
     pg_catalog.pg_is_in_recovery() AS recovery, pg_catalog.current_database() AS database, \
     pg_catalog.has_table_privilege(pg_catalog.to_regclass('pg_catalog.pg_locks'), 'SELECT') AS may_read_locks, \
     pg_catalog.has_function_privilege(pg_catalog.to_regprocedure('pg_catalog.pg_control_system()'), 'EXECUTE') \
     AS may_read_control";

pub(crate) fn server(row: &SimpleQueryRow) -> Option<Server> {
    Some(Server {
        identity: text(row, "server")?.into(),
        deadlock_timeout: setting_duration(&text(row, "deadlock_timeout")?)?,
        is_standby: is_true(row, "recovery"),
        database: text(row, "database").unwrap_or_default().into(),
        denied: Denied {
            pg_locks: is_false(row, "may_read_locks"),
            pg_control_system: is_false(row, "may_read_control"),
        },
    })
}

/// Not one of the servers that `known` are the identities of.
pub(crate) fn is_none_of(known: &[Arc<str>]) -> String {
    let known: Vec<_> = known.iter().map(|identity| literal(identity)).collect();
    format!(
        "pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time())::pg_catalog.text \
         OPERATOR(pg_catalog.<>) ALL (ARRAY[{}]::pg_catalog.text[])",
        known.join(", ")
    )
}

/// The size of the lock table and how much of it is taken.
///
/// The table is sized for `max_locks_per_transaction` locks of each allowed session and prepared transaction
/// (PostgreSQL's documentation, "Lock Management"); what it holds beyond that is shared memory others count on.
///
/// How much is taken is NULL where the role may not know.
pub(crate) fn lock_table_query(denied: Denied) -> String {
    let taken = if denied.pg_locks {
        "NULL"
    } else {
        "(SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks AS l WHERE NOT l.fastpath)"
    };
    format!(
        "SELECT pg_catalog.int8mul(pg_catalog.current_setting('max_locks_per_transaction')::pg_catalog.int8, \
         pg_catalog.int8pl(pg_catalog.current_setting('max_connections')::pg_catalog.int8, \
         pg_catalog.current_setting('max_prepared_transactions')::pg_catalog.int8)) AS capacity, {taken} AS taken"
    )
}

/// How many locks the table is made for, and how many it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LockTable {
    pub(crate) capacity: u64,
    /// `None` where the role may not know.
    pub(crate) taken: Option<u64>,
}

pub(crate) fn lock_table(reply: &[SimpleQueryMessage]) -> Option<LockTable> {
    let row = rows(reply).next()?;
    Some(LockTable {
        capacity: parsed(row, "capacity")?,
        taken: parsed(row, "taken"),
    })
}

/// A timeout of the server's settings; empty where it has none of that name.
pub(crate) fn setting(name: &str) -> String {
    format!(
        "SELECT pg_catalog.current_setting({}, true) AS setting",
        literal(name)
    )
}

pub(crate) fn duration(reply: &[SimpleQueryMessage]) -> Option<Duration> {
    setting_duration(&text(rows(reply).next()?, "setting")?)
}

/// The backend that answers here.
pub(crate) const BACKEND_PID: &str = "SELECT pg_catalog.pg_backend_pid() AS pid";

pub(crate) fn backend_pid(reply: &[SimpleQueryMessage]) -> Option<i32> {
    parsed(rows(reply).next()?, "pid")
}

macro_rules! is_fresh {
    () => {
        "pg_catalog.timestamptz_eq(pg_catalog.now(), pg_catalog.statement_timestamp())"
    };
}

macro_rules! xact_start {
    () => {
        "(pg_catalog.date_part('epoch', pg_catalog.now()) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8"
    };
}

/// False in a transaction that was open before the message came.
pub(crate) const IS_FRESH: &str = is_fresh!();

/// [`IS_FRESH`] as a column.
pub(crate) const FRESH: &str = concat!(is_fresh!(), " AS fresh, ");

/// Whether a reply says so in [`FRESH`].
pub(crate) fn is_fresh(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "fresh"))
}

/// COMMIT that cannot hide a rollback: in an aborted transaction the server answers COMMIT with success and the tag
/// `ROLLBACK`, which the driver does not show; the SELECT before it fails there with 25P02, and then the COMMIT is not
/// run. (<https://github.com/rust-postgres/rust-postgres/issues/1334>; test `commit_of_an_aborted_transaction`.)
///
/// Its one row shows whether the transaction is the one that was to be committed.
pub(crate) fn check_and_commit() -> Message {
    Message::of(2, format!("SELECT {FRESH}{XACT_START}; {COMMIT}"))
}

/// When the transaction began, which no other one of the backend has: in microseconds since 1970, whatever the session's
/// settings make of a timestamp.
pub(crate) const XACT_START_VALUE: &str = xact_start!();

/// [`XACT_START_VALUE`] as a column.
pub(crate) const XACT_START: &str = concat!(xact_start!(), " AS xact_start");

pub(crate) fn xact_start(reply: &[SimpleQueryMessage]) -> Option<i64> {
    rows(reply).find_map(|row| parsed(row, "xact_start"))
}

/// The same of what a backend is executing.
pub(crate) fn executing(pid: i32) -> String {
    format!(
        "SELECT {XACT_START_OF_OTHER} AS xact_start FROM pg_catalog.pg_stat_activity AS a \
         WHERE pg_catalog.int4eq(a.pid, {pid}) AND pg_catalog.texteq(a.state, 'active')"
    )
}

/// Signals a backend, but only while it executes a statement in the transaction that began at this time.
pub(crate) fn cancel_transaction(pid: i32, xact_start: i64) -> String {
    format!(
        "SELECT pg_catalog.pg_cancel_backend(a.pid) FROM pg_catalog.pg_stat_activity AS a \
         WHERE pg_catalog.int4eq(a.pid, {pid}) AND pg_catalog.texteq(a.state, 'active') \
         AND pg_catalog.int8eq({XACT_START_OF_OTHER}, {xact_start})"
    )
}

const XACT_START_OF_OTHER: &str = "(pg_catalog.date_part('epoch', a.xact_start) \
     OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8";

/// Whether the backend of this pid is executing a statement. One that reads from its client is not, unless that is what its
/// COPY does and it `may_copy`: the rest of its message is lost. Where the role may not see what it does, its state is
/// NULL, and it counts as executing: what is not known is not taken for idle.
pub(crate) fn is_executing(pid: i32, may_copy: bool) -> String {
    format!(
        "SELECT a.pid FROM pg_catalog.pg_stat_activity AS a WHERE pg_catalog.int4eq(a.pid, {pid}) \
         AND pg_catalog.nameeq(a.datname, pg_catalog.current_database()) \
         AND (a.state IS NULL OR pg_catalog.texteq(a.state, 'fastpath function call') \
         OR pg_catalog.texteq(a.state, 'active') AND (a.wait_event IS NULL OR pg_catalog.textne(a.wait_event, 'ClientRead') \
         OR {may_copy} AND EXISTS (SELECT FROM pg_catalog.pg_stat_progress_copy AS c WHERE pg_catalog.int4eq(c.pid, a.pid))))"
    )
}

pub(crate) fn executes(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).next().is_some()
}

/// What the side connection goes by.
pub(crate) const SIDE_NAME: &str = "lockkeeper side connection";

/// What is asked beside the transactions is small: a server that cannot answer it soon is left alone. For one message,
/// which is one transaction: settings of the session would be left to others where a pooler shares it out.
pub(crate) fn with_short_timeouts(sql: &str) -> String {
    format!("SET LOCAL statement_timeout = 2000; SET LOCAL lock_timeout = 1000; {sql}")
}

/// Whether the server is a standby.
pub(crate) const IN_RECOVERY: &str = "SELECT pg_catalog.pg_is_in_recovery() AS recovery";

pub(crate) fn in_recovery(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "recovery"))
}
