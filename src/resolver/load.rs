//! Telling the application to take load off the server, and when it may put it back.

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
    /// Resume them: it is over.
    Resume,
    /// The run has ended, and it is not over: whether to resume them is for the application to decide.
    GaveUp,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Done,
    Panicked,
    /// It has not come back in time, and may yet.
    Slow,
}

type Hook = Arc<dyn Fn(LoadChange) + Send + Sync>;

/// The hook for the length of one run. Dropped before it is over, it tells that the run has given up.
pub(super) struct Shedder {
    calls: mpsc::UnboundedSender<(LoadChange, oneshot::Sender<bool>)>,
    timeout: Duration,
    ended: bool,
}

impl Shedder {
    pub(super) fn new(hook: Hook, timeout: Duration) -> Self {
        let (calls, queue) = mpsc::unbounded_channel();
        // It ends by itself, when all was told that there is to tell.
        let _ = task::run_in_background(tell(hook, queue));
        Self {
            calls,
            timeout,
            ended: false,
        }
    }

    /// Tells, one call after another however long each takes, and waits for it to come back, but not for long.
    pub(super) async fn tell(&mut self, change: LoadChange) -> Told {
        self.ended = change != LoadChange::Shed;
        let (answer, answered) = oneshot::channel();
        if self.calls.send((change, answer)).is_err() {
            return Told::Panicked;
        }
        match tokio::time::timeout(self.timeout, answered).await {
            Ok(Ok(true)) => Told::Done,
            Ok(_) => Told::Panicked,
            Err(_) => Told::Slow,
        }
    }
}

impl Drop for Shedder {
    fn drop(&mut self) {
        if !self.ended {
            let (answer, _) = oneshot::channel();
            // Where the task has ended, so has the runtime, and nobody is there to be told.
            drop(self.calls.send((LoadChange::GaveUp, answer)));
        }
    }
}

async fn tell(hook: Hook, mut queue: mpsc::UnboundedReceiver<(LoadChange, oneshot::Sender<bool>)>) {
    while let Some((change, answer)) = queue.recv().await {
        let hook = Arc::clone(&hook);
        let called =
            task::blocking(move || catch_unwind(AssertUnwindSafe(|| hook(change))).is_ok());
        let done = called.await.unwrap_or(false);
        if !done {
            tracing::error!(?change, "shed_load panicked");
        }
        // An error says that nobody waits for it any more.
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
        let mut shedder = Shedder::new(
            Arc::new(move |change| {
                let sender = sender.lock().expect("nobody panics with it");
                sender.send(change).expect("the test listens");
                drop(sender);
                assert_ne!(change, LoadChange::Shed, "as it was told to");
            }),
            Duration::from_secs(30),
        );
        assert_eq!(shedder.tell(LoadChange::Shed).await, Told::Panicked);
        assert_eq!(shedder.tell(LoadChange::Resume).await, Told::Done);
        drop(shedder);
        let told: Vec<_> = receiver.try_iter().collect();
        assert_eq!(told, [LoadChange::Shed, LoadChange::Resume]);
    }

    #[tokio::test]
    async fn a_slow_one_is_not_waited_for_and_an_end_is_told() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let (go, gate) = channel::<()>();
        let gate = Mutex::new(gate);
        let mut shedder = Shedder::new(
            Arc::new(move |change| {
                if change == LoadChange::Shed {
                    gate.lock().expect("nobody panics").recv().ok();
                }
                sender.send(change).ok();
            }),
            Duration::from_millis(10),
        );
        assert_eq!(shedder.tell(LoadChange::Shed).await, Told::Slow);
        drop(shedder);
        go.send(()).expect("it waits");
        assert_eq!(receiver.recv().await, Some(LoadChange::Shed));
        assert_eq!(receiver.recv().await, Some(LoadChange::GaveUp));
        assert_eq!(receiver.recv().await, None);
    }
}
