//! Snapshots at an interval, and the changes between them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use futures_core::Stream;
use tokio::time::{Instant, Sleep};

use super::Monitor;
use super::wait_summary::WaitSummary;
use crate::error::Error;
use crate::graph::{Backend, BackendId, Edge, LockObject, Snapshot};
use crate::mode::LockMode;

/// Ten snapshots a second cost a server nothing measurable; more would show nothing more.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// One snapshot of a [`Watch`], and the changes since the previous one.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchUpdate {
    snapshot: Snapshot,
    changes: SnapshotDiff,
}

/// The changes between two snapshots.
///
/// A wait is identified by its session, lock, mode and start; a root blocker by its session and transaction. So a
/// process id that is used again is a different session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SnapshotDiff {
    new_waits: Vec<Edge>,
    ended_waits: Vec<Edge>,
    new_roots: Vec<Backend>,
    ended_roots: Vec<Backend>,
}

/// Takes a snapshot at an interval: [`Monitor::watch`].
///
/// This is a [`Stream`] that never ends. The first snapshot is taken at once. A snapshot that takes longer than the
/// interval is followed by a whole interval. A snapshot that fails, because the server restarts or no connection is
/// available, is an item too, and the next one is taken as usual. Its changes are those since the last successful
/// snapshot.
#[must_use = "a stream takes no snapshot unless it is polled"]
pub struct Watch {
    monitor: Monitor,
    interval: Duration,
    last: Option<Snapshot>,
    state: State,
}

enum State {
    Sampling(
        Pin<Box<dyn Future<Output = Result<Snapshot, Error>> + Send>>,
        Instant,
    ),
    Sleeping(Pin<Box<Sleep>>),
    /// Before the first poll: a timer needs a runtime, and there may not be one yet.
    Idle,
}

impl Monitor {
    /// Takes a snapshot every `interval`, at least 100 milliseconds, and reports the changes.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot), at each interval. Nothing is sent before the stream is polled.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for an interval that is too short. Snapshots that fail are items of the
    /// stream.
    ///
    /// # Longest silence
    /// As [`snapshot`](Self::snapshot) for each item, after the interval.
    ///
    /// # Cancel safety
    /// The stream may be dropped at any point. Dropping a `next()` on it loses no item.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// use futures::StreamExt as _;
    ///
    /// let mut watch = keeper.monitor().watch(std::time::Duration::from_secs(1))?;
    /// while let Some(update) = watch.next().await {
    ///     match update {
    ///         Ok(update) if update.changes().is_empty() => {}
    ///         Ok(update) => println!("{update}"),
    ///         Err(error) => println!("cannot take a snapshot: {error}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch(&self, interval: Duration) -> Result<Watch, Error> {
        if interval < MIN_INTERVAL {
            return Err(Error::config(format!(
                "a watch every {interval:?}: at least {MIN_INTERVAL:?}"
            )));
        }
        Ok(Watch {
            monitor: self.clone(),
            interval,
            last: None,
            state: State::Idle,
        })
    }
}

impl WatchUpdate {
    getters! {
        /// Which session waits for which.
        snapshot: &Snapshot;

        /// The changes since the previous snapshot; for the first one, everything in it.
        changes: &SnapshotDiff;
    }
}

impl SnapshotDiff {
    /// The changes from one snapshot to another.
    #[must_use]
    pub fn between(before: &Snapshot, after: &Snapshot) -> Self {
        let (waits_before, waits_after) = (waits(before), waits(after));
        let (roots_before, roots_after) = (roots(before), roots(after));
        Self {
            new_waits: only_in(&waits_after, &waits_before),
            ended_waits: only_in(&waits_before, &waits_after),
            new_roots: only_in(&roots_after, &roots_before),
            ended_roots: only_in(&roots_before, &roots_after),
        }
    }

    /// The changes of a first snapshot.
    fn first(after: &Snapshot) -> Self {
        Self {
            new_waits: only_in(&waits(after), &BTreeMap::new()),
            new_roots: only_in(&roots(after), &BTreeMap::new()),
            ..Self::default()
        }
    }

    getters! {
        /// Waits that have begun, each with one pair of the waiter and a blocker.
        new_waits: &[Edge];

        /// Waits that have ended, in their last observed state.
        ended_waits: &[Edge];

        /// Sessions that have become root blockers.
        new_roots: &[Backend];

        /// Root blockers that stopped blocking since the previous snapshot, in their last observed state.
        ended_roots: &[Backend];
    }

    /// Whether nothing has changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.new_waits.is_empty()
            && self.ended_waits.is_empty()
            && self.new_roots.is_empty()
            && self.ended_roots.is_empty()
    }
}

/// A summary of the waits, then a line for each change: `+ pid 12 waits …`, `- pid 11 (…) is in nobody's way any more`.
impl fmt::Display for WatchUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", WaitSummary::of(&self.snapshot))?;
        self.changes.fmt(f)
    }
}

impl fmt::Display for SnapshotDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for root in &self.new_roots {
            writeln!(f, "+ {root} is in the way of others")?;
        }
        for wait in &self.new_waits {
            writeln!(f, "+ {wait}")?;
        }
        for wait in &self.ended_waits {
            writeln!(f, "- {} waits no more for {}", wait.waiter(), wait.object())?;
        }
        for root in &self.ended_roots {
            writeln!(f, "- {root} is in nobody's way any more")?;
        }
        Ok(())
    }
}

