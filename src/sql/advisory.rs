//! The texts that take and return advisory locks.
//!
//! A set of keys is locked in the order it is given; callers sort it.

use std::fmt::Write as _;
use std::sync::Arc;
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
    /// The session's own `application_name`, before a session lock renamed it.
    pub(crate) application_name: String,
    /// What a first `try` on a connection asks beside.
    pub(crate) server: Option<Server>,
    /// What a `try` inside a transaction asks beside: the timeouts as the server writes them.
    pub(crate) timeouts: Option<Timeouts>,
}

/// The server that a connection leads to.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    /// Tells one running server from another: the postmaster's start.
    pub(crate) identity: Arc<str>,
    pub(crate) deadlock_timeout: Duration,
}

/// Settings to be put back as they were.
#[derive(Clone, Debug)]
pub(crate) struct Timeouts {
    pub(crate) lock_timeout: String,
    pub(crate) statement_timeout: String,
}

/// How much a `try` asks besides the locks, and how.
///
/// All but `All` are for a connection that was asked everything before, and ask only what can be otherwise each time: a
/// server does not turn into a standby under its connections, and a direct connection does not turn into a pooled one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Everything, and nothing is granted on a standby or, with the login's pid, behind a pooler.
    All {
        login_pid: Option<i32>,
    },
    Little,
    /// The same, and the statement is prepared under this name in the same message.
    Prepare(String),
    /// By the statement of this name: parsing the text is a good part of what a `try` costs.
    Execute(String),
}

/// A statement that can be prepared: one key, by scope, mode and key space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Preparable {
    session: bool,
    shared: bool,
    pair: bool,
}

impl Preparable {
    /// `None` for several keys.
    pub(crate) fn of(locks: Locks<'_>, session: bool) -> Option<Self> {
        let [key] = locks.keys else { return None };
        Some(Self {
            session,
            shared: locks.mode == AdvisoryMode::Shared,
            pair: key.as_i32_pair().is_some(),
        })
    }

    /// A name of its own among the statements of `owner`.
    pub(crate) fn name(self, owner: &str) -> String {
        format!(
            "lockkeeper_{owner}_{}{}{}",
            if self.session { 's' } else { 'x' },
            if self.shared { 's' } else { 'e' },
            if self.pair { '4' } else { '8' }
        )
    }
}

const FRESH: &str =
    "pg_catalog.timestamptz_eq(pg_catalog.now(), pg_catalog.statement_timestamp()) AS fresh, ";
const PID: &str = "pg_catalog.pg_backend_pid() AS pid";
/// REPEATABLE READ and SERIALIZABLE take their snapshot before the lock is granted, so that what is read under the
/// lock may be older than what its last holder committed.
const ISOLATION: &str = "pg_catalog.current_setting('transaction_isolation') AS isolation, ";
const SERVER: &str = ", pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) AS server, \
     pg_catalog.current_setting('deadlock_timeout') AS deadlock_timeout";
const TIMEOUTS: &str = ", pg_catalog.current_setting('lock_timeout') AS lock_timeout, \
     pg_catalog.current_setting('statement_timeout') AS statement_timeout";
const STANDBY: &str = "WHEN pg_catalog.pg_is_in_recovery() THEN 'standby' ";

/// Reads the row of a `try`.
pub(crate) fn tried(reply: &[SimpleQueryMessage]) -> Option<Tried> {
    let row = rows(reply).find(|row| {
        row.columns()
            .iter()
            .any(|column| column.name() == "verdict")
    })?;
    let column = |name| row.try_get(name).ok().flatten();
    let verdict = if column("fresh") == Some("f") {
        Verdict::Dirty
    } else if column("isolation").is_some_and(|isolation| !isolation.starts_with("read ")) {
        Verdict::Snapshot
    } else {
        match column("verdict")? {
            "granted" => Verdict::Granted,
            "busy" => Verdict::Busy,
            "standby" => Verdict::Standby,
            "pooled" => Verdict::Pooled,
            _ => return None,
        }
    };
    let server = || {
        Some(Server {
            identity: column("server")?.into(),
            deadlock_timeout: setting_duration(column("deadlock_timeout")?)?,
        })
    };
    let timeouts = || {
        Some(Timeouts {
            lock_timeout: text(row, "lock_timeout")?,
            statement_timeout: text(row, "statement_timeout")?,
        })
    };
    Some(Tried {
        verdict,
        pid: parsed(row, "pid")?,
        application_name: text(row, "application_name").unwrap_or_default(),
        server: server(),
        timeouts: timeouts(),
    })
}

