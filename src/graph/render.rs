//! The tree as text for a terminal.

use std::fmt::{self, Write as _};

use crate::postgres::statement::redact;
use crate::postgres::text::Joined;
use crate::postgres::timestamp::Age;

use super::{Backend, Edge, EdgeKind, LockTree, TreeNode};

/// Deeper nodes are not indented further.
const MAX_INDENT: usize = 16;
/// How many of a waiter's other blockers are named.
const MAX_NAMED: usize = 3;
/// How many characters of a statement are shown.
const MAX_STATEMENT: usize = 160;

/// `pid 4711 (billing src/pay.rs:42, user app, idle in transaction for 3.2s, in its transaction for 4.0s)`
impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id().fmt(f)?;
        if self.is_gone() {
            return match self.pid() {
                Some(_) => f.write_str(" (ended meanwhile)"),
                None => Ok(()),
            };
        }
        f.write_str(" (")?;
        let mut parts = CommaList { f, first: true };
        if self.pid().is_some() {
            match self.application_name() {
                None => parts.add(format_args!("application hidden"))?,
                Some("") => parts.add(format_args!("no application_name"))?,
                Some(name) => parts.add(format_args!("{}", name.escape_debug()))?,
            }
        }
        if let Some(kind) = self.backend_type()
            && kind != "client backend"
        {
            parts.add(format_args!("{}", kind.escape_debug()))?;
        }
        match self.user() {
            Some(user) => parts.add(format_args!("user {}", user.escape_debug()))?,
            None if self.is_hidden() => parts.add(format_args!("user hidden"))?,
            None => {}
        }
        match (self.state(), self.state_age()) {
            (Some(state), Some(age)) => parts.add(format_args!("{state} for {}", Age(age)))?,
            (Some(state), None) => parts.add(format_args!("{state}"))?,
            (None, _) if self.is_hidden() => parts.add(format_args!("state hidden"))?,
            (None, _) => {}
        }
        if let (Some(kind), Some(event)) = (self.wait_event_type(), self.wait_event())
            && kind != "Lock"
        {
            parts.add(format_args!("wait event {kind}/{event}"))?;
        }
        if let Some(age) = self.transaction_age() {
            let what = if self.pid().is_some() {
                "in its transaction"
            } else {
                "prepared"
            };
            parts.add(format_args!("{what} for {}", Age(age)))?;
        }
        f.write_str(")")
    }
}

struct CommaList<'a, 'f> {
    f: &'a mut fmt::Formatter<'f>,
    first: bool,
}

impl CommaList<'_, '_> {
    fn add(&mut self, part: fmt::Arguments<'_>) -> fmt::Result {
        if !std::mem::take(&mut self.first) {
            self.f.write_str(", ")?;
        }
        self.f.write_fmt(part)
    }
}

impl LockTree {
    /// The same text with the statements as the clients sent them, including literals.
    #[must_use]
    pub fn verbatim(&self) -> impl fmt::Display + '_ {
        VerbatimTree(self)
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>, verbatim: bool) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nobody waits for a lock\n");
        }
        let waiters = self.snapshot().waiters();
        let first = waiters.first().map(|waiter| waiter.id());
        let longest = first.and_then(|id| {
            let ages = self.snapshot().edges_of(id).filter_map(Edge::wait_age);
            ages.max()
        });
        write!(f, "{} waiting for a lock", plural(waiters.len(), "session"))?;
        if let Some(age) = longest {
            write!(f, ", the longest for {}", Age(age))?;
        }
        writeln!(f)?;
        for cycle in self.cycles() {
            let what = if cycle.is_deadlock() {
                "deadlock"
            } else {
                "waiting in a cycle, over the queue of a lock"
            };
            writeln!(f, "{what}: {cycle}")?;
        }
        self.draw_nodes(f, verbatim)
    }

    fn draw_nodes(&self, f: &mut fmt::Formatter<'_>, verbatim: bool) -> fmt::Result {
        // For each level above, whether more nodes follow in it.
        let mut open: Vec<bool> = Vec::new();
        let mut left: Vec<(usize, TreeNode<'_>, bool)> =
            self.roots().map(|root| (0, root, true)).collect();
        left.reverse();
        while let Some((depth, node, last)) = left.pop() {
            open.truncate(depth);
            let mut prefix = String::new();
            for more in open.iter().skip(1).take(MAX_INDENT) {
                prefix.push_str(if *more { "│  " } else { "   " });
            }
            f.write_str(&prefix)?;
            if depth > 0 {
                if depth <= MAX_INDENT {
                    f.write_str(if last { "└─ " } else { "├─ " })?;
                    prefix.push_str(if last { "   " } else { "│  " });
                } else {
                    write!(f, "[{depth} deep] ")?;
                }
            }
            open.push(!last);
            let children: Vec<_> = node.children().collect();
            prefix.push_str(if children.is_empty() || depth >= MAX_INDENT {
                "   "
            } else {
                "│  "
            });
            node.draw(f, &prefix, verbatim)?;
            let count = children.len();
            let below = children
                .into_iter()
                .enumerate()
                .map(|(at, child)| (depth + 1, child, at + 1 == count));
            let from = left.len();
            left.extend(below);
            left[from..].reverse();
        }
        Ok(())
    }
}

