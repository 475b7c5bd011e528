//! A queue inside the process, before the server's own.
//!
//! A waiter at the server occupies a connection. Were all of a pool's connections to wait for one key, its holder could
//! not get another one for its own work, and nobody else either. So only a few waiters of one keeper stand in the
//! server's queue for a key; the others wait here, first come, first served, and cost no connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::deadline::Deadline;
use crate::key::{KeyId, LockKey};

/// How many of one keeper wait for one key at the server. More than one, so that while the first is being granted the
/// next is in the queue already.
const AT_THE_SERVER: usize = 2;

/// The lines before the keys that somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    // Entries die with the last turn; the dead ones are swept when a line is made.
    lines: Mutex<HashMap<KeyId, Weak<Semaphore>>>,
}

/// The right to wait at the server for some keys. Dropping it lets the next one of each line go.
#[derive(Debug)]
pub(crate) struct Turn {
    _permits: Vec<OwnedSemaphorePermit>,
}

impl Gate {
    /// Whether somebody stands in line here for one of the keys: a newcomer has to go behind them.
    pub(crate) fn is_crowded(&self, keys: &[LockKey]) -> bool {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        !lines.is_empty()
            && keys.iter().any(|key| {
                lines
                    .get(&key.id())
                    .and_then(Weak::upgrade)
                    .is_some_and(|line| line.available_permits() == 0)
            })
    }

    /// A turn, if there is one at once.
    pub(crate) fn try_turn(&self, keys: &[LockKey]) -> Option<Turn> {
        let permits = self
            .lines(keys)
            .map(|line| line.try_acquire_owned().ok())
            .collect::<Option<Vec<_>>>()?;
        Some(Turn { _permits: permits })
    }

    /// A turn, or `None` at the deadline.
    ///
    /// Cancel safety: dropped, its place in the line is given up.
    pub(crate) async fn turn(&self, keys: &[LockKey], deadline: &Deadline) -> Option<Turn> {
        let mut permits = Vec::with_capacity(keys.len());
        // In the order of the keys, so that two sets never wait here for each other.
        for line in self.lines(keys).collect::<Vec<_>>() {
            let permit = deadline
                .bound(std::time::Duration::ZERO, line.acquire_owned())
                .await?
                .ok()?;
            permits.push(permit);
        }
        Some(Turn { _permits: permits })
    }

    fn lines<'a>(&'a self, keys: &'a [LockKey]) -> impl Iterator<Item = Arc<Semaphore>> + 'a {
        keys.iter().map(|key| {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(line) = lines.get(&key.id()).and_then(Weak::upgrade) {
                return line;
            }
            lines.retain(|_, line| line.strong_count() > 0);
            let line = Arc::new(Semaphore::new(AT_THE_SERVER));
            lines.insert(key.id(), Arc::downgrade(&line));
            line
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_few_go_and_the_rest_wait_in_order() {
        let gate = Gate::default();
        let keys = [LockKey::from(1)];
        assert!(!gate.is_crowded(&keys));
        let turns: Vec<_> = (0..AT_THE_SERVER).map(|_| gate.try_turn(&keys)).collect();
        assert!(turns.iter().all(Option::is_some));
        assert!(gate.is_crowded(&keys));
        assert!(gate.try_turn(&keys).is_none());
        assert!(gate.try_turn(&[LockKey::from(2)]).is_some());

        let soon = Deadline::after(Duration::from_millis(5));
        assert!(gate.turn(&keys, &soon).await.is_none());
        drop(turns);
        assert!(gate.turn(&keys, &soon).await.is_none() || gate.try_turn(&keys).is_some());
        assert!(!gate.is_crowded(&keys));
    }

    #[tokio::test]
    async fn lines_nobody_stands_in_are_forgotten() {
        let gate = Gate::default();
        for key in 0..1000 {
            drop(gate.try_turn(&[LockKey::from(key)]));
        }
        let left = gate
            .lines
            .lock()
            .map(|lines| lines.len())
            .unwrap_or_default();
        assert!(left <= 1, "{left} lines left");
    }
}
