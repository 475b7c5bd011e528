//! What a transaction is begun with, and how often it is tried.

use std::time::Duration;

use tokio_postgres::IsolationLevel;

use crate::error::Error;
use crate::sql;

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
#[derive(Clone, Debug)]
#[must_use = "options do nothing until a transaction is run with them"]
pub struct TransactionOptions {
    begin: sql::Begin,
    attempts: u32,
    deadline: Option<Duration>,
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
        }
    }

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

    pub(crate) fn begin(&self, application_name: Option<String>) -> sql::Begin {
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
