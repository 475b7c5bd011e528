//! The report as text.

mod text_wrap;
mod wait_tree;

use std::collections::HashSet;
use std::fmt;

use crate::error::is_cancelled;
use crate::graph::Relation;
use crate::key::LockKey;

use super::{
    Completeness, Incident, IncidentEdge, IncidentKind, JournalLine, JournalMark, Outcome,
    Participant, wording,
};
use text_wrap::WrappedText;

/// How many participants are described.
const MAX_DESCRIBED: usize = 10;
/// How many characters of a statement are shown, and of one in a journal.
const MAX_STATEMENT: usize = 800;
const MAX_JOURNAL_STATEMENT: usize = 240;
/// Of a long journal only the first, the last and the marked lines are shown.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 20;

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = WrappedText::default();
        self.head(&mut out);
        self.draw_waits(&mut out);
        self.why(&mut out);
        for participant in self.participants().iter().take(MAX_DESCRIBED) {
            self.describe(&mut out, participant);
        }
        if let Some(more) = self
            .participants()
            .get(MAX_DESCRIBED..)
            .filter(|more| !more.is_empty())
        {
            let names = more.iter().map(|participant| {
                let name = wording::full_name(participant);
                format!("{}: {name}", wording::name(participant))
            });
            out.heading("THE OTHERS");
            out.write("  ", "  ", &names.collect::<Vec<_>>().join(", "));
        }
        self.server(&mut out);
        self.certainty_section(&mut out);
        f.write_str(out.text().trim_end())
    }
}

impl Incident {
    /// The incident in one line, with the objects and participants: `Deadlock on public.account: src/transfer.rs:41 and
    /// src/refund.rs:17 waited for one another`. Sessions from one line of the program are counted: `three transactions of
    /// src/transfer.rs:41`. One without a name is called by its process id, and by its letter in the report.
    #[must_use]
    pub fn headline(&self) -> String {
        self.headline_with(&wording::site_or_id)
    }

    /// The headline, with this name for each participant.
    fn headline_with(&self, name: &dyn Fn(&Participant) -> String) -> String {
        let mut text = match self.kind() {
            IncidentKind::Deadlock => "Deadlock",
            IncidentKind::HiddenDeadlock => "Deadlock that a timeout hid",
            IncidentKind::LockTimeout if self.sqlstate().is_some_and(is_cancelled) => {
                "Cancelled lock wait"
            }
            IncidentKind::LockTimeout => "Lock timeout",
            IncidentKind::LongWait => "Long wait",
        }
        .to_owned();
        let members: Vec<_> = self
            .cycle()
            .iter()
            .filter_map(|edge| self.participant(edge.waiter()))
            .collect();
        if members.is_empty() {
            text.push_str(&self.headline_of_wait(name));
            return text;
        }
        let named = |edge: &&IncidentEdge| {
            edge.relation().is_some() || edge.object().advisory_key().is_some()
        };
        let mut subjects: Vec<_> = self
            .cycle()
            .iter()
            .filter(named)
            .map(wording::subject)
            .collect();
        subjects.sort();
        subjects.dedup();
        if !subjects.is_empty() {
            text.push_str(&format!(" on {}", subjects.join(", ")));
        }
        let names: Vec<_> = members.into_iter().map(name).collect();
        let names = wording::counted(&names);
        text.push_str(&format!(": {names} waited for one another"));
        text
    }

    fn headline_of_wait(&self, name: &dyn Fn(&Participant) -> String) -> String {
        let victim = name(self.victim());
        let age = self.victim().wait_age();
        let age = age.map(|age| format!(" of {}", wording::age(age)));
        let mut text = age.unwrap_or_default();
        let direct = self.edges().iter();
        let direct = direct.filter(|edge| Some(edge.waiter()) == self.victim().id());
        let direct: Vec<_> = direct.collect();
        let blockers: HashSet<_> = direct.iter().map(|edge| edge.blocker()).collect();
        // A holder rather than a session that is only ahead in the queue.
        match direct.iter().min_by_key(|edge| edge.is_soft()) {
            Some(edge) => {
                let blocker = self.participant(edge.blocker());
                let blocker = blocker.map(name).unwrap_or_default();
                let blocker = if blocker == victim {
                    "another transaction of that line".to_owned()
                } else {
                    blocker
                };
                let object = wording::object(edge);
                text.push_str(&format!(" on {object}: {victim} waited for {blocker}"));
                if blockers.len() > 1 {
                    text.push_str(&format!(" and {} more", blockers.len() - 1));
                }
            }
            None => text.push_str(&format!(": {victim}")),
        }
        text
    }

