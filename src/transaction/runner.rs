//! Runs a closure in a transaction, and the whole of it again when PostgreSQL says that this can help.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;
use tracing::Instrument as _;

use super::options::{Resolve, RetryIf, TransactionOptions};
use super::report::{AfterFailure, FailedAttempt, Reporter, Reporting};
use super::spans::Spans;
use super::{AsyncFunc, BoxFuture, Tx};
use crate::backoff::{Backoff, Jitter, Retry, RetryBudget};
use crate::connection::Observed;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, Report, classify_db};
use crate::meter::{self, OTHER_ERROR, error_type};

/// The least pause after a deadlock. A row's lock is not handed over to the one who waits for it: who comes back at once
/// can take it before the one who was woken, and close the cycle again.
const AFTER_DEADLOCK: Duration = Duration::from_millis(2);

/// How often a transaction is run, and how long between.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) attempts: u32,
    /// No attempt begins after it.
    pub(crate) deadline: Option<Duration>,
    pub(crate) backoff: Backoff,
    pub(crate) jitter: Arc<Jitter>,
    pub(crate) budget: Arc<RetryBudget>,
    /// How a COMMIT whose answer is lost is looked up.
    pub(crate) resolve: Option<Resolve>,
    pub(crate) reporter: Option<Arc<dyn Reporter>>,
}

/// What all runs of one keeper share.
pub(crate) struct Runner {
    pub(crate) jitter: Arc<Jitter>,
    pub(crate) budget: Arc<RetryBudget>,
    pub(crate) reporter: Option<Arc<dyn Reporter>>,
}

impl Runner {
    pub(crate) fn new(reporter: Option<Arc<dyn Reporter>>) -> Self {
        Self {
            jitter: Arc::new(Jitter::new()),
            budget: Arc::default(),
            reporter,
        }
    }

    pub(crate) fn policy<P>(&self, options: &TransactionOptions<P>) -> Policy {
        Policy {
            attempts: options.max_attempts(),
            deadline: options.total_deadline(),
            backoff: Backoff::default(),
            jitter: Arc::clone(&self.jitter),
            budget: Arc::clone(&self.budget),
            resolve: options.resolve(),
            reporter: self.reporter.clone(),
        }
    }
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner").finish_non_exhaustive()
    }
}

/// Runs `f` in a transaction from `open`; `None` when `open` has none to give (a `try` that found its lock busy).
///
/// Every attempt has its own transaction and its own clone of the closure; between two there is a random pause. What
/// is repeated: deadlocks, serialization failures (COMMIT's too) and lock timeouts of the closure's own statements,
/// recognized by the SQLSTATE that the transaction itself saw, whatever the closure's error type; once, a prepared statement
/// whose result has changed its type; and deadlocks of `open`, between its locks. What is not: other errors of `open` (a lock's total wait has been spent there), any other error, and a
/// COMMIT whose outcome is unknown.
///
/// This function is compiled once for each closure, in the caller's crate, so all that does not depend on the closure is
/// in [`Attempts`], behind boxed futures.
///
/// Cancel safety: dropped in the closure, the transaction is rolled back in the background.
pub(crate) async fn run<R, E, F, P>(
    policy: &Policy,
    retry_if: &P,
    open: &dyn Open,
    f: F,
) -> Result<Option<R>, E>
where
    for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
        + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
        + Send
        + Clone,
    P: RetryIf<E>,
    E: From<Error> + Send,
    R: Send,
{
    let mut attempts = Attempts::new(policy, open);
    loop {
        let Some(mut tx) = attempts.begin().await? else {
            return Ok(None);
        };
        let section = scopeguard::guard(tx.begin_section(), |section| section.end());
        // In one expression: the future of the closure is not to be kept twice.
        let outcome = (Arc::clone(&section).scope(f.clone()(&mut tx)))
            .instrument(attempts.spans.attempt())
            .await;
        drop(section);
        let (reason, own) = match outcome {
            Ok(value) => match attempts.commit(tx).await? {
                None => return Ok(Some(value)),
                Some(reason) => (reason, None),
            },
            Err(error) => match attempts.roll_back(tx).await {
                Some(failure) => (Reason::Statement(failure), Some(error)),
                None if retry_if.retry_if(&error) => (Reason::Asked, Some(error)),
                None => return Err(error),
            },
        };
        if let Err(exhausted) = attempts.pause(reason).await {
            return Err(match own {
                Some(error) if exhausted.passes_on => error,
                _ => exhausted.error.into(),
            });
        }
    }
}

/// Where a run takes its transactions from.
pub(crate) trait Open: Send + Sync {
    /// One transaction, or `None` where there is none to be had without waiting. It is told how often the run has been a
    /// deadlock's victim.
    fn open(&self, times_victim: u32) -> BoxFuture<'_, Result<Option<Tx>, Error>>;

