//! A bound on how long an answer may take, that costs nothing while answers come.
//!
//! A timer of the runtime that is set for each message wakes the runtime's driver thread each time, which costs more
//! than the message. These bounds are for servers that have fallen silent, so they need not be exact: one task looks
//! at all of them a few times a second, and ends when there have been none for a while.
//!
//! What is shorter than a few of its looks is bounded exactly, by a timer.
//!
//! That task has to run on threads of its runtime: a current-thread runtime stands still outside of `block_on`, and the
//! bounds of all others with it. There each bound is a timer, which wakes nobody: the thread that sets it drives it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::time::Sleep;

/// How late a bound may be.
const TICK: Duration = Duration::from_millis(200);
/// Shorter bounds are exact.
const EXACT: Duration = Duration::from_secs(1);
/// After so many ticks without anything to bound, the task ends.
const IDLE_TICKS: u32 = 25;

/// The bounds of one pool's messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct CoarseTimer {
    waits: Arc<Mutex<Waits>>,
}

#[derive(Debug, Default)]
struct Waits {
    ticking: bool,
    next: u64,
    /// Whether anything was bounded since the last tick.
    used: bool,
    pending: BTreeMap<u64, (Instant, Waker)>,
}

impl CoarseTimer {
    /// What `future` gives, or `None` where it takes more than `most`, and up to a fifth of a second longer where that is a
    /// second or more.
    ///
    /// Cancel safety: as the future's own.
    pub(crate) fn bound<F: Future + Unpin>(
        &self,
        runtime: &Handle,
        most: Duration,
        future: F,
    ) -> CoarseTimeout<F> {
        CoarseTimeout {
            future,
            timeout: self.clone(),
            runtime: runtime.clone(),
            // A bound too far away for the clock is none.
            end: Instant::now().checked_add(most),
            exact: most < EXACT,
            watch: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, runtime: &Handle) {
        let ticking = TickingTask(self.clone());
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
pub(crate) struct CoarseTimeout<F> {
    future: F,
    timeout: CoarseTimer,
    runtime: Handle,
    end: Option<Instant>,
    exact: bool,
    watch: Option<Watch>,
}

/// What tells that a bound has passed.
enum Watch {
    /// The task, by this entry.
    Task(u64),
    Timer(Pin<Box<Sleep>>),
}

impl<F: Future + Unpin> Future for CoarseTimeout<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Poll::Ready(output) = Pin::new(&mut this.future).poll(cx) {
            return Poll::Ready(Some(output));
        }
        let Some(end) = this.end else {
            return Poll::Pending;
        };
        // Not the session's own runtime, which may have ended: this one runs.
        let current = Handle::try_current().ok();
        let by_timer = |current: &Handle| {
            let driven_here = current.runtime_flavor() == RuntimeFlavor::CurrentThread;
            this.watch.is_none() && (this.exact || driven_here)
        };
        if current.as_ref().is_some_and(by_timer) {
            let timer = tokio::time::sleep_until(end.into());
            this.watch = Some(Watch::Timer(Box::pin(timer)));
        }
        let entry = match &mut this.watch {
            Some(Watch::Timer(timer)) => return timer.as_mut().poll(cx).map(|()| None),
            Some(Watch::Task(_)) if Instant::now() >= end => return Poll::Ready(None),
            Some(Watch::Task(entry)) => Some(*entry),
            None => None,
        };
        let start = {
            let mut waits = this.timeout.lock();
            let entry = entry.unwrap_or_else(|| {
                waits.next += 1;
                waits.next
            });
            this.watch = Some(Watch::Task(entry));
            waits.used = true;
            match waits.pending.get_mut(&entry) {
                Some((_, waker)) => waker.clone_from(cx.waker()),
                None => drop(waits.pending.insert(entry, (end, cx.waker().clone()))),
            }
            !std::mem::replace(&mut waits.ticking, true)
        };
        if start {
            this.timeout
                .start(current.as_ref().unwrap_or(&this.runtime));
        }
        Poll::Pending
    }
}

impl<F> Drop for CoarseTimeout<F> {
    fn drop(&mut self) {
        if let Some(Watch::Task(entry)) = self.watch {
            drop(self.timeout.lock().pending.remove(&entry));
        }
    }
}

/// The task that looks, as long as it runs.
struct TickingTask(CoarseTimer);

impl TickingTask {
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
impl Drop for TickingTask {
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

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_silent_future_is_given_up_and_a_late_one_is_not() {
        given_up_or_not().await;
    }