impl Stream for Watch {
    type Item = Result<WatchUpdate, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Idle => this.start_sample(),
                State::Sleeping(sleep) => {
                    ready!(sleep.as_mut().poll(cx));
                    this.start_sample();
                }
                State::Sampling(sample, started) => {
                    let seen = ready!(sample.as_mut().poll(cx));
                    let pause = this.interval.checked_sub(started.elapsed());
                    let pause = tokio::time::sleep(pause.unwrap_or(this.interval));
                    this.state = State::Sleeping(Box::pin(pause));
                    return Poll::Ready(Some(seen.map(|snapshot| this.update(snapshot))));
                }
            }
        }
    }
}

impl Watch {
    fn start_sample(&mut self) {
        let monitor = self.monitor.clone();
        let sample = async move { monitor.snapshot().await };
        self.state = State::Sampling(Box::pin(sample), Instant::now());
    }

    fn update(&mut self, snapshot: Snapshot) -> WatchUpdate {
        let changes = match &self.last {
            Some(last) => SnapshotDiff::between(last, &snapshot),
            None => SnapshotDiff::first(&snapshot),
        };
        self.last = Some(snapshot.clone());
        WatchUpdate { snapshot, changes }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("interval", &self.interval)
            .finish_non_exhaustive()
    }
}

type WaitId<'a> = (
    &'a BackendId,
    Option<i32>,
    String,
    LockMode,
    Option<SystemTime>,
);

/// Each wait once, with one of its edges, preferably a hard one.
fn waits(snapshot: &Snapshot) -> BTreeMap<WaitId<'_>, &Edge> {
    let mut waits: BTreeMap<WaitId<'_>, &Edge> = BTreeMap::new();
    for edge in snapshot.edges() {
        let object: &LockObject = edge.object();
        let id = (
            edge.waiter(),
            edge.worker(),
            object.to_string(),
            edge.mode_wanted(),
            edge.waiting_since(),
        );
        let known = waits.entry(id).or_insert(edge);
        if known.is_soft() && !edge.is_soft() {
            *known = edge;
        }
    }
    waits
}

type RootId<'a> = (&'a BackendId, Option<SystemTime>, Option<SystemTime>);

fn roots(snapshot: &Snapshot) -> BTreeMap<RootId<'_>, &Backend> {
    let roots = snapshot.roots().into_iter();
    roots
        .map(|root| {
            let id = (root.id(), root.backend_start(), root.transaction_start());
            (id, root)
        })
        .collect()
}

fn only_in<K: Ord, V: Clone>(these: &BTreeMap<K, &V>, those: &BTreeMap<K, &V>) -> Vec<V> {
    let known: BTreeSet<&K> = those.keys().collect();
    let these = these.iter().filter(|(id, _)| !known.contains(id));
    these.map(|(_, value)| (*value).clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{backend, edge, snapshot};
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn waiters(edges: &[Edge]) -> Vec<i32> {
        edges
            .iter()
            .filter_map(|edge| edge.waiter().pid())
            .collect()
    }

    fn pids(backends: &[Backend]) -> Vec<i32> {
        backends.iter().filter_map(Backend::pid).collect()
    }

    #[test]
    fn waits_and_roots_begin_end_and_stay() {
        let before = snapshot(
            vec![],
            vec![edge(2, 1, SECOND), edge(3, 1, SECOND), edge(3, 2, SECOND)],
        );
        let after = snapshot(
            vec![],
            vec![edge(3, 1, SECOND), edge(5, 4, SECOND), edge(5, 1, SECOND)],
        );
        let changes = SnapshotDiff::between(&before, &after);
        assert_eq!(waiters(changes.new_waits()), [5, 5], "for two objects");
        assert_eq!(waiters(changes.ended_waits()), [2, 3]);
        assert_eq!(pids(changes.new_roots()), [4]);
        assert!(changes.ended_roots().is_empty());
        assert!(SnapshotDiff::between(&after, &after).is_empty());
        let first = SnapshotDiff::first(&before);
        assert_eq!(pids(first.new_roots()), [1]);
        assert!(first.ended_waits().is_empty());
    }

    #[test]
    fn a_reused_process_id_is_a_different_session() {
        let with = |start: u64| {
            let mut root = backend(1);
            root.transaction_start =
                SystemTime::UNIX_EPOCH.checked_add(SECOND * u32::try_from(start).expect("small"));
            snapshot(vec![root], vec![edge(2, 1, SECOND)])
        };
        let changes = SnapshotDiff::between(&with(1), &with(2));
        assert_eq!(
            (pids(changes.new_roots()), pids(changes.ended_roots())),
            (vec![1], vec![1])
        );
        assert!(changes.new_waits().is_empty());
        // The same session waits for the same lock again.
        let (before, after) = (
            snapshot(vec![], vec![edge(2, 1, SECOND)]),
            snapshot(vec![], vec![edge(2, 1, 2 * SECOND)]),
        );
        let changes = SnapshotDiff::between(&before, &after);
        assert_eq!(
            (changes.new_waits().len(), changes.ended_waits().len()),
            (1, 1)
        );
        assert!(changes.to_string().contains("waits no more for"));
    }
}
