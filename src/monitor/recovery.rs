//! Deciding when an incident is over.

use std::fmt;
use std::time::Duration;

use super::Monitor;
use super::database_filter::DatabaseFilter;
use super::wait_summary::WaitSummary;
use crate::deadline::Deadline;
use crate::error::Error;
use crate::graph::Snapshot;

/// More frequent checks would show nothing more.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// When an incident counts as over: in a number of consecutive checks no session waits for a lock, or none waits for
/// long.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use lockkeeper::RecoveryCriterion;
///
/// let calm = RecoveryCriterion::waits_shorter_than(Duration::from_secs(2)).checks(5);
/// assert_eq!(calm.to_string(), "only waits shorter than 2s, in 5 checks in a row");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecoveryCriterion {
    shorter_than: Option<Duration>,
    checks: u32,
}

/// How the waits have changed since the previous check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trend {
    /// There was no previous check.
    First,
    /// Fewer sessions wait than before, or as many and the longest wait has ended.
    Falling,
    /// As many sessions wait as before, and the longest wait has not ended.
    Steady,
    /// More sessions wait than before.
    Rising,
}

/// The result of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryCheck {
    waits: WaitSummary,
    trend: Trend,
    falling: u32,
    met: u32,
    recovered: bool,
}

/// Whether waits decrease from check to check, and whether the incident is over: [`Monitor::recovery`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// use std::time::Duration;
/// use lockkeeper::RecoveryCriterion;
///
/// let mut recovery = keeper.monitor().recovery(RecoveryCriterion::no_waits().checks(3))?;
/// loop {
///     let check = recovery.check().await?;
///     println!("{check}");
///     if check.is_recovered() {
///         break;
///     }
///     tokio::time::sleep(Duration::from_secs(1)).await;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Recovery {
    monitor: Monitor,
    tracker: RecoveryTracker,
}

/// The state of a series of checks.
#[derive(Clone, Debug)]
pub(crate) struct RecoveryTracker {
    criterion: RecoveryCriterion,
    databases: DatabaseFilter,
    last: Option<WaitSummary>,
    falling: u32,
    met: u32,
}

impl RecoveryCriterion {
    /// No session waits for a lock, in three consecutive checks unless [`checks`](Self::checks) is called.
    #[must_use]
    pub fn no_waits() -> Self {
        Self {
            shorter_than: None,
            checks: 3,
        }
    }

    /// No session has waited for as long as `longest`: short waits are normal. In three consecutive checks unless
    /// [`checks`](Self::checks) is called.
    #[must_use]
    pub fn waits_shorter_than(longest: Duration) -> Self {
        Self {
            shorter_than: Some(longest),
            ..Self::no_waits()
        }
    }

    /// In how many consecutive checks it has to hold; at least one.
    #[must_use]
    pub fn checks(mut self, checks: u32) -> Self {
        self.checks = checks;
        self
    }

    /// Whether it holds for one sample.
    #[must_use]
    pub fn is_met_by(&self, waits: &WaitSummary) -> bool {
        match (self.shorter_than, waits.longest()) {
            _ if waits.is_empty() => true,
            (None, _) => false,
            // A session that has just begun to wait has not waited for long.
            (Some(_), None) => true,
            (Some(bound), Some(longest)) => longest < bound,
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.checks == 0 {
            return Err(Error::config(
                "a recovery criterion of 0 checks: it takes at least 1 check to know",
            ));
        }
        if self.shorter_than == Some(Duration::ZERO) {
            return Err(Error::config(
                "waits shorter than 0s: say RecoveryCriterion::no_waits() for none at all",
            ));
        }
        Ok(())
    }
}

impl fmt::Display for RecoveryCriterion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shorter_than {
            None => f.write_str("nobody waits")?,
            Some(bound) => write!(f, "only waits shorter than {bound:?}")?,
        }
        match self.checks {
            1 => f.write_str(", in one check"),
            n => write!(f, ", in {n} checks in a row"),
        }
    }
}

