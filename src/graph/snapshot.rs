//! The wait graph at one moment.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::digraph::{Components, Digraph};
use super::{Backend, BackendId, Edge, LockTree};

/// The wait graph at one moment: the sessions that waited for a lock, their blockers, and an [`Edge`] for each pair of
/// waiter and blocker.
///
/// Cheap to clone.
///
/// # Consistency
///
/// The server cannot read all of it atomically. The query reads the lock table, calls `pg_blocking_pids` for each waiter,
/// and reads the lock table again. It keeps only waits that were there both times. So waits that began or ended meanwhile
/// are missing, and the waits that are kept existed at the same time: a [`Cycle`] is never composed of waits that did
/// not.
///
/// The activity is read separately. A backend can be [gone](Backend::is_gone), and its state can be some milliseconds
/// older or newer than its edges. The mode of a blocker is unknown if it took the lock, or queued for it, in between.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    inner: Arc<SnapshotData>,
}

#[derive(Debug, PartialEq)]
struct SnapshotData {
    /// Sorted by id.
    backends: Vec<Backend>,
    edges: Vec<Edge>,
    /// Waiters to blockers, by position in `backends`; the index of an edge is its position in `edges`.
    digraph: Digraph,
    components: Components,
    /// For each backend.
    longest_wait: Vec<Option<Duration>>,
    taken_at: SystemTime,
    duration: Duration,
}

/// A wait cycle: sessions that wait for one another, so that none of them can continue.
///
/// A cycle of hard edges only is a deadlock. The server ends it by failing one of the sessions when the longest wait
/// reaches `deadlock_timeout`. It may also end a cycle with a soft edge by letting a waiter overtake another in the queue.
#[derive(Clone, Debug, PartialEq)]
pub struct Cycle {
    edges: Vec<Edge>,
}

impl Snapshot {
    /// Made of any edges, for tests. Sessions that are only in edges are added as unknown.
    #[cfg(test)]
    pub(crate) fn new(
        mut backends: Vec<Backend>,
        edges: Vec<Edge>,
        taken_at: SystemTime,
        duration: Duration,
    ) -> Self {
        let mut known = std::collections::HashMap::new();
        backends.retain(|backend| known.insert(backend.id.clone(), 0).is_none());
        for edge in &edges {
            for id in [edge.waiter(), edge.blocker()] {
                if !known.contains_key(id) {
                    known.insert(id.clone(), 0);
                    backends.push(Backend::unknown(id.clone()));
                }
            }
        }
        backends.sort_by(|a, b| a.id.cmp(&b.id));
        for (at, backend) in backends.iter().enumerate() {
            known.insert(backend.id.clone(), at);
        }
        let links: Vec<_> = edges
            .iter()
            .map(|edge| (known[edge.waiter()], known[edge.blocker()]))
            .collect();
        Self::linked(backends, edges, links.iter().copied(), taken_at, duration)
    }

    /// Made of backends sorted by id, with the positions of the waiter and the blocker of each edge.
    pub(super) fn linked(
        backends: Vec<Backend>,
        edges: Vec<Edge>,
        links: impl Iterator<Item = (usize, usize)> + Clone,
        taken_at: SystemTime,
        duration: Duration,
    ) -> Self {
        let digraph = Digraph::new(backends.len(), links);
        let longest_wait = (0..digraph.len())
            .map(|node| {
                let outgoing = digraph.edges_from(node).iter();
                outgoing
                    .filter_map(|out| edges[out.index()].wait_age())
                    .max()
            })
            .collect();
        Self {
            inner: Arc::new(SnapshotData {
                components: digraph.components(),
                longest_wait,
                backends,
                edges,
                digraph,
                taken_at,
                duration,
            }),
        }
    }

    /// All waiters and blockers, by ascending process id, prepared transactions last.
    #[must_use]
    pub fn backends(&self) -> &[Backend] {
        &self.inner.backends
    }

    /// The backend with this id.
    #[must_use]
    pub fn backend(&self, id: &BackendId) -> Option<&Backend> {
        self.position(id).map(|at| &self.inner.backends[at])
    }

    /// Every pair of a waiter and one of its blockers.
    #[must_use]
    pub fn edges(&self) -> &[Edge] {
        &self.inner.edges
    }

    /// The edges to the blockers of a waiter; none for a session that does not wait.
    pub fn edges_of(&self, waiter: &BackendId) -> impl Iterator<Item = &Edge> {
        let outgoing = self
            .position(waiter)
            .map_or(&[][..], |at| self.inner.digraph.edges_from(at));
        outgoing.iter().map(|out| &self.inner.edges[out.index()])
    }

