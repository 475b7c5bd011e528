//! The graph arranged for people: a forest, root blockers first.

use std::cmp::Reverse;

use super::net::{Arc, Components, Net};
use super::{Backend, Cycle, Edge, Snapshot};

/// Who waits for whom as a forest: at the roots those who are in the way and wait for nobody themselves, below each of
/// them those it keeps waiting.
///
/// Every session of the [`Snapshot`] is in it once. A waiter stands below its principal blocker (one that holds the lock
/// before one that only queues ahead, then the one that keeps most others waiting); who else is in its way, its node
/// [refers to](TreeNode::other_edges). Of sessions that wait in a circle, the one who has waited longest stands above the others.
///
/// `Display` draws it for a terminal, statements without their literals; [`to_html`](Self::to_html),
/// [`to_mermaid`](Self::to_mermaid) and [`to_dot`](Self::to_dot) for others.
#[derive(Clone, Debug, PartialEq)]
pub struct LockTree {
    snapshot: Snapshot,
    cycles: Vec<Cycle>,
    /// Of each backend of the snapshot, the edge to the one above it.
    above: Vec<Option<usize>>,
    below: Vec<Vec<usize>>,
    blocks: Vec<usize>,
    in_circle: Vec<bool>,
    roots: Vec<usize>,
}

/// A session, or a prepared transaction, at its place in a [`LockTree`].
#[derive(Clone, Copy, Debug)]
pub struct TreeNode<'a> {
    tree: &'a LockTree,
    at: usize,
}

impl LockTree {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let net = snapshot.net();
        let components = snapshot.components();
        let blocks = net.reached_from(components);
        let arranger = Arranger {
            snapshot,
            net,
            components,
            blocks: &blocks,
        };
        let mut tree = Self {
            cycles: snapshot.cycles(),
            above: vec![None; net.len()],
            below: vec![Vec::new(); net.len()],
            in_circle: vec![false; net.len()],
            roots: Vec::new(),
            snapshot: snapshot.clone(),
            blocks: Vec::new(),
        };
        let mut place = |node: usize, arc: Option<Arc>| match arc {
            Some(arc) => {
                tree.above[node] = Some(arc.edge());
                tree.below[arc.to()].push(node);
            }
            None => tree.roots.push(node),
        };
        for (set, members) in components.members.iter().enumerate() {
            if net.is_cyclic(members) {
                for member in members {
                    tree.in_circle[*member] = true;
                }
                arranger.circle(set, &mut place);
            } else {
                let node = members[0];
                // Those whom nobody waits for, and who wait for nobody, take no part: leaders and workers of others.
                if blocks[node] > 0 || !net.arcs(node).is_empty() {
                    place(node, arranger.best(node, |_| true));
                }
            }
        }
        let rank = |node: &usize| {
            (
                Reverse(blocks[*node]),
                Reverse(snapshot.longest_wait(*node)),
                *node,
            )
        };
        tree.roots.sort_by_cached_key(rank);
        for below in &mut tree.below {
            below.sort_by_cached_key(rank);
        }
        tree.blocks = blocks;
        tree
    }

    /// What stands above all others: first the one that keeps most sessions waiting.
    pub fn roots(&self) -> impl Iterator<Item = TreeNode<'_>> {
        self.roots.iter().map(|at| TreeNode {
            tree: self,
            at: *at,
        })
    }

    /// Every node with its depth, each before those below it.
    pub fn walk(&self) -> impl Iterator<Item = (usize, TreeNode<'_>)> {
        let mut left: Vec<_> = self.roots.iter().rev().map(|at| (0, *at)).collect();
        std::iter::from_fn(move || {
            let (depth, at) = left.pop()?;
            left.extend(self.below[at].iter().rev().map(|below| (depth + 1, *below)));
            Some((depth, TreeNode { tree: self, at }))
        })
    }

    /// Sessions that wait for one another in circles; see [`Snapshot::cycles`].
    #[must_use]
    pub fn cycles(&self) -> &[Cycle] {
        &self.cycles
    }

    /// What it was made from.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The roots, and of each backend of the snapshot those below it.
    #[cfg(feature = "pictures")]
    pub(super) fn forest(&self) -> (&[usize], &[Vec<usize>]) {
        (&self.roots, &self.below)
    }

    #[cfg(feature = "pictures")]
    pub(super) fn node(&self, at: usize) -> TreeNode<'_> {
        TreeNode { tree: self, at }
    }

    /// Whether nobody waited.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.snapshot.is_empty()
    }
}

