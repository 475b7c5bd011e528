//! The findings of a watchdog.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use super::policy::WatchdogPolicy;
use crate::graph::{Backend, BackendId, Snapshot};
use crate::key::LockKey;
use crate::monitor::AdvisoryLockEntry;
use crate::postgres::text::Joined;
use crate::postgres::timestamp::Age;
use crate::resolver::signal::SignalOutcome;

/// The kind of problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// A session holds advisory locks, has been idle outside of any transaction for long, and is not owned by a live
    /// guard of this process.
    LeakedLock,
    /// A session blocks others and is idle in its transaction.
    IdleBlocker,
    /// A session has waited for a lock for longer than its client would: the client may be gone.
    ZombieWaiter,
}

/// A problem that a watchdog has found, and the outcome of clearing it.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    kind: FindingKind,
    backend: Backend,
    keys: Vec<LockKey>,
    blocks: usize,
    age: Duration,
    pub(super) cleared: Option<SignalOutcome>,
}

/// Identifies a finding for as long as it persists.
pub(super) type FindingId = (
    FindingKind,
    BackendId,
    Option<SystemTime>,
    Option<SystemTime>,
);

impl Finding {
    getters! {
        /// The kind of problem.
        kind: FindingKind;

        /// The session that it concerns.
        backend: &Backend;

        /// The advisory locks that are leaked; empty for other findings.
        keys: &[LockKey];

        /// How many sessions it blocks.
        blocks: usize;

        /// How long it has been idle, or has waited.
        age: Duration;

        /// The outcome of clearing it; `None` if the policy only requires reports, if the query to the server failed,
        /// or if the watchdog was stopped first.
        cleared: Option<&SignalOutcome>;
    }

    pub(super) fn id(&self) -> FindingId {
        (
            self.kind,
            self.backend.id().clone(),
            self.backend.backend_start(),
            self.backend.transaction_start(),
        )
    }
}

/// `leaked: pid 4711 (…) has held "invoice:42" idle for 10min 00s: terminated`
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let age = Age(self.age);
        match self.kind {
            FindingKind::LeakedLock => {
                let keys = Joined(&self.keys, ", ");
                let backend = &self.backend;
                write!(
                    f,
                    "leaked: {backend} holds {keys} and has been idle for {age}"
                )?;
            }
            FindingKind::IdleBlocker => {
                write!(
                    f,
                    "idle blocker: {} has been idle in its transaction for {age}",
                    self.backend
                )?;
            }
            FindingKind::ZombieWaiter => {
                write!(
                    f,
                    "zombie: {} has waited for a lock for {age}",
                    self.backend
                )?;
            }
        }
        match self.blocks {
            0 => {}
            1 => f.write_str(", and keeps 1 session waiting")?,
            n => write!(f, ", and keeps {n} sessions waiting")?,
        }
        match &self.cleared {
            Some(outcome) => write!(f, ": {outcome}"),
            None => Ok(()),
        }
    }
}

/// The sessions with leaked locks, each once.
pub(super) fn leaked_locks(policy: &WatchdogPolicy, leaks: Vec<AdvisoryLockEntry>) -> Vec<Finding> {
    let mut found: BTreeMap<BackendId, Finding> = BTreeMap::new();
    for entry in leaks {
        let backend = entry.backend();
        if !policy
            .protection_policy
            .includes_database(backend.database())
        {
            continue;
        }
        let finding = found
            .entry(backend.id().clone())
            .or_insert_with(|| Finding {
                kind: FindingKind::LeakedLock,
                backend: backend.clone(),
                keys: Vec::new(),
                blocks: 0,
                age: entry.idle_for().unwrap_or_default(),
                cleared: None,
            });
        finding.keys.push(entry.key().clone());
    }
    found.into_values().collect()
}

