//! Which links are drawn.

use std::collections::HashSet;

use super::Link;

/// Of those who queue for one lock each is behind all before it. Leaves out the links that others imply: from a waiter
/// to one that a nearer blocker of it waits for too. `keep` says which are drawn in any case. Says how many are gone.
pub(crate) fn without_implied(links: &mut Vec<Link>, keep: impl Fn(&Link) -> bool) -> usize {
    let all: HashSet<(usize, usize)> = links
        .iter()
        .map(|link| (link.waiter, link.blocker))
        .collect();
    let nodes: HashSet<usize> = all.iter().flat_map(|(from, to)| [*from, *to]).collect();
    let before = links.len();
    links.retain(|link| {
        let is_implied = nodes.iter().any(|between| {
            all.contains(&(link.waiter, *between))
                && all.contains(&(*between, link.blocker))
                // In a circle everything would imply everything.
                && !all.contains(&(*between, link.waiter))
                && !all.contains(&(link.blocker, *between))
        });
        keep(link) || !is_implied
    });
    before - links.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(waiter: usize, blocker: usize) -> Link {
        Link {
            waiter,
            blocker,
            label: String::new(),
            hint: String::new(),
            soft: false,
            in_circle: false,
        }
    }

    fn left(pairs: &[(usize, usize)], keep: &[(usize, usize)]) -> Vec<(usize, usize)> {
        let mut links: Vec<_> = pairs.iter().map(|(a, b)| link(*a, *b)).collect();
        let gone = without_implied(&mut links, |link| {
            keep.contains(&(link.waiter, link.blocker))
        });
        assert_eq!(gone + links.len(), pairs.len());
        links
            .iter()
            .map(|link| (link.waiter, link.blocker))
            .collect()
    }

    #[test]
    fn a_queue_is_a_chain() {
        let queue = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)];
        assert_eq!(left(&queue, &[]), [(1, 0), (2, 1), (3, 2)]);
        assert_eq!(left(&queue, &[(3, 0)]), [(1, 0), (2, 1), (3, 0), (3, 2)]);
    }

    #[test]
    fn circles_stay() {
        let circle = [(0, 1), (1, 2), (2, 0)];
        assert_eq!(left(&circle, &[]), circle);
        let both = [(0, 1), (1, 0), (2, 0), (2, 1)];
        assert_eq!(left(&both, &[]), both);
    }
}
