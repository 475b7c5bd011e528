//! Polls, on another connection, the blockers and the progress of a statement while it runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::progress::IndexProgress;
use crate::blocker::{self, Blocker};
use crate::connection::{Connections, is_own_backend};
use crate::graph::{self, Backend, BackendId, Snapshot};
use crate::key::names;
use crate::mode::AdvisoryMode;
use crate::schema::sql::{catalog, index};

/// How often a wait of the length of the timeout is polled.
pub(super) const POLLS_PER_WAIT: u32 = 4;
const MIN_INTERVAL: Duration = Duration::from_millis(10);
const MAX_INTERVAL: Duration = Duration::from_secs(1);
/// How long a poll waits for a connection of the pool.
const CONNECTION_WAIT: Duration = Duration::from_millis(20);

/// A callback that receives the progress of an index build.
pub(super) type OnProgress = Arc<dyn Fn(&IndexProgress) + Send + Sync>;

/// The poll of one statement.
pub(super) struct StatementPoll {
    pid: i32,
    /// How long all waits of the attempt may take together; `None` if only each wait is limited.
    max_total_wait: Option<Duration>,
    interval: Duration,
    ended: AtomicBool,
    end: Notify,
    waited_too_long: Notify,
    blockers: Mutex<Vec<Blocker>>,
    on_progress: Option<OnProgress>,
    /// The server's `deadlock_timeout`, once an autovacuum worker was seen.
    deadlock_timeout: Mutex<Option<Duration>>,
}

impl StatementPoll {
    pub(super) fn new(pid: i32, lock_timeout: Duration, max_total_wait: Option<Duration>) -> Self {
        Self {
            pid,
            max_total_wait,
            interval: (lock_timeout / POLLS_PER_WAIT).clamp(MIN_INTERVAL, MAX_INTERVAL),
            ended: AtomicBool::new(false),
            end: Notify::new(),
            waited_too_long: Notify::new(),
            blockers: Mutex::default(),
            on_progress: None,
            deadlock_timeout: Mutex::default(),
        }
    }

    pub(super) fn with_progress(mut self, on_progress: Option<&OnProgress>) -> Self {
        self.on_progress = on_progress.cloned();
        self
    }

