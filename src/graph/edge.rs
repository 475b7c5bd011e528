//! One waiter and one of its blockers.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::mode::LockMode;

use super::{BackendId, LockObject, RowId};
use crate::postgres::timestamp::Age;

/// How one session blocks another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum EdgeKind {
    /// The blocker holds the lock in a mode that conflicts with the requested one.
    Hard,
    /// The blocker waits for the same lock ahead in the queue, in a mode that conflicts with the requested one.
    Soft,
}

/// One lock request that was not granted. All edges of one wait share it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wait {
    pub(crate) waiter: BackendId,
    /// The parallel worker of the waiter that waits.
    pub(crate) worker: Option<i32>,
    pub(crate) object: LockObject,
    pub(crate) row: Option<RowId>,
    pub(crate) mode: LockMode,
    pub(crate) since: Option<SystemTime>,
    pub(crate) age: Option<Duration>,
}

/// A session that waits for a lock, and one session (or prepared transaction) that blocks it.
///
/// A waiter has one edge for each of its blockers, and gets the lock only when none of them is left.
#[derive(Clone, Debug, PartialEq)]
pub struct Edge {
    pub(crate) wait: Arc<Wait>,
    pub(crate) blocker: BackendId,
    pub(crate) kind: EdgeKind,
    pub(crate) blocker_mode: Option<LockMode>,
}

impl Edge {
    getters! {
        /// The session that waits. For a parallel worker it is the leader of its query: see [`worker`](Self::worker).
        waiter: &BackendId = wait.waiter;

        /// The process id of the parallel worker of [`waiter`](Self::waiter) that waits.
        worker: Option<i32> = wait.worker;

        /// The session, or the prepared transaction, that blocks the waiter.
        blocker: &BackendId;

        /// The object that is locked.
        object: &LockObject = wait.object;
    }

    /// The row version that is locked. In a wait for a transaction it is the row for whose lock the waiter has queued;
    /// `None` if it has queued for no row, as with a unique key.
    #[must_use]
    pub fn row(&self) -> Option<&RowId> {
        self.wait.row.as_ref().or_else(|| self.wait.object.row())
    }

    /// The requested mode. PostgreSQL locks all kinds of objects in the table-level lock modes, with a meaning of its own
    /// for each kind: for row locks see [`RowLock::from_pg_locks`](crate::RowLock::from_pg_locks).
    #[must_use]
    pub fn mode_wanted(&self) -> LockMode {
        self.wait.mode
    }

    /// The mode that the blocker holds: the strongest one that conflicts. `None` for a soft edge, and if the blocker's lock
    /// was not in the lock table when it was read.
    #[must_use]
    pub fn mode_held(&self) -> Option<LockMode> {
        let hard = self.kind == EdgeKind::Hard;
        self.blocker_mode.filter(|_| hard)
    }

    /// The mode that the blocker itself waits for, ahead in the queue; only for a soft edge.
    #[must_use]
    pub fn mode_queued(&self) -> Option<LockMode> {
        let soft = self.kind == EdgeKind::Soft;
        self.blocker_mode.filter(|_| soft)
    }

    /// Whether the blocker holds the lock or is only ahead in its queue.
    #[must_use]
    pub fn kind(&self) -> EdgeKind {
        self.kind
    }

    /// Whether the blocker is only ahead in the lock's queue.
    #[must_use]
    pub fn is_soft(&self) -> bool {
        self.kind == EdgeKind::Soft
    }

    getters! {
        /// How long the waiter has waited for this lock (`pg_locks.waitstart`). `None` for a moment when a wait begins,
        /// while the server has not set that column.
        wait_age: Option<Duration> = wait.age;

        /// When the wait began, by the server's clock.
        waiting_since: Option<SystemTime> = wait.since;
    }
}

/// `pid 12 waits for ShareLock on transaction 733, held by pid 11 in ExclusiveLock`
impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} waits", self.waiter())?;
        if let Some(age) = self.wait_age() {
            write!(f, " {}", Age(age))?;
        }
        write!(f, " for {} on {}", self.mode_wanted(), self.object())?;
        if let (Some(row), None) = (self.row(), self.object().row()) {
            write!(f, " ({row})")?;
        }
        match (self.kind, self.blocker_mode) {
            (EdgeKind::Hard, Some(mode)) => write!(f, ", held by {} in {mode}", self.blocker),
            (EdgeKind::Hard, None) => write!(f, ", blocked by {}", self.blocker),
            (EdgeKind::Soft, Some(mode)) => {
                write!(f, ", queued behind {} which wants {mode}", self.blocker)
            }
            (EdgeKind::Soft, None) => write!(f, ", queued behind {}", self.blocker),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(kind: EdgeKind, mode: Option<LockMode>) -> Edge {
        Edge {
            wait: Arc::new(Wait {
                waiter: 12.into(),
                worker: None,
                object: LockObject::Transaction(733),
                row: None,
                mode: LockMode::Share,
                since: None,
                age: Some(Duration::from_millis(1500)),
            }),
            blocker: 11.into(),
            kind,
            blocker_mode: mode,
        }
    }

    #[test]
    fn display_is_one_line() {
        assert_eq!(
            edge(EdgeKind::Hard, Some(LockMode::Exclusive)).to_string(),
            "pid 12 waits 1.5s for ShareLock on transaction 733, held by pid 11 in ExclusiveLock"
        );
        assert_eq!(
            edge(EdgeKind::Soft, Some(LockMode::Exclusive)).to_string(),
            "pid 12 waits 1.5s for ShareLock on transaction 733, queued behind pid 11 which wants ExclusiveLock"
        );
    }

    #[test]
    fn a_queued_mode_is_not_a_held_one() {
        let soft = edge(EdgeKind::Soft, Some(LockMode::Exclusive));
        assert_eq!(
            (soft.mode_held(), soft.mode_queued()),
            (None, Some(LockMode::Exclusive))
        );
        let hard = edge(EdgeKind::Hard, Some(LockMode::Exclusive));
        assert_eq!(
            (hard.mode_held(), hard.mode_queued()),
            (Some(LockMode::Exclusive), None)
        );
    }
}
