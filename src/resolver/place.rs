//! Where somebody who was a root blocker stands later.

use std::time::SystemTime;

use super::log::StepOutcome;
use crate::graph::{Backend, BackendId, LockTree};

/// A session in one transaction, however many snapshots it is in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity(BackendId, Option<SystemTime>, Option<SystemTime>);

impl Identity {
    pub(super) fn of(backend: &Backend) -> Self {
        Self(
            backend.id().clone(),
            backend.backend_start(),
            backend.transaction_start(),
        )
    }
}

/// Where somebody who was a root blocker stands now.
pub(super) enum Place {
    Root(Box<Backend>),
    /// It is in the way still, and waits for somebody itself.
    Waits,
    /// It is in nobody's way.
    Out,
}

/// Where it stands in a tree.
pub(super) fn place(tree: &LockTree, who: &Identity) -> Place {
    let is_it = |backend: &Backend| Identity::of(backend) == *who;
    let root = tree.roots().find(|root| is_it(root.backend()));
    if let Some(root) = root
        && !root.is_in_cycle()
    {
        return Place::Root(Box::new(root.backend().clone()));
    }
    let snapshot = tree.snapshot();
    match snapshot.backend(&who.0) {
        Some(backend) if is_it(backend) && snapshot.blocked_count(&who.0) > 0 => Place::Waits,
        _ => Place::Out,
    }
}

/// What became of it, by where it stands after a step.
pub(super) fn fate(place: &Place) -> StepOutcome {
    match place {
        Place::Root(_) => StepOutcome::DidNotHelp,
        Place::Waits => StepOutcome::LeftAlone("it waits for another one now".into()),
        Place::Out => StepOutcome::Helped,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::monitor::testing::{backend, edge, snapshot};

    #[test]
    fn a_root_that_waits_itself_or_is_somebody_else() {
        let who = Identity::of(&backend(1));
        let with = |root: Backend, edges: Vec<(i32, i32)>| {
            let edges = edges.into_iter();
            let edges = edges.map(|(waiter, blocker)| edge(waiter, blocker, Duration::ZERO));
            fate(&place(&snapshot(vec![root], edges.collect()).tree(), &who))
        };
        let waits = StepOutcome::LeftAlone("it waits for another one now".into());
        assert_eq!(with(backend(1), vec![(2, 1)]), StepOutcome::DidNotHelp);
        assert_eq!(with(backend(1), vec![(2, 1), (1, 3)]), waits);
        assert_eq!(with(backend(1), vec![(2, 1), (1, 2)]), waits, "a circle");
        assert_eq!(with(backend(1), vec![(1, 3)]), StepOutcome::Helped);
        assert_eq!(with(backend(1), vec![]), StepOutcome::Helped);
        let mut next = backend(1);
        next.transaction_start = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(9));
        assert_eq!(with(next, vec![(2, 1)]), StepOutcome::Helped);
    }
}
