//! The statements of a transaction of this process up to the incident, and which of them took the lock that others
//! waited for.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::graph::{LockObject, Relation};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::statement::{self, StatementKind};

use super::redaction::{Redaction, is_call};
use super::{IncidentEdge, Journal, JournalEntry};

/// The clients of all sessions in a deadlock learn of its end at about the same time: a statement that ended this short
/// before the error arrived was still waiting in it.
pub(super) const SAME_TIME: Duration = Duration::from_millis(100);

/// A statement of a transaction of this process.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalLine {
    pub(super) after: Duration,
    pub(super) text: Option<Arc<str>>,
    pub(super) duration: Option<Duration>,
    pub(super) failed: bool,
    pub(super) advisory: Vec<(LockKey, AdvisoryMode)>,
    pub(super) mark: Option<JournalMark>,
}

/// How a statement was involved in the incident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JournalMark {
    /// It took the advisory lock that others waited for.
    Took,
    /// It is the first statement that may have taken the lock that others waited for: it names the relation, and takes
    /// such locks. This is a guess.
    MayHaveTaken,
    /// It waited for a lock.
    Waited,
}

impl JournalLine {
    getters! {
        /// When it began, since the transaction began.
        after: Duration;

        /// Its text, without literals unless those are enabled. `None` if unknown, as for a statement that was prepared
        /// elsewhere.
        text text;

        /// How long it took; `None` if it had not ended, or that is unknown.
        duration: Option<Duration>;

        /// Whether it failed.
        failed: bool;
    }

    /// The advisory locks that it requested.
    pub fn advisory(&self) -> impl Iterator<Item = (&LockKey, AdvisoryMode)> {
        self.advisory.iter().map(|(key, mode)| (key, *mode))
    }

    /// How it was involved in the incident.
    #[must_use]
    pub fn mark(&self) -> Option<JournalMark> {
        self.mark
    }
}

/// A journal up to the incident, and which of its entries waited.
pub(super) struct JournalReader<'a> {
    entries: &'a [JournalEntry],
    waited: Option<usize>,
}

impl<'a> JournalReader<'a> {
    /// The victim's journal. The statement that waited is the one that failed or has not ended. Of several that were
    /// sent without waiting for the replies it is the first: the later ones had not begun.
    pub(super) fn of_victim(journal: &'a Journal) -> Self {
        let entries = &journal.statements[..];
        let open = |entry: &JournalEntry| entry.failed || entry.duration.is_none();
        let end = |entry: &JournalEntry| {
            entry
                .after
                .saturating_add(entry.duration.unwrap_or(Duration::MAX))
        };
        let mut waited = entries.iter().rposition(open);
        while let Some(at) = waited.and_then(|at| at.checked_sub(1)) {
            // A statement that failed earlier was undone by a savepoint, and one whose future was dropped has not
            // failed.
            let (before, this) = (&entries[at], &entries[at + 1]);
            if !open(before) || before.failed != this.failed || end(before) <= this.after {
                break;
            }
            waited = Some(at);
        }
        Self { entries, waited }
    }

    /// The journal of a session that has continued since.
    pub(super) fn of_holder(journal: &'a Journal, occurred: SystemTime) -> Self {
        let at = occurred.duration_since(journal.began).unwrap_or_default();
        let begun = journal
            .statements
            .partition_point(|entry| entry.after <= at);
        Self {
            entries: &journal.statements[..begun],
            waited: None,
        }
    }

