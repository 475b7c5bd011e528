//! One look at who waits for whom.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::net::{Components, Net};
use super::{Backend, BackendId, Edge, LockTree};

/// Who waited for whom in one moment: the sessions that waited for a lock, those in their way, and an [`Edge`] for
/// each pair of them.
///
/// Cheap to clone.
///
/// # What can be torn in it
///
/// The server has no one moment for all of it. The lock table is read; waiter by waiter `pg_blocking_pids` says who is in
/// its way; the lock table is read once more, and only those waits are kept that lasted from before to after. So waits
/// that began or ended meanwhile are missing, and those that are there were there together: a [`Cycle`] is never put
/// together from waits that were not.
///
/// The activity is read beside that. A backend can be [gone](Backend::is_gone), and its state some milliseconds older
/// or younger than its edges. The mode of a blocker can be unknown that took, or queued for, the lock in between.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    inner: Arc<Inner>,
}

#[derive(Debug, PartialEq)]
struct Inner {
    /// Sorted by their id.
    backends: Vec<Backend>,
    edges: Vec<Edge>,
    /// Waiters to blockers, by their place in `backends`; arcs have the place of their edge in `edges`.
    net: Net,
    components: Components,
    /// Of each backend.
    longest_wait: Vec<Option<Duration>>,
    taken_at: SystemTime,
    took: Duration,
}

/// Sessions that wait for one another in a circle, so that none of them can go on.
///
/// With hard edges only it is a deadlock, which the server ends by failing one of them when the longest wait reaches
/// `deadlock_timeout`. One with a soft edge it may also end by letting a waiter overtake another in the queue.
#[derive(Clone, Debug, PartialEq)]
pub struct Cycle {
    edges: Vec<Edge>,
}

impl Snapshot {
    /// From any edges, for tests. Sessions that edges name and nobody described are added as unknown.
    #[cfg(test)]
    pub(crate) fn new(
        mut backends: Vec<Backend>,
        edges: Vec<Edge>,
        taken_at: SystemTime,
        took: Duration,
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
        Self::linked(backends, edges, links.iter().copied(), taken_at, took)
    }

    /// Of backends sorted by their id, and the places of waiter and blocker of each edge among them.
    pub(super) fn linked(
        backends: Vec<Backend>,
        edges: Vec<Edge>,
        links: impl Iterator<Item = (usize, usize)> + Clone,
        taken_at: SystemTime,
        took: Duration,
    ) -> Self {
        let net = Net::new(backends.len(), links);
        let longest_wait = (0..net.len())
            .map(|node| {
                let arcs = net.arcs(node).iter();
                arcs.filter_map(|arc| edges[arc.edge()].wait_age()).max()
            })
            .collect();
        Self {
            inner: Arc::new(Inner {
                components: net.components(),
                longest_wait,
                backends,
                edges,
                net,
                taken_at,
                took,
            }),
        }
    }

    /// Everybody who takes part, waiting or in the way, by ascending process id, prepared transactions last.
    #[must_use]
    pub fn backends(&self) -> &[Backend] {
        &self.inner.backends
    }

    /// One of them.
    #[must_use]
    pub fn backend(&self, id: &BackendId) -> Option<&Backend> {
        self.place(id).map(|at| &self.inner.backends[at])
    }

    /// Every pair of a waiter and one who is in its way.
    #[must_use]
    pub fn edges(&self) -> &[Edge] {
        &self.inner.edges
    }

    /// Who is in the way of one waiter; nothing for those who do not wait.
    pub fn edges_of(&self, waiter: &BackendId) -> impl Iterator<Item = &Edge> {
        let arcs = self
            .place(waiter)
            .map_or(&[][..], |at| self.inner.net.arcs(at));
        arcs.iter().map(|arc| &self.inner.edges[arc.edge()])
    }

    /// Those who wait for a lock, longest wait first.
    #[must_use]
    pub fn waiters(&self) -> Vec<&Backend> {
        let waiting = |at: &usize| !self.inner.net.arcs(*at).is_empty();
        let mut waiters: Vec<_> = (0..self.inner.backends.len()).filter(waiting).collect();
        waiters.sort_by_cached_key(|at| (std::cmp::Reverse(self.longest_wait(*at)), *at));
        waiters
            .into_iter()
            .map(|at| &self.inner.backends[at])
            .collect()
    }

    /// The root blockers: in the way of others, while they wait for no lock themselves. Where sessions wait in a circle
    /// there may be none: see [`cycles`](Self::cycles).
    #[must_use]
    pub fn roots(&self) -> Vec<&Backend> {
        let net = &self.inner.net;
        let mut blocks = vec![false; net.len()];
        for node in 0..net.len() {
            for arc in net.arcs(node) {
                blocks[arc.to()] = true;
            }
        }
        (0..net.len())
            .filter(|at| blocks[*at] && net.arcs(*at).is_empty())
            .map(|at| &self.inner.backends[at])
            .collect()
    }

    /// Sessions that wait for one another in circles. Of those that are all in each other's way a shortest circle is
    /// given: one of hard edges for each group that hard edges make, else one with soft edges.
    #[must_use]
    pub fn cycles(&self) -> Vec<Cycle> {
        let Inner {
            net, components, ..
        } = &*self.inner;
        let sets = components.members.iter().enumerate();
        let cyclic: Vec<_> = sets.filter(|(_, members)| net.is_cyclic(members)).collect();
        if cyclic.is_empty() {
            return Vec::new();
        }
        let (hard, places) = self.hard_net();
        let hard_components = hard.components();
        let mut cycles = Vec::new();
        let mut in_deadlock = vec![false; net.len()];
        for (set, members) in hard_components.members.iter().enumerate() {
            if hard.is_cyclic(members) {
                let arcs = hard.shortest_cycle(&hard_components, set);
                cycles.push(self.cycle(arcs.into_iter().map(|arc| places[arc])));
                for member in members {
                    in_deadlock[*member] = true;
                }
            }
        }
        for (set, members) in cyclic {
            if !members.iter().any(|member| in_deadlock[*member]) {
                let arcs = net.shortest_cycle(components, set);
                cycles.push(self.cycle(arcs.into_iter()));
            }
        }
        cycles
    }

