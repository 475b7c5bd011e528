//! The report as a diagram: Mermaid, DOT and HTML.

use crate::picture::{
    Arrow, Diagram, HtmlCell, HtmlPage, HtmlRow, HtmlSection, HtmlTable, Node, NodeStyle, TextLine,
    html_page,
};

use super::{Incident, IncidentEdge, JournalMark, Participant, wording};

/// How many blockers the row of a waiter names.
const MAX_NAMED: usize = 4;
/// How many characters of a statement are shown.
const MAX_STATEMENT: usize = 800;

impl Incident {
    /// The incident as a page of HTML: a diagram of the waits, and below it the diagnosis, the participants, the statements
    /// that each of them had run, and the server's message.
    ///
    /// The page is one self-contained file: no script, no network, no fonts. It is light or dark as the browser prefers.
    /// It contains what [`Display`](std::fmt::Display) shows, with literals only if those are enabled. All redaction are
    /// escaped.
    ///
    /// # Examples
    ///
    /// ```
    /// fn keep(incident: &lockkeeper::Incident) -> std::io::Result<()> {
    ///     std::fs::write(format!("{}.html", incident.fingerprint()), incident.to_html())
    /// }
    /// ```
    #[must_use]
    pub fn to_html(&self) -> String {
        let mut facts = vec![self.attempt_line()];
        facts.push(self.occurrences_line());
        let mut sections = Vec::new();
        let diagnosis = self.diagnosis();
        let mut lines = vec![diagnosis.text().to_owned()];
        lines.extend(diagnosis.fix().map(|fix| format!("To do: {fix}")));
        sections.push(HtmlSection::Text {
            heading: self.why_heading(),
            lines,
        });
        sections.push(HtmlSection::Table(self.table()));
        sections.extend(self.participants().iter().filter_map(journal));
        if let Some(text) = self.server_message() {
            sections.push(HtmlSection::Verbatim {
                heading: "What the server said".to_owned(),
                text,
            });
        }
        let mut lines = vec![self.certainty()];
        lines.extend(self.caveats().map(|caveat| format!("{caveat}.")));
        sections.push(HtmlSection::Text {
            heading: "How sure this is".to_owned(),
            lines,
        });
        html_page(&HtmlPage {
            title: self.headline(),
            facts,
            alarms: Vec::new(),
            diagram: self.diagram(),
            sections,
        })
    }

    /// The waits as the text of a [Mermaid](https://mermaid.js.org) flowchart, for Markdown and chat programs that render
    /// it.
    ///
    /// An arrow leads from a waiter to a blocker, dashed if the blocker was only ahead in the queue.
    #[must_use]
    pub fn to_mermaid(&self) -> String {
        self.diagram().mermaid()
    }

    /// The waits as a directed graph in DOT, the language of Graphviz: `dot -Tsvg` draws it.
    ///
    /// An arrow leads from a waiter to a blocker, dashed if the blocker was only ahead in the queue.
    #[must_use]
    pub fn to_dot(&self) -> String {
        self.diagram().dot()
    }

    /// The parent of each participant: one of its blockers, a holder of the lock if possible, that is not its descendant.
    fn parents(&self) -> Vec<Option<usize>> {
        let mut parents: Vec<Option<usize>> = vec![None; self.participants().len()];
        for waiter in 0..parents.len() {
            let mut edges: Vec<_> = self.edges_of(waiter).collect();
            edges.sort_by_key(|edge| edge.is_soft());
            let blockers = edges
                .iter()
                .filter_map(|edge| self.position(edge.blocker()));
            parents[waiter] = blockers.into_iter().find(|blocker| {
                let mut at = Some(*blocker);
                while let Some(other) = at.filter(|other| *other != waiter) {
                    at = parents[other];
                }
                at.is_none()
            });
        }
        parents
    }

    fn edges_of(&self, position: usize) -> impl Iterator<Item = &IncidentEdge> {
        let id = self.participants()[position].id();
        let edges = self.edges().iter();
        edges.filter(move |edge| Some(edge.waiter()) == id)
    }

    fn diagram(&self) -> Diagram {
        let parents = self.parents();
        let mut children = vec![Vec::new(); parents.len()];
        let mut roots = Vec::new();
        for (at, parent) in parents.iter().enumerate() {
            match parent {
                Some(parent) => children[*parent].push(at),
                None => roots.push(at),
            }
        }
        Diagram::from_forest(
            &roots,
            &children,
            |at| self.node(&self.participants()[at], at),
            |at| {
                let arrows = self
                    .edges_of(at)
                    .filter_map(|edge| Some(arrow(edge, at, self.position(edge.blocker())?)));
                arrows.collect()
            },
            |group, parent| {
                let s = if group.total == 1 { "" } else { "s" };
                let name = format!("{} more session{s}", group.total);
                let hint = format!("{name} behind {parent}");
                (name, Vec::new(), hint)
            },
        )
    }

