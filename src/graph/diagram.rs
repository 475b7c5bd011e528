//! The tree as a diagram: Mermaid, DOT and HTML.

use std::collections::HashSet;

use crate::picture::{
    Arrow, Collapsed, Diagram, HtmlCell, HtmlPage, HtmlRow, HtmlSection, HtmlTable, Node,
    NodeStyle, TextLine, html_page,
};
use crate::postgres::statement::redact;
use crate::postgres::text::shortened;
use crate::postgres::timestamp::rfc3339;

use super::render::plural;
use super::{Backend, Edge, LockObject, LockTree, TreeNode};
use crate::postgres::timestamp::Age;

/// How many cycles are listed above the diagram.
const MAX_ALARMS: usize = 10;
/// How many blockers the row of a waiter names.
const MAX_NAMED: usize = 4;
/// How many characters of a statement are shown.
const MAX_STATEMENT: usize = 600;

impl LockTree {
    /// The wait graph as a page of HTML: a diagram, and below it a table of all sessions.
    ///
    /// The page is one self-contained file: no script, no network, no fonts. It is light or dark as the browser prefers.
    /// Statements are without their literals. The page contains `application_name`, users and the names of tables and
    /// advisory locks. All texts are escaped.
    ///
    /// The diagram shows at most 80 sessions, the first eight next to each blocker, ten levels deep. Other sessions are
    /// collapsed into one node per blocker. Edges implied by the queue order are omitted from the diagram. The table lists
    /// every session.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), Box<dyn std::error::Error>> {
    /// let tree = keeper.monitor().lock_tree().await?;
    /// std::fs::write("locks.html", tree.to_html())?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn to_html(&self) -> String {
        let mut facts = vec![format!(
            "Taken {} within {}.",
            rfc3339(self.snapshot().taken_at()),
            Age(self.snapshot().duration())
        )];
        let (title, summary) = self.headline();
        facts.extend(summary);
        let mut alarms: Vec<_> = self.cycles().iter().take(MAX_ALARMS).map(alarm).collect();
        if self.cycles().len() > MAX_ALARMS {
            alarms.push(format!("and {} more", self.cycles().len() - MAX_ALARMS));
        }
        let mut sections = Vec::new();
        if !self.is_empty() {
            sections.push(HtmlSection::Table(self.table()));
        }
        html_page(&HtmlPage {
            title,
            facts,
            alarms,
            diagram: self.diagram(),
            sections,
        })
    }

    /// The wait graph as the text of a [Mermaid](https://mermaid.js.org) flowchart, for Markdown and chat programs that
    /// render it.
    ///
    /// An arrow leads from a waiter to a blocker, dashed if the blocker is only ahead in the queue. The text is bounded,
    /// redacted and escaped like [`to_html`](Self::to_html).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let tree = keeper.monitor().lock_tree().await?;
    /// println!("```mermaid\n{}```", tree.to_mermaid());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn to_mermaid(&self) -> String {
        self.diagram().mermaid()
    }

    /// The wait graph as a directed graph in DOT, the language of Graphviz: `dot -Tsvg` draws it.
    ///
    /// An arrow leads from a waiter to a blocker, dashed if the blocker is only ahead in the queue. The text is bounded,
    /// redacted and escaped like [`to_html`](Self::to_html).
    #[must_use]
    pub fn to_dot(&self) -> String {
        self.diagram().dot()
    }

    fn headline(&self) -> (String, Option<String>) {
        if self.is_empty() {
            return ("Nobody waits for a lock".to_owned(), None);
        }
        let waiters = self.snapshot().waiters().len();
        let longest = self.snapshot().edges().iter().filter_map(Edge::wait_age);
        let mut title = format!("{} waiting for a lock", plural(waiters, "session"));
        if let Some(age) = longest.max() {
            title.push_str(&format!(", the longest for {}", Age(age)));
        }
        let roots = self.snapshot().roots().len();
        (title, Some(plural(roots, "root blocker")))
    }

    fn diagram(&self) -> Diagram {
        let (roots, children) = self.forest();
        let mut cycle_edges = HashSet::new();
        for edge in self.cycles().iter().flat_map(|cycle| cycle.edges()) {
            cycle_edges.insert((edge.waiter(), edge.blocker()));
        }
        Diagram::from_forest(
            roots,
            children,
            |at| diagram_node(&self.node(at), at),
            |at| {
                let node = self.node(at);
                let edges = node.edge().into_iter().chain(node.other_edges());
                let arrows = edges.filter_map(|edge| {
                    let in_cycle = cycle_edges.contains(&(edge.waiter(), edge.blocker()));
                    let blocker = self.snapshot().position(edge.blocker())?;
                    Some(arrow(edge, at, blocker, in_cycle))
                });
                arrows.collect()
            },
            collapsed_node,
        )
    }

    fn table(&self) -> HtmlTable {
        let rows = self.walk().map(|(depth, node)| HtmlRow {
            id: Some(row_id(node.position())),
            depth,
            marked: depth == 0,
            cells: cells(&node),
        });
        HtmlTable {
            heading: "Sessions".to_owned(),
            columns: vec![
                "Session",
                "Application",
                "State",
                "Waits for",
                "In its way",
                "Statement, running or last",
            ],
            rows: rows.collect(),
        }
    }
}

