//! How long to pause before the next attempt, and whether there should be one.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::deadline::Deadline;

const NANOS_PER_SEC: u128 = 1_000_000_000;

/// Exponential back-off with full jitter: before retry *n* (counted from 0) a pause drawn evenly from zero to
/// `min(cap, base · 2ⁿ)`.
///
/// Full jitter, because those who retry have just met at one lock: pauses that are alike let them meet again. See
/// <https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
}

impl Backoff {
    /// `base` bounds the first pause, `cap` every pause.
    pub(crate) const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap }
    }

    /// The pause before retry number `attempt`, counted from 0, for a `random` number drawn evenly from all of `u64`
    /// (see [`Jitter`]): `ceiling(attempt) · random / 2⁶⁴`, so never quite the ceiling.
    pub(crate) fn delay(&self, attempt: u32, random: u64) -> Duration {
        let ceiling = self.ceiling(attempt).as_nanos();
        // The product needs up to 158 bits. Invariant: `ceiling` is a `Duration`, less than 2^94 ns, so `high` is less
        // than 2^30 and neither product overflows.
        let (high, low) = (ceiling >> 64, ceiling & u128::from(u64::MAX));
        let random = u128::from(random);
        from_nanos(high * random + ((low * random) >> 64))
    }

    /// The longest pause before retry number `attempt`: `min(cap, base · 2^attempt)`, whatever the attempt.
    pub(crate) fn ceiling(&self, attempt: u32) -> Duration {
        if self.base.is_zero() {
            return Duration::ZERO;
        }
        let cap = self.cap.as_nanos();
        let doubled = 1_u128
            .checked_shl(attempt)
            .and_then(|factor| self.base.as_nanos().checked_mul(factor));
        from_nanos(doubled.map_or(cap, |nanos| nanos.min(cap)))
    }
}

/// 10 ms, then twice as much each time, up to 1 s.
impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_secs(1))
    }
}

/// The attempts of what is repeated: how long to pause before the next one, and whether there is one. Whatever this crate
/// repeats is counted here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retry {
    backoff: Backoff,
    least: Duration,
    deadline: Option<Deadline>,
    most: u32,
    attempt: u32,
}

impl Retry {
    /// At most so many attempts, none of which begins after the deadline. Each pause is `least` and the delay of `backoff`.
    pub(crate) fn new(
        backoff: Backoff,
        least: Duration,
        most: u32,
        deadline: Option<Deadline>,
    ) -> Self {
        Self {
            backoff,
            least,
            deadline,
            most,
            attempt: 0,
        }
    }

    /// Another attempt begins. Gives its number, counted from 1.
    pub(crate) fn begin(&mut self) -> u32 {
        self.attempt += 1;
        self.attempt
    }

    /// How many have begun.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempt
    }

    /// The pause after the current attempt, for a random number as [`Backoff::delay`] takes it.
    pub(crate) fn pause(&self, random: u64) -> Duration {
        let delay = self.backoff.delay(self.attempt.saturating_sub(1), random);
        self.least.saturating_add(delay)
    }

    /// What is missing for another attempt after this pause.
    pub(crate) fn is_out_of(&self, pause: Duration) -> Option<&'static str> {
        if self.attempt >= self.most {
            return Some("attempts");
        }
        let is_late = self
            .deadline
            .is_some_and(|deadline| deadline.remaining() < pause);
        is_late.then_some("time")
    }
}

/// Invariant: `nanos` is at most [`Duration::MAX`].
fn from_nanos(nanos: u128) -> Duration {
    let secs = u64::try_from(nanos / NANOS_PER_SEC).unwrap_or(u64::MAX);
    let subsec = u32::try_from(nanos % NANOS_PER_SEC).unwrap_or(0);
    Duration::new(secs, subsec)
}

/// Random numbers good enough to keep retries apart, and for nothing else: SplitMix64 (Steele, Lea, Flood: “Fast
/// splittable pseudorandom number generators”, 2014), seeded from the standard library's hash keys.
///
/// Can be shared: each caller gets its own number.
#[derive(Debug)]
pub(crate) struct Jitter {
    state: AtomicU64,
}

impl Jitter {
    /// A generator that differs from every other one, also in another process.
    pub(crate) fn new() -> Self {
        Self::from_seed(RandomState::new().hash_one(std::process::id()))
    }

    /// A generator that always gives the same numbers.
    pub(crate) const fn from_seed(seed: u64) -> Self {
        Self {
            state: AtomicU64::new(seed),
        }
    }

    /// The next number, drawn evenly from all of `u64`.
    pub(crate) fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

        let mut z = self
            .state
            .fetch_add(STEP, Ordering::Relaxed)
            .wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Default for Jitter {
    fn default() -> Self {
        Self::new()
    }
}

/// A token bucket that stops retries from multiplying the load of a database that is already in trouble.
///
/// It starts full. Each retry takes `retry_cost` tokens and is refused if there are not as many; each transaction that
/// succeeds puts `success_refund` back, never beyond `capacity`. In the long run there are so at most `success_refund /
/// retry_cost` retries for each success, after a first burst of `capacity / retry_cost`. First attempts are never
/// refused: an empty bucket turns “fail and try again” into “fail”, not into silence. The same scheme as the retry
/// quota of the AWS SDKs and the retry throttling of gRPC.
///
/// To be shared by everything that retries against one database; never blocks.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    capacity: u32,
    retry_cost: u32,
    success_refund: u32,
    tokens: AtomicU32,
}

