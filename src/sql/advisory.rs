//! The texts that take and return advisory locks.
//!
//! A set of keys is locked in the order it is given; callers sort it.

use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use super::{Begin, literal, parsed, rows, set_local, setting_duration, text};
use crate::deadline::timeout_millis;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

/// The keys of one request, in locking order, and the mode they are all taken in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Locks<'a> {
    pub(crate) keys: &'a [LockKey],
    pub(crate) mode: AdvisoryMode,
}

/// What a `try` answered, read before anything else is known of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Granted,
    Busy,
    /// The server is a standby. Nothing was granted.
    Standby,
    /// The transaction reads from a snapshot taken before the lock. Nothing was granted.
    Snapshot,
    /// The connection came with somebody's open transaction. Nothing was granted.
    Dirty,
    /// A pooler stands between. Nothing was granted.
    Pooled,
}

/// The reply to a `try`.
#[derive(Clone, Debug)]
pub(crate) struct Tried {
    pub(crate) verdict: Verdict,
    pub(crate) pid: i32,
    /// Tells one running server from another: the postmaster's start.
    pub(crate) server: String,
    pub(crate) application_name: String,
    /// As the server writes them, to be put back as they were.
    pub(crate) lock_timeout: String,
    pub(crate) statement_timeout: String,
    pub(crate) deadlock_timeout: Duration,
}

/// The columns beside the verdict. They cost no round trip and a few microseconds.
const CONTEXT: &str = "pg_catalog.pg_backend_pid() AS pid, \
     pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) AS server, \
     pg_catalog.current_setting('lock_timeout') AS lock_timeout, \
     pg_catalog.current_setting('statement_timeout') AS statement_timeout, \
     pg_catalog.current_setting('deadlock_timeout') AS deadlock_timeout";

/// An open transaction began before this message did.
const NOT_FRESH: &str = "WHEN NOT pg_catalog.timestamptz_eq(pg_catalog.now(), pg_catalog.statement_timestamp()) THEN 'dirty' ";
const STANDBY: &str = "WHEN pg_catalog.pg_is_in_recovery() THEN 'standby' ";
/// REPEATABLE READ and SERIALIZABLE take their snapshot before the lock is granted, so that what is read under the
/// lock may be older than what its last holder committed.
const SNAPSHOT: &str = "WHEN NOT pg_catalog.starts_with(pg_catalog.current_setting('transaction_isolation'), 'read ') \
     THEN 'snapshot' ";

/// Reads the last row of a `try`.
pub(crate) fn tried(reply: &[SimpleQueryMessage]) -> Option<Tried> {
    let row = rows(reply).find(|row| {
        row.columns()
            .iter()
            .any(|column| column.name() == "verdict")
    })?;
    let verdict = match row.try_get("verdict").ok().flatten()? {
        "granted" => Verdict::Granted,
        "busy" => Verdict::Busy,
        "standby" => Verdict::Standby,
        "snapshot" => Verdict::Snapshot,
        "dirty" => Verdict::Dirty,
        "pooled" => Verdict::Pooled,
        _ => return None,
    };
    Some(Tried {
        verdict,
        pid: parsed(row, "pid")?,
        server: text(row, "server")?,
        application_name: text(row, "application_name").unwrap_or_default(),
        lock_timeout: text(row, "lock_timeout")?,
        statement_timeout: text(row, "statement_timeout")?,
        deadlock_timeout: setting_duration(row.try_get("deadlock_timeout").ok().flatten()?)?,
    })
}

/// One message that begins a transaction and tries the locks in it. It never waits.
pub(crate) fn begin_and_try(begin: &Begin, locks: Locks<'_>) -> String {
    let mut sql = begin.message();
    sql.push_str("SELECT CASE ");
    sql.push_str(NOT_FRESH);
    sql.push_str(STANDBY);
    sql.push_str(SNAPSHOT);
    sql.push_str("WHEN ");
    all_of(&mut sql, locks, "pg_try_advisory_xact_lock");
    sql.push_str(" THEN 'granted' ELSE 'busy' END AS verdict, ");
    sql.push_str(CONTEXT);
    sql
}

