//! Who waits for whom as a picture: Mermaid, DOT, and a page of HTML with the picture drawn in it.
//!
//! Pure, and of nobody's types: the rooms that know sessions and locks say what stands in a card and who waits for whom.
//! Texts may have anything in them: each writer escapes them for its own format.

mod choose;
mod dot;
mod html;
mod layout;
mod links;
mod mermaid;
mod svg;
mod text;

pub(crate) use choose::{Fold, choose};
pub(crate) use html::{Cell, Page, Row, Section, Table, page};
pub(crate) use links::without_implied;

/// What is drawn.
#[derive(Clone, Debug, Default)]
pub(crate) struct Picture {
    /// Each behind the one it stands below.
    pub(crate) cards: Vec<Card>,
    pub(crate) links: Vec<Link>,
    /// Pairs of sessions that are both drawn, and the link between them is not.
    pub(crate) links_left_out: usize,
    /// Sessions that have no card of their own.
    pub(crate) sessions_left_out: usize,
}

/// One session, or several that are not shown one by one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Card {
    /// `pid 4711`
    pub(crate) name: String,
    /// `blocks 12`
    pub(crate) badge: Option<String>,
    pub(crate) lines: Vec<Line>,
    pub(crate) look: Look,
    pub(crate) in_circle: bool,
    /// Parts of it are not known.
    pub(crate) hidden: bool,
    /// The card it stands beside, nearer to the root: its principal blocker.
    pub(crate) above: Option<usize>,
    /// Its row in the page's table.
    pub(crate) row: Option<String>,
}

/// One line of a card. A text that is too long loses its end, or its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) keep_end: bool,
}

impl Line {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            keep_end: false,
        }
    }

    /// Of a name that ends with what matters: a call site.
    pub(crate) fn keeping_end(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            keep_end: true,
        }
    }
}

/// What a card stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Look {
    /// In the way of others, and waits for nobody.
    Root,
    #[default]
    Waiter,
    /// Several sessions.
    Fold,
}

/// One waits for another.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// Places in [`Picture::cards`].
    pub(crate) waiter: usize,
    pub(crate) blocker: usize,
    /// A word or two: the mode that is held.
    pub(crate) label: String,
    /// All that is to be said.
    pub(crate) hint: String,
    /// The blocker only queues ahead.
    pub(crate) soft: bool,
    pub(crate) in_circle: bool,
}

impl Picture {
    /// Mermaid's text for a flowchart.
    pub(crate) fn mermaid(&self) -> String {
        mermaid::write(self)
    }

    /// The text of a directed graph for Graphviz.
    pub(crate) fn dot(&self) -> String {
        dot::write(self)
    }

    /// Whether it is the link along which a card stands below another.
    fn is_principal(&self, link: &Link) -> bool {
        self.cards[link.waiter].above == Some(link.blocker)
    }
}

#[cfg(test)]
mod testing;
