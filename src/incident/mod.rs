//! What happened and who was there: deadlocks, lock timeouts and long waits, explained.
//!
//! An [`Incident`] is made of what was seen of a wait while it lasted, of what the server's error says, and of what the
//! transactions of this process have said before. It is plain values: its `Display` is a page for people, and with the
//! feature `serde` it is a JSON document for programs.

// Pure: from `Evidence` to an `Incident`, without I/O.

mod diagnosis;
#[cfg(feature = "pictures")]
mod drawing;
mod edge;
mod evidence;
mod fingerprint;
mod history;
mod journal;
#[cfg(feature = "serde")]
mod json;
mod page;
mod participant;
mod row_key;
mod scene;
mod server;
mod texts;
mod words;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use diagnosis::{Cause, Diagnosis};
pub use edge::IncidentEdge;
pub(crate) use evidence::{Evidence, Journal, JournalEntry, Kind, Look, ServerError};
pub use fingerprint::Fingerprint;
pub(crate) use history::History;
pub use journal::{JournalLine, JournalMark};
pub use participant::Participant;
pub use row_key::RowKey;

use crate::graph::BackendId;

use crate::error::{Error, Report};
use diagnosis::Facts;
use history::Sightings;
use scene::Scene;
use server::{Message, Shown};
use texts::Texts;

impl Report for Incident {}

impl Error {
    /// What is known of the deadlock or the wait for a lock that ended the transaction: the participants, their
    /// statements, and what to do about it.
    ///
    /// Where only one attempt was made, a closure's own error is passed on as it is, without it;
    /// [`on_incident`](crate::KeeperBuilder::on_incident) is told all the same.
    #[must_use]
    pub fn incident(&self) -> Option<&Incident> {
        self.report()?.downcast_ref()
    }
}

/// A deadlock, a lock timeout or a long wait: what happened, who was there, why, and what to do about it.
///
/// Cheap to clone. No literal of any SQL is in it, unless that was asked for; keys of rows and names of advisory locks
/// are.
///
/// `Display` is a page of at most 100 columns, without colours; [`headline`](Self::headline) is its first line.
/// [`to_html`](Self::to_html) is a page for browsers, with a picture.
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
/// With the feature `serde` it is `Serialize`. In JSON, `null` is what is not known; times are RFC 3339 in UTC, durations
/// are milliseconds. Fields may be added; where one changes its meaning or goes away, `version` goes up.
///
/// | field | what it is |
/// |---|---|
/// | `version` | 1 |
/// | `kind` | `deadlock`, `hidden_deadlock`, `lock_timeout`, `long_wait` |
/// | `headline` | what happened, on one line |
/// | `fingerprint` | 16 hexadecimal digits: [`Fingerprint`] |
/// | `occurred`, `first_seen`, `last_seen`, `previously_seen`, `count` | when, and how often with this fingerprint |
/// | `attempt`, `attempts` | which attempt of the transaction, of how many |
/// | `outcome`, `pause_ms` | `retried` after that pause, `gave_up`, `not_retried`, `still_waiting` |
/// | `diagnosis` | `cause` ([`Cause::as_str`]), `certain`, `text`, `fix` |
/// | `quality`, `captured_after_ms` | `complete`, `partial`, `detail_only`, `nothing`; when it was seen, since the victim's statement began |
/// | `missing` | what is not known and why, an array of sentences |
/// | `error` | the server's: `sqlstate`, `message`, `detail`, `context`, as far as they carry no data |
/// | `participants` | an array, the victim first |
/// | `edges` | an array, those of the circle first |
///
/// A participant:
///
/// | field | what it is |
/// |---|---|
/// | `pid`, `prepared`, `backend_start` | the process id, or a prepared transaction's global identifier |
/// | `call_site`, `application_name`, `user`, `database`, `client`, `backend_type` | who it is |
/// | `state`, `in_state_ms`, `transaction_age_ms`, `wait_age_ms` | what it did when it was seen, and for how long |
/// | `statement`, `query_id` | what it ran, without literals; the identifier is a string |
/// | `victim`, `waiting`, `hidden`, `in_this_process` | true or false |
/// | `seen_after_ms` | when it was seen, since the victim's statement began |
/// | `conflict_group` | a key, as below |
/// | `journal_dropped`, `journal` | statements out of its middle that are not known any more; an array of those that are |
///
/// A line of a journal: `after_ms` since the transaction began, `text`, `took_ms`, `failed`, `advisory` (an array of `key`
/// and `mode`), `mark` (`took`, `may_have_taken`, `waited`).
///
/// An edge:
///
/// | field | what it is |
/// |---|---|
/// | `waiter`, `blocker` | places in `participants`, counted from 0 |
/// | `in_cycle` | whether it is part of the circle |
/// | `kind` | `hard`, `soft`, or `null` where only the DETAIL tells of it |
/// | `mode_wanted`, `mode_held`, `mode_queued` | as in `pg_locks.mode` |
/// | `wait_age_ms` | for how long it had waited |
/// | `locktype`, `object` | as in `pg_locks.locktype`; in words |
/// | `relation` | its `oid`, `schema`, `name` |
/// | `ctid`, `row_key` | of the row; an array of `column` and `value` |
/// | `advisory_key` | a key: `namespace`, `name`, and `classid`, `objid`, `objsubid` as in `pg_locks` |
#[derive(Clone, Debug)]
pub struct Incident {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: IncidentKind,
    occurred: SystemTime,
    attempt: u32,
    attempts: u32,
    outcome: Outcome,
    participants: Vec<Participant>,
    edges: Vec<IncidentEdge>,
    server: Shown,
    quality: Quality,
    captured_after: Option<Duration>,
    missing: Vec<Arc<str>>,
    diagnosis: Diagnosis,
    fingerprint: Fingerprint,
    sightings: Sightings,
}

