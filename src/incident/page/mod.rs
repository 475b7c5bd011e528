//! The report as a page for people.

mod paper;

use std::collections::HashSet;
use std::fmt;

use crate::graph::BackendId;

use super::{
    Incident, IncidentEdge, IncidentKind, JournalLine, JournalMark, Outcome, Participant, Quality,
    words,
};
use paper::Paper;

/// Participants that are described, and edges that are drawn.
const MOST_DESCRIBED: usize = 10;
const MOST_DRAWN: usize = 30;
/// Deeper edges are not moved further to the right.
const DEEPEST: usize = 8;
/// Characters of a statement, and of one in a journal.
const STATEMENT: usize = 800;
const JOURNAL_STATEMENT: usize = 240;
/// Of a long journal the first and the last lines are shown, and those that are marked.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 20;

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut paper = Paper::default();
        self.headline(&mut paper);
        self.picture(&mut paper);
        self.why(&mut paper);
        for participant in self.participants().iter().take(MOST_DESCRIBED) {
            self.describe(&mut paper, participant);
        }
        if let Some(more) = self
            .participants()
            .get(MOST_DESCRIBED..)
            .filter(|more| !more.is_empty())
        {
            let names: Vec<_> = more.iter().map(words::who).collect();
            paper.heading("THE OTHERS");
            paper.write("  ", "  ", &names.join(", "));
        }
        self.server(&mut paper);
        self.how_sure(&mut paper);
        f.write_str(paper.text().trim_end())
    }
}

impl Incident {
    fn headline(&self, paper: &mut Paper) {
        let kind = match self.kind() {
            IncidentKind::Deadlock => "Deadlock",
            IncidentKind::HiddenDeadlock => "Deadlock, hidden by a timeout",
            IncidentKind::LockTimeout => "Lock timeout",
            IncidentKind::LongWait => "Long wait",
        };
        let mut text = kind.to_owned();
        let circle = self.cycle();
        if circle.is_empty() {
            if let Some(age) = self.victim().wait_age() {
                text.push_str(&format!(" after {}", words::age(age)));
            }
            let direct = self.edges().iter();
            let direct = direct.filter(|edge| Some(edge.waiter()) == self.victim().id());
            let mut direct: Vec<_> = direct.collect();
            direct.sort_by_key(|edge| edge.is_soft());
            if let Some(edge) = direct.first() {
                let blocker = self
                    .participant(edge.blocker())
                    .map(words::who)
                    .unwrap_or_default();
                let others = match direct.len() {
                    1 => String::new(),
                    more => format!(" and {} more", more - 1),
                };
                text.push_str(&format!(
                    " on {}: {} waited for {blocker}{others}",
                    words::thing(edge),
                    words::who(self.victim()),
                ));
            } else {
                text.push_str(&format!(" of {}", words::who(self.victim())));
            }
        } else {
            let mut subjects: Vec<_> = circle
                .iter()
                .filter(|edge| edge.relation().is_some() || edge.object().advisory_key().is_some())
                .map(words::subject)
                .collect();
            subjects.sort();
            subjects.dedup();
            if !subjects.is_empty() {
                text.push_str(&format!(" on {}", subjects.join(", ")));
            }
            let members = circle
                .iter()
                .filter_map(|edge| self.participant(edge.waiter()));
            let names: Vec<_> = members
                .map(|member| words::place(member).unwrap_or_else(|| words::who(member)))
                .collect();
            text.push_str(&format!(": {} waited for one another", names.join(" and ")));
        }
        paper.write("", "  ", &text);
        let outcome = match self.outcome() {
            Outcome::Retried { pause } => format!("retried after {}", words::age(pause)),
            Outcome::GaveUp => "given up".to_owned(),
            Outcome::NotRetried => "not retried".to_owned(),
            Outcome::StillWaiting => "still waiting".to_owned(),
        };
        let text = format!(
            "{}, attempt {} of {}, {outcome}",
            words::timestamp(self.occurred()),
            self.attempt(),
            self.attempts()
        );
        paper.write("", "  ", &text);
    }

    fn picture(&self, paper: &mut Paper) {
        if self.edges().is_empty() {
            return;
        }
        paper.heading("WHO WAITED FOR WHOM");
        paper.write(
            "  ",
            "  ",
            &format!("{}{}", words::who(self.victim()), ", the victim"),
        );
        let mut picture = Picture {
            incident: self,
            drawn: 0,
            known: self.victim().id().into_iter().collect(),
        };
        if let Some(id) = self.victim().id() {
            picture.draw(paper, id, "  ", 0);
        }
        let left = self.edges().len() - picture.drawn;
        if left > 0 {
            paper.write("  ", "  ", &format!("and {left} more"));
        }
    }

