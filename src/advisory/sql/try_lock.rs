//! Trying locks without waiting, and what came of it.

use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use super::keys::{Locks, all_of, shared_suffix, take_each};
use super::release::{push_prepare_hand_over, push_unlock_select};
use crate::advisory::sql::blockers;
use crate::connection::sql::server::{
    Denied, FRESH, IS_FRESH, SERVER, Server, XACT_START, XACT_START_VALUE, is_none_of, server,
};
use crate::connection::sql::{Probe, Refusal, unlock_of};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::sql::{
    Message, fields, literal, parsed, push_literal, push_select_fields, rows, set_config, text,
};
use crate::transaction::sql::{Begin, PID, PID_VALUE};

/// What a `try` answered, read before anything else is known of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TryLockOutcome {
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
pub(crate) struct TryLockRow {
    pub(crate) verdict: TryLockOutcome,
    /// Whether the server has granted the locks, whatever that is worth.
    pub(crate) granted: bool,
    pub(crate) pid: i32,
    /// When its transaction began, where it is to last.
    pub(crate) xact_start: Option<i64>,
    /// The session's own `application_name`, before a session lock renamed it.
    pub(crate) application_name: String,
    /// What a first `try` on a connection asks in addition.
    pub(crate) server: Option<Server>,
}

/// REPEATABLE READ and SERIALIZABLE take their snapshot before the lock is granted, so that what is read under the
/// lock may be older than what its last holder committed.
/// What [`READS_COMMITTED`] is among the fields of a session lock's `try`.
const NO_TRANSACTION: &str = "-";

const READS_COMMITTED: &str =
    "pg_catalog.starts_with(pg_catalog.current_setting('transaction_isolation'), 'read ')";
const ISOLATION: &str = "pg_catalog.current_setting('transaction_isolation') AS isolation, ";

/// Nothing is granted on a connection with somebody's open transaction on it.
const DIRTY: &str = "WHEN pg_catalog.timestamptz_ne(pg_catalog.now(), pg_catalog.statement_timestamp()) THEN 'dirty' ";
const STANDBY: &str = "WHEN pg_catalog.pg_is_in_recovery() THEN 'standby' ";

/// Reads the row of a `try`.
pub(crate) fn tried(reply: &[SimpleQueryMessage]) -> Option<TryLockRow> {
    if let Some(fields) = fields(reply) {
        return tried_lean(fields);
    }
    let row = rows(reply).find(|row| {
        row.columns()
            .iter()
            .any(|column| column.name() == "verdict")
    })?;
    let column = |name| row.try_get(name).ok().flatten();
    let snapshot = column("isolation").is_some_and(|isolation| !isolation.starts_with("read "));
    let verdict = column("verdict")?;
    Some(TryLockRow {
        verdict: outcome(verdict, column("fresh") != Some("f"), snapshot)?,
        granted: verdict == "granted",
        pid: parsed(row, "pid")?,
        xact_start: parsed(row, "xact_start"),
        application_name: text(row, "application_name").unwrap_or_default(),
        server: server(row),
    })
}

/// The same of a statement that was prepared: the fields from the last one.
fn tried_lean<'a>(mut fields: impl Iterator<Item = &'a str>) -> Option<TryLockRow> {
    let (_, verdict, pid) = (fields.next()?, fields.next()?, fields.next()?);
    let (reads_committed, is_fresh) = (fields.next()?, fields.next()?);
    let first = fields.next()?;
    let (xact_start, application_name) = match reads_committed {
        NO_TRANSACTION => {
            let with_rest = |name, before| format!("{before}|{name}");
            (None, fields.fold(first.to_owned(), with_rest))
        }
        _ => (first.parse().ok(), String::new()),
    };
    Some(TryLockRow {
        verdict: outcome(verdict, is_fresh == "t", reads_committed == "f")?,
        granted: verdict == "granted",
        pid: pid.parse().ok()?,
        xact_start,
        application_name,
        server: None,
    })
}

fn outcome(verdict: &str, is_fresh: bool, snapshot: bool) -> Option<TryLockOutcome> {
    Some(match verdict {
        _ if !is_fresh => TryLockOutcome::Dirty,
        "dirty" => TryLockOutcome::Dirty,
        "standby" => TryLockOutcome::Standby,
        "pooled" => TryLockOutcome::Pooled,
        "granted" | "busy" if snapshot => TryLockOutcome::Snapshot,
        "granted" => TryLockOutcome::Granted,
        "busy" => TryLockOutcome::Busy,
        _ => return None,
    })
}

