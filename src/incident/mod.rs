//! What happened and who was there: deadlocks, lock timeouts and long waits, explained.
//!
//! Pure: from [`Evidence`] to an [`Incident`], without I/O.
#![cfg_attr(
    not(test),
    expect(dead_code, reason = "for the watcher, which comes next")
)]

mod evidence;
mod row_key;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) use evidence::{Evidence, Journal, JournalEntry, Kind, Look, ServerError};
pub use row_key::RowKey;

/// A deadlock, a lock timeout or a long wait: what happened and who was there.
///
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Incident {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    evidence: Evidence,
}

/// What kind of incident it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum IncidentKind {
    /// The server broke a deadlock by failing the transaction.
    Deadlock,
    /// Sessions waited for one another in a circle, and a lock timeout ended it before the server looked.
    HiddenDeadlock,
    /// A lock was not granted in time.
    LockTimeout,
    /// A wait for a lock that has lasted long, and goes on.
    LongWait,
}

/// What became of the transaction that reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It is run once more.
    #[non_exhaustive]
    Retried {
        /// After this.
        pause: Duration,
    },
    /// It is not run again, since attempts, time or the budget for retries are used up.
    GaveUp,
    /// It is not run again, since this failure is not to be retried.
    NotRetried,
    /// It waits on.
    StillWaiting,
}

impl Outcome {
    /// It is run once more, after this pause.
    pub(crate) fn retried(pause: Duration) -> Self {
        Self::Retried { pause }
    }
}

/// The incidents that were there before, by what they have in common. Of bounded size.
#[derive(Debug, Default)]
pub(crate) struct History {}

impl Incident {
    pub(crate) fn new(evidence: Evidence, _history: &History) -> Self {
        Self {
            inner: Arc::new(Inner { evidence }),
        }
    }

    /// What kind of incident it is.
    #[must_use]
    pub fn kind(&self) -> IncidentKind {
        match self.inner.evidence.kind {
            Kind::Deadlock => IncidentKind::Deadlock,
            Kind::LockTimeout => IncidentKind::LockTimeout,
            Kind::LongWait => IncidentKind::LongWait,
        }
    }

    /// When it happened, by this process' clock.
    #[must_use]
    pub fn occurred(&self) -> SystemTime {
        self.inner.evidence.occurred
    }
}