impl<'a> TreeNode<'a> {
    /// Who stands here.
    #[must_use]
    pub fn backend(&self) -> &'a Backend {
        &self.tree.snapshot.backends()[self.at]
    }

    /// What it waits for from the one above it; `None` at a root.
    #[must_use]
    pub fn edge(&self) -> Option<&'a Edge> {
        self.tree.above[self.at].map(|edge| &self.tree.snapshot.edges()[edge])
    }

    /// Who else is in its way.
    pub fn other_edges(&self) -> impl Iterator<Item = &'a Edge> + use<'a> {
        let tree = self.tree;
        let above = tree.above[self.at];
        let arcs = tree.snapshot.net().arcs(self.at).iter();
        arcs.filter(move |arc| Some(arc.edge()) != above)
            .map(|arc| &tree.snapshot.edges()[arc.edge()])
    }

    /// Those whose principal blocker it is: first the one that keeps most others waiting.
    pub fn children(&self) -> impl Iterator<Item = TreeNode<'a>> + use<'a> {
        let tree = self.tree;
        tree.below[self.at]
            .iter()
            .map(|at| TreeNode { tree, at: *at })
    }

    /// Its place among the snapshot's backends.
    #[cfg(any(feature = "pictures", feature = "serde"))]
    pub(super) fn place(&self) -> usize {
        self.at
    }

    /// How many sessions could not go on before this one does, wherever they stand; see [`Snapshot::blocked_by`].
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.tree.blocks[self.at]
    }

    /// Whether it waits for itself, over others.
    #[must_use]
    pub fn is_in_cycle(&self) -> bool {
        self.tree.in_circle[self.at]
    }

    /// The parallel workers that wait in its name, by their process ids.
    #[must_use]
    pub fn workers(&self) -> Vec<i32> {
        let arcs = self.tree.snapshot.net().arcs(self.at).iter();
        let mut workers: Vec<_> = arcs
            .filter_map(|arc| self.tree.snapshot.edges()[arc.edge()].worker())
            .collect();
        workers.sort_unstable();
        workers.dedup();
        workers
    }
}

/// Chooses for each waiter the one it stands below.
struct Arranger<'a> {
    snapshot: &'a Snapshot,
    net: &'a Net,
    components: &'a Components,
    blocks: &'a [usize],
}