    /// What a run is called that takes its transactions from here.
    fn operation(&self) -> &'static str;
}

/// Why a transaction is run again.
enum Reason {
    /// COMMIT failed.
    Commit(Error),
    /// A statement failed, and the closure returned an error of its own.
    Statement(Box<DbError>),
    /// The caller asks for it.
    Asked,
}

impl Reason {
    fn db_error(&self) -> Option<&DbError> {
        match self {
            Self::Commit(error) => error.as_db_error(),
            Self::Statement(failure) => Some(failure),
            Self::Asked => None,
        }
    }

    fn error_type(&self) -> String {
        match self {
            Self::Commit(error) => error_type(error),
            Self::Statement(failure) => failure.code().code().to_owned(),
            Self::Asked => OTHER_ERROR.to_owned(),
        }
    }
}

/// There is no further attempt.
struct Exhausted {
    error: Error,
    /// Whether the closure's own error is passed on instead.
    passes_on: bool,
}

/// The attempts of one run.
struct Attempts<'a> {
    policy: &'a Policy,
    open: &'a dyn Open,
    retry: Retry,
    times_victim: u32,
    /// Whether it was repeated for a stale plan. What was prepared is forgotten by then, so a second one is the closure's own.
    was_stale: bool,
    /// The session of the attempt.
    session: u64,
    observed: Option<Arc<dyn Observed>>,
    spans: Spans,
}

impl<'a> Attempts<'a> {
    fn new(policy: &'a Policy, open: &'a dyn Open) -> Self {
        Self {
            policy,
            open,
            retry: Retry::new(
                policy.backoff,
                Duration::ZERO,
                policy.attempts,
                policy.deadline.map(Deadline::after),
            ),
            times_victim: 0,
            was_stale: false,
            session: 0,
            observed: None,
            spans: Spans::begin(open),
        }
    }