/// What kind of incident it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum IncidentKind {
    /// The server broke a deadlock by failing the transaction.
    Deadlock,
    /// Sessions waited for one another in a circle, but a lock timeout ended it, or it was seen, before the server
    /// looked.
    HiddenDeadlock,
    /// A lock was not granted in time.
    LockTimeout,
    /// A wait for a lock that has lasted long, and goes on.
    LongWait,
}

/// What became of the transaction that reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It is run once more.
    #[non_exhaustive]
    Retried {
        /// After this.
        pause: Duration,
    },
    /// It is not run again, since attempts, time or the budget for retries are used up.
    GaveUp,
    /// It is not run again, since this failure is not to be retried.
    NotRetried,
    /// It waits on.
    StillWaiting,
}

/// How much of an incident was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Quality {
    /// The whole circle was seen in one look; of a wait without a circle, all that was in its way.
    Complete,
    /// Some of it was seen; of the rest there is what the server's DETAIL says.
    Partial,
    /// Who waited for whom is known from the server's DETAIL only.
    DetailOnly,
    /// Nothing but the error.
    #[default]
    Nothing,
}

impl Outcome {
    /// It is run once more, after this pause.
    pub(crate) fn retried(pause: Duration) -> Self {
        Self::Retried { pause }
    }
}

impl IncidentKind {
    /// Its name in JSON, and for labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deadlock => "deadlock",
            Self::HiddenDeadlock => "hidden_deadlock",
            Self::LockTimeout => "lock_timeout",
            Self::LongWait => "long_wait",
        }
    }

    fn of(kind: Kind, scene: &Scene) -> Self {
        match kind {
            Kind::Deadlock => Self::Deadlock,
            _ if scene.cycle > 0 => Self::HiddenDeadlock,
            Kind::LockTimeout => Self::LockTimeout,
            Kind::LongWait => Self::LongWait,
        }
    }
}

impl Incident {
    /// Makes sense of what is known, and counts it.
    pub(crate) fn new(evidence: Evidence, history: &History) -> Self {
        let texts = Texts {
            literals: evidence.literals,
        };
        let message = Message::read(evidence.error.as_ref(), evidence.literals);
        let scene = Scene::new(&evidence, &message);
        let participants = participant::participants(&evidence, &scene, texts);
        let kind = IncidentKind::of(evidence.kind, &scene);
        let diagnosis = diagnosis::diagnose(&Facts {
            kind,
            scene: &scene,
            participants: &participants,
            message: &message,
        });
        let fingerprint = fingerprint::fingerprint(kind, &scene, &participants);
        let mut missing = evidence.missing;
        missing.extend(not_known(&scene, &participants, &message));
        let captured_after = scene.after(&evidence.looks);
        Self {
            inner: Arc::new(Inner {
                kind,
                occurred: evidence.occurred,
                attempt: evidence.attempt,
                attempts: evidence.attempts,
                outcome: evidence.outcome,
                participants,
                edges: scene.edges,
                server: message.shown,
                quality: scene.quality,
                captured_after,
                missing,
                diagnosis,
                fingerprint,
                sightings: history.count(fingerprint, evidence.occurred),
            }),
        }
    }