/// One message that begins a transaction and tries the locks in it. It never waits.
pub(crate) fn begin_and_try(begin: &Begin, locks: Locks<'_>, probe: &Probe) -> Message {
    let few = match (probe, &begin.application_name, locks.keys) {
        (Probe::Prepare(statement) | Probe::Execute(statement), Some(name), [key]) => {
            Some((statement, name, key))
        }
        _ => None,
    };
    let Some((statement, name, key)) = few else {
        let mut sql = begin.message();
        sql.push_str("SELECT ");
        push_xact_columns(&mut sql, |sql| {
            push_verdict(sql, locks, "pg_try_advisory_xact_lock", probe, DIRTY);
        });
        if let Probe::Full(_) = probe {
            sql.push_str(SERVER);
        }
        return sql.into();
    };
    let mut sql = begin.message_unnamed();
    if let Probe::Prepare(_) = probe {
        push_prepare(&mut sql, statement, key, |sql, name, arguments| {
            let verdict = lean_verdict("pg_try_advisory_xact_lock", locks.mode, arguments);
            let set = set_config("application_name", name, true);
            push_select_fields(
                sql,
                &[
                    XACT_START_VALUE,
                    IS_FRESH,
                    READS_COMMITTED,
                    PID_VALUE,
                    &verdict,
                    &set,
                ],
            );
        });
    }
    push_execute(&mut sql, statement, key, name);
    match probe {
        Probe::Execute(_) => Message::of(begin.statements_unnamed() + 1, sql),
        _ => sql.into(),
    }
}

/// The columns of a transaction's `try`; `verdict` writes one of them.
fn push_xact_columns(sql: &mut String, verdict: impl FnOnce(&mut String)) {
    sql.push_str(FRESH);
    sql.push_str(ISOLATION);
    verdict(sql);
    let _ = write!(sql, " AS verdict, {PID}, {XACT_START}");
}

/// `PREPARE …; `: the text of `select`, with parameters for the key and the name. It comes before what it is for, so that
/// a name which is taken already fails the message before anything is granted.
pub(super) fn push_prepare(
    sql: &mut String,
    statement: &str,
    key: &LockKey,
    select: impl FnOnce(&mut String, &str, &str),
) {
    let pair = key.as_i32_pair().is_some();
    let types = if pair {
        "pg_catalog.int4, pg_catalog.int4"
    } else {
        "pg_catalog.int8"
    };
    let _ = write!(sql, "PREPARE {statement} ({types}, pg_catalog.text) AS ");
    if pair {
        select(sql, "$3", "($1, $2)");
    } else {
        select(sql, "$2", "($1)");
    }
    sql.push_str("; ");
}

pub(super) fn push_execute(sql: &mut String, statement: &str, key: &LockKey, name: &str) {
    sql.push_str("EXECUTE ");
    sql.push_str(statement);
    let _ = match key.as_i32_pair() {
        Some((a, b)) => write!(sql, " ('{a}', '{b}', "),
        None => write!(sql, " ('{}', ", key.as_i64().unwrap_or_default()),
    };
    push_literal(sql, name);
    sql.push(')');
}

/// The `try` for more locks inside a transaction that has begun. Nothing is granted in one that reads from a snapshot:
/// it goes on, and could not return them.
pub(crate) fn try_in_transaction(locks: Locks<'_>) -> String {
    let mut sql = String::from("SELECT ");
    sql.push_str(ISOLATION);
    push_verdict(
        &mut sql,
        locks,
        "pg_try_advisory_xact_lock",
        &Probe::Full(Refusal::None),
        "WHEN NOT pg_catalog.starts_with(pg_catalog.current_setting('transaction_isolation'), 'read ') THEN 'busy' ",
    );
    sql.push_str(" AS verdict, ");
    sql.push_str(PID);
    sql.push_str(SERVER);
    sql
}

/// [`push_verdict`] for one key on a connection that is known.
fn lean_verdict(function: &str, mode: AdvisoryMode, arguments: &str) -> String {
    format!(
        "CASE {DIRTY}WHEN pg_catalog.{function}{}{arguments} THEN 'granted' ELSE 'busy' END",
        shared_suffix(mode)
    )
}

/// `CASE … END`: what came of a try.
fn push_verdict(sql: &mut String, locks: Locks<'_>, function: &str, probe: &Probe, unless: &str) {
    sql.push_str("CASE ");
    if let Probe::Full(refusal) = probe {
        sql.push_str(STANDBY);
        if let Refusal::Pooled {
            login_pid,
            but_before,
        } = refusal
        {
            let _ = write!(
                sql,
                "WHEN pg_catalog.int4ne(pg_catalog.pg_backend_pid(), {login_pid}) AND {} THEN 'pooled' ",
                is_none_of(but_before)
            );
        }
    }
    sql.push_str(unless);
    sql.push_str("WHEN ");
    all_of(sql, locks, function);
    sql.push_str(" THEN 'granted' ELSE 'busy' END");
}

