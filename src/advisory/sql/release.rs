//! Returning locks, and looking whether they are there.

use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use super::keys::{KeyRows, Locks, call, shared_suffix};
use super::try_lock::push_execute;
use crate::advisory::sql::blockers;
use crate::connection::LockScope;
use crate::connection::sql::server::{FRESH, IS_FRESH, XACT_START, is_fresh};
use crate::connection::sql::{hand_over_of, unlock_of};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::sql::{
    Message, fields, is_true, literal, push_select_fields, rows, set_config,
};
use crate::transaction::sql::Begin;

/// Moves session locks into a transaction that begins after them, so that its snapshot is younger than the grant.
pub(crate) fn begin_over_session_locks(begin: &Begin, locks: Locks<'_>) -> String {
    let mut sql = begin.message();
    for rows in KeyRows::of(locks.keys) {
        sql.push_str("SELECT ");
        rows.call(&mut sql, "pg_advisory_xact_lock", locks.mode);
        sql.push(' ');
        rows.from(&mut sql);
        sql.push_str("; ");
    }
    let _ = write!(sql, "SELECT {XACT_START}; {}", unlock(locks, None));
    sql
}

/// Returns session locks, and the session's own name if one is given. In the one row `unlocked` is true when each of
/// them was held, and `fresh` is false inside a transaction that somebody left open.
pub(crate) fn unlock(locks: Locks<'_>, application_name: Option<&str>) -> String {
    let mut sql = String::from("SELECT ");
    sql.push_str(FRESH);
    if let Some(name) = application_name {
        let _ = write!(
            sql,
            "pg_catalog.set_config('application_name', {}, false), ",
            literal(name)
        );
    }
    if let [key] = locks.keys {
        call(&mut sql, "pg_advisory_unlock", locks.mode, key);
        sql.push_str(" AS unlocked");
    } else {
        sql.push_str("pg_catalog.bool_and(unlocked) AS unlocked FROM (");
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

/// [`unlock`] of one key by the statement that was prepared together with its `try`.
pub(crate) fn execute_unlock(statement: &str, key: &LockKey, application_name: &str) -> Message {
    let mut sql = String::with_capacity(128);
    push_execute(&mut sql, &unlock_of(statement), key, application_name);
    Message::of(1, sql)
}

/// Returns one key and tries it again in somebody else's name, by the statement that was prepared together with the `try`.
/// In the one row `unlocked` is true when it was held, and `locked` when it is held again; only then the session goes by
/// the name of the `next`, and else by its own.
pub(crate) fn execute_hand_over(statement: &str, key: &LockKey, next: &str, own: &str) -> Message {
    let mut sql = String::with_capacity(160);
    push_execute(&mut sql, &hand_over_of(statement), key, next);
    // Behind the last argument comes one more.
    sql.truncate(sql.len() - 1);
    let _ = write!(sql, ", {})", literal(own));
    Message::of(1, sql)
}

/// The statement of [`execute_hand_over`]; the target list of the subquery is evaluated from left to right.
pub(super) fn push_prepare_hand_over(
    sql: &mut String,
    statement: &str,
    key: &LockKey,
    mode: AdvisoryMode,
) {
    let (types, arguments, next, own) = if key.as_i32_pair().is_some() {
        ("pg_catalog.int4, pg_catalog.int4", "($1, $2)", "$3", "$4")
    } else {
        ("pg_catalog.int8", "($1)", "$2", "$3")
    };
    let shared = shared_suffix(mode);
    let _ = write!(
        sql,
        "PREPARE {} ({types}, pg_catalog.text, pg_catalog.text) AS SELECT h.unlocked, h.locked, \
         pg_catalog.set_config('application_name', CASE WHEN h.locked THEN {next} ELSE {own} END, false) \
         FROM (SELECT pg_catalog.pg_advisory_unlock{shared}{arguments} AS unlocked, \
         pg_catalog.pg_try_advisory_lock{shared}{arguments} AS locked OFFSET 0) AS h; ",
        hand_over_of(statement)
    );
}

pub(super) fn push_unlock_select(
    sql: &mut String,
    name: &str,
    mode: AdvisoryMode,
    arguments: &str,
) {
    let set = set_config("application_name", name, false);
    let unlock = format!(
        "pg_catalog.pg_advisory_unlock{}{arguments}",
        shared_suffix(mode)
    );
    push_select_fields(sql, &[IS_FRESH, &unlock, &set]);
}

/// What the reply to an unlock shows: whether the locks were held, and whether no transaction was left open.
pub(crate) fn unlocked(reply: &[SimpleQueryMessage]) -> (bool, bool) {
    match fields(reply) {
        Some(mut fields) => {
            let unlocked = fields.nth(1) == Some("t");
            (unlocked, fields.next() == Some("t"))
        }
        None => (
            rows(reply).any(|row| is_true(row, "unlocked")),
            is_fresh(reply),
        ),
    }
}

/// Sets a session's `application_name` until it is set again.
pub(crate) fn set_application_name(name: &str) -> String {
    format!(
        "SELECT pg_catalog.set_config('application_name', {}, false)",
        literal(name)
    )
}

/// Fails (22012) where this backend does not hold one of the session locks, and leaves them as they are.
///
/// Only an unlock says whether a session lock is held. So each is returned and taken again, under a lock of the
/// transaction on the same key, which keeps it from others meanwhile and makes that no wait. `pg_locks`, which not every
/// role may read, is not needed for it. (Test `a_session_lock_is_looked_for_by_its_unlock`.)
pub(crate) fn check_held(locks: Locks<'_>) -> String {
    let mut sql = String::from(
        "SELECT pg_catalog.int4div(1, CASE WHEN pg_catalog.bool_and(held) THEN 1 ELSE 0 END) FROM (",
    );
    for (n, rows) in KeyRows::of(locks.keys).enumerate() {
        sql.push_str(if n > 0 {
            " UNION ALL SELECT "
        } else {
            "SELECT "
        });
        for function in [
            "pg_try_advisory_xact_lock",
            "pg_advisory_unlock",
            "pg_try_advisory_lock",
        ] {
            sql.push_str("CASE WHEN ");
            rows.call(&mut sql, function, locks.mode);
            sql.push_str(" THEN ");
        }
        sql.push_str("true ELSE false END ELSE false END ELSE false END AS held ");
        rows.from(&mut sql);
    }
    sql.push_str(" OFFSET 0) AS locks");
    sql
}

/// The most keys that [`are_held`] searches `pg_locks` for.
pub(crate) const MOST_SEARCHED: usize = 100;

/// An expression: whether `pg_locks` shows this backend as the holder of these locks. It takes nothing and returns nothing.
pub(crate) fn are_held(locks: Locks<'_>) -> String {
    let mut sql = format!(
        "(SELECT pg_catalog.int8eq(pg_catalog.count(*), {}) FROM ",
        locks.keys.len()
    );
    blockers::rows_of(&mut sql, locks.keys);
    let _ = write!(
        sql,
        " WHERE l.granted AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid()) \
         AND pg_catalog.texteq(l.mode, '{}'))",
        locks.mode.as_pg_locks()
    );
    sql
}

/// Whether `pg_locks` shows the first of the locks as held by this very backend: an engine whose lock functions do
/// nothing shows none.
pub(crate) fn shown_in_pg_locks(locks: Locks<'_>) -> String {
    let mut sql = String::from("SELECT EXISTS (SELECT FROM ");
    blockers::rows_of(&mut sql, &locks.keys[..1]);
    sql.push_str(
        " WHERE l.granted AND pg_catalog.int4eq(l.pid, pg_catalog.pg_backend_pid())) AS shown",
    );
    sql
}

/// The same for a role that may not read `pg_locks`: whether an unlock answers what it should after another, and so counts.
/// The locks stay as they are. Of transaction locks it tells only that the engine counts those of the session.
pub(crate) fn are_counted(locks: Locks<'_>, scope: LockScope) -> String {
    let key = &locks.keys[0];
    let mut sql = String::from("SELECT CASE WHEN ");
    let mut push = |function, then| {
        call(&mut sql, function, locks.mode, key);
        sql.push_str(then);
    };
    // Whatever was returned once more than it was taken is taken again.
    match scope {
        LockScope::Transaction => {
            push("pg_try_advisory_lock", " THEN CASE WHEN ");
            push("pg_advisory_unlock", " THEN CASE WHEN ");
            push("pg_advisory_unlock", " THEN NOT ");
            push("pg_try_advisory_lock", " ELSE true");
        }
        // Under a lock of the transaction, which keeps it from others.
        LockScope::Session => {
            push("pg_try_advisory_xact_lock", " THEN CASE WHEN ");
            push("pg_advisory_unlock", " THEN CASE WHEN ");
            push("pg_advisory_unlock", " THEN NOT ");
            push("pg_try_advisory_lock", " ELSE ");
            push("pg_try_advisory_lock", "");
        }
    }
    sql.push_str(" END END END AS shown");
    sql
}