    /// What kind of incident it is.
    #[must_use]
    pub fn kind(&self) -> IncidentKind {
        self.inner.kind
    }

    /// When it happened, by this process' clock.
    #[must_use]
    pub fn occurred(&self) -> SystemTime {
        self.inner.occurred
    }

    /// Everybody who took part: first the one that reports, then those in its way, in a deadlock in the order of the
    /// circle. Never empty.
    #[must_use]
    pub fn participants(&self) -> &[Participant] {
        &self.inner.participants
    }

    /// One of them.
    #[must_use]
    pub fn participant(&self, id: &BackendId) -> Option<&Participant> {
        let mut participants = self.inner.participants.iter();
        participants.find(|participant| participant.id() == Some(id))
    }

    /// The one that reports: the one that failed, or that waits on.
    #[must_use]
    pub fn victim(&self) -> &Participant {
        &self.inner.participants[0]
    }

    /// Who waited for whom. First those that made a circle, if any did: the blocker of each is the waiter of the next,
    /// and that of the last one the victim.
    #[must_use]
    pub fn edges(&self) -> &[IncidentEdge] {
        &self.inner.edges
    }

    /// The edges that made a circle; empty where there was none, or it is not known.
    #[must_use]
    pub fn cycle(&self) -> &[IncidentEdge] {
        let edges = &self.inner.edges;
        let end = edges.iter().position(|edge| !edge.is_in_cycle());
        &edges[..end.unwrap_or(edges.len())]
    }

    /// Which attempt of the transaction it was, counted from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.inner.attempt
    }

    /// How many attempts there may be in all.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.inner.attempts
    }

    /// What became of the transaction that reports.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.inner.outcome
    }

    /// The SQLSTATE of the server's error; `None` for a wait that goes on.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        self.inner.server.sqlstate.as_deref()
    }

    /// The server's message, in its language. `None` too where it may carry data, having been raised by a function.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.inner.server.message.as_deref()
    }

    /// The server's DETAIL, in its language, without lines that may carry data.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        self.inner.server.detail.as_deref()
    }

    /// The server's CONTEXT, in its language, without literals and lines that may carry data.
    #[must_use]
    pub fn context(&self) -> Option<&str> {
        self.inner.server.context.as_deref()
    }

    /// How much of it was seen.
    #[must_use]
    pub fn quality(&self) -> Quality {
        self.inner.quality
    }

    /// When it was seen, since the victim's statement began; `None` where it was not.
    #[must_use]
    pub fn captured_after(&self) -> Option<Duration> {
        self.inner.captured_after
    }

    /// What is not known of it, and why, a sentence each.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.inner.missing.iter().map(|sentence| &**sentence)
    }

    /// Why it happened, as far as the evidence bears it, and what to do about it.
    #[must_use]
    pub fn diagnosis(&self) -> &Diagnosis {
        &self.inner.diagnosis
    }

    /// What is the same for all incidents that are one problem.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.inner.fingerprint
    }

    /// When an incident with this fingerprint was there first, as far as this process remembers.
    #[must_use]
    pub fn first_seen(&self) -> SystemTime {
        self.inner.sightings.first
    }

    /// When one was there last, up to this one.
    #[must_use]
    pub fn last_seen(&self) -> SystemTime {
        self.inner.sightings.last
    }

    /// When one was there before this one.
    #[must_use]
    pub fn previously_seen(&self) -> Option<SystemTime> {
        self.inner.sightings.previous
    }

    /// How many there were, with this one.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.inner.sightings.count
    }
}

/// What the evidence itself shows to be missing.
fn not_known(scene: &Scene, participants: &[Participant], message: &Message) -> Vec<Arc<str>> {
    let mut missing: Vec<Arc<str>> = Vec::new();
    for participant in participants {
        let name = words::who(participant);
        if participant.is_hidden {
            missing.push(
                format!("statement and state of {name} are hidden from this role; pg_read_all_stats would show them")
                    .into(),
            );
        } else if participant.seen_after.is_none() && !participant.in_this_process {
            missing.push(
                format!("{name} was not seen, and is not a transaction of this process").into(),
            );
        }
    }
    if scene.left_out > 0 {
        missing.push(format!("{} more sessions in the way are left out", scene.left_out).into());
    }
    if message.shown.withheld > 0 {
        let lines = match message.shown.withheld {
            1 => "a line of the server's error is not shown, since it".to_owned(),
            more => format!("{more} lines of the server's error are not shown, since they"),
        };
        missing.push(format!("{lines} may carry data").into());
    }
    missing
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod testing;
