//! One session that waits, and one that is in its way.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::mode::LockMode;

use super::{BackendId, LockObject, RowId};
use crate::postgres::timestamp::Age;

/// How one session is in the way of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum EdgeKind {
    /// It holds the lock, in a mode that conflicts with the one wanted.
    Hard,
    /// It waits for the lock too, ahead in the queue, in a mode that conflicts with the one wanted.
    Soft,
}

/// One request for a lock that was not granted: what all edges of one wait have in common.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wait {
    pub(crate) waiter: BackendId,
    /// The parallel worker that waits in the name of the waiter.
    pub(crate) worker: Option<i32>,
    pub(crate) object: LockObject,
    pub(crate) row: Option<RowId>,
    pub(crate) mode: LockMode,
    pub(crate) since: Option<SystemTime>,
    pub(crate) age: Option<Duration>,
}

/// A session that waits for a lock, and one session (or prepared transaction) that is in its way.
///
/// A waiter has an edge for each of those in its way, and goes on only when none of them is left.
#[derive(Clone, Debug, PartialEq)]
pub struct Edge {
    pub(crate) wait: Arc<Wait>,
    pub(crate) blocker: BackendId,
    pub(crate) kind: EdgeKind,
    pub(crate) blocker_mode: Option<LockMode>,
}

impl Edge {
    /// Who waits. For a parallel worker it is the leader of its query: see [`worker`](Self::worker).
    #[must_use]
    pub fn waiter(&self) -> &BackendId {
        &self.wait.waiter
    }

    /// The parallel worker that waits in the name of [`waiter`](Self::waiter), by its process id.
    #[must_use]
    pub fn worker(&self) -> Option<i32> {
        self.wait.worker
    }

    /// Who is in its way.
    #[must_use]
    pub fn blocker(&self) -> &BackendId {
        &self.blocker
    }

    /// What the lock is on.
    #[must_use]
    pub fn object(&self) -> &LockObject {
        &self.wait.object
    }

    /// The row version in dispute. For a wait for a transaction it is the row whose lock the waiter has lined up for;
    /// `None` where it has lined up for none, as for a unique key.
    #[must_use]
    pub fn row(&self) -> Option<&RowId> {
        self.wait.row.as_ref().or_else(|| self.wait.object.row())
    }

    /// The mode that is waited for. All kinds of objects are locked in the modes of tables, whatever they mean there: for
    /// row locks see [`RowLock::from_pg_locks`](crate::RowLock::from_pg_locks).
    #[must_use]
    pub fn mode_wanted(&self) -> LockMode {
        self.wait.mode
    }

    /// The mode the blocker holds: the strongest of those in conflict. `None` for a soft edge, and where the lock was not to be
    /// seen in the moment it was looked for.
    #[must_use]
    pub fn mode_held(&self) -> Option<LockMode> {
        let hard = self.kind == EdgeKind::Hard;
        self.blocker_mode.filter(|_| hard)
    }

    /// The mode the blocker itself waits for, ahead in the queue; only for a soft edge.
    #[must_use]
    pub fn mode_queued(&self) -> Option<LockMode> {
        let soft = self.kind == EdgeKind::Soft;
        self.blocker_mode.filter(|_| soft)
    }

    /// Whether the blocker holds the lock or only stands ahead in its queue.
    #[must_use]
    pub fn kind(&self) -> EdgeKind {
        self.kind
    }

    /// Whether the blocker only stands ahead in the lock's queue.
    #[must_use]
    pub fn is_soft(&self) -> bool {
        self.kind == EdgeKind::Soft
    }

    /// For how long the waiter has waited for this lock (`pg_locks.waitstart`). `None` in the instant in which a wait
    /// begins.
    #[must_use]
    pub fn wait_age(&self) -> Option<Duration> {
        self.wait.age
    }

    /// When the wait began, by the server's clock.
    #[must_use]
    pub fn waiting_since(&self) -> Option<SystemTime> {
        self.wait.since
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
    fn one_line_for_people() {
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
