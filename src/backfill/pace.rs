//! How many rows the next batch has, and how fast it all goes.

use std::ops::RangeInclusive;
use std::time::Duration;

/// How many rows the first batch has, within the range asked for.
const FIRST: u32 = 200;
/// A batch has at most so many times the rows of the one before, and at least a fraction as small.
const GROWTH: u32 = 2;
const SHRINKING: u32 = 4;

/// The size of batches, led towards a target time.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    rows: u32,
    range: RangeInclusive<u32>,
    target: Duration,
}

impl Pace {
    /// Invariant: the range is not empty and begins above zero.
    pub(super) fn new(range: RangeInclusive<u32>, target: Duration) -> Self {
        let rows = FIRST.clamp(*range.start(), *range.end());
        Self {
            rows,
            range,
            target,
        }
    }

    /// How many rows the next batch has.
    pub(super) fn rows(&self) -> u32 {
        self.rows
    }

    /// Learns from a batch of so many rows.
    pub(super) fn took(&mut self, rows: u32, took: Duration) {
        let rows = rows.max(1);
        let took = took.as_nanos().max(1);
        let fitting = u128::from(rows).saturating_mul(self.target.as_nanos()) / took;
        let fitting = u32::try_from(fitting).unwrap_or(u32::MAX);
        let most = rows.saturating_mul(GROWTH);
        self.set(fitting.clamp(rows / SHRINKING, most));
    }

    /// Somebody had to wait for the batch.
    pub(super) fn was_in_the_way(&mut self) {
        self.set(self.rows / GROWTH);
    }

    fn set(&mut self, rows: u32) {
        self.rows = rows.clamp(*self.range.start(), *self.range.end());
    }
}

/// Rows a second.
pub(super) fn rate(rows: u64, time: Duration) -> f64 {
    // Invariant: far fewer rows than 2^52, so the halves are exact.
    let (high, low) = (rows >> 32, rows & u64::from(u32::MAX));
    let part = |half: u64| f64::from(u32::try_from(half).unwrap_or(u32::MAX));
    let rows = part(high) * 4_294_967_296.0 + part(low);
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { rows / seconds } else { 0.0 }
}

/// How long as many rows take at the speed of those that were done in `time`.
pub(super) fn remaining(rows: u64, done: u64, time: Duration) -> Option<Duration> {
    let nanos = time.as_nanos().checked_mul(u128::from(rows))?;
    let nanos = nanos.checked_div(u128::from(done))?;
    Some(Duration::from_nanos(
        u64::try_from(nanos).unwrap_or(u64::MAX),
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn it_settles_at_the_target() {
        let mut pace = Pace::new(1..=1_000_000, 50 * MS);
        // 20 rows in a millisecond.
        for _ in 0..20 {
            pace.took(pace.rows(), MS * pace.rows() / 20);
        }
        assert_eq!(pace.rows(), 1000);
        // The disk has become slow: at once, but not below a quarter.
        pace.took(1000, 5000 * MS);
        assert_eq!(pace.rows(), 250);
        pace.was_in_the_way();
        assert_eq!(pace.rows(), 125);
    }

    #[test]
    fn growth_is_bounded() {
        let mut pace = Pace::new(10..=900, 50 * MS);
        assert_eq!(pace.rows(), 200);
        pace.took(200, Duration::ZERO);
        assert_eq!(pace.rows(), 400);
        pace.took(400, MS);
        pace.took(800, MS);
        assert_eq!(pace.rows(), 900);
        // The rows of the retry that succeeded count, not those of the batch that was too large.
        pace.took(100, 50 * MS);
        assert_eq!(pace.rows(), 100);
        pace.took(1, 5000 * MS);
        assert_eq!(pace.rows(), 10);
        assert_eq!(Pace::new(1000..=2000, MS).rows(), 1000);
        assert_eq!(Pace::new(1..=1, MS).rows(), 1);
    }

    #[test]
    fn remaining_time_is_in_proportion() {
        assert_eq!(remaining(30, 10, 7 * MS), Some(21 * MS));
        assert_eq!(remaining(30, 0, 7 * MS), None);
        assert_eq!(
            remaining(u64::MAX, 1, Duration::MAX).map(|time| time > 7 * MS),
            None
        );
        assert!((rate(500, Duration::from_millis(250)) - 2000.0).abs() < 1e-9);
        assert!((rate(1 << 40, Duration::from_secs(1)) - 1_099_511_627_776.0).abs() < 1e-3);
        assert!(rate(5, Duration::ZERO).abs() < f64::EPSILON);
    }

    proptest! {
        #[test]
        fn always_within_the_range(
            start in 1..5000_u32, more: u32, target: u32, batches in prop::collection::vec(any::<(u32, u32)>(), 0..20),
        ) {
            let range = start..=start.saturating_add(more);
            let mut pace = Pace::new(range.clone(), Duration::from_micros(target.into()));
            for (rows, took) in batches {
                prop_assert!(range.contains(&pace.rows()));
                pace.took(rows, Duration::from_micros(took.into()));
            }
            prop_assert!(range.contains(&pace.rows()));
        }
    }
}
