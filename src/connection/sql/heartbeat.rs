//! What a heartbeat asks on the connection that holds session locks, and what is asked before on another one.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use super::server::FRESH;
use crate::postgres::sql::{is_false, is_true, parsed, rows, setting_duration, text};

/// The backend, its idle timeout, and whether it holds what it should: `held` is an expression for that.
pub(crate) fn heartbeat(held: &str) -> String {
    // The comment is for who reads pg_stat_activity.
    format!(
        "SELECT /* lockkeeper heartbeat */ {FRESH}pg_catalog.pg_backend_pid() AS pid, \
         pg_catalog.current_setting('idle_session_timeout', true) AS idle_session_timeout, {held} AS held"
    )
}

/// Where nothing says whether it holds what it should.
pub(crate) const NOT_KNOWN: &str = "NULL";

/// The answer to [`heartbeat`].
#[derive(Debug)]
pub(crate) struct Heartbeat {
    pub(crate) pid: i32,
    /// `None` where the server has none.
    pub(crate) idle_session_timeout: Option<Duration>,
    pub(crate) is_missing: bool,
    pub(crate) in_transaction: bool,
}

pub(crate) fn read_heartbeat(reply: &[SimpleQueryMessage]) -> Option<Heartbeat> {
    let row = rows(reply).next()?;
    let timeout = text(row, "idle_session_timeout");
    Some(Heartbeat {
        pid: parsed(row, "pid")?,
        idle_session_timeout: timeout
            .and_then(|timeout| setting_duration(&timeout))
            .filter(|timeout| !timeout.is_zero()),
        is_missing: is_false(row, "held"),
        in_transaction: !is_true(row, "fresh"),
    })
}

/// Whether a backend waits for its client outside of a transaction. No where the role may not see that.
pub(crate) fn is_idle(pid: i32) -> String {
    format!(
        "SELECT a.pid FROM pg_catalog.pg_stat_activity AS a WHERE pg_catalog.int4eq(a.pid, {pid}) \
         AND pg_catalog.nameeq(a.datname, pg_catalog.current_database()) AND pg_catalog.texteq(a.state, 'idle')"
    )
}

/// Whether a backend is there at all.
pub(crate) fn lives(pid: i32) -> String {
    format!(
        "SELECT a.pid FROM pg_catalog.pg_stat_activity AS a WHERE pg_catalog.int4eq(a.pid, {pid}) \
         AND pg_catalog.nameeq(a.datname, pg_catalog.current_database())"
    )
}

pub(crate) fn idles(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).next().is_some()
}
