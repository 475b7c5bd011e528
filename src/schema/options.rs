//! The options that all schema changes share: timeouts, deadline, pauses, a callback.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::report::ChangeAttempt;
use crate::backoff::{Backoff, Retry};
use crate::deadline::Deadline;
use crate::error::Error;

/// The default wait of each attempt for its locks. A reader that queues behind an attempt waits as long.
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);
/// The default time in which attempts are repeated.
const DEADLINE: Duration = Duration::from_secs(300);
/// The shortest pause, in multiples of the lock timeout. Sessions that queued behind an attempt finish long before the
/// next one, and the table is blocked for less than a tenth of the time.
const MIN_PAUSE_FACTOR: u32 = 10;
/// The longest time that jitter adds to a pause.
const MAX_JITTER: Duration = Duration::from_secs(10);

pub(super) type OnAttempt = Arc<dyn Fn(&ChangeAttempt) + Send + Sync>;

#[derive(Clone)]
pub(super) struct ChangeOptions {
    pub(super) lock_timeout: Duration,
    /// Whether the caller has set it.
    pub(super) has_lock_timeout: bool,
    /// `None` if the caller has not set it.
    pub(super) deadline: Option<Duration>,
    pub(super) statement_timeout: Option<Duration>,
    pub(super) on_attempt: Option<OnAttempt>,
}

impl Default for ChangeOptions {
    fn default() -> Self {
        Self {
            lock_timeout: LOCK_TIMEOUT,
            has_lock_timeout: false,
            deadline: None,
            statement_timeout: None,
            on_attempt: None,
        }
    }
}

impl ChangeOptions {
    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.deadline.unwrap_or(DEADLINE))
    }

    /// The same options, without a limit for one statement unless the caller has set one: the role's own
    /// `statement_timeout` is not meant for what takes long and blocks no other session.
    pub(super) fn unhurried(&self) -> Self {
        Self {
            statement_timeout: self.statement_timeout.or(Some(Duration::MAX)),
            ..self.clone()
        }
    }

    /// The same options, with this deadline if the caller has not set one.
    pub(super) fn or_deadline(&self, deadline: Duration) -> Self {
        Self {
            deadline: Some(self.deadline.unwrap_or(deadline)),
            ..self.clone()
        }
    }

    /// The same options, with the remaining time of a deadline.
    pub(super) fn until(&self, deadline: &Deadline) -> Self {
        Self {
            deadline: Some(deadline.remaining()),
            ..self.clone()
        }
    }

    /// Refuses timeouts of zero, which PostgreSQL takes as no limit.
    pub(super) fn check(&self) -> Result<(), Error> {
        let timeouts = [
            ("lock_timeout", Some(self.lock_timeout)),
            ("statement_timeout", self.statement_timeout),
        ];
        for (name, value) in timeouts {
            if value.is_some_and(|value| value.is_zero()) {
                return Err(Error::config(format!(
                    "{name} is 0, which PostgreSQL takes to mean no limit; at least 1 ms"
                )));
            }
        }
        Ok(())
    }

    /// The attempts of a change until the deadline.
    pub(super) fn retry(&self, deadline: Deadline, most: u32) -> Retry {
        let least = self.lock_timeout.saturating_mul(MIN_PAUSE_FACTOR);
        let backoff = Backoff::new(least, MAX_JITTER.max(least));
        Retry::new(backoff, least, most, Some(deadline))
    }

    pub(super) fn report(&self, attempt: &ChangeAttempt) {
        if let Some(on_attempt) = &self.on_attempt {
            on_attempt(attempt);
        }
    }
}

impl fmt::Debug for ChangeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangeOptions")
            .field("lock_timeout", &self.lock_timeout)
            .field("deadline", &self.deadline)
            .field("statement_timeout", &self.statement_timeout)
            .finish_non_exhaustive()
    }
}

/// The setters of the shared options, for a type with a field `options`.
macro_rules! change_options {
    ($type:ty) => {
        /// Timeouts, deadline and attempts.
        impl $type {
            /// How long one attempt may wait for its locks; 100 ms by default, rounded up to whole milliseconds.
            /// Readers and writers that queue behind the attempt can wait as long. Zero, which PostgreSQL takes to mean
            /// no limit, is refused.
            ///
            /// An autovacuum worker yields only to a session that waits for `deadlock_timeout`, one second by default.
            /// If such a worker blocks an attempt and the role may not cancel it, one later attempt waits that long and
            /// half a second more, and so do sessions that queue behind it. Setting this timeout forbids it.
            pub fn lock_timeout(mut self, timeout: std::time::Duration) -> Self {
                self.options.lock_timeout = timeout;
                self.options.has_lock_timeout = true;
                self
            }

            /// The time after the first attempt until which attempts are repeated; 5 minutes by default, an hour for
            /// changes that build an index. No attempt begins and no pause ends after it.
            pub fn deadline(mut self, deadline: std::time::Duration) -> Self {
                self.options.deadline = Some(deadline);
                self
            }

            /// How long one statement may take, including its time after it has got its locks. By default the setting
            /// of the server and the role applies. Statements that take long and block neither readers nor writers have
            /// no limit by default: statements outside of a transaction, VALIDATE CONSTRAINT, and what builds a new
            /// table.
            pub fn statement_timeout(mut self, timeout: std::time::Duration) -> Self {
                self.options.statement_timeout = Some(timeout);
                self
            }

            /// Calls `f` at the end of each attempt, with its blockers and the pause that follows. `f` must not block.
            pub fn on_attempt(
                mut self,
                f: impl Fn(&crate::schema::ChangeAttempt) + Send + Sync + 'static,
            ) -> Self {
                self.options.on_attempt = Some(std::sync::Arc::new(f));
                self
            }
        }
    };
}

pub(super) use change_options;

/// Implements `.await` for a type with `async fn run(self)`.
macro_rules! into_future {
    ($type:ty => $output:ty) => {
        /// Awaiting the value runs it, as `run` does.
        impl std::future::IntoFuture for $type {
            type Output = Result<$output, crate::error::Error>;
            type IntoFuture =
                std::pin::Pin<Box<dyn std::future::Future<Output = Self::Output> + Send>>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(self.run())
            }
        }
    };
}

pub(super) use into_future;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_at_least_ten_timeouts_plus_jitter() {
        let pause = |options: &ChangeOptions, attempts: u32, random| {
            let mut retry = options.retry(options.deadline(), u32::MAX);
            for _ in 0..attempts {
                retry.begin();
            }
            retry.pause(random)
        };
        let options = ChangeOptions::default();
        assert_eq!(pause(&options, 1, 0), Duration::from_secs(1));
        assert!(pause(&options, 1, u64::MAX) < Duration::from_secs(2));
        assert!(pause(&options, 1, u64::MAX) > Duration::from_millis(1900));
        assert!(pause(&options, 3, u64::MAX) > Duration::from_millis(4900));
        assert!(pause(&options, 200, u64::MAX) < Duration::from_secs(11));
        let long = ChangeOptions {
            lock_timeout: Duration::from_secs(5),
            ..ChangeOptions::default()
        };
        assert!(pause(&long, 9, 1 << 63) >= Duration::from_secs(75));
    }

    #[test]
    fn zero_timeouts_are_refused() {
        let options = ChangeOptions {
            lock_timeout: Duration::ZERO,
            ..ChangeOptions::default()
        };
        assert!(options.check().is_err());
        assert!(ChangeOptions::default().check().is_ok());
    }
}