/// The tree with literals.
struct VerbatimTree<'a>(&'a LockTree);

impl fmt::Display for VerbatimTree<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.draw(f, true)
    }
}

impl fmt::Display for LockTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.draw(f, false)
    }
}

impl TreeNode<'_> {
    fn draw(&self, f: &mut fmt::Formatter<'_>, prefix: &str, verbatim: bool) -> fmt::Result {
        write!(f, "{}", self.backend())?;
        if let Some(edge) = self.edge() {
            f.write_str(" waits")?;
            if let Some(age) = edge.wait_age() {
                write!(f, " {}", Age(age))?;
            }
            write!(f, " for {} on {}", edge.mode_wanted(), edge.object())?;
            if let (Some(row), None) = (edge.row(), edge.object().row()) {
                write!(f, " ({row})")?;
            }
            match (edge.kind(), edge.mode_held(), edge.mode_queued()) {
                (_, Some(held), _) => write!(f, ", held in {held}")?,
                (_, _, Some(queued)) => write!(f, ", queued behind {queued}")?,
                (EdgeKind::Soft, ..) => f.write_str(", queued behind")?,
                _ => {}
            }
        }
        if self.blocked_count() > 0 {
            write!(f, ", blocks {}", self.blocked_count())?;
        }
        writeln!(f)?;
        self.draw_statement(f, prefix, verbatim)?;
        let workers = self.workers();
        if !workers.is_empty() {
            let s = if workers.len() == 1 { "" } else { "s" };
            let pids = Joined(&workers, ", ");
            writeln!(f, "{prefix}in its parallel worker{s} {pids}")?;
        }
        let mut others = self.other_edges();
        for edge in others.by_ref().take(MAX_NAMED) {
            let how = if edge.is_soft() {
                "also queued behind"
            } else {
                "also blocked by"
            };
            match self.edge() {
                // The head of a cycle has no parent edge that shows its wait.
                None => writeln!(f, "{prefix}{edge}")?,
                Some(above) if above.object() == edge.object() => {
                    writeln!(f, "{prefix}{how} {}", edge.blocker())?;
                }
                Some(_) => writeln!(f, "{prefix}{how} {} on {}", edge.blocker(), edge.object())?,
            }
        }
        match others.count() {
            0 => Ok(()),
            more => writeln!(f, "{prefix}and by {more} more"),
        }
    }

    fn draw_statement(
        &self,
        f: &mut fmt::Formatter<'_>,
        prefix: &str,
        verbatim: bool,
    ) -> fmt::Result {
        let backend = self.backend();
        let verb = match backend.state() {
            Some("active") => "runs",
            _ => "last ran",
        };
        match backend.shown_statement() {
            Some(statement) if verbatim => {
                writeln!(f, "{prefix}{verb}: {}", one_line(statement))
            }
            Some(statement) => writeln!(f, "{prefix}{verb}: {}", one_line(&redact(statement))),
            None if backend.is_hidden() => writeln!(f, "{prefix}statement hidden"),
            None => Ok(()),
        }
    }
}

/// A statement in one line of bounded length, without control characters.
fn one_line(statement: &str) -> String {
    let mut line = String::new();
    let mut length = 0;
    for word in statement.split_whitespace() {
        if length > 0 {
            line.push(' ');
            length += 1;
        }
        for c in word.chars() {
            if length >= MAX_STATEMENT {
                line.push('…');
                return line;
            }
            match c {
                '\'' | '"' => line.push(c),
                c => {
                    // Infallible: writing to a String.
                    let _ = write!(line, "{}", c.escape_debug());
                }
            }
            length += 1;
        }
    }
    line
}

/// `1 session`, `2 sessions`
pub(super) fn plural(number: usize, what: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {what}{s}")
}
