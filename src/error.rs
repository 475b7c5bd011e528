//! The one error of the crate, and the only place where SQLSTATEs are told apart.

mod cause;
mod grant;

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use deadpool_postgres::PoolError;
use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::blocker::Blocker;
use crate::key::LockKey;
pub(crate) use grant::READ_LOCKS;

/// What went wrong, as far as a caller would act on it differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A lock was not granted within the wait asked for. Nothing is held. [`Error::blockers`] says who is in the way.
    LockTimeout,
    /// The server broke a deadlock by failing this transaction (SQLSTATE 40P01).
    Deadlock,
    /// Concurrent transactions cannot be serialized (SQLSTATE 40001).
    Serialization,
    /// A retryable failure came back at each attempt; the last one is the [`source`](StdError::source).
    RetriesExhausted,
    /// The connection was lost while COMMIT was under way: the server may or may not have committed.
    CommitUnknown,
    /// The connection was lost, and the transaction is not committed: before COMMIT was sent, so that the server rolls it
    /// back, or later, where the server was asked and says so
    /// ([`resolve_commit`](crate::TransactionOptions::resolve_commit)).
    ConnectionLost,
    /// A session guard's lock is gone: its connection ended while the guard was alive.
    LockLost,
    /// The lock table has no room (SQLSTATE 53200 with a hint about `max_locks_per_transaction` or one of its like), or the
    /// request could not fit in it and was not sent.
    OutOfLocks,
    /// The server is out of memory (SQLSTATE 53200 without such a hint): the lock table is not what is full.
    OutOfMemory,
    /// The server is a hot standby, where an advisory lock excludes nobody but that standby's own sessions.
    ReadOnlyServer,
    /// A session lock was asked for through a pooler that hands one server session to several clients.
    TransactionPooler,
    /// The server's advisory-lock functions do not lock.
    NoAdvisoryLocks,
    /// Two different names have the same key in this process; see [`LockKey`].
    KeyCollision,
    /// The statement was cancelled (SQLSTATE 57014): `statement_timeout`, or somebody's `pg_cancel_backend`.
    Cancelled,
    /// A section asked for a lock that it holds itself, on another connection: it would wait for itself. The lock was not
    /// asked for at the server. The closures of a session guard's own transactions are not sections.
    AlreadyHeld,
    /// A section ended its own transaction, or exchanged it for another one. What it did before may be committed or not.
    /// Where it has begun another transaction after the first (`COMMIT AND CHAIN`), that is not found out.
    TransactionEnded,
    /// A newer fencing token was issued for the same lock: another holder has it now. Nothing may be written any more under
    /// the older one.
    Fenced,
    /// There are no tables for fencing tokens in the database, or they are another server's. The error says what to do:
    /// `keeper.fencing().set_up()`.
    FencingNotSetUp,
    /// The pool gave no connection.
    Pool,
    /// The request cannot work as it was put; nothing was sent.
    Config,
    /// Any other error of the server or the driver.
    Database,
}

impl ErrorKind {
    pub(crate) const fn describe(self) -> &'static str {
        match self {
            Self::LockTimeout => "lock not granted in time",
            Self::Deadlock => "deadlock",
            Self::Serialization => "transactions could not be serialized",
            Self::RetriesExhausted => "retries exhausted",
            Self::CommitUnknown => "connection lost during commit, outcome unknown",
            Self::ConnectionLost => "connection lost before commit, nothing is applied",
            Self::LockLost => "lock lost with its connection",
            Self::OutOfLocks => "no room in the server's lock table",
            Self::OutOfMemory => "the server is out of memory",
            Self::ReadOnlyServer => {
                "server is a standby, where an advisory lock would exclude nobody on the primary"
            }
            Self::TransactionPooler => "session lock refused behind a transaction pooler",
            Self::NoAdvisoryLocks => "the server's advisory locks do not lock",
            Self::KeyCollision => "two names have one lock key",
            Self::Cancelled => "statement cancelled",
            Self::AlreadyHeld => "the section holds this lock already",
            Self::TransactionEnded => "the section has ended its own transaction",
            Self::Fenced => "a newer fencing token was issued",
            Self::FencingNotSetUp => "fencing tokens are not set up",
            Self::Pool => "no connection from the pool",
            Self::Config => "bad request",
            Self::Database => "database error",
        }
    }
}

