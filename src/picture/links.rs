//! Which links are drawn.

use std::collections::{HashMap, HashSet};

use super::Link;

/// Of those who queue for one lock each is behind all before it. Leaves out the links that others imply: from a waiter
/// to one that a nearer blocker of it waits for too. `keep` says which are drawn in any case. Says how many are gone.
///
/// Every waiter keeps a link: the one to a blocker that no other of its blockers waits for, but in a circle.
pub(crate) fn without_implied(links: &mut Vec<Link>, keep: impl Fn(&Link) -> bool) -> usize {
    let mut direct: HashMap<usize, HashSet<usize>> = HashMap::new();
    for link in &*links {
        direct.entry(link.waiter).or_default().insert(link.blocker);
    }
    let reached: HashMap<usize, HashSet<usize>> = direct
        .keys()
        .map(|node| (*node, reached_from(*node, &direct)))
        .collect();
    let waits = |waiter: usize, blocker: usize| {
        let blockers = direct.get(&waiter);
        blockers.is_some_and(|blockers| blockers.contains(&blocker))
    };
    let is_behind = |node: usize, other: usize| {
        let reached = reached.get(&node);
        reached.is_some_and(|reached| reached.contains(&other))
    };
    let before = links.len();
    links.retain(|link| {
        let is_implied = direct[&link.waiter].iter().any(|&between| {
            waits(between, link.blocker)
                // In a circle everything would imply everything.
                && !is_behind(between, link.waiter)
                && !is_behind(link.blocker, between)
        });
        keep(link) || !is_implied
    });
    before - links.len()
}

/// Whom it waits for, directly or through others.
fn reached_from(node: usize, direct: &HashMap<usize, HashSet<usize>>) -> HashSet<usize> {
    let mut reached = HashSet::new();
    let mut next = vec![node];
    while let Some(node) = next.pop() {
        let blockers = direct.get(&node).into_iter().flatten();
        next.extend(blockers.copied().filter(|blocker| reached.insert(*blocker)));
    }
    reached
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
    #[test]
    fn who_waits_for_a_circle_keeps_its_links() {
        let circle = [(5, 6), (6, 8), (8, 5), (1, 5), (1, 6), (1, 8)];
        assert_eq!(left(&circle, &[]), circle);
        // Behind it the nearest is enough.
        let behind = [(5, 6), (6, 8), (8, 5), (1, 5), (2, 1), (2, 5)];
        assert_eq!(left(&behind, &[]), behind[..5]);
    }
}