impl RetryBudget {
    /// A full bucket. A `retry_cost` of zero means that no retry is ever refused.
    pub(crate) const fn new(capacity: u32, retry_cost: u32, success_refund: u32) -> Self {
        Self {
            capacity,
            retry_cost,
            success_refund,
            tokens: AtomicU32::new(capacity),
        }
    }

    /// Takes what one retry costs. `false`, and nothing is taken, if there is not enough: then do not retry.
    #[must_use = "a retry that was refused must not happen"]
    pub(crate) fn try_retry(&self) -> bool {
        // Relaxed: the count stands for itself and orders nothing else.
        self.tokens
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tokens| {
                tokens.checked_sub(self.retry_cost)
            })
            .is_ok()
    }

    /// Puts back what a success earns.
    pub(crate) fn succeeded(&self) {
        // A full bucket, the usual case, is only read, so that those who succeed do not contend for it.
        let full = |tokens: u32| {
            let more = tokens.saturating_add(self.success_refund);
            (tokens < self.capacity).then_some(more.min(self.capacity))
        };
        self.tokens
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, full)
            .ok();
    }

    /// The tokens left.
    #[cfg(test)]
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens.load(Ordering::Relaxed)
    }
}

/// 500 tokens, 5 for a retry, 1 back for a success: 100 retries in a row, then one for every five successes.
impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(500, 5, 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ceilings_double_up_to_the_cap() {
        let backoff = Backoff::default();
        let millis: Vec<u128> = (0..9).map(|n| backoff.ceiling(n).as_millis()).collect();
        assert_eq!(millis, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(backoff.ceiling(u32::MAX), Duration::from_secs(1));
    }

    #[test]
    fn the_delay_covers_the_whole_range() {
        let backoff = Backoff::default();
        assert_eq!(backoff.delay(0, 0), Duration::ZERO);
        assert_eq!(backoff.delay(0, 1 << 63), Duration::from_millis(5));
        assert_eq!(backoff.delay(0, u64::MAX), Duration::from_nanos(9_999_999));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let longest = Backoff::new(Duration::MAX, Duration::MAX);
        assert_eq!(longest.ceiling(u32::MAX), Duration::MAX);
        assert!(longest.delay(127, u64::MAX) < Duration::MAX);
        let none = Backoff::new(Duration::ZERO, Duration::MAX);
        assert_eq!(none.delay(u32::MAX, u64::MAX), Duration::ZERO);
        let tiny = Backoff::new(Duration::from_nanos(1), Duration::from_secs(3600));
        assert_eq!(tiny.ceiling(32), Duration::from_nanos(1 << 32));
    }

    #[test]
    fn jitter_is_splitmix64() {
        // The first numbers of the authors' reference code for the seed 1234567.
        let jitter = Jitter::from_seed(1_234_567);
        assert_eq!(jitter.next(), 6_457_827_717_110_365_317);
        assert_eq!(jitter.next(), 3_203_168_211_198_807_973);
        assert_ne!(Jitter::new().next(), Jitter::new().next());
    }

    #[test]
    fn a_budget_runs_dry_and_recovers() {
        let budget = RetryBudget::new(10, 5, 2);
        assert!(budget.try_retry() && budget.try_retry());
        assert!(!budget.try_retry());
        budget.succeeded();
        budget.succeeded();
        assert!(!budget.try_retry());
        assert_eq!(budget.tokens(), 4);
        budget.succeeded();
        assert!(budget.try_retry());
        for _ in 0..20 {
            budget.succeeded();
        }
        assert_eq!(budget.tokens(), 10);
    }

    #[test]
    fn threads_never_spend_more_than_there_is() {
        let budget = RetryBudget::new(1000, 1, 1);
        let granted: usize = std::thread::scope(|scope| {
            let spend = || (0..400).filter(|_| budget.try_retry()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(spend)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("counts only"))
                .sum()
        });
        assert_eq!(granted, 1000);
        assert_eq!(budget.tokens(), 0);
    }

    fn any_duration() -> impl Strategy<Value = Duration> {
        (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(secs, nanos)| Duration::new(secs, nanos))
    }

    proptest! {
        #[test]
        fn never_beyond_the_ceiling_nor_the_cap(
            base in any_duration(), cap in any_duration(), attempt: u32, random: u64,
        ) {
            let backoff = Backoff::new(base, cap);
            prop_assert!(backoff.ceiling(attempt) <= cap);
            prop_assert!(backoff.delay(attempt, random) <= backoff.ceiling(attempt));
            prop_assert!(backoff.ceiling(attempt) <= backoff.ceiling(attempt.saturating_add(1)));
        }

        #[test]
        fn the_ceiling_is_exact_where_it_fits(nanos in 1..1_000_000_u64, attempt in 0..40_u32) {
            let backoff = Backoff::new(Duration::from_nanos(nanos), Duration::MAX);
            prop_assert_eq!(backoff.ceiling(attempt), Duration::from_nanos(nanos << attempt));
        }

        #[test]
        fn tokens_stay_within_the_capacity(
            capacity: u32, cost: u32, refund: u32, steps in prop::collection::vec(any::<bool>(), 0..50),
        ) {
            let budget = RetryBudget::new(capacity, cost, refund);
            for success in steps {
                let before = budget.tokens();
                if success {
                    budget.succeeded();
                    prop_assert!(budget.tokens() >= before);
                } else {
                    prop_assert_eq!(budget.try_retry(), before >= cost);
                }
                prop_assert!(budget.tokens() <= capacity);
            }
        }
    }
}
