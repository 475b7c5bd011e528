//! The events about locks that a log contains.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::call_site::site_in;
use crate::mode::LockMode;
use crate::postgres::lock_object::LockObject;
use crate::postgres::message::{DetailWait, RowContext};
use crate::postgres::statement::redact;
use crate::postgres::timestamp::Age;

use super::entry::{Origin, with_known_name};

/// The kind of a message about locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LogEventKind {
    /// A session has waited for `deadlock_timeout` and is still waiting (`log_lock_waits`).
    StillWaiting,
    /// A session got a lock after it had waited for at least `deadlock_timeout` (`log_lock_waits`).
    Acquired,
    /// The server removed a session that had waited as long from the queue without granting the lock
    /// (`log_lock_waits`). Rare: waits that are cancelled or time out do not produce this message.
    NotAcquired,
    /// The server avoided a deadlock by moving a session ahead in the queue (`log_lock_waits`).
    DeadlockAvoided,
    /// The server has detected a deadlock and fails this session, which logs [`Deadlock`](Self::Deadlock) next
    /// (`log_lock_waits`).
    DeadlockFound,
    /// A transaction failed as the victim of a deadlock (SQLSTATE 40P01).
    Deadlock,
    /// A statement failed because of `lock_timeout` (SQLSTATE 55P03).
    LockTimeout,
    /// A lock was not available at once, and the statement does not wait: NOWAIT (SQLSTATE 55P03, or
    /// `log_lock_failures` in 18 and later).
    NotAvailable,
}

impl LogEventKind {
    /// The name of the kind for metric labels: `still_waiting`, …
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::StillWaiting => "still_waiting",
            Self::Acquired => "acquired",
            Self::NotAcquired => "not_acquired",
            Self::DeadlockAvoided => "deadlock_avoided",
            Self::DeadlockFound => "deadlock_found",
            Self::Deadlock => "deadlock",
            Self::LockTimeout => "lock_timeout",
            Self::NotAvailable => "not_available",
        }
    }
}

/// A message about locks in the server's log.
///
/// Values that the log does not contain, or that `log_line_prefix` leaves out, are `None` or empty. `Display` is one
/// line without the literals of statements; `Debug` does not show them either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEvent {
    origin: Origin,
    event: Event,
}

/// The content of a message, without its origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) kind: LogEventKind,
    pub(super) pid: Option<i32>,
    pub(super) mode: Option<LockMode>,
    pub(super) object: Option<LockObject>,
    pub(super) waited: Option<Duration>,
    pub(super) holders: Vec<i32>,
    pub(super) queue: Vec<i32>,
    pub(super) waits: Vec<LogWait>,
    pub(super) row: Option<LogRow>,
    pub(super) statement: Option<StatementText>,
}

impl Event {
    pub(super) fn new(kind: LogEventKind) -> Self {
        Self {
            kind,
            pid: None,
            mode: None,
            object: None,
            waited: None,
            holders: Vec::new(),
            queue: Vec::new(),
            waits: Vec::new(),
            row: None,
            statement: None,
        }
    }
}

impl LogEvent {
    pub(super) fn new(origin: Origin, event: Event) -> Self {
        Self { origin, event }
    }

    getters! {
        /// The kind of the message.
        kind: LogEventKind = event.kind;

        /// When the message was logged, to the millisecond, or to the second with `%t`. `None` if the log names a time
        /// zone by an unknown abbreviation: see [`Reader::zone`](super::Reader::zone).
        time: Option<SystemTime> = origin.time;

        /// The time as it is written in the log.
        text time_text = origin.time_text;
    }

    /// The backend that logged the message: the one that waits, got the lock, or failed.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.origin.pid.or(self.event.pid)
    }

    getters! {
        /// The role of the session.
        text user = origin.user;

        /// The database of the session.
        text database = origin.database;

        /// The session's `application_name`.
        text application_name = origin.application;
    }

    /// The call site in the `application_name`, if the session uses this crate: `src/pay.rs:42`.
    #[must_use]
    pub fn call_site(&self) -> Option<&str> {
        self.application_name().and_then(site_in)
    }

    /// The session's statement, with all literals. `Display` and `Debug` never show them.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.event.statement.as_ref().map(|text| &*text.0)
    }

    getters! {
        /// The statement's identifier, as in `pg_stat_statements.queryid`; `None` also if the server does not compute
        /// it.
        query_id: Option<i64> = origin.query_id;

        /// The requested lock mode; for a deadlock, the mode its victim waited for.
        mode: Option<LockMode> = event.mode;

        /// What the lock is on; for a deadlock, what its victim waited for. The log contains the oids of relations, not
        /// their names, and the numbers of advisory locks, to which the name is added if this process has used the key.
        /// Errors other than deadlocks do not contain it; see [`row`](Self::row).
        object: Option<&LockObject> = event.object;

        /// How long the session has waited so far, or had to wait.
        waited: Option<Duration> = event.waited;

        /// The process ids of the lock's holders; 0 is a prepared transaction.
        holders: &[i32] = event.holders;

        /// The process ids of the lock's waiters, including this one, in the order of the queue.
        queue: &[i32] = event.queue;

        /// The waits that form a deadlock's cycle. The blocker of each is the waiter of the next; the first waiter is
        /// the victim and the blocker of the last.
        waits: &[LogWait] = event.waits;

        /// The row that the session waited for, from the message's CONTEXT.
        row: Option<&LogRow> = event.row;
    }
}