fn alarm(cycle: &super::Cycle) -> String {
    let what = if cycle.is_deadlock() {
        "Deadlock"
    } else {
        "Waiting in a cycle, over the queue of a lock"
    };
    format!("{what}: {cycle}")
}

fn row_id(position: usize) -> String {
    format!("s{position}")
}

fn diagram_node(node: &TreeNode<'_>, at: usize) -> Node {
    let backend = node.backend();
    let mut lines = Vec::new();
    // A line of its own: it has no end that could be cut off.
    let name = match backend.prepared_transaction() {
        Some(gid) => {
            lines.push(TextLine::new(format!("{gid:?}")));
            "prepared transaction".to_owned()
        }
        None => backend.id().to_string(),
    };
    if let Some(name) = backend.application_name().filter(|name| !name.is_empty()) {
        lines.push(TextLine::keeping_end(name));
    }
    lines.extend(state(backend).map(TextLine::new));
    // The head of a cycle has no parent.
    let edge = node.edge().or_else(|| node.other_edges().next());
    if let Some(edge) = edge {
        lines.push(TextLine::new(wait(edge)));
        lines.push(TextLine::keeping_end(object(edge)));
    }
    if let Some(statement) = backend.shown_statement() {
        lines.push(TextLine::new(redact(statement)));
    }
    Node {
        name,
        badge: (node.blocked_count() > 0).then(|| format!("blocks {}", node.blocked_count())),
        lines,
        style: if edge.is_none() {
            NodeStyle::Root
        } else {
            NodeStyle::Waiter
        },
        in_cycle: node.is_in_cycle(),
        hidden: backend.is_hidden() || backend.is_gone() && backend.pid().is_some(),
        parent: None,
        row: Some(row_id(at)),
    }
}

fn arrow(edge: &Edge, waiter: usize, blocker: usize, in_cycle: bool) -> Arrow {
    let mode = edge.mode_held().or_else(|| edge.mode_queued());
    Arrow {
        waiter,
        blocker,
        label: mode.map(|mode| mode.to_string()).unwrap_or_default(),
        hint: edge.to_string(),
        soft: edge.is_soft(),
        in_cycle,
    }
}

/// The name, lines and hint of a collapsed node.
fn collapsed_node(group: &Collapsed, parent: &str) -> (String, Vec<TextLine>, String) {
    let what = if group.parent.is_some() {
        "more session"
    } else {
        "more root blocker"
    };
    let name = plural(group.direct, what);
    let mut lines = Vec::new();
    if group.total > group.direct {
        let behind = group.total - group.direct;
        lines.push(TextLine::new(format!(
            "{} behind",
            plural(behind, "session")
        )));
    }
    let verb = if group.direct == 1 { "waits" } else { "wait" };
    let hint = format!("{name} {verb} for {parent}");
    (name, lines, hint)
}

