//! Reporting failures, before they are retried.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use crate::connection::Observed;
use crate::error::Report;

/// Is told when a transaction has failed by a deadlock or a lock timeout.
pub(crate) trait Reporter: Send + Sync + fmt::Debug {
    /// An attempt is about to begin.
    fn begins(self: Arc<Self>);

    /// Makes a report. It neither waits nor fails.
    fn failed(&self, failed: &FailedAttempt<'_>) -> Option<Box<dyn Report>>;
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
    /// The pause before the next attempt; `None` where there is none.
    pub(crate) pause: Option<Duration>,
}
