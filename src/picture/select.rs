//! Selects the sessions that get a node of their own in a diagram of very many.

/// The maximum number of single sessions in one diagram.
const MAX_NODES: usize = 80;
/// The maximum number of nodes next to one blocker.
const MAX_CHILDREN: usize = 8;
/// Each root may have this many nodes, however many roots there are.
const MIN_PER_ROOT: usize = 6;
/// The maximum number of columns.
const MAX_DEPTH: usize = 10;

/// The part of a forest that is drawn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// Nodes of the forest, each after its parent.
    pub(super) nodes: Vec<usize>,
    pub(super) collapsed: Vec<Collapsed>,
}

/// Nodes of the forest that become one node of the diagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Collapsed {
    /// The parent of the nodes; `None` for roots.
    pub(crate) parent: Option<usize>,
    /// How many children of the parent, or roots, are collapsed.
    pub(crate) direct: usize,
    /// How many nodes are collapsed, with all descendants.
    pub(crate) total: usize,
}

/// Selects the first nodes of a forest of `children.len()` nodes. Roots and children must be in order of importance.
pub(super) fn select(roots: &[usize], children: &[Vec<usize>]) -> Selection {
    let sizes = sizes(roots, children);
    let mut selection = Selection::default();
    let share = (MAX_NODES / roots.len().max(1)).max(MIN_PER_ROOT);
    let mut left = roots;
    while let [root, rest @ ..] = left {
        if selection.nodes.len() >= MAX_NODES {
            break;
        }
        let room = if rest.is_empty() { MAX_NODES } else { share };
        let until = (selection.nodes.len() + room).min(MAX_NODES);
        add(*root, 0, until, children, &sizes, &mut selection);
        left = rest;
    }
    if !left.is_empty() {
        selection.collapsed.push(Collapsed {
            parent: None,
            direct: left.len(),
            total: left.iter().map(|root| sizes[*root]).sum(),
        });
    }
    selection
}

fn add(
    node: usize,
    depth: usize,
    until: usize,
    children: &[Vec<usize>],
    sizes: &[usize],
    selection: &mut Selection,
) {
    selection.nodes.push(node);
    let mut left = &children[node][..];
    // Collapsing a single node would save nothing.
    let most = if left.len() == MAX_CHILDREN + 1 {
        left.len()
    } else {
        MAX_CHILDREN
    };
    let mut beside = 0;
    while let [child, rest @ ..] = left {
        if beside >= most || depth + 1 >= MAX_DEPTH || selection.nodes.len() >= until {
            break;
        }
        beside += 1;
        add(*child, depth + 1, until, children, sizes, selection);
        left = rest;
    }
    if !left.is_empty() {
        selection.collapsed.push(Collapsed {
            parent: Some(node),
            direct: left.len(),
            total: left.iter().map(|child| sizes[*child]).sum(),
        });
    }
}

/// The size of each node's subtree, including the node. Without recursion, because a chain can contain all sessions.
fn sizes(roots: &[usize], children: &[Vec<usize>]) -> Vec<usize> {
    let mut order = Vec::with_capacity(children.len());
    let mut left = roots.to_vec();
    while let Some(node) = left.pop() {
        order.push(node);
        left.extend(&children[node]);
    }
    let mut sizes = vec![1; children.len()];
    for node in order.into_iter().rev() {
        let total: usize = children[node].iter().map(|child| sizes[*child]).sum();
        sizes[node] += total;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The forest with these parents. A parent has a smaller number than its children.
    fn forest(parent: &[Option<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
        let mut children = vec![Vec::new(); parent.len()];
        let mut roots = Vec::new();
        for (node, parent) in parent.iter().enumerate() {
            match parent {
                Some(parent) => children[*parent].push(node),
                None => roots.push(node),
            }
        }
        (roots, children)
    }

    #[test]
    fn a_small_forest_is_selected_completely() {
        let (roots, children) = forest(&[None, Some(0), Some(1), None]);
        let selection = select(&roots, &children);
        assert_eq!(selection.nodes, [0, 1, 2, 3]);
        assert!(selection.collapsed.is_empty());
        let mut nine = vec![Some(0); 10];
        nine[0] = None;
        let (roots, children) = forest(&nine);
        assert_eq!(select(&roots, &children).nodes.len(), 10);
        assert_eq!(select(&[], &[]), Selection::default());
    }

    #[test]
    fn a_crowd_a_chain_and_many_pairs_are_bounded() {
        let crowd: Vec<_> = (0..500).map(|at| (at > 0).then_some(0)).collect();
        let chain: Vec<_> = (0..50_000).map(|at: usize| at.checked_sub(1)).collect();
        let pairs: Vec<_> = (0..500)
            .map(|at: usize| at.checked_sub(1).filter(|_| at % 2 == 1))
            .collect();
        for (parent, nodes, direct) in [(crowd, 9, 491), (chain, MAX_DEPTH, 1), (pairs, 80, 210)] {
            let (roots, children) = forest(&parent);
            let selection = select(&roots, &children);
            assert_eq!(selection.nodes.len(), nodes);
            assert_eq!(
                selection.collapsed.last().map(|group| group.direct),
                Some(direct)
            );
            let folded: usize = selection.collapsed.iter().map(|group| group.total).sum();
            assert_eq!(folded + nodes, parent.len());
        }
    }

    proptest! {
        #[test]
        fn every_node_is_selected_or_collapsed_once(picks in prop::collection::vec(any::<Option<prop::sample::Index>>(), 0..300)) {
            let parent: Vec<_> = picks
                .iter()
                .enumerate()
                .map(|(at, pick)| pick.filter(|_| at > 0).map(|pick| pick.index(at)))
                .collect();
            let (roots, children) = forest(&parent);
            let selection = select(&roots, &children);
            let folded: usize = selection.collapsed.iter().map(|group| group.total).sum();
            prop_assert_eq!(selection.nodes.len() + folded, parent.len());
            prop_assert!(selection.nodes.len() <= MAX_NODES);
            for (at, node) in selection.nodes.iter().enumerate() {
                prop_assert!(!selection.nodes[..at].contains(node));
                if let Some(parent) = parent[*node] {
                    prop_assert!(selection.nodes[..at].contains(&parent));
                }
            }
            for group in &selection.collapsed {
                prop_assert!(group.direct > 0 && group.direct <= group.total);
                prop_assert!(group.parent.is_none_or(|parent| selection.nodes.contains(&parent)));
            }
        }
    }
}
