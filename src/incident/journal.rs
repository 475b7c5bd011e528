//! What a transaction of this process said until then, and with which of it it took the lock that others waited for.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::graph::{LockObject, Relation};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::statement::{self, StatementKind};

use super::texts::Texts;
use super::{IncidentEdge, Journal, JournalEntry};

/// Other sessions' clients hear of the end of a deadlock at about the same time: a statement that ended this short
/// before the error was seen was still waiting in it.
const SAME_TIME: Duration = Duration::from_millis(100);

/// A statement of a transaction of this process.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalLine {
    pub(super) after: Duration,
    pub(super) text: Option<Arc<str>>,
    pub(super) took: Option<Duration>,
    pub(super) failed: bool,
    pub(super) advisory: Option<(LockKey, AdvisoryMode)>,
    pub(super) mark: Option<JournalMark>,
}

/// What a statement had to do with the incident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JournalMark {
    /// It took the advisory lock that others waited for.
    Took,
    /// It is the first one that may have taken the lock that others waited for: it names the relation, and takes such
    /// locks. That is a guess.
    MayHaveTaken,
    /// It waited for a lock.
    Waited,
}

impl JournalLine {
    /// When it began, since the transaction began.
    #[must_use]
    pub fn after(&self) -> Duration {
        self.after
    }

    /// Its text, without literals unless they were asked for. `None` where it is not known, as for a statement that was
    /// prepared elsewhere.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// How long it took; `None` where it had not ended.
    #[must_use]
    pub fn took(&self) -> Option<Duration> {
        self.took
    }

    /// Whether it failed.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// The advisory lock it asked for.
    #[must_use]
    pub fn advisory(&self) -> Option<(&LockKey, AdvisoryMode)> {
        self.advisory.as_ref().map(|(key, mode)| (key, *mode))
    }

    /// What it had to do with the incident.
    #[must_use]
    pub fn mark(&self) -> Option<JournalMark> {
        self.mark
    }
}

/// A journal up to the incident, and which of its entries waited.
pub(super) struct Reading<'a> {
    entries: &'a [JournalEntry],
    waited: Option<usize>,
}

impl<'a> Reading<'a> {
    /// The victim's: the statement that failed, or that has not ended.
    pub(super) fn of_victim(journal: &'a Journal) -> Self {
        let entries = &journal.statements[..];
        let open = |entry: &JournalEntry| entry.failed || entry.took.is_none();
        Self {
            entries,
            waited: entries.iter().rposition(open),
        }
    }

    /// Another one's, which has gone on since.
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

    /// Another one's that waited too: the statement that the server was seen to run, else the one that had then lasted
    /// longest of those that were not over.
    pub(super) fn of_waiter(
        journal: &'a Journal,
        occurred: SystemTime,
        seen: Option<&str>,
    ) -> Self {
        let entries = Self::of_holder(journal, occurred).entries;
        let at = occurred.duration_since(journal.began).unwrap_or_default();
        let end = |entry: &JournalEntry| {
            let took = entry.took.unwrap_or(Duration::MAX);
            entry.after.saturating_add(took).min(at)
        };
        // The server keeps the beginning of a statement only.
        let is_seen = |entry: &JournalEntry| match (seen, entry.text.as_deref()) {
            (Some(seen), Some(text)) => text.starts_with(seen),
            _ => true,
        };
        let waited = entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| end(entry).saturating_add(SAME_TIME) >= at && is_seen(entry))
            .max_by_key(|(_, entry)| end(entry).saturating_sub(entry.after));
        Self {
            entries,
            waited: waited.map(|(at, _)| at),
        }
    }

    /// The statement that waited, or else the last one.
    pub(super) fn statement(&self) -> Option<&'a str> {
        let last = self.entries.len().checked_sub(1);
        self.entries.get(self.waited.or(last)?)?.text.as_deref()
    }

    /// The lines, those marked that took what others waited for in these edges.
    pub(super) fn lines<'e>(
        &self,
        contested: impl Iterator<Item = &'e IncidentEdge>,
        texts: Texts,
    ) -> Vec<JournalLine> {
        let mut lines: Vec<_> = self
            .entries
            .iter()
            .map(|entry| line(entry, texts))
            .collect();
        if let Some(waited) = self.waited {
            lines[waited].mark = Some(JournalMark::Waited);
        }
        for edge in contested {
            if let Some((at, mark)) = self.taker(edge) {
                let line = &mut lines[at];
                line.mark = match (line.mark, mark) {
                    (Some(JournalMark::Took), _) => line.mark,
                    _ => Some(mark),
                };
            }
        }
        lines
    }

    /// The entry that took what the edge is about.
    fn taker(&self, edge: &IncidentEdge) -> Option<(usize, JournalMark)> {
        let before = &self.entries[..self.waited.unwrap_or(self.entries.len())];
        if let LockObject::Advisory { key, .. } = &edge.object {
            let exact = before.iter().position(|entry| {
                let took = entry.took.is_some() && !entry.failed;
                let lock = entry.advisory.as_ref();
                took && lock.is_some_and(|(taken, _)| taken.same_lock(key))
            });
            return exact.map(|at| (at, JournalMark::Took)).or_else(|| {
                // SQL of the application's own, which may compute its key.
                let guess = |entry: &JournalEntry| {
                    entry.advisory.is_none() && kind(entry) == Some(StatementKind::AdvisoryLock)
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

fn line(entry: &JournalEntry, texts: Texts) -> JournalLine {
    JournalLine {
        after: entry.after,
        text: entry.text.as_deref().map(|text| texts.statement(text)),
        took: entry.took,
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

/// Whether statements of this kind take this lock on a relation they name (PostgreSQL's documentation, "Table-Level
/// Locks").
fn takes(kind: StatementKind, mode: &str) -> bool {
    use StatementKind as Is;
    let modes: &[&str] = match kind {
        Is::Select => &["AccessShareLock"],
        Is::SelectForUpdate
        | Is::SelectForNoKeyUpdate
        | Is::SelectForShare
        | Is::SelectForKeyShare => &["RowShareLock"],
        // The relations that they only read, too.
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