impl Arranger<'_> {
    fn is_soft(&self, arc: Arc) -> bool {
        self.snapshot.edges()[arc.edge()].is_soft()
    }

    /// The principal blocker among those that `allowed` allows.
    fn best(&self, node: usize, allowed: impl Fn(&Arc) -> bool) -> Option<Arc> {
        let arcs = self.net.arcs(node).iter().copied().filter(allowed);
        arcs.min_by_key(|arc| {
            let blocker = &self.snapshot.backends()[arc.to()];
            let age = blocker.in_transaction();
            (
                self.is_soft(*arc),
                Reverse(self.blocks[arc.to()]),
                Reverse(age),
                arc.to(),
            )
        })
    }

    /// Places the members of a set in which everybody waits for everybody: the one who has waited longest first, and
    /// each of the others below one placed before it, by a hard edge if there is one.
    fn circle(&self, set: usize, place: &mut impl FnMut(usize, Option<Arc>)) {
        let members = &self.components.members[set];
        let rank = |node: &&usize| (Reverse(self.snapshot.longest_wait(**node)), **node);
        let Some(&head) = members.iter().min_by_key(rank) else {
            return;
        };
        place(
            head,
            self.best(head, |arc| self.components.of[arc.to()] != set),
        );
        // Who waits for each member, within the set.
        let place_of: std::collections::HashMap<usize, usize> = members
            .iter()
            .enumerate()
            .map(|(at, node)| (*node, at))
            .collect();
        let mut waiting: Vec<Vec<(usize, Arc)>> = vec![Vec::new(); members.len()];
        for &node in members {
            for arc in self.net.arcs(node) {
                if self.components.of[arc.to()] == set {
                    waiting[place_of[&arc.to()]].push((node, *arc));
                }
            }
        }
        let mut placed = vec![false; members.len()];
        placed[place_of[&head]] = true;
        let mut hard = std::collections::VecDeque::from([head]);
        let mut soft = std::collections::VecDeque::new();
        // All are reached: the set is strongly connected.
        while let Some(above) = hard.pop_front() {
            for &(node, arc) in &waiting[place_of[&above]] {
                if self.is_soft(arc) {
                    soft.push_back((node, arc));
                } else if !std::mem::replace(&mut placed[place_of[&node]], true) {
                    place(node, Some(arc));
                    hard.push_back(node);
                }
            }
            while hard.is_empty()
                && let Some((node, arc)) = soft.pop_front()
            {
                if !std::mem::replace(&mut placed[place_of[&node]], true) {
                    place(node, Some(arc));
                    hard.push_back(node);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::backend::{Sight, Verbatim};
    use super::super::testing::{any_edges, described, hard, snapshot, soft};
    use super::super::{BackendId, LockObject};
    use super::*;

    /// `1[2[3] 4]`
    fn shape<'a>(nodes: impl Iterator<Item = TreeNode<'a>>) -> String {
        let shown: Vec<_> = nodes
            .map(|node| {
                let below = shape(node.children());
                let pid = node.backend().pid().unwrap_or(0);
                if below.is_empty() {
                    pid.to_string()
                } else {
                    format!("{pid}[{below}]")
                }
            })
            .collect();
        shown.join(" ")
    }

    #[test]
    fn a_forest_with_the_worst_first() {
        let tree = snapshot(vec![hard(2, 1), hard(12, 11), hard(13, 12), hard(14, 12)]).tree();
        assert_eq!(shape(tree.roots()), "11[12[13 14]] 1[2]");
        let root = tree.roots().next().expect("two roots");
        assert_eq!((root.blocks(), root.edge()), (3, None));
    }

    #[test]
    fn a_waiter_stands_below_its_principal_blocker_only() {
        // 4 is behind 3 in the queue, and both wait for 1; 5 waits for two who hold, 2 with more behind it.
        let edges = vec![
            soft(4, 3),
            hard(3, 1),
            hard(4, 1),
            hard(5, 1),
            hard(5, 2),
            hard(6, 2),
            hard(7, 2),
            hard(8, 2),
        ];
        let tree = snapshot(edges).tree();
        assert_eq!(shape(tree.roots()), "2[5 6 7 8] 1[3 4]");
        let other: Vec<_> = tree
            .walk()
            .map(|(depth, node)| {
                (
                    depth,
                    node.backend().pid(),
                    node.other_edges()
                        .map(|edge| edge.blocker().pid())
                        .collect::<Vec<_>>(),
                )
            })
            .filter(|(.., others)| !others.is_empty())
            .collect();
        assert_eq!(
            other,
            [(1, Some(5), vec![Some(1)]), (1, Some(4), vec![Some(3)])]
        );
    }

    #[test]
    fn circles_hang_below_who_waited_longest() {
        let tree = snapshot(vec![hard(2, 1), hard(1, 3), hard(3, 2), soft(4, 3)]).tree();
        assert_eq!(shape(tree.roots()), "1[2[3[4]]]");
        assert_eq!(tree.cycles().len(), 1);
        let circle: Vec<_> = tree.walk().map(|(_, node)| node.is_in_cycle()).collect();
        assert_eq!(circle, [true, true, true, false]);
        // One that waits for somebody outside too stands below that one.
        let tree = snapshot(vec![hard(2, 1), hard(1, 2), hard(1, 9)]).tree();
        assert_eq!(shape(tree.roots()), "9[1[2]]");
    }

    #[test]
    fn nobody_waits_in_an_empty_tree() {
        let tree = snapshot(Vec::new()).tree();
        assert!(tree.is_empty());
        assert_eq!(tree.walk().count(), 0);
        assert_eq!(tree.to_string(), "nobody waits for a lock\n");
    }

    fn told(pid: i32, application: &str, state: &str, statement: &str) -> Backend {
        Backend {
            sight: Sight::Whole,
            application_name: Some(application.into()),
            user: Some("app".into()),
            state: Some(state.into()),
            in_state: Some(Duration::from_millis(12_300)),
            statement: Some(Verbatim(statement.into())),
            ..Backend::unknown(pid.into())
        }
    }

    #[test]
    fn a_page_for_people() {
        let hidden = Backend {
            sight: Sight::Hidden,
            application_name: Some("psql".into()),
            user: Some("dba".into()),
            ..Backend::unknown(3.into())
        };
        let mut worker = hard(4, 3);
        std::sync::Arc::make_mut(&mut worker.wait).worker = Some(41);
        let mut prepared = hard(5, 1);
        prepared.blocker = BackendId::Prepared(Some("order-7".into()));
        let backends = vec![
            told(
                1,
                "billing src/pay.rs:42",
                "idle in transaction",
                "UPDATE t SET x = 'secret'",
            ),
            told(2, "billing src/pay.rs:90", "active", "DELETE\n  FROM t"),
            hidden,
        ];
        let edges = vec![
            hard(2, 1),
            soft(3, 2),
            hard(3, 1),
            worker,
            prepared,
            hard(7, 6),
            hard(6, 7),
        ];
        let tree = described(backends, edges).tree();
        let expected = "\
6 sessions waiting for a lock, the longest for 58.0s
deadlock: pid 6 → pid 7 → pid 6
pid 1 (billing src/pay.rs:42, user app, idle in transaction for 12.3s), blocks 3
│  last ran: UPDATE t SET x = ?
├─ pid 2 (billing src/pay.rs:90, user app, active for 12.3s) waits 58.0s for ShareLock on transaction 1, held in ExclusiveLock, blocks 2
│     runs: DELETE FROM t
└─ pid 3 (psql, user dba, state hidden) waits 57.0s for ShareLock on transaction 1, held in ExclusiveLock, blocks 1
   │  statement hidden
   │  also queued behind pid 2 on transaction 2
   └─ pid 4 (ended meanwhile) waits 56.0s for ShareLock on transaction 3, held in ExclusiveLock
         in its parallel worker 41
pid 6 (ended meanwhile), blocks 1
│  pid 6 waits 54.0s for ShareLock on transaction 7, held by pid 7 in ExclusiveLock
└─ pid 7 (ended meanwhile) waits 53.0s for ShareLock on transaction 6, held in ExclusiveLock, blocks 1
prepared transaction \"order-7\", blocks 1
└─ pid 5 (ended meanwhile) waits 55.0s for ShareLock on transaction 1, held in ExclusiveLock
";
        let text = tree.to_string();
        assert!(text.starts_with(expected), "{text}");
        assert!(
            text.contains("prepared transaction \"order-7\", blocks 1"),
            "{text}"
        );
        assert!(
            tree.verbatim()
                .to_string()
                .contains("runs: DELETE FROM t\n")
        );
        assert!(!text.contains("secret") && tree.verbatim().to_string().contains("'secret'"));
    }

    #[test]
    fn a_long_chain_is_drawn_in_bounded_width() {
        let tree = snapshot((1..3000).map(|at| hard(at + 1, at)).collect()).tree();
        let text = tree.to_string();
        assert!(text.lines().all(|line| line.chars().count() < 250));
        assert!(text.contains("[2999 deep] pid 3000"));
    }

    proptest! {
        #[test]
        fn everybody_has_one_place(edges in any_edges()) {
            let snapshot = snapshot(edges.clone());
            let tree = snapshot.tree();
            let mut seen = BTreeMap::new();
            let mut above: Vec<BackendId> = Vec::new();
            for (depth, node) in tree.walk() {
                let id = node.backend().id();
                above.truncate(depth);
                prop_assert!(seen.insert(id.clone(), depth).is_none(), "{} twice", id);
                prop_assert_eq!(node.edge().is_none(), depth == 0);
                if let Some(edge) = node.edge() {
                    prop_assert_eq!((edge.waiter(), edge.blocker()), (id, &above[depth - 1]));
                    // Hard before soft, where there is a choice that is no circle.
                    if edge.is_soft() && !node.is_in_cycle() {
                        prop_assert!(snapshot.edges_of(id).all(Edge::is_soft));
                    }
                } else if !node.is_in_cycle() {
                    prop_assert_eq!(snapshot.edges_of(id).count(), 0);
                }
                let all = node.edge().into_iter().chain(node.other_edges()).count();
                prop_assert_eq!(all, edges.iter().filter(|edge| edge.waiter() == id).count());
                above.push(id.clone());
            }
            prop_assert_eq!(seen.len(), snapshot.backends().len());
            let text = tree.to_string();
            for edge in &edges {
                prop_assert!(matches!(edge.object(), LockObject::Transaction(_)));
                prop_assert!(text.contains(&edge.waiter().to_string()));
            }
        }
    }
}
