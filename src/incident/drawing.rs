//! The report as a picture: Mermaid, DOT and HTML.

use std::collections::HashSet;

use crate::picture::{
    Card, Cell, Line, Link, Look, Page, Picture, Row, Section, Table, choose, page, without_implied,
};

use super::{Incident, IncidentEdge, JournalMark, Participant, words};

/// Of those in a waiter's way, the ones its row names.
const MOST_NAMED: usize = 4;
/// Characters of a statement.
const STATEMENT: usize = 800;

impl Incident {
    /// A page of HTML for people: who waited for whom, drawn, and below it why, who took part, what each of them had
    /// run, and what the server said.
    ///
    /// It is one file that needs nothing else: no script, no network, no fonts; light or dark as the reader's browser
    /// asks for. There is in it what [`Display`](std::fmt::Display) shows, literals only where those were asked for.
    /// Every text is escaped, whatever is in it.
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
        facts.push(self.sightings_line());
        let mut sections = Vec::new();
        let diagnosis = self.diagnosis();
        let mut lines = vec![diagnosis.text().to_owned()];
        lines.extend(diagnosis.fix().map(|fix| format!("To do: {fix}")));
        sections.push(Section::Text {
            heading: self.why_heading(),
            lines,
        });
        sections.push(Section::Table(self.table()));
        sections.extend(self.participants().iter().filter_map(journal));
        if let Some(text) = self.said() {
            sections.push(Section::Verbatim {
                heading: "What the server said".to_owned(),
                text,
            });
        }
        let mut lines = vec![self.certainty()];
        lines.extend(self.missing().map(|missing| format!("{missing}.")));
        sections.push(Section::Text {
            heading: "How sure this is".to_owned(),
            lines,
        });
        page(&Page {
            title: self.headline(),
            facts,
            alarms: Vec::new(),
            picture: self.drawing(),
            sections,
        })
    }

    /// Who waited for whom, as the text of a [Mermaid](https://mermaid.js.org) flowchart, for Markdown and chat programs
    /// that draw such.
    ///
    /// An arrow leads from a waiter to one in its way, dashed where that one only queued ahead.
    #[must_use]
    pub fn to_mermaid(&self) -> String {
        self.drawing().mermaid()
    }

    /// Who waited for whom, as a directed graph in DOT, the language of Graphviz: `dot -Tsvg` draws it.
    ///
    /// An arrow leads from a waiter to one in its way, dashed where that one only queued ahead.
    #[must_use]
    pub fn to_dot(&self) -> String {
        self.drawing().dot()
    }

    fn place(&self, edge_end: &crate::graph::BackendId) -> Option<usize> {
        let mut participants = self.participants().iter();
        participants.position(|participant| participant.id() == Some(edge_end))
    }

    /// Of each participant the one it stands beside: one that held what it waited for, and does not stand beside it
    /// itself.
    fn above(&self) -> Vec<Option<usize>> {
        let mut above: Vec<Option<usize>> = vec![None; self.participants().len()];
        for waiter in 0..above.len() {
            let mut edges: Vec<_> = self.edges_of(waiter).collect();
            edges.sort_by_key(|edge| edge.is_soft());
            let blockers = edges.iter().filter_map(|edge| self.place(edge.blocker()));
            above[waiter] = blockers.into_iter().find(|blocker| {
                let mut at = Some(*blocker);
                while let Some(other) = at.filter(|other| *other != waiter) {
                    at = above[other];
                }
                at.is_none()
            });
        }
        above
    }

    fn edges_of(&self, place: usize) -> impl Iterator<Item = &IncidentEdge> {
        let id = self.participants()[place].id();
        let edges = self.edges().iter();
        edges.filter(move |edge| Some(edge.waiter()) == id)
    }

    fn drawing(&self) -> Picture {
        let above = self.above();
        let mut below = vec![Vec::new(); above.len()];
        let mut roots = Vec::new();
        for (at, above) in above.iter().enumerate() {
            match above {
                Some(above) => below[*above].push(at),
                None => roots.push(at),
            }
        }
        let chosen = choose(&roots, &below);
        let card_of = |at: usize| chosen.nodes.iter().position(|node| *node == at);
        let mut picture = Picture {
            sessions_left_out: chosen.folds.iter().map(|fold| fold.all).sum(),
            ..Picture::default()
        };
        for (place, at) in chosen.nodes.iter().enumerate() {
            let participant = &self.participants()[*at];
            let above = above[*at].and_then(card_of);
            picture.cards.push(self.card(participant, *at, above));
            let mut linked = HashSet::new();
            for edge in self.edges_of(*at) {
                if let Some(blocker) = self.place(edge.blocker()).and_then(card_of)
                    && linked.insert(blocker)
                {
                    picture.links.push(self.link(edge, place, blocker));
                }
            }
        }
        let above: Vec<_> = picture.cards.iter().map(|card| card.above).collect();
        picture.links_left_out = without_implied(&mut picture.links, |link| {
            link.in_circle || above[link.waiter] == Some(link.blocker)
        });
        for fold in &chosen.folds {
            let s = if fold.all == 1 { "" } else { "s" };
            let name = format!("{} more session{s}", fold.all);
            let above = fold.above.and_then(card_of);
            if let Some(blocker) = above {
                picture.links.push(Link {
                    waiter: picture.cards.len(),
                    blocker,
                    label: String::new(),
                    hint: format!("{name} behind {}", picture.cards[blocker].name),
                    soft: false,
                    in_circle: false,
                });
            }
            picture.cards.push(Card {
                name,
                look: Look::Fold,
                above,
                ..Card::default()
            });
        }
        picture
    }

    fn card(&self, participant: &Participant, at: usize, above: Option<usize>) -> Card {
        let mut lines = Vec::new();
        lines.extend(words::place(participant).map(Line::keeping_end));
        lines.extend(state(participant).map(Line::new));
        let waits = self.edges_of(at).next();
        if let Some(edge) = waits {
            lines.push(Line::new(waited(edge)));
            lines.push(Line::keeping_end(format!("on {}", words::thing(edge))));
        }
        lines.extend(participant.statement().map(Line::new));
        let in_circle = self.cycle().iter();
        let mut in_circle = in_circle.map(|edge| Some(edge.waiter()));
        Card {
            name: name(participant),
            badge: participant.is_victim().then(|| "victim".to_owned()),
            lines,
            look: if waits.is_none() && !participant.is_victim() {
                Look::Root
            } else {
                Look::Waiter
            },
            in_circle: in_circle.any(|waiter| waiter == participant.id()),
            hidden: participant.is_hidden()
                || participant.seen_after().is_none() && !participant.is_in_this_process(),
            above,
            row: Some(format!("s{at}")),
        }
    }

    fn link(&self, edge: &IncidentEdge, waiter: usize, blocker: usize) -> Link {
        let mode = edge.mode_held().or_else(|| edge.mode_queued());
        Link {
            waiter,
            blocker,
            label: mode.map(str::to_owned).unwrap_or_default(),
            hint: format!(
                "{} {} on {}: {}",
                edge.waiter(),
                waited(edge),
                words::thing(edge),
                in_the_way(edge)
            ),
            soft: edge.is_soft(),
            in_circle: edge.is_in_cycle(),
        }
    }

    fn table(&self) -> Table {
        let participants = self.participants().iter().enumerate();
        let rows = participants.map(|(at, participant)| Row {
            id: Some(format!("s{at}")),
            depth: 0,
            marked: participant.is_victim(),
            cells: self.cells(participant, at),
        });
        Table {
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

    fn cells(&self, participant: &Participant, at: usize) -> Vec<Cell> {
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
            doing.push(format!("in its transaction for {}", words::age(age)));
        }
        let mut waits = Vec::new();
        let mut blockers = Vec::new();
        let mut edges = self.edges_of(at);
        for edge in edges.by_ref().take(MOST_NAMED) {
            if waits.is_empty() {
                waits = vec![waited(edge), format!("on {}", words::thing(edge))];
            }
            blockers.push(in_the_way(edge));
        }
        match edges.count() {
            0 => {}
            more => blockers.push(format!("and {more} more")),
        }
        let statement = match participant.statement() {
            Some(statement) => words::short(statement, STATEMENT),
            None if participant.is_hidden() => "hidden from this role".to_owned(),
            None => String::new(),
        };
        vec![
            Cell::lines(session),
            Cell::lines(application),
            Cell::lines(doing),
            Cell::lines(waits),
            Cell::lines(blockers),
            Cell::code(statement),
        ]
    }

    /// What the server said, as far as it may be shown.
    fn said(&self) -> Option<String> {
        let sqlstate = self.sqlstate()?;
        let message = self.message().unwrap_or("(a message that may carry data)");
        let mut text = format!("{sqlstate} {message}");
        for (name, part) in [("DETAIL", self.detail()), ("CONTEXT", self.context())] {
            if let Some(part) = part {
                text.push_str(&format!("\n\n{name}\n{part}"));
            }
        }
        Some(text)
    }
}