    fn head(&self, out: &mut WrappedText) {
        // Below, each session has a letter, and its process id stands once.
        let name = |who: &Participant| match (wording::call_site(who), who.id()) {
            (Some(site), _) => site,
            (None, Some(_)) => wording::name(who),
            (None, None) => wording::id(who),
        };
        out.write("", "  ", &self.headline_with(&name));
        out.write("", "  ", &self.attempt_line());
    }

    pub(super) fn attempt_line(&self) -> String {
        let outcome = match self.outcome() {
            Outcome::Retried { pause } => format!("retried after {}", wording::age(pause)),
            Outcome::GaveUp => "given up".to_owned(),
            Outcome::NotRetried => "not retried".to_owned(),
            Outcome::StillWaiting => "still waiting".to_owned(),
            Outcome::CaughtBySavepoint => "caught by a savepoint".to_owned(),
        };
        format!(
            "{}, attempt {} of {}, {outcome}",
            wording::timestamp(self.occurred()),
            self.attempt(),
            self.attempts()
        )
    }

    fn draw_waits(&self, out: &mut WrappedText) {
        if self.edges().is_empty() {
            return;
        }
        out.heading("WHO WAITED FOR WHOM");
        out.write(
            "  ",
            "  ",
            &format!("{}, the victim", wording::name(self.victim())),
        );
        let left = self.edges().len() - wait_tree::draw(self, out);
        if left > 0 {
            out.write("  ", "  ", &format!("and {left} more"));
        }
    }