    /// The journal of a session that waited too, in a statement that had begun by `begun`. The statement that waited is
    /// the one that a sample shows, else the longest one that had not ended.
    ///
    /// The session learns of the end at about the same time as the victim, so it may have continued before that.
    /// Statements after its wait are not part of the incident.
    pub(super) fn of_waiter(
        journal: &'a Journal,
        occurred: SystemTime,
        begun: SystemTime,
        seen: Option<&str>,
    ) -> Self {
        let entries = Self::of_holder(journal, occurred.min(begun)).entries;
        let at = occurred.duration_since(journal.began).unwrap_or_default();
        let end = |entry: &JournalEntry| {
            let duration = entry.duration.unwrap_or(Duration::MAX);
            entry.after.saturating_add(duration).min(at)
        };
        // The server keeps only the beginning of a statement, and so does a journal.
        let is_long = |text: &str| text.len() > 1023;
        let matches_sample = |entry: &JournalEntry| match (seen, entry.text.as_deref()) {
            (Some(seen), Some(text)) if is_call(text) => {
                statement::kind(seen) == StatementKind::AdvisoryLock
            }
            (Some(seen), Some(text)) => {
                text.starts_with(seen) || seen.starts_with(text) && is_long(text)
            }
            _ => true,
        };
        let waited = entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| {
                end(entry).saturating_add(SAME_TIME) >= at && matches_sample(entry)
            })
            .max_by_key(|(_, entry)| end(entry).saturating_sub(entry.after))
            .map(|(at, _)| at);
        let end_of_wait = waited.map_or(entries.len(), |waited| {
            let end = entries[waited]
                .duration
                .map(|duration| entries[waited].after.saturating_add(duration));
            let is_before = |entry: &JournalEntry| end.is_none_or(|end| entry.after < end);
            waited + 1 + entries[waited + 1..].partition_point(is_before)
        });
        Self {
            entries: &entries[..end_of_wait],
            waited,
        }
    }

    /// When the statement that waited began, since the transaction began.
    pub(super) fn waited_since(&self) -> Option<Duration> {
        Some(self.entries.get(self.waited?)?.after)
    }

    /// The statement that waited.
    pub(super) fn waited(&self) -> Option<&'a str> {
        self.entries.get(self.waited?)?.text.as_deref()
    }

    pub(super) fn last(&self) -> Option<&'a str> {
        self.entries.last()?.text.as_deref()
    }

    /// The lines. A line is marked if its statement took a lock that is waited for in these edges.
    pub(super) fn lines<'e>(
        &self,
        contested: impl Iterator<Item = &'e IncidentEdge>,
        redaction: Redaction,
    ) -> Vec<JournalLine> {
        let mut lines: Vec<_> = self
            .entries
            .iter()
            .map(|entry| line(entry, redaction))
            .collect();
        if let Some(waited) = self.waited {
            lines[waited].mark = Some(JournalMark::Waited);
        }
        for edge in contested {
            if let Some((at, mark)) = self.locking_entry(edge) {
                let line = &mut lines[at];
                line.mark = match (line.mark, mark) {
                    (Some(JournalMark::Took), _) => line.mark,
                    _ => Some(mark),
                };
            }
        }
        lines
    }

    /// The entry that took the lock of an edge.
    fn locking_entry(&self, edge: &IncidentEdge) -> Option<(usize, JournalMark)> {
        let before = &self.entries[..self.waited.unwrap_or(self.entries.len())];
        if let LockObject::Advisory { key, .. } = &edge.object {
            let exact = before.iter().position(|entry| {
                let took = entry.duration.is_some() && !entry.failed;
                took && entry.advisory.iter().any(|(taken, _)| taken.same_lock(key))
            });
            return exact.map(|at| (at, JournalMark::Took)).or_else(|| {
                // SQL of the application, which may compute its key.
                let guess = |entry: &JournalEntry| {
                    entry.advisory.is_empty() && kind(entry) == Some(StatementKind::AdvisoryLock)
                };
                let at = before.iter().position(guess)?;
                Some((at, JournalMark::MayHaveTaken))
            });
        }
        let relation = edge.relation()?;
        let is_row = edge.row.is_some();
        let held = edge.mode_held();
        let at = before.iter().position(|entry| {
            let locks = kind(entry).is_some_and(|kind| match (is_row, held) {
                (true, _) => locks_rows(kind),
                (false, Some(held)) => takes(kind, held),
                (false, None) => true,
            });
            locks && !entry.failed && names(entry.text.as_deref(), relation)
        });
        at.map(|at| (at, JournalMark::MayHaveTaken))
    }
}

fn line(entry: &JournalEntry, redaction: Redaction) -> JournalLine {
    JournalLine {
        after: entry.after,
        text: entry.text.as_deref().map(|text| redaction.statement(text)),
        duration: entry.duration,
        failed: entry.failed,
        advisory: entry.advisory.clone(),
        mark: None,
    }
}

fn kind(entry: &JournalEntry) -> Option<StatementKind> {
    entry.text.as_deref().map(statement::kind)
}

pub(super) fn names(statement: Option<&str>, relation: &Relation) -> bool {
    match (statement, relation.schema(), relation.name()) {
        (Some(text), Some(schema), Some(name)) => statement::mentions(text, schema, name),
        _ => false,
    }
}

pub(super) fn locks_rows(kind: StatementKind) -> bool {
    matches!(
        kind,
        StatementKind::SelectForUpdate
            | StatementKind::SelectForNoKeyUpdate
            | StatementKind::SelectForShare
            | StatementKind::SelectForKeyShare
            | StatementKind::Insert
            | StatementKind::Update
            | StatementKind::Delete
            | StatementKind::Merge
            | StatementKind::Copy
    )
}

