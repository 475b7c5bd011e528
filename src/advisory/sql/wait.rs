//! Waiting for locks, for a bounded time.

use std::fmt::Write as _;
use std::time::Duration;

use super::keys::{KeyRows, Locks, call, take_each};
use super::release::set_application_name;
use super::try_lock::{Names, try_in_transaction};
use crate::advisory::sql::blockers;
use crate::connection::sql::server::{Denied, XACT_START};
use crate::deadline::timeout_millis;
use crate::postgres::sql::{literal, set_local};
use crate::transaction::sql::Begin;

/// [`try_in_transaction`] for several locks: in a savepoint, so that those which were granted can be returned when one
/// of them is busy.
pub(crate) fn try_at_savepoint(locks: Locks<'_>) -> String {
    format!("{MARK}; {}", try_in_transaction(locks))
}

/// Where [`UNDO_TRIED`] goes back to.
pub(crate) const MARK: &str = "SAVEPOINT lockkeeper_wait";

/// Keeps what was granted since [`try_at_savepoint`].
pub(crate) const KEEP_TRIED: &str = "RELEASE SAVEPOINT lockkeeper_wait";

/// Returns it.
pub(crate) const UNDO_TRIED: &str =
    "ROLLBACK TO SAVEPOINT lockkeeper_wait; RELEASE SAVEPOINT lockkeeper_wait";

/// One wait for the locks in the transaction that has begun, at most `wait` long in all, after which the timeouts are what
/// they were.
pub(crate) fn wait_in_transaction(locks: Locks<'_>, wait: Duration) -> String {
    let mut sql = String::with_capacity(1536);
    let _ = write!(sql, "SELECT {XACT_START}");
    // A target list is evaluated from left to right. What a setting was is kept in one of the transaction's own.
    for setting in CHANGED {
        push_copy(&mut sql, setting, &format!("lockkeeper.{setting}"));
    }
    let _ = write!(sql, ", {FOR_A_WAIT}; ");
    wait_for_xact_locks(&mut sql, locks, wait);
    sql.push_str("SELECT 1");
    for setting in CHANGED {
        push_copy(&mut sql, &format!("lockkeeper.{setting}"), setting);
    }
    sql
}

/// What a wait changes.
const CHANGED: [&str; 4] = [
    "lock_timeout",
    "statement_timeout",
    "client_connection_check_interval",
    "transaction_timeout",
];

/// Gives one setting the value of another, where there is one: `transaction_timeout` is of PostgreSQL 17.
fn push_copy(sql: &mut String, from: &str, to: &str) {
    let _ = write!(
        sql,
        ", CASE WHEN pg_catalog.current_setting('{from}', true) IS NOT NULL \
         THEN pg_catalog.set_config('{to}', pg_catalog.current_setting('{from}'), true) END"
    );
}

/// Has the server look twice a second, while its backend waits, whether the client is still there: only on Linux does
/// every major support it (PostgreSQL's documentation, "Connections and Authentication"). And the transaction may take as
/// long as the wait.
const FOR_A_WAIT: &str = "CASE WHEN pg_catalog.textregexeq(pg_catalog.version(), 'linux') \
     THEN pg_catalog.set_config('client_connection_check_interval', '500ms', true) END, \
     CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL \
     THEN pg_catalog.set_config('transaction_timeout', '0', true) END";

/// `set_config('lock_timeout', …), `: what the message's own clock leaves of `wait`, in milliseconds. `lock_timeout` counts each wait by
/// itself; set so before each lock of several, the sum of their waits stays within it.
fn push_set_lock_timeout(sql: &mut String, wait: i32) {
    let left = format!(
        "({wait} OPERATOR(pg_catalog.-) (1000 OPERATOR(pg_catalog.*) pg_catalog.date_part('epoch', \
         pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.statement_timestamp())))::pg_catalog.int4"
    );
    let _ = write!(
        sql,
        "pg_catalog.set_config('lock_timeout', pg_catalog.int4larger(1, {left})::pg_catalog.text, true), "
    );
}

/// One wait of its full length inside a savepoint, which [`undo_wait_at_savepoint`] goes back to when it times out: the
/// transaction around it stays usable.
pub(crate) fn wait_at_savepoint(locks: Locks<'_>, wait: Duration) -> String {
    format!("{MARK}; {}; {KEEP_TRIED}", wait_in_transaction(locks, wait))
}

/// [`wait_at_savepoint`] once more after one that timed out.
pub(crate) fn wait_at_savepoint_again(locks: Locks<'_>, wait: Duration) -> String {
    format!("{UNDO_TRIED}; {}", wait_at_savepoint(locks, wait))
}

/// Undoes a [`wait_at_savepoint`] that failed, and asks who is in the way.
pub(crate) fn undo_wait_at_savepoint(locks: Locks<'_>, denied: Denied) -> String {
    let mut sql = String::from(UNDO_TRIED);
    blockers::push(&mut sql, locks, denied);
    sql
}

/// [`wait_in_transaction`] once more after a wait that timed out and so aborted the transaction.
pub(crate) fn begin_again_and_wait(begin: &Begin, locks: Locks<'_>, wait: Duration) -> String {
    let mut sql = String::from("ROLLBACK; ");
    sql.push_str(&begin.message());
    sql.push_str(&wait_in_transaction(locks, wait));
    sql
}

/// One bounded wait for session locks: only transaction locks wait, and a failed wait is rolled back with its
/// transaction; then the session locks are granted re-entrantly, without a wait that a timeout could end too late.
///
/// A session lock awaited directly leaks: `lock_timeout` can raise its error after the lock was granted (test
/// `postgres_facts::session_lock_leaks_under_lock_timeout`).
pub(crate) fn wait_session(
    locks: Locks<'_>,
    names: Names<'_>,
    wait: Duration,
    after_timeout: bool,
) -> String {
    let mut sql = String::with_capacity(768);
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str("BEGIN ISOLATION LEVEL READ COMMITTED; ");
    if let Some(name) = names.waiting {
        set_local(&mut sql, "application_name", &literal(name));
    }
    let _ = write!(sql, "SELECT {FOR_A_WAIT}; ");
    wait_for_xact_locks(&mut sql, locks, wait);
    sql.push_str("SELECT ");
    take_each(&mut sql, locks);
    sql.push_str("; COMMIT");
    if let Some(name) = names.holding {
        sql.push_str("; ");
        sql.push_str(&set_application_name(name));
    }
    sql
}

fn wait_for_xact_locks(sql: &mut String, locks: Locks<'_>, wait: Duration) {
    set_local(sql, "statement_timeout", "0");
    let wait = timeout_millis(wait);
    set_local(sql, "lock_timeout", &wait.to_string());
    if let [key] = locks.keys {
        sql.push_str("SELECT ");
        call(sql, "pg_advisory_xact_lock", locks.mode, key);
        sql.push_str("; ");
        return;
    }
    for rows in KeyRows::of(locks.keys) {
        sql.push_str("SELECT ");
        push_set_lock_timeout(sql, wait);
        rows.call(sql, "pg_advisory_xact_lock", locks.mode);
        sql.push(' ');
        rows.from(sql);
        sql.push_str("; ");
    }
}