/// The `try` for one more lock inside a transaction that has begun: nothing but the lock is judged anew.
pub(crate) fn try_in_transaction(locks: Locks<'_>) -> String {
    let mut sql = String::from("SELECT CASE ");
    sql.push_str(STANDBY);
    sql.push_str(SNAPSHOT);
    sql.push_str("WHEN ");
    all_of(&mut sql, locks, "pg_try_advisory_xact_lock");
    sql.push_str(" THEN 'granted' ELSE 'busy' END AS verdict, ");
    sql.push_str(CONTEXT);
    sql
}

/// One wait for the locks in the transaction that has begun, at most `wait` long in all, after which both timeouts are
/// what `tried` found.
///
/// `statement_timeout` is off while waiting: when it is not longer than `lock_timeout` it would end the wait with
/// 57014, which cannot be told from somebody's cancel.
pub(crate) fn wait_in_transaction(locks: Locks<'_>, wait: Duration, tried: &Tried) -> String {
    let mut sql = String::with_capacity(512);
    wait_for_xact_locks(&mut sql, locks, wait);
    set_local(&mut sql, "lock_timeout", &literal(&tried.lock_timeout));
    set_local(
        &mut sql,
        "statement_timeout",
        &literal(&tried.statement_timeout),
    );
    sql
}

/// [`wait_in_transaction`] inside a savepoint, which [`undo_wait_at_savepoint`] goes back to when it times out: the
/// transaction around it stays usable.
pub(crate) fn wait_at_savepoint(locks: Locks<'_>, wait: Duration, tried: &Tried) -> String {
    format!(
        "SAVEPOINT lockkeeper_wait; {}RELEASE SAVEPOINT lockkeeper_wait",
        wait_in_transaction(locks, wait, tried)
    )
}

/// Undoes a [`wait_at_savepoint`] that failed, and asks who is in the way.
pub(crate) fn undo_wait_at_savepoint(locks: Locks<'_>) -> String {
    format!(
        "ROLLBACK TO SAVEPOINT lockkeeper_wait; RELEASE SAVEPOINT lockkeeper_wait; {}",
        super::blockers::of(locks)
    )
}

/// [`wait_in_transaction`] once more after a wait that timed out and so aborted the transaction.
pub(crate) fn begin_again_and_wait(
    begin: &Begin,
    locks: Locks<'_>,
    wait: Duration,
    tried: &Tried,
) -> String {
    let mut sql = String::from("ROLLBACK; ");
    sql.push_str(&begin.message());
    sql.push_str(&wait_in_transaction(locks, wait, tried));
    sql
}

/// The last look of a wait that timed out: a `try`, and who is in the way if it fails. One message, so that both speak
/// of the same moment.
pub(crate) fn begin_and_look(begin: &Begin, locks: Locks<'_>, after_timeout: bool) -> String {
    let mut sql = String::new();
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(&begin_and_try(begin, locks));
    sql.push_str("; ");
    sql.push_str(&super::blockers::of(locks));
    sql
}

/// The two names a backend goes by for a session lock: while it waits, and while it holds. `None` leaves the session's
/// own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Names<'a> {
    pub(crate) waiting: Option<&'a str>,
    pub(crate) holding: Option<&'a str>,
}

