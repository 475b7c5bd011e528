//! Runs a closure in a transaction, and the whole of it again when PostgreSQL says that this can help.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use super::options::RetryIf;
use super::report::{FailedAttempt, Reporter};
use super::{AsyncFunc, Tx};
use crate::backoff::{Backoff, Jitter, RetryBudget};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, Report, classify_db};

/// The least pause after a deadlock. A row's lock is not handed over to the one who waits for it: who comes back at once
/// can take it before the one who was woken, and close the circle again.
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
    /// Whether a COMMIT whose answer is lost is looked up.
    pub(crate) resolves: bool,
    pub(crate) reporter: Option<Arc<dyn Reporter>>,
}

/// Runs `f` in a transaction from `open`; `None` when `open` has none to give (a `try` that found its lock busy). `open`
/// is told how often the transaction has been a deadlock's victim.
///
/// Every attempt has its own transaction and its own clone of the closure; between two there is a random pause. What
/// is repeated: deadlocks, serialization failures (COMMIT's too) and lock timeouts of the closure's own statements,
/// recognized by the SQLSTATE that the transaction itself saw, whatever the closure's error type. What is not: errors
/// of `open` (a lock's total wait has been spent there), any other error, and a COMMIT whose outcome is unknown.
///
/// Cancel safety: dropped in the closure, the transaction is rolled back in the background.
pub(crate) async fn run<R, E, F, O, Fut, P>(
    policy: &Policy,
    retry_if: &P,
    open: O,
    f: F,
) -> Result<Option<R>, E>
where
    for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
        + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
        + Send
        + Clone,
    O: Fn(u32) -> Fut + Send,
    P: RetryIf<E>,
    Fut: Future<Output = Result<Option<Tx>, Error>> + Send,
    E: From<Error> + Send,
    R: Send,
{
    let deadline = policy.deadline.map(Deadline::after);
    let mut attempt = 1;
    let mut victim = 0;
    loop {
        let mut tx = match open(victim).await {
            Ok(Some(tx)) => tx.resolving(policy.resolves),
            Ok(None) => return Ok(None),
            Err(error) => return Err(error.with_attempts(attempt - 1).into()),
        };
        // Each attempt is observed as a transaction of its own.
        if let Some(observed) = tx.session().observed() {
            observed.is_attempt(attempt, policy.attempts);
        }
        let result = f.clone()(&mut tx).await;
        let observed = tx.session().observed().cloned();
        let again = match result {
            Ok(value) => match tx.commit().await {
                Ok(()) => {
                    policy.budget.succeeded();
                    return Ok(Some(value));
                }
                Err(error) if error.as_db_error().is_some_and(is_worth_repeating) => {
                    Again::Ours(error)
                }
                // COMMIT was not run, or found to have been rolled back.
                Err(error) if policy.resolves && error.kind() == ErrorKind::ConnectionLost => {
                    Again::Ours(error)
                }
                Err(error) => return Err(error.with_attempts(attempt).into()),
            },
            Err(error) => {
                let failure = tx.session().failure();
                tx.rollback().await;
                match failure.filter(|failure| is_worth_repeating(failure)) {
                    Some(failure) => Again::Theirs(error, failure),
                    None if retry_if.retry_if(&error) => Again::Asked(error),
                    None => return Err(error),
                }
            }
        };
        let mut pause = policy.backoff.delay(attempt - 1, policy.jitter.next());
        if again.db_error().map(classify_db) == Some(Failure::Deadlock) {
            pause = pause.max(AFTER_DEADLOCK);
        }
        let out_of = if attempt >= policy.attempts {
            Some("attempts")
        } else if deadline.is_some_and(|deadline| deadline.remaining() < pause) {
            Some("time")
        } else if !policy.budget.try_retry() {
            Some("retry budget")
        } else {
            None
        };
        tracing::debug!(
            attempt,
            sqlstate = again.sqlstate(),
            pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            out_of,
            "transaction attempt failed"
        );
        victim += u32::from(again.db_error().map(classify_db) == Some(Failure::Deadlock));
        let report = match (&policy.reporter, &observed, again.db_error()) {
            (Some(reporter), Some(observed), Some(error)) if is_about_locks(error) => reporter
                .failed(&FailedAttempt {
                    observed,
                    error,
                    attempt,
                    attempts: policy.attempts,
                    pause: out_of.is_none().then_some(pause),
                }),
            _ => None,
        };
        if let Some(out_of) = out_of {
            return Err(again.exhausted(attempt, out_of, report));
        }
        drop(report);
        // Cancel safety: nothing is held between two attempts.
        tokio::time::sleep(pause).await;
        attempt += 1;
    }
}

fn is_worth_repeating(error: &DbError) -> bool {
    matches!(
        classify_db(error),
        Failure::Deadlock | Failure::Serialization | Failure::LockTimeout
    )
}

fn is_about_locks(error: &DbError) -> bool {
    matches!(classify_db(error), Failure::Deadlock | Failure::LockTimeout)
}

/// A failure for which the transaction is run again.
enum Again<E> {
    /// From COMMIT.
    Ours(Error),
    /// The closure's error, and the server's behind it.
    Theirs(E, Box<DbError>),
    /// The closure's error, by the caller's own word.
    Asked(E),
}

impl<E: From<Error>> Again<E> {
    fn sqlstate(&self) -> Option<&str> {
        self.db_error().map(|error| error.code().code())
    }

    fn db_error(&self) -> Option<&DbError> {
        match self {
            Self::Ours(error) => error.as_db_error(),
            Self::Theirs(_, failure) => Some(failure),
            Self::Asked(_) => None,
        }
    }

    fn exhausted(self, attempt: u32, out_of: &str, report: Option<Box<dyn Report>>) -> E {
        match self {
            // Never repeated: there is nothing to add to the error itself.
            Self::Ours(error) if attempt == 1 => {
                error.with_report_if(report).with_attempts(attempt).into()
            }
            Self::Theirs(error, _) if attempt == 1 => error,
            // What the caller calls worth repeating is the caller's to understand.
            Self::Asked(error) => error,
            Self::Ours(error) => Error::new(ErrorKind::RetriesExhausted)
                .with_detail(format!("out of {out_of}"))
                .with_attempts(attempt)
                .with_report_if(report)
                .with_source(error)
                .into(),
            Self::Theirs(_, failure) => Error::new(ErrorKind::RetriesExhausted)
                .with_detail(format!("out of {out_of}"))
                .with_attempts(attempt)
                .with_report_if(report)
                .with_source(*failure)
                .into(),
        }
    }
}
