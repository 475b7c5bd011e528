//! Leaves out arrows that others imply.

use std::collections::{HashMap, HashSet};

use super::Arrow;

/// Removes implied arrows and returns how many. In the queue of a lock each waiter is behind all before it, so an arrow is
/// implied if a nearer blocker of the waiter waits for the same blocker. Arrows for which `keep` is true stay.
///
/// Every waiter keeps at least one arrow: cycles aside, to the blocker that none of its other blockers waits for.
pub(super) fn transitive_reduction(
    arrows: &mut Vec<Arrow>,
    keep: impl Fn(&Arrow) -> bool,
) -> usize {
    let mut direct: HashMap<usize, HashSet<usize>> = HashMap::new();
    for arrow in &*arrows {
        direct
            .entry(arrow.waiter)
            .or_default()
            .insert(arrow.blocker);
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
    let before = arrows.len();
    arrows.retain(|arrow| {
        let is_implied = direct[&arrow.waiter].iter().any(|&between| {
            waits(between, arrow.blocker)
                // In a cycle every arrow would imply every other.
                && !is_behind(between, arrow.waiter)
                && !is_behind(arrow.blocker, between)
        });
        keep(arrow) || !is_implied
    });
    before - arrows.len()
}

/// The nodes that a node waits for, directly or through others.
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

    fn arrow(waiter: usize, blocker: usize) -> Arrow {
        Arrow {
            waiter,
            blocker,
            label: String::new(),
            hint: String::new(),
            soft: false,
            in_cycle: false,
        }
    }

    fn reduced(pairs: &[(usize, usize)], keep: &[(usize, usize)]) -> Vec<(usize, usize)> {
        let mut arrows: Vec<_> = pairs.iter().map(|(a, b)| arrow(*a, *b)).collect();
        let gone = transitive_reduction(&mut arrows, |arrow| {
            keep.contains(&(arrow.waiter, arrow.blocker))
        });
        assert_eq!(gone + arrows.len(), pairs.len());
        arrows
            .iter()
            .map(|arrow| (arrow.waiter, arrow.blocker))
            .collect()
    }

    #[test]
    fn a_queue_is_a_chain() {
        let queue = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)];
        assert_eq!(reduced(&queue, &[]), [(1, 0), (2, 1), (3, 2)]);
        assert_eq!(reduced(&queue, &[(3, 0)]), [(1, 0), (2, 1), (3, 0), (3, 2)]);
    }

    #[test]
    fn cycles_stay() {
        let cycle = [(0, 1), (1, 2), (2, 0)];
        assert_eq!(reduced(&cycle, &[]), cycle);
        let both = [(0, 1), (1, 0), (2, 0), (2, 1)];
        assert_eq!(reduced(&both, &[]), both);
    }

    #[test]
    fn a_waiter_for_a_cycle_keeps_its_arrows() {
        let cycle = [(5, 6), (6, 8), (8, 5), (1, 5), (1, 6), (1, 8)];
        assert_eq!(reduced(&cycle, &[]), cycle);
        // One more waiter behind it keeps only the nearest.
        let behind = [(5, 6), (6, 8), (8, 5), (1, 5), (2, 1), (2, 5)];
        assert_eq!(reduced(&behind, &[]), behind[..5]);
    }
}