/// Whether statements of this kind take a relation lock of this mode on a relation that they name (PostgreSQL's
/// documentation, "Table-Level Locks").
fn takes(kind: StatementKind, mode: &str) -> bool {
    use StatementKind as Is;
    let modes: &[&str] = match kind {
        Is::Select => &["AccessShareLock"],
        Is::SelectForUpdate
        | Is::SelectForNoKeyUpdate
        | Is::SelectForShare
        | Is::SelectForKeyShare => &["RowShareLock"],
        // Also on relations that they only read.
        Is::Insert | Is::Update | Is::Delete | Is::Merge | Is::Copy => {
            &["RowExclusiveLock", "AccessShareLock"]
        }
        Is::Truncate | Is::Drop => &["AccessExclusiveLock"],
        Is::LockTable => return true,
        Is::AlterTable => &[
            "ShareUpdateExclusiveLock",
            "ShareLock",
            "ShareRowExclusiveLock",
            "AccessExclusiveLock",
        ],
        Is::CreateIndex => &["ShareLock"],
        Is::CreateIndexConcurrently => &["ShareUpdateExclusiveLock"],
        Is::Reindex => &[
            "ShareLock",
            "ShareUpdateExclusiveLock",
            "AccessExclusiveLock",
        ],
        Is::Vacuum => &["ShareUpdateExclusiveLock", "AccessExclusiveLock"],
        Is::RefreshMaterializedView => &["ExclusiveLock", "AccessExclusiveLock"],
        Is::AdvisoryLock | Is::Begin | Is::Commit | Is::Rollback | Is::Other => &[],
    };
    modes.contains(&mode)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Evidence, Incident, IncidentTrigger, Participant};
    use super::*;
    use crate::graph::BackendId;

    fn marks(participant: &Participant) -> Vec<Option<JournalMark>> {
        participant
            .journal()
            .iter()
            .map(JournalLine::mark)
            .collect()
    }

    fn other(report: &Incident) -> &Participant {
        report
            .participant(&BackendId::Pid(12))
            .expect("the other one")
    }

    /// The statement of the other session of a deadlock that no sample shows, by its journal.
    fn ran(statements: Vec<JournalEntry>) -> Option<String> {
        let evidence = Evidence {
            samples: Vec::new(),
            others: vec![journal(12, REFUND, 1000, statements)],
            ..transfers()
        };
        other(&report(evidence)).statement().map(str::to_owned)
    }

    #[test]
    fn the_statement_that_waited_is_the_one_that_lasted() {
        let ran = |statements| ran(statements).expect("a statement");
        // It continued before this process learned of the error.
        assert_eq!(
            ran(vec![
                entry(100, "SELECT a", Some(1)),
                entry(600, "UPDATE b", Some(399)),
                entry(999, "SELECT c", Some(0)),
                entry(1000, "COMMIT", None),
            ]),
            "UPDATE b"
        );
        // Later statements are not part of the incident.
        assert_eq!(
            ran(vec![
                entry(990, "UPDATE b", Some(15)),
                entry(1010, "SELECT c", Some(9000))
            ]),
            "UPDATE b"
        );
        assert_eq!(
            ran(vec![
                entry(0, "SELECT a", Some(800)),
                entry(990, "UPDATE b", None)
            ]),
            "UPDATE b"
        );
    }

    #[test]
    fn the_sampled_statement_takes_precedence() {
        let mut evidence = transfers();
        evidence.others[0].statements = vec![
            entry(100, "SELECT 1", Some(700)),
            entry(350, &format!("{REFUND_SQL} RETURNING id"), Some(455)),
        ];
        let found = report(evidence.clone());
        assert!(
            other(&found)
                .statement()
                .is_some_and(|text| text.ends_with("RETURNING id"))
        );
        assert_eq!(marks(other(&found)), [None, Some(JournalMark::Waited)]);
        // Both keep only the beginning.
        for (noted, seen) in [(5000, 1023), (4096, 5000)] {
            let long = format!("SELECT {}", "x".repeat(5000));
            let mut evidence = evidence.clone();
            let server = TestServer::default()
                .session(12, "", "active", &long[..seen])
                .waits_for_row(11, &row(account(), 2), 12, 900)
                .waits_for_row(12, &row(account(), 1), 11, 400);
            evidence.samples = vec![server.sample(950, Vec::new())];
            evidence.others[0].statements[1].text = Some(long[..noted].into());
            let found = report(evidence);
            assert_eq!(marks(other(&found)), [None, Some(JournalMark::Waited)]);
        }
        // Not sent through this crate, so the journal does not have it.
        evidence.others[0].statements = vec![entry(100, "SELECT 1", Some(710))];
        let found = report(evidence);
        assert_eq!(marks(other(&found)), [None]);
        assert!(
            other(&found)
                .statement()
                .is_some_and(|text| text.starts_with("UPDATE account"))
        );
    }

    #[test]
    fn statements_after_the_wait_are_left_out() {
        let mut evidence = transfers();
        let sampled = evidence.samples.last().expect("a sample").after;
        let since = evidence.victim.statements.last().expect("one").after;
        let sampled = u64::try_from((since + sampled).as_millis()).expect("a short time");
        evidence.others[0].statements = vec![
            entry(100, REFUND_SQL, Some(sampled - 110)),
            // Before the reply to the sample's query arrived.
            entry(sampled - 5, "COMMIT", None),
        ];
        let found = report(evidence.clone());
        assert_eq!(marks(other(&found)), [Some(JournalMark::Waited)]);
        // Even if its wait is not in the journal.
        evidence.others[0].statements[0] = entry(100, "SELECT 1", Some(1));
        let found = report(evidence);
        assert_eq!(marks(other(&found)), [None]);
    }

    #[test]
    fn a_call_of_this_crate_matches_its_sql() {
        let mut evidence = transfers();
        let (first, second) = (advisory("a"), advisory("b"));
        let server = TestServer::default()
            .session(
                11,
                "",
                "active",
                "SAVEPOINT a; SELECT pg_advisory_xact_lock(7)",
            )
            .session(
                12,
                "",
                "active",
                "SAVEPOINT a; SELECT pg_advisory_xact_lock(7)",
            )
            .holds(11, &first, "ExclusiveLock")
            .holds(12, &second, "ExclusiveLock")
            .waits(11, &second, "ExclusiveLock", 900, &[12])
            .waits(12, &first, "ExclusiveLock", 400, &[11]);
        evidence.samples = vec![server.sample(950, Vec::new())];
        evidence.others[0].statements = vec![
            entry(0, "SELECT pg_sleep(1)", Some(790)),
            entry(355, "advisory_lock(\"a\")", None),
        ];
        let found = report(evidence);
        assert_eq!(marks(other(&found)), [None, Some(JournalMark::Waited)]);
        assert_eq!(other(&found).statement(), Some("advisory_lock(\"a\")"));
    }

    #[test]
    fn an_advisory_lock_marks_the_statement_that_took_it() {
        let (first, second) = (LockKey::from("a"), LockKey::from("b"));
        let lock = |after, key: &LockKey, took| {
            let mut entry = entry(after, "SELECT pg_advisory_xact_lock($1)", took);
            entry.advisory = vec![
                (LockKey::from("other"), AdvisoryMode::Shared),
                (key.clone(), AdvisoryMode::Exclusive),
            ];
            entry
        };
        let server = || {
            TestServer::default()
                .holds(
                    11,
                    &advisory(first.as_i64().expect("one number")),
                    "ExclusiveLock",
                )
                .holds(
                    12,
                    &advisory(second.as_i64().expect("one number")),
                    "ExclusiveLock",
                )
                .waits(
                    11,
                    &advisory(second.as_i64().expect("one number")),
                    "ExclusiveLock",
                    900,
                    &[12],
                )
                .waits(
                    12,
                    &advisory(first.as_i64().expect("one number")),
                    "ExclusiveLock",
                    400,
                    &[11],
                )
        };
        let mut failed = lock(240, &first, None);
        failed.failed = true;
        let mut evidence = deadlock(server());
        evidence.victim.statements = vec![
            entry(0, "SELECT 1", Some(1)),
            failed.clone(),
            lock(1, &first, Some(1)),
        ];
        evidence.victim.statements.push(lock(300, &second, None));
        let found = report(evidence.clone());
        let waited = Some(JournalMark::Waited);
        assert_eq!(
            marks(found.victim()),
            [None, None, Some(JournalMark::Took), waited]
        );
        assert_eq!(found.edges()[0].object().to_string(), "advisory lock \"b\"");
        // With SQL of the application it is a guess.
        evidence.victim.statements = vec![
            entry(0, "SELECT pg_advisory_lock(hashtext('x'))", Some(1)),
            failed,
        ];
        let found = report(evidence);
        assert_eq!(
            marks(found.victim()),
            [Some(JournalMark::MayHaveTaken), waited]
        );
    }

    #[test]
    fn a_relation_lock_marks_the_first_statement_that_takes_it() {
        let object = LockObject::Relation(account());
        let server = |held| {
            TestServer::default()
                .session(12, "psql", "idle in transaction", "")
                .holds(12, &object, held)
                .waits(11, &object, "AccessExclusiveLock", 900, &[12])
        };
        let statements = vec![
            entry(0, "SELECT * FROM audit", Some(1)),
            entry(1, "SELECT * FROM account", Some(1)),
            entry(2, "SELECT * FROM account FOR UPDATE", Some(1)),
            entry(3, "DELETE FROM account", Some(1)),
            entry(4, "LOCK TABLE account IN EXCLUSIVE MODE", Some(1)),
        ];
        for (held, expected) in [
            ("AccessShareLock", Some(1)),
            ("RowShareLock", Some(2)),
            ("RowExclusiveLock", Some(3)),
            ("ExclusiveLock", Some(4)),
        ] {
            let mut evidence = timeout(server(held));
            evidence.others = vec![journal(12, REFUND, 900, statements.clone())];
            let found = report(evidence);
            let guess = |mark: &Option<JournalMark>| *mark == Some(JournalMark::MayHaveTaken);
            assert_eq!(
                marks(other(&found)).iter().position(guess),
                expected,
                "{held}"
            );
            assert!(
                marks(other(&found))
                    .iter()
                    .flatten()
                    .all(|mark| *mark != JournalMark::Waited)
            );
        }
    }

    #[test]
    fn a_row_lock_marks_the_first_statement_that_locks_rows() {
        let mut evidence = transfers();
        let statements = &mut evidence.victim.statements;
        statements.insert(0, entry(0, "SELECT * FROM account", Some(1)));
        statements.insert(0, entry(0, "UPDATE accounts SET a = 1", Some(1)));
        let found = report(evidence);
        let guess = Some(JournalMark::MayHaveTaken);
        assert_eq!(
            marks(found.victim()),
            [None, None, guess, None, Some(JournalMark::Waited)]
        );
    }

    #[test]
    fn a_lock_that_no_statement_names() {
        let mut evidence = transfers();
        evidence.victim.statements[0] = entry(1, "SELECT move_money($1, $2)", Some(1));
        let found = report(evidence.clone());
        assert_eq!(
            marks(found.victim()),
            [None, None, Some(JournalMark::Waited)]
        );
        assert!(
            found
                .to_string()
                .contains("with none of the statements below that names it")
        );
        evidence.victim.dropped = 1;
        assert!(
            report(evidence)
                .to_string()
                .contains("a statement that is no longer known, or")
        );
    }

    #[test]
    fn of_statements_sent_together_the_first_waited() {
        let failed = |after, took| JournalEntry {
            failed: true,
            ..entry(after, "UPDATE b", Some(took))
        };
        let waits = |statements: Vec<JournalEntry>| {
            let mut evidence = evidence(IncidentTrigger::LockTimeout);
            evidence.victim.statements = statements;
            let found = report(evidence);
            let waited = |mark: &Option<JournalMark>| *mark == Some(JournalMark::Waited);
            marks(found.victim()).iter().position(waited)
        };
        let done = || entry(0, "SELECT a", Some(1));
        let open = || entry(5, "SELECT c", None);
        assert_eq!(
            waits(vec![
                done(),
                failed(10, 990),
                failed(11, 990),
                failed(11, 990)
            ]),
            Some(1)
        );
        // The first one failed in a savepoint.
        assert_eq!(
            waits(vec![done(), failed(10, 100), failed(200, 790)]),
            Some(2)
        );
        // The first one's future was dropped.
        assert_eq!(waits(vec![open(), failed(10, 990)]), Some(1));
        assert_eq!(waits(vec![failed(2, 1), done(), open(), open()]), Some(2));
        assert_eq!(waits(vec![done()]), None);
    }

    #[test]
    fn texts_may_be_unknown() {
        let mut evidence = evidence(IncidentTrigger::LockTimeout);
        let mut unknown = entry(1, "", None);
        unknown.text = None;
        evidence.victim.statements = vec![unknown];
        let found = report(evidence);
        assert_eq!(found.victim().statement(), None);
        assert!(
            found
                .to_string()
                .contains("(a statement whose text is not known)")
        );
    }
}
