//! The graph as a forest to display, root blockers first.

use std::cmp::Reverse;

use super::digraph::{Components, Digraph, OutEdge};
use super::{Backend, Cycle, Edge, Snapshot};

/// The wait graph as a forest: the roots are the root blockers, and below each blocker are the sessions that wait for it.
///
/// Every session of the [`Snapshot`] is in it once. A waiter is below its principal blocker: a holder of the lock rather
/// than a session that is only ahead in the queue, then the one that blocks the most sessions. Its node
/// [lists](TreeNode::other_edges) its other blockers. In a cycle, the session that has waited longest is above the others.
///
/// `Display` draws the forest for a terminal, with statements redacted. [`to_html`](Self::to_html),
/// [`to_mermaid`](Self::to_mermaid) and [`to_dot`](Self::to_dot) give other formats.
#[derive(Clone, Debug, PartialEq)]
pub struct LockTree {
    snapshot: Snapshot,
    cycles: Vec<Cycle>,
    /// For each backend of the snapshot, the edge to its parent.
    parent_edge: Vec<Option<usize>>,
    children: Vec<Vec<usize>>,
    blocked_counts: Vec<usize>,
    in_cycle: Vec<bool>,
    roots: Vec<usize>,
}

/// A session, or a prepared transaction, in a [`LockTree`].
#[derive(Clone, Copy, Debug)]
pub struct TreeNode<'a> {
    tree: &'a LockTree,
    at: usize,
}

impl LockTree {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        let digraph = snapshot.digraph();
        let components = snapshot.components();
        let blocked_counts = digraph.reaching_counts(components);
        let chooser = ParentChooser {
            snapshot,
            digraph,
            components,
            blocked_counts: &blocked_counts,
        };
        let mut tree = Self {
            cycles: snapshot.cycles(),
            parent_edge: vec![None; digraph.len()],
            children: vec![Vec::new(); digraph.len()],
            in_cycle: vec![false; digraph.len()],
            roots: Vec::new(),
            snapshot: snapshot.clone(),
            blocked_counts: Vec::new(),
        };
        let mut place = |node: usize, out: Option<OutEdge>| match out {
            Some(out) => {
                tree.parent_edge[node] = Some(out.index());
                tree.children[out.target()].push(node);
            }
            None => tree.roots.push(node),
        };
        for (component, members) in components.members.iter().enumerate() {
            if digraph.is_cyclic(members) {
                for member in members {
                    tree.in_cycle[*member] = true;
                }
                chooser.place_component(component, &mut place);
            } else {
                let node = members[0];
                // Leaders and parallel workers that neither wait nor block are left out.
                if blocked_counts[node] > 0 || !digraph.edges_from(node).is_empty() {
                    place(node, chooser.principal_blocker(node, |_| true));
                }
            }
        }
        let rank = |node: &usize| {
            (
                Reverse(blocked_counts[*node]),
                Reverse(snapshot.longest_wait(*node)),
                *node,
            )
        };
        tree.roots.sort_by_cached_key(rank);
        for children in &mut tree.children {
            children.sort_by_cached_key(rank);
        }
        tree.blocked_counts = blocked_counts;
        tree
    }

    /// The nodes without a parent, the one that blocks the most sessions first.
    pub fn roots(&self) -> impl Iterator<Item = TreeNode<'_>> {
        self.roots.iter().map(|at| TreeNode {
            tree: self,
            at: *at,
        })
    }

    /// Every node with its depth, in preorder: a node comes before its children.
    pub fn walk(&self) -> impl Iterator<Item = (usize, TreeNode<'_>)> {
        let mut left: Vec<_> = self.roots.iter().rev().map(|at| (0, *at)).collect();
        std::iter::from_fn(move || {
            let (depth, at) = left.pop()?;
            left.extend(
                self.children[at]
                    .iter()
                    .rev()
                    .map(|below| (depth + 1, *below)),
            );
            Some((depth, TreeNode { tree: self, at }))
        })
    }

    getters! {
        /// The wait cycles; see [`Snapshot::cycles`].
        cycles: &[Cycle];

        /// The snapshot that the tree was made from.
        snapshot: &Snapshot;
    }

    /// The roots, and for each backend of the snapshot its children.
    #[cfg(feature = "pictures")]
    pub(super) fn forest(&self) -> (&[usize], &[Vec<usize>]) {
        (&self.roots, &self.children)
    }

    #[cfg(feature = "pictures")]
    pub(super) fn node(&self, at: usize) -> TreeNode<'_> {
        TreeNode { tree: self, at }
    }

    /// Whether no session waited for a lock.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.snapshot.is_empty()
    }
}

