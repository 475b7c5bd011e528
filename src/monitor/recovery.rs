//! Whether it is over.

use std::fmt;
use std::time::Duration;

use super::Monitor;
use super::waits::{Databases, Waits};
use crate::deadline::Deadline;
use crate::error::Error;
use crate::graph::Snapshot;

/// Checks are not worth more often than that.
const SHORTEST: Duration = Duration::from_millis(10);

/// When an incident counts as over: nobody waits for a lock, or nobody for long, so many checks in a row.
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

/// How the waits have changed from one check to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trend {
    /// There was no check before.
    First,
    /// Fewer sessions wait than before, or as many and the one that had waited longest has gone on.
    Falling,
    /// As many wait as before, and they are the same.
    Steady,
    /// More wait than before.
    Rising,
}

/// What one check has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryCheck {
    waits: Waits,
    trend: Trend,
    falling: u32,
    met: u32,
    recovered: bool,
}

/// Whether waits fall from check to check, and whether it is over: [`Monitor::recovery`].
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
    course: Course,
}

/// The checks so far.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    criterion: RecoveryCriterion,
    databases: Databases,
    last: Option<Waits>,
    falling: u32,
    met: u32,
}

impl RecoveryCriterion {
    /// Nobody waits for a lock. Three checks in a row, where [`checks`](Self::checks) does not say otherwise.
    #[must_use]
    pub fn no_waits() -> Self {
        Self {
            shorter_than: None,
            checks: 3,
        }
    }

    /// Nobody has waited for that long: short waits are daily business. Three checks in a row, where
    /// [`checks`](Self::checks) does not say otherwise.
    #[must_use]
    pub fn waits_shorter_than(longest: Duration) -> Self {
        Self {
            shorter_than: Some(longest),
            ..Self::no_waits()
        }
    }

    /// In how many checks in a row it has to hold; at least one.
    #[must_use]
    pub fn checks(mut self, checks: u32) -> Self {
        self.checks = checks;
        self
    }

