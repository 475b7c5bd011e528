//! The bare graph: numbers for participants, and what can be found out with them.

/// Participants `0..len` and who of them waits for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Net {
    /// Where the arcs of each node begin in `arcs`; one more at the end.
    start: Vec<usize>,
    arcs: Vec<Arc>,
}

/// From one node to another. There can be very many, so they are small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arc {
    to: u32,
    edge: u32,
}

impl Arc {
    pub(super) fn to(self) -> usize {
        self.to as usize
    }

    /// The caller's number for it.
    pub(super) fn edge(self) -> usize {
        self.edge as usize
    }
}

/// Sets of nodes that can all reach one another; a node on its own is one too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Components {
    /// Of each node, its set.
    pub(super) of: Vec<usize>,
    /// A set stands behind all those that it reaches.
    pub(super) members: Vec<Vec<usize>>,
}

/// Steps after which the search for a shorter cycle is given up: enough for any graph that locks make in practice, and
/// a bound for the others.
const MOST_STEPS: usize = 4_000_000;

/// Nodes counted at once by [`Net::reached_from`], in words.
const WORDS: usize = 8;

impl Net {
    /// Links are pairs of nodes; their place in the list is the number of the arc.
    pub(super) fn new(len: usize, links: impl Iterator<Item = (usize, usize)> + Clone) -> Self {
        let mut start = vec![0; len + 1];
        for (from, _) in links.clone() {
            start[from + 1] += 1;
        }
        for at in 0..len {
            start[at + 1] += start[at];
        }
        let mut next = start.clone();
        let mut arcs = vec![Arc { to: 0, edge: 0 }; start[len]];
        let small = |number| u32::try_from(number).expect("no server has 2³² locks");
        for (edge, (from, to)) in links.enumerate() {
            arcs[next[from]] = Arc {
                to: small(to),
                edge: small(edge),
            };
            next[from] += 1;
        }
        Self { start, arcs }
    }

    pub(super) fn len(&self) -> usize {
        self.start.len() - 1
    }

    /// What goes out from a node.
    pub(super) fn arcs(&self, node: usize) -> &[Arc] {
        &self.arcs[self.start[node]..self.start[node + 1]]
    }

    /// Tarjan's algorithm, without recursion: chains of waiters can be long.
    pub(super) fn components(&self) -> Components {
        const NEW: usize = usize::MAX;
        let mut index = vec![NEW; self.len()];
        let mut low = vec![0; self.len()];
        let mut found = Components {
            of: vec![NEW; self.len()],
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
                if let Some(arc) = self.arcs(node).get(next) {
                    path.push((node, next + 1));
                    if index[arc.to()] == NEW {
                        path.push((arc.to(), 0));
                    } else if found.of[arc.to()] == NEW {
                        low[node] = low[node].min(index[arc.to()]);
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
                        .expect("a node stays open until its set is found");
                    let members = open.split_off(from);
                    for member in &members {
                        found.of[*member] = found.members.len();
                    }
                    found.members.push(members);
                }
            }
        }
        found
    }

    /// Whether the nodes of a set are on a cycle.
    pub(super) fn is_cyclic(&self, members: &[usize]) -> bool {
        match members {
            [node] => self.arcs(*node).iter().any(|arc| arc.to() == *node),
            _ => true,
        }
    }