    /// The sessions that wait for a lock, longest wait first.
    #[must_use]
    pub fn waiters(&self) -> Vec<&Backend> {
        let waiting = |at: &usize| !self.inner.digraph.edges_from(*at).is_empty();
        let mut waiters: Vec<_> = (0..self.inner.backends.len()).filter(waiting).collect();
        waiters.sort_by_cached_key(|at| (std::cmp::Reverse(self.longest_wait(*at)), *at));
        waiters
            .into_iter()
            .map(|at| &self.inner.backends[at])
            .collect()
    }

    /// The root blockers: they block other sessions and wait for no lock themselves. A wait cycle may have none: see
    /// [`cycles`](Self::cycles).
    #[must_use]
    pub fn roots(&self) -> Vec<&Backend> {
        let digraph = &self.inner.digraph;
        let mut blocks = vec![false; digraph.len()];
        for node in 0..digraph.len() {
            for out in digraph.edges_from(node) {
                blocks[out.target()] = true;
            }
        }
        (0..digraph.len())
            .filter(|at| blocks[*at] && digraph.edges_from(*at).is_empty())
            .map(|at| &self.inner.backends[at])
            .collect()
    }

    /// The wait cycles: one shortest cycle per strongly connected component. It is made of hard edges where the component
    /// has such a cycle, and otherwise includes soft edges. A component with several separate groups of hard edges gives
    /// one cycle for each group.
    #[must_use]
    pub fn cycles(&self) -> Vec<Cycle> {
        let SnapshotData {
            digraph,
            components,
            ..
        } = &*self.inner;
        let sets = components.members.iter().enumerate();
        let cyclic: Vec<_> = sets
            .filter(|(_, members)| digraph.is_cyclic(members))
            .collect();
        if cyclic.is_empty() {
            return Vec::new();
        }
        let (hard, places) = self.hard_digraph();
        let hard_components = hard.components();
        let mut cycles = Vec::new();
        let mut in_deadlock = vec![false; digraph.len()];
        for (component, members) in hard_components.members.iter().enumerate() {
            if hard.is_cyclic(members) {
                let outgoing = hard.shortest_cycle(&hard_components, component);
                cycles.push(self.cycle(outgoing.into_iter().map(|out| places[out])));
                for member in members {
                    in_deadlock[*member] = true;
                }
            }
        }
        for (component, members) in cyclic {
            if !members.iter().any(|member| in_deadlock[*member]) {
                let outgoing = digraph.shortest_cycle(components, component);
                cycles.push(self.cycle(outgoing.into_iter()));
            }
        }
        cycles
    }

    /// How many sessions wait for this one, directly or through others.
    #[must_use]
    pub fn blocked_count(&self, id: &BackendId) -> usize {
        let counts = self.inner.digraph.reaching_counts(&self.inner.components);
        self.position(id).map_or(0, |at| counts[at])
    }

    /// The snapshot as a forest to display.
    #[must_use]
    pub fn tree(&self) -> LockTree {
        LockTree::new(self)
    }

    getters! {
        /// When the snapshot was taken, by the server's clock.
        taken_at: SystemTime = inner.taken_at;

        /// How long the snapshot took, from sending the query to its reply.
        duration: Duration = inner.duration;
    }

    /// Whether no session waited for a lock.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.edges.is_empty()
    }

    pub(super) fn digraph(&self) -> &Digraph {
        &self.inner.digraph
    }

    pub(super) fn components(&self) -> &Components {
        &self.inner.components
    }

    pub(super) fn longest_wait(&self, node: usize) -> Option<Duration> {
        self.inner.longest_wait[node]
    }

    /// The graph of the hard edges, with the position of each in `edges`.
    fn hard_digraph(&self) -> (Digraph, Vec<usize>) {
        let digraph = &self.inner.digraph;
        let mut links = Vec::new();
        let mut places = Vec::new();
        for node in 0..digraph.len() {
            for out in digraph.edges_from(node) {
                if !self.inner.edges[out.index()].is_soft() {
                    links.push((node, out.target()));
                    places.push(out.index());
                }
            }
        }
        (Digraph::new(digraph.len(), links.iter().copied()), places)
    }

    pub(super) fn position(&self, id: &BackendId) -> Option<usize> {
        self.inner
            .backends
            .binary_search_by(|backend| backend.id.cmp(id))
            .ok()
    }

    /// The cycle begins with the longest waiter, which the server's deadlock check finds first.
    fn cycle(&self, edges: impl Iterator<Item = usize>) -> Cycle {
        let mut edges: Vec<_> = edges.map(|at| self.inner.edges[at].clone()).collect();
        let rank = |edge: &Edge| (std::cmp::Reverse(edge.wait_age()), edge.waiter().clone());
        let first = (0..edges.len()).min_by_key(|at| rank(&edges[*at]));
        edges.rotate_left(first.unwrap_or(0));
        Cycle { edges }
    }
}

