//! Looking, on another connection, at who is in the way of a statement while it waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::blocker::Blocker;
use crate::connection::Connections;
use crate::graph;
use crate::graph::{Backend, BackendId, Snapshot};
use crate::mode::AdvisoryMode;
use crate::schema::sql::index;

use super::progress::IndexProgress;

/// The shortest time between two looks.
const LEAST: Duration = Duration::from_millis(10);
/// How long a connection of the pool's is waited for to look on.
const SPARE: Duration = Duration::from_millis(20);

/// Is told how far an index build is.
pub(super) type OnProgress = Arc<dyn Fn(&IndexProgress) + Send + Sync>;

/// One statement under watch.
pub(super) struct Watch {
    pid: i32,
    /// How long all waits of the attempt together may take; `None` where each may take what it wants.
    most: Option<Duration>,
    every: Duration,
    ended: AtomicBool,
    end: Notify,
    /// Says that it has waited long enough.
    pub(super) enough: Notify,
    found: Mutex<Vec<Blocker>>,
    progress: Option<OnProgress>,
}

impl Watch {
    pub(super) fn new(pid: i32, lock_timeout: Duration, most: Option<Duration>) -> Self {
        Self {
            pid,
            most,
            every: (lock_timeout / 4).clamp(LEAST, Duration::from_secs(1)),
            ended: AtomicBool::new(false),
            end: Notify::new(),
            enough: Notify::new(),
            found: Mutex::default(),
            progress: None,
        }
    }

    /// Has somebody told how far it is.
    pub(super) fn telling(mut self, progress: Option<&OnProgress>) -> Self {
        self.progress = progress.cloned();
        self
    }

    /// The statement has ended: no further look.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.end.notify_one();
    }

    /// Who was seen last.
    pub(super) fn found(&self) -> Vec<Blocker> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Blocker>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks again and again, until [`end`](Self::end).
    ///
    /// Cancel safety: a question that is not awaited closes its connection.
    pub(super) async fn look(&self, connections: &Arc<Connections>) {
        // Waits that are over, and the one seen last: since when, and how long when it was seen.
        let mut over = Duration::ZERO;
        let mut last: Option<(Option<std::time::SystemTime>, Duration)> = None;
        while !self.ended.load(Ordering::Relaxed) {
            let next = Instant::now() + self.every;
            tokio::select! {
                biased;
                () = self.end.notified() => return,
                () = tokio::time::sleep_until(next.into()) => {}
            }
            if let Some(tell) = &self.progress
                && let Ok(reply) = connections
                    .ask_within(SPARE, &index::progress(self.pid))
                    .await
                && let Some(progress) = index::progressed(&reply)
            {
                tell(&IndexProgress::from(progress));
            }
            let sql = graph::sql::wait_graph(Some(&[self.pid]));
            let reply = match connections.ask_within(SPARE, &sql).await {
                Ok(reply) => reply,
                Err(error) => {
                    tracing::debug!(%error, "nobody can look at who is in the way");
                    continue;
                }
            };
            let Some(seen) = graph::sql::read_sample(&reply, &|key| key) else {
                continue;
            };
            let snapshot = seen.snapshot(Duration::ZERO);
            let blockers = blockers(&snapshot, self.pid);
            if blockers.is_empty() {
                continue;
            }
            *self.lock() = blockers;
            let me = BackendId::Pid(self.pid);
            let mut edges = snapshot.edges_of(&me);
            let Some(edge) = edges.next() else { continue };
            let (since, age) = (edge.waiting_since(), edge.wait_age().unwrap_or_default());
            if let Some((before, was)) = last
                && before != since
            {
                over += was;
            }
            last = Some((since, age));
            // The first wait ends by the server's own timeout, which counts for each wait anew.
            if !over.is_zero() && self.most.is_some_and(|most| over + age >= most) {
                self.enough.notify_one();
            }
        }
    }
}

/// Who is in the way of a backend.
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
        }
    };
    edges.map(blocker).collect()
}