    /// Ends the poll, because the statement has ended.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.end.notify_one();
    }

    /// Completes once the statement's waits together have taken longer than the maximum.
    pub(super) async fn has_waited_too_long(&self) {
        self.waited_too_long.notified().await;
    }

    /// The blockers that were seen last.
    pub(super) fn blockers(&self) -> Vec<Blocker> {
        self.lock().clone()
    }

    /// How long a session has to wait before the server ends the autovacuum worker that blocks it, if one was seen.
    pub(super) fn deadlock_timeout(&self) -> Option<Duration> {
        *self
            .deadlock_timeout
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels the autovacuum workers among the blockers, if the role may and they do not prevent wraparound. It is done
    /// while the statement waits, so that it is the next to get the lock: autovacuum soon returns to the table.
    async fn cancel_autovacuum(
        &self,
        connections: &Arc<Connections>,
        blockers: &[Blocker],
        asked: &mut Vec<i32>,
    ) {
        let workers = blockers
            .iter()
            .filter(|one| one.is_autovacuum() && one.prevents_wraparound() != Some(true));
        let pids: Vec<i32> = workers
            .filter_map(Blocker::pid)
            .filter(|pid| !asked.contains(pid))
            .collect();
        if pids.is_empty() {
            return;
        }
        let sql = catalog::cancel_autovacuum(&pids);
        match connections.look_within(CONNECTION_WAIT, &sql).await {
            Ok(reply) => {
                let Some((cancelled, deadlock_timeout)) = catalog::read_cancelled(&reply) else {
                    return;
                };
                tracing::debug!(?pids, cancelled, "autovacuum workers block a statement");
                let mut known = self
                    .deadlock_timeout
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *known = Some(deadlock_timeout);
                asked.extend(pids);
            }
            Err(error) => tracing::debug!(%error, "autovacuum workers cannot be cancelled"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Blocker>> {
        self.blockers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Polls repeatedly until [`end`](Self::end).
    ///
    /// Cancel safety: a query whose reply is not awaited closes its connection.
    pub(super) async fn run(&self, connections: &Arc<Connections>) {
        // The sum of the waits that are over; and when the current wait began, and its age when it was last seen.
        let mut over = Duration::ZERO;
        let mut last: Option<(Option<std::time::SystemTime>, Duration)> = None;
        let mut asked = Vec::new();
        while !self.ended.load(Ordering::Relaxed) {
            let next = Instant::now() + self.interval;
            tokio::select! {
                biased;
                () = self.end.notified() => return,
                () = tokio::time::sleep_until(next.into()) => {}
            }
            if let Some(on_progress) = &self.on_progress
                && let Ok(reply) = connections
                    .look_within(CONNECTION_WAIT, &index::progress(self.pid))
                    .await
                && let Some(progress) = index::read_progress(&reply)
            {
                on_progress(&IndexProgress::from(progress));
            }
            let sql = graph::sql::wait_graph(Some(&[self.pid]));
            let reply = match connections.look_within(CONNECTION_WAIT, &sql).await {
                Ok(reply) => reply,
                Err(error) => {
                    tracing::debug!(%error, "nobody can look at who is in the way");
                    continue;
                }
            };
            let Some(seen) =
                graph::sql::read_sample(&reply, &|key| names::lookup(key.id()).unwrap_or(key))
            else {
                continue;
            };
            let snapshot = seen.snapshot(Duration::ZERO);
            let blockers = blockers(&snapshot, self.pid);
            if blockers.is_empty() {
                continue;
            }
            for blocker in blockers.iter().filter(|one| one.waits_for_us.is_some()) {
                tracing::warn!(%blocker, "a statement waits for a session that waits for this process");
            }
            self.cancel_autovacuum(connections, &blockers, &mut asked)
                .await;
            *self.lock() = blockers;
            let me = BackendId::Pid(self.pid);
            let mut edges = snapshot.edges_of(&me);
            let Some(edge) = edges.next() else { continue };
            let (since, age) = (edge.waiting_since(), edge.wait_age().unwrap_or_default());
            if let Some((previous_since, previous_age)) = last
                && previous_since != since
            {
                over += previous_age;
            }
            last = Some((since, age));
            // The server's own timeout ends the first wait; it starts anew for each further wait.
            if !over.is_zero() && self.max_total_wait.is_some_and(|max| over + age >= max) {
                self.waited_too_long.notify_one();
            }
        }
    }
}

/// Whether it is an autovacuum worker. A role that may not see the kind of process sees that it has a database and no
/// user, which other processes with locks on tables have.
fn is_autovacuum(backend: &Backend) -> bool {
    match backend.backend_type() {
        Some(kind) => kind == "autovacuum worker",
        None => backend.is_hidden() && backend.user().is_none() && backend.database().is_some(),
    }
}

/// What a blocker waits for that a session of this process holds.
fn waits_for_us(snapshot: &Snapshot, blocker: &BackendId) -> Option<String> {
    let mut waits = snapshot.edges_of(blocker);
    let edge = waits.find(|edge| edge.blocker().pid().is_some_and(is_own_backend))?;
    Some(edge.object().to_string())
}

/// The blockers of a backend in a snapshot.
fn blockers(snapshot: &Snapshot, pid: i32) -> Vec<Blocker> {
    let me = BackendId::Pid(pid);
    let edges = snapshot.edges_of(&me);
    let blocker = |edge: &crate::graph::Edge| {
        let backend = snapshot.backend(edge.blocker());
        let of = |get: fn(&Backend) -> Option<&str>| backend.and_then(get).map(str::to_owned);
        let mode = edge.mode_held().or(edge.mode_queued());
        Blocker {
            pid: edge.blocker().pid(),
            prepared: edge.blocker().prepared_transaction().map(str::to_owned),
            application_name: of(Backend::application_name),
            user: of(Backend::user),
            state: of(Backend::state),
            state_age: backend.and_then(Backend::state_age),
            transaction_age: backend.and_then(Backend::transaction_age),
            mode: AdvisoryMode::Exclusive,
            object: Some((
                edge.object().to_string(),
                mode.unwrap_or(edge.mode_wanted()),
            )),
            granted: edge.mode_held().is_some(),
            autovacuum: backend.is_some_and(is_autovacuum),
            wraparound: blocker::prevents_wraparound(backend.and_then(Backend::statement)),
            waits_for_us: waits_for_us(snapshot, edge.blocker()),
            is_own: edge.blocker().pid().is_some_and(is_own_backend),
        }
    };
    edges.map(blocker).collect()
}