impl RecoveryCheck {
    getters! {
        /// The lock waits in this check.
        waits: &WaitSummary;

        /// How the waits have changed since the previous check.
        trend: Trend;

        /// In how many consecutive checks, up to this one, the waits have decreased.
        falling_for: u32 = falling;

        /// In how many consecutive checks, up to this one, the criterion was met.
        met_for: u32 = met;

        /// Whether the criterion was met in as many checks as it requires: the incident is over.
        is_recovered: bool = recovered;
    }
}

/// `2 sessions wait, the longest for 3.0s; falling for 2 checks`
impl fmt::Display for RecoveryCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.waits.fmt(f)?;
        match self.trend {
            Trend::First => {}
            Trend::Falling if self.falling > 1 => {
                write!(f, "; falling for {} checks", self.falling)?;
            }
            Trend::Falling => f.write_str("; falling")?,
            Trend::Steady => f.write_str("; steady")?,
            Trend::Rising => f.write_str("; rising")?,
        }
        if self.recovered {
            f.write_str("; recovered")?;
        }
        Ok(())
    }
}

impl Monitor {
    /// Checks whether waits decrease, and whether the criterion has been met in enough checks.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for a criterion that no check could meet.
    pub fn recovery(&self, criterion: RecoveryCriterion) -> Result<Recovery, Error> {
        Ok(Recovery {
            monitor: self.clone(),
            tracker: RecoveryTracker::new(criterion, DatabaseFilter::default())?,
        })
    }
}

impl Recovery {
    /// Takes a snapshot and counts it as the next check.
    ///
    /// # SQL
    /// As [`Monitor::snapshot`].
    ///
    /// # Errors
    /// As [`Monitor::snapshot`]. A snapshot that fails is not a check. Since the waits are then unknown, the
    /// consecutive checks that met the criterion are counted from zero again.
    ///
    /// # Longest silence
    /// As [`Monitor::snapshot`].
    ///
    /// # Cancel safety
    /// As [`Monitor::snapshot`]. A call that is dropped before it completes has counted nothing.
    pub async fn check(&mut self) -> Result<RecoveryCheck, Error> {
        match self.monitor.snapshot().await {
            Ok(snapshot) => Ok(self.observe(&snapshot)),
            Err(error) => {
                self.tracker.interrupt();
                Err(error)
            }
        }
    }

    /// Counts a snapshot, such as one of [`Monitor::watch`], as the next check. Nothing is sent to the server.
    pub fn observe(&mut self, snapshot: &Snapshot) -> RecoveryCheck {
        self.tracker.observe(snapshot)
    }

    /// Checks every `interval`, at least 10 milliseconds, until the incident is over or `within` has elapsed, and
    /// returns the last check. Snapshots that fail are ignored while time is left.
    ///
    /// # SQL
    /// As [`check`](Self::check), repeatedly.
    ///
    /// # Errors
    /// Those of the last snapshot if it failed and the time has elapsed; [`Config`](crate::ErrorKind::Config) for an
    /// interval that is too short.
    ///
    /// # Longest silence
    /// As [`check`](Self::check), after `within`.
    ///
    /// # Cancel safety
    /// As [`check`](Self::check).
    pub async fn wait(
        &mut self,
        interval: Duration,
        within: Duration,
    ) -> Result<RecoveryCheck, Error> {
        if interval < MIN_INTERVAL {
            return Err(Error::config(format!(
                "a check every {interval:?}: at least {MIN_INTERVAL:?}"
            )));
        }
        let deadline = Deadline::after(within);
        loop {
            let check = self.check().await;
            match &check {
                Ok(found) if found.is_recovered() => return check,
                _ if deadline.has_passed() => return check,
                _ => {}
            }
            tokio::time::sleep(interval.min(deadline.remaining())).await;
        }
    }
}

impl RecoveryTracker {
    pub(crate) fn new(
        criterion: RecoveryCriterion,
        databases: DatabaseFilter,
    ) -> Result<Self, Error> {
        criterion.check()?;
        Ok(Self {
            criterion,
            databases,
            last: None,
            falling: 0,
            met: 0,
        })
    }

    pub(crate) fn observe(&mut self, snapshot: &Snapshot) -> RecoveryCheck {
        self.count(WaitSummary::among(snapshot, &self.databases))
    }