/// The idle sessions that block others, and the sessions that have waited for too long. `is_own` returns whether a live
/// guard or transaction of this process owns the session with a process id.
pub(super) fn blockers_and_zombies(
    policy: &WatchdogPolicy,
    snapshot: &Snapshot,
    is_own: impl Fn(i32) -> bool,
) -> Vec<Finding> {
    let mut found = Vec::new();
    let backends = snapshot.backends().iter();
    for backend in backends.filter(|backend| {
        policy
            .protection_policy
            .includes_database(backend.database())
    }) {
        let is_idle = backend
            .state()
            .is_some_and(|state| state.starts_with("idle in transaction"));
        let finding = |kind, age| Finding {
            kind,
            backend: backend.clone(),
            keys: Vec::new(),
            blocks: snapshot.blocked_count(backend.id()),
            age,
            cleared: None,
        };
        if let (Some(bound), Some(idle), true) = (policy.idle.age, backend.state_age(), is_idle)
            && idle >= bound
        {
            let finding = finding(FindingKind::IdleBlocker, idle);
            if finding.blocks > 0 {
                found.push(finding);
            }
        }
        let waited = snapshot.edges_of(backend.id());
        let waited = waited.filter_map(|edge| edge.wait_age()).max();
        if let (Some(bound), Some(waited), Some(pid)) = (policy.zombies.age, waited, backend.pid())
            && waited >= bound
            && !is_own(pid)
            && may_be_zombie(policy, backend)
        {
            found.push(finding(FindingKind::ZombieWaiter, waited));
        }
    }
    found
}

fn may_be_zombie(policy: &WatchdogPolicy, backend: &Backend) -> bool {
    let name = backend.application_name().unwrap_or_default();
    policy.zombie_applications.is_empty()
        || policy
            .zombie_applications
            .iter()
            .any(|pattern| pattern.matches(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::testing::{backend, edge, snapshot};

    const SECOND: Duration = Duration::from_secs(1);

    fn idle(pid: i32, seconds: u32) -> Backend {
        let mut backend = backend(pid);
        backend.state = Some("idle in transaction".into());
        backend.state_age = Some(SECOND * seconds);
        backend
    }

    fn found(policy: &WatchdogPolicy, snapshot: &Snapshot) -> Vec<(FindingKind, i32)> {
        let found = blockers_and_zombies(policy, snapshot, |pid| pid == 9);
        let found = found.iter();
        found
            .filter_map(|finding| Some((finding.kind(), finding.backend().pid()?)))
            .collect()
    }

    #[test]
    fn only_sessions_that_block_others_and_are_idle_for_long_are_idle_blockers() {
        let policy = WatchdogPolicy::new().idle_blockers(60 * SECOND);
        let observed = |seconds, edges| snapshot(vec![idle(1, seconds), idle(5, 99)], edges);
        let waits = || vec![edge(2, 1, SECOND)];
        assert_eq!(
            found(&policy, &observed(60, waits())),
            [(FindingKind::IdleBlocker, 1)]
        );
        assert_eq!(found(&policy, &observed(59, waits())), []);
        assert_eq!(found(&policy, &observed(60, vec![])), []);
        let off = policy.idle_blockers(None);
        assert_eq!(found(&off, &observed(60, waits())), []);
    }

    #[test]
    fn only_long_waiters_that_this_process_does_not_own_are_zombies() {
        let policy = WatchdogPolicy::new().zombie_waiters(600 * SECOND);
        let mut other = backend(3);
        other.application_name = Some("billing src/pay.rs:42".into());
        let snapshot = snapshot(
            vec![backend(2), other, backend(4), backend(9)],
            vec![
                edge(2, 1, 600 * SECOND),
                edge(3, 1, 601 * SECOND),
                edge(4, 1, 599 * SECOND),
                edge(9, 1, 900 * SECOND),
            ],
        );
        let zombie = FindingKind::ZombieWaiter;
        assert_eq!(found(&policy, &snapshot), [(zombie, 2), (zombie, 3)]);
        let named = policy.default_zombie_application("billing");
        assert_eq!(found(&named, &snapshot), [(zombie, 3)]);
        let first = blockers_and_zombies(&named, &snapshot, |_| false).remove(0);
        let text = first.to_string();
        assert!(
            text.starts_with("zombie: pid 3 (billing src/pay.rs:42")
                && text.ends_with("has waited for a lock for 10min 01s"),
            "{text}"
        );
    }
}
