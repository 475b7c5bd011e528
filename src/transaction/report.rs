//! Reporting failures, before they are retried.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use super::BoxFuture;
use crate::connection::Observed;
use crate::error::Report;

/// Makes and delivers a report that was put off.
pub(crate) type Deferred = Box<dyn FnOnce() + Send + Sync>;

/// Is told when a transaction has failed by a deadlock or a lock timeout.
pub(crate) trait Reporter: Send + Sync + fmt::Debug {
    /// An attempt is about to begin.
    fn begins(self: Arc<Self>);

    /// Looks up names that the server's error leaves out, for the report that is made next. It takes a moment at most.
    fn look_up<'a>(&'a self, failed: &'a FailedAttempt<'a>) -> BoxFuture<'a, ()>;

    /// Makes a report. It neither waits nor fails.
    fn failed(&self, failed: &FailedAttempt<'_>) -> Option<Box<dyn Report>>;

    /// Gathers what a report needs, for a failure of which it is not known yet whether a savepoint has caught it.
    fn caught(self: Arc<Self>, failed: &FailedAttempt<'_>) -> Option<Deferred>;
}

/// Who is told of the failures of one transaction, and which attempt it is.
#[derive(Clone, Debug)]
pub(crate) struct Reporting {
    pub(crate) reporter: Arc<dyn Reporter>,
    pub(crate) attempt: u32,
    pub(crate) attempts: u32,
}

/// What happens after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterFailure {
    /// Another attempt, after this pause.
    Retry(Duration),
    /// Nothing: what could be repeated was repeated often enough.
    GiveUp,
    /// Nothing: it is not worth repeating, or is to run once.
    Pass,
    /// The transaction continues.
    Continue,
}

/// One failed attempt.
#[cfg_attr(
    not(feature = "incidents"),
    expect(dead_code, reason = "read by a reporter, and there is none")
)]
#[derive(Debug)]
pub(crate) struct FailedAttempt<'a> {
    pub(crate) observed: &'a Arc<dyn Observed>,
    pub(crate) error: &'a DbError,
    pub(crate) attempt: u32,
    pub(crate) attempts: u32,
    pub(crate) then: AfterFailure,
}
