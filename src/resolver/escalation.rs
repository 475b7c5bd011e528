//! What has been tried with one root blocker, and what is next. Pure logic.

use std::time::Duration;

use super::plan::Step;
use super::policy::ResolverPolicy;
use crate::resolver::sql::signal::Signal;

/// After this many signals that met no running statement, the cancel counts as tried: the session's statements are too
/// short for it.
const MAX_MISSED_SIGNALS: u32 = 10;

/// What has been done about one root blocker so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EscalationState {
    pub(super) waited: bool,
    pub(super) cancelled: bool,
    pub(super) terminated: bool,
    missed_signals: u32,
}

impl EscalationState {
    /// How much longer to leave it alone; `None` when the next step is due.
    pub(super) fn remaining_wait(
        self,
        steps: &[Step],
        elapsed: Duration,
        policy: &ResolverPolicy,
    ) -> Option<Duration> {
        if self.terminated {
            return None;
        }
        let remaining = if steps.contains(&Step::Cancel) {
            // It runs a statement: the wait counts from when it was first resolved, and applies only before the first
            // signal.
            if self.cancelled {
                Duration::ZERO
            } else {
                policy.wait.saturating_sub(elapsed)
            }
        } else {
            // It is idle, which has a grace of its own, regardless of what was done while it was not idle.
            let waits = steps.iter().filter_map(|step| match step {
                Step::Wait(remaining) => Some(*remaining),
                _ => None,
            });
            waits.max().unwrap_or_default()
        };
        (!remaining.is_zero()).then_some(remaining)
    }

    /// The next of the steps that has not been tried.
    pub(super) fn next_signal(self, steps: &[Step]) -> Option<Signal> {
        steps.iter().find_map(|step| match step {
            Step::Cancel if !self.cancelled => Some(Signal::Cancel),
            Step::Terminate if !self.terminated => Some(Signal::Terminate),
            _ => None,
        })
    }

    /// Records a signal that met no running statement, or a state other than the observed one.
    pub(super) fn record_miss(&mut self, signal: Signal) {
        self.missed_signals += 1;
        self.cancelled |= signal == Signal::Cancel && self.is_too_quick();
    }

    /// Whether its statements are too short for a signal to meet one.
    pub(super) fn is_too_quick(self) -> bool {
        self.missed_signals >= MAX_MISSED_SIGNALS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_step_follows_the_previous_one() {
        let policy = ResolverPolicy::new().wait(30 * SECOND);
        let active = [Step::Wait(30 * SECOND), Step::Cancel, Step::Terminate];
        let mut escalation = EscalationState::default();
        assert_eq!(
            escalation.remaining_wait(&active, 12 * SECOND, &policy),
            Some(18 * SECOND)
        );
        assert_eq!(
            escalation.remaining_wait(&active, 30 * SECOND, &policy),
            None
        );
        assert_eq!(escalation.next_signal(&active), Some(Signal::Cancel));
        escalation.cancelled = true;
        assert_eq!(escalation.next_signal(&active), Some(Signal::Terminate));
        escalation.terminated = true;
        assert_eq!(escalation.next_signal(&active), None);
    }

    #[test]
    fn a_cancelled_session_that_is_idle_now_has_its_grace() {
        let policy = ResolverPolicy::new();
        let idle = [Step::Wait(40 * SECOND), Step::Terminate];
        let escalation = EscalationState {
            cancelled: true,
            ..EscalationState::default()
        };
        assert_eq!(
            escalation.remaining_wait(&idle, 999 * SECOND, &policy),
            Some(40 * SECOND)
        );
    }

    #[test]
    fn after_many_missed_cancels_termination_is_next() {
        let active = [Step::Wait(SECOND), Step::Cancel, Step::Terminate];
        let mut escalation = EscalationState::default();
        for _ in 0..MAX_MISSED_SIGNALS {
            assert_eq!(escalation.next_signal(&active), Some(Signal::Cancel));
            assert!(!escalation.is_too_quick());
            escalation.record_miss(Signal::Cancel);
        }
        assert!(escalation.is_too_quick());
        assert_eq!(escalation.next_signal(&active), Some(Signal::Terminate));
        // A terminate that missed an idle session counts too, but is no cancel.
        let mut idle = EscalationState::default();
        for _ in 0..MAX_MISSED_SIGNALS {
            idle.record_miss(Signal::Terminate);
        }
        assert_eq!(idle.next_signal(&active), Some(Signal::Cancel));
    }

    #[test]
    fn a_session_that_may_only_be_cancelled_is_not_terminated() {
        let steps = [Step::Wait(SECOND), Step::Cancel];
        let escalation = EscalationState {
            cancelled: true,
            ..EscalationState::default()
        };
        assert_eq!(escalation.next_signal(&steps), None);
    }
}
