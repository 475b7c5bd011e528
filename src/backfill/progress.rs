//! How far a backfill has come.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::pace;
use crate::backfill::sql::Standbys;

/// How far a backfill has come; from [`Backfill::on_progress`](super::Backfill::on_progress),
/// [`stream`](super::Backfill::stream) and [`run`](super::Backfill::run).
///
/// In one line by [`Display`](fmt::Display): `account-email: 120000 of about 400000 rows (30 %), 52000 rows/s, about
/// 5.4s left`.
#[derive(Clone, Debug)]
pub struct BackfillProgress {
    pub(super) name: Arc<str>,
    /// Of all runs.
    pub(super) passed: u64,
    pub(super) changed: u64,
    /// Of this run.
    pub(super) passed_now: u64,
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
    /// Sessions wait for a lock on the table, or for rows of it.
    LockWaiters,
    /// Standbys or subscribers are too far behind.
    ReplicationLag,
}

/// How far the standbys and subscribers of the server are behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReplicationLag {
    /// Nobody follows the server.
    NoStandbys,
    /// The role may not see it: `pg_stat_replication` shows it to members of `pg_monitor`. The backfill goes on without.
    Unknown,
    /// Of the slowest one.
    #[non_exhaustive]
    Behind {
        /// `replay_lag`; zero where nothing has been written for a while.
        time: Duration,
        /// WAL that was written and not yet replayed, in bytes.
        bytes: u64,
    },
}

impl BackfillProgress {
    /// The backfill's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rows that were changed, by all runs together.
    #[must_use]
    pub fn rows_done(&self) -> u64 {
        self.changed
    }

    /// Rows gone by, by all runs together: those changed, and those that the filter left out.
    #[must_use]
    pub fn rows_passed(&self) -> u64 {
        self.passed
    }

    /// Rows that were changed by this run.
    #[must_use]
    pub fn rows_done_by_this_run(&self) -> u64 {
        self.changed_now
    }

    /// About how many rows the table has, those gone by included, by the planner's estimate when the run began; `None`
    /// where it gave none.
    #[must_use]
    pub fn estimated_rows(&self) -> Option<u64> {
        self.estimate.map(|rows| rows.max(self.passed))
    }

    /// Rows that this run goes by in a second, pauses included.
    #[must_use]
    pub fn rows_per_second(&self) -> f64 {
        pace::rate(self.passed_now, self.elapsed)
    }

    /// About how long it still takes at the speed of this run so far; `None` where that is not known yet.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        if self.is_done {
            return Some(Duration::ZERO);
        }
        let rows = self.estimated_rows()? - self.passed;
        pace::remaining(rows, self.passed_now, self.elapsed)
    }

    /// Batches that this run has committed.
    #[must_use]
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// How many rows the next batch goes by.
    #[must_use]
    pub fn batch_rows(&self) -> u32 {
        self.batch_rows
    }

    /// How long the last batch took, from its BEGIN to its COMMIT, without the attempts before that failed.
    #[must_use]
    pub fn last_batch(&self) -> Option<Duration> {
        self.last_batch
    }

    /// The same of the longest batch of this run.
    #[must_use]
    pub fn longest_batch(&self) -> Duration {
        self.longest_batch
    }

    /// How long this run has been going on.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// How much of that it has paused.
    #[must_use]
    pub fn paused(&self) -> Duration {
        self.paused
    }

    /// Why it pauses just now; `None` while it does not.
    #[must_use]
    pub fn pause(&self) -> Option<BackfillPause> {
        self.pause
    }

    /// How far the server's standbys and subscribers were behind when last looked.
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

    /// Whether all is done.
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
        write!(f, "{}", self.passed)?;
        if let Some(rows) = self.estimated_rows().filter(|rows| *rows > 0) {
            let percent = u128::from(self.passed) * 100 / u128::from(rows);
            write!(f, " of about {rows} rows ({percent} %)")?;
        } else {
            f.write_str(" rows")?;
        }
        if self.passed_now > 0 {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn progress() -> BackfillProgress {
        BackfillProgress {
            name: "emails".into(),
            passed: 120,
            changed: 100,
            passed_now: 20,
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
    fn one_line_says_it() {
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
    fn an_estimate_is_never_less_than_what_is_done() {
        let mut progress = progress();
        progress.estimate = Some(50);
        assert_eq!(progress.estimated_rows(), Some(120));
        assert_eq!(progress.remaining(), Some(Duration::ZERO));
    }

    #[test]
    fn what_is_hidden_is_unknown() {
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
}