/// The error of every call of this crate.
///
/// # What may be logged
///
/// This type decides what a log, a panic message or a bug report may show:
///
/// - `{}` ([`Display`](fmt::Display)) is one line: what failed, the lock's readable key, how long it was waited for, who
///   holds it, and the SQLSTATE. It contains no text of the server and no value, except the name of the object for which a right
///   is missing (42501).
/// - `{:?}` ([`Debug`]), which `unwrap()` and `main() -> Result<(), Box<dyn Error>>` print, adds the cause. For a server that
///   cannot be reached that is the host and the reason. For a request that the server refused it is the SQLSTATE and the
///   server's message. Quoted values are masked where a message of its class can quote them: classes 22 (data exceptions),
///   23 (constraint violations), 3F (schemas) and 58 (files), 42601 (syntax errors), 42704 (objects), and 42P01 (relations)
///   unless the name stands in the statement itself. A message that a function raised is left out.
/// - [`source`](StdError::source) is the driver's error as it came, with the DETAIL, the HINT and all values. Log it only
///   where data of the application may be logged.
///
/// `From<tokio_postgres::Error>` is there so that `?` works in a closure that returns this type.
pub struct Error(Box<Inner>);

/// What explains a failure beyond the error itself: made by a room above, and recovered there by its type.
pub(crate) trait Report: Any + Send + Sync {}

struct Inner {
    kind: ErrorKind,
    detail: Option<String>,
    key: Option<LockKey>,
    waited: Option<Duration>,
    blockers: Vec<Blocker>,
    attempts: u32,
    report: Option<Box<dyn Report>>,
    /// The hosts that the connection was to lead to.
    hosts: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    getters! {
        /// What went wrong, as far as a caller would act on it differently.
        kind: ErrorKind = 0.kind;

        /// The lock that was asked for; the first in order where several were.
        key: Option<&LockKey> = 0.key;

        /// For how long the lock was waited for, in all.
        waited: Option<Duration> = 0.waited;

        /// Who held the lock, or queued for it ahead of us, when it was last refused. Empty where nobody did any more,
        /// or where it could not be asked: by a role without SELECT on `pg_locks`, among others.
        blockers: &[Blocker] = 0.blockers;

        /// How many times the transaction was run; 0 where no attempt began.
        attempts: u32 = 0.attempts;
    }

    /// The report that came with it.
    #[cfg(feature = "incidents")]
    pub(crate) fn report(&self) -> Option<&dyn Any> {
        let report: &dyn Any = self.0.report.as_deref()?;
        Some(report)
    }

    /// Whether running the whole transaction once more can succeed without anything being changed.
    ///
    /// True for a deadlock, a serialization failure, a lock timeout, a connection lost before COMMIT, and a prepared
    /// statement whose result has changed its type (0A000, after a schema change). Not for a lock
    /// that NOWAIT did not get, which is the answer that was asked for. Never for [`ErrorKind::CommitUnknown`]: that
    /// transaction may have been applied.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self.0.kind {
            ErrorKind::Deadlock | ErrorKind::Serialization | ErrorKind::ConnectionLost => true,
            ErrorKind::LockTimeout => self.failure() != Some(Failure::NotAvailable),
            // What was prepared is forgotten by then.
            ErrorKind::Database => self.failure() == Some(Failure::StalePlan),
            _ => false,
        }
    }

    /// The server's error behind this one.
    pub(crate) fn as_db_error(&self) -> Option<&DbError> {
        db_error(self.0.source.as_deref()?)
    }

    /// What the server's error behind this one means.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.as_db_error().map(classify_db)
    }

    /// The SQLSTATE of the server's error behind this one.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&SqlState> {
        db_error(self.0.source.as_deref()?).map(DbError::code)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.write_str(inner.kind.describe())?;
        if let Some(key) = &inner.key {
            write!(f, ": {key}")?;
        }
        if let Some(detail) = &inner.detail {
            write!(f, ": {detail}")?;
        }
        if let Some(waited) = inner.waited {
            write!(f, " after {waited:.1?}")?;
        }
        for (n, blocker) in inner.blockers.iter().take(SHOWN_BLOCKERS).enumerate() {
            write!(f, "{} {blocker}", if n == 0 { ";" } else { "," })?;
        }
        if let Some(more) = inner.blockers.len().checked_sub(SHOWN_BLOCKERS + 1) {
            write!(f, " and {} more", more + 1)?;
        }
        if inner.attempts > 1 {
            write!(f, ", {} attempts", inner.attempts)?;
        }
        if let Some(error) = self.as_db_error() {
            write!(f, " (SQLSTATE {})", error.code().code())?;
            if let Some(end) = end_of_session(error) {
                write!(f, ", {end}")?;
            }
            // Whoever knows what it was for has named it in the detail.
            let is_named = inner
                .detail
                .as_deref()
                .is_some_and(|it| it.contains("GRANT"));
            if let Some(grant) = grant::missing(error).filter(|_| !is_named) {
                write!(f, ", for want of {grant}")?;
            }
        }
        Ok(())
    }
}

