//! The positions of nodes: in columns, with root blockers on the left and the waiters of each node to its right.

use super::Node;

pub(super) const NODE_WIDTH: usize = 300;
/// Columns of text in a node.
pub(super) const NODE_COLUMNS: usize = 38;
/// The gap between two columns of nodes, with room for the label of an arrow.
pub(super) const GAP: usize = 216;
pub(super) const LINE_HEIGHT: usize = 16;
const PADDING: usize = 10;
const NODE_SPACING: usize = 16;
const TREE_SPACING: usize = 36;
pub(super) const MARGIN: usize = 24;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeBox {
    pub(super) column: usize,
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) height: usize,
}

impl NodeBox {
    pub(super) fn middle(&self) -> usize {
        self.y + self.height / 2
    }
}

/// The bounds of all nodes, and the size of the diagram.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    pub(super) boxes: Vec<NodeBox>,
    pub(super) width: usize,
    pub(super) height: usize,
}

/// Lays out nodes. Each node must come after its parent.
pub(super) fn layout(nodes: &[Node]) -> Layout {
    let mut children = vec![Vec::new(); nodes.len()];
    let mut roots = Vec::new();
    let mut boxes = vec![NodeBox::default(); nodes.len()];
    for (at, node) in nodes.iter().enumerate() {
        boxes[at].height = height(node);
        match node.parent {
            Some(parent) => {
                boxes[at].column = boxes[parent].column + 1;
                children[parent].push(at);
            }
            None => roots.push(at),
        }
        boxes[at].x = MARGIN + boxes[at].column * (NODE_WIDTH + GAP);
    }
    // The height of each node with all its descendants.
    let mut extents: Vec<usize> = boxes.iter().map(|bounds| bounds.height).collect();
    for at in (0..nodes.len()).rev() {
        extents[at] = extents[at].max(total_height(&children[at], &extents));
    }
    let mut y = MARGIN;
    for root in roots {
        boxes[root].y = y;
        y += extents[root] + TREE_SPACING;
    }
    for at in 0..nodes.len() {
        // Here `y` is still the top of the node's subtree. The node is in the middle of it.
        let top = boxes[at].y;
        let mut next = top + (extents[at] - total_height(&children[at], &extents)) / 2;
        for child in &children[at] {
            boxes[*child].y = next;
            next += extents[*child] + NODE_SPACING;
        }
        boxes[at].y = top + (extents[at] - boxes[at].height) / 2;
    }
    let columns = boxes.iter().map(|bounds| bounds.column + 1).max();
    let columns = columns.unwrap_or(0);
    Layout {
        width: 2 * MARGIN + columns * NODE_WIDTH + columns.saturating_sub(1) * GAP + GAP / 2,
        height: y.saturating_sub(TREE_SPACING) + MARGIN,
        boxes,
    }
}

fn total_height(nodes: &[usize], extents: &[usize]) -> usize {
    let sum: usize = nodes.iter().map(|node| extents[*node]).sum();
    sum + nodes.len().saturating_sub(1) * NODE_SPACING
}

fn height(node: &Node) -> usize {
    2 * PADDING + LINE_HEIGHT * (1 + node.lines.len())
}

/// The base line of a line of a node's text, relative to the node's top; line 0 is the name.
pub(super) fn baseline(line: usize) -> usize {
    PADDING + LINE_HEIGHT * line + 12
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::TextLine;
    use super::*;

    proptest! {
        #[test]
        fn nodes_do_not_overlap(
            picks in prop::collection::vec((any::<Option<prop::sample::Index>>(), 0..7_usize), 0..90),
        ) {
            let nodes: Vec<_> = picks
                .iter()
                .enumerate()
                .map(|(at, (parent, lines))| Node {
                    parent: parent.filter(|_| at > 0).map(|parent| parent.index(at)),
                    lines: vec![TextLine::new(""); *lines],
                    ..Node::default()
                })
                .collect();
            let layout = layout(&nodes);
            for (at, a) in layout.boxes.iter().enumerate() {
                prop_assert!(a.x + NODE_WIDTH + MARGIN <= layout.width);
                prop_assert!(a.y >= MARGIN && a.y + a.height + MARGIN <= layout.height);
                if let Some(parent) = nodes[at].parent {
                    prop_assert_eq!(a.x, layout.boxes[parent].x + NODE_WIDTH + GAP);
                }
                for b in &layout.boxes[..at] {
                    let apart = a.y + a.height + NODE_SPACING <= b.y || b.y + b.height + NODE_SPACING <= a.y;
                    prop_assert!(a.x != b.x || apart, "{:?} {:?}", a, b);
                }
            }
        }
    }
}
