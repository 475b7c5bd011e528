//! What is known of an incident before it is made sense of: the raw material, with literals and all.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::call_site::CallSite;
use crate::graph::{RowId, Snapshot};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::statement;

use super::{Outcome, RowKey};

/// What failed. A deadlock that a lock timeout hides from the server is not among them: the looks show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The server broke a deadlock.
    Deadlock,
    /// The wait for a lock ended with `lock_timeout`, or did not begin (NOWAIT).
    LockTimeout,
    /// A wait that goes on.
    LongWait,
}

/// What is known of one incident, before it is made sense of.
#[derive(Clone, Debug)]
pub(crate) struct Evidence {
    pub(crate) kind: Kind,
    /// By this process' clock, as all times but those within a look.
    pub(crate) occurred: SystemTime,
    /// The transaction that reports.
    pub(crate) victim: Journal,
    /// Attempt `attempt` of at most `attempts`, counted from 1.
    pub(crate) attempt: u32,
    pub(crate) attempts: u32,
    pub(crate) outcome: Outcome,
    pub(crate) error: Option<ServerError>,
    /// In order of time.
    pub(crate) looks: Vec<Look>,
    /// Other transactions of this process whose pid is in a look or in the DETAIL.
    pub(crate) others: Vec<Journal>,
    /// What could not be found out, and why: a sentence each, without a full stop.
    pub(crate) missing: Vec<Arc<str>>,
    /// Show literals.
    pub(crate) literals: bool,
}

/// The fields of the server's error, as they are.
#[derive(Clone)]
pub(crate) struct ServerError {
    pub(crate) sqlstate: String,
    pub(crate) message: String,
    pub(crate) detail: Option<String>,
    /// `DbError::where_`.
    pub(crate) context: Option<String>,
    pub(crate) routine: Option<String>,
}

/// One look at who waits for whom.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    pub(crate) snapshot: Arc<Snapshot>,
    /// Since the victim's statement began.
    pub(crate) after: Duration,
    pub(crate) row_keys: Vec<(RowId, RowKey)>,
}

/// What a transaction of this process has said so far.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    pub(crate) pid: Option<i32>,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) application_name: Option<Arc<str>>,
    pub(crate) began: SystemTime,
    /// In order of time.
    pub(crate) statements: Vec<JournalEntry>,
    /// Entries that are no longer kept, and how many of these come before them.
    pub(crate) dropped: usize,
    pub(crate) gap: usize,
    pub(crate) conflict_group: Option<LockKey>,
}

#[derive(Clone)]
pub(crate) struct JournalEntry {
    /// Since BEGIN.
    pub(crate) after: Duration,
    /// `None`: unknown, such as a statement that was prepared elsewhere.
    pub(crate) text: Option<Arc<str>>,
    /// `None`: still running, or not finished.
    pub(crate) took: Option<Duration>,
    pub(crate) failed: bool,
    /// Advisory locks it took, or wanted to.
    pub(crate) advisory: Vec<(LockKey, AdvisoryMode)>,
}

/// Without the texts, which have literals.
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
            .field("took", &self.took)
            .field("failed", &self.failed)
            .field("advisory", &self.advisory)
            .finish()
    }
}