const SHOWN_BLOCKERS: usize = 5;

/// With the cause, as far as it may be logged: see [`Error`].
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Error");
        shown
            .field("kind", &self.0.kind)
            .field("message", &format_args!("{self}"));
        if let Some(cause) = self.cause() {
            shown.field("cause", &format_args!("{cause}"));
        }
        shown.finish_non_exhaustive()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(source: tokio_postgres::Error) -> Self {
        let kind = classify(&source).kind();
        Self::new(kind).with_source(source)
    }
}

impl From<PoolError> for Error {
    fn from(source: PoolError) -> Self {
        Self::new(ErrorKind::Pool).with_source(source)
    }
}

/// How the crate makes its errors; the setters are for the rooms that know the facts.
impl Error {
    pub(crate) fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Inner {
            kind,
            detail: None,
            key: None,
            waited: None,
            blockers: Vec::new(),
            attempts: 0,
            report: None,
            hosts: None,
            source: None,
        }))
    }

    pub(crate) fn config(detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config).with_detail(detail)
    }

    #[cfg(feature = "schema")]
    pub(crate) fn detail(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    pub(crate) fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Says what the role lacks, where that is why the server has refused.
    pub(crate) fn lacking(self, what: impl FnOnce() -> String) -> Self {
        if is_insufficient_privilege(&self) {
            return self.with_detail(what());
        }
        self
    }

    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    pub(crate) fn with_key(mut self, key: &LockKey) -> Self {
        self.0.key = Some(key.clone());
        self
    }

    pub(crate) fn with_waited(mut self, waited: Duration) -> Self {
        self.0.waited = Some(waited);
        self
    }

    pub(crate) fn with_blockers(mut self, blockers: Vec<Blocker>) -> Self {
        self.0.blockers = blockers;
        self
    }

    pub(crate) fn with_attempts(mut self, attempts: u32) -> Self {
        self.0.attempts = attempts;
        self
    }

    pub(crate) fn with_report_if(mut self, report: Option<Box<dyn Report>>) -> Self {
        self.0.report = report;
        self
    }

    /// Notes where the connection was to lead to.
    pub(crate) fn with_hosts(mut self, hosts: Option<String>) -> Self {
        self.0.hosts = hosts;
        self
    }

    /// What the cause says, as far as it may be logged.
    fn cause(&self) -> Option<String> {
        let source = self.0.source.as_deref();
        let shown = source.map(|source| cause::shown(source));
        match (&self.0.hosts, shown) {
            (Some(hosts), Some(shown)) => Some(format!("{hosts}: {shown}")),
            (Some(hosts), None) => Some(hosts.clone()),
            (None, shown) => shown,
        }
    }

    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }
}

/// A server's or driver's error by what it means for the transaction and the connection it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// 55P03 by `lock_timeout`.
    LockTimeout,
    /// 55P03 by NOWAIT, which has not waited.
    NotAvailable,
    /// 40P01.
    Deadlock,
    /// 40001.
    Serialization,
    /// 57014.
    Cancelled,
    /// 53200, of the lock table.
    OutOfLocks,
    /// 53200, of anything else.
    OutOfMemory,
    /// 0A000 of a prepared statement whose result has another type by now. Prepared again, it succeeds.
    StalePlan,
    /// 2D000: a statement would have ended the transaction that it ran in.
    TransactionEnded,
    /// 25P02: an earlier statement of the transaction failed.
    Aborted,
    /// 25001: a transaction that should begin here has begun long ago.
    InTransaction,
    /// 26000: a prepared statement is not there.
    MissingStatement,
    /// 42P05: a statement to be prepared is there already.
    DuplicateStatement,
    /// The connection is gone or going: FATAL, class 08, 57P01–57P03, a closed socket.
    ConnectionLost,
    /// Any other ERROR of the server: the connection lives on.
    Other,
    /// An error of the driver itself (a parameter that does not fit, a wrong number of rows): nothing is wrong with
    /// the transaction on the server.
    Driver,
}