fn cells(node: &TreeNode<'_>) -> Vec<HtmlCell> {
    let backend = node.backend();
    let text = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
    let mut application = Vec::from_iter(text(backend.application_name()));
    let login = match (backend.user(), backend.database()) {
        (Some(user), Some(database)) => Some(format!("{user} @ {database}")),
        (user, database) => text(user.or(database)),
    };
    application.extend(login);
    application.extend(text(backend.client_address()));
    application.extend(text(backend.backend_type()).filter(|kind| kind != "client backend"));
    let mut doing = Vec::from_iter(state(backend));
    if let Some(age) = backend.transaction_age() {
        let what = if backend.pid().is_some() {
            "in its transaction for"
        } else {
            "prepared for"
        };
        doing.push(format!("{what} {}", Age(age)));
    }
    let workers = node.workers();
    if !workers.is_empty() {
        let pids: Vec<_> = workers.iter().map(ToString::to_string).collect();
        doing.push(format!("parallel workers: {}", pids.join(", ")));
    }
    let mut waits = Vec::new();
    let mut blockers = Vec::new();
    let mut edges = node.edge().into_iter().chain(node.other_edges());
    for edge in edges.by_ref().take(MAX_NAMED) {
        if waits.is_empty() {
            waits = vec![wait(edge), object(edge)];
        }
        blockers.push(blocker(edge));
    }
    match edges.count() {
        0 => {}
        more => blockers.push(format!("and {more} more")),
    }
    let mut session = vec![backend.id().to_string()];
    if node.blocked_count() > 0 {
        session.push(format!("blocks {}", node.blocked_count()));
    }
    let statement = match backend.shown_statement() {
        Some(statement) => shortened(&redact(statement), MAX_STATEMENT).into_owned(),
        None if backend.is_hidden() => "hidden from this role".to_owned(),
        None => String::new(),
    };
    vec![
        HtmlCell::lines(session),
        HtmlCell::lines(application),
        HtmlCell::lines(doing),
        HtmlCell::lines(waits),
        HtmlCell::lines(blockers),
        HtmlCell::code(statement),
    ]
}

/// `idle in transaction for 12.3s`
fn state(backend: &Backend) -> Option<String> {
    match (backend.state(), backend.state_age()) {
        (Some(state), Some(age)) => Some(format!("{state} for {}", Age(age))),
        (Some(state), None) => Some(state.to_owned()),
        (None, _) if backend.is_hidden() => Some("state hidden from this role".to_owned()),
        (None, _) if backend.is_gone() && backend.pid().is_some() => {
            Some("ended meanwhile".to_owned())
        }
        (None, _) => None,
    }
}

/// `waits 3.2s for ShareLock`
fn wait(edge: &Edge) -> String {
    match edge.wait_age() {
        Some(age) => format!("waits {} for {}", Age(age), edge.mode_wanted()),
        None => format!("waits for {}", edge.mode_wanted()),
    }
}

/// The locked object: the row, if known, rather than the transaction that locked it.
fn object(edge: &Edge) -> String {
    match (edge.row(), edge.object()) {
        (Some(row), _) => format!("on {row}"),
        (None, LockObject::Relation(relation)) => format!("on {relation}"),
        (None, object) => format!("on {object}"),
    }
}

