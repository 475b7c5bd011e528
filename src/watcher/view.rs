//! A running transaction's journal as reports have it.

use std::time::Instant;

use crate::incident;
use crate::session::Journal;

/// What it has said up to then.
pub(super) fn of(journal: &Journal, until: Instant) -> incident::Journal {
    let (statements, dropped) = journal.statements();
    incident::Journal {
        pid: journal.pid(),
        call_site: journal.call_site,
        application_name: journal.application_name.clone(),
        began: journal.began_at,
        statements: statements
            .into_iter()
            .filter(|said| said.at <= until)
            .map(|said| incident::JournalEntry {
                after: said.at.duration_since(journal.began),
                text: said.text,
                took: said.end.and_then(|end| end.succeeded.map(|_| end.after)),
                failed: said.end.is_some_and(|end| end.succeeded == Some(false)),
                advisory: said.took,
            })
            .collect(),
        dropped,
        gap: Journal::FIRST_KEPT,
        conflict_group: journal.conflict_group.get().cloned(),
    }
}
