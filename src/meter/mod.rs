//! What the locks and transactions of this process do, in numbers: for spans, and with the feature `metrics` for the
//! application's recorder.
//!
//! The names of the metrics are in the page `guide::numbers`. Labels are bounded: a namespace is one, a key's name
//! never is.

#[cfg(feature = "metrics")]
mod facade;
#[cfg(not(feature = "metrics"))]
mod silent;

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::key::LockKey;
pub(crate) use counts::{deadlocked, describe, discarded, retried};
#[cfg(feature = "metrics")]
use facade as counts;
#[cfg(not(feature = "metrics"))]
use silent as counts;

/// What `db.system.name` is, by OpenTelemetry's semantic conventions.
pub(crate) const SYSTEM: &str = "postgresql";

/// What `error.type` is for an error that is not this crate's, nor the server's.
pub(crate) const OTHER_ERROR: &str = "_OTHER";

/// What `error.type` is: the server's SQLSTATE, else the kind.
pub(crate) fn error_type(error: &Error) -> String {
    match error.sqlstate() {
        Some(sqlstate) => sqlstate.code().to_owned(),
        None => format!("{:?}", error.kind()),
    }
}

/// For a field of a span or an event.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A key's label; empty for a key without a namespace.
#[derive(Clone, Debug)]
pub(crate) struct Namespace(counts::Label);

impl Namespace {
    pub(crate) fn of(key: &LockKey) -> Self {
        Self(counts::label(key))
    }

    /// A call got its locks.
    pub(crate) fn acquired(&self, waited: Duration) {
        counts::acquired(&self.0, waited);
    }

    /// A call did not get them in time.
    pub(crate) fn timed_out(&self, waited: Duration) {
        counts::timed_out(&self.0, waited);
    }
}

/// Locks that are held together, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    namespace: Namespace,
    scope: &'static str,
    since: Instant,
}

impl Held {
    pub(crate) fn begin(key: &LockKey, scope: &'static str) -> Self {
        counts::held(scope);
        Self {
            namespace: Namespace::of(key),
            scope,
            since: Instant::now(),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        counts::held_until_now(&self.namespace.0, self.scope, self.since.elapsed());
    }
}

/// A call that waits for its locks, until this is dropped.
#[derive(Debug)]
pub(crate) struct Waiting(());

impl Waiting {
    pub(crate) fn begin() -> Self {
        counts::waits();
        Self(())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        counts::waits_no_more();
    }
}