/// One message that begins a transaction and tries the locks in it. It never waits.
pub(crate) fn begin_and_try(begin: &Begin, locks: Locks<'_>, ask: &Ask) -> String {
    let few = match (ask, &begin.application_name, locks.keys) {
        (Ask::Prepare(statement) | Ask::Execute(statement), Some(name), [key]) => {
            Some((statement, name, key))
        }
        _ => None,
    };
    let Some((statement, name, key)) = few else {
        let mut sql = begin.message();
        sql.push_str("SELECT ");
        push_xact_columns(&mut sql, |sql| {
            push_verdict(sql, locks, "pg_try_advisory_xact_lock", ask, "");
        });
        if let Ask::All { .. } = ask {
            sql.push_str(SERVER);
        }
        return sql;
    };
    let mut sql = begin.message_unnamed();
    if let Ask::Execute(_) = ask {
        push_execute(&mut sql, statement, key, name);
        return sql;
    }
    let select = |sql: &mut String, name: &str, arguments: &dyn Fn(&mut String)| {
        let _ = write!(
            sql,
            "SELECT pg_catalog.set_config('application_name', {name}, true), "
        );
        push_xact_columns(sql, |sql| {
            sql.push_str("CASE WHEN pg_catalog.pg_try_advisory_xact_lock");
            sql.push_str(shared_suffix(locks.mode));
            arguments(sql);
            sql.push_str(" THEN 'granted' ELSE 'busy' END");
        });
    };
    select(&mut sql, &literal(name), &|sql| push_arguments(sql, key));
    push_prepare(&mut sql, statement, key, |sql, name, arguments| {
        select(sql, name, &|sql| sql.push_str(arguments))
    });
    sql
}

/// The columns of a transaction's `try`; `verdict` writes one of them.
fn push_xact_columns(sql: &mut String, verdict: impl FnOnce(&mut String)) {
    sql.push_str(FRESH);
    sql.push_str(ISOLATION);
    verdict(sql);
    sql.push_str(" AS verdict, ");
    sql.push_str(PID);
}

/// `; PREPARE …`: the text of `select`, with parameters for the key and the name.
fn push_prepare(
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
    let _ = write!(sql, "; PREPARE {statement} ({types}, pg_catalog.text) AS ");
    if pair {
        select(sql, "$3", "($1, $2)");
    } else {
        select(sql, "$2", "($1)");
    }
}

fn push_execute(sql: &mut String, statement: &str, key: &LockKey, name: &str) {
    let name = literal(name);
    let _ = match key.as_i32_pair() {
        Some((a, b)) => write!(sql, "EXECUTE {statement} ('{a}', '{b}', {name})"),
        None => write!(
            sql,
            "EXECUTE {statement} ('{}', {name})",
            key.as_i64().unwrap_or_default()
        ),
    };
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
        &Ask::All { login_pid: None },
        "WHEN NOT pg_catalog.starts_with(pg_catalog.current_setting('transaction_isolation'), 'read ') THEN 'busy' ",
    );
    sql.push_str(" AS verdict, ");
    sql.push_str(PID);
    sql.push_str(TIMEOUTS);
    sql
}

/// [`try_in_transaction`] for several locks: in a savepoint, so that those which were granted can be returned when one
/// of them is busy.
pub(crate) fn try_at_savepoint(locks: Locks<'_>) -> String {
    format!("SAVEPOINT lockkeeper_wait; {}", try_in_transaction(locks))
}

