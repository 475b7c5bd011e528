//! A queue inside the process, before the server's own.
//!
//! A waiter at the server occupies a connection. Were all of a pool's connections to wait for one key, its holder could
//! not get another one for its own work, and nobody else either. So only a few waiters of one keeper stand in the
//! server's queue for a key; the others wait here, first come, first served, and cost no connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::deadline::Deadline;
use crate::key::{KeyId, LockKey};

/// How many of one keeper wait for one key at the server. More than one, so that while the first is being granted the
/// next is in the queue already.
const MAX_AT_SERVER: usize = 2;

/// The lines before the keys that somebody waits for. A set stands in the line of its first key only: that one it waits
/// for or holds, so whoever waits behind it here would wait for it at the server too. In the line of a later key it could
/// keep others from a key that is free, and so even the one who holds its first key.
#[derive(Debug, Default)]
pub(crate) struct ServerWaiterLimit {
    // Entries die with the last turn; the dead ones are swept when a line is made.
    lines: Mutex<HashMap<KeyId, Weak<Semaphore>>>,
}

/// The right to wait at the server. Dropping it lets the next one of the line go.
#[derive(Debug)]
pub(crate) struct Permit {
    _permit: OwnedSemaphorePermit,
}

impl ServerWaiterLimit {
    /// Whether somebody stands in line here before the keys: a newcomer has to go behind them.
    pub(crate) fn is_contended(&self, keys: &[LockKey]) -> bool {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        !lines.is_empty()
            && keys.first().is_some_and(|key| {
                lines
                    .get(&key.id())
                    .and_then(Weak::upgrade)
                    .is_some_and(|line| line.available_permits() == 0)
            })
    }

    /// A turn, if there is one at once.
    pub(crate) fn try_permit(&self, keys: &[LockKey]) -> Option<Permit> {
        let permit = self.line(keys)?.try_acquire_owned().ok()?;
        Some(Permit { _permit: permit })
    }

    /// A turn, or `None` at the deadline.
    ///
    /// Cancel safety: dropped, its place in the line is given up.
    pub(crate) async fn permit(&self, keys: &[LockKey], deadline: &Deadline) -> Option<Permit> {
        let line = self.line(keys)?;
        let permit = deadline
            .bound(Duration::ZERO, line.acquire_owned())
            .await?
            .ok()?;
        Some(Permit { _permit: permit })
    }

    fn line(&self, keys: &[LockKey]) -> Option<Arc<Semaphore>> {
        let id = keys.first()?.id();
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(&id).and_then(Weak::upgrade) {
            return Some(line);
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let line = Arc::new(Semaphore::new(MAX_AT_SERVER));
        lines.insert(id, Arc::downgrade(&line));
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_few_go_and_the_rest_wait_in_order() {
        let limit = ServerWaiterLimit::default();
        let keys = [LockKey::from(1)];
        assert!(!limit.is_contended(&keys));
        let turns: Vec<_> = (0..MAX_AT_SERVER)
            .map(|_| limit.try_permit(&keys))
            .collect();
        assert!(turns.iter().all(Option::is_some));
        assert!(limit.is_contended(&keys));
        assert!(limit.try_permit(&keys).is_none());
        assert!(limit.try_permit(&[LockKey::from(2)]).is_some());

        let soon = Deadline::after(Duration::from_millis(5));
        assert!(limit.permit(&keys, &soon).await.is_none());
        drop(turns);
        assert!(limit.permit(&keys, &soon).await.is_none() || limit.try_permit(&keys).is_some());
        assert!(!limit.is_contended(&keys));
    }

    #[tokio::test]
    async fn lines_nobody_stands_in_are_forgotten() {
        let limit = ServerWaiterLimit::default();
        for key in 0..1000 {
            drop(limit.try_permit(&[LockKey::from(key)]));
        }
        let left = limit
            .lines
            .lock()
            .map(|lines| lines.len())
            .unwrap_or_default();
        assert!(left <= 1, "{left} lines left");
    }
}
