//! What the log says about locks.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::call_site::site_in;
use crate::mode::LockMode;
use crate::postgres::lock_object::LockObject;
use crate::postgres::message::{DetailWait, RowContext};
use crate::postgres::statement::redact;
use crate::postgres::timestamp::Age;

use super::entry::{Origin, named};

/// What kind of message it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LogEventKind {
    /// A session has waited for `deadlock_timeout` and waits on (`log_lock_waits`).
    StillWaiting,
    /// A session got a lock that it had waited for as long (`log_lock_waits`).
    Acquired,
    /// The server took a session that had waited as long out of the queue, without the lock (`log_lock_waits`). Rare: of
    /// waits that are cancelled or time out there is no such message.
    NotAcquired,
    /// The server prevented a deadlock by putting a session ahead in the queue (`log_lock_waits`).
    DeadlockAvoided,
    /// The server has found a deadlock and fails this session, which logs [`Deadlock`](Self::Deadlock) next
    /// (`log_lock_waits`).
    DeadlockFound,
    /// A transaction failed as the victim of a deadlock (SQLSTATE 40P01).
    Deadlock,
    /// A statement failed by `lock_timeout` (SQLSTATE 55P03).
    LockTimeout,
    /// A lock was not to be had at once, and the statement was not to wait: NOWAIT (SQLSTATE 55P03, or
    /// `log_lock_failures` in 18 and later).
    NotAvailable,
}

impl LogEventKind {
    /// Its name for labels: `still_waiting`, …
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
/// What the log does not say, or `log_line_prefix` leaves out, is `None` or empty. `Display` is one line without the
/// literals of statements; `Debug` shows none either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEvent {
    origin: Origin,
    event: Event,
}

/// What a message says, without who says it.
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
    pub(super) statement: Option<Verbatim>,
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

    /// What kind of message it is.
    #[must_use]
    pub fn kind(&self) -> LogEventKind {
        self.event.kind
    }

    /// When it was logged, to the millisecond, or to the second with `%t`. `None` where the log names a time zone by an
    /// abbreviation that is not known: see [`Reader::zone`](super::Reader::zone).
    #[must_use]
    pub fn time(&self) -> Option<SystemTime> {
        self.origin.time
    }

    /// The same as it is written in the log.
    #[must_use]
    pub fn time_text(&self) -> Option<&str> {
        self.origin.time_text.as_deref()
    }

    /// The backend that logged it: the one that waits, got the lock, or failed.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.origin.pid.or(self.event.pid)
    }

    /// The role it is logged in as.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.origin.user.as_deref()
    }

    /// The database it is connected to.
    #[must_use]
    pub fn database(&self) -> Option<&str> {
        self.origin.database.as_deref()
    }

    /// Its `application_name`.
    #[must_use]
    pub fn application_name(&self) -> Option<&str> {
        self.origin.application.as_deref()
    }

    /// The call site in that name, where it uses this crate: `src/pay.rs:42`.
    #[must_use]
    pub fn call_site(&self) -> Option<&str> {
        self.application_name().and_then(site_in)
    }

    /// What it ran, with all literals. Never shown by `Display` and `Debug`.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.event.statement.as_ref().map(|text| &*text.0)
    }

    /// The statement's identifier, as in `pg_stat_statements.queryid`; `None` where it is not computed, too.
    #[must_use]
    pub fn query_id(&self) -> Option<i64> {
        self.origin.query_id
    }

    /// The mode that is waited for; of a deadlock, what its victim waited for.
    #[must_use]
    pub fn mode(&self) -> Option<LockMode> {
        self.event.mode
    }

    /// What the lock is on; of a deadlock, what its victim waited for. The log has no names of relations, only their
    /// oids; of advisory locks it has the number, which gets its name where this process has used it. Errors other than
    /// deadlocks do not say it; see [`row`](Self::row).
    #[must_use]
    pub fn object(&self) -> Option<&LockObject> {
        self.event.object.as_ref()
    }

    /// For how long it has waited, or had to wait.
    #[must_use]
    pub fn waited(&self) -> Option<Duration> {
        self.event.waited
    }

    /// Who holds the lock, by process id; 0 is a prepared transaction.
    #[must_use]
    pub fn holders(&self) -> &[i32] {
        &self.event.holders
    }

    /// Who waits for the lock, this one too, by process id, in the order of the queue.
    #[must_use]
    pub fn queue(&self) -> &[i32] {
        &self.event.queue
    }

    /// Of a deadlock, who waited for whom: the blocker of each is the waiter of the next, and that of the last the victim,
    /// which comes first.
    #[must_use]
    pub fn waits(&self) -> &[LogWait] {
        &self.event.waits
    }

    /// The row that was waited for, from the message's CONTEXT.
    #[must_use]
    pub fn row(&self) -> Option<&LogRow> {
        self.event.row.as_ref()
    }
}

/// `pid 12 (billing src/pay.rs:42) still waits after 1.0s for ShareLock on transaction 733, held by pid 11: UPDATE t SET a = ?`
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
            Some(statement) => write!(f, ": {}", shown(statement)),
            None => Ok(()),
        }
    }
}

/// One of those who waited for one another in a deadlock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogWait {
    waiter: i32,
    blocker: i32,
    mode: Option<LockMode>,
    object: LockObject,
    statement: Option<Verbatim>,
}

impl LogWait {
    pub(super) fn new(wait: &DetailWait, statement: Option<Verbatim>) -> Self {
        Self {
            waiter: wait.waiter,
            blocker: wait.blocker,
            mode: LockMode::from_pg_locks(&wait.mode),
            object: named(&wait.object),
            statement,
        }
    }

    /// Who waited, by process id.
    #[must_use]
    pub fn waiter(&self) -> i32 {
        self.waiter
    }

    /// Who was in its way; 0 for a prepared transaction.
    #[must_use]
    pub fn blocker(&self) -> i32 {
        self.blocker
    }

    /// The mode it waited for.
    #[must_use]
    pub fn mode(&self) -> Option<LockMode> {
        self.mode
    }

    /// What the lock was on.
    #[must_use]
    pub fn object(&self) -> &LockObject {
        &self.object
    }

    /// What it ran, with all literals, as much of it as the server keeps (`track_activity_query_size`). Never shown by
    /// `Display` and `Debug`.
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
            Some(statement) => write!(f, " ({})", shown(statement)),
            None => Ok(()),
        }
    }
}

/// The row that a session waited for, by where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRow {
    inner: RowContext,
}

impl LogRow {
    pub(super) fn new(inner: RowContext) -> Self {
        Self { inner }
    }

    /// The name of its table, without the schema, which the log does not have. Of an entry that was made in a unique
    /// index it is mostly the index.
    #[must_use]
    pub fn relation(&self) -> &str {
        &self.inner.relation
    }

    /// The number of its page.
    #[must_use]
    pub fn page(&self) -> u32 {
        self.inner.page
    }

    /// Its place in the page, counted from 1.
    #[must_use]
    pub fn offset(&self) -> u16 {
        self.inner.offset
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

/// Without literals, and on one line: names in quotes may have anything in them.
fn shown(statement: &str) -> String {
    let mut line = String::new();
    for c in redact(statement).chars() {
        match c {
            '\'' | '"' | '\\' => line.push(c),
            c => line.extend(c.escape_debug()),
        }
    }
    line
}

/// A statement's text, which `Debug` does not show: it may carry what is nobody's business.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Verbatim(pub(super) Box<str>);

impl fmt::Debug for Verbatim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact(&self.0))
    }
}