impl Failure {
    pub(crate) fn kind(self) -> ErrorKind {
        match self {
            Self::LockTimeout | Self::NotAvailable => ErrorKind::LockTimeout,
            Self::Deadlock => ErrorKind::Deadlock,
            Self::Serialization => ErrorKind::Serialization,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::OutOfLocks => ErrorKind::OutOfLocks,
            Self::OutOfMemory => ErrorKind::OutOfMemory,
            Self::TransactionEnded => ErrorKind::TransactionEnded,
            Self::ConnectionLost => ErrorKind::ConnectionLost,
            Self::Aborted
            | Self::InTransaction
            | Self::MissingStatement
            | Self::DuplicateStatement
            | Self::StalePlan
            | Self::Other
            | Self::Driver => ErrorKind::Database,
        }
    }

    /// Whether it is the connection that was left in a state in which nothing can begin on it: another one will do.
    pub(crate) fn is_of_the_connection(self) -> bool {
        matches!(
            self,
            Self::Aborted | Self::InTransaction | Self::MissingStatement | Self::DuplicateStatement
        )
    }
}

/// Sorts a driver's error by its SQLSTATE and severity; the server's translated texts are never looked at.
pub(crate) fn classify(error: &tokio_postgres::Error) -> Failure {
    match error.as_db_error() {
        Some(db) => classify_db(db),
        None if error.is_closed() => Failure::ConnectionLost,
        None => {
            // An I/O error inside the driver's error is the socket's, except that the driver reports a message it cannot
            // encode (a NUL in the SQL) as invalid input.
            let io =
                StdError::source(error).and_then(<dyn StdError>::downcast_ref::<std::io::Error>);
            match io {
                Some(io) if io.kind() != std::io::ErrorKind::InvalidInput => {
                    Failure::ConnectionLost
                }
                _ => Failure::Driver,
            }
        }
    }
}

/// Whether this SQLSTATE is that of a cancelled statement.
#[cfg(feature = "incidents")]
pub(crate) fn is_cancelled(code: &str) -> bool {
    SqlState::from_code(code) == SqlState::QUERY_CANCELED
}

/// Whether this SQLSTATE is that of messages that are no errors.
#[cfg(feature = "server-log")]
pub(crate) fn is_success(code: &str) -> bool {
    SqlState::from_code(code) == SqlState::SUCCESSFUL_COMPLETION
}

/// Whether this SQLSTATE is that of a deadlock's victim.
#[cfg(feature = "server-log")]
pub(crate) fn is_deadlock(code: &str) -> bool {
    SqlState::from_code(code) == SqlState::T_R_DEADLOCK_DETECTED
}

/// Whether this SQLSTATE is that of a lock that was not granted, by `lock_timeout` or by NOWAIT.
#[cfg(feature = "server-log")]
pub(crate) fn is_lock_not_available(code: &str) -> bool {
    SqlState::from_code(code) == SqlState::LOCK_NOT_AVAILABLE
}

