//! Whether a former root blocker still blocks others.

use std::time::SystemTime;

use super::log::StepOutcome;
use crate::graph::{Backend, BackendId, LockTree};

/// Identifies a session in one transaction across snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct TargetId(BackendId, Option<SystemTime>, Option<SystemTime>);

impl TargetId {
    pub(super) fn of(backend: &Backend) -> Self {
        Self(
            backend.id().clone(),
            backend.backend_start(),
            backend.transaction_start(),
        )
    }
}

/// The current status of a former root blocker.
pub(super) enum TargetStatus {
    RootBlocker(Box<Backend>),
    /// It still blocks others, and waits for a lock itself.
    Waiting,
    /// It blocks no other session.
    NotBlocking,
}

/// The status of the target in a tree.
pub(super) fn target_status(tree: &LockTree, target: &TargetId) -> TargetStatus {
    let is_target = |backend: &Backend| TargetId::of(backend) == *target;
    let root = tree.roots().find(|root| is_target(root.backend()));
    if let Some(root) = root
        && !root.is_in_cycle()
    {
        return TargetStatus::RootBlocker(Box::new(root.backend().clone()));
    }
    let snapshot = tree.snapshot();
    match snapshot.backend(&target.0) {
        Some(backend) if is_target(backend) && snapshot.blocked_count(&target.0) > 0 => {
            TargetStatus::Waiting
        }
        _ => TargetStatus::NotBlocking,
    }
}

/// The outcome of a step, given the target's status after it.
pub(super) fn step_outcome(status: &TargetStatus) -> StepOutcome {
    match status {
        TargetStatus::RootBlocker(_) => StepOutcome::DidNotHelp,
        TargetStatus::Waiting => StepOutcome::LeftAlone("it waits for another one now".into()),
        TargetStatus::NotBlocking => StepOutcome::Helped,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::monitor::testing::{backend, edge, snapshot};

    #[test]
    fn a_root_that_waits_itself_or_is_another_session() {
        let target = TargetId::of(&backend(1));
        let with = |root: Backend, edges: Vec<(i32, i32)>| {
            let edges = edges.into_iter();
            let edges = edges.map(|(waiter, blocker)| edge(waiter, blocker, Duration::ZERO));
            step_outcome(&target_status(
                &snapshot(vec![root], edges.collect()).tree(),
                &target,
            ))
        };
        let waits = StepOutcome::LeftAlone("it waits for another one now".into());
        assert_eq!(with(backend(1), vec![(2, 1)]), StepOutcome::DidNotHelp);
        assert_eq!(with(backend(1), vec![(2, 1), (1, 3)]), waits);
        assert_eq!(with(backend(1), vec![(2, 1), (1, 2)]), waits, "a cycle");
        assert_eq!(with(backend(1), vec![(1, 3)]), StepOutcome::Helped);
        assert_eq!(with(backend(1), vec![]), StepOutcome::Helped);
        let mut next = backend(1);
        next.transaction_start = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(9));
        assert_eq!(with(next, vec![(2, 1)]), StepOutcome::Helped);
    }
}