    /// Counts a check whose result is unknown.
    pub(crate) fn interrupt(&mut self) {
        self.met = 0;
        self.falling = 0;
    }

    fn count(&mut self, waits: WaitSummary) -> RecoveryCheck {
        let trend = match self.last {
            None => Trend::First,
            Some(last) if waits.has_fallen_since(&last) => Trend::Falling,
            Some(last) if waits.sessions() > last.sessions() => Trend::Rising,
            Some(_) => Trend::Steady,
        };
        self.falling = match trend {
            Trend::Falling => self.falling.saturating_add(1),
            _ => 0,
        };
        self.met = match self.criterion.is_met_by(&waits) {
            true => self.met.saturating_add(1),
            false => 0,
        };
        self.last = Some(waits);
        RecoveryCheck {
            waits,
            trend,
            falling: self.falling,
            met: self.met,
            recovered: self.met >= self.criterion.checks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{edge, snapshot};
    use super::*;
    use crate::error::ErrorKind;

    fn tracker(criterion: RecoveryCriterion) -> RecoveryTracker {
        RecoveryTracker::new(criterion, DatabaseFilter::default())
            .expect("a criterion that can be met")
    }

    /// A snapshot in which `sessions` wait, the first for `longest` seconds, each other for one second less than the
    /// one before.
    fn waiting(sessions: i32, longest: u64) -> Snapshot {
        let edges = (0..sessions).map(|n| {
            let less = Duration::from_secs(n.unsigned_abs().into());
            edge(n + 2, 1, Duration::from_secs(longest).saturating_sub(less))
        });
        snapshot(vec![], edges.collect())
    }

    #[test]
    fn recovery_needs_consecutive_checks() {
        let mut tracker = tracker(RecoveryCriterion::no_waits().checks(2));
        let found: Vec<_> = [(2, 9), (0, 0), (1, 1), (0, 0), (0, 0)]
            .map(|(sessions, longest)| tracker.observe(&waiting(sessions, longest)))
            .iter()
            .map(|check| (check.trend(), check.met_for(), check.is_recovered()))
            .collect();
        assert_eq!(
            found,
            [
                (Trend::First, 0, false),
                (Trend::Falling, 1, false),
                (Trend::Rising, 0, false),
                (Trend::Falling, 1, false),
                (Trend::Steady, 2, true),
            ]
        );
    }

    #[test]
    fn short_waits_may_meet_the_criterion() {
        let short = RecoveryCriterion::waits_shorter_than(Duration::from_secs(3)).checks(1);
        let mut tracker = tracker(short);
        assert!(!tracker.observe(&waiting(2, 3)).is_recovered());
        assert!(tracker.observe(&waiting(5, 2)).is_recovered());
        assert!(tracker.observe(&waiting(0, 0)).is_recovered());
    }

    #[test]
    fn falling_checks_are_counted_and_a_stuck_queue_is_steady() {
        let mut tracker = tracker(RecoveryCriterion::no_waits());
        let found: Vec<_> = [(5, 9), (4, 10), (3, 11), (3, 12), (3, 4)]
            .map(|(sessions, longest)| tracker.observe(&waiting(sessions, longest)))
            .iter()
            .map(|check| (check.trend(), check.falling_for()))
            .collect();
        assert_eq!(
            found,
            [
                (Trend::First, 0),
                (Trend::Falling, 1),
                (Trend::Falling, 2),
                (Trend::Steady, 0),
                // The longest wait has ended; other sessions wait.
                (Trend::Falling, 1),
            ]
        );
    }

    #[test]
    fn an_unknown_check_resets_the_count() {
        let mut tracker = tracker(RecoveryCriterion::no_waits().checks(2));
        assert_eq!(tracker.observe(&waiting(0, 0)).met_for(), 1);
        tracker.interrupt();
        assert!(!tracker.observe(&waiting(0, 0)).is_recovered());
    }

    #[test]
    fn a_criterion_that_no_check_can_meet_is_refused() {
        for criterion in [
            RecoveryCriterion::no_waits().checks(0),
            RecoveryCriterion::waits_shorter_than(Duration::ZERO),
        ] {
            let error = criterion.check().expect_err("it is refused");
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        }
    }
}
