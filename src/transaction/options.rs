//! What a transaction is begun with, and how often it is tried.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::IsolationLevel;

use super::sql;
use crate::error::Error;
use crate::key::LockKey;

/// How to run a transaction: for [`Keeper::transaction_with`](crate::Keeper::transaction_with).
///
/// What is not set is left to the server's and the role's settings.
///
/// ```
/// use std::time::Duration;
/// use lockkeeper::{TransactionOptions, tokio_postgres::IsolationLevel};
///
/// let options = TransactionOptions::new()
///     .isolation(IsolationLevel::Serializable)
///     .attempts(8)
///     .lock_timeout(Duration::from_secs(2));
/// ```
///
/// Its type parameter is what [`retry_if`](Self::retry_if) is given; without that it is left out.
#[derive(Clone)]
#[must_use = "options do nothing until a transaction is run with them"]
pub struct TransactionOptions<P = NoRetry> {
    begin: sql::Begin,
    attempts: u32,
    deadline: Option<Duration>,
    resolve_commit: Option<Resolve>,
    conflict_group: Option<LockKey>,
    retry_if: P,
}

/// For how long a COMMIT whose answer was lost is looked up, where that is not the longest silence.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Resolve(pub(crate) Option<Duration>);

/// Whether a transaction that has failed with an error of the closure's own is worth another attempt: what
/// [`TransactionOptions::retry_if`] is given. Implemented for every closure it could be.
pub trait RetryIf<E>: Send + Sync {
    /// Whether to run the transaction again.
    fn retry_if(&self, error: &E) -> bool;
}

/// No error of the closure's own is worth another attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "there is nothing to add to it")]
pub struct NoRetry;

impl<E> RetryIf<E> for NoRetry {
    fn retry_if(&self, _: &E) -> bool {
        false
    }
}

impl<E, F: Fn(&E) -> bool + Send + Sync> RetryIf<E> for F {
    fn retry_if(&self, error: &E) -> bool {
        self(error)
    }
}

impl Default for TransactionOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl TransactionOptions {
    /// Five attempts, no deadline, everything else as the server has it.
    pub fn new() -> Self {
        Self {
            begin: sql::Begin::default(),
            attempts: 5,
            deadline: None,
            resolve_commit: None,
            conflict_group: None,
            retry_if: NoRetry,
        }
    }

    /// Which errors of the closure's own are worth another attempt, besides what PostgreSQL says of itself: for failures
    /// that only the application knows. They come back as they were when there are no attempts left.
    ///
    /// It is asked, after the rollback, for each error that the closure returns, except where a deadlock, a serialization
    /// failure or a lock timeout of this very transaction is behind it: that is run again in any case. What is run again
    /// so has the same attempts, pauses, [`deadline`](Self::deadline) and retry budget.
    ///
    /// For an error type that has sources, [`is_retryable`](crate::is_retryable) searches them for a failure that can be
    /// mended so: of another connection, or of this one when it is lost.
    ///
    /// ```
    /// use lockkeeper::TransactionOptions;
    ///
    /// # enum MyError { StaleVersion, Other }
    /// let options = TransactionOptions::new()
    ///     .retry_if(|error: &MyError| matches!(error, MyError::StaleVersion));
    /// ```
    pub fn retry_if<E, F>(self, retry_if: F) -> TransactionOptions<F>
    where
        F: Fn(&E) -> bool + Send + Sync,
    {
        TransactionOptions {
            begin: self.begin,
            attempts: self.attempts,
            deadline: self.deadline,
            resolve_commit: self.resolve_commit,
            conflict_group: self.conflict_group,
            retry_if,
        }
    }
}

impl<P> TransactionOptions<P> {
    /// The isolation level: `BEGIN ISOLATION LEVEL …`.
    pub fn isolation(mut self, level: IsolationLevel) -> Self {
        self.begin.isolation = Some(level);
        self
    }

