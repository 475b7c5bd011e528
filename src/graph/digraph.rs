//! A directed graph of numbered nodes, and the algorithms on it.

/// Nodes `0..len`, and an edge from each waiter to each of its blockers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digraph {
    /// For each node, the position of its first edge in `edges`; then the length of `edges`.
    start: Vec<usize>,
    edges: Vec<OutEdge>,
}

/// An edge, stored with the node that it leaves. Kept small, because there can be very many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OutEdge {
    target: u32,
    index: u32,
}

impl OutEdge {
    pub(super) fn target(self) -> usize {
        self.target as usize
    }

    /// The position of the edge in the list that the graph was made from.
    pub(super) fn index(self) -> usize {
        self.index as usize
    }
}

/// The strongly connected components: sets of nodes that can all reach one another. A single node can be one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Components {
    /// The component of each node.
    pub(super) component_of: Vec<usize>,
    /// The nodes of each component. A component comes after all components that it reaches.
    pub(super) members: Vec<Vec<usize>>,
}

/// Steps after which the search for a shorter cycle stops: enough for every lock graph seen in practice, and a bound for
/// all others.
const MAX_STEPS: usize = 4_000_000;

/// How many words of nodes [`Digraph::reaching_counts`] counts in one pass.
const CHUNK_WORDS: usize = 8;

impl Digraph {
    /// A link is a pair of nodes, from and to. Its position in the list is the edge's [index](OutEdge::index).
    pub(super) fn new(len: usize, links: impl Iterator<Item = (usize, usize)> + Clone) -> Self {
        let mut start = vec![0; len + 1];
        for (from, _) in links.clone() {
            start[from + 1] += 1;
        }
        for at in 0..len {
            start[at + 1] += start[at];
        }
        let mut next = start.clone();
        let mut edges = vec![
            OutEdge {
                target: 0,
                index: 0
            };
            start[len]
        ];
        let small = |number| u32::try_from(number).expect("no server has 2³² locks");
        for (index, (from, to)) in links.enumerate() {
            edges[next[from]] = OutEdge {
                target: small(to),
                index: small(index),
            };
            next[from] += 1;
        }
        Self { start, edges }
    }

    pub(super) fn len(&self) -> usize {
        self.start.len() - 1
    }

    /// The edges that leave a node.
    pub(super) fn edges_from(&self, node: usize) -> &[OutEdge] {
        &self.edges[self.start[node]..self.start[node + 1]]
    }

    /// Tarjan's algorithm, without recursion because chains of waiters can be long.
    pub(super) fn components(&self) -> Components {
        const NEW: usize = usize::MAX;
        let mut index = vec![NEW; self.len()];
        let mut low = vec![0; self.len()];
        let mut found = Components {
            component_of: vec![NEW; self.len()],
            members: Vec::new(),
        };
        let mut open = Vec::new();
        let mut path: Vec<(usize, usize)> = Vec::new();
        let mut count = 0;
        for root in 0..self.len() {
            if index[root] != NEW {
                continue;
            }
            path.push((root, 0));
            while let Some((node, next)) = path.pop() {
                if next == 0 {
                    index[node] = count;
                    low[node] = count;
                    count += 1;
                    open.push(node);
                }
                if let Some(edge) = self.edges_from(node).get(next) {
                    path.push((node, next + 1));
                    if index[edge.target()] == NEW {
                        path.push((edge.target(), 0));
                    } else if found.component_of[edge.target()] == NEW {
                        low[node] = low[node].min(index[edge.target()]);
                    }
                    continue;
                }
                if let Some((parent, _)) = path.last() {
                    low[*parent] = low[*parent].min(low[node]);
                }
                if low[node] == index[node] {
                    let from = open
                        .iter()
                        .rposition(|member| *member == node)
                        .expect("a node stays open until its component is found");
                    let members = open.split_off(from);
                    for member in &members {
                        found.component_of[*member] = found.members.len();
                    }
                    found.members.push(members);
                }
            }
        }
        found
    }

    /// Whether the nodes of a component are on a cycle.
    pub(super) fn is_cyclic(&self, members: &[usize]) -> bool {
        match members {
            [node] => self
                .edges_from(*node)
                .iter()
                .any(|edge| edge.target() == *node),
            _ => true,
        }
    }