    #[tokio::test(start_paused = true)]
    async fn so_it_is_on_one_thread() {
        given_up_or_not().await;
    }

    async fn given_up_or_not() {
        let timeout = CoarseTimer::default();
        let runtime = Handle::current();
        let silent = Box::pin(std::future::pending::<()>());
        let bounded = timeout.bound(&runtime, Duration::ZERO, silent);
        assert_eq!(bounded.await, None);
        let late = Box::pin(tokio::time::sleep(TICK * 2));
        let bounded = timeout.bound(&runtime, Duration::MAX, late);
        assert_eq!(bounded.await, Some(()));
        assert!(timeout.lock().pending.is_empty());
    }

    #[test]
    fn the_end_of_one_runtime_does_not_stop_the_bounds_of_another() {
        let timeout = CoarseTimer::default();
        let runtime = || {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .expect("a runtime")
        };
        let first = runtime();
        let silent = || Box::pin(std::future::pending::<()>());
        let long = Duration::from_secs(3600);
        let mut bounded = timeout.bound(first.handle(), long, silent());
        assert!(super::super::request::poll_once(Pin::new(&mut bounded)).is_none());
        assert!(timeout.lock().ticking);
        let second = runtime();
        let waiting = second.spawn(timeout.bound(second.handle(), EXACT, silent()));
        drop(first);
        let given_up =
            second.block_on(async { tokio::time::timeout(Duration::from_secs(20), waiting).await });
        assert!(matches!(given_up, Ok(Ok(None))));
    }

    /// A current-thread runtime does nothing outside of `block_on`.
    #[test]
    fn an_idle_runtime_does_not_stop_the_bounds_of_another() {
        let timeout = CoarseTimer::default();
        let idle = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let silent = || Box::pin(std::future::pending::<()>());
        let long = Duration::from_secs(3600);
        let mut bounded = timeout.bound(idle.handle(), long, silent());
        let once = async { super::super::request::poll_once(Pin::new(&mut bounded)) };
        assert!(idle.block_on(once).is_none());
        let driven = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        // In a task of its own: a timeout around it would poll it once more.
        let soon = EXACT;
        let waiting = driven.spawn(timeout.bound(driven.handle(), soon, silent()));
        let given_up =
            driven.block_on(async { tokio::time::timeout(Duration::from_secs(20), waiting).await });
        assert!(matches!(given_up, Ok(Ok(None))));
    }

    /// A session can outlive the runtime that it was taken on.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_bound_does_not_spin_when_its_first_runtime_has_ended() {
        let timeout = CoarseTimer::default();
        let ended = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let handle = ended.handle().clone();
        ended.shutdown_background();
        let mut polls = 0;
        let counted = std::future::poll_fn(|_| {
            polls += 1;
            Poll::<()>::Pending
        });
        let bounded = timeout.bound(&handle, EXACT, counted);
        assert_eq!(bounded.await, None);
        assert!(polls < 10, "{polls} polls");
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_ends_when_there_is_nothing_to_bound() {
        let timeout = CoarseTimer::default();
        timeout.lock().ticking = true;
        timeout.start(&Handle::current());
        tokio::time::sleep(TICK * 2).await;
        assert!(timeout.lock().ticking);
        tokio::time::sleep(TICK * (IDLE_TICKS + 2)).await;
        assert!(!timeout.lock().ticking);
    }
}
