//! Which sessions get a card of their own, where there are very many.

/// Cards of single sessions in one picture.
const MOST_CARDS: usize = 80;
/// Of those beside one blocker.
const MOST_BESIDE: usize = 8;
/// Each root may have this many, however many roots there are.
const LEAST_OF_A_ROOT: usize = 6;
/// Columns.
const DEEPEST: usize = 10;

/// What is drawn of a forest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// Nodes, each behind the one it stands below.
    pub(crate) nodes: Vec<usize>,
    pub(crate) folds: Vec<Fold>,
}

/// Nodes that become one card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fold {
    /// The node they stand below; `None` for roots.
    pub(crate) above: Option<usize>,
    /// How many stand directly there.
    pub(crate) heads: usize,
    /// With all that stand below these.
    pub(crate) all: usize,
}

/// Chooses from a forest of `below.len()` nodes those that come first: children are in the order of their weight.
pub(crate) fn choose(roots: &[usize], below: &[Vec<usize>]) -> Chosen {
    let sizes = sizes(roots, below);
    let mut chosen = Chosen::default();
    let share = (MOST_CARDS / roots.len().max(1)).max(LEAST_OF_A_ROOT);
    let mut left = roots;
    while let [root, rest @ ..] = left {
        if chosen.nodes.len() >= MOST_CARDS {
            break;
        }
        let room = if rest.is_empty() { MOST_CARDS } else { share };
        let until = (chosen.nodes.len() + room).min(MOST_CARDS);
        add(*root, 0, until, below, &sizes, &mut chosen);
        left = rest;
    }
    if !left.is_empty() {
        chosen.folds.push(Fold {
            above: None,
            heads: left.len(),
            all: left.iter().map(|root| sizes[*root]).sum(),
        });
    }
    chosen
}

fn add(
    node: usize,
    depth: usize,
    until: usize,
    below: &[Vec<usize>],
    sizes: &[usize],
    chosen: &mut Chosen,
) {
    chosen.nodes.push(node);
    let mut left = &below[node][..];
    // A card for one is no saving.
    let most = if left.len() == MOST_BESIDE + 1 {
        left.len()
    } else {
        MOST_BESIDE
    };
    let mut beside = 0;
    while let [child, rest @ ..] = left {
        if beside >= most || depth + 1 >= DEEPEST || chosen.nodes.len() >= until {
            break;
        }
        beside += 1;
        add(*child, depth + 1, until, below, sizes, chosen);
        left = rest;
    }
    if !left.is_empty() {
        chosen.folds.push(Fold {
            above: Some(node),
            heads: left.len(),
            all: left.iter().map(|child| sizes[*child]).sum(),
        });
    }
}

/// Of each node, itself and all below it. Without recursion: a chain may be as long as there are sessions.
fn sizes(roots: &[usize], below: &[Vec<usize>]) -> Vec<usize> {
    let mut order = Vec::with_capacity(below.len());
    let mut left = roots.to_vec();
    while let Some(node) = left.pop() {
        order.push(node);
        left.extend(&below[node]);
    }
    let mut sizes = vec![1; below.len()];
    for node in order.into_iter().rev() {
        let all: usize = below[node].iter().map(|child| sizes[*child]).sum();
        sizes[node] += all;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// From each node's parent, which has a smaller number.
    fn forest(above: &[Option<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
        let mut below = vec![Vec::new(); above.len()];
        let mut roots = Vec::new();
        for (node, above) in above.iter().enumerate() {
            match above {
                Some(above) => below[*above].push(node),
                None => roots.push(node),
            }
        }
        (roots, below)
    }

    #[test]
    fn a_small_forest_is_whole() {
        let (roots, below) = forest(&[None, Some(0), Some(1), None]);
        let chosen = choose(&roots, &below);
        assert_eq!(chosen.nodes, [0, 1, 2, 3]);
        assert!(chosen.folds.is_empty());
        let mut nine = vec![Some(0); 10];
        nine[0] = None;
        let (roots, below) = forest(&nine);
        assert_eq!(choose(&roots, &below).nodes.len(), 10);
        assert_eq!(choose(&[], &[]), Chosen::default());
    }

    #[test]
    fn a_crowd_a_chain_and_many_pairs_are_bounded() {
        let crowd: Vec<_> = (0..500).map(|at| (at > 0).then_some(0)).collect();
        let chain: Vec<_> = (0..50_000).map(|at: usize| at.checked_sub(1)).collect();
        let pairs: Vec<_> = (0..500)
            .map(|at: usize| at.checked_sub(1).filter(|_| at % 2 == 1))
            .collect();
        for (above, cards, heads) in [(crowd, 9, 491), (chain, DEEPEST, 1), (pairs, 80, 210)] {
            let (roots, below) = forest(&above);
            let chosen = choose(&roots, &below);
            assert_eq!(chosen.nodes.len(), cards);
            assert_eq!(chosen.folds.last().map(|fold| fold.heads), Some(heads));
            let folded: usize = chosen.folds.iter().map(|fold| fold.all).sum();
            assert_eq!(folded + cards, above.len());
        }
    }

    proptest! {
        #[test]
        fn nobody_is_lost_or_shown_twice(picks in prop::collection::vec(any::<Option<prop::sample::Index>>(), 0..300)) {
            let above: Vec<_> = picks
                .iter()
                .enumerate()
                .map(|(at, pick)| pick.filter(|_| at > 0).map(|pick| pick.index(at)))
                .collect();
            let (roots, below) = forest(&above);
            let chosen = choose(&roots, &below);
            let folded: usize = chosen.folds.iter().map(|fold| fold.all).sum();
            prop_assert_eq!(chosen.nodes.len() + folded, above.len());
            prop_assert!(chosen.nodes.len() <= MOST_CARDS);
            for (at, node) in chosen.nodes.iter().enumerate() {
                prop_assert!(!chosen.nodes[..at].contains(node));
                if let Some(above) = above[*node] {
                    prop_assert!(chosen.nodes[..at].contains(&above));
                }
            }
            for fold in &chosen.folds {
                prop_assert!(fold.heads > 0 && fold.heads <= fold.all);
                prop_assert!(fold.above.is_none_or(|above| chosen.nodes.contains(&above)));
            }
        }
    }
}
