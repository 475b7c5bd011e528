//! Runs a closure in a transaction, and the whole of it again when PostgreSQL says that this can help.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use super::{AsyncFunc, Tx};
use crate::backoff::{Backoff, Jitter, RetryBudget};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, classify_db};

/// How often a transaction is run, and how long between.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) attempts: u32,
    /// No attempt begins after it.
    pub(crate) deadline: Option<Duration>,
    pub(crate) backoff: Backoff,
    pub(crate) jitter: Arc<Jitter>,
    pub(crate) budget: Arc<RetryBudget>,
}

/// Runs `f` in a transaction from `open`; `None` when `open` has none to give (a `try` that found its lock busy).
///
/// Every attempt has its own transaction and its own clone of the closure; between two there is a random pause. What
/// is repeated: deadlocks, serialization failures (COMMIT's too) and lock timeouts of the closure's own statements,
/// recognized by the SQLSTATE that the transaction itself saw, whatever the closure's error type. What is not: errors
/// of `open` (a lock's total wait has been spent there), any other error, and a COMMIT whose outcome is unknown.
///
/// Cancel safety: dropped in the closure, the transaction is rolled back in the background.
pub(crate) async fn run<R, E, F, O, Fut>(policy: &Policy, open: O, f: F) -> Result<Option<R>, E>
where
    for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
        + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
        + Send
        + Clone,
    O: Fn() -> Fut + Send,
    Fut: Future<Output = Result<Option<Tx>, Error>> + Send,
    E: From<Error> + Send,
    R: Send,
{
    let deadline = policy.deadline.map(Deadline::after);
    let mut attempt = 1;
    loop {
        let mut tx = match open().await {
            Ok(Some(tx)) => tx,
            Ok(None) => return Ok(None),
            Err(error) => return Err(error.with_attempts(attempt).into()),
        };
        let result = f.clone()(&mut tx).await;
        let again = match result {
            Ok(value) => match tx.commit().await {
                Ok(()) => {
                    policy.budget.succeeded();
                    return Ok(Some(value));
                }
                Err(error) if is_worth_repeating(error.kind()) => Again::Ours(error),
                Err(error) => return Err(error.with_attempts(attempt).into()),
            },
            Err(error) => {
                let failure = tx.session().failure();
                tx.rollback().await;
                match failure.filter(|failure| is_worth_repeating(classify_db(failure).kind())) {
                    Some(failure) => Again::Theirs(error, failure),
                    None => return Err(error),
                }
            }
        };
        let pause = policy.backoff.delay(attempt - 1, policy.jitter.next());
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
        if let Some(out_of) = out_of {
            return Err(again.exhausted(attempt, out_of));
        }
        // Cancel safety: nothing is held between two attempts.
        tokio::time::sleep(pause).await;
        attempt += 1;
    }
}

fn is_worth_repeating(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::Deadlock | ErrorKind::Serialization | ErrorKind::LockTimeout
    )
}

/// A failure for which the transaction is run again.
enum Again<E> {
    /// From COMMIT.
    Ours(Error),
    /// The closure's error, and the server's behind it.
    Theirs(E, Box<DbError>),
}

impl<E: From<Error>> Again<E> {
    fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Ours(error) => error.sqlstate().map(tokio_postgres::error::SqlState::code),
            Self::Theirs(_, failure) => Some(failure.code().code()),
        }
    }

    fn exhausted(self, attempt: u32, out_of: &str) -> E {
        match self {
            // Never repeated: there is nothing to add to the error itself.
            Self::Ours(error) if attempt == 1 => error.with_attempts(attempt).into(),
            Self::Theirs(error, _) if attempt == 1 => error,
            Self::Ours(error) => Error::new(ErrorKind::RetriesExhausted)
                .with_detail(format!("out of {out_of}"))
                .with_attempts(attempt)
                .with_source(error)
                .into(),
            Self::Theirs(_, failure) => Error::new(ErrorKind::RetriesExhausted)
                .with_detail(format!("out of {out_of}"))
                .with_attempts(attempt)
                .with_source(*failure)
                .into(),
        }
    }
}
