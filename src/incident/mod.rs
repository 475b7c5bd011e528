//! Deadlocks, lock timeouts and long waits: what happened, which sessions took part, and why.
//!
//! An [`Incident`] combines samples of the wait, the server's error, and the statements that transactions of this
//! process have run before. It is plain values: `Display` gives a readable report, and with the feature `serde` it is a
//! JSON document.

// Pure: turns `Evidence` into an `Incident`, without I/O.

mod diagnosis;
#[cfg(feature = "pictures")]
mod diagram;
mod edge;
mod evidence;
mod fingerprint;
mod journal;
#[cfg(feature = "serde")]
mod json;
mod observed_graph;
mod occurrences;
mod page;
mod participant;
mod redaction;
mod row_key;
mod server;
mod wording;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use diagnosis::{Cause, Diagnosis};
pub use edge::IncidentEdge;
pub(crate) use evidence::{
    Evidence, IncidentTrigger, Journal, JournalEntry, ServerError, WaitSample,
};
pub use fingerprint::Fingerprint;
pub use journal::{JournalLine, JournalMark};
pub(crate) use occurrences::IncidentHistory;
pub use participant::Participant;
pub use row_key::RowKey;

use crate::graph::BackendId;

use crate::error::{Error, Report};
use diagnosis::Facts;
use observed_graph::ObservedGraph;
use occurrences::Occurrences;
use redaction::Redaction;
use server::{ServerMessage, ShownMessage};

impl Report for Incident {}

impl Error {
    /// The report of the deadlock or the lock wait that ended the transaction: the participants, their statements, and
    /// how to fix it.
    ///
    /// After a single attempt a closure's own error is returned unchanged, without a report;
    /// [`on_incident`](crate::KeeperBuilder::on_incident) gets the report in any case.
    #[must_use]
    pub fn incident(&self) -> Option<&Incident> {
        self.report()?.downcast_ref()
    }
}

/// A deadlock, a lock timeout or a long wait: what happened, which sessions took part, why, and how to fix it.
///
/// Cheap to clone. It contains no SQL literals unless those are enabled. It does contain keys of rows and names of
/// advisory locks.
///
/// `Display` is a report of at most 100 columns, without colours; [`headline`](Self::headline) is its first line.
/// [`to_html`](Self::to_html) is a page for browsers, with a diagram.
///
/// # Examples
///
/// ```
/// use lockkeeper::incident::Cause;
///
/// fn explain(error: &lockkeeper::Error) {
///     let Some(incident) = error.incident() else {
///         return;
///     };
///     eprintln!("{incident}");
///     if incident.diagnosis().cause() == Cause::OrderInversion {
///         for edge in incident.cycle() {
///             eprintln!("{} waited for {}", edge.waiter(), edge.object());
///         }
///     }
/// }
/// ```
///
/// # JSON
///
/// With the feature `serde` it is `Serialize`. In JSON, `null` means unknown; times are RFC 3339 in UTC, durations are
/// milliseconds. Fields may be added. If a field changes its meaning or is removed, `version` is incremented.
///
/// | field | what it is |
/// |---|---|
/// | `version` | 1 |
/// | `kind` | `deadlock`, `hidden_deadlock`, `lock_timeout`, `long_wait` |
/// | `headline` | what happened, on one line |
/// | `fingerprint` | 16 hexadecimal digits: [`Fingerprint`] |
/// | `occurred`, `first_seen`, `last_seen`, `previously_seen`, `count` | when, and how often with this fingerprint |
/// | `attempt`, `attempts` | which attempt of the transaction, of how many |
/// | `outcome`, `pause_ms` | `retried` after that pause, `gave_up`, `not_retried`, `still_waiting`, `caught_by_savepoint` |
/// | `diagnosis` | `cause` ([`Cause::as_str`]), `certain`, `text`, `fix` |
/// | `quality`, `captured_after_ms` | `complete`, `partial`, `detail_only`, `nothing`; when it was sampled, since the victim's statement began |
/// | `missing` | what is unknown and why, an array of sentences |
/// | `error` | the server's: `sqlstate`, `message`, `detail`, `context`, without parts that may contain data |
/// | `participants` | an array, the victim first |
/// | `edges` | an array, the edges of the cycle first |
///
/// A participant:
///
/// | field | what it is |
/// |---|---|
/// | `letter` | what `text` calls it: `A`, `B`, … |
/// | `pid`, `prepared`, `backend_start` | the process id, or a prepared transaction's global identifier |
/// | `call_site`, `application_name`, `user`, `database`, `client`, `backend_type` | the session |
/// | `state`, `in_state_ms`, `transaction_age_ms`, `wait_age_ms` | its state when it was sampled, and for how long |
/// | `statement`, `query_id` | what it ran, without literals; the identifier is a string |
/// | `victim`, `waiting`, `hidden`, `in_this_process` | true or false |
/// | `seen_after_ms` | when it was sampled, since the victim's statement began |
/// | `conflict_group` | a key, as below |
/// | `journal_dropped`, `journal` | how many statements are dropped from the middle; an array of the others |
///
/// A line of a journal: `after_ms` since the transaction began, `text`, `took_ms`, `failed`, `advisory` (an array of `key`
/// and `mode`), `mark` (`took`, `may_have_taken`, `waited`).
///
/// An edge:
///
/// | field | what it is |
/// |---|---|
/// | `waiter`, `blocker` | positions in `participants`, counted from 0 |
/// | `in_cycle` | whether it is part of the cycle |
/// | `kind` | `hard`, `soft`, or `null` if it is known from the DETAIL only |
/// | `mode_wanted`, `mode_held`, `mode_queued` | as in `pg_locks.mode` |
/// | `wait_age_ms` | how long it had waited |
/// | `locktype`, `object` | as in `pg_locks.locktype`; in words |
/// | `relation` | its `oid`, `schema`, `name` |
/// | `ctid`, `row_key` | of the row; an array of `column` and `value` |
/// | `advisory_key` | a key: `namespace`, `name`, and `classid`, `objid`, `objsubid` as in `pg_locks` |
#[derive(Clone, Debug)]
pub struct Incident {
    inner: Arc<IncidentData>,
}