/// The last look of a wait that timed out: a `try`, and who is in the way if it fails. One message, so that both speak
/// of the same moment.
pub(crate) fn begin_and_find_blockers(
    begin: &Begin,
    locks: Locks<'_>,
    after_timeout: bool,
    denied: Denied,
) -> String {
    let mut sql = String::new();
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(&begin_and_try(begin, locks, &Probe::Full(Refusal::None)).text);
    blockers::push(&mut sql, locks, denied);
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
pub(crate) fn try_session(locks: Locks<'_>, names: Names<'_>, probe: &Probe) -> Message {
    let mut sql = String::with_capacity(768);
    if let (Probe::Prepare(statement) | Probe::Execute(statement), Some(name), [key]) =
        (probe, names.holding, locks.keys)
    {
        if let Probe::Prepare(_) = probe {
            push_prepare(&mut sql, statement, key, |sql, name, arguments| {
                push_lean_session_select(sql, name, locks.mode, arguments);
            });
            push_prepare(
                &mut sql,
                &unlock_of(statement),
                key,
                |sql, name, arguments| {
                    push_unlock_select(sql, name, locks.mode, arguments);
                },
            );
            push_prepare_hand_over(&mut sql, statement, key, locks.mode);
        }
        push_execute(&mut sql, statement, key, name);
        return match probe {
            Probe::Execute(_) => Message::of(1, sql),
            _ => sql.into(),
        };
    }
    // Several keys: tried as transaction locks first. The end of the message, which is its transaction, returns them,
    // all that there is to return when one of them is busy.
    let several = locks.keys.len() > 1;
    let mut take = String::new();
    if several {
        take_each(&mut take, locks);
    }
    let server = if let Probe::Full(_) = probe {
        SERVER
    } else {
        ""
    };
    let name = names.holding.map(literal);
    push_session_select(&mut sql, name.as_deref(), &take, server, |sql| {
        let function = if several {
            "pg_try_advisory_xact_lock"
        } else {
            "pg_try_advisory_lock"
        };
        push_verdict(sql, locks, function, probe, DIRTY);
    });
    sql.into()
}

/// [`push_session_select`] for one key on a connection that is known. Arguments are evaluated from left to right, so
/// the name is read before it is set.
fn push_lean_session_select(sql: &mut String, name: &str, mode: AdvisoryMode, arguments: &str) {
    let verdict = format!(
        "CASE {DIRTY}WHEN pg_catalog.pg_try_advisory_lock{}{arguments} THEN \
         CASE WHEN pg_catalog.set_config('application_name', {name}, false) IS NULL THEN 'granted' ELSE 'granted' END \
         ELSE 'busy' END",
        shared_suffix(mode)
    );
    push_select_fields(
        sql,
        &[
            "pg_catalog.current_setting('application_name')",
            IS_FRESH,
            &literal(NO_TRANSACTION),
            PID_VALUE,
            &verdict,
            "''",
        ],
    );
}

/// The SELECT of a session lock's `try`. `verdict` writes the column that tries; if it is granted, `take` is evaluated,
/// and the session gets its `name`, both SQL.
fn push_session_select(
    sql: &mut String,
    name: Option<&str>,
    take: &str,
    server: &str,
    verdict: impl FnOnce(&mut String),
) {
    const IF_GRANTED: &str = "CASE WHEN pg_catalog.texteq(tried.verdict, 'granted') THEN ";
    sql.push_str("SELECT tried.verdict, tried.application_name, ");
    if !take.is_empty() {
        let _ = write!(sql, "{IF_GRANTED}{take} END, ");
    }
    if let Some(name) = name {
        let _ = write!(
            sql,
            "{IF_GRANTED}pg_catalog.set_config('application_name', {name}, false) END, "
        );
    }
    sql.push_str(FRESH);
    sql.push_str(PID);
    sql.push_str(server);
    sql.push_str(" FROM (SELECT ");
    verdict(sql);
    // OFFSET 0 keeps the planner from running the subquery's volatile column twice.
    sql.push_str(
        " AS verdict, pg_catalog.current_setting('application_name') AS application_name OFFSET 0) AS tried",
    );
}

/// The last look of a session wait that timed out; see [`begin_and_find_blockers`].
pub(crate) fn try_session_and_find_blockers(
    locks: Locks<'_>,
    names: Names<'_>,
    probe: &Probe,
    after_timeout: bool,
    denied: Denied,
) -> String {
    let mut sql = String::new();
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(&try_session(locks, names, probe).text);
    blockers::push(&mut sql, locks, denied);
    sql
}