    fn begin(&mut self) -> BoxFuture<'_, Result<Option<Tx>, Error>> {
        let span = self.spans.begin_attempt(self.retry.attempts() + 1);
        let beginning = async {
            if let Some(reporter) = &self.policy.reporter {
                Arc::clone(reporter).begins();
            }
            let (opened, attempt) = loop {
                match self.open.open(self.times_victim).await {
                    Ok(opened) => break (opened, self.retry.begin()),
                    // Whose transaction it was is not known here any more, so it is not reported.
                    Err(error) if error.kind() == ErrorKind::Deadlock => {
                        self.observed = None;
                        let _ = self.retry.begin();
                        let paused = self.pause(Reason::Commit(error)).await;
                        paused.map_err(|exhausted| exhausted.error)?;
                    }
                    Err(error) => {
                        self.spans.ended(|| Some(error_type(&error)));
                        return Err(error.with_attempts(self.retry.attempts()));
                    }
                }
            };
            let Some(tx) = opened else { return Ok(None) };
            self.spans.opened(attempt, tx.session());
            let mut tx = tx.of_attempt(attempt, self.policy.resolve);
            if let Some(reporter) = &self.policy.reporter {
                tx.report_to(Reporting {
                    reporter: Arc::clone(reporter),
                    attempt,
                    attempts: self.policy.attempts,
                });
            }
            self.session = tx.session().id();
            // Each attempt is observed as a transaction of its own.
            if let Some(observed) = tx.session().observed() {
                observed.is_attempt(attempt, self.policy.attempts);
            }
            Ok(Some(tx))
        };
        Box::pin(beginning.instrument(span))
    }

    /// `None` where it has committed.
    fn commit(&mut self, tx: Tx) -> BoxFuture<'_, Result<Option<Reason>, Error>> {
        self.observed = tx.session().observed().cloned();
        let span = self.spans.attempt();
        let committing = async {
            let committed = self.try_commit(tx).await;
            self.spans.ended(|| match &committed {
                Ok(None) => None,
                Ok(Some(reason)) => Some(reason.error_type()),
                Err(error) => Some(error_type(error)),
            });
            committed
        };
        Box::pin(committing.instrument(span))
    }

    async fn try_commit(&mut self, tx: Tx) -> Result<Option<Reason>, Error> {
        tx.check_session(self.session)?;
        match tx.commit().await {
            Ok(()) => {
                self.policy.budget.succeeded();
                Ok(None)
            }
            Err(error)
                if error
                    .as_db_error()
                    .is_some_and(|error| self.is_worth_repeating(error)) =>
            {
                Ok(Some(Reason::Commit(error)))
            }
            // COMMIT was not run, or found to have been rolled back.
            Err(error)
                if self.policy.resolve.is_some() && error.kind() == ErrorKind::ConnectionLost =>
            {
                Ok(Some(Reason::Commit(error)))
            }
            Err(error) => {
                let report = match error.as_db_error() {
                    Some(error) => self.report_passed(error).await,
                    None => None,
                };
                let error = error.with_attempts(self.retry.attempts());
                Err(match report {
                    Some(report) => error.with_report_if(Some(report)),
                    None => error,
                })
            }
        }
    }

    /// Reports a wait that a cancel or `statement_timeout` ended, which is not repeated.
    async fn report_passed(&self, error: &DbError) -> Option<Box<dyn Report>> {
        if classify_db(error) != Failure::Cancelled {
            return None;
        }
        self.report(error, AfterFailure::Pass).await
    }

    /// Gives the failure that is worth another attempt, if there is one.
    fn roll_back(&mut self, mut tx: Tx) -> BoxFuture<'_, Option<Box<DbError>>> {
        self.observed = tx.session().observed().cloned();
        let span = self.spans.attempt();
        let rolling_back = async {
            let failure = tx.session().failure();
            // Passed on, so no savepoint has caught it in the end.
            tx.forget_caught();
            tx.rollback().await;
            self.spans.ended(|| {
                let sqlstate = failure.as_ref().map(|error| error.code().code());
                Some(sqlstate.unwrap_or(OTHER_ERROR).to_owned())
            });
            if let Some(failure) = &failure {
                drop(self.report_passed(failure).await);
            }
            failure.filter(|failure| self.is_worth_repeating(failure))
        };
        Box::pin(rolling_back.instrument(span))
    }

    fn is_worth_repeating(&mut self, error: &DbError) -> bool {
        match classify_db(error) {
            Failure::Deadlock | Failure::Serialization | Failure::LockTimeout => true,
            Failure::StalePlan => !std::mem::replace(&mut self.was_stale, true),
            _ => false,
        }
    }

    /// Pauses before the next attempt.
    fn pause(&mut self, reason: Reason) -> BoxFuture<'_, Result<(), Exhausted>> {
        Box::pin(async {
            let policy = self.policy;
            let attempt = self.retry.attempts();
            let is_deadlock = reason.db_error().map(classify_db) == Some(Failure::Deadlock);
            let mut pause = self.retry.pause(policy.jitter.next());
            if is_deadlock {
                pause = pause.max(AFTER_DEADLOCK);
                self.times_victim += 1;
            }
            let out_of = self.retry.is_out_of(pause);
            let out_of = out_of.or_else(|| (!policy.budget.try_retry()).then_some("retry budget"));
            tracing::debug!(
                attempt,
                sqlstate = reason.db_error().map(|error| error.code().code()),
                pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                out_of,
                "transaction attempt failed"
            );
            let then = match out_of {
                None => AfterFailure::Retry(pause),
                Some(_) if policy.attempts == 1 => AfterFailure::Pass,
                Some(_) => AfterFailure::GiveUp,
            };
            let error = reason.db_error().filter(|error| is_about_locks(error));
            let report = match error {
                Some(error) => self.report(error, then).await,
                None => None,
            };
            if is_deadlock && report.is_none() {
                meter::deadlocked("");
            }
            if let Some(out_of) = out_of {
                return Err(exhausted(reason, attempt, out_of, report));
            }
            drop(report);
            meter::retried(reason.db_error().map_or("", |error| error.code().code()));
            // Cancel safety: nothing is held between two attempts.
            tokio::time::sleep(pause).await;
            Ok(())
        })
    }

    async fn report(&self, error: &DbError, then: AfterFailure) -> Option<Box<dyn Report>> {
        let reporter = self.policy.reporter.as_ref()?;
        let failed = FailedAttempt {
            observed: self.observed.as_ref()?,
            error,
            attempt: self.retry.attempts(),
            attempts: self.policy.attempts,
            then,
        };
        // Cancel safety: nothing is held between two attempts.
        reporter.look_up(&failed).await;
        reporter.failed(&failed)
    }
}

fn exhausted(
    reason: Reason,
    attempt: u32,
    out_of: &str,
    report: Option<Box<dyn Report>>,
) -> Exhausted {
    // What was run once was not repeated: there is nothing to add to the error itself. And an error that the caller asked
    // to have repeated is the caller's to understand.
    let passes_on = attempt == 1 || matches!(reason, Reason::Asked);
    let repeated = Error::new(ErrorKind::RetriesExhausted).with_detail(format!("out of {out_of}"));
    let error = match reason {
        Reason::Commit(error) if attempt == 1 => error,
        Reason::Commit(error) => repeated.with_source(error),
        Reason::Statement(failure) => repeated.with_source(*failure),
        Reason::Asked => repeated,
    };
    Exhausted {
        error: error.with_report_if(report).with_attempts(attempt),
        passes_on,
    }
}

pub(super) fn is_about_locks(error: &DbError) -> bool {
    matches!(classify_db(error), Failure::Deadlock | Failure::LockTimeout)
}
