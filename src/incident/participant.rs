//! One participant, with all that is known of it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::call_site;
use crate::graph::{Backend, BackendId};
use crate::key::LockKey;
use crate::postgres::statement;

use super::journal::{JournalReader, SAME_TIME};
use super::observed_graph::ObservedGraph;
use super::redaction::{self, Redaction};
use super::{Evidence, IncidentEdge, Journal, JournalLine, WaitSample};

/// A session, or a prepared transaction, that took part in an incident.
///
/// A value is `None` if it is unknown, or hidden from the querying role.
#[derive(Clone, Debug, PartialEq)]
pub struct Participant {
    pub(super) letter: Arc<str>,
    pub(super) id: Option<BackendId>,
    pub(super) backend_start: Option<SystemTime>,
    pub(super) call_site: Option<Arc<str>>,
    pub(super) application_name: Option<Arc<str>>,
    pub(super) user: Option<Arc<str>>,
    pub(super) database: Option<Arc<str>>,
    pub(super) client_address: Option<Arc<str>>,
    pub(super) backend_type: Option<Arc<str>>,
    pub(super) state: Option<Arc<str>>,
    pub(super) state_age: Option<Duration>,
    pub(super) transaction_age: Option<Duration>,
    pub(super) wait_age: Option<Duration>,
    pub(super) statement: Option<Arc<str>>,
    pub(super) query_id: Option<i64>,
    pub(super) is_victim: bool,
    pub(super) is_hidden: bool,
    pub(super) in_this_process: bool,
    pub(super) waits: bool,
    pub(super) seen_after: Option<Duration>,
    pub(super) journal: Vec<JournalLine>,
    pub(super) journal_dropped: usize,
    /// How many lines of the journal come before the dropped ones.
    pub(super) journal_gap: usize,
    pub(super) conflict_group: Option<LockKey>,
    /// A form of the call site that is equal whether the site is known here or was read from `application_name`.
    pub(super) site_key: Option<Arc<str>>,
    /// The fingerprint of the statement, as the server keeps it.
    pub(super) fingerprint: Option<statement::StatementFingerprint>,
}

impl Participant {
    /// The id used in [`IncidentEdge`](super::IncidentEdge); `None` if the victim could not be identified.
    #[must_use]
    pub fn id(&self) -> Option<&BackendId> {
        self.id.as_ref()
    }

    /// What the report calls it: `A` for the victim, then `B` and so on.
    #[must_use]
    pub fn letter(&self) -> &str {
        &self.letter
    }

    /// The process id; also `None` for a prepared transaction.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.id.as_ref()?.pid()
    }

    getters! {
        /// When the backend was started. Together with the process id it identifies the backend.
        backend_start: Option<SystemTime>;

        /// Where in the program the transaction was started: `src/pay.rs:42`. For other processes it is read from
        /// `application_name`, which cuts a long path at its beginning.
        text call_site;

        /// The `application_name`.
        text application_name;

        /// The role that it was logged in as.
        text user;

        /// The database that it was connected to.
        text database;

        /// The client's IP address; also `None` for a client on a Unix socket.
        text client_address;

        /// The kind of process: `client backend`, `autovacuum worker`, …
        text backend_type;

        /// Its state as PostgreSQL names it: `active`, `idle in transaction`, …
        text state;

        /// How long it had been in that state.
        state_age: Option<Duration>;

        /// The age of its transaction.
        transaction_age: Option<Duration>;

        /// How long it had waited for a lock when it was sampled.
        wait_age: Option<Duration>;

        /// The statement that it ran, or the last one if it was idle; without literals unless those are enabled.
        text statement;

        /// The statement's identifier, as in `pg_stat_statements.queryid`.
        query_id: Option<i64>;

        /// Whether it is the reporting session: the one that failed, or that still waits.
        is_victim: bool;

        /// Whether parts were hidden from the querying role, so that a `None` means unknown.
        is_hidden: bool;

        /// Whether it is a transaction of this process that uses this crate.
        is_in_this_process: bool = in_this_process;

        /// Whether it was waiting for a lock itself.
        is_waiting: bool = waits;

        /// When it was sampled, since the victim's statement began; `None` if no sample contains it.
        seen_after: Option<Duration>;

        /// The statements of its transaction up to the incident; empty for sessions of other processes.
        journal: &[JournalLine];

        /// How many statements were dropped from the middle of the [`journal`](Self::journal).
        journal_dropped: usize;

        /// The conflict group of its transaction.
        conflict_group: Option<&LockKey>;
    }
}

/// All participants, the victim first, then in the order of the edges.
pub(super) fn participants(
    evidence: &Evidence,
    observed: &ObservedGraph,
    redaction: Redaction,
) -> Vec<Participant> {
    let mut ids = vec![observed.victim.clone()];
    for edge in &observed.edges {
        for id in [&edge.waiter, &edge.blocker] {
            if !ids.iter().flatten().any(|known| known == id) {
                ids.push(Some(id.clone()));
            }
        }
    }
    let numbered = ids.into_iter().enumerate();
    numbered
        .map(|(at, id)| participant(evidence, observed, redaction, id, at))
        .collect()
}

/// `A` to `Z`, then `AA` and so on.
fn letter(at: usize) -> String {
    let mut letters = Vec::new();
    let mut left = at + 1;
    while left > 0 {
        let digit = (left - 1) % 26;
        letters.push((b'A'..=b'Z').nth(digit).map_or('A', char::from));
        left = (left - 1) / 26;
    }
    letters.iter().rev().collect()
}