    /// Whether it holds in one moment.
    #[must_use]
    pub fn is_met_by(&self, waits: &Waits) -> bool {
        match (self.shorter_than, waits.longest()) {
            _ if waits.is_empty() => true,
            (None, _) => false,
            // Who has begun to wait just now has not waited for long.
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
    /// How much was waited.
    #[must_use]
    pub fn waits(&self) -> &Waits {
        &self.waits
    }

    /// How that has changed since the check before.
    #[must_use]
    pub fn trend(&self) -> Trend {
        self.trend
    }

    /// In how many checks in a row, up to this one, waits have fallen.
    #[must_use]
    pub fn falling_for(&self) -> u32 {
        self.falling
    }

    /// In how many checks in a row, up to this one, the criterion was met.
    #[must_use]
    pub fn met_for(&self) -> u32 {
        self.met
    }

    /// Whether it was met in as many as it asks for: it is over.
    #[must_use]
    pub fn is_recovered(&self) -> bool {
        self.recovered
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
    /// Checks whether waits fall, and tells when the criterion has been met for long enough.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for a criterion that no check could meet.
    pub fn recovery(&self, criterion: RecoveryCriterion) -> Result<Recovery, Error> {
        Ok(Recovery {
            monitor: self.clone(),
            course: Course::new(criterion, Databases::default())?,
        })
    }
}

impl Recovery {
    /// Looks at the server and counts what it sees as the next check.
    ///
    /// # SQL
    /// As [`Monitor::snapshot`].
    ///
    /// # Errors
    /// As [`Monitor::snapshot`]. A look that fails is no check: nothing is known of it, so that the row of checks that met
    /// the criterion begins anew.
    ///
    /// # Cancel safety
    /// As [`Monitor::snapshot`]; dropped before it is done it has counted nothing.
    pub async fn check(&mut self) -> Result<RecoveryCheck, Error> {
        match self.monitor.snapshot().await {
            Ok(snapshot) => Ok(self.observe(&snapshot)),
            Err(error) => {
                self.course.interrupt();
                Err(error)
            }
        }
    }

    /// Counts a snapshot, such as one of [`Monitor::watch`], as the next check. Nothing is sent.
    pub fn observe(&mut self, snapshot: &Snapshot) -> RecoveryCheck {
        self.course.observe(snapshot)
    }

    /// Checks every `interval`, 10 milliseconds at least, until it is over, for `within` at most; gives the last check.
    /// Looks that fail are passed over while there is time.
    ///
    /// # SQL
    /// As [`check`](Self::check), over and over.
    ///
    /// # Errors
    /// Those of the last look, where that failed and the time is over; [`Config`](crate::ErrorKind::Config) for an interval
    /// that is too short.
    ///
    /// # Cancel safety
    /// As [`check`](Self::check).
    pub async fn wait(
        &mut self,
        interval: Duration,
        within: Duration,
    ) -> Result<RecoveryCheck, Error> {
        if interval < SHORTEST {
            return Err(Error::config(format!(
                "a check every {interval:?}: at least {SHORTEST:?}"
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

impl Course {
    pub(crate) fn new(criterion: RecoveryCriterion, databases: Databases) -> Result<Self, Error> {
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
        self.count(Waits::among(snapshot, &self.databases))
    }

    /// Nothing is known of this check.
    pub(crate) fn interrupt(&mut self) {
        self.met = 0;
        self.falling = 0;
    }

    fn count(&mut self, waits: Waits) -> RecoveryCheck {
        let trend = match self.last {
            None => Trend::First,
            Some(last) if waits.have_fallen_since(&last) => Trend::Falling,
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

    fn course(criterion: RecoveryCriterion) -> Course {
        Course::new(criterion, Databases::default()).expect("a criterion that can be met")
    }

    /// So many sessions wait, the first for so many seconds, each for one less than the one before.
    fn waiting(sessions: i32, longest: u64) -> Snapshot {
        let edges = (0..sessions).map(|n| {
            let less = Duration::from_secs(n.unsigned_abs().into());
            edge(n + 2, 1, Duration::from_secs(longest).saturating_sub(less))
        });
        snapshot(vec![], edges.collect())
    }

    #[test]
    fn it_is_over_after_so_many_checks_in_a_row() {
        let mut course = course(RecoveryCriterion::no_waits().checks(2));
        let found: Vec<_> = [(2, 9), (0, 0), (1, 1), (0, 0), (0, 0)]
            .map(|(sessions, longest)| course.observe(&waiting(sessions, longest)))
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
    fn short_waits_can_be_nothing_to_worry_about() {
        let short = RecoveryCriterion::waits_shorter_than(Duration::from_secs(3)).checks(1);
        let mut course = course(short);
        assert!(!course.observe(&waiting(2, 3)).is_recovered());
        assert!(course.observe(&waiting(5, 2)).is_recovered());
        assert!(course.observe(&waiting(0, 0)).is_recovered());
    }

    #[test]
    fn falling_is_counted_and_a_stuck_queue_is_steady() {
        let mut course = course(RecoveryCriterion::no_waits());
        let found: Vec<_> = [(5, 9), (4, 10), (3, 11), (3, 12), (3, 4)]
            .map(|(sessions, longest)| course.observe(&waiting(sessions, longest)))
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
                // Others wait than did.
                (Trend::Falling, 1),
            ]
        );
    }

    #[test]
    fn what_was_not_seen_was_not_met() {
        let mut course = course(RecoveryCriterion::no_waits().checks(2));
        assert_eq!(course.observe(&waiting(0, 0)).met_for(), 1);
        course.interrupt();
        assert!(!course.observe(&waiting(0, 0)).is_recovered());
    }

    #[test]
    fn criteria_that_no_check_can_meet_are_refused() {
        for criterion in [
            RecoveryCriterion::no_waits().checks(0),
            RecoveryCriterion::waits_shorter_than(Duration::ZERO),
        ] {
            let error = criterion.check().expect_err("it is refused");
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        }
    }
}