fn name(participant: &Participant) -> String {
    match participant.id() {
        Some(id) => id.to_string(),
        None => "the victim".to_owned(),
    }
}

fn state(participant: &Participant) -> Option<String> {
    match (participant.state(), participant.state_age()) {
        (Some(state), Some(age)) => Some(format!("{state} for {}", words::age(age))),
        (Some(state), None) => Some(state.to_owned()),
        (None, _) if participant.is_hidden() => Some("state hidden from this role".to_owned()),
        (None, _) => None,
    }
}

fn waited(edge: &IncidentEdge) -> String {
    match edge.wait_age() {
        Some(age) => format!("waited {} for {}", words::age(age), edge.mode_wanted()),
        None => format!("waited for {}", edge.mode_wanted()),
    }
}

fn in_the_way(edge: &IncidentEdge) -> String {
    let name = edge.blocker();
    match (edge.mode_held(), edge.mode_queued()) {
        (Some(mode), _) => format!("{name} held {mode}"),
        (_, Some(mode)) => format!("{name} was ahead, for {mode}"),
        _ if edge.is_soft() => format!("{name} was ahead"),
        _ => name.to_string(),
    }
}

/// All that is known of it: unlike in the text there is room.
fn journal(participant: &Participant) -> Option<Section> {
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
            rows.push(Row {
                cells: vec![
                    Cell::default(),
                    Cell::default(),
                    Cell::default(),
                    Cell::new(text),
                ],
                ..Row::default()
            });
        }
        let mark = match line.mark() {
            Some(JournalMark::Took) => "took a lock others waited for",
            Some(JournalMark::MayHaveTaken) => "may have taken a lock others waited for",
            Some(JournalMark::Waited) => "waited",
            None => "",
        };
        let took = match (line.failed(), line.took()) {
            (true, _) => "failed".to_owned(),
            (false, Some(took)) => words::age(took),
            (false, None) => "open".to_owned(),
        };
        let locks: Vec<_> = line
            .advisory()
            .map(|(key, mode)| format!("{key} in {mode}"))
            .collect();
        let text = match line.text() {
            Some(text) => words::short(text, STATEMENT),
            None if !locks.is_empty() => format!("(advisory lock {})", locks.join(", ")),
            None => "(a statement whose text is not known)".to_owned(),
        };
        rows.push(Row {
            cells: vec![
                Cell::new(format!("+{}", words::age(line.after()))),
                Cell::new(took),
                Cell::new(mark),
                Cell::code(text),
            ],
            marked: line.mark().is_some(),
            ..Row::default()
        });
    }
    Some(Section::Folded(Table {
        heading: format!("The transaction of {} until then", words::who(participant)),
        columns: vec!["Begun", "Took", "", "Statement"],
        rows,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::super::testing::*;
    use super::*;
    use crate::graph::LockObject;

    #[test]
    fn a_deadlock_is_drawn_as_a_circle() {
        let incident = report(transfers());
        let picture = incident.drawing();
        assert_eq!(picture.cards.len(), 2);
        assert_eq!(picture.links.len(), 2);
        assert!(
            picture
                .links
                .iter()
                .all(|link| link.in_circle && !link.soft)
        );
        assert!(picture.cards.iter().all(|card| card.in_circle));
        let page = incident.to_html();
        for text in [
            "<h1>Deadlock on public.account: src/transfer.rs:41 and src/refund.rs:17 waited for one another</h1>",
            "on row id = 2 of public.account",
            "pid 12 held ExclusiveLock",
            "To do: Lock the rows of public.account in one order",
            "<summary>The transaction of pid 12 (src/refund.rs:17) until then</summary>",
            "while updating tuple (0,2) in relation &quot;account&quot;",
            "The whole circle was seen 960ms after the victim&#39;s statement began.",
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
        let look = Server::default()
            .session(21, "reader <x>", "active", "SELECT 'secret'")
            .session(22, "alter", "active", "ALTER TABLE account ADD x int")
            .session(23, "report", "idle in transaction", "SELECT 1")
            .holds(23, &users, "AccessShareLock")
            .waits(22, &users, "AccessExclusiveLock", 2000, &[23])
            .waits(21, &users, "AccessShareLock", 1000, &[22])
            .look(960, Vec::new());
        let mut evidence = evidence(Kind::LongWait);
        evidence.victim.pid = Some(21);
        evidence.looks = vec![look];
        let incident = report(evidence);
        let picture = incident.drawing();
        let above: Vec<_> = picture
            .cards
            .iter()
            .map(|card| (card.name.as_str(), card.above))
            .collect();
        assert_eq!(
            above,
            [("pid 23", None), ("pid 22", Some(0)), ("pid 21", Some(1))]
        );
        assert_eq!(picture.cards[0].look, Look::Root);
        assert_eq!(picture.cards[2].badge.as_deref(), Some("victim"));
        let soft: Vec<_> = picture.links.iter().map(|link| link.soft).collect();
        assert_eq!(soft, [false, true]);
        let page = incident.to_html();
        assert!(!page.contains("secret") && !page.contains("<x>"));
    }

    #[test]
    fn nothing_known_is_a_page_too() {
        let incident = report(evidence(Kind::LockTimeout));
        assert!(
            incident
                .to_html()
                .contains("Nothing was seen while it lasted.")
        );
        assert!(incident.to_dot().starts_with("digraph"));
    }
}