impl Cycle {
    /// The edges in order: the blocker of each is the waiter of the next, and the blocker of the last is the waiter of the
    /// first. The longest waiter comes first.
    #[must_use]
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// The sessions of the cycle, in the same order.
    pub fn members(&self) -> impl Iterator<Item = &BackendId> {
        self.edges.iter().map(Edge::waiter)
    }

    /// Whether it is a deadlock: every session waits for a lock that the next one holds.
    #[must_use]
    pub fn is_deadlock(&self) -> bool {
        self.edges.iter().all(|edge| !edge.is_soft())
    }
}

/// `pid 12 → pid 13 → pid 12`
impl fmt::Display for Cycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for member in self.members() {
            write!(f, "{member} → ")?;
        }
        match self.edges.first() {
            Some(first) => first.waiter().fmt(f),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::testing::{any_edges, described, hard, pids, snapshot, soft};
    use super::*;

    #[test]
    fn roots_block_and_do_not_wait() {
        let snapshot = snapshot(vec![hard(2, 1), soft(3, 2), hard(3, 1), hard(5, 4)]);
        assert_eq!(pids(snapshot.roots()), [1, 4]);
        assert_eq!(pids(snapshot.waiters()), [2, 3, 5]);
        assert_eq!(snapshot.blocked_count(&1.into()), 2);
        assert_eq!(snapshot.blocked_count(&2.into()), 1);
        assert_eq!(snapshot.blocked_count(&9.into()), 0);
        assert_eq!(snapshot.edges_of(&3.into()).count(), 2);
        assert_eq!(snapshot.edges_of(&1.into()).count(), 0);
        assert!(snapshot.backend(&5.into()).is_some_and(Backend::is_gone));
        assert_eq!(snapshot.backend(&9.into()), None);
    }

    #[test]
    fn cycles_of_hard_edges_come_before_those_over_a_queue() {
        // 1 and 2 are in a deadlock. 3 and 4 wait for them, and are in a cycle over a queue.
        let both = vec![
            hard(1, 2),
            hard(2, 1),
            soft(1, 2),
            hard(3, 4),
            soft(4, 3),
            hard(4, 1),
        ];
        let both = snapshot(both);
        let cycles = both.cycles();
        let shown: Vec<_> = cycles.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["pid 1 → pid 2 → pid 1", "pid 3 → pid 4 → pid 3"]);
        assert!(cycles[0].is_deadlock() && !cycles[1].is_deadlock());
        assert!(both.roots().is_empty());
    }

    #[test]
    fn backends_are_found_in_any_order() {
        let backends = [7, 3, 5, 3]
            .map(|pid| Backend::unknown(pid.into()))
            .to_vec();
        let snapshot = described(backends, vec![hard(5, 3)]);
        assert_eq!(pids(snapshot.backends()), [3, 5, 7]);
        assert_eq!(pids(snapshot.roots()), [3]);
    }

    /// Whether one session reaches another over at least one edge; `soft` allows soft edges.
    fn reaches(edges: &[Edge], from: &BackendId, to: &BackendId, soft: bool) -> bool {
        let mut seen = BTreeSet::new();
        let mut left = vec![from];
        while let Some(at) = left.pop() {
            for edge in edges {
                if edge.waiter() == at && (soft || !edge.is_soft()) && seen.insert(edge.blocker()) {
                    left.push(edge.blocker());
                }
            }
        }
        seen.contains(to)
    }

    proptest! {
        #[test]
        fn every_cycle_is_reported(edges in any_edges()) {
            let snapshot = snapshot(edges.clone());
            let cycles = snapshot.cycles();
            for cycle in &cycles {
                let edges = cycle.edges();
                for (at, edge) in edges.iter().enumerate() {
                    prop_assert_eq!(edge.blocker(), edges[(at + 1) % edges.len()].waiter());
                    prop_assert!(edges[0].wait_age() >= edge.wait_age());
                }
                let members: BTreeSet<_> = cycle.members().collect();
                prop_assert_eq!(members.len(), edges.len());
            }
            let together = |a: &BackendId, b: &BackendId, soft| {
                reaches(&edges, a, b, soft) && reaches(&edges, b, a, soft)
            };
            for backend in snapshot.backends() {
                let id = backend.id();
                // Each session in a deadlock has a deadlock of its own group, each session in a cycle has one of its group.
                for soft in [false, true] {
                    if reaches(&edges, id, id, soft) {
                        let reported = cycles.iter().any(|cycle| {
                            (soft || cycle.is_deadlock()) && cycle.members().all(|member| together(id, member, soft))
                        });
                        prop_assert!(reported, "{} is in a cycle that is not reported", id);
                    }
                }
                let expected = snapshot.backends().iter().filter(|other| {
                    other.id() != id && reaches(&edges, other.id(), id, true)
                });
                prop_assert_eq!(snapshot.blocked_count(id), expected.count());
            }
        }
    }
}
