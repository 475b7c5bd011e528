//! When to look at one statement's wait, and what was seen of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::statement_log::Running;
use crate::graph::{RowId, Snapshot};
use crate::incident::{Look, RowKey};

/// How long a statement may run before somebody looks whether it waits.
const FIRST: Duration = Duration::from_millis(100);
/// The least of it, where a short `lock_timeout` asks for an earlier look.
const EARLIEST: Duration = Duration::from_millis(15);
/// How often to look again at a statement that does not wait.
pub(super) const AGAIN: Duration = Duration::from_millis(100);
/// How often at one that has waited for longer than any limit known.
const LONG: Duration = Duration::from_millis(500);
/// How long before the server ends a wait to look: as late as possible, because a deadlock's second half may come at any
/// time, and more than once, because a look takes its time too.
const BEFORE: [Duration; 3] = [
    Duration::from_millis(40),
    Duration::from_millis(20),
    Duration::from_millis(8),
];
/// Looks kept: the first, and the last of the others.
const LOOKS: usize = 4;

/// One statement.
#[derive(Debug)]
pub(super) struct Plan {
    since: Instant,
    waits_in_slices: bool,
    waiting_since: Option<Instant>,
    next: Instant,
    looks: VecDeque<Look>,
    pub(super) reported_long: bool,
    /// When it was last known to run.
    pub(super) ran: Instant,
}

impl Plan {
    /// Under this `lock_timeout` if one is known.
    pub(super) fn new(running: &Running, lock_timeout: Option<Duration>) -> Self {
        let since = running.since;
        let first = lock_timeout.map_or(FIRST, |timeout| (timeout / 2).clamp(EARLIEST, FIRST));
        Self {
            since,
            waits_in_slices: running.waits_in_slices,
            waiting_since: None,
            next: since + first,
            looks: VecDeque::new(),
            reported_long: false,
            ran: since,
        }
    }

    pub(super) fn since(&self) -> Instant {
        self.since
    }

    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.waiting_since
    }

    /// When to look next.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// When it was last seen to wait.
    pub(super) fn seen(&self) -> Option<Instant> {
        self.since.checked_add(self.looks.back()?.after)
    }

    /// Notes that nothing could be seen.
    pub(super) fn not_seen(&mut self, now: Instant) {
        self.next = now;
    }

    /// Notes that it does not wait.
    pub(super) fn is_running(&mut self, now: Instant) {
        self.waiting_since = None;
        self.next = now + AGAIN;
    }

    /// Notes that it waits since then, and may for as long as `limits`.
    pub(super) fn is_waiting(
        &mut self,
        now: Instant,
        since: Instant,
        limits: impl IntoIterator<Item = Duration>,
    ) {
        // All of a call that waits in slices is one wait, though the server sees many.
        self.waiting_since = Some(if self.waits_in_slices {
            self.since
        } else {
            since
        });
        let ends = limits
            .into_iter()
            .filter_map(|limit| since.checked_add(limit));
        let looks = ends.flat_map(|end| {
            BEFORE
                .into_iter()
                .filter_map(move |before| end.checked_sub(before))
        });
        // What is nearer than a moment is now.
        let soon = now + Duration::from_millis(2);
        self.next = looks
            .filter(|look| *look > soon)
            .fold(now + LONG, Instant::min);
    }

    /// Puts the next look off.
    pub(super) fn not_before(&mut self, time: Instant) {
        self.next = self.next.max(time);
    }

    pub(super) fn saw(&mut self, look: Look) {
        if self.looks.len() >= LOOKS {
            drop(self.looks.remove(1));
        }
        self.looks.push_back(look);
    }

    /// Adds the keys of the rows in a look that was kept.
    pub(super) fn learned(&mut self, snapshot: &Arc<Snapshot>, row_keys: &[(RowId, RowKey)]) {
        let mut looks = self.looks.iter_mut();
        if let Some(look) = looks.find(|look| Arc::ptr_eq(&look.snapshot, snapshot)) {
            look.row_keys = row_keys.to_vec();
        }
    }

    pub(super) fn looks(&self) -> Vec<Look> {
        self.looks.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn begun(since: Instant) -> Running {
        Running {
            number: 1,
            since,
            waits_in_slices: false,
        }
    }

    #[test]
    fn slices_are_one_wait() {
        let now = Instant::now();
        for waits_in_slices in [false, true] {
            let running = Running {
                waits_in_slices,
                ..begun(now)
            };
            let mut plan = Plan::new(&running, None);
            plan.is_waiting(now + ms(2100), now + ms(2000), [ms(2000)]);
            let expected = if waits_in_slices { now } else { now + ms(2000) };
            assert_eq!(plan.waiting_since(), Some(expected));
            // When to look is told by the slice.
            assert_eq!(plan.next(), now + ms(2600));
            plan.is_waiting(now + ms(3800), now + ms(2000), [ms(2000)]);
            assert_eq!(plan.next(), now + ms(3960));
        }
    }

    #[test]
    fn the_first_look_is_in_time_for_a_short_timeout() {
        let now = Instant::now();
        assert_eq!(Plan::new(&begun(now), None).next(), now + ms(100));
        assert_eq!(Plan::new(&begun(now), Some(ms(5000))).next(), now + ms(100));
        assert_eq!(Plan::new(&begun(now), Some(ms(50))).next(), now + ms(25));
        assert_eq!(Plan::new(&begun(now), Some(ms(1))).next(), now + ms(15));
    }

    #[test]
    fn the_last_looks_are_shortly_before_the_end() {
        let since = Instant::now();
        let mut plan = Plan::new(&begun(since), None);
        let mut next = |at: u64, limits: &[Duration]| {
            plan.is_waiting(since + ms(at), since, limits.iter().copied());
            plan.next() - since
        };
        assert_eq!(next(120, &[ms(1000)]), ms(620));
        assert_eq!(next(620, &[ms(1000)]), ms(960));
        assert_eq!(next(961, &[ms(1000)]), ms(980));
        assert_eq!(next(982, &[ms(1000)]), ms(992));
        assert_eq!(next(993, &[ms(1000)]), ms(1493));
        // The nearer of two ends.
        assert_eq!(next(120, &[ms(1000), ms(200)]), ms(160));
        assert_eq!(next(200, &[ms(1000), ms(200)]), ms(700));
    }
}