    fn describe(&self, paper: &mut Paper, participant: &Participant) {
        let name = words::who(participant);
        let mut heading = match name.strip_prefix("pid ") {
            Some(rest) => format!("PID {rest}"),
            None => name,
        };
        if participant.is_victim() {
            heading.push_str(", the victim");
        }
        if participant.is_in_this_process() {
            heading.push_str(", in this process");
        }
        let was_seen = participant.seen_after().is_some();
        if !was_seen && !participant.is_in_this_process() {
            heading.push_str(", not seen");
        }
        if participant.is_hidden() {
            heading.push_str(", partly hidden from this role");
        }
        paper.heading(&heading);
        let mut who = Vec::new();
        let mut add = |what: &str, value: Option<&str>, quote: &str| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                who.push(format!("{what} {quote}{value}{quote}"));
            }
        };
        add("user", participant.user(), "");
        add("database", participant.database(), "");
        add("client", participant.client_address(), "");
        add("application", participant.application_name(), "\"");
        let kind = participant.backend_type();
        add("a", kind.filter(|kind| *kind != "client backend"), "");
        if !who.is_empty() {
            paper.write("  ", "  ", &who.join(", "));
        }
        let mut state = Vec::new();
        match (participant.state(), participant.in_state()) {
            (Some(what), Some(age)) => state.push(format!("{what} for {}", words::age(age))),
            (Some(what), None) => state.push(what.to_owned()),
            _ => {}
        }
        if let Some(age) = participant.transaction_age() {
            state.push(format!("in its transaction for {}", words::age(age)));
        }
        if let Some(age) = participant.wait_age() {
            state.push(format!("waited {} for a lock", words::age(age)));
        }
        if !state.is_empty() {
            paper.write("  ", "  ", &state.join(", "));
        }
        if let Some(statement) = participant.statement() {
            let verb = if participant.is_waiting() || participant.state() == Some("active") {
                "  ran: "
            } else {
                "  last ran: "
            };
            paper.write(verb, "    ", &words::short(statement, STATEMENT));
        }
        self.held(paper, participant);
        journal(paper, participant);
    }

    /// What it held that others waited for.
    fn held(&self, paper: &mut Paper, participant: &Participant) {
        let edges = self.edges().iter();
        let edges =
            edges.filter(|edge| Some(edge.blocker()) == participant.id() && !edge.is_soft());
        let mut held: Vec<_> = edges
            .map(|edge| match edge.mode_held() {
                Some(mode) if edge.row().is_none() => format!("{} in {mode}", words::thing(edge)),
                _ => words::thing(edge),
            })
            .collect();
        held.sort();
        held.dedup();
        if held.is_empty() {
            return;
        }
        paper.write("  ", "    ", &format!("held {}", held.join(", ")));
        if let Some(key) = participant.conflict_group() {
            paper.write("  ", "    ", &format!("in the conflict group {key}"));
        }
        let is_marked = |line: &JournalLine| {
            matches!(
                line.mark(),
                Some(JournalMark::Took | JournalMark::MayHaveTaken)
            )
        };
        if participant.is_in_this_process() && !participant.journal().iter().any(is_marked) {
            let how = if participant.journal_dropped() > 0 {
                "with a statement that is no longer known, or"
            } else {
                "with none of the statements below that names it:"
            };
            let text = format!("{how} a trigger, a foreign key, a view or a function may have");
            paper.write("    ", "    ", &text);
        }
    }

    fn server(&self, paper: &mut Paper) {
        let Some(sqlstate) = self.sqlstate() else {
            return;
        };
        paper.heading("WHAT THE SERVER SAID");
        let message = self.message().unwrap_or("(a message that may carry data)");
        paper.lines(
            "  ",
            "    ",
            &format!("{} {message}", words::plain(sqlstate)),
        );
        for (name, text) in [("DETAIL", self.detail()), ("CONTEXT", self.context())] {
            if let Some(text) = text {
                paper.lines(&format!("  {name:7}  "), "           ", text);
            }
        }
    }

    fn why(&self, paper: &mut Paper) {
        let diagnosis = self.diagnosis();
        let probably = if diagnosis.is_certain() || diagnosis.cause() == super::Cause::Unknown {
            ""
        } else {
            "probably "
        };
        paper.heading(&format!("WHY: {probably}{}", diagnosis.cause()));
        paper.write("  ", "  ", diagnosis.text());
        if let Some(fix) = diagnosis.fix() {
            paper.write("  To do: ", "    ", fix);
        }
    }

    fn how_sure(&self, paper: &mut Paper) {
        paper.heading("HOW SURE THIS IS");
        let when = match self.captured_after() {
            Some(after) => format!(" {} after the victim's statement began", words::age(after)),
            None => String::new(),
        };
        let is_circle = !self.cycle().is_empty();
        let text = match self.quality() {
            Quality::Complete if is_circle => format!("The whole circle was seen{when}."),
            Quality::Complete => format!("All that was in the way was seen{when}."),
            Quality::Partial if is_circle => {
                format!(
                    "Part of the circle was seen{when}; the rest of it is from the server's DETAIL."
                )
            }
            Quality::Partial => {
                format!("The victim's wait was seen{when}, but not what closed the circle.")
            }
            Quality::DetailOnly => {
                "Nothing was seen while it lasted: who waited for whom is from the server's DETAIL."
                    .to_owned()
            }
            Quality::Nothing => "Nothing was seen while it lasted.".to_owned(),
        };
        paper.write("  ", "  ", &text);
        for missing in self.missing() {
            paper.write("  - ", "    ", missing);
        }
        let mut text = format!("Fingerprint {}, ", self.fingerprint());
        match self.previously_seen() {
            Some(previous) => text.push_str(&format!(
                "seen {} times since {}, last at {} before this one",
                self.count(),
                words::timestamp(self.first_seen()),
                words::timestamp(previous),
            )),
            None => text.push_str("seen for the first time"),
        }
        paper.heading(&text);
    }
}

