//! When to sample one statement's wait, and the samples so far.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::statement_log::RunningStatement;
use crate::graph::{RowId, Snapshot};
use crate::incident::{RowKey, WaitSample};

/// How long a statement runs before it is checked for a wait.
const FIRST_CHECK: Duration = Duration::from_millis(100);
/// The minimum of that, if a short `lock_timeout` requires an earlier check.
const MIN_FIRST_CHECK: Duration = Duration::from_millis(15);
/// How often a statement that does not wait is checked.
pub(super) const RECHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often a statement is sampled that has waited longer than any known limit.
const LONG_WAIT_INTERVAL: Duration = Duration::from_millis(500);
/// How long before the server ends a wait to sample it: as late as possible, because the second half of a deadlock may
/// come at any time, and several times, because a sample takes some time too.
const BEFORE_END: [Duration; 3] = [
    Duration::from_millis(40),
    Duration::from_millis(20),
    Duration::from_millis(8),
];
/// How many samples are kept: the first, and the last of the others.
const MAX_SAMPLES: usize = 4;

/// The plan of one statement.
#[derive(Debug)]
pub(super) struct SamplePlan {
    since: Instant,
    waiting_since: Option<Instant>,
    next: Instant,
    samples: VecDeque<WaitSample>,
    pub(super) reported_long: bool,
    /// When the statement was last known to run.
    pub(super) ran: Instant,
}

impl SamplePlan {
    /// With this `lock_timeout`, if one is known.
    pub(super) fn new(running: &RunningStatement, lock_timeout: Option<Duration>) -> Self {
        let since = running.since;
        let first = lock_timeout.map_or(FIRST_CHECK, |timeout| {
            (timeout / 2).clamp(MIN_FIRST_CHECK, FIRST_CHECK)
        });
        Self {
            since,
            waiting_since: None,
            next: since + first,
            samples: VecDeque::new(),
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

    /// When the next sample is due.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// When the statement was last sampled waiting.
    pub(super) fn last_sampled(&self) -> Option<Instant> {
        self.since.checked_add(self.samples.back()?.after)
    }

    /// Notes that no sample could be taken.
    pub(super) fn sampling_failed(&mut self, now: Instant) {
        self.next = now;
    }

    /// Notes that the statement does not wait.
    pub(super) fn not_waiting(&mut self, now: Instant) {
        self.waiting_since = None;
        self.next = now + RECHECK_INTERVAL;
    }

    /// Notes that it has waited since then, and may wait for as long as `limits`.
    pub(super) fn waiting(
        &mut self,
        now: Instant,
        since: Instant,
        limits: impl IntoIterator<Item = Duration>,
    ) {
        self.waiting_since = Some(since);
        let ends = limits
            .into_iter()
            .filter_map(|limit| since.checked_add(limit));
        let times = ends.flat_map(|end| {
            BEFORE_END
                .into_iter()
                .filter_map(move |before| end.checked_sub(before))
        });
        // A time this close counts as now.
        let soon = now + Duration::from_millis(2);
        self.next = times
            .filter(|time| *time > soon)
            .fold(now + LONG_WAIT_INTERVAL, Instant::min);
    }

    /// Postpones the next sample.
    pub(super) fn not_before(&mut self, time: Instant) {
        self.next = self.next.max(time);
    }

    pub(super) fn add_sample(&mut self, sample: WaitSample) {
        if self.samples.len() >= MAX_SAMPLES {
            drop(self.samples.remove(1));
        }
        self.samples.push_back(sample);
    }

    /// Adds the keys of the rows to a sample that was kept.
    pub(super) fn add_row_keys(&mut self, snapshot: &Arc<Snapshot>, row_keys: &[(RowId, RowKey)]) {
        let mut samples = self.samples.iter_mut();
        if let Some(sample) = samples.find(|sample| Arc::ptr_eq(&sample.snapshot, snapshot)) {
            sample.row_keys = row_keys.to_vec();
        }
    }

    pub(super) fn samples(&self) -> Vec<WaitSample> {
        self.samples.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn running(since: Instant) -> RunningStatement {
        RunningStatement { number: 1, since }
    }

    #[test]
    fn the_first_check_is_in_time_for_a_short_timeout() {
        let now = Instant::now();
        assert_eq!(SamplePlan::new(&running(now), None).next(), now + ms(100));
        assert_eq!(
            SamplePlan::new(&running(now), Some(ms(5000))).next(),
            now + ms(100)
        );
        assert_eq!(
            SamplePlan::new(&running(now), Some(ms(50))).next(),
            now + ms(25)
        );
        assert_eq!(
            SamplePlan::new(&running(now), Some(ms(1))).next(),
            now + ms(15)
        );
    }

    #[test]
    fn the_last_samples_are_shortly_before_the_end() {
        let since = Instant::now();
        let mut plan = SamplePlan::new(&running(since), None);
        let mut next = |at: u64, limits: &[Duration]| {
            plan.waiting(since + ms(at), since, limits.iter().copied());
            plan.next() - since
        };
        assert_eq!(next(120, &[ms(1000)]), ms(620));
        assert_eq!(next(620, &[ms(1000)]), ms(960));
        assert_eq!(next(961, &[ms(1000)]), ms(980));
        assert_eq!(next(982, &[ms(1000)]), ms(992));
        assert_eq!(next(993, &[ms(1000)]), ms(1493));
        // The earlier of the two ends.
        assert_eq!(next(120, &[ms(1000), ms(200)]), ms(160));
        assert_eq!(next(200, &[ms(1000), ms(200)]), ms(700));
    }
}