impl<'a> TreeNode<'a> {
    /// The session, or the prepared transaction.
    #[must_use]
    pub fn backend(&self) -> &'a Backend {
        &self.tree.snapshot.backends()[self.at]
    }

    /// The wait for its parent; `None` for a root.
    #[must_use]
    pub fn edge(&self) -> Option<&'a Edge> {
        self.tree.parent_edge[self.at].map(|edge| &self.tree.snapshot.edges()[edge])
    }

    /// The waits for its other blockers.
    pub fn other_edges(&self) -> impl Iterator<Item = &'a Edge> + use<'a> {
        let tree = self.tree;
        let parent_edge = tree.parent_edge[self.at];
        let outgoing = tree.snapshot.digraph().edges_from(self.at).iter();
        outgoing
            .filter(move |out| Some(out.index()) != parent_edge)
            .map(|out| &tree.snapshot.edges()[out.index()])
    }

    /// The sessions whose principal blocker it is, the one that blocks the most sessions first.
    pub fn children(&self) -> impl Iterator<Item = TreeNode<'a>> + use<'a> {
        let tree = self.tree;
        tree.children[self.at]
            .iter()
            .map(|at| TreeNode { tree, at: *at })
    }

    /// Its position among the snapshot's backends.
    #[cfg(any(feature = "pictures", feature = "serde"))]
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// How many sessions wait for this one, directly or through others; see [`Snapshot::blocked_count`].
    #[must_use]
    pub fn blocked_count(&self) -> usize {
        self.tree.blocked_counts[self.at]
    }

    /// Whether the session is part of a wait cycle.
    #[must_use]
    pub fn is_in_cycle(&self) -> bool {
        self.tree.in_cycle[self.at]
    }

    /// The process ids of its parallel workers that wait.
    #[must_use]
    pub fn workers(&self) -> Vec<i32> {
        let outgoing = self.tree.snapshot.digraph().edges_from(self.at).iter();
        let mut workers: Vec<_> = outgoing
            .filter_map(|out| self.tree.snapshot.edges()[out.index()].worker())
            .collect();
        workers.sort_unstable();
        workers.dedup();
        workers
    }
}

/// Chooses the parent of each waiter.
struct ParentChooser<'a> {
    snapshot: &'a Snapshot,
    digraph: &'a Digraph,
    components: &'a Components,
    blocked_counts: &'a [usize],
}