    fn node(&self, participant: &Participant, at: usize) -> Node {
        let mut lines = Vec::new();
        lines.extend(wording::call_site(participant).map(TextLine::keeping_end));
        lines.extend(state(participant).map(TextLine::new));
        let waits = self.edges_of(at).next();
        if let Some(edge) = waits {
            lines.push(TextLine::new(waited(edge)));
            lines.push(TextLine::keeping_end(format!(
                "on {}",
                wording::object(edge)
            )));
        }
        lines.extend(participant.statement().map(TextLine::new));
        let mut members = self.cycle().iter().map(|edge| Some(edge.waiter()));
        Node {
            name: name(participant),
            badge: participant.is_victim().then(|| "victim".to_owned()),
            lines,
            style: if waits.is_none() && !participant.is_victim() {
                NodeStyle::Root
            } else {
                NodeStyle::Waiter
            },
            in_cycle: members.any(|member| member == participant.id()),
            hidden: participant.is_hidden()
                || participant.seen_after().is_none() && !participant.is_in_this_process(),
            parent: None,
            row: Some(format!("s{at}")),
        }
    }

    fn table(&self) -> HtmlTable {
        let participants = self.participants().iter().enumerate();
        let rows = participants.map(|(at, participant)| HtmlRow {
            id: Some(format!("s{at}")),
            depth: 0,
            marked: participant.is_victim(),
            cells: self.cells(participant, at),
        });
        HtmlTable {
            heading: "Who took part".to_owned(),
            columns: vec![
                "Session",
                "Application",
                "State",
                "Waited for",
                "In its way",
                "Statement, running or last",
            ],
            rows: rows.collect(),
        }
    }