    fn describe(&self, out: &mut WrappedText, participant: &Participant) {
        let name = wording::full_name(participant);
        let name = match name.strip_prefix("pid ") {
            Some(rest) => format!("PID {rest}"),
            None => name,
        };
        let mut heading = format!("{}: {name}", wording::name(participant));
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
        out.heading(&heading);
        let mut who = Vec::new();
        let mut add = |what: &str, value: Option<&str>, quote: &str| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                who.push(format!("{what} {quote}{value}{quote}"));
            }
        };
        add("user", participant.user(), "");
        add("database", participant.database(), "");
        add("client", participant.client_address(), "");
        // The call site is in the heading.
        let application = participant.application_name().map(|name| {
            let site = participant.call_site();
            let rest = site.and_then(|site| name.strip_suffix(site));
            rest.map_or(name, str::trim_end)
        });
        let is_shown = |name: &&str| wording::call_site(participant).as_deref() != Some(*name);
        add("application", application.filter(is_shown), "\"");
        let kind = participant.backend_type();
        add("a", kind.filter(|kind| *kind != "client backend"), "");
        if !who.is_empty() {
            out.write("  ", "  ", &who.join(", "));
        }
        let mut state = Vec::from_iter(wording::state(participant));
        if let Some(age) = participant.transaction_age() {
            state.push(format!("in its transaction for {}", wording::age(age)));
        }
        if let Some(age) = participant.wait_age() {
            state.push(format!("waited {} for a lock", wording::age(age)));
        }
        if let Some(key) = participant.conflict_group() {
            state.push(format!("in the conflict group {key}"));
        }
        if !state.is_empty() {
            out.write("  ", "  ", &state.join(", "));
        }
        if let Some(statement) = participant.statement() {
            let verb = if participant.is_waiting() || participant.state() == Some("active") {
                "  ran: "
            } else {
                "  last ran: "
            };
            out.write(verb, "    ", &wording::one_line(statement, MAX_STATEMENT));
        }
        self.held(out, participant);
        journal(out, participant);
    }

    /// The locks that it held and others waited for.
    fn held(&self, out: &mut WrappedText, participant: &Participant) {
        let edges = self.edges().iter();
        let edges: Vec<_> = edges
            .filter(|edge| Some(edge.blocker()) == participant.id() && !edge.is_soft())
            // Whoever is first in a row's queue does not hold the row.
            .filter(|edge| !wording::is_row_queue(edge))
            .collect();
        let mut held: Vec<_> = edges
            .iter()
            .map(|edge| match edge.mode_held() {
                Some(mode) if edge.row().is_none() => {
                    format!("{} in {mode}", wording::object(edge))
                }
                _ => wording::object(edge),
            })
            .collect();
        held.sort();
        held.dedup();
        if held.is_empty() {
            return;
        }
        out.write("  ", "    ", &format!("held {}", held.join(", ")));
        let is_marked = |line: &JournalLine| {
            matches!(
                line.mark(),
                Some(JournalMark::Took | JournalMark::MayHaveTaken)
            )
        };
        let is_named = |edge: &&IncidentEdge| {
            let name = edge.relation().and_then(Relation::name);
            let group = participant.conflict_group();
            // The lock of its conflict group was taken with BEGIN.
            let is_other = |key: &LockKey| !group.is_some_and(|group| group.same_lock(key));
            name.is_some() || edge.object().advisory_key().is_some_and(is_other)
        };
        let is_known = participant.journal().iter().any(is_marked);
        if participant.is_in_this_process() && !is_known && edges.iter().any(is_named) {
            let how = if participant.journal_dropped() > 0 {
                "with a statement that is no longer known, or"
            } else {
                "with none of the statements below that names it:"
            };
            let text = format!("{how} a trigger, a foreign key, a view or a function may have");
            out.write("    ", "    ", &text);
        }
    }

    fn server(&self, out: &mut WrappedText) {
        let Some(sqlstate) = self.sqlstate() else {
            return;
        };
        out.heading("WHAT THE SERVER SAID");
        let message = self.message().unwrap_or("(a message that may carry data)");
        out.lines(
            "  ",
            "    ",
            &format!("{} {message}", wording::printable(sqlstate)),
        );
        for (name, text) in wording::details(self) {
            let text = self.with_letters(text);
            out.lines(&format!("  {name:7}  "), "           ", &text);
        }
    }

    /// The server's words with the letters of the sessions in the place of their process ids.
    fn with_letters(&self, text: &str) -> String {
        let letter = |number: &str| {
            let pid: i32 = number.parse().ok()?;
            let mut participants = self.participants().iter();
            participants.find(|participant| participant.pid() == Some(pid))
        };
        let lines = text.lines().map(|line| {
            // `Process 11 waits for … on transaction 12; blocked by process 12.`: the first and the last number of a line of
            // DETAIL are process ids, in every language.
            let digits = |c: char| c.is_ascii_digit();
            let Some(first) = line.find(digits) else {
                return line.to_owned();
            };
            let first_end = line[first..]
                .find(|c| !digits(c))
                .map_or(line.len(), |at| first + at);
            let last_end = line.rfind(digits).map_or(first_end, |at| at + 1);
            let last = line[..last_end].rfind(|c| !digits(c)).map_or(0, |at| {
                at + line[at..].chars().next().map_or(1, char::len_utf8)
            });
            let waiter = letter(&line[first..first_end]);
            let blocker = letter(&line[last..last_end]);
            match (waiter, blocker) {
                (Some(waiter), Some(blocker)) if first < last => format!(
                    "{}{}{}{}{}",
                    &line[..first],
                    waiter.letter(),
                    &line[first_end..last],
                    blocker.letter(),
                    &line[last_end..]
                ),
                _ => line.to_owned(),
            }
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// `Why: probably …`
    pub(super) fn why_heading(&self) -> String {
        let diagnosis = self.diagnosis();
        format!("Why: {}{}", diagnosis.probably(), diagnosis.cause())
    }

    fn why(&self, out: &mut WrappedText) {
        let diagnosis = self.diagnosis();
        out.heading(&self.why_heading().replacen("Why", "WHY", 1));
        out.write("  ", "  ", diagnosis.text());
        if let Some(fix) = diagnosis.fix() {
            out.write("  To do: ", "    ", fix);
        }
    }

    /// How much of the incident was observed, as a sentence.
    pub(super) fn certainty(&self) -> String {
        let when = match self.captured_after() {
            Some(after) => format!(
                " {} after the victim's statement began",
                wording::age(after)
            ),
            None => String::new(),
        };
        let is_cycle = !self.cycle().is_empty();
        match self.completeness() {
            Completeness::Complete if is_cycle => format!("The whole cycle was seen{when}."),
            Completeness::Complete => format!("All that was in the way was seen{when}."),
            Completeness::Partial if is_cycle => {
                format!(
                    "Part of the cycle was seen{when}; the rest of it is from the server's DETAIL."
                )
            }
            Completeness::Partial => {
                format!("The victim's wait was seen{when}, but not what closed the cycle.")
            }
            Completeness::DetailOnly => {
                "Nothing was seen while it lasted: who waited for whom is from the server's DETAIL."
                    .to_owned()
            }
            Completeness::Nothing => "Nothing was seen while it lasted.".to_owned(),
        }
    }

    /// How often the incident occurred, as a sentence without a full stop.
    pub(super) fn occurrences_line(&self) -> String {
        let mut text = format!("Fingerprint {}, ", self.fingerprint());
        match self.previously_seen() {
            Some(previous) => text.push_str(&format!(
                "seen {} times since {}, last at {} before this one",
                self.count(),
                wording::timestamp(self.first_seen()),
                wording::timestamp(previous),
            )),
            None => text.push_str("seen for the first time"),
        }
        text
    }

    fn certainty_section(&self, out: &mut WrappedText) {
        out.heading("HOW SURE THIS IS");
        out.write("  ", "  ", &self.certainty());
        for caveat in self.caveats() {
            out.write("  - ", "    ", caveat);
        }
        out.heading(&self.occurrences_line());
    }
}

fn journal(out: &mut WrappedText, participant: &Participant) {
    let lines = participant.journal();
    if lines.is_empty() {
        return;
    }
    out.write("  ", "  ", "its transaction until then:");
    let mut skipped = 0;
    let skip = |out: &mut WrappedText, skipped: &mut usize| {
        if *skipped > 0 {
            let what = if *skipped == 1 {
                "statement"
            } else {
                "statements"
            };
            out.write("      ", "      ", &format!("… {skipped} {what}"));
        }
        *skipped = 0;
    };
    for (at, line) in lines.iter().enumerate() {
        if at == participant.journal_gap {
            skipped += participant.journal_dropped();
        }
        let is_shown = at < FIRST_LINES || at + LAST_LINES >= lines.len() || line.mark().is_some();
        if !is_shown {
            skipped += 1;
            continue;
        }
        skip(out, &mut skipped);
        let mark = match line.mark() {
            Some(JournalMark::Took) => "took",
            // The first statement that names the relation and takes such locks.
            Some(JournalMark::MayHaveTaken) => "probably took",
            Some(JournalMark::Waited) => "waited",
            None => "",
        };
        let duration = wording::took(line);
        let after = format!("+{}", wording::age(line.after()));
        let head = format!("    {mark:<13} {after:>9} {duration:>8}  ");
        let hang = " ".repeat(text_wrap::width(&head));
        let text = wording::statement(line, MAX_JOURNAL_STATEMENT);
        out.write(&head, &hang, &text);
    }
    skip(out, &mut skipped);
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Evidence, IncidentHistory, IncidentTrigger};
    use super::*;
    use crate::graph::LockObject;

    #[test]
    fn a_deadlock_in_one_process() {
        let page = report(transfers()).to_string();
        assert_eq!(page, TRANSFERS);
    }

    const TRANSFERS: &str = "\
Deadlock on public.account: src/transfer.rs:41 and src/refund.rs:17 waited for one another
2026-01-31T12:34:56.000000Z, attempt 1 of 5, retried after 12ms

WHO WAITED FOR WHOM
  A, the victim
  └─ waited 958ms for row id = 2 of public.account (ShareLock on transaction 12), held in
     ExclusiveLock by B
     └─ waited 412ms for row id = 1 of public.account (ShareLock on transaction 11), held in
        ExclusiveLock by A: the cycle is closed

WHY: lock order inversion
  The same locks were taken in different orders: A held row id = 1 of public.account and wanted row
  id = 2 of public.account; B held row id = 2 of public.account and wanted row id = 1 of
  public.account.
  To do: Lock the rows of public.account in one order in every transaction, that of id, before the
    first of them is written: tx.lock_rows(\"public.account\", \"id\", ids), or SELECT … ORDER BY id FOR
    NO KEY UPDATE.

A: PID 11 (src/transfer.rs:41), the victim, in this process
  user app, database shop, client 10.0.0.7, application \"billing\"
  active for 960ms, in its transaction for 1.2s, waited 958ms for a lock
  ran: UPDATE account SET balance = balance + ? WHERE id = ?
  held row id = 1 of public.account
  its transaction until then:
    probably took    +1.0ms    1.0ms  UPDATE account SET balance = balance - ? WHERE id = ?
                     +3.0ms    0.0ms  INSERT INTO log VALUES (?)
    waited           +240ms   failed  UPDATE account SET balance = balance + ? WHERE id = ?

B: PID 12 (src/refund.rs:17), in this process
  user app, database shop, client 10.0.0.7, application \"billing\"
  active for 412ms, in its transaction for 652ms, waited 412ms for a lock
  ran: UPDATE account SET balance = balance - ?, note = ? WHERE id = ?
  held row id = 2 of public.account
  its transaction until then:
                     +0.0ms    1.0ms  SELECT ?
    probably took    +2.0ms    1.0ms  UPDATE account SET balance = balance + ? WHERE id = ?
    waited           +400ms    411ms  UPDATE account SET balance = balance - ?, note = ? WHERE id =
                                      ?

WHAT THE SERVER SAID
  40P01 deadlock detected
  DETAIL   Process A waits for ShareLock on transaction 12; blocked by process B.
           Process B waits for ShareLock on transaction 11; blocked by process A.
  CONTEXT  while updating tuple (0,2) in relation \"account\"

HOW SURE THIS IS
  The whole cycle was seen 960ms after the victim's statement began.

Fingerprint 5b62a63f352df502, seen for the first time";

    #[test]
    fn a_deadlock_without_a_sample() {
        let page = report(Evidence {
            samples: Vec::new(),
            others: Vec::new(),
            caveats: vec!["the side connection could not be opened: no room".into()],
            ..transfers()
        })
        .to_string();
        assert!(page.starts_with("Deadlock: src/transfer.rs:41 and B waited for one another\n"));
        for part in [
            "  └─ waited for row (0,2) of account (ShareLock on transaction 12), held by B\n",
            "     └─ waited for a row or key of transaction 11 (ShareLock), held by A: the cycle",
            "\nWHY: unknown\n",
            "\nB: PID 12, not seen\n",
            "  Nothing was seen while it lasted: who waited for whom is from the server's DETAIL.\n",
            "  - the side connection could not be opened: no room\n",
            "  - B was not seen, and is not a transaction of this process\n",
        ] {
            assert!(page.contains(part), "{part:?} in:\n{page}");
        }
    }

    #[test]
    fn a_queue_is_a_tree() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .hidden(12, "migrate")
            .session(13, "psql", "idle in transaction", "SELECT 'secret'")
            .holds(13, &object, "AccessShareLock")
            .waits(12, &object, "AccessExclusiveLock", 2000, &[13])
            .waits(11, &object, "RowExclusiveLock", 958, &[12, 13])
            .holds(13, &object, "ShareLock");
        let mut evidence = timeout(server);
        evidence.outcome = Outcome::GaveUp;
        let history = IncidentHistory::default();
        Incident::new(evidence.clone(), &history);
        let page = Incident::new(evidence, &history).to_string();
        for part in [
            "Lock timeout of 958ms on table public.account: src/transfer.rs:41 waited for psql and 1 \
             more\n",
            "attempt 1 of 5, given up\n",
            "  ├─ waited 958ms for table public.account (RowExclusiveLock), queued behind one that wanted\n  │  \
             AccessExclusiveLock, B\n",
            "  │  └─ waited 2.0s for table public.account (AccessExclusiveLock), held in ShareLock by C\n",
            "  └─ and held in ShareLock by C: see above\n",
            "\nB: PID 12 (migrate), partly hidden from this role\n",
            "  last ran: SELECT ?\n",
            "  held table public.account in ShareLock\n",
            "  All that was in the way was seen 960ms after",
            "  - statement and state of B are hidden from this role; pg_read_all_stats",
            ", seen 2 times since 2026-01-31T12:34:56.000000Z, last at",
        ] {
            let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(flat(&page).contains(&flat(part)), "{part:?} in:\n{page}");
        }
    }

    #[test]
    fn long_journals_are_shortened() {
        let mut evidence = transfers();
        evidence.victim.dropped = 7;
        let statements = &mut evidence.victim.statements;
        evidence.victim.gap = 50;
        let failed = statements.remove(2);
        for n in 4..100 {
            statements.push(entry(n, "SELECT 'x'", Some(1)));
        }
        statements.push(failed);
        let page = report(evidence).to_string();
        assert!(page.contains("… 83 statements\n"), "{page}");
        assert!(
            page.contains("    probably took    +1.0ms")
                && page.contains("    waited           +240ms")
        );
    }

    #[test]
    fn a_report_without_evidence() {
        let mut evidence = evidence(IncidentTrigger::LongWait);
        evidence.victim.pid = None;
        evidence.victim.call_site = None;
        evidence.victim.application_name = None;
        evidence.outcome = Outcome::StillWaiting;
        let page = report(evidence).to_string();
        assert!(page.starts_with("Long wait: the victim\n"), "{page}");
        assert!(!page.contains("WHO WAITED FOR WHOM") && !page.contains("WHAT THE SERVER SAID"));
        assert!(page.contains("still waiting\n") && page.contains("Nobody was seen in the way."));
        assert!(page.contains("Nothing was seen while it lasted.\n"));
    }
}