/// `pid 12 (billing src/pay.rs:42) still waits after 1.0s for ShareLock on transaction 733, held by pid 11: UPDATE t
/// SET a = ?`
impl fmt::Display for LogEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid() {
            Some(pid) => write!(f, "pid {pid}")?,
            None => f.write_str("a session")?,
        }
        if let Some(name) = self.application_name().filter(|name| !name.is_empty()) {
            write!(f, " ({})", name.escape_debug())?;
        }
        let verb = match self.kind() {
            LogEventKind::StillWaiting => "still waits",
            LogEventKind::Acquired => "got its lock",
            LogEventKind::NotAcquired => "did not get its lock",
            LogEventKind::DeadlockAvoided => "was put ahead in the queue, against a deadlock,",
            LogEventKind::DeadlockFound => "is in a deadlock",
            LogEventKind::Deadlock => "failed as the victim of a deadlock",
            LogEventKind::LockTimeout => "failed by a lock timeout",
            LogEventKind::NotAvailable => "did not wait",
        };
        write!(f, " {verb}")?;
        if let Some(waited) = self.waited() {
            write!(f, " after {}", Age(waited))?;
        }
        if let (Some(mode), Some(object)) = (self.mode(), self.object()) {
            write!(f, " for {mode} on {object}")?;
        }
        if let Some(row) = self.row() {
            write!(f, " ({row})")?;
        }
        for (at, holder) in self.holders().iter().enumerate() {
            f.write_str(if at == 0 { ", held by " } else { ", " })?;
            match holder {
                0 => f.write_str("a prepared transaction")?,
                pid => write!(f, "pid {pid}")?,
            }
        }
        for wait in self.waits() {
            write!(f, "; {wait}")?;
        }
        match self.statement() {
            Some(statement) => write!(f, ": {}", redacted_line(statement)),
            None => Ok(()),
        }
    }
}

/// One wait of a deadlock's cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogWait {
    waiter: i32,
    blocker: i32,
    mode: Option<LockMode>,
    object: LockObject,
    statement: Option<StatementText>,
}

impl LogWait {
    pub(super) fn new(wait: &DetailWait, statement: Option<StatementText>) -> Self {
        Self {
            waiter: wait.waiter,
            blocker: wait.blocker,
            mode: LockMode::from_pg_locks(&wait.mode),
            object: with_known_name(&wait.object),
            statement,
        }
    }

    getters! {
        /// The waiter's process id.
        waiter: i32;

        /// The blocker's process id; 0 for a prepared transaction.
        blocker: i32;

        /// The mode the waiter requested.
        mode: Option<LockMode>;

        /// What the lock was on.
        object: &LockObject;
    }

    /// The waiter's statement, with all literals, up to the length the server keeps (`track_activity_query_size`).
    /// `Display` and `Debug` never show the literals.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.statement.as_ref().map(|text| &*text.0)
    }
}

/// `pid 12 waits for ShareLock on transaction 733, blocked by pid 11 (UPDATE t SET a = ?)`
impl fmt::Display for LogWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} waits for ", self.waiter)?;
        match self.mode {
            Some(mode) => write!(f, "{mode}")?,
            None => f.write_str("a lock")?,
        }
        write!(f, " on {}, blocked by pid {}", self.object, self.blocker)?;
        match self.statement() {
            Some(statement) => write!(f, " ({})", redacted_line(statement)),
            None => Ok(()),
        }
    }
}

/// The row that a session waited for, by its location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRow {
    inner: RowContext,
}

impl LogRow {
    pub(super) fn new(inner: RowContext) -> Self {
        Self { inner }
    }

    getters! {
        /// The name of the row's table, without the schema, which the log does not contain. If the session waited while
        /// it inserted into a unique index, it is usually the name of the index.
        relation: &str = inner.relation;

        /// The number of the row's page.
        page: u32 = inner.page;

        /// The row's position in the page, counted from 1.
        offset: u16 = inner.offset;
    }
}

/// `row (0,9) of "users"`
impl fmt::Display for LogRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RowContext {
            page,
            offset,
            relation,
            ..
        } = &self.inner;
        write!(f, "row ({page},{offset}) of {relation:?}")
    }
}

/// The statement without literals, on one line: quoted names can contain any character.
fn redacted_line(statement: &str) -> String {
    let mut line = String::new();
    for c in redact(statement).chars() {
        match c {
            '\'' | '"' | '\\' => line.push(c),
            c => line.extend(c.escape_debug()),
        }
    }
    line
}

/// A statement's text. `Debug` shows it without literals, which can be confidential.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct StatementText(pub(super) Box<str>);

impl fmt::Debug for StatementText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact(&self.0))
    }
}