    /// A shortest cycle within a component, as the indexes of its edges in order.
    pub(super) fn shortest_cycle(&self, components: &Components, component: usize) -> Vec<usize> {
        let mut best: Vec<usize> = Vec::new();
        let mut steps = 0;
        // For each node: the start of the search that last reached it, the edge taken, and the node before it.
        let mut reached = vec![(usize::MAX, 0, 0); self.len()];
        for &start in &components.members[component] {
            let mut layer = vec![start];
            let mut depth = 1;
            'search: while !layer.is_empty() && (best.is_empty() || depth < best.len()) {
                let mut next = Vec::new();
                for node in layer {
                    for edge in self.edges_from(node) {
                        steps += 1;
                        if components.component_of[edge.target()] != component {
                            continue;
                        }
                        if edge.target() == start {
                            best = vec![edge.index()];
                            let mut at = node;
                            while at != start {
                                let (_, edge, from) = reached[at];
                                best.push(edge);
                                at = from;
                            }
                            best.reverse();
                            break 'search;
                        }
                        if reached[edge.target()].0 != start {
                            reached[edge.target()] = (start, edge.index(), node);
                            next.push(edge.target());
                        }
                    }
                }
                layer = next;
                depth += 1;
            }
            if best.len() == 1 || (!best.is_empty() && steps > MAX_STEPS) {
                break;
            }
        }
        best
    }

    /// For each node, how many other nodes reach it.
    pub(super) fn reaching_counts(&self, components: &Components) -> Vec<usize> {
        let mut counts = vec![0; self.len()];
        // One bit for each of some hundred nodes at a time, so that memory stays in proportion to the graph.
        for first in (0..self.len()).step_by(CHUNK_WORDS * 64) {
            let mut sets = vec![[0_u64; CHUNK_WORDS]; components.members.len()];
            // From the nodes that only wait to the nodes that only block.
            for (component, members) in components.members.iter().enumerate().rev() {
                for &node in members {
                    if let Some(bit) = node.checked_sub(first)
                        && bit < CHUNK_WORDS * 64
                    {
                        sets[component][bit / 64] |= 1 << (bit % 64);
                    }
                }
                let own = sets[component];
                for &node in members {
                    for edge in self.edges_from(node) {
                        let target = &mut sets[components.component_of[edge.target()]];
                        for (word, more) in target.iter_mut().zip(own) {
                            *word |= more;
                        }
                    }
                }
            }
            for (node, count) in counts.iter_mut().enumerate() {
                for word in sets[components.component_of[node]] {
                    *count += word.count_ones() as usize;
                }
            }
        }
        for count in &mut counts {
            *count -= 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn digraph(len: usize, links: &[(usize, usize)]) -> Digraph {
        Digraph::new(len, links.iter().copied())
    }

    /// For each pair of nodes, whether the first reaches the second over at least one edge.
    fn reaches(len: usize, links: &[(usize, usize)]) -> Vec<Vec<bool>> {
        let mut reaches = vec![vec![false; len]; len];
        for &(from, to) in links {
            reaches[from][to] = true;
        }
        for via in 0..len {
            for from in 0..len {
                for to in 0..len {
                    reaches[from][to] |= reaches[from][via] && reaches[via][to];
                }
            }
        }
        reaches
    }

    /// The length of the shortest cycle through each node of a small graph, by trying all walks.
    fn shortest_through(len: usize, links: &[(usize, usize)], node: usize) -> Option<usize> {
        let mut at = BTreeSet::from([node]);
        for length in 1..=len {
            at = links
                .iter()
                .filter(|(from, _)| at.contains(from))
                .map(|(_, to)| *to)
                .collect();
            if at.contains(&node) {
                return Some(length);
            }
        }
        None
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let links: Vec<_> = (0..200_000).map(|at| (at, at + 1)).collect();
        let digraph = digraph(200_001, &links);
        assert_eq!(digraph.components().members.len(), 200_001);
    }

    fn graph() -> impl Strategy<Value = (usize, Vec<(usize, usize)>)> {
        (1..9_usize)
            .prop_flat_map(|len| (Just(len), prop::collection::vec((0..len, 0..len), 0..20)))
    }

    proptest! {
        #[test]
        fn components_are_nodes_that_reach_one_another((len, links) in graph()) {
            let digraph = digraph(len, &links);
            let found = digraph.components();
            let reaches = reaches(len, &links);
            for (a, b) in (0..len * len).map(|pair| (pair / len, pair % len)) {
                let together = a == b || (reaches[a][b] && reaches[b][a]);
                prop_assert_eq!(found.component_of[a] == found.component_of[b], together);
                prop_assert!(!reaches[a][b] || found.component_of[b] <= found.component_of[a]);
                prop_assert!(found.members[found.component_of[a]].contains(&a));
            }
            prop_assert_eq!(found.members.iter().map(Vec::len).sum::<usize>(), len);
        }

        #[test]
        fn each_cycle_is_found_and_shortest((len, links) in graph()) {
            let digraph = digraph(len, &links);
            let found = digraph.components();
            for (component, members) in found.members.iter().enumerate() {
                let shortest = members.iter().filter_map(|node| shortest_through(len, &links, *node)).min();
                prop_assert_eq!(digraph.is_cyclic(members), shortest.is_some());
                let cycle = digraph.shortest_cycle(&found, component);
                prop_assert_eq!(cycle.len(), shortest.unwrap_or(0));
                for (at, edge) in cycle.iter().enumerate() {
                    let next = cycle[(at + 1) % cycle.len()];
                    prop_assert_eq!(links[*edge].1, links[next].0);
                }
            }
        }

        #[test]
        fn counts_are_of_the_nodes_that_reach((len, links) in graph(), more in 0..3_usize) {
            // Also beyond the number of nodes counted at once.
            let offset = more * 500;
            let shifted: Vec<_> = links.iter().map(|(from, to)| (from + offset, to + offset)).collect();
            let digraph = digraph(len + offset, &shifted);
            let counts = digraph.reaching_counts(&digraph.components());
            let reaches = reaches(len, &links);
            for node in 0..len {
                let expected = (0..len).filter(|other| *other != node && reaches[*other][node]).count();
                prop_assert_eq!(counts[node + offset], expected);
            }
        }
    }
}
