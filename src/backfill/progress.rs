//! The progress of a backfill.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::backfill::sql::Standbys;

/// The progress of a backfill; from [`Backfill::on_progress`](super::Backfill::on_progress),
/// [`stream`](super::Backfill::stream) and [`run`](super::Backfill::run).
///
/// [`Display`](fmt::Display) shows it on one line: `account-email: 120000 of about 400000 rows (30 %), 52000 rows/s,
/// about 5.4s left`.
#[derive(Clone, Debug)]
pub struct BackfillProgress {
    pub(super) name: Arc<str>,
    /// Counts of all runs.
    pub(super) processed: u64,
    pub(super) changed: u64,
    /// Counts of this run.
    pub(super) processed_now: u64,
    pub(super) changed_now: u64,
    pub(super) batches: u64,
    pub(super) batch_rows: u32,
    pub(super) last_batch: Option<Duration>,
    pub(super) longest_batch: Duration,
    pub(super) elapsed: Duration,
    pub(super) paused: Duration,
    pub(super) pause: Option<BackfillPause>,
    pub(super) estimate: Option<u64>,
    pub(super) standbys: Standbys,
    pub(super) is_done: bool,
}

/// Why a backfill pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackfillPause {
    /// Sessions wait for a lock on the table or on its rows.
    LockWaiters,
    /// Standbys or subscribers are too far behind.
    ReplicationLag,
}

/// The replication lag of the server's standbys and subscribers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReplicationLag {
    /// The server has no standbys or subscribers.
    NoStandbys,
    /// The role may not see the lag: `pg_stat_replication` shows it only to members of `pg_monitor`. The backfill
    /// ignores it.
    Unknown,
    /// The lag of the slowest one.
    #[non_exhaustive]
    Behind {
        /// `replay_lag`; zero if nothing has been written for a while.
        time: Duration,
        /// WAL that was written but not yet replayed, in bytes.
        bytes: u64,
    },
}

impl BackfillProgress {
    getters! {
        /// The backfill's name.
        name: &str;

        /// The number of rows that all runs together have changed.
        rows_changed: u64 = changed;

        /// The number of rows that all runs together have processed: changed rows, and rows that the filter left out.
        rows_processed: u64 = processed;

        /// The number of rows that this run has changed.
        rows_changed_by_this_run: u64 = changed_now;
    }

    /// The planner's estimate of the number of rows of the table, including processed ones, at the beginning of the
    /// run; `None` without an estimate.
    #[must_use]
    pub fn estimated_rows(&self) -> Option<u64> {
        self.estimate.map(|rows| rows.max(self.processed))
    }

    /// The number of rows that this run processes per second, including pauses.
    #[must_use]
    pub fn rows_per_second(&self) -> f64 {
        rate(self.processed_now, self.elapsed)
    }

    /// The estimated remaining time at the speed of this run so far; `None` if it is not known yet.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        if self.is_done {
            return Some(Duration::ZERO);
        }
        let rows = self.estimated_rows()? - self.processed;
        remaining_time(rows, self.processed_now, self.elapsed)
    }

    getters! {
        /// The number of batches that this run has committed.
        batches: u64;

        /// The number of rows that the next batch processes.
        batch_rows: u32;

        /// The duration of the last batch from BEGIN to COMMIT, without failed attempts.
        last_batch: Option<Duration>;

        /// The duration of this run's longest batch.
        longest_batch: Duration;

        /// The time since the beginning of this run.
        elapsed: Duration;

        /// The part of [`elapsed`](Self::elapsed) that was spent in pauses.
        paused: Duration;

        /// The reason for the current pause; `None` if the backfill does not pause.
        pause: Option<BackfillPause>;
    }

    /// The replication lag of the server's standbys and subscribers in the last sample.
    #[must_use]
    pub fn replication_lag(&self) -> ReplicationLag {
        let Standbys {
            count,
            hidden,
            lag,
            bytes,
        } = self.standbys;
        if count == 0 {
            ReplicationLag::NoStandbys
        } else if hidden > 0 {
            ReplicationLag::Unknown
        } else {
            ReplicationLag::Behind {
                time: lag.unwrap_or_default(),
                bytes: bytes.unwrap_or_default(),
            }
        }
    }

    /// Whether the backfill is complete.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.is_done
    }
}

