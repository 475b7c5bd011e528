//! Where cards stand: in columns, root blockers on the left, beside each card those it keeps waiting.

use super::Card;

pub(super) const CARD_WIDTH: usize = 300;
/// Columns of text in a card.
pub(super) const CARD_COLUMNS: usize = 38;
/// Between two columns of cards: room for the label of a link.
pub(super) const GAP: usize = 216;
pub(super) const LINE: usize = 16;
const PADDING: usize = 10;
const BETWEEN: usize = 16;
const BETWEEN_TREES: usize = 36;
pub(super) const MARGIN: usize = 24;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) column: usize,
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) height: usize,
}

impl Place {
    pub(super) fn middle(&self) -> usize {
        self.y + self.height / 2
    }
}

/// All places, and how large the picture is.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    pub(super) places: Vec<Place>,
    pub(super) width: usize,
    pub(super) height: usize,
}

/// Cards stand behind the ones above them.
pub(super) fn layout(cards: &[Card]) -> Layout {
    let mut below = vec![Vec::new(); cards.len()];
    let mut roots = Vec::new();
    let mut places = vec![Place::default(); cards.len()];
    for (at, card) in cards.iter().enumerate() {
        places[at].height = height(card);
        match card.above {
            Some(above) => {
                places[at].column = places[above].column + 1;
                below[above].push(at);
            }
            None => roots.push(at),
        }
        places[at].x = MARGIN + places[at].column * (CARD_WIDTH + GAP);
    }
    // Of each card, with all beside it on the right.
    let mut extents: Vec<usize> = places.iter().map(|place| place.height).collect();
    for at in (0..cards.len()).rev() {
        extents[at] = extents[at].max(together(&below[at], &extents));
    }
    let mut y = MARGIN;
    for root in roots {
        places[root].y = y;
        y += extents[root] + BETWEEN_TREES;
    }
    for at in 0..cards.len() {
        // Here `y` is where its part of the picture begins; the card stands in the middle of that.
        let top = places[at].y;
        let mut next = top + (extents[at] - together(&below[at], &extents)) / 2;
        for child in &below[at] {
            places[*child].y = next;
            next += extents[*child] + BETWEEN;
        }
        places[at].y = top + (extents[at] - places[at].height) / 2;
    }
    let columns = places.iter().map(|place| place.column + 1).max();
    let columns = columns.unwrap_or(0);
    Layout {
        width: 2 * MARGIN + columns * CARD_WIDTH + columns.saturating_sub(1) * GAP + GAP / 2,
        height: y.saturating_sub(BETWEEN_TREES) + MARGIN,
        places,
    }
}

fn together(cards: &[usize], extents: &[usize]) -> usize {
    let sum: usize = cards.iter().map(|card| extents[*card]).sum();
    sum + cards.len().saturating_sub(1) * BETWEEN
}

fn height(card: &Card) -> usize {
    2 * PADDING + LINE * (1 + card.lines.len())
}

/// The base line of a card's text, counted from its top; 0 is the name.
pub(super) fn baseline(line: usize) -> usize {
    PADDING + LINE * line + 12
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Line;
    use super::*;

    proptest! {
        #[test]
        fn cards_stand_apart(
            picks in prop::collection::vec((any::<Option<prop::sample::Index>>(), 0..7_usize), 0..90),
        ) {
            let cards: Vec<_> = picks
                .iter()
                .enumerate()
                .map(|(at, (above, lines))| Card {
                    above: above.filter(|_| at > 0).map(|above| above.index(at)),
                    lines: vec![Line::new(""); *lines],
                    ..Card::default()
                })
                .collect();
            let layout = layout(&cards);
            for (at, a) in layout.places.iter().enumerate() {
                prop_assert!(a.x + CARD_WIDTH + MARGIN <= layout.width);
                prop_assert!(a.y >= MARGIN && a.y + a.height + MARGIN <= layout.height);
                if let Some(above) = cards[at].above {
                    prop_assert_eq!(a.x, layout.places[above].x + CARD_WIDTH + GAP);
                }
                for b in &layout.places[..at] {
                    let apart = a.y + a.height + BETWEEN <= b.y || b.y + b.height + BETWEEN <= a.y;
                    prop_assert!(a.x != b.x || apart, "{:?} {:?}", a, b);
                }
            }
        }
    }
}
