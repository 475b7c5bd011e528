//! What has been found out about the servers behind a pool, so that it is asked once for each.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Servers remembered at most: they come and go with failovers.
const MOST: usize = 64;

/// Which of the server's lock functions a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LockScope {
    Transaction,
    Session,
}

#[derive(Debug, Default)]
pub(crate) struct Capabilities {
    /// Servers, by what tells them apart, whose locks were seen to lock.
    locking: Mutex<HashSet<(LockScope, Arc<str>)>>,
    /// Whether the pooler in front keeps one server session for each client.
    keeps_sessions: Mutex<Option<bool>>,
}

impl Capabilities {
    /// Whether the server's locks were seen to lock.
    pub(crate) fn locks(&self, scope: LockScope, server: &Arc<str>) -> bool {
        lock(&self.locking).contains(&(scope, Arc::clone(server)))
    }

    pub(crate) fn learn_locks(&self, scope: LockScope, server: &Arc<str>) {
        let mut locking = lock(&self.locking);
        if locking.len() >= MOST {
            locking.clear();
        }
        locking.insert((scope, Arc::clone(server)));
    }

    /// `None` while it is not known.
    pub(crate) fn keeps_sessions(&self) -> Option<bool> {
        *lock(&self.keeps_sessions)
    }

    pub(crate) fn learn_keeps_sessions(&self, keeps: bool) {
        *lock(&self.keeps_sessions) = Some(keeps);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