/// Tries session locks outside a transaction, and puts the holder's name on the session if they are granted. It never
/// waits, so no timeout can strike between the grant and the reply.
///
/// With `direct_pid` nothing is granted by any backend but that one: behind a pooler the next statement might reach
/// another backend than the one that got the lock.
pub(crate) fn try_session(locks: Locks<'_>, names: Names<'_>, direct_pid: Option<i32>) -> String {
    let mut sql = String::with_capacity(768);
    // Several keys: tried in a transaction first, whose end returns those that were granted when one is busy.
    let several = locks.keys.len() > 1;
    if several {
        sql.push_str("BEGIN ISOLATION LEVEL READ COMMITTED; ");
    }
    sql.push_str("SELECT tried.verdict, tried.application_name, ");
    if several {
        sql.push_str("CASE WHEN pg_catalog.texteq(tried.verdict, 'granted') THEN ");
        take_each(&mut sql, locks);
        sql.push_str(" END, ");
    }
    if let Some(name) = names.holding {
        let _ = write!(
            sql,
            "CASE WHEN pg_catalog.texteq(tried.verdict, 'granted') \
             THEN pg_catalog.set_config('application_name', {}, false) END, ",
            literal(name)
        );
    }
    sql.push_str(CONTEXT);
    sql.push_str(" FROM (SELECT CASE ");
    sql.push_str(NOT_FRESH);
    sql.push_str(STANDBY);
    if let Some(pid) = direct_pid {
        let _ = write!(
            sql,
            "WHEN pg_catalog.int4ne(pg_catalog.pg_backend_pid(), {pid}) THEN 'pooled' "
        );
    }
    sql.push_str("WHEN ");
    all_of(
        &mut sql,
        locks,
        if several {
            "pg_try_advisory_xact_lock"
        } else {
            "pg_try_advisory_lock"
        },
    );
    // OFFSET 0 keeps the planner from running the subquery's volatile column twice.
    sql.push_str(
        " THEN 'granted' ELSE 'busy' END AS verdict, \
         pg_catalog.current_setting('application_name') AS application_name OFFSET 0) AS tried",
    );
    if several {
        sql.push_str("; COMMIT");
    }
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

/// The last look of a session wait that timed out; see [`begin_and_look`].
pub(crate) fn look_session(
    locks: Locks<'_>,
    names: Names<'_>,
    direct_pid: Option<i32>,
    after_timeout: bool,
) -> String {
    let mut sql = String::new();
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(&try_session(locks, names, direct_pid));
    sql.push_str("; ");
    sql.push_str(&super::blockers::of(locks));
    sql
}

/// Moves session locks into a transaction that begins after them, so that its snapshot is younger than the grant.
pub(crate) fn begin_over_session_locks(begin: &Begin, locks: Locks<'_>) -> String {
    let mut sql = begin.message();
    sql.push_str("SELECT ");
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str(", ");
        }
        call(&mut sql, "pg_advisory_xact_lock", locks.mode, key);
        sql.push_str(" IS NULL");
    }
    sql.push_str("; ");
    sql.push_str(&unlock(locks));
    sql
}

/// Returns session locks. In the one row `unlocked` is true when each of them was held, and `fresh` is false inside a
/// transaction that somebody left open.
pub(crate) fn unlock(locks: Locks<'_>) -> String {
    const FRESH: &str =
        "pg_catalog.timestamptz_eq(pg_catalog.now(), pg_catalog.statement_timestamp()) AS fresh";
    let mut sql = String::from("SELECT ");
    if let [key] = locks.keys {
        call(&mut sql, "pg_advisory_unlock", locks.mode, key);
        let _ = write!(sql, " AS unlocked, {FRESH}");
    } else {
        let _ = write!(
            sql,
            "pg_catalog.bool_and(unlocked) AS unlocked, {FRESH} FROM ("
        );
        for (n, rows) in KeyRows::of(locks.keys).enumerate() {
            if n > 0 {
                sql.push_str(" UNION ALL ");
            }
            sql.push_str("SELECT ");
            rows.call(&mut sql, "pg_advisory_unlock", locks.mode);
            sql.push_str(" AS unlocked ");
            rows.from(&mut sql);
        }
        sql.push_str(" OFFSET 0) AS unlocks");
    }
    sql
}

/// Returns those of the session locks that this backend holds, for a `try` whose answer nobody waited for.
pub(crate) fn unlock_if_held(locks: Locks<'_>) -> String {
    let mut sql = String::from("SELECT ");
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str(", ");
        }
        sql.push_str("CASE WHEN EXISTS (SELECT FROM ");
        super::blockers::rows_of(&mut sql, std::slice::from_ref(key));
        sql.push_str(
            " WHERE l.granted AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid())) THEN ",
        );
        call(&mut sql, "pg_advisory_unlock", locks.mode, key);
        sql.push_str(" END");
    }
    sql
}

/// Sets a session's `application_name` until it is set again.
pub(crate) fn set_application_name(name: &str) -> String {
    format!(
        "SELECT pg_catalog.set_config('application_name', {}, false)",
        literal(name)
    )
}

