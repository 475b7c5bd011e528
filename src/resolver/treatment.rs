//! What has been tried with one root blocker, and what is next: pure.

use std::time::Duration;

use super::plan::Step;
use super::policy::ResolverPolicy;
use crate::resolver::sql::signal::Signal;

/// After so many signals that met no statement, a cancel is taken for no help: the session is too quick for it.
const MISSES: u32 = 10;

/// What has been done about one root blocker so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Treatment {
    pub(super) waited: bool,
    pub(super) cancelled: bool,
    pub(super) terminated: bool,
    misses: u32,
}

impl Treatment {
    /// How long it is to be left alone yet; `None` when the next step is due.
    pub(super) fn left_to_wait(
        self,
        steps: &[Step],
        since: Duration,
        policy: &ResolverPolicy,
    ) -> Option<Duration> {
        if self.terminated {
            return None;
        }
        let left = if steps.contains(&Step::Cancel) {
            // It works: from when it was first dealt with, and only before the first signal.
            if self.cancelled {
                Duration::ZERO
            } else {
                policy.wait.saturating_sub(since)
            }
        } else {
            // It is idle: that has a grace of its own, whatever was done to it when it was not.
            let waits = steps.iter().filter_map(|step| match step {
                Step::Wait(left) => Some(*left),
                _ => None,
            });
            waits.max().unwrap_or_default()
        };
        (!left.is_zero()).then_some(left)
    }

    /// The next of the steps that has not been tried.
    pub(super) fn next_signal(self, steps: &[Step]) -> Option<Signal> {
        steps.iter().find_map(|step| match step {
            Step::Cancel if !self.cancelled => Some(Signal::Cancel),
            Step::Terminate if !self.terminated => Some(Signal::Terminate),
            _ => None,
        })
    }

    /// A signal has met no statement, or another state than was seen.
    pub(super) fn missed(&mut self, signal: Signal) {
        self.misses += 1;
        self.cancelled |= signal == Signal::Cancel && self.is_quick();
    }

    /// Whether it goes from one statement to the next too quickly to be met in one.
    pub(super) fn is_quick(self) -> bool {
        self.misses >= MISSES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_step_only_after_the_one_before() {
        let policy = ResolverPolicy::new().wait(30 * SECOND);
        let active = [Step::Wait(30 * SECOND), Step::Cancel, Step::Terminate];
        let mut course = Treatment::default();
        assert_eq!(
            course.left_to_wait(&active, 12 * SECOND, &policy),
            Some(18 * SECOND)
        );
        assert_eq!(course.left_to_wait(&active, 30 * SECOND, &policy), None);
        assert_eq!(course.next_signal(&active), Some(Signal::Cancel));
        course.cancelled = true;
        assert_eq!(course.next_signal(&active), Some(Signal::Terminate));
        course.terminated = true;
        assert_eq!(course.next_signal(&active), None);
    }

    #[test]
    fn one_that_was_cancelled_and_idles_now_has_its_grace() {
        let policy = ResolverPolicy::new();
        let idle = [Step::Wait(40 * SECOND), Step::Terminate];
        let course = Treatment {
            cancelled: true,
            ..Treatment::default()
        };
        assert_eq!(
            course.left_to_wait(&idle, 999 * SECOND, &policy),
            Some(40 * SECOND)
        );
    }

    #[test]
    fn who_is_too_quick_to_be_cancelled_is_not_missed_for_ever() {
        let active = [Step::Wait(SECOND), Step::Cancel, Step::Terminate];
        let mut course = Treatment::default();
        for _ in 0..MISSES {
            assert_eq!(course.next_signal(&active), Some(Signal::Cancel));
            assert!(!course.is_quick());
            course.missed(Signal::Cancel);
        }
        assert!(course.is_quick());
        assert_eq!(course.next_signal(&active), Some(Signal::Terminate));
        // What was idle and has gone on counts too, and is no cancel.
        let mut idle = Treatment::default();
        for _ in 0..MISSES {
            idle.missed(Signal::Terminate);
        }
        assert_eq!(idle.next_signal(&active), Some(Signal::Cancel));
    }

    #[test]
    fn who_is_only_cancelled_is_not_terminated() {
        let steps = [Step::Wait(SECOND), Step::Cancel];
        let course = Treatment {
            cancelled: true,
            ..Treatment::default()
        };
        assert_eq!(course.next_signal(&steps), None);
    }
}
