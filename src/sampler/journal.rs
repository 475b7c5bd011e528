//! The statement log of a running transaction as a journal for reports.

use std::time::Instant;

use super::statement_log::StatementLog;
use crate::incident;

/// The journal up to this time.
pub(super) fn from_log(log: &StatementLog, until: Instant) -> incident::Journal {
    let (statements, dropped) = log.statements();
    incident::Journal {
        pid: log.pid(),
        call_site: log.call_site,
        application_name: log.application_name.clone(),
        began: log.began_at,
        statements: statements
            .into_iter()
            .filter(|statement| statement.at <= until)
            .map(|statement| incident::JournalEntry {
                after: statement.at.duration_since(log.began),
                text: statement.text,
                duration: statement
                    .end
                    .and_then(|end| end.succeeded.map(|_| end.after)),
                failed: statement
                    .end
                    .is_some_and(|end| end.succeeded == Some(false)),
                advisory: statement.locks_taken,
            })
            .collect(),
        dropped,
        gap: StatementLog::FIRST_KEPT,
        conflict_group: log.conflict_group.get().cloned(),
    }
}
