//! A bound on how long an answer may take, that costs nothing while answers come.
//!
//! A timer of the runtime that is set for each message wakes the runtime's driver thread each time, which costs more
//! than the message. These bounds are for servers that have fallen silent, so they need not be exact: one task looks
//! at all of them a few times a second, and ends when there have been none for a while.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

/// How late a bound may be.
const TICK: Duration = Duration::from_millis(200);
/// After so many ticks without anything to bound, the task ends.
const IDLE_TICKS: u32 = 25;

/// The bounds of one pool's messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Patience {
    waits: Arc<Mutex<Waits>>,
}

#[derive(Debug, Default)]
struct Waits {
    ticking: bool,
    next: u64,
    /// Whether anything was bounded since the last tick.
    used: bool,
    pending: HashMap<u64, (Instant, Waker)>,
}

impl Patience {
    /// What `future` gives, or `None` where it takes more than `most`, and up to a fifth of a second longer.
    ///
    /// Cancel safety: as the future's own.
    pub(crate) fn bound<F: Future + Unpin>(
        &self,
        runtime: &Handle,
        most: Duration,
        future: F,
    ) -> Bounded<F> {
        Bounded {
            future,
            patience: self.clone(),
            runtime: runtime.clone(),
            // A bound too far away for the clock is none.
            end: Instant::now().checked_add(most),
            entry: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, runtime: &Handle) {
        let ticking = Ticking(self.clone());
        drop(runtime.spawn(async move {
            let mut idle = 0;
            while idle < IDLE_TICKS {
                tokio::time::sleep(TICK).await;
                idle = if ticking.tick() { 0 } else { idle + 1 };
            }
        }));
    }
}

/// A future with a bound.
#[must_use = "futures do nothing unless they are awaited"]
pub(crate) struct Bounded<F> {
    future: F,
    patience: Patience,
    runtime: Handle,
    end: Option<Instant>,
    entry: Option<u64>,
}

impl<F: Future + Unpin> Future for Bounded<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Poll::Ready(output) = Pin::new(&mut this.future).poll(cx) {
            return Poll::Ready(Some(output));
        }
        let Some(end) = this.end else {
            return Poll::Pending;
        };
        if this.entry.is_some() && Instant::now() >= end {
            return Poll::Ready(None);
        }
        let start = {
            let mut waits = this.patience.lock();
            let entry = *this.entry.get_or_insert_with(|| {
                waits.next += 1;
                waits.next
            });
            waits.used = true;
            match waits.pending.get_mut(&entry) {
                Some((_, waker)) => waker.clone_from(cx.waker()),
                None => drop(waits.pending.insert(entry, (end, cx.waker().clone()))),
            }
            !std::mem::replace(&mut waits.ticking, true)
        };
        if start {
            this.patience.start(&this.runtime);
        }
        Poll::Pending
    }
}

impl<F> Drop for Bounded<F> {
    fn drop(&mut self) {
        if let Some(entry) = self.entry {
            drop(self.patience.lock().pending.remove(&entry));
        }
    }
}

/// The task that looks, as long as it runs.
struct Ticking(Patience);

impl Ticking {
    /// Wakes those whose bound has passed. Whether there was anything to look at.
    fn tick(&self) -> bool {
        let now = Instant::now();
        let mut late = Vec::new();
        let used = {
            let mut waits = self.0.lock();
            waits.pending.retain(|_, (end, waker)| {
                let passed = *end <= now;
                if passed {
                    late.push(waker.clone());
                }
                !passed
            });
            std::mem::take(&mut waits.used) || !waits.pending.is_empty()
        };
        late.into_iter().for_each(Waker::wake);
        used
    }
}

/// Also where the runtime of the task has ended: those of other runtimes are woken, and one of them starts it anew.
impl Drop for Ticking {
    fn drop(&mut self) {
        let pending = {
            let mut waits = self.0.lock();
            waits.ticking = false;
            std::mem::take(&mut waits.pending)
        };
        for (_, waker) in pending.into_values() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_silent_future_is_given_up_and_a_late_one_is_not() {
        let patience = Patience::default();
        let runtime = Handle::current();
        let silent = Box::pin(std::future::pending::<()>());
        let bounded = patience.bound(&runtime, Duration::ZERO, silent);
        assert_eq!(bounded.await, None);
        let late = Box::pin(tokio::time::sleep(TICK * 2));
        let bounded = patience.bound(&runtime, Duration::MAX, late);
        assert_eq!(bounded.await, Some(()));
        assert!(patience.lock().pending.is_empty());
    }

    #[test]
    fn the_end_of_one_runtime_does_not_stop_the_bounds_of_another() {
        let patience = Patience::default();
        let runtime = || {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .expect("a runtime")
        };
        let first = runtime();
        let silent = || Box::pin(std::future::pending::<()>());
        let mut bounded = patience.bound(first.handle(), Duration::MAX, silent());
        assert!(super::super::exchange::poll_once(Pin::new(&mut bounded)).is_none());
        let second = runtime();
        let waiting =
            second.spawn(patience.bound(second.handle(), Duration::from_millis(400), silent()));
        drop(first);
        let given_up =
            second.block_on(async { tokio::time::timeout(Duration::from_secs(20), waiting).await });
        assert!(matches!(given_up, Ok(Ok(None))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_ends_when_there_is_nothing_to_bound() {
        let patience = Patience::default();
        let late = Box::pin(tokio::time::sleep(TICK / 2));
        let bounded = patience.bound(&Handle::current(), TICK, late);
        assert_eq!(bounded.await, Some(()));
        assert!(patience.lock().ticking);
        tokio::time::sleep(TICK * (IDLE_TICKS + 2)).await;
        assert!(!patience.lock().ticking);
    }
}