    fn cells(&self, participant: &Participant, at: usize) -> Vec<HtmlCell> {
        let mut session = vec![name(participant)];
        if participant.is_victim() {
            session.push("the victim".to_owned());
        }
        if participant.is_in_this_process() {
            session.push("in this process".to_owned());
        }
        let text = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
        let mut application = Vec::from_iter(text(participant.application_name()));
        let site = participant.call_site();
        application.extend(text(
            site.filter(|site| !application.iter().any(|name| name.ends_with(site))),
        ));
        application.extend(match (participant.user(), participant.database()) {
            (Some(user), Some(database)) => Some(format!("{user} @ {database}")),
            (user, database) => text(user.or(database)),
        });
        application.extend(text(participant.client_address()));
        let kind = text(participant.backend_type());
        application.extend(kind.filter(|kind| kind != "client backend"));
        if let Some(key) = participant.conflict_group() {
            application.push(format!("conflict group {key}"));
        }
        let mut doing = Vec::from_iter(state(participant));
        if let Some(age) = participant.transaction_age() {
            doing.push(format!("in its transaction for {}", wording::age(age)));
        }
        let mut waits = Vec::new();
        let mut blockers = Vec::new();
        let mut edges = self.edges_of(at);
        for edge in edges.by_ref().take(MAX_NAMED) {
            if waits.is_empty() {
                waits = vec![waited(edge), format!("on {}", wording::object(edge))];
            }
            blockers.push(blocker_mode(edge));
        }
        match edges.count() {
            0 => {}
            more => blockers.push(format!("and {more} more")),
        }
        let statement = match participant.statement() {
            Some(statement) => wording::one_line(statement, MAX_STATEMENT),
            None if participant.is_hidden() => "hidden from this role".to_owned(),
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

    /// The parts of the server's message that may be shown.
    fn server_message(&self) -> Option<String> {
        let sqlstate = self.sqlstate()?;
        let message = self.message().unwrap_or("(a message that may carry data)");
        let mut text = format!("{sqlstate} {message}");
        for (name, part) in wording::details(self) {
            text.push_str(&format!("\n\n{name}\n{part}"));
        }
        Some(text)
    }
}

fn arrow(edge: &IncidentEdge, waiter: usize, blocker: usize) -> Arrow {
    let mode = edge.mode_held().or_else(|| edge.mode_queued());
    Arrow {
        waiter,
        blocker,
        label: mode.map(str::to_owned).unwrap_or_default(),
        hint: format!(
            "{} {} on {}: {}",
            edge.waiter(),
            waited(edge),
            wording::object(edge),
            blocker_mode(edge)
        ),
        soft: edge.is_soft(),
        in_cycle: edge.is_in_cycle(),
    }
}

fn name(participant: &Participant) -> String {
    // The diagnosis calls it by its letter.
    format!("{}: {}", participant.letter(), wording::id(participant))
}

fn state(participant: &Participant) -> Option<String> {
    let hidden = || (participant.is_hidden()).then(|| "state hidden from this role".to_owned());
    wording::state(participant).or_else(hidden)
}

fn waited(edge: &IncidentEdge) -> String {
    match edge.wait_age() {
        Some(age) => format!("waited {} for {}", wording::age(age), edge.mode_wanted()),
        None => format!("waited for {}", edge.mode_wanted()),
    }
}

/// `pid 12 held ExclusiveLock`
fn blocker_mode(edge: &IncidentEdge) -> String {
    let name = edge.blocker();
    match (edge.mode_held(), edge.mode_queued()) {
        (Some(mode), _) => format!("{name} held {mode}"),
        (_, Some(mode)) => format!("{name} was ahead, for {mode}"),
        _ if edge.is_soft() => format!("{name} was ahead"),
        _ => name.to_string(),
    }
}

/// The whole journal, not shortened as in the text.
fn journal(participant: &Participant) -> Option<HtmlSection> {
    let lines = participant.journal();
    if lines.is_empty() {
        return None;
    }
    let mut rows = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        if at == participant.journal_gap && participant.journal_dropped() > 0 {
            let text = format!(
                "… {} that are no longer known",
                participant.journal_dropped()
            );
            rows.push(HtmlRow {
                cells: vec![
                    HtmlCell::default(),
                    HtmlCell::default(),
                    HtmlCell::default(),
                    HtmlCell::new(text),
                ],
                ..HtmlRow::default()
            });
        }
        let mark = match line.mark() {
            Some(JournalMark::Took) => "took a lock others waited for",
            Some(JournalMark::MayHaveTaken) => "may have taken a lock others waited for",
            Some(JournalMark::Waited) => "waited",
            None => "",
        };
        rows.push(HtmlRow {
            cells: vec![
                HtmlCell::new(format!("+{}", wording::age(line.after()))),
                HtmlCell::new(wording::took(line)),
                HtmlCell::new(mark),
                HtmlCell::code(wording::statement(line, MAX_STATEMENT)),
            ],
            marked: line.mark().is_some(),
            ..HtmlRow::default()
        });
    }
    Some(HtmlSection::Collapsible(HtmlTable {
        heading: format!(
            "The transaction of {} until then",
            wording::name(participant)
        ),
        columns: vec!["Begun", "Took", "", "Statement"],
        rows,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::IncidentTrigger;
    use super::super::testing::*;
    use super::*;
    use crate::graph::LockObject;

    #[test]
    fn a_deadlock_is_drawn_as_a_cycle() {
        let incident = report(transfers());
        let diagram = incident.diagram();
        assert_eq!(diagram.nodes.len(), 2);
        assert_eq!(diagram.arrows.len(), 2);
        assert!(
            diagram
                .arrows
                .iter()
                .all(|arrow| arrow.in_cycle && !arrow.soft)
        );
        assert!(diagram.nodes.iter().all(|node| node.in_cycle));
        let page = incident.to_html();
        for text in [
            "<h1>Deadlock on public.account: src/transfer.rs:41 and src/refund.rs:17 waited for one another</h1>",
            "on row id = 2 of public.account",
            "pid 12 held ExclusiveLock",
            "To do: Lock the rows of public.account in one order",
            "<summary>The transaction of B until then</summary>",
            "while updating tuple (0,2) in relation &quot;account&quot;",
            "The whole cycle was seen 960ms after the victim&#39;s statement began.",
        ] {
            assert!(page.contains(text), "{text}\n{page}");
        }
        assert!(
            incident
                .to_mermaid()
                .contains("s1 -->|\"ExclusiveLock\"| s0")
        );
        assert!(
            incident
                .to_dot()
                .contains("s1 -> s0 [label=\"ExclusiveLock\"")
        );
    }

    #[test]
    fn a_wait_is_drawn_below_its_holder() {
        let users = LockObject::Relation(account());
        let sample = TestServer::default()
            .session(21, "reader <x>", "active", "SELECT 'secret'")
            .session(22, "alter", "active", "ALTER TABLE account ADD x int")
            .session(23, "report", "idle in transaction", "SELECT 1")
            .holds(23, &users, "AccessShareLock")
            .waits(22, &users, "AccessExclusiveLock", 2000, &[23])
            .waits(21, &users, "AccessShareLock", 1000, &[22])
            .sample(960, Vec::new());
        let mut evidence = evidence(IncidentTrigger::LongWait);
        evidence.victim.pid = Some(21);
        evidence.samples = vec![sample];
        let incident = report(evidence);
        let diagram = incident.diagram();
        let parents: Vec<_> = diagram
            .nodes
            .iter()
            .map(|node| (node.name.as_str(), node.parent))
            .collect();
        assert_eq!(
            parents,
            [
                ("C: pid 23", None),
                ("B: pid 22", Some(0)),
                ("A: pid 21", Some(1))
            ]
        );
        assert_eq!(diagram.nodes[0].style, NodeStyle::Root);
        assert_eq!(diagram.nodes[2].badge.as_deref(), Some("victim"));
        let soft: Vec<_> = diagram.arrows.iter().map(|arrow| arrow.soft).collect();
        assert_eq!(soft, [false, true]);
        let page = incident.to_html();
        assert!(!page.contains("secret") && !page.contains("<x>"));
    }

    #[test]
    fn a_page_needs_no_sample() {
        let incident = report(evidence(IncidentTrigger::LockTimeout));
        assert!(
            incident
                .to_html()
                .contains("Nothing was seen while it lasted.")
        );
        assert!(incident.to_dot().starts_with("digraph"));
    }
}
