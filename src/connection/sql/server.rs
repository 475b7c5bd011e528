//! What must be known of a server once.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use crate::postgres::sql::{is_false, is_true, literal, parsed, rows, setting_duration, text};

/// The server that a connection leads to.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    /// Tells one running server from another: the postmaster's start.
    pub(crate) identity: Arc<str>,
    pub(crate) deadlock_timeout: Duration,
    pub(crate) is_standby: bool,
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
     pg_catalog.pg_is_in_recovery() AS recovery, \
     pg_catalog.has_table_privilege(pg_catalog.to_regclass('pg_catalog.pg_locks'), 'SELECT') AS may_read_locks, \
     pg_catalog.has_function_privilege(pg_catalog.to_regprocedure('pg_catalog.pg_control_system()'), 'EXECUTE') \
     AS may_read_control";

pub(crate) fn server(row: &SimpleQueryRow) -> Option<Server> {
    Some(Server {
        identity: text(row, "server")?.into(),
        deadlock_timeout: setting_duration(&text(row, "deadlock_timeout")?)?,
        is_standby: is_true(row, "recovery"),
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

/// The backend that answers here.
pub(crate) const BACKEND_PID: &str = "SELECT pg_catalog.pg_backend_pid() AS pid";

pub(crate) fn backend_pid(reply: &[SimpleQueryMessage]) -> Option<i32> {
    parsed(rows(reply).next()?, "pid")
}

/// Signals a backend, but only while it still runs a statement under the name it was last seen with.
pub(crate) fn cancel_backend(pid: i32, application_name: Option<&str>) -> String {
    let name = application_name.map_or_else(String::new, |name| {
        format!(
            " AND pg_catalog.texteq(a.application_name, {})",
            literal(name)
        )
    });
    format!(
        "SELECT pg_catalog.pg_cancel_backend(a.pid) FROM pg_catalog.pg_stat_activity AS a \
         WHERE pg_catalog.int4eq(a.pid, {pid}) AND pg_catalog.texteq(a.state, 'active'){name}"
    )
}

/// Whether the backend of this pid is executing a statement. Where the role may not see what it does, its state is NULL,
/// and it counts as executing: what is not known is not taken for idle.
pub(crate) fn is_executing(pid: i32) -> String {
    format!(
        "SELECT a.pid FROM pg_catalog.pg_stat_activity AS a WHERE pg_catalog.int4eq(a.pid, {pid}) \
         AND pg_catalog.nameeq(a.datname, pg_catalog.current_database()) \
         AND (a.state IS NULL OR pg_catalog.texteq(a.state, 'active') OR pg_catalog.texteq(a.state, 'fastpath function call'))"
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
