//! Diagrams of wait graphs: Mermaid, DOT, and a page of HTML that contains the diagram as SVG.
//!
//! Pure, and independent of sessions and locks: the modules that know those make the nodes and arrows. Texts may
//! contain anything: each writer escapes them for its format.

mod dot;
mod html;
mod layout;
mod mermaid;
mod select;
mod svg;
mod text;
mod transitive_reduction;

use std::collections::{HashMap, HashSet};

pub(crate) use html::{HtmlCell, HtmlPage, HtmlRow, HtmlSection, HtmlTable, html_page};
pub(crate) use select::Collapsed;
use select::select;
use transitive_reduction::transitive_reduction;

/// Nodes and arrows to draw.
#[derive(Clone, Debug, Default)]
pub(crate) struct Diagram {
    /// Each after its parent.
    pub(crate) nodes: Vec<Node>,
    pub(crate) arrows: Vec<Arrow>,
    /// The number of arrows that are not drawn between nodes that are.
    pub(crate) arrows_left_out: usize,
    /// The number of sessions without a node of their own.
    pub(crate) sessions_left_out: usize,
}

/// One session, or several that are collapsed into one node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Node {
    /// `pid 4711`
    pub(crate) name: String,
    /// `blocks 12`
    pub(crate) badge: Option<String>,
    pub(crate) lines: Vec<TextLine>,
    pub(crate) style: NodeStyle,
    pub(crate) in_cycle: bool,
    /// Parts of the session are unknown.
    pub(crate) hidden: bool,
    /// The node of its principal blocker, which is next to it on the side of the root.
    pub(crate) parent: Option<usize>,
    /// The id of its row in the page's table.
    pub(crate) row: Option<String>,
}

/// One line of a node. A text that is too long is cut at its end, or at its beginning.
#[derive(Clone, Debug)]
pub(crate) struct TextLine {
    pub(crate) text: String,
    pub(crate) keep_end: bool,
}

impl TextLine {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            keep_end: false,
        }
    }

    /// For a text whose end is most important, such as a call site.
    pub(crate) fn keeping_end(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            keep_end: true,
        }
    }
}

/// What a node represents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum NodeStyle {
    /// A root blocker.
    Root,
    #[default]
    Waiter,
    /// Several sessions.
    Collapsed,
}

/// An arrow from a waiter to a blocker.
#[derive(Clone, Debug)]
pub(crate) struct Arrow {
    /// A position in [`Diagram::nodes`].
    pub(crate) waiter: usize,
    /// A position in [`Diagram::nodes`].
    pub(crate) blocker: usize,
    /// One or two words: the mode that is held.
    pub(crate) label: String,
    /// The whole description.
    pub(crate) hint: String,
    /// The blocker is only ahead in the queue.
    pub(crate) soft: bool,
    pub(crate) in_cycle: bool,
}

impl Diagram {
    /// Draws the first nodes of a forest of `children.len()` nodes; see [`select`].
    ///
    /// `node` makes a node, without its parent. `arrows` gives the arrows of a waiter, first the one to its parent, with
    /// positions in the forest. `collapsed` gives the name and lines of a collapsed node, and the hint of its arrow to
    /// the node with the given name.
    pub(crate) fn from_forest(
        roots: &[usize],
        children: &[Vec<usize>],
        node: impl Fn(usize) -> Node,
        arrows: impl Fn(usize) -> Vec<Arrow>,
        collapsed: impl Fn(&Collapsed, &str) -> (String, Vec<TextLine>, String),
    ) -> Self {
        let selection = select(roots, children);
        let nodes = selection.nodes.iter().enumerate();
        let positions: HashMap<usize, usize> =
            nodes.map(|(position, at)| (*at, position)).collect();
        let mut diagram = Self {
            nodes: selection.nodes.iter().map(|at| node(*at)).collect(),
            sessions_left_out: selection.collapsed.iter().map(|group| group.total).sum(),
            ..Self::default()
        };
        for (position, at) in selection.nodes.iter().enumerate() {
            for child in &children[*at] {
                if let Some(child) = positions.get(child) {
                    diagram.nodes[*child].parent = Some(position);
                }
            }
            let mut linked = HashSet::new();
            for arrow in arrows(*at) {
                if let Some(&blocker) = positions.get(&arrow.blocker)
                    && linked.insert(blocker)
                {
                    diagram.arrows.push(Arrow {
                        waiter: position,
                        blocker,
                        ..arrow
                    });
                }
            }
        }
        let parents: Vec<_> = diagram.nodes.iter().map(|node| node.parent).collect();
        diagram.arrows_left_out = transitive_reduction(&mut diagram.arrows, |arrow| {
            arrow.in_cycle || parents[arrow.waiter] == Some(arrow.blocker)
        });
        for group in &selection.collapsed {
            let parent = group.parent.map(|at| positions[&at]);
            let parent_name = parent.map_or("", |parent| &*diagram.nodes[parent].name);
            let (name, lines, hint) = collapsed(group, parent_name);
            if let Some(blocker) = parent {
                diagram.arrows.push(Arrow {
                    waiter: diagram.nodes.len(),
                    blocker,
                    label: String::new(),
                    hint,
                    soft: false,
                    in_cycle: false,
                });
            }
            diagram.nodes.push(Node {
                name,
                lines,
                style: NodeStyle::Collapsed,
                parent,
                ..Node::default()
            });
        }
        diagram
    }

    /// The text of a Mermaid flowchart.
    pub(crate) fn mermaid(&self) -> String {
        mermaid::write(self)
    }

    /// The text of a directed graph for Graphviz.
    pub(crate) fn dot(&self) -> String {
        dot::write(self)
    }

    /// Whether the arrow leads from a node to its parent.
    fn is_principal(&self, arrow: &Arrow) -> bool {
        self.nodes[arrow.waiter].parent == Some(arrow.blocker)
    }
}

#[cfg(test)]
mod testing;
