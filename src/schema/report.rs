//! The results of changes.

use std::fmt;
use std::time::Duration;

use crate::blocker::Blocker;
use crate::error::ErrorKind;
use crate::postgres::text::Joined;

/// One attempt at a change: its duration, its outcome and its blockers.
#[derive(Clone, Debug)]
pub struct ChangeAttempt {
    pub(super) number: u32,
    pub(super) elapsed: Duration,
    pub(super) lock_timeout: Duration,
    pub(super) failure: Option<ErrorKind>,
    pub(super) sqlstate: Option<String>,
    pub(super) blockers: Vec<Blocker>,
    pub(super) pause: Option<Duration>,
}

impl ChangeAttempt {
    getters! {
        /// The number of the attempt, counted from 1.
        number: u32;

        /// The duration of the attempt, from its BEGIN to its end.
        elapsed: Duration;

        /// How long the attempt might wait for its locks, and other sessions behind it. It is longer than that of the
        /// others if the attempt waits for an autovacuum worker.
        lock_timeout: Duration;
    }

    /// Whether the attempt made the change.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.failure.is_none()
    }

    getters! {
        /// The kind of error with which the attempt failed; `None` if it succeeded.
        failure: Option<ErrorKind>;

        /// The SQLSTATE of the server's error; `None` without one.
        text sqlstate;

        /// The sessions that blocked the attempt in the last sample before it ended: holders of the lock it waited for, and
        /// waiters ahead of it in the queue. If no sample was taken, these are the sessions that held conflicting locks
        /// right after the attempt on the relations it is known to lock. Empty if there were none.
        blockers: &[Blocker];

        /// The pause before the next attempt; `None` after the last attempt.
        pause: Option<Duration>;
    }
}

/// `attempt 2: lock not granted in time after 103.1ms; pid 4711 (…) holds AccessShareLock on relation public.t`
impl fmt::Display for ChangeAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = self.failure.map_or("done", ErrorKind::describe);
        write!(
            f,
            "attempt {}: {outcome} after {:.1?}",
            self.number, self.elapsed
        )?;
        for (n, blocker) in self.blockers.iter().enumerate() {
            write!(f, "{} {blocker}", if n == 0 { ";" } else { "," })?;
        }
        Ok(())
    }
}

/// The attempts of a change, the last of which succeeded.
#[derive(Clone, Debug)]
pub struct ChangeReport {
    pub(super) attempts: Vec<ChangeAttempt>,
    pub(super) elapsed: Duration,
}

impl ChangeReport {
    getters! {
        /// The attempts, in order.
        attempts: &[ChangeAttempt];

        /// The duration of all attempts, including the pauses.
        elapsed: Duration;
    }
}

/// The attempts, one per line.
impl fmt::Display for ChangeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Joined(&self.attempts, "\n").fmt(f)
    }
}

/// The steps that a procedure ran, in order. Steps that were already done are not among them.
#[derive(Clone, Debug, Default)]
pub struct ProcedureReport {
    pub(super) steps: Vec<(String, ChangeReport)>,
    pub(super) backfill: Option<String>,
}

impl ProcedureReport {
    getters! {
        /// The statements that were run, each with its attempts. Empty if nothing was left to do.
        steps: &[(String, ChangeReport)];

        /// The change that existing rows still need, as one statement that describes it; run it in batches. `None` except
        /// for a new column with a volatile default.
        text backfill;
    }

    pub(super) fn push(&mut self, sql: impl Into<String>, report: ChangeReport) {
        self.steps.push((sql.into(), report));
    }
}

/// The statements, one per line, with their durations.
impl fmt::Display for ProcedureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (sql, report)) in self.steps.iter().enumerate() {
            let line = if n == 0 { "" } else { "\n" };
            write!(f, "{line}{sql} ({:.1?}", report.elapsed)?;
            match report.attempts.len() {
                0 | 1 => f.write_str(")")?,
                attempts => write!(f, ", {attempts} attempts)")?,
            }
        }
        Ok(())
    }
}

/// The attempts of a change that was abandoned: the `source()` of its [`Error`](crate::Error), available by
/// `downcast_ref::<ChangeFailed>()`.
///
/// Its own source is the error of the last attempt.
#[derive(Debug)]
pub struct ChangeFailed {
    pub(super) report: ChangeReport,
    pub(super) last: crate::error::Error,
}

impl ChangeFailed {
    /// The failed attempts.
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
