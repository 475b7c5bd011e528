//! What is known of an incident before it is analysed: raw data, including literals.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::call_site::CallSite;
use crate::graph::{Relation, RowId, Snapshot};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::statement;

use super::{Outcome, RowKey};

/// The reason for a report. A deadlock that a lock timeout hides from the server is not one of them: the samples show
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IncidentTrigger {
    /// The server ended a deadlock.
    Deadlock,
    /// The wait for a lock ended by `lock_timeout`, or did not begin (NOWAIT).
    LockTimeout,
    /// A wait that continues.
    LongWait,
}

/// What is known of one incident before it is analysed.
#[derive(Clone, Debug)]
pub(crate) struct Evidence {
    pub(crate) trigger: IncidentTrigger,
    /// By this process's clock, as all times except those within a sample.
    pub(crate) occurred: SystemTime,
    /// The reporting transaction.
    pub(crate) victim: Journal,
    /// Attempt `attempt` of at most `attempts`, counted from 1.
    pub(crate) attempt: u32,
    pub(crate) attempts: u32,
    pub(crate) outcome: Outcome,
    pub(crate) error: Option<ServerError>,
    /// In chronological order.
    pub(crate) samples: Vec<WaitSample>,
    /// Names of relations that the error's DETAIL has only the oids of.
    pub(crate) relations: Vec<Relation>,
    /// The row in the error's CONTEXT, by its key.
    pub(crate) context_row: Option<(Relation, RowKey)>,
    /// Other transactions of this process whose pid is in a sample or in the DETAIL.
    pub(crate) others: Vec<Journal>,
    /// What could not be found out, and why: one sentence each, without a full stop.
    pub(crate) caveats: Vec<Arc<str>>,
    /// Whether to show literals.
    pub(crate) literals: bool,
}

/// The fields of the server's error, unchanged.
#[derive(Clone)]
pub(crate) struct ServerError {
    pub(crate) sqlstate: String,
    pub(crate) message: String,
    pub(crate) detail: Option<String>,
    /// `DbError::where_`.
    pub(crate) context: Option<String>,
    pub(crate) routine: Option<String>,
}

/// A sample of the wait graph.
#[derive(Clone, Debug)]
pub(crate) struct WaitSample {
    pub(crate) snapshot: Arc<Snapshot>,
    /// Since the victim's statement began.
    pub(crate) after: Duration,
    pub(crate) row_keys: Vec<(RowId, RowKey)>,
}

/// The statements of a transaction of this process so far.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    pub(crate) pid: Option<i32>,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) application_name: Option<Arc<str>>,
    pub(crate) began: SystemTime,
    /// In chronological order.
    pub(crate) statements: Vec<JournalEntry>,
    /// How many entries were dropped, and how many of `statements` come before those.
    pub(crate) dropped: usize,
    pub(crate) gap: usize,
    pub(crate) conflict_group: Option<LockKey>,
}

#[derive(Clone)]
pub(crate) struct JournalEntry {
    /// Since BEGIN.
    pub(crate) after: Duration,
    /// `None` if unknown, as for a statement that was prepared elsewhere.
    pub(crate) text: Option<Arc<str>>,
    /// `None` if it is still running, or did not finish.
    pub(crate) duration: Option<Duration>,
    pub(crate) failed: bool,
    /// The advisory locks that it took or requested.
    pub(crate) advisory: Vec<(LockKey, AdvisoryMode)>,
}

/// Without the redaction, which have literals.
impl fmt::Debug for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerError")
            .field("sqlstate", &self.sqlstate)
            .field("routine", &self.routine)
            .finish_non_exhaustive()
    }
}

/// Without literals.
impl fmt::Debug for JournalEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JournalEntry")
            .field("after", &self.after)
            .field("text", &self.text.as_deref().map(statement::redact))
            .field("duration", &self.duration)
            .field("failed", &self.failed)
            .field("advisory", &self.advisory)
            .finish()
    }
}
