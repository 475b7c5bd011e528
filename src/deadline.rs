//! The end of a bounded wait, on a monotonic clock.

use std::time::{Duration, Instant};

/// When a wait that began at `started` has to end. A wait too long for the clock has no end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    started: Instant,
    end: Option<Instant>,
}

impl Deadline {
    pub(crate) fn after(wait: Duration) -> Self {
        let started = Instant::now();
        Self {
            started,
            end: started.checked_add(wait),
        }
    }

    /// Time since the wait began.
    pub(crate) fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    /// What is left; zero once it has passed. A wait without an end has [`Duration::MAX`] left.
    pub(crate) fn remaining(&self) -> Duration {
        match self.end {
            Some(end) => end.saturating_duration_since(Instant::now()),
            None => Duration::MAX,
        }
    }

    pub(crate) fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }

    /// Runs `future`, at most until the deadline and `grace` more.
    pub(crate) async fn bound<F: Future>(&self, grace: Duration, future: F) -> Option<F::Output> {
        match self.end.and_then(|end| end.checked_add(grace)) {
            Some(end) => tokio::time::timeout_at(end.into(), future).await.ok(),
            None => Some(future.await),
        }
    }
}

/// Whole milliseconds, rounded up, as PostgreSQL's timeouts take them: rounding down would turn 0.4 ms into `0`,
/// which means *for ever*, and more than `i32::MAX` is refused by the server.
pub(crate) fn timeout_millis(duration: Duration) -> i32 {
    let millis = duration.as_nanos().div_ceil(1_000_000);
    i32::try_from(millis).unwrap_or(i32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_round_up_and_never_mean_for_ever() {
        assert_eq!(timeout_millis(Duration::ZERO), 1);
        assert_eq!(timeout_millis(Duration::from_micros(400)), 1);
        assert_eq!(timeout_millis(Duration::from_micros(1001)), 2);
        assert_eq!(timeout_millis(Duration::from_millis(7)), 7);
        assert_eq!(timeout_millis(Duration::MAX), i32::MAX);
    }

    #[test]
    fn a_wait_too_long_for_the_clock_has_no_end() {
        let deadline = Deadline::after(Duration::MAX);
        assert!(!deadline.has_passed());
        assert_eq!(deadline.remaining(), Duration::MAX);
        assert!(Deadline::after(Duration::ZERO).has_passed());
    }
}