impl fmt::Display for BackfillProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name)?;
        if self.is_done {
            write!(f, "done, {} rows changed", self.changed)?;
            if self.batches > 0 {
                write!(
                    f,
                    ", {} of them in {:.1?} by this run, longest batch {:.1?}",
                    self.changed_now, self.elapsed, self.longest_batch
                )?;
            }
            return Ok(());
        }
        write!(f, "{}", self.processed)?;
        if let Some(rows) = self.estimated_rows().filter(|rows| *rows > 0) {
            let percent = u128::from(self.processed) * 100 / u128::from(rows);
            write!(f, " of about {rows} rows ({percent} %)")?;
        } else {
            f.write_str(" rows")?;
        }
        if self.processed_now > 0 {
            write!(f, ", {:.0} rows/s", self.rows_per_second())?;
        }
        if let Some(remaining) = self.remaining() {
            write!(f, ", about {remaining:.1?} left")?;
        }
        match self.pause {
            Some(BackfillPause::LockWaiters) => {
                f.write_str(", pausing for those who wait for locks")?
            }
            Some(BackfillPause::ReplicationLag) => f.write_str(", pausing for standbys")?,
            None => {}
        }
        if self.replication_lag() == ReplicationLag::Unknown {
            f.write_str(", replication lag unknown to this role")?;
        }
        Ok(())
    }
}

/// Rows per second.
fn rate(rows: u64, time: Duration) -> f64 {
    // Invariant: far fewer rows than 2^52, so the halves are exact.
    let (high, low) = (rows >> 32, rows & u64::from(u32::MAX));
    let part = |half: u64| f64::from(u32::try_from(half).unwrap_or(u32::MAX));
    let rows = part(high) * 4_294_967_296.0 + part(low);
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { rows / seconds } else { 0.0 }
}

/// The time that `rows` take at the speed of the `done` rows; `None` without any.
fn remaining_time(rows: u64, done: u64, time: Duration) -> Option<Duration> {
    let nanos = time.as_nanos().checked_mul(u128::from(rows))?;
    let nanos = nanos.checked_div(u128::from(done))?;
    Some(Duration::from_nanos(
        u64::try_from(nanos).unwrap_or(u64::MAX),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn progress() -> BackfillProgress {
        BackfillProgress {
            name: "emails".into(),
            processed: 120,
            changed: 100,
            processed_now: 20,
            changed_now: 10,
            batches: 2,
            batch_rows: 10,
            last_batch: None,
            longest_batch: Duration::from_millis(7),
            elapsed: Duration::from_secs(2),
            paused: Duration::ZERO,
            pause: None,
            estimate: Some(400),
            standbys: Standbys::default(),
            is_done: false,
        }
    }

    #[test]
    fn display_is_one_line() {
        let mut progress = progress();
        assert_eq!(
            progress.to_string(),
            "emails: 120 of about 400 rows (30 %), 10 rows/s, about 28.0s left"
        );
        progress.pause = Some(BackfillPause::ReplicationLag);
        progress.estimate = None;
        assert_eq!(
            progress.to_string(),
            "emails: 120 rows, 10 rows/s, pausing for standbys"
        );
        progress.is_done = true;
        assert_eq!(
            progress.to_string(),
            "emails: done, 100 rows changed, 10 of them in 2.0s by this run, longest batch 7.0ms"
        );
    }

    #[test]
    fn an_estimate_is_at_least_the_processed_rows() {
        let mut progress = progress();
        progress.estimate = Some(50);
        assert_eq!(progress.estimated_rows(), Some(120));
        assert_eq!(progress.remaining(), Some(Duration::ZERO));
    }

    #[test]
    fn a_hidden_lag_is_unknown() {
        let mut progress = progress();
        assert_eq!(progress.replication_lag(), ReplicationLag::NoStandbys);
        progress.standbys.count = 2;
        progress.standbys.hidden = 1;
        assert_eq!(progress.replication_lag(), ReplicationLag::Unknown);
        assert!(progress.to_string().ends_with("lag unknown to this role"));
        progress.standbys.hidden = 0;
        progress.standbys.bytes = Some(7);
        assert_eq!(
            progress.replication_lag(),
            ReplicationLag::Behind {
                time: Duration::ZERO,
                bytes: 7
            }
        );
    }

    #[test]
    fn remaining_time_is_proportional() {
        assert_eq!(remaining_time(30, 10, 7 * MS), Some(21 * MS));
        assert_eq!(remaining_time(30, 0, 7 * MS), None);
        assert_eq!(
            remaining_time(u64::MAX, 1, Duration::MAX).map(|time| time > 7 * MS),
            None
        );
        assert!((rate(500, Duration::from_millis(250)) - 2000.0).abs() < 1e-9);
        assert!((rate(1 << 40, Duration::from_secs(1)) - 1_099_511_627_776.0).abs() < 1e-3);
        assert!(rate(5, Duration::ZERO).abs() < f64::EPSILON);
    }
}