    /// A shortest cycle within a set, as the numbers of its arcs in order.
    pub(super) fn shortest_cycle(&self, components: &Components, set: usize) -> Vec<usize> {
        let mut best: Vec<usize> = Vec::new();
        let mut steps = 0;
        // The arc by which a node was reached, and from where, in the search that began at `stamp`.
        let mut reached = vec![(usize::MAX, 0, 0); self.len()];
        for &start in &components.members[set] {
            let mut layer = vec![start];
            let mut depth = 1;
            'search: while !layer.is_empty() && (best.is_empty() || depth < best.len()) {
                let mut next = Vec::new();
                for node in layer {
                    for arc in self.arcs(node) {
                        steps += 1;
                        if components.of[arc.to()] != set {
                            continue;
                        }
                        if arc.to() == start {
                            best = vec![arc.edge()];
                            let mut at = node;
                            while at != start {
                                let (_, edge, from) = reached[at];
                                best.push(edge);
                                at = from;
                            }
                            best.reverse();
                            break 'search;
                        }
                        if reached[arc.to()].0 != start {
                            reached[arc.to()] = (start, arc.edge(), node);
                            next.push(arc.to());
                        }
                    }
                }
                layer = next;
                depth += 1;
            }
            if best.len() == 1 || (!best.is_empty() && steps > MOST_STEPS) {
                break;
            }
        }
        best
    }

    /// Of each node, how many others reach it.
    pub(super) fn reached_from(&self, components: &Components) -> Vec<usize> {
        let mut counts = vec![0; self.len()];
        // A bit for each of some hundred nodes at a time, so that memory stays in proportion to the graph.
        for first in (0..self.len()).step_by(WORDS * 64) {
            let mut sets = vec![[0_u64; WORDS]; components.members.len()];
            // From those who only wait to those who only block.
            for (set, members) in components.members.iter().enumerate().rev() {
                for &node in members {
                    if let Some(bit) = node.checked_sub(first)
                        && bit < WORDS * 64
                    {
                        sets[set][bit / 64] |= 1 << (bit % 64);
                    }
                }
                let own = sets[set];
                for &node in members {
                    for arc in self.arcs(node) {
                        let target = &mut sets[components.of[arc.to()]];
                        for (word, more) in target.iter_mut().zip(own) {
                            *word |= more;
                        }
                    }
                }
            }
            for (node, count) in counts.iter_mut().enumerate() {
                for word in sets[components.of[node]] {
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

    fn net(len: usize, links: &[(usize, usize)]) -> Net {
        Net::new(len, links.iter().copied())
    }

    /// All pairs of which the first reaches the second by at least one arc.
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
        let net = net(200_001, &links);
        assert_eq!(net.components().members.len(), 200_001);
    }

    fn graph() -> impl Strategy<Value = (usize, Vec<(usize, usize)>)> {
        (1..9_usize)
            .prop_flat_map(|len| (Just(len), prop::collection::vec((0..len, 0..len), 0..20)))
    }

    proptest! {
        #[test]
        fn components_are_what_reaches_both_ways((len, links) in graph()) {
            let net = net(len, &links);
            let found = net.components();
            let reaches = reaches(len, &links);
            for (a, b) in (0..len * len).map(|pair| (pair / len, pair % len)) {
                let together = a == b || (reaches[a][b] && reaches[b][a]);
                prop_assert_eq!(found.of[a] == found.of[b], together);
                prop_assert!(!reaches[a][b] || found.of[b] <= found.of[a]);
                prop_assert!(found.members[found.of[a]].contains(&a));
            }
            prop_assert_eq!(found.members.iter().map(Vec::len).sum::<usize>(), len);
        }

        #[test]
        fn cycles_are_there_and_shortest((len, links) in graph()) {
            let net = net(len, &links);
            let found = net.components();
            for (set, members) in found.members.iter().enumerate() {
                let shortest = members.iter().filter_map(|node| shortest_through(len, &links, *node)).min();
                prop_assert_eq!(net.is_cyclic(members), shortest.is_some());
                let cycle = net.shortest_cycle(&found, set);
                prop_assert_eq!(cycle.len(), shortest.unwrap_or(0));
                for (at, edge) in cycle.iter().enumerate() {
                    let next = cycle[(at + 1) % cycle.len()];
                    prop_assert_eq!(links[*edge].1, links[next].0);
                }
            }
        }

        #[test]
        fn counts_are_of_those_who_reach((len, links) in graph(), more in 0..3_usize) {
            // Also beyond the number of nodes counted at once.
            let offset = more * 500;
            let shifted: Vec<_> = links.iter().map(|(from, to)| (from + offset, to + offset)).collect();
            let net = net(len + offset, &shifted);
            let counts = net.reached_from(&net.components());
            let reaches = reaches(len, &links);
            for node in 0..len {
                let expected = (0..len).filter(|other| *other != node && reaches[*other][node]).count();
                prop_assert_eq!(counts[node + offset], expected);
            }
        }
    }
}
