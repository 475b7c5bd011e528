//! What became of a change.

use std::fmt;
use std::time::Duration;

use crate::blocker::Blocker;
use crate::error::ErrorKind;

/// One attempt at a change: how long it took, and what was in its way.
#[derive(Clone, Debug)]
pub struct ChangeAttempt {
    pub(super) number: u32,
    pub(super) took: Duration,
    pub(super) failure: Option<ErrorKind>,
    pub(super) sqlstate: Option<String>,
    pub(super) blockers: Vec<Blocker>,
    pub(super) pause: Option<Duration>,
}

impl ChangeAttempt {
    /// Its number, counted from 1.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// From its BEGIN to its end.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Whether it changed what it should.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.failure.is_none()
    }

    /// Why it failed; `None` when it succeeded.
    #[must_use]
    pub fn failure(&self) -> Option<ErrorKind> {
        self.failure
    }

    /// The server's word for why.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }

    /// Who was in the way when it was last looked, while the attempt waited: those that hold what it wanted, and those
    /// queued ahead; where nobody could be seen then, who held, right after it, what it is known to lock. Empty where nobody
    /// did any more.
    #[must_use]
    pub fn blockers(&self) -> &[Blocker] {
        &self.blockers
    }

    /// The pause before the next attempt; `None` after the last.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        self.pause
    }
}

/// `attempt 2: lock not granted in time after 103.1ms; pid 4711 (…) holds AccessShareLock on relation public.t`
impl fmt::Display for ChangeAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = self.failure.map_or("done", ErrorKind::describe);
        write!(
            f,
            "attempt {}: {outcome} after {:.1?}",
            self.number, self.took
        )?;
        for (n, blocker) in self.blockers.iter().enumerate() {
            write!(f, "{} {blocker}", if n == 0 { ";" } else { "," })?;
        }
        Ok(())
    }
}

/// What a change took: its attempts, the last of which did it.
#[derive(Clone, Debug)]
pub struct ChangeReport {
    pub(super) attempts: Vec<ChangeAttempt>,
    pub(super) took: Duration,
}

impl ChangeReport {
    /// The attempts in order.
    #[must_use]
    pub fn attempts(&self) -> &[ChangeAttempt] {
        &self.attempts
    }

    /// All of it, pauses included.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }
}

/// The attempts, a line each.
impl fmt::Display for ChangeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, attempt) in self.attempts.iter().enumerate() {
            write!(f, "{}{attempt}", if n == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// What a work of several steps did: those it ran, in order. Those that it found done are not among them.
#[derive(Clone, Debug, Default)]
pub struct RecipeReport {
    pub(super) steps: Vec<(String, ChangeReport)>,
    pub(super) backfill: Option<String>,
}

impl RecipeReport {
    /// The statements that were run, each with its attempts. Empty where there was nothing left to do.
    #[must_use]
    pub fn steps(&self) -> &[(String, ChangeReport)] {
        &self.steps
    }

    /// What is left to be done to the rows that are there, as one statement that says it; to be done in batches. `None`
    /// but for a new column with a volatile default.
    #[must_use]
    pub fn backfill(&self) -> Option<&str> {
        self.backfill.as_deref()
    }

    pub(super) fn push(&mut self, sql: impl Into<String>, report: ChangeReport) {
        self.steps.push((sql.into(), report));
    }
}

/// The statements, a line each, with how long they took in all.
impl fmt::Display for RecipeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (sql, report)) in self.steps.iter().enumerate() {
            let line = if n == 0 { "" } else { "\n" };
            write!(f, "{line}{sql} ({:.1?}", report.took)?;
            match report.attempts.len() {
                0 | 1 => f.write_str(")")?,
                attempts => write!(f, ", {attempts} attempts)")?,
            }
        }
        Ok(())
    }
}

/// Behind the [`Error`](crate::Error) of a change that was given up: its attempts. From `source()`, by
/// `downcast_ref::<ChangeFailed>()`.
///
/// Its own source is the last attempt's error.
#[derive(Debug)]
pub struct ChangeFailed {
    pub(super) report: ChangeReport,
    pub(super) last: crate::error::Error,
}

impl ChangeFailed {
    /// The attempts, all of which failed.
    #[must_use]
    pub fn report(&self) -> &ChangeReport {
        &self.report
    }
}

impl fmt::Display for ChangeFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.report.attempts.len() {
            1 => f.write_str("the only attempt at the change failed"),
            attempts => write!(f, "all {attempts} attempts at the change failed"),
        }
    }
}

impl std::error::Error for ChangeFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.last)
    }
}