/// [`classify`] for an error that was kept apart from the driver's wrapper.
pub(crate) fn classify_db(error: &DbError) -> Failure {
    if is_fatal(error) {
        return Failure::ConnectionLost;
    }
    let code = error.code();
    if *code == SqlState::LOCK_NOT_AVAILABLE {
        // The two share the SQLSTATE and differ in the message, which is translated. The name of the C function that
        // raised it is not (test `nowait_is_told_from_a_lock_timeout_by_the_routine`).
        match error.routine() {
            Some(
                "heap_lock_tuple"
                | "heap_acquire_tuplock"
                | "heapam_tuple_lock"
                | "RangeVarGetRelidExtended"
                | "LockTableRecurse"
                | "LockViewRecurse_walker",
            ) => Failure::NotAvailable,
            _ => Failure::LockTimeout,
        }
    } else if *code == SqlState::T_R_DEADLOCK_DETECTED {
        Failure::Deadlock
    } else if *code == SqlState::T_R_SERIALIZATION_FAILURE {
        Failure::Serialization
    } else if *code == SqlState::QUERY_CANCELED {
        Failure::Cancelled
    } else if *code == SqlState::OUT_OF_MEMORY {
        // The hint names the setting in every language (PostgreSQL's `src/backend/storage/lmgr/lock.c` and
        // `predicate.c`; test `a_full_lock_table_is_told_from_exhausted_memory`).
        let is_of_locks =
            |hint: &str| hint.contains("max_locks_per_") || hint.contains("max_pred_locks_per_");
        // A function that raises it without saying more most likely passes on what the lock table said.
        let is_raised = error.routine() == Some("exec_stmt_raise");
        match error.hint() {
            Some(hint) if is_of_locks(hint) => Failure::OutOfLocks,
            None if is_raised && error.message() != "out of memory" => Failure::OutOfLocks,
            _ => Failure::OutOfMemory,
        }
    } else if *code == SqlState::FEATURE_NOT_SUPPORTED
        // The routine is not translated (PostgreSQL's `src/backend/utils/cache/plancache.c`).
        && error.routine() == Some("RevalidateCachedQuery")
    {
        Failure::StalePlan
    } else if *code == SqlState::INVALID_TRANSACTION_TERMINATION {
        Failure::TransactionEnded
    } else if *code == SqlState::IN_FAILED_SQL_TRANSACTION {
        Failure::Aborted
    } else if *code == SqlState::ACTIVE_SQL_TRANSACTION {
        Failure::InTransaction
    } else if *code == SqlState::INVALID_SQL_STATEMENT_NAME {
        Failure::MissingStatement
    } else if *code == SqlState::DUPLICATE_PSTATEMENT {
        Failure::DuplicateStatement
    } else if code.code().starts_with("08")
        || matches!(
            code.code(),
            "57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "25P03" | "25P04"
        )
    {
        // Also those that a pooler sends with severity ERROR.
        Failure::ConnectionLost
    } else {
        Failure::Other
    }
}

/// A timeout by which the server ends a session that is idle.
#[derive(Clone, Copy, Debug)]
pub(crate) enum IdleEnd {
    InTransaction,
    OutsideTransaction,
}

impl IdleEnd {
    pub(crate) fn setting(self) -> &'static str {
        match self {
            Self::InTransaction => "idle_in_transaction_session_timeout",
            Self::OutsideTransaction => "idle_session_timeout",
        }
    }

    pub(crate) fn sqlstate(self) -> &'static str {
        match self {
            Self::InTransaction => "25P03",
            Self::OutsideTransaction => "57P05",
        }
    }
}

/// Whether the server has said with this that the session ends.
pub(crate) fn is_end_of_session(error: &DbError) -> bool {
    end_of_session(error).is_some()
}

/// Why the server, or a pooler, ends the session or does not begin it.
fn end_of_session(error: &DbError) -> Option<&'static str> {
    if classify_db(error) != Failure::ConnectionLost {
        return None;
    }
    match error.code().code() {
        "25P03" => Some("ended by idle_in_transaction_session_timeout"),
        "25P04" => Some("ended by transaction_timeout"),
        "57P01" => Some("terminated"),
        "57P02" => Some("ended because another backend crashed"),
        "57P03" => Some("the server is starting or stopping"),
        "57P04" => Some("the database was dropped"),
        "57P05" => Some("ended by idle_session_timeout"),
        "53300" => Some("the server has no connection to spare"),
        _ => None,
    }
}

/// Whether the server itself says that it ends the session: by an administrator's or a timeout's word. Other FATAL errors
/// may be a pooler's.
pub(crate) fn ends_session(error: &tokio_postgres::Error) -> bool {
    // 25P04, transaction_timeout, has no name in the driver.
    let is_servers = |code: &SqlState| {
        *code == SqlState::ADMIN_SHUTDOWN
            || *code == SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
            || code.code() == "25P04"
    };
    let error = error.as_db_error().filter(|error| is_fatal(error));
    error.is_some_and(|error| is_servers(error.code()))
}

fn is_fatal(error: &DbError) -> bool {
    matches!(
        error.parsed_severity(),
        Some(Severity::Fatal | Severity::Panic)
    )
}

