//! Who is told what transactions do, so that a failure can be explained afterwards.
//!
//! When a deadlock is reported its evidence is gone: the victim's locks are released, and the survivor has continued.
//! What both sides have sent is known here, where both are transactions of this process. The core only tells; an
//! [`Observer`] remembers.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Statement;

use crate::call_site::CallSite;
use crate::error::Failure;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

/// Is told of each transaction and each session guard of a keeper.
pub(crate) trait Observer: Send + Sync + fmt::Debug {
    /// One begins.
    fn begin(&self, beginning: Beginning<'_>) -> Arc<dyn Observed>;

    /// It has ended.
    fn end(&self, observed: &Arc<dyn Observed>);
}

/// A transaction or a session guard that begins.
#[cfg_attr(
    not(feature = "incidents"),
    expect(dead_code, reason = "read by an observer, and there is none")
)]
#[derive(Debug)]
pub(crate) struct Beginning<'a> {
    pub(crate) call_site: Option<CallSite>,
    pub(crate) application_name: Option<&'a Arc<str>>,
    /// What bounds each of its waits for a lock, where that is known.
    pub(crate) lock_timeout: Option<Duration>,
    /// Whether it is a session guard, which holds locks between its statements.
    pub(crate) is_guard: bool,
}

/// Is told what one transaction or session guard does. Nothing here waits or fails.
pub(crate) trait Observed: Any + Send + Sync + fmt::Debug {
    /// Its backend has this pid, as the server says.
    fn identify(&self, pid: i32);

    /// It is this attempt of its transaction, of at most so many.
    fn is_attempt(&self, attempt: u32, of: u32);

    /// It runs in this conflict group.
    fn is_in_group(&self, key: &LockKey);

    /// A statement is sent now. Gives the number that [`end_statement`](Self::end_statement) takes.
    fn begin_statement(&self, statement: Sent<'_>) -> u64;

    /// A statement has ended.
    fn end_statement(&self, number: u64, end: StatementEnd<'_>);

    /// Its last statement was granted these advisory locks.
    fn locks_taken(&self, locks: Vec<(LockKey, AdvisoryMode)>);
}

/// What is sent to the server.
#[cfg_attr(
    not(feature = "incidents"),
    expect(dead_code, reason = "read by an observer, and there is none")
)]
#[derive(Clone, Copy)]
pub(crate) enum Sent<'a> {
    Text(&'a str),
    Prepared(&'a Statement),
    /// A call of this crate that waits for its lock, in several statements if need be.
    Call(&'a str),
}

/// How a statement ended.
#[cfg_attr(
    not(feature = "incidents"),
    expect(dead_code, reason = "read by an observer, and there is none")
)]
pub(crate) enum StatementEnd<'a> {
    Succeeded,
    /// [`Failure::Aborted`] where it failed because another had; [`Failure::Driver`] and [`Failure::ConnectionLost`]
    /// where that is not what the server answered.
    Failed(Failure),
    /// Its future was dropped.
    Abandoned,
    /// Its text has been prepared, and nothing was run.
    Prepared(&'a str, &'a Statement),
}

/// One transaction or session guard under observation, until this is dropped.
pub(crate) struct Observation {
    observer: Arc<dyn Observer>,
    observed: Arc<dyn Observed>,
}

impl Observation {
    pub(super) fn begin(observer: &Arc<dyn Observer>, beginning: Beginning<'_>) -> Self {
        Self {
            observed: observer.begin(beginning),
            observer: Arc::clone(observer),
        }
    }

    pub(crate) fn observed(&self) -> &Arc<dyn Observed> {
        &self.observed
    }
}

/// Without what is observed, which has statements with their literals in it.
impl fmt::Debug for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observation").finish_non_exhaustive()
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        self.observer.end(&self.observed);
    }
}

/// A statement that was sent and has not ended.
pub(crate) struct PendingStatement {
    observed: Arc<dyn Observed>,
    number: u64,
    ended: bool,
}

impl PendingStatement {
    pub(super) fn begin(observed: &Arc<dyn Observed>, statement: Sent<'_>) -> Self {
        Self {
            number: observed.begin_statement(statement),
            observed: Arc::clone(observed),
            ended: false,
        }
    }

    /// It has ended: without a failure, it succeeded.
    pub(crate) fn end(self, failure: Option<Failure>) {
        self.end_with(failure.map_or(StatementEnd::Succeeded, StatementEnd::Failed));
    }

    pub(super) fn end_with(mut self, end: StatementEnd<'_>) {
        self.ended = true;
        self.observed.end_statement(self.number, end);
    }
}

impl Drop for PendingStatement {
    fn drop(&mut self) {
        if !self.ended {
            self.observed
                .end_statement(self.number, StatementEnd::Abandoned);
        }
    }
}

/// What a statement is observed as.
pub(crate) trait AsSent {
    fn as_sent(&self) -> Sent<'_>;
}

impl AsSent for str {
    fn as_sent(&self) -> Sent<'_> {
        Sent::Text(self)
    }
}

impl AsSent for String {
    fn as_sent(&self) -> Sent<'_> {
        Sent::Text(self)
    }
}

impl AsSent for Statement {
    fn as_sent(&self) -> Sent<'_> {
        Sent::Prepared(self)
    }
}

/// What a query method can be given: SQL text (`str`, `String`) or a prepared
/// [`Statement`].
///
/// It is the driver's [`ToStatement`](tokio_postgres::ToStatement), which has the same three implementations, with the
/// text of a statement made known for the incident report. Like that one it cannot be implemented elsewhere.
#[expect(private_bounds, reason = "seals the trait, as its docs say")]
pub trait ToStatement: tokio_postgres::ToStatement + AsSent {}

impl ToStatement for str {}
impl ToStatement for String {}
impl ToStatement for Statement {}
