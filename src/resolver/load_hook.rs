//! Asks the application to reduce its load on the server, and tells it when it may resume.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::connection::task;

/// What the application is asked to do with its heavy jobs: see
/// [`ResolverPolicy::shed_load`](super::ResolverPolicy::shed_load).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LoadChange {
    /// Pause them: a run begins.
    Shed,
    /// Resume them: the incident is over.
    Resume,
    /// The run has ended, but the incident is not over. The application decides whether to resume them.
    GaveUp,
}

/// The result of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HookResult {
    Done,
    Panicked,
    /// It has not returned in time, and may return later.
    Slow,
}

type LoadCallback = Arc<dyn Fn(LoadChange) + Send + Sync>;

/// The hook for the duration of one run. If it is dropped before the run has ended, it reports that the run gave up.
pub(super) struct LoadHook {
    calls: mpsc::UnboundedSender<(LoadChange, oneshot::Sender<bool>)>,
    timeout: Duration,
    finished: bool,
}

impl LoadHook {
    pub(super) fn new(hook: LoadCallback, timeout: Duration) -> Self {
        let (calls, queue) = mpsc::unbounded_channel();
        // The task ends by itself after the last call.
        let _ = task::run_in_background(run_calls(hook, queue));
        Self {
            calls,
            timeout,
            finished: false,
        }
    }

    /// Queues a call behind the earlier ones, and waits for it to return, for as long as `timeout`.
    pub(super) async fn call(&mut self, change: LoadChange) -> HookResult {
        self.finished = change != LoadChange::Shed;
        let (answer, answered) = oneshot::channel();
        if self.calls.send((change, answer)).is_err() {
            return HookResult::Panicked;
        }
        match tokio::time::timeout(self.timeout, answered).await {
            Ok(Ok(true)) => HookResult::Done,
            Ok(_) => HookResult::Panicked,
            Err(_) => HookResult::Slow,
        }
    }
}

impl Drop for LoadHook {
    fn drop(&mut self) {
        if !self.finished {
            let (answer, _) = oneshot::channel();
            // If the task has ended, so has the runtime, and there is nothing left to call.
            drop(self.calls.send((LoadChange::GaveUp, answer)));
        }
    }
}

async fn run_calls(
    hook: LoadCallback,
    mut queue: mpsc::UnboundedReceiver<(LoadChange, oneshot::Sender<bool>)>,
) {
    while let Some((change, answer)) = queue.recv().await {
        let hook = Arc::clone(&hook);
        let called =
            task::blocking(move || catch_unwind(AssertUnwindSafe(|| hook(change))).is_ok());
        let done = called.await.unwrap_or(false);
        if !done {
            tracing::error!(?change, "shed_load panicked");
        }
        // An error means that the caller no longer waits for the result.
        answer.send(done).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn calls_come_in_order_and_panics_are_contained() {
        let (sender, receiver) = channel();
        let sender = Mutex::new(sender);
        let mut load_hook = LoadHook::new(
            Arc::new(move |change| {
                let sender = sender.lock().expect("nobody panics with it");
                sender.send(change).expect("the test listens");
                drop(sender);
                assert_ne!(change, LoadChange::Shed, "the hook fails on purpose");
            }),
            Duration::from_secs(30),
        );
        assert_eq!(load_hook.call(LoadChange::Shed).await, HookResult::Panicked);
        assert_eq!(load_hook.call(LoadChange::Resume).await, HookResult::Done);
        drop(load_hook);
        let received: Vec<_> = receiver.try_iter().collect();
        assert_eq!(received, [LoadChange::Shed, LoadChange::Resume]);
    }

    #[tokio::test]
    async fn a_slow_call_is_not_waited_for_and_a_drop_is_reported() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let (go, gate) = channel::<()>();
        let gate = Mutex::new(gate);
        let mut load_hook = LoadHook::new(
            Arc::new(move |change| {
                if change == LoadChange::Shed {
                    gate.lock().expect("nobody panics").recv().ok();
                }
                sender.send(change).ok();
            }),
            Duration::from_millis(10),
        );
        assert_eq!(load_hook.call(LoadChange::Shed).await, HookResult::Slow);
        drop(load_hook);
        go.send(()).expect("it waits");
        assert_eq!(receiver.recv().await, Some(LoadChange::Shed));
        assert_eq!(receiver.recv().await, Some(LoadChange::GaveUp));
        assert_eq!(receiver.recv().await, None);
    }
}
