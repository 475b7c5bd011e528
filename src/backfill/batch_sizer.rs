//! The number of rows of the next batch.

use std::ops::RangeInclusive;
use std::time::Duration;

/// The number of rows of the first batch, if the range allows it.
const FIRST: u32 = 200;
/// The largest factor by which a batch is larger than the one before.
const MAX_GROWTH: u32 = 2;
/// The largest factor by which a batch is smaller than the one before.
const MAX_SHRINKAGE: u32 = 4;

/// Adapts the size of batches to a target duration.
#[derive(Clone, Debug)]
pub(super) struct BatchSizer {
    rows: u32,
    range: RangeInclusive<u32>,
    target: Duration,
}

impl BatchSizer {
    /// Invariant: the range is not empty and begins above zero.
    pub(super) fn new(range: RangeInclusive<u32>, target: Duration) -> Self {
        let rows = FIRST.clamp(*range.start(), *range.end());
        Self {
            rows,
            range,
            target,
        }
    }

    /// The number of rows of the next batch.
    pub(super) fn rows(&self) -> u32 {
        self.rows
    }

    /// Adapts to the duration of a batch of this many rows.
    pub(super) fn record(&mut self, rows: u32, duration: Duration) {
        let rows = rows.max(1);
        let nanos = duration.as_nanos().max(1);
        let fitting = u128::from(rows).saturating_mul(self.target.as_nanos()) / nanos;
        let fitting = u32::try_from(fitting).unwrap_or(u32::MAX);
        let max = rows.saturating_mul(MAX_GROWTH);
        self.set(fitting.clamp(rows / MAX_SHRINKAGE, max));
    }

    /// Halves the size after a batch that other sessions had to wait for.
    pub(super) fn record_waiters(&mut self) {
        self.set(self.rows / 2);
    }

    fn set(&mut self, rows: u32) {
        self.rows = rows.clamp(*self.range.start(), *self.range.end());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_size_converges_to_the_target() {
        let mut sizer = BatchSizer::new(1..=1_000_000, 50 * MS);
        // 20 rows in a millisecond.
        for _ in 0..20 {
            sizer.record(sizer.rows(), MS * sizer.rows() / 20);
        }
        assert_eq!(sizer.rows(), 1000);
        // The disk has become slow: the size shrinks at once, but not below a quarter.
        sizer.record(1000, 5000 * MS);
        assert_eq!(sizer.rows(), 250);
        sizer.record_waiters();
        assert_eq!(sizer.rows(), 125);
    }

    #[test]
    fn growth_is_bounded() {
        let mut sizer = BatchSizer::new(10..=900, 50 * MS);
        assert_eq!(sizer.rows(), 200);
        sizer.record(200, Duration::ZERO);
        assert_eq!(sizer.rows(), 400);
        sizer.record(400, MS);
        sizer.record(800, MS);
        assert_eq!(sizer.rows(), 900);
        // The rows of the successful retry count, not those of the batch that was too large.
        sizer.record(100, 50 * MS);
        assert_eq!(sizer.rows(), 100);
        sizer.record(1, 5000 * MS);
        assert_eq!(sizer.rows(), 10);
        assert_eq!(BatchSizer::new(1000..=2000, MS).rows(), 1000);
        assert_eq!(BatchSizer::new(1..=1, MS).rows(), 1);
    }

    proptest! {
        #[test]
        fn the_size_is_always_within_the_range(
            start in 1..5000_u32, more: u32, target: u32, batches in prop::collection::vec(any::<(u32, u32)>(), 0..20),
        ) {
            let range = start..=start.saturating_add(more);
            let mut sizer = BatchSizer::new(range.clone(), Duration::from_micros(target.into()));
            for (rows, micros) in batches {
                prop_assert!(range.contains(&sizer.rows()));
                sizer.record(rows, Duration::from_micros(micros.into()));
            }
            prop_assert!(range.contains(&sizer.rows()));
        }
    }
}
