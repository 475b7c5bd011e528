//! How long a change may wait, how often, and who is told.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::report::ChangeAttempt;
use crate::backoff::Backoff;
use crate::deadline::Deadline;
use crate::error::Error;

/// How long each attempt waits for its locks where nothing says otherwise: what a reader that comes behind it waits too.
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);
/// How long attempts go on.
const DEADLINE: Duration = Duration::from_secs(300);
/// A pause is at least so many times the timeout, so that those who queued behind an attempt are through long before the
/// next, and the table is blocked for less than a tenth of the time.
const PAUSE: u32 = 10;
/// The longest that jitter adds to a pause.
const MOST_JITTER: Duration = Duration::from_secs(10);

pub(super) type OnAttempt = Arc<dyn Fn(&ChangeAttempt) + Send + Sync>;

#[derive(Clone)]
pub(super) struct Pace {
    pub(super) lock_timeout: Duration,
    /// `None` where nothing was said.
    pub(super) deadline: Option<Duration>,
    pub(super) statement_timeout: Option<Duration>,
    pub(super) on_attempt: Option<OnAttempt>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            lock_timeout: LOCK_TIMEOUT,
            deadline: None,
            statement_timeout: None,
            on_attempt: None,
        }
    }
}

impl Pace {
    pub(super) fn deadline(&self) -> Deadline {
        Deadline::after(self.deadline.unwrap_or(DEADLINE))
    }

    /// The same pace with another deadline where none was said.
    pub(super) fn or_deadline(&self, deadline: Duration) -> Self {
        Self {
            deadline: Some(self.deadline.unwrap_or(deadline)),
            ..self.clone()
        }
    }

    /// The same pace with what is left of a deadline.
    pub(super) fn until(&self, deadline: &Deadline) -> Self {
        Self {
            deadline: Some(deadline.remaining()),
            ..self.clone()
        }
    }

    /// Refuses what would wait for ever or not at all.
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

    /// The pause after attempt number `attempt`, counted from 1.
    pub(super) fn pause(&self, attempt: u32, random: u64) -> Duration {
        let least = self.lock_timeout.saturating_mul(PAUSE);
        let jitter = Backoff::new(least, MOST_JITTER.max(least));
        least.saturating_add(jitter.delay(attempt.saturating_sub(1), random))
    }

    pub(super) fn tell(&self, attempt: &ChangeAttempt) {
        if let Some(on_attempt) = &self.on_attempt {
            on_attempt(attempt);
        }
    }
}

impl fmt::Debug for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace")
            .field("lock_timeout", &self.lock_timeout)
            .field("deadline", &self.deadline)
            .field("statement_timeout", &self.statement_timeout)
            .finish_non_exhaustive()
    }
}

/// The knobs that all changes share, on a type with a field `pace`.
macro_rules! paced {
    ($type:ty) => {
        /// How long it may wait for locks.
        impl $type {
            /// How long one attempt may wait for its locks, which is how long readers and writers can be kept waiting
            /// behind it; 100 ms by default, rounded up to whole milliseconds. Zero, which PostgreSQL takes to mean
            /// no limit, is refused.
            pub fn lock_timeout(mut self, timeout: std::time::Duration) -> Self {
                self.pace.lock_timeout = timeout;
                self
            }

            /// No attempt begins later than this after the first, and no pause goes beyond it; 5 minutes by default, an
            /// hour for what builds an index.
            pub fn deadline(mut self, deadline: std::time::Duration) -> Self {
                self.pace.deadline = Some(deadline);
                self
            }

            /// How long one statement may take, once it has its locks too; as the server and the role have it where this
            /// is not said, and without limit for what runs outside of a transaction.
            pub fn statement_timeout(mut self, timeout: std::time::Duration) -> Self {
                self.pace.statement_timeout = Some(timeout);
                self
            }

            /// Is told of each attempt as it ends, who was in the way of it and how long the pause is. It must not
            /// block.
            pub fn on_attempt(
                mut self,
                f: impl Fn(&crate::schema::ChangeAttempt) + Send + Sync + 'static,
            ) -> Self {
                self.pace.on_attempt = Some(std::sync::Arc::new(f));
                self
            }
        }
    };
}

pub(super) use paced;

/// `.await` for a type with `async fn run(self)`.
macro_rules! awaited {
    ($type:ty => $output:ty) => {
        /// As `run`.
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

pub(super) use awaited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_ten_timeouts_at_least_and_jitter_more() {
        let pace = Pace::default();
        assert_eq!(pace.pause(1, 0), Duration::from_secs(1));
        assert!(pace.pause(1, u64::MAX) < Duration::from_secs(2));
        assert!(pace.pause(1, u64::MAX) > Duration::from_millis(1900));
        assert!(pace.pause(3, u64::MAX) > Duration::from_millis(4900));
        assert!(pace.pause(u32::MAX, u64::MAX) < Duration::from_secs(11));
        let long = Pace {
            lock_timeout: Duration::from_secs(5),
            ..Pace::default()
        };
        assert!(long.pause(9, 1 << 63) >= Duration::from_secs(75));
    }

    #[test]
    fn zero_is_refused() {
        let pace = Pace {
            lock_timeout: Duration::ZERO,
            ..Pace::default()
        };
        assert!(pace.check().is_err());
        assert!(Pace::default().check().is_ok());
    }
}