/// Draws edges from the victim on.
struct Picture<'a> {
    incident: &'a Incident,
    drawn: usize,
    known: HashSet<&'a BackendId>,
}

impl<'a> Picture<'a> {
    fn draw(&mut self, paper: &mut Paper, waiter: &BackendId, indent: &str, depth: usize) {
        let edges = self
            .incident
            .edges()
            .iter()
            .filter(|edge| edge.waiter() == waiter);
        let edges: Vec<&'a IncidentEdge> = edges.collect();
        for (at, edge) in edges.iter().enumerate() {
            if self.drawn >= MOST_DRAWN {
                return;
            }
            self.drawn += 1;
            let (branch, below) = if at + 1 < edges.len() {
                ("├─ ", "│  ")
            } else {
                ("└─ ", "   ")
            };
            let hang = format!("{indent}{below}");
            let waited = edge
                .wait_age()
                .map(|age| format!(" {}", words::age(age)))
                .unwrap_or_default();
            let what = match at {
                0 => format!(
                    "waited{waited} for {} ({}),",
                    words::thing(edge),
                    words::lock(edge)
                ),
                _ if edge.object() == edges[0].object() => "and".to_owned(),
                _ => format!(
                    "and{waited} for {} ({}),",
                    words::thing(edge),
                    words::lock(edge)
                ),
            };
            let how = match (edge.mode_held(), edge.mode_queued()) {
                (Some(mode), _) => format!("held in {mode} by"),
                (_, Some(mode)) => format!("queued behind one that wanted {mode},"),
                _ if edge.is_soft() => "queued behind".to_owned(),
                _ => "held by".to_owned(),
            };
            let blocker = self.incident.participant(edge.blocker());
            let name = blocker.map(words::who).unwrap_or_default();
            let is_new = self.known.insert(edge.blocker());
            let note = if blocker.is_some_and(Participant::is_victim) {
                ": the circle is closed"
            } else if !is_new {
                ": see above"
            } else {
                ""
            };
            paper.write(
                &format!("{indent}{branch}"),
                &hang,
                &format!("{what} {how} {name}{note}"),
            );
            if is_new {
                let deeper = if depth < DEEPEST { &hang } else { indent };
                self.draw(paper, edge.blocker(), deeper, depth + 1);
            }
        }
    }
}

fn journal(paper: &mut Paper, participant: &Participant) {
    let lines = participant.journal();
    if lines.is_empty() {
        return;
    }
    paper.write("  ", "  ", "its transaction until then:");
    let mut skipped = participant.journal_dropped();
    let skip = |paper: &mut Paper, skipped: &mut usize| {
        if *skipped > 0 {
            paper.write("      ", "      ", &format!("… {skipped} statements"));
        }
        *skipped = 0;
    };
    for (at, line) in lines.iter().enumerate() {
        let is_shown = at < FIRST_LINES || at + LAST_LINES >= lines.len() || line.mark().is_some();
        if !is_shown {
            skipped += 1;
            continue;
        }
        skip(paper, &mut skipped);
        let mark = match line.mark() {
            Some(JournalMark::Took) => "took",
            Some(JournalMark::MayHaveTaken) => "took?",
            Some(JournalMark::Waited) => "waited",
            None => "",
        };
        let took = match (line.failed(), line.took()) {
            (true, _) => "failed".to_owned(),
            (false, Some(took)) => words::age(took),
            (false, None) => "open".to_owned(),
        };
        let after = format!("+{}", words::age(line.after()));
        let head = format!("    {mark:<6} {after:>9} {took:>8}  ");
        let hang = " ".repeat(paper::width(&head));
        let text = match (line.text(), line.advisory()) {
            (Some(text), _) => words::short(text, JOURNAL_STATEMENT),
            (None, Some((key, mode))) => format!("(advisory lock {key} in {mode})"),
            (None, None) => "(a statement whose text is not known)".to_owned(),
        };
        paper.write(&head, &hang, &text);
    }
    skip(paper, &mut skipped);
    let is_guess = |line: &JournalLine| line.mark() == Some(JournalMark::MayHaveTaken);
    if lines.iter().any(is_guess) {
        let text =
            "(took?: the first statement whose text names it and that takes such locks; a guess)";
        paper.write("    ", "    ", text);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;

    #[test]
    fn a_deadlock_in_one_process() {
        println!("{}", report(transfers()));
        panic!();
    }
}