    /// How many sessions could not go on before this one does: those who wait for it, and those who wait for these.
    #[must_use]
    pub fn blocked_by(&self, id: &BackendId) -> usize {
        let counts = self.inner.net.reached_from(&self.inner.components);
        self.place(id).map_or(0, |at| counts[at])
    }

    /// The same arranged for people.
    #[must_use]
    pub fn tree(&self) -> LockTree {
        LockTree::new(self)
    }

    /// When it was taken, by the server's clock.
    #[must_use]
    pub fn taken_at(&self) -> SystemTime {
        self.inner.taken_at
    }

    /// How long it took, from the question to the answer.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.inner.took
    }

    /// Whether nobody waited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.edges.is_empty()
    }

    pub(super) fn net(&self) -> &Net {
        &self.inner.net
    }

    pub(super) fn components(&self) -> &Components {
        &self.inner.components
    }

    pub(super) fn longest_wait(&self, node: usize) -> Option<Duration> {
        self.inner.longest_wait[node]
    }

    /// The graph of the hard edges, with the place of each in `edges`.
    fn hard_net(&self) -> (Net, Vec<usize>) {
        let net = &self.inner.net;
        let mut links = Vec::new();
        let mut places = Vec::new();
        for node in 0..net.len() {
            for arc in net.arcs(node) {
                if !self.inner.edges[arc.edge()].is_soft() {
                    links.push((node, arc.to()));
                    places.push(arc.edge());
                }
            }
        }
        (Net::new(net.len(), links.iter().copied()), places)
    }

    pub(super) fn place(&self, id: &BackendId) -> Option<usize> {
        self.inner
            .backends
            .binary_search_by(|backend| backend.id.cmp(id))
            .ok()
    }

    /// Beginning with the one who has waited longest, whom the server's deadlock check finds first.
    fn cycle(&self, edges: impl Iterator<Item = usize>) -> Cycle {
        let mut edges: Vec<_> = edges.map(|at| self.inner.edges[at].clone()).collect();
        let rank = |edge: &Edge| (std::cmp::Reverse(edge.wait_age()), edge.waiter().clone());
        let first = (0..edges.len()).min_by_key(|at| rank(&edges[*at]));
        edges.rotate_left(first.unwrap_or(0));
        Cycle { edges }
    }
}

impl Cycle {
    /// The edges in order: the blocker of each is the waiter of the next, and that of the last the waiter of the first.
    /// The one who has waited longest comes first.
    #[must_use]
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// Those who wait for one another, in the same order.
    pub fn members(&self) -> impl Iterator<Item = &BackendId> {
        self.edges.iter().map(Edge::waiter)
    }

    /// Whether every one of them waits for a lock that the next one holds: a deadlock.
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
    fn roots_wait_for_nobody() {
        let snapshot = snapshot(vec![hard(2, 1), soft(3, 2), hard(3, 1), hard(5, 4)]);
        assert_eq!(pids(snapshot.roots()), [1, 4]);
        assert_eq!(pids(snapshot.waiters()), [2, 3, 5]);
        assert_eq!(snapshot.blocked_by(&1.into()), 2);
        assert_eq!(snapshot.blocked_by(&2.into()), 1);
        assert_eq!(snapshot.blocked_by(&9.into()), 0);
        assert_eq!(snapshot.edges_of(&3.into()).count(), 2);
        assert_eq!(snapshot.edges_of(&1.into()).count(), 0);
        assert!(snapshot.backend(&5.into()).is_some_and(Backend::is_gone));
        assert_eq!(snapshot.backend(&9.into()), None);
    }

    #[test]
    fn cycles_of_hard_edges_come_before_those_over_a_queue() {
        // 1 and 2 are in a deadlock; 3 and 4, who wait for them, in a circle over a queue.
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
    fn backends_are_found_whatever_their_order() {
        let backends = [7, 3, 5, 3]
            .map(|pid| Backend::unknown(pid.into()))
            .to_vec();
        let snapshot = described(backends, vec![hard(5, 3)]);
        assert_eq!(pids(snapshot.backends()), [3, 5, 7]);
        assert_eq!(pids(snapshot.roots()), [3]);
    }

    /// Whether one session reaches another over edges that are allowed, by at least one of them.
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
        fn every_cycle_is_told_of(edges in any_edges()) {
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
                // Who is in a deadlock sees one of its own group, who is in any circle one of that group.
                for soft in [false, true] {
                    if reaches(&edges, id, id, soft) {
                        let told = cycles.iter().any(|cycle| {
                            (soft || cycle.is_deadlock()) && cycle.members().all(|member| together(id, member, soft))
                        });
                        prop_assert!(told, "{} is in a circle that is not told of", id);
                    }
                }
                let expected = snapshot.backends().iter().filter(|other| {
                    other.id() != id && reaches(&edges, other.id(), id, true)
                });
                prop_assert_eq!(snapshot.blocked_by(id), expected.count());
            }
        }
    }
}