/// Whether a statement has failed that divides by zero where something does not hold.
pub(crate) fn is_failed_check(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::DIVISION_BY_ZERO)
}

/// Whether there is no operator or function for values of these types.
pub(crate) fn is_undefined_function(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::UNDEFINED_FUNCTION)
}

/// Whether a table, or its schema, is not there.
#[cfg(feature = "coordination")]
pub(crate) fn is_missing_table(error: &Error) -> bool {
    error.sqlstate().is_some_and(|code| {
        *code == SqlState::UNDEFINED_TABLE || *code == SqlState::INVALID_SCHEMA_NAME
    })
}

/// Whether a function was given a value that it does not take, such as the name of a time zone that there is none of.
#[cfg(feature = "coordination")]
pub(crate) fn is_invalid_parameter(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::INVALID_PARAMETER_VALUE)
}

/// Whether the server cannot do at all what was asked.
pub(crate) fn is_not_supported(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::FEATURE_NOT_SUPPORTED)
}

/// Whether the role lacks the right to what was asked.
pub(crate) fn is_insufficient_privilege(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)
}

/// Whether something of that name is there already: the server has found it, or another session has won the race for its
/// name in a catalog.
#[cfg(feature = "schema")]
pub(crate) fn is_already_there(error: &Error) -> bool {
    error.as_db_error().is_some_and(|error| {
        *error.code() == SqlState::DUPLICATE_TABLE
            || *error.code() == SqlState::DUPLICATE_SCHEMA
            || *error.code() == SqlState::DUPLICATE_OBJECT
            || *error.code() == SqlState::UNIQUE_VIOLATION && error.schema() == Some("pg_catalog")
    })
}

/// Whether an index that was to become a constraint is one already.
#[cfg(feature = "schema")]
pub(crate) fn is_a_constraint_already(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)
}

/// Whether a table has a primary key already.
#[cfg(feature = "schema")]
pub(crate) fn has_a_primary_key(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::INVALID_TABLE_DEFINITION)
}

/// Whether a table has a column of that name already.
#[cfg(feature = "schema")]
pub(crate) fn has_the_column(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::DUPLICATE_COLUMN)
}

/// Whether an error, or one behind it, is a failure that running the transaction again can mend: the first one of this
/// crate where it [is retryable](Error::is_retryable), or the server's where that is a deadlock, a serialization failure,
/// or a lock timeout (not a lock that NOWAIT did not get).
///
/// For [`TransactionOptions::retry_if`](crate::TransactionOptions::retry_if), where an error type keeps its sources. One
/// that is `#[error(transparent)]` hides the error itself, and shows what is behind that.
///
/// # Examples
/// ```
/// assert!(!lockkeeper::is_retryable(&std::fmt::Error));
/// ```
#[must_use]
pub fn is_retryable(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<Error>() {
            return error.is_retryable();
        }
        if let Some(error) = error.downcast_ref::<DbError>() {
            return matches!(
                classify_db(error),
                Failure::Deadlock
                    | Failure::Serialization
                    | Failure::LockTimeout
                    | Failure::StalePlan
            );
        }
        next = error.source();
    }
    false
}

fn db_error<'a>(error: &'a (dyn StdError + Send + Sync + 'static)) -> Option<&'a DbError> {
    let mut next: Option<&'a (dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(db) = error.downcast_ref::<DbError>() {
            return Some(db);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_without_the_sources_text() {
        let error = Error::new(ErrorKind::LockTimeout)
            .with_key(&LockKey::from("invoice:42"))
            .with_waited(Duration::from_millis(1500))
            .with_source(std::io::Error::other("the cause"));
        let text = error.to_string();
        assert_eq!(text, "lock not granted in time: \"invoice:42\" after 1.5s");
        assert!(StdError::source(&error).is_some_and(|source| source.to_string() == "the cause"));
    }

    #[test]
    fn an_unknown_commit_is_never_retryable() {
        assert!(Error::new(ErrorKind::Deadlock).is_retryable());
        assert!(!Error::new(ErrorKind::CommitUnknown).is_retryable());
        assert!(!Error::new(ErrorKind::Cancelled).is_retryable());
        assert!(!Error::new(ErrorKind::OutOfLocks).is_retryable());
    }

    #[test]
    fn is_send_sync_and_small() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
