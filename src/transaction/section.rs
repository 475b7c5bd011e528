//! What the sections hold in whose closures this task is at the moment.
//!
//! A lock that a section holds is held by its connection. Asked for again on another connection, it would be waited for
//! until the wait is over: the section waits for itself. The closure runs in a scope of its task, so this is known, and refused.
//! Two sections that one task polls in turn are not inside one another, and may wait for each other. A task that is spawned
//! in a closure is outside of it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::HeldLock;
use crate::call_site::CallSite;
use crate::connection::Connections;
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

tokio::task_local! {
    static INNERMOST: Arc<Section>;
}

/// The locks of one attempt of a section or a transaction.
pub(crate) struct Section {
    connections: Arc<Connections>,
    session: u64,
    call_site: Option<CallSite>,
    held: Mutex<Vec<(LockKey, AdvisoryMode)>>,
    outer: Option<Arc<Section>>,
}

impl Section {
    pub(super) fn new(
        connections: &Arc<Connections>,
        session: u64,
        call_site: Option<CallSite>,
        held: &[HeldLock],
    ) -> Arc<Self> {
        let section = Self {
            connections: Arc::clone(connections),
            session,
            call_site,
            held: Mutex::default(),
            outer: INNERMOST.try_with(Arc::clone).ok(),
        };
        section.note(held);
        Arc::new(section)
    }

    /// Notes what it holds now.
    pub(super) fn note(&self, held: &[HeldLock]) {
        let held = held.iter().map(|lock| (lock.key.clone(), lock.mode));
        *self.held() = held.collect();
    }

    /// Runs its closure. It is boxed, since its size would count several times in the futures of all callers. After that nothing is refused any more: what the closure has begun may outlive it.
    pub(super) fn scope<F: Future>(self: Arc<Self>, closure: F) -> impl Future<Output = F::Output> {
        INNERMOST.scope(self, Box::pin(closure))
    }

    pub(super) fn end(&self) {
        self.held().clear();
    }

    fn held(&self) -> MutexGuard<'_, Vec<(LockKey, AdvisoryMode)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Section")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

/// Refuses to wait for a lock that a section of this task holds on another connection than `session`.
///
/// # Errors
/// `AlreadyHeld`.
pub(crate) fn check_not_held(
    connections: &Arc<Connections>,
    session: Option<u64>,
    keys: &[LockKey],
    mode: AdvisoryMode,
    asked_for: impl FnOnce() -> String,
) -> Result<(), Error> {
    let mut section = INNERMOST.try_with(Arc::clone).ok();
    while let Some(inside) = section {
        let is_another =
            Arc::ptr_eq(&inside.connections, connections) && Some(inside.session) != session;
        let held = inside.held();
        let conflict = keys.iter().find(|key| {
            is_another
                && held
                    .iter()
                    .any(|(held, held_mode)| held.same_lock(key) && mode.conflicts_with(*held_mode))
        });
        if let Some(key) = conflict {
            return Err(Error::new(ErrorKind::AlreadyHeld)
                .with_key(key)
                .with_detail(format!(
                    "taken by the section{}, and asked for again{} on another connection, inside the closure of that section; use \
                     the closure's own transaction, whose advisory_lock takes it again",
                    inside.call_site.as_ref().map_or(String::new(), |site| format!(" at {site}")),
                    asked_for()
                )));
        }
        drop(held);
        section = inside.outer.clone();
    }
    Ok(())
}
