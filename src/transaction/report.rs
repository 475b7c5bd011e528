//! Telling somebody of failures, before they are retried.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use crate::incident::Incident;
use crate::session::Journal;

/// Who is told when a transaction has failed by a deadlock or a lock timeout.
pub(crate) trait Reporter: Send + Sync + fmt::Debug {
    /// Makes a report. It neither waits nor fails.
    fn failed(&self, failed: &Failed<'_>) -> Option<Incident>;
}

/// One failed attempt.
#[derive(Debug)]
pub(crate) struct Failed<'a> {
    /// The flight's number.
    pub(crate) number: u64,
    pub(crate) journal: &'a Arc<Journal>,
    pub(crate) error: &'a DbError,
    pub(crate) attempt: u32,
    pub(crate) attempts: u32,
    /// The pause before the next attempt; `None` where there is none.
    pub(crate) pause: Option<Duration>,
}