#[derive(Debug)]
struct IncidentData {
    kind: IncidentKind,
    occurred: SystemTime,
    attempt: u32,
    attempts: u32,
    outcome: Outcome,
    participants: Vec<Participant>,
    edges: Vec<IncidentEdge>,
    server: ShownMessage,
    completeness: Completeness,
    captured_after: Option<Duration>,
    caveats: Vec<Arc<str>>,
    diagnosis: Diagnosis,
    fingerprint: Fingerprint,
    occurrences: Occurrences,
}

/// The kind of an incident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum IncidentKind {
    /// The server ended a deadlock by failing the transaction.
    Deadlock,
    /// A wait cycle that ended by a lock timeout, or was observed, before the server's deadlock check ran.
    HiddenDeadlock,
    /// A lock was not granted before a timeout: `lock_timeout`, or `statement_timeout` while the session waited (SQLSTATE
    /// 57014). A wait that another session cancelled is one too.
    LockTimeout,
    /// A lock wait that has lasted long and continues.
    LongWait,
}

/// What happened to the reporting transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It is retried.
    #[non_exhaustive]
    Retried {
        /// The pause before the next attempt.
        pause: Duration,
    },
    /// It is not retried, because the attempts, the time or the retry budget are used up.
    GaveUp,
    /// It is not retried, because its failure is not retryable.
    NotRetried,
    /// It is still waiting.
    StillWaiting,
    /// A savepoint caught the failure, and the transaction continued.
    CaughtBySavepoint,
}

/// How much of an incident was observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Completeness {
    /// One sample contains the whole cycle or, in a wait without a cycle, all blockers.
    Complete,
    /// Samples contain a part of it; the rest is from the server's DETAIL.
    Partial,
    /// The edges are known from the server's DETAIL only.
    DetailOnly,
    /// Only the error is known.
    #[default]
    Nothing,
}

impl Outcome {
    /// It is retried after this pause.
    pub(crate) fn retried(pause: Duration) -> Self {
        Self::Retried { pause }
    }
}

impl IncidentKind {
    /// Its name in JSON and in metric labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deadlock => "deadlock",
            Self::HiddenDeadlock => "hidden_deadlock",
            Self::LockTimeout => "lock_timeout",
            Self::LongWait => "long_wait",
        }
    }

    fn of(trigger: IncidentTrigger, observed: &ObservedGraph) -> Self {
        match trigger {
            IncidentTrigger::Deadlock => Self::Deadlock,
            _ if observed.cycle > 0 => Self::HiddenDeadlock,
            IncidentTrigger::LockTimeout => Self::LockTimeout,
            IncidentTrigger::LongWait => Self::LongWait,
        }
    }
}

impl Incident {
    /// Analyses the evidence, and counts the incident in the history.
    pub(crate) fn new(evidence: Evidence, history: &IncidentHistory) -> Self {
        let redaction = Redaction {
            literals: evidence.literals,
        };
        let message = ServerMessage::read(evidence.error.as_ref(), evidence.literals);
        let observed = ObservedGraph::new(&evidence, &message);
        let participants = participant::participants(&evidence, &observed, redaction);
        let kind = IncidentKind::of(evidence.trigger, &observed);
        let diagnosis = diagnosis::diagnose(&Facts {
            kind,
            observed: &observed,
            participants: &participants,
            message: &message,
        });
        let fingerprint = fingerprint::fingerprint(kind, &observed, &participants);
        let mut caveats = evidence.caveats;
        caveats.extend(derived_caveats(&observed, &participants, &message));
        let captured_after = observed.after(&evidence.samples);
        Self {
            inner: Arc::new(IncidentData {
                kind,
                occurred: evidence.occurred,
                attempt: evidence.attempt,
                attempts: evidence.attempts,
                outcome: evidence.outcome,
                participants,
                edges: observed.edges,
                server: message.shown,
                completeness: observed.completeness,
                captured_after,
                caveats,
                diagnosis,
                fingerprint,
                occurrences: history.count(fingerprint, evidence.occurred),
            }),
        }
    }

