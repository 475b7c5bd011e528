//! The tree as a picture: Mermaid, DOT and HTML.

use std::collections::{HashMap, HashSet};

use crate::picture::{
    Card, Cell, Fold, Line, Link, Look, Page, Picture, Row, Section, Table, choose, page,
    without_implied,
};
use crate::postgres::statement::redact;
use crate::postgres::timestamp::rfc3339;

use super::render::plural;
use super::{Backend, BackendId, Edge, LockObject, LockTree, TreeNode};
use crate::postgres::timestamp::Age;

/// Circles that are told of above the picture.
const MOST_ALARMS: usize = 10;
/// Of those in a waiter's way, the ones its row names.
const MOST_NAMED: usize = 4;
/// Characters of a statement.
const STATEMENT: usize = 600;

impl LockTree {
    /// A page of HTML for people: the wait graph drawn, and below it a table of all sessions.
    ///
    /// It is one file that needs nothing else: no script, no network, no fonts; light or dark as the reader's browser
    /// asks for. Statements are without their literals; `application_name`, users and the names of tables and advisory
    /// locks are on it. Every text is escaped, whatever is in it.
    ///
    /// The picture has 80 sessions at most, the first eight beside each blocker, ten deep; others are folded into one
    /// card there. Of those who queue for one lock it has no arrow that others imply. The table has everybody.
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
        let mut alarms: Vec<_> = self.cycles().iter().take(MOST_ALARMS).map(alarm).collect();
        if self.cycles().len() > MOST_ALARMS {
            alarms.push(format!("and {} more", self.cycles().len() - MOST_ALARMS));
        }
        let mut sections = Vec::new();
        if !self.is_empty() {
            sections.push(Section::Table(self.table()));
        }
        page(&Page {
            title,
            facts,
            alarms,
            picture: self.picture(),
            sections,
        })
    }

    /// The wait graph as the text of a [Mermaid](https://mermaid.js.org) flowchart, for Markdown and chat programs that draw such.
    ///
    /// An arrow leads from a waiter to one in its way, dashed where that one only queues ahead. Bounded, redacted and
    /// escaped as [`to_html`](Self::to_html).
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
        self.picture().mermaid()
    }

    /// The wait graph as a directed graph in DOT, the language of Graphviz: `dot -Tsvg` draws it.
    ///
    /// An arrow leads from a waiter to one in its way, dashed where that one only queues ahead. Bounded, redacted and
    /// escaped as [`to_html`](Self::to_html).
    #[must_use]
    pub fn to_dot(&self) -> String {
        self.picture().dot()
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

    fn picture(&self) -> Picture {
        let (roots, below) = self.forest();
        let chosen = choose(roots, below);
        let mut circles = HashSet::new();
        for edge in self.cycles().iter().flat_map(|cycle| cycle.edges()) {
            circles.insert((edge.waiter(), edge.blocker()));
        }
        let places: HashMap<&BackendId, usize> = chosen
            .nodes
            .iter()
            .enumerate()
            .map(|(place, at)| (self.node(*at).backend().id(), place))
            .collect();
        let mut picture = Picture {
            sessions_left_out: chosen.folds.iter().map(|fold| fold.all).sum(),
            ..Picture::default()
        };
        for (place, at) in chosen.nodes.iter().enumerate() {
            let node = self.node(*at);
            let edge = node.edge();
            let above = edge.and_then(|edge| places.get(edge.blocker()).copied());
            picture.cards.push(card(&node, *at, above));
            let mut linked = HashSet::new();
            for edge in edge.into_iter().chain(node.other_edges()) {
                if let Some(&blocker) = places.get(edge.blocker())
                    && linked.insert(blocker)
                {
                    let in_circle = circles.contains(&(edge.waiter(), edge.blocker()));
                    picture.links.push(link(edge, place, blocker, in_circle));
                }
            }
        }
        let above: Vec<_> = picture.cards.iter().map(|card| card.above).collect();
        picture.links_left_out = without_implied(&mut picture.links, |link| {
            link.in_circle || above[link.waiter] == Some(link.blocker)
        });
        for fold in &chosen.folds {
            let above = fold
                .above
                .and_then(|at| places.get(self.node(at).backend().id()).copied());
            add_fold(&mut picture, fold, above);
        }
        picture
    }

    fn table(&self) -> Table {
        let rows = self.walk().map(|(depth, node)| Row {
            id: Some(row_id(node.position())),
            depth,
            marked: depth == 0,
            cells: cells(&node),
        });
        Table {
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
        "Waiting in a circle, over the queue of a lock"
    };
    format!("{what}: {cycle}")
}

fn row_id(place: usize) -> String {
    format!("s{place}")
}

fn card(node: &TreeNode<'_>, at: usize, above: Option<usize>) -> Card {
    let backend = node.backend();
    let mut lines = Vec::new();
    // A line of its own: there is no end to it that could be left out.
    let name = match backend.prepared_transaction() {
        Some(gid) => {
            lines.push(Line::new(format!("{gid:?}")));
            "prepared transaction".to_owned()
        }
        None => backend.id().to_string(),
    };
    if let Some(name) = backend.application_name().filter(|name| !name.is_empty()) {
        lines.push(Line::keeping_end(name));
    }
    lines.extend(state(backend).map(Line::new));
    // At the head of a circle nothing stands above.
    let edge = node.edge().or_else(|| node.other_edges().next());
    if let Some(edge) = edge {
        lines.push(Line::new(wait(edge)));
        lines.push(Line::keeping_end(object(edge)));
    }
    if let Some(statement) = backend.statement() {
        lines.push(Line::new(redact(statement)));
    }
    Card {
        name,
        badge: (node.blocked_count() > 0).then(|| format!("blocks {}", node.blocked_count())),
        lines,
        look: if edge.is_none() {
            Look::Root
        } else {
            Look::Waiter
        },
        in_circle: node.is_in_cycle(),
        hidden: backend.is_hidden() || backend.is_gone() && backend.pid().is_some(),
        above,
        row: Some(row_id(at)),
    }
}

fn link(edge: &Edge, waiter: usize, blocker: usize, in_circle: bool) -> Link {
    let mode = edge.mode_held().or_else(|| edge.mode_queued());
    Link {
        waiter,
        blocker,
        label: mode.map(|mode| mode.to_string()).unwrap_or_default(),
        hint: edge.to_string(),
        soft: edge.is_soft(),
        in_circle,
    }
}

fn add_fold(picture: &mut Picture, fold: &Fold, above: Option<usize>) {
    let what = if fold.above.is_some() {
        "more session"
    } else {
        "more root blocker"
    };
    let name = plural(fold.heads, what);
    let mut lines = Vec::new();
    if fold.all > fold.heads {
        let behind = fold.all - fold.heads;
        lines.push(Line::new(format!("{} behind", plural(behind, "session"))));
    }
    if let Some(above) = above {
        let blocker = &picture.cards[above].name;
        let verb = if fold.heads == 1 { "waits" } else { "wait" };
        picture.links.push(Link {
            waiter: picture.cards.len(),
            blocker: above,
            label: String::new(),
            hint: format!("{name} {verb} for {blocker}"),
            soft: false,
            in_circle: false,
        });
    }
    picture.cards.push(Card {
        name,
        lines,
        look: Look::Fold,
        above,
        ..Card::default()
    });
}

fn cells(node: &TreeNode<'_>) -> Vec<Cell> {
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
    let mut in_the_way = Vec::new();
    let mut edges = node.edge().into_iter().chain(node.other_edges());
    for edge in edges.by_ref().take(MOST_NAMED) {
        if waits.is_empty() {
            waits = vec![wait(edge), object(edge)];
        }
        in_the_way.push(blocker(edge));
    }
    match edges.count() {
        0 => {}
        more => in_the_way.push(format!("and {more} more")),
    }
    let mut session = vec![backend.id().to_string()];
    if node.blocked_count() > 0 {
        session.push(format!("blocks {}", node.blocked_count()));
    }
    let statement = match backend.statement() {
        Some(statement) => shortened(&redact(statement)),
        None if backend.is_hidden() => "hidden from this role".to_owned(),
        None => String::new(),
    };
    vec![
        Cell::lines(session),
        Cell::lines(application),
        Cell::lines(doing),
        Cell::lines(waits),
        Cell::lines(in_the_way),
        Cell::code(statement),
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

/// The row rather than the transaction that has it.
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

fn shortened(statement: &str) -> String {
    match statement.char_indices().nth(STATEMENT) {
        Some((end, _)) => format!("{}…", &statement[..end]),
        None => statement.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::backend::{RawStatement, Visibility};
    use super::super::testing::{any_edges, described, hard, snapshot, soft};
    use super::*;

    fn told(pid: i32, statement: &str) -> Backend {
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
    fn a_crowd_behind_one_lock_is_folded() {
        let mut edges = Vec::new();
        for waiter in 2..=500 {
            edges.push(hard(waiter, 1));
            edges.extend((2..waiter).map(|ahead| soft(waiter, ahead)));
        }
        let tree = snapshot(edges).tree();
        let picture = tree.picture();
        assert_eq!(picture.cards.len(), 10);
        assert_eq!(picture.cards[9].name, "491 more sessions");
        // Each behind the one before it, all behind the holder, and the fold.
        assert_eq!(picture.links.len(), 8 + 7 + 1);
        assert_eq!(picture.sessions_left_out, 491);
        assert_eq!(picture.links_left_out, 8 + 28 - 15);
        let page = tree.to_html();
        assert_eq!(page.matches("<tr id=").count(), 500);
        assert!(page.contains("491 more sessions are not drawn."));
        assert!(page.len() < 500_000, "{}", page.len());
        assert!(tree.to_mermaid().len() < 50_000);
    }

    #[test]
    fn literals_and_markup_stay_out() {
        let backends = vec![
            told(1, "UPDATE t SET a = 'secret' /* secret */"),
            told(2, "SELECT 'secret' FROM \"<x>\""),
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
    fn circles_are_told_of_and_marked() {
        let tree = snapshot(vec![hard(2, 1), hard(1, 2), soft(4, 3), soft(3, 4)]).tree();
        let picture = tree.picture();
        assert_eq!(picture.links.len(), 4);
        assert!(picture.links.iter().all(|link| link.in_circle));
        assert!(
            picture
                .cards
                .iter()
                .all(|card| card.in_circle && card.look == Look::Waiter)
        );
        let page = tree.to_html();
        assert!(page.contains("<li>Deadlock: pid 1 → pid 2 → pid 1</li>"));
        assert!(page.contains("<li>Waiting in a circle, over the queue of a lock: pid 3"));
    }

    #[test]
    fn nobody_waits_on_an_empty_page() {
        let tree = snapshot(Vec::new()).tree();
        let page = tree.to_html();
        assert!(page.contains("<h1>Nobody waits for a lock</h1>"));
        assert!(!page.contains("<svg") && !page.contains("<table"));
        assert_eq!(tree.to_mermaid(), "flowchart RL\n");
    }

    proptest! {
        #[test]
        fn everybody_is_in_the_picture(edges in any_edges()) {
            let tree = snapshot(edges).tree();
            let picture = tree.picture();
            let alone = picture.cards.iter().filter(|card| card.look != Look::Fold).count();
            prop_assert_eq!(alone + picture.sessions_left_out, tree.walk().count());
            for (at, card) in picture.cards.iter().enumerate() {
                prop_assert!(card.above.is_none_or(|above| above < at));
                // Who waits has an arrow.
                let waits = picture.links.iter().any(|link| link.waiter == at);
                prop_assert_eq!(waits, card.look != Look::Root && !(card.look == Look::Fold && card.above.is_none()));
            }
            for text in [tree.to_mermaid(), tree.to_dot(), tree.to_html()] {
                prop_assert!(!text.is_empty());
            }
        }
    }
}
