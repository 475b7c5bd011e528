//! What has been found out about the servers behind a pool, each by itself, so that it is not asked in each call.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::connection::sql::server::Denied;

/// How long a finding counts: a pooler may be configured anew, a host name lead elsewhere, a right be granted.
pub(super) const AGE: Duration = if cfg!(test) {
    // The test of it waits for real servers.
    Duration::from_millis(500)
} else {
    Duration::from_secs(60)
};
/// Servers remembered at most: they come and go with failovers.
const MOST: usize = 16;

/// Which of the server's lock functions a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockScope {
    Transaction,
    Session,
}

#[derive(Debug, Default)]
pub(crate) struct Capabilities {
    /// By what tells one server from another.
    servers: Mutex<HashMap<Arc<str>, Findings>>,
    /// As the last server said that was asked for it.
    denied: Mutex<Denied>,
}

#[derive(Debug, Default)]
struct Findings {
    /// When the locks of each scope were seen to lock.
    locking: [Option<Instant>; 2],
    /// Whether the pooler in front of it keeps one server session for each client, and when that was found out.
    keeps_sessions: Option<(bool, Instant)>,
}

impl Findings {
    fn keeps_sessions(&self) -> Option<bool> {
        let (keeps, learnt) = self.keeps_sessions?;
        is_recent(learnt).then_some(keeps)
    }
}

impl Capabilities {
    /// Whether the server's locks were seen to lock.
    pub(crate) fn locks(&self, scope: LockScope, server: &str) -> bool {
        let servers = lock(&self.servers);
        let seen = servers
            .get(server)
            .and_then(|server| server.locking[scope as usize]);
        seen.is_some_and(is_recent)
    }

    pub(crate) fn learn_locks(&self, scope: LockScope, server: &Arc<str>) {
        self.learn(server, |found| {
            found.locking[scope as usize] = Some(Instant::now())
        });
    }

    /// Whether the pooler in front of a server keeps sessions; `None` while that is not known.
    pub(crate) fn keeps_sessions(&self, server: &str) -> Option<bool> {
        lock(&self.servers).get(server)?.keeps_sessions()
    }

    /// The same as it was found out last, however long ago.
    pub(crate) fn kept_sessions(&self, server: &str) -> Option<bool> {
        Some(lock(&self.servers).get(server)?.keeps_sessions?.0)
    }

    pub(crate) fn learn_keeps_sessions(&self, server: &Arc<str>, keeps: bool) {
        self.learn(server, |found| {
            found.keeps_sessions = Some((keeps, Instant::now()))
        });
    }

    /// The servers behind a pooler that keeps sessions.
    pub(crate) fn session_servers(&self) -> Vec<Arc<str>> {
        let servers = lock(&self.servers);
        let keeping = servers
            .iter()
            .filter(|(_, found)| found.keeps_sessions() == Some(true));
        keeping.map(|(server, _)| Arc::clone(server)).collect()
    }

    /// Whether every pooler that is known keeps sessions, or none does; `None` where neither is so.
    pub(crate) fn all_keep_sessions(&self) -> Option<bool> {
        let servers = lock(&self.servers);
        let mut known = servers.values().filter_map(Findings::keeps_sessions);
        let first = known.next()?;
        known.all(|keeps| keeps == first).then_some(first)
    }

    /// What the pool's role may not read.
    pub(super) fn denied(&self) -> Denied {
        *lock(&self.denied)
    }

    pub(super) fn learn_denied(&self, denied: Denied) {
        *lock(&self.denied) = denied;
    }

    fn learn(&self, server: &Arc<str>, finding: impl FnOnce(&mut Findings)) {
        let mut servers = lock(&self.servers);
        if servers.len() >= MOST && !servers.contains_key(server) {
            servers.clear();
        }
        finding(servers.entry(Arc::clone(server)).or_default());
    }
}

fn is_recent(learnt: Instant) -> bool {
    learnt.elapsed() < AGE
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn findings_are_of_one_server_and_grow_old() {
        let found = Capabilities::default();
        let (a, b): (Arc<str>, Arc<str>) = ("1".into(), "2".into());
        found.learn_locks(LockScope::Session, &a);
        assert!(found.locks(LockScope::Session, &a));
        assert!(!found.locks(LockScope::Session, &b) && !found.locks(LockScope::Transaction, &a));
        found.learn_keeps_sessions(&a, true);
        tokio::time::advance(AGE / 2).await;
        assert_eq!(found.all_keep_sessions(), Some(true));
        found.learn_keeps_sessions(&b, false);
        assert_eq!(found.keeps_sessions(&a), Some(true));
        assert_eq!(found.keeps_sessions(&b), Some(false));
        assert_eq!(found.session_servers(), [Arc::clone(&a)]);
        assert_eq!(found.all_keep_sessions(), None);
        tokio::time::advance(AGE / 2).await;
        assert!(!found.locks(LockScope::Session, &a));
        assert_eq!(found.keeps_sessions(&a), None);
        assert_eq!(found.kept_sessions(&a), Some(true));
        assert_eq!(found.all_keep_sessions(), Some(false));
        assert!(found.session_servers().is_empty());
        tokio::time::advance(AGE / 2).await;
        assert_eq!(found.all_keep_sessions(), None);
    }

    #[test]
    fn only_so_many_servers_are_remembered() {
        let found = Capabilities::default();
        for n in 0..10 * MOST {
            found.learn_locks(LockScope::Session, &n.to_string().into());
            assert!(lock(&found.servers).len() <= MOST);
        }
    }
}