/// Keeps what was granted since [`try_at_savepoint`].
pub(crate) const KEEP_TRIED: &str = "RELEASE SAVEPOINT lockkeeper_wait";
/// Returns it.
pub(crate) const UNDO_TRIED: &str =
    "ROLLBACK TO SAVEPOINT lockkeeper_wait; RELEASE SAVEPOINT lockkeeper_wait";

/// `CASE … END`: what came of a try.
fn push_verdict(sql: &mut String, locks: Locks<'_>, function: &str, ask: &Ask, unless: &str) {
    sql.push_str("CASE ");
    if let Ask::All { login_pid } = ask {
        sql.push_str(STANDBY);
        if let Some(pid) = login_pid {
            let _ = write!(
                sql,
                "WHEN pg_catalog.int4ne(pg_catalog.pg_backend_pid(), {pid}) THEN 'pooled' "
            );
        }
    }
    sql.push_str(unless);
    sql.push_str("WHEN ");
    all_of(sql, locks, function);
    sql.push_str(" THEN 'granted' ELSE 'busy' END");
}

/// One wait for the locks in the transaction that has begun, at most `wait` long in all, after which `lock_timeout` is
/// what it was.
pub(crate) fn wait_in_transaction(locks: Locks<'_>, wait: Duration) -> String {
    let mut sql = String::with_capacity(768);
    for (n, rows) in KeyRows::of(locks.keys).enumerate() {
        if n > 0 {
            sql.push_str("; ");
        }
        // A target list is evaluated from left to right, for one row after another; the subquery's row is made before.
        sql.push_str("SELECT ");
        push_set_lock_timeout(&mut sql, wait, Within::StatementTimeout);
        rows.call(&mut sql, "pg_advisory_xact_lock", locks.mode);
        sql.push_str(", pg_catalog.set_config('lock_timeout', was.lock_timeout, true) ");
        rows.from(&mut sql);
        sql.push_str(
            ", (SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout, \
             pg_catalog.date_part('epoch', pg_catalog.current_setting('statement_timeout')::pg_catalog.interval) \
             AS statement_timeout OFFSET 0) AS was",
        );
    }
    sql
}

/// What else bounds a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    /// Nothing: `statement_timeout` is off.
    Nothing,
    /// `was.statement_timeout`, in seconds: when it is not longer than `lock_timeout` it would end the wait with 57014,
    /// which cannot be told from somebody's cancel. So the wait stays well below it, and is repeated.
    StatementTimeout,
}

/// `set_config('lock_timeout', …), `: what the message's own clock leaves of `wait`. `lock_timeout` counts each wait by
/// itself; set so before each lock of several, the sum of their waits stays within it.
fn push_set_lock_timeout(sql: &mut String, wait: Duration, within: Within) {
    let wait = timeout_millis(wait);
    let whole = match within {
        Within::Nothing => wait.to_string(),
        Within::StatementTimeout => format!(
            "CASE WHEN pg_catalog.float8eq(was.statement_timeout, 0) THEN {wait} ELSE pg_catalog.int4smaller({wait}, \
             (800 OPERATOR(pg_catalog.*) was.statement_timeout)::pg_catalog.int4) END"
        ),
    };
    let left = format!(
        "({whole} OPERATOR(pg_catalog.-) (1000 OPERATOR(pg_catalog.*) pg_catalog.date_part('epoch', \
         pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.statement_timestamp())))::pg_catalog.int4"
    );
    let _ = write!(
        sql,
        "pg_catalog.set_config('lock_timeout', pg_catalog.int4larger(1, {left})::pg_catalog.text, true), "
    );
}

/// One wait of its full length inside a savepoint, which [`undo_wait_at_savepoint`] goes back to when it times out: the
/// transaction around it stays usable.
pub(crate) fn wait_at_savepoint(locks: Locks<'_>, wait: Duration, timeouts: &Timeouts) -> String {
    let mut sql = String::from("SAVEPOINT lockkeeper_wait; ");
    wait_for_xact_locks(&mut sql, locks, wait);
    set_local(&mut sql, "lock_timeout", &literal(&timeouts.lock_timeout));
    set_local(
        &mut sql,
        "statement_timeout",
        &literal(&timeouts.statement_timeout),
    );
    sql.push_str("RELEASE SAVEPOINT lockkeeper_wait");
    sql
}