/// Whether `pg_locks` shows the first of the locks as held by this very backend: an engine whose lock functions do
/// nothing shows none.
pub(crate) fn shown_in_pg_locks(locks: Locks<'_>) -> String {
    let mut sql = String::from("SELECT EXISTS (SELECT FROM ");
    super::blockers::rows_of(&mut sql, &locks.keys[..1]);
    sql.push_str(
        " WHERE l.granted AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid())) AS shown",
    );
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
        // lock_timeout counts each wait by itself; before each lock it is set to what the message's own clock leaves
        // of `wait`, so that the sum of the waits stays within it. A target list is evaluated from left to right.
        let _ = write!(
            sql,
            "SELECT pg_catalog.set_config('lock_timeout', pg_catalog.int4larger(1, \
             ({wait} OPERATOR(pg_catalog.-) (1000 OPERATOR(pg_catalog.*) pg_catalog.date_part('epoch', \
             pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.statement_timestamp()\
             )))::pg_catalog.int4)::pg_catalog.text, true), "
        );
        rows.call(sql, "pg_advisory_xact_lock", locks.mode);
        sql.push(' ');
        rows.from(sql);
        sql.push_str("; ");
    }
}

/// Several keys of one key space as rows, in their order: for sets too large for a target list.
struct KeyRows<'a> {
    keys: &'a [LockKey],
    pairs: bool,
}

impl<'a> KeyRows<'a> {
    /// One group for each run of keys of one space; sorted keys have at most two.
    fn of(keys: &'a [LockKey]) -> impl Iterator<Item = KeyRows<'a>> {
        keys.chunk_by(|a, b| a.as_i64().is_some() == b.as_i64().is_some())
            .map(|keys| KeyRows {
                keys,
                pairs: keys[0].as_i32_pair().is_some(),
            })
    }

    fn call(&self, sql: &mut String, function: &str, mode: AdvisoryMode) {
        let shared = shared_suffix(mode);
        let arguments = if self.pairs { "k.a, k.b" } else { "k.a" };
        let _ = write!(sql, "pg_catalog.{function}{shared}({arguments})");
    }

    /// `FROM …`: a function scan returns an array's elements in their order.
    fn from(&self, sql: &mut String) {
        let array = |sql: &mut String, of: &dyn Fn(&LockKey) -> i64, of_type: &str| {
            sql.push_str("pg_catalog.unnest('{");
            for (n, key) in self.keys.iter().enumerate() {
                let comma = if n > 0 { "," } else { "" };
                let _ = write!(sql, "{comma}{}", of(key));
            }
            let _ = write!(sql, "}}'::pg_catalog.{of_type}[])");
        };
        if self.pairs {
            sql.push_str("FROM ROWS FROM (");
            array(
                sql,
                &|key| key.as_i32_pair().unwrap_or_default().0.into(),
                "int4",
            );
            sql.push_str(", ");
            array(
                sql,
                &|key| key.as_i32_pair().unwrap_or_default().1.into(),
                "int4",
            );
            sql.push_str(") AS k (a, b)");
        } else {
            sql.push_str("FROM ");
            array(sql, &|key| key.as_i64().unwrap_or_default(), "int8");
            sql.push_str(" AS k (a)");
        }
    }
}

/// `f(k1) AND f(k2) …`: evaluated in this order, and none after the first false.
fn all_of(sql: &mut String, locks: Locks<'_>, function: &str) {
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str(" AND ");
        }
        call(sql, function, locks.mode, key);
    }
}

/// Takes each session lock, as one boolean column: the functions return void.
fn take_each(sql: &mut String, locks: Locks<'_>) {
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str(" OR ");
        }
        sql.push('(');
        call(sql, "pg_advisory_lock", locks.mode, key);
        sql.push_str(" IS NULL)");
    }
}

/// `pg_catalog.function[_shared](key)`. The cast literals keep the parser from looking up a `-` operator, and choose
/// the key space: one int8, or two int4.
fn call(sql: &mut String, function: &str, mode: AdvisoryMode, key: &LockKey) {
    let shared = shared_suffix(mode);
    let _ = match key.as_i32_pair() {
        Some((a, b)) => write!(
            sql,
            "pg_catalog.{function}{shared}('{a}'::pg_catalog.int4, '{b}'::pg_catalog.int4)"
        ),
        None => write!(
            sql,
            "pg_catalog.{function}{shared}('{}'::pg_catalog.int8)",
            key.as_i64().unwrap_or_default()
        ),
    };
}

fn shared_suffix(mode: AdvisoryMode) -> &'static str {
    match mode {
        AdvisoryMode::Exclusive => "",
        AdvisoryMode::Shared => "_shared",
    }
}