impl ParentChooser<'_> {
    fn is_soft(&self, out: OutEdge) -> bool {
        self.snapshot.edges()[out.index()].is_soft()
    }

    /// The principal blocker among the blockers for which `allowed` is true.
    fn principal_blocker(
        &self,
        node: usize,
        allowed: impl Fn(&OutEdge) -> bool,
    ) -> Option<OutEdge> {
        let outgoing = self
            .digraph
            .edges_from(node)
            .iter()
            .copied()
            .filter(allowed);
        outgoing.min_by_key(|out| {
            let blocker = &self.snapshot.backends()[out.target()];
            let age = blocker.transaction_age();
            (
                self.is_soft(*out),
                Reverse(self.blocked_counts[out.target()]),
                Reverse(age),
                out.target(),
            )
        })
    }

    /// Places the members of a cyclic component: the longest waiter first, and each other member below one that is already
    /// placed, by a hard edge if there is one.
    fn place_component(&self, component: usize, place: &mut impl FnMut(usize, Option<OutEdge>)) {
        let members = &self.components.members[component];
        let rank = |node: &&usize| (Reverse(self.snapshot.longest_wait(**node)), **node);
        let Some(&head) = members.iter().min_by_key(rank) else {
            return;
        };
        place(
            head,
            self.principal_blocker(head, |out| {
                self.components.component_of[out.target()] != component
            }),
        );
        // The waiters for each member, within the component.
        let position_of: std::collections::HashMap<usize, usize> = members
            .iter()
            .enumerate()
            .map(|(at, node)| (*node, at))
            .collect();
        let mut waiting: Vec<Vec<(usize, OutEdge)>> = vec![Vec::new(); members.len()];
        for &node in members {
            for out in self.digraph.edges_from(node) {
                if self.components.component_of[out.target()] == component {
                    waiting[position_of[&out.target()]].push((node, *out));
                }
            }
        }
        let mut placed = vec![false; members.len()];
        placed[position_of[&head]] = true;
        let mut hard = std::collections::VecDeque::from([head]);
        let mut soft = std::collections::VecDeque::new();
        // This reaches all members, because the component is strongly connected.
        while let Some(above) = hard.pop_front() {
            for &(node, out) in &waiting[position_of[&above]] {
                if self.is_soft(out) {
                    soft.push_back((node, out));
                } else if !std::mem::replace(&mut placed[position_of[&node]], true) {
                    place(node, Some(out));
                    hard.push_back(node);
                }
            }
            while hard.is_empty()
                && let Some((node, out)) = soft.pop_front()
            {
                if !std::mem::replace(&mut placed[position_of[&node]], true) {
                    place(node, Some(out));
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

    use super::super::backend::{RawStatement, Visibility};
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
        assert_eq!((root.blocked_count(), root.edge()), (3, None));
    }

    #[test]
    fn a_waiter_stands_below_its_principal_blocker_only() {
        // 4 is behind 3 in the queue, and both wait for 1. 5 waits for two holders, of which 2 has more waiters.
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
    fn a_cycle_hangs_below_its_longest_waiter() {
        let tree = snapshot(vec![hard(2, 1), hard(1, 3), hard(3, 2), soft(4, 3)]).tree();
        assert_eq!(shape(tree.roots()), "1[2[3[4]]]");
        assert_eq!(tree.cycles().len(), 1);
        let in_cycle: Vec<_> = tree.walk().map(|(_, node)| node.is_in_cycle()).collect();
        assert_eq!(in_cycle, [true, true, true, false]);
        // A member that also waits for a session outside the cycle is below that session.
        let tree = snapshot(vec![hard(2, 1), hard(1, 2), hard(1, 9)]).tree();
        assert_eq!(shape(tree.roots()), "9[1[2]]");
    }

    #[test]
    fn an_empty_tree_has_no_waiters() {
        let tree = snapshot(Vec::new()).tree();
        assert!(tree.is_empty());
        assert_eq!(tree.walk().count(), 0);
        assert_eq!(tree.to_string(), "nobody waits for a lock\n");
    }

    fn backend(pid: i32, application: &str, state: &str, statement: &str) -> Backend {
        Backend {
            visibility: Visibility::Full,
            application_name: Some(application.into()),
            user: Some("app".into()),
            state: Some(state.into()),
            state_age: Some(Duration::from_millis(12_300)),
            statement: Some(RawStatement(statement.into())),
            ..Backend::unknown(pid.into())
        }
    }

    #[test]
    fn the_tree_is_drawn_as_text() {
        let hidden = Backend {
            visibility: Visibility::Hidden,
            application_name: Some("psql".into()),
            user: Some("dba".into()),
            ..Backend::unknown(3.into())
        };
        let mut worker = hard(4, 3);
        std::sync::Arc::make_mut(&mut worker.wait).worker = Some(41);
        let mut prepared = hard(5, 1);
        prepared.blocker = BackendId::Prepared(Some("order-7".into()));
        let backends = vec![
            backend(
                1,
                "billing src/pay.rs:42",
                "idle in transaction",
                "UPDATE t SET x = 'secret'",
            ),
            backend(2, "billing src/pay.rs:90", "active", "DELETE\n  FROM t"),
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
        fn every_session_has_one_node(edges in any_edges()) {
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
                    // Hard before soft, where there is a choice and no cycle.
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
