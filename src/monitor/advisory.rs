//! The holders and waiters of advisory locks.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use crate::connection;
use crate::graph::sql::LockSample;
use crate::graph::{Backend, BackendId, LockObject};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

/// A session or prepared transaction that holds an advisory lock or waits for it: a row of `pg_locks`.
///
/// A session lock that was taken several times is one row. A session lock and a transaction lock that one session holds
/// in one mode are one row too.
#[derive(Clone, Debug, PartialEq)]
pub struct AdvisoryLockEntry {
    key: LockKey,
    mode: AdvisoryMode,
    held: bool,
    wait_age: Option<Duration>,
    backend: Backend,
    guarded: bool,
}

impl AdvisoryLockEntry {
    getters! {
        /// The lock's key, with its name if this process has used it or the application has
        /// [given](super::Monitor::names) it.
        key: &LockKey;

        /// The mode it is held or requested in.
        mode: AdvisoryMode;

        /// Whether the lock is held; `false` for a waiter.
        is_held: bool = held;

        /// How long the session has waited for it; `None` for a holder.
        wait_age: Option<Duration>;

        /// The session that holds it or waits for it. Its `application_name` carries the call site if it uses this
        /// crate.
        backend: &Backend;
    }

    /// How long the session has been idle outside of any transaction; `None` if it is not idle, or if its state is
    /// hidden from the role.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        self.backend
            .state_age()
            .filter(|_| self.backend.state() == Some("idle"))
    }

    /// Whether a guard or transaction of this process that was alive during the query owns the session that holds the
    /// lock.
    ///
    /// Sessions are identified by process id, so it may also be true for a session of another server. It is never false
    /// for a live guard.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }
}

/// Documented at [`graph`](crate::graph#json).
#[cfg(feature = "serde")]
impl serde::Serialize for AdvisoryLockEntry {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;

        use crate::graph::json::{LockKeyJson, VERSION, millis};

        let mut document = serializer.serialize_struct("AdvisoryLockEntry", 8)?;
        document.serialize_field("version", &VERSION)?;
        document.serialize_field("advisory_key", &LockKeyJson::new(&self.key))?;
        document.serialize_field("mode", self.mode.as_pg_locks())?;
        document.serialize_field("held", &self.held)?;
        document.serialize_field("wait_age_ms", &self.wait_age.map(millis))?;
        document.serialize_field("idle_ms", &self.idle_for().map(millis))?;
        document.serialize_field("guarded", &self.guarded)?;
        document.serialize_field("backend", &self.backend)?;
        document.end()
    }
}

/// `"invoice:42" held in ExclusiveLock by pid 4711 (billing src/pay.rs:42, user app, idle for 3.2s)`
impl fmt::Display for AdvisoryLockEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.held { "held" } else { "wanted" };
        write!(
            f,
            "{} {what} in {} by {}",
            self.key, self.mode, self.backend
        )
    }
}

pub(super) fn entries(seen: LockSample) -> Vec<AdvisoryLockEntry> {
    let backends: HashMap<BackendId, Backend> = seen
        .backends
        .into_iter()
        .map(|backend| (backend.id().clone(), backend))
        .collect();
    let mut entries: Vec<_> = seen
        .locks
        .into_iter()
        .filter_map(|lock| {
            let LockObject::Advisory { key, .. } = lock.object else {
                return None;
            };
            let backend = backends.get(&lock.owner).cloned();
            Some(AdvisoryLockEntry {
                key,
                mode: AdvisoryMode::from_pg_locks(lock.mode.as_pg_locks())?,
                held: lock.granted,
                wait_age: lock
                    .since
                    .map(|since| seen.taken_at.duration_since(since).unwrap_or_default()),
                guarded: lock.owner.pid().is_some_and(connection::is_own_backend),
                backend: backend.unwrap_or_else(|| Backend::unknown(lock.owner)),
            })
        })
        .collect();
    entries.sort_by(|a, b| {
        let rank = |entry: &AdvisoryLockEntry| (!entry.held, std::cmp::Reverse(entry.wait_age));
        (a.key.cmp(&b.key))
            .then_with(|| rank(a).cmp(&rank(b)))
            .then_with(|| a.backend.id().cmp(b.backend.id()))
    });
    entries
}