    getters! {
        /// The kind of the incident.
        kind: IncidentKind = inner.kind;

        /// When it happened, by this process's clock.
        occurred: SystemTime = inner.occurred;

        /// All participants: first the victim, then its blockers, in a deadlock in the order of the cycle. Never empty.
        participants: &[Participant] = inner.participants;
    }

    /// The participant with this id.
    #[must_use]
    pub fn participant(&self, id: &BackendId) -> Option<&Participant> {
        let mut participants = self.inner.participants.iter();
        participants.find(|participant| participant.id() == Some(id))
    }

    #[cfg(any(feature = "pictures", feature = "serde"))]
    fn position(&self, id: &BackendId) -> Option<usize> {
        let mut participants = self.inner.participants.iter();
        participants.position(|participant| participant.id() == Some(id))
    }

    /// The reporting session: the one that failed, or that still waits.
    #[must_use]
    pub fn victim(&self) -> &Participant {
        &self.inner.participants[0]
    }

    /// The waits. First the edges of the cycle, if there was one: the blocker of each is the waiter of the next, and
    /// the blocker of the last one is the victim.
    #[must_use]
    pub fn edges(&self) -> &[IncidentEdge] {
        &self.inner.edges
    }

    /// The edges of the cycle; empty if there was none, or it is unknown.
    #[must_use]
    pub fn cycle(&self) -> &[IncidentEdge] {
        let edges = &self.inner.edges;
        let end = edges.iter().position(|edge| !edge.is_in_cycle());
        &edges[..end.unwrap_or(edges.len())]
    }

    getters! {
        /// The number of the transaction's attempt, counted from 1.
        attempt: u32 = inner.attempt;

        /// The maximum number of attempts.
        attempts: u32 = inner.attempts;

        /// What happened to the reporting transaction.
        outcome: Outcome = inner.outcome;

        /// The SQLSTATE of the server's error; `None` for a wait that continues.
        text sqlstate = inner.server.sqlstate;

        /// The server's message, in its language. Also `None` if it may contain data because a function raised it.
        text message = inner.server.message;

        /// The server's DETAIL, in its language, without lines that may contain data.
        text detail = inner.server.detail;

        /// The server's CONTEXT, in its language, without literals and without lines that may contain data.
        text context = inner.server.context;

        /// How much of the incident was observed.
        completeness: Completeness = inner.completeness;

        /// When it was sampled, since the victim's statement began; `None` if it was not.
        captured_after: Option<Duration> = inner.captured_after;
    }

    /// What is unknown about the incident, and why, one sentence each.
    pub fn caveats(&self) -> impl Iterator<Item = &str> {
        self.inner.caveats.iter().map(|sentence| &**sentence)
    }

    getters! {
        /// The cause, as far as the evidence shows it, and how to fix it.
        diagnosis: &Diagnosis = inner.diagnosis;

        /// The value that all incidents of the same problem have in common.
        fingerprint: Fingerprint = inner.fingerprint;

        /// When the first incident with this fingerprint happened, as far as this process remembers.
        first_seen: SystemTime = inner.occurrences.first;

        /// When the last one happened, including this one.
        last_seen: SystemTime = inner.occurrences.last;

        /// When the previous one happened.
        previously_seen: Option<SystemTime> = inner.occurrences.previous;

        /// How many there were, including this one.
        count: u64 = inner.occurrences.count;
    }
}

/// The caveats that follow from the evidence itself.
fn derived_caveats(
    observed: &ObservedGraph,
    participants: &[Participant],
    message: &ServerMessage,
) -> Vec<Arc<str>> {
    let mut caveats: Vec<Arc<str>> = Vec::new();
    for participant in participants {
        let name = wording::name(participant);
        if participant.is_hidden {
            caveats.push(
                format!("statement and state of {name} are hidden from this role; pg_read_all_stats would show them")
                    .into(),
            );
        } else if participant.seen_after.is_none() && !participant.in_this_process {
            caveats.push(
                format!("{name} was not seen, and is not a transaction of this process").into(),
            );
        }
    }
    if observed.left_out > 0 {
        caveats.push(
            format!(
                "{} more sessions in the way are left out",
                observed.left_out
            )
            .into(),
        );
    }
    if message.shown.withheld > 0 {
        let lines = match message.shown.withheld {
            1 => "a line of the server's error is not shown, since it".to_owned(),
            more => format!("{more} lines of the server's error are not shown, since they"),
        };
        caveats.push(format!("{lines} may carry data").into());
    }
    caveats
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod testing;