/// `pid 12 holds ExclusiveLock`
fn blocker(edge: &Edge) -> String {
    let name = edge.blocker();
    match (edge.mode_held(), edge.mode_queued()) {
        (Some(mode), _) => format!("{name} holds {mode}"),
        (_, Some(mode)) => format!("{name} is ahead, for {mode}"),
        _ if edge.is_soft() => format!("{name} is ahead"),
        _ => name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::backend::{RawStatement, Visibility};
    use super::super::testing::{any_edges, described, hard, snapshot, soft};
    use super::*;

    fn backend(pid: i32, statement: &str) -> Backend {
        Backend {
            visibility: Visibility::Full,
            application_name: Some("a <b> src/\"pay\".rs:42".into()),
            user: Some("app".into()),
            state: Some("active".into()),
            statement: Some(RawStatement(statement.into())),
            ..Backend::unknown(pid.into())
        }
    }

    #[test]
    fn a_crowd_behind_one_lock_is_collapsed() {
        let mut edges = Vec::new();
        for waiter in 2..=500 {
            edges.push(hard(waiter, 1));
            edges.extend((2..waiter).map(|ahead| soft(waiter, ahead)));
        }
        let tree = snapshot(edges).tree();
        let diagram = tree.diagram();
        assert_eq!(diagram.nodes.len(), 10);
        assert_eq!(diagram.nodes[9].name, "491 more sessions");
        // Each is behind the one before it, and all are behind the holder; one arrow is for the collapsed ones.
        assert_eq!(diagram.arrows.len(), 8 + 7 + 1);
        assert_eq!(diagram.sessions_left_out, 491);
        assert_eq!(diagram.arrows_left_out, 8 + 28 - 15);
        let page = tree.to_html();
        assert_eq!(page.matches("<tr id=").count(), 500);
        assert!(page.contains("491 more sessions are not drawn."));
        assert!(page.len() < 500_000, "{}", page.len());
        assert!(tree.to_mermaid().len() < 50_000);
    }

    #[test]
    fn literals_and_markup_stay_out() {
        let backends = vec![
            backend(1, "UPDATE t SET a = 'secret' /* secret */"),
            backend(2, "SELECT 'secret' FROM \"<x>\""),
        ];
        let tree = described(backends, vec![hard(2, 1)]).tree();
        for text in [tree.to_html(), tree.to_mermaid(), tree.to_dot()] {
            assert!(!text.contains("secret"), "{text}");
        }
        let page = tree.to_html();
        assert!(!page.contains("<b>") && !page.contains("<x>"));
        assert!(page.contains("a &lt;b&gt; src/&quot;pay&quot;.rs:42"));
        assert!(page.contains("SELECT ? FROM &quot;&lt;x&gt;&quot;"));
    }

    #[test]
    fn cycles_are_listed_and_marked() {
        let tree = snapshot(vec![hard(2, 1), hard(1, 2), soft(4, 3), soft(3, 4)]).tree();
        let diagram = tree.diagram();
        assert_eq!(diagram.arrows.len(), 4);
        assert!(diagram.arrows.iter().all(|arrow| arrow.in_cycle));
        assert!(
            diagram
                .nodes
                .iter()
                .all(|node| node.in_cycle && node.style == NodeStyle::Waiter)
        );
        let page = tree.to_html();
        assert!(page.contains("<li>Deadlock: pid 1 → pid 2 → pid 1</li>"));
        assert!(page.contains("<li>Waiting in a cycle, over the queue of a lock: pid 3"));
    }

    #[test]
    fn an_empty_page_has_no_diagram() {
        let tree = snapshot(Vec::new()).tree();
        let page = tree.to_html();
        assert!(page.contains("<h1>Nobody waits for a lock</h1>"));
        assert!(!page.contains("<svg") && !page.contains("<table"));
        assert_eq!(tree.to_mermaid(), "flowchart RL\n");
    }

    proptest! {
        #[test]
        fn every_session_is_in_the_diagram(edges in any_edges()) {
            let tree = snapshot(edges).tree();
            let diagram = tree.diagram();
            let single = diagram.nodes.iter().filter(|node| node.style != NodeStyle::Collapsed).count();
            prop_assert_eq!(single + diagram.sessions_left_out, tree.walk().count());
            for (at, node) in diagram.nodes.iter().enumerate() {
                prop_assert!(node.parent.is_none_or(|parent| parent < at));
                // Each waiter has an arrow.
                let waits = diagram.arrows.iter().any(|arrow| arrow.waiter == at);
                let is_root = node.style == NodeStyle::Root || node.style == NodeStyle::Collapsed && node.parent.is_none();
                prop_assert_eq!(waits, !is_root);
            }
            for text in [tree.to_mermaid(), tree.to_dot(), tree.to_html()] {
                prop_assert!(!text.is_empty());
            }
        }
    }
}