/// Undoes a [`wait_at_savepoint`] that failed, and asks who is in the way.
pub(crate) fn undo_wait_at_savepoint(locks: Locks<'_>) -> String {
    format!("{UNDO_TRIED}; {}", super::blockers::of(locks))
}

/// [`wait_in_transaction`] once more after a wait that timed out and so aborted the transaction.
pub(crate) fn begin_again_and_wait(begin: &Begin, locks: Locks<'_>, wait: Duration) -> String {
    let mut sql = String::from("ROLLBACK; ");
    sql.push_str(&begin.message());
    sql.push_str(&wait_in_transaction(locks, wait));
    sql
}

/// The last look of a wait that timed out: a `try`, and who is in the way if it fails. One message, so that both speak
/// of the same moment.
pub(crate) fn begin_and_look(begin: &Begin, locks: Locks<'_>, after_timeout: bool) -> String {
    let mut sql = String::new();
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(&begin_and_try(begin, locks, &Ask::All { login_pid: None }));
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
pub(crate) fn try_session(locks: Locks<'_>, names: Names<'_>, ask: &Ask) -> String {
    let mut sql = String::with_capacity(768);
    if let (Ask::Prepare(statement) | Ask::Execute(statement), Some(name), [key]) =
        (ask, names.holding, locks.keys)
    {
        if let Ask::Execute(_) = ask {
            push_execute(&mut sql, statement, key, name);
            return sql;
        }
        let select = |sql: &mut String, name: &str, arguments: &dyn Fn(&mut String)| {
            push_session_select(sql, Some(name), "", "", |sql| {
                sql.push_str("CASE WHEN pg_catalog.pg_try_advisory_lock");
                sql.push_str(shared_suffix(locks.mode));
                arguments(sql);
                sql.push_str(" THEN 'granted' ELSE 'busy' END");
            });
        };
        select(&mut sql, &literal(name), &|sql| push_arguments(sql, key));
        push_prepare(&mut sql, statement, key, |sql, name, arguments| {
            select(sql, name, &|sql| sql.push_str(arguments))
        });
        return sql;
    }
    // Several keys: tried as transaction locks first. The end of the message, which is its transaction, returns them,
    // all that there is to return when one of them is busy.
    let several = locks.keys.len() > 1;
    let mut take = String::new();
    if several {
        take_each(&mut take, locks);
    }
    let server = if let Ask::All { .. } = ask {
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
        push_verdict(sql, locks, function, ask, "");
    });
    sql
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
    ask: &Ask,
    after_timeout: bool,
) -> String {
    let mut sql = String::new();
    if after_timeout {
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(&try_session(locks, names, ask));
    sql.push_str("; ");
    sql.push_str(&super::blockers::of(locks));
    sql
}

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
    sql.push_str(&unlock(locks, None));
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

/// Returns those of the session locks that this backend holds, for a `try` whose answer nobody waited for.
pub(crate) fn unlock_if_held(locks: Locks<'_>) -> String {
    let mut sql = String::new();
    for (n, key) in locks.keys.iter().enumerate() {
        if n > 0 {
            sql.push_str("; ");
        }
        sql.push_str("SELECT CASE WHEN EXISTS (SELECT FROM ");
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
        sql.push_str("SELECT ");
        push_set_lock_timeout(
            sql,
            Duration::from_millis(u64::from(wait.unsigned_abs())),
            Within::Nothing,
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
    let _ = write!(sql, "pg_catalog.{function}{shared}");
    push_arguments(sql, key);
}

fn push_arguments(sql: &mut String, key: &LockKey) {
    let _ = match key.as_i32_pair() {
        Some((a, b)) => write!(sql, "('{a}'::pg_catalog.int4, '{b}'::pg_catalog.int4)"),
        None => write!(
            sql,
            "('{}'::pg_catalog.int8)",
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