    /// `BEGIN READ ONLY` or `READ WRITE`.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.begin.read_only = Some(read_only);
        self
    }

    /// `BEGIN DEFERRABLE`: with SERIALIZABLE and READ ONLY, waits at first for a snapshot that cannot fail.
    pub fn deferrable(mut self, deferrable: bool) -> Self {
        self.begin.deferrable = Some(deferrable);
        self
    }

    /// How often the transaction is run at most, the first time included; at least 1.
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// One attempt, whatever fails: the closure never runs again.
    pub fn once(self) -> Self {
        self.attempts(1)
    }

    /// No further attempt is started later than this after the first one was. An attempt that has been started may still
    /// wait for its connection and its lock.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// `SET LOCAL lock_timeout`: how long each single wait for a lock may take; rounded up to whole milliseconds, at
    /// most 2 147 483 647 of them. A value below the server's `deadlock_timeout` (1 s by default) ends deadlocks as
    /// lock timeouts, before the server has found them.
    pub fn lock_timeout(mut self, timeout: Duration) -> Self {
        self.begin.lock_timeout = Some(timeout);
        self
    }

    /// `SET LOCAL statement_timeout`: how long each statement may take; rounded like
    /// [`lock_timeout`](Self::lock_timeout).
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.begin.statement_timeout = Some(timeout);
        self
    }

    /// `SET LOCAL idle_in_transaction_session_timeout`: how long the transaction may pause between two statements
    /// before the server ends the connection; rounded like [`lock_timeout`](Self::lock_timeout).
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.begin.idle_in_transaction_session_timeout = Some(timeout);
        self
    }

    /// When the connection is lost during COMMIT, finds out on another connection what became of it, by
    /// `pg_xact_status`: it counts as committed, or is run again. The error is
    /// [`CommitUnknown`](crate::ErrorKind::CommitUnknown) only where that cannot be said: for a
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) nobody answers, or COMMIT goes on; another server has
    /// taken over; or the server has been started again, and the transaction's id, found committed, may be another one's
    /// by now.
    ///
    /// A connection lost after the closure and before COMMIT was sent is run again too.
    ///
    /// # SQL
    /// One round trip more, before COMMIT, for the transaction's id. It has one then, even if it has only read. The
    /// role needs no more than PostgreSQL gives to all: `pg_current_xact_id`, `pg_current_wal_insert_lsn`,
    /// `pg_control_system` and their like. Without EXECUTE on `pg_control_system()` it is not known whether a server that has
    /// been started since is still the same one: then the error is `CommitUnknown`.
    pub fn resolve_commit(mut self) -> Self {
        self.resolve_commit.get_or_insert_default();
        self
    }

    /// As [`resolve_commit`](Self::resolve_commit), and asks for so long instead. A failover can take longer than
    /// that: give it the time that yours takes.
    pub fn resolve_commit_within(mut self, time: Duration) -> Self {
        self.resolve_commit = Some(Resolve(Some(time)));
        self
    }

    /// Runs every attempt under a transaction-level advisory lock of this group: a shared one, with which all of the group
    /// go on side by side; and an exclusive one after the transaction has been a deadlock's victim twice, with which it
    /// runs alone in its group, so that it cannot lose for ever.
    ///
    /// While one of them waits to be alone, until those that run have ended, no other begins. What makes a victim is the
    /// server's word: deadlocks that [`lock_timeout`](Self::lock_timeout) ends before the server has found them do not
    /// count. A transaction of the group must not wait for another one of it that it has begun itself.
    ///
    /// # SQL
    /// The lock is in the BEGIN message, without a round trip more while nobody of the group runs alone. It is waited for
    /// as long as the keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait), after which the error is
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout), and that is not retried. Under REPEATABLE READ and SERIALIZABLE
    /// the exclusive lock comes before the transaction's snapshot, which costs some round trips more; through a pooler that
    /// cannot be done, so there one that runs alone can still fail because of what was committed while it waited. A
    /// standby refuses it, as all advisory locks.
    pub fn conflict_group(mut self, key: impl Into<LockKey>) -> Self {
        self.conflict_group = Some(key.into());
        self
    }

    pub(crate) fn group(&self) -> Option<&LockKey> {
        self.conflict_group.as_ref()
    }

    pub(crate) fn resolve(&self) -> Option<Resolve> {
        self.resolve_commit
    }

    pub(crate) fn retries(&self) -> &P {
        &self.retry_if
    }

    pub(crate) fn begin(&self, application_name: Option<Arc<str>>) -> sql::Begin {
        sql::Begin {
            application_name,
            ..self.begin.clone()
        }
    }

    pub(crate) fn max_attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) fn total_deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Refuses what no server could do.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.attempts == 0 {
            return Err(Error::config(
                "attempts is 0; the first run counts, so at least 1",
            ));
        }
        for (name, value) in [
            ("lock_timeout", self.begin.lock_timeout),
            ("statement_timeout", self.begin.statement_timeout),
            (
                "idle_timeout",
                self.begin.idle_in_transaction_session_timeout,
            ),
        ] {
            if value.is_some_and(|value| value.is_zero()) {
                return Err(Error::config(format!(
                    "{name} is 0, which PostgreSQL takes to mean no limit; at least 1 ms, or leave it unset"
                )));
            }
        }
        Ok(())
    }
}

impl<P> fmt::Debug for TransactionOptions<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionOptions")
            .field("begin", &self.begin)
            .field("attempts", &self.attempts)
            .field("deadline", &self.deadline)
            .field("resolve_commit", &self.resolve_commit)
            .field("conflict_group", &self.conflict_group)
            .finish_non_exhaustive()
    }
}
