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
const AT_THE_SERVER: usize = 2;

/// The lines before the keys that somebody waits for. A set stands in the line of its first key only: that one it waits
/// for or holds, so whoever waits behind it here would wait for it at the server too. In the line of a later key it could
/// keep others from a key that is free, and so even the one who holds its first key.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    // Entries die with the last turn; the dead ones are swept when a line is made.
    lines: Mutex<HashMap<KeyId, Weak<Semaphore>>>,
}

/// The right to wait at the server. Dropping it lets the next one of the line go.
#[derive(Debug)]
pub(crate) struct Turn {
    _permit: OwnedSemaphorePermit,
}

impl Gate {
    /// Whether somebody stands in line here before the keys: a newcomer has to go behind them.
    pub(crate) fn is_crowded(&self, keys: &[LockKey]) -> bool {
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
    pub(crate) fn try_turn(&self, keys: &[LockKey]) -> Option<Turn> {
        let permit = self.line(keys)?.try_acquire_owned().ok()?;
        Some(Turn { _permit: permit })
    }

    /// A turn, or `None` at the deadline.
    ///
    /// Cancel safety: dropped, its place in the line is given up.
    pub(crate) async fn turn(&self, keys: &[LockKey], deadline: &Deadline) -> Option<Turn> {
        let line = self.line(keys)?;
        let permit = deadline
            .bound(Duration::ZERO, line.acquire_owned())
            .await?
            .ok()?;
        Some(Turn { _permit: permit })
    }

    fn line(&self, keys: &[LockKey]) -> Option<Arc<Semaphore>> {
        let id = keys.first()?.id();
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(&id).and_then(Weak::upgrade) {
            return Some(line);
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let line = Arc::new(Semaphore::new(AT_THE_SERVER));
        lines.insert(id, Arc::downgrade(&line));
        Some(line)
    }
}

#[cfg(test)]
mod tests {
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