fn participant(
    evidence: &Evidence,
    observed: &ObservedGraph,
    redaction: Redaction,
    id: Option<BackendId>,
    at: usize,
) -> Participant {
    let is_victim = at == 0;
    let sampled = id.as_ref().and_then(|id| sampled(evidence, observed, id));
    let backend = sampled.map(|(_, backend)| backend);
    let waits_for = |edge: &&IncidentEdge| Some(&edge.waiter) == id.as_ref();
    let own_edges = || observed.edges.iter().filter(waits_for);
    let held = observed.edges.iter();
    let held = held.filter(|edge| Some(&edge.blocker) == id.as_ref() && !edge.is_soft());
    let journal = journal(evidence, id.as_ref(), is_victim);
    let waits = is_victim || own_edges().next().is_some();
    let on_server = backend.and_then(Backend::statement);
    let reading = journal.map(|journal| {
        if is_victim {
            JournalReader::of_victim(journal)
        } else if waits {
            let was_seen = own_edges().any(IncidentEdge::was_seen);
            let running = on_server.filter(|_| was_seen);
            let sampled_at = sampled_at(evidence, observed).filter(|_| was_seen);
            let waited = own_edges().filter_map(|edge| edge.wait_age).max();
            // The reply comes after the sample, and the wait may have ended in between. The statement that waited had
            // begun when the wait began, however long the reply took.
            let begun = sampled_at.and_then(|at| {
                let since = waited.unwrap_or_default().saturating_sub(SAME_TIME);
                at.checked_sub(since)
            });
            let occurred = evidence.occurred;
            JournalReader::of_waiter(journal, occurred, begun.unwrap_or(occurred), running)
        } else {
            JournalReader::of_holder(journal, evidence.occurred)
        }
    });
    // The server keeps only the beginning of a statement. But for a session that did not wait it shows what it was
    // doing.
    let statement = if waits {
        let waited = reading.as_ref().and_then(JournalReader::waited);
        waited.or(on_server)
    } else {
        let last = reading.as_ref().and_then(JournalReader::last);
        let shown = backend.and_then(Backend::shown_statement);
        shown.or(last)
    };
    let name = backend.and_then(Backend::application_name).map(Arc::from);
    let name = name.or_else(|| journal?.application_name.clone());
    let call_site = match journal {
        Some(journal) => journal.call_site.map(|site| Arc::from(site.to_string())),
        None => name.as_deref().and_then(call_site::site_in).map(Arc::from),
    };
    let site_key = match journal {
        Some(journal) => journal.call_site.map(|site| {
            let name = call_site::ApplicationNames::new(String::new()).of(Some(&site));
            Arc::from(without_folders(&name))
        }),
        None => call_site.as_deref().map(without_folders).map(Arc::from),
    };
    let text = |text: Option<&str>| text.map(Arc::from);
    let journal_age =
        journal.and_then(|journal| evidence.occurred.duration_since(journal.began).ok());
    Participant {
        letter: letter(at).into(),
        backend_start: backend.and_then(Backend::backend_start),
        call_site,
        site_key,
        application_name: name,
        user: text(backend.and_then(Backend::user)),
        database: text(backend.and_then(Backend::database)),
        client_address: text(backend.and_then(Backend::client_address)),
        backend_type: text(backend.and_then(Backend::backend_type)),
        state: text(backend.and_then(Backend::state)),
        state_age: backend.and_then(Backend::state_age),
        transaction_age: backend.and_then(Backend::transaction_age).or(journal_age),
        wait_age: own_edges().filter_map(|edge| edge.wait_age).max(),
        statement: statement.map(|sql| redaction.statement(sql)),
        query_id: backend.and_then(Backend::query_id),
        is_victim,
        is_hidden: backend.is_some_and(Backend::is_hidden),
        in_this_process: journal.is_some(),
        waits,
        seen_after: sampled.map(|(sample, _)| sample.after),
        journal: reading.map_or_else(Vec::new, |reading| reading.lines(held, redaction)),
        journal_dropped: journal.map_or(0, |journal| journal.dropped),
        journal_gap: journal.map_or(0, |journal| journal.gap),
        conflict_group: journal.and_then(|journal| journal.conflict_group.clone()),
        fingerprint: statement.map(redaction::fingerprint),
        id,
    }
}

/// From the sample that the edges are from, else from the last sample that contains the session.
fn sampled<'a>(
    evidence: &'a Evidence,
    observed: &ObservedGraph,
    id: &BackendId,
) -> Option<(&'a WaitSample, &'a Backend)> {
    let best = observed.sample.and_then(|at| evidence.samples.get(at));
    let mut samples = best.into_iter().chain(evidence.samples.iter().rev());
    samples.find_map(|sample| {
        let backend = sample.snapshot.backend(id)?;
        (!backend.is_gone()).then_some((sample, backend))
    })
}

/// When the sample was taken that the edges are from.
fn sampled_at(evidence: &Evidence, observed: &ObservedGraph) -> Option<SystemTime> {
    let since = JournalReader::of_victim(&evidence.victim).waited_since()?;
    let began = evidence.victim.began.checked_add(since)?;
    began.checked_add(observed.after(&evidence.samples)?)
}

fn journal<'a>(
    evidence: &'a Evidence,
    id: Option<&BackendId>,
    is_victim: bool,
) -> Option<&'a Journal> {
    if is_victim {
        return Some(&evidence.victim);
    }
    let pid = id?.pid()?;
    evidence
        .others
        .iter()
        .find(|journal| journal.pid == Some(pid))
}

/// The file name and line: the path may have been cut at its beginning.
fn without_folders(site: &str) -> &str {
    site.rsplit('/').next().unwrap_or(site)
}

#[cfg(test)]
mod tests {
    use super::letter;

    #[test]
    fn letters_go_on_after_z() {
        let letters: Vec<_> = [0, 25, 26, 51, 52, 701, 702].map(letter).to_vec();
        assert_eq!(letters, ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]);
    }
}
