//! Tasks of the monitor, and calls of an application's code that must not hold them up.

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};

use crate::error::Error;

/// A task that is asked to stop, and ends with its handle.
#[derive(Debug)]
pub(super) struct Task {
    stop: watch::Sender<bool>,
    running: Option<JoinHandle<()>>,
}

impl Task {
    /// Runs what is made of a signal to stop.
    pub(super) fn start<F>(work: impl FnOnce(watch::Receiver<bool>) -> F) -> Result<Self, Error>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = Handle::try_current()
            .map_err(|error| Error::config("called outside a tokio runtime").with_source(error))?;
        let (stop, stopped) = watch::channel(false);
        Ok(Self {
            stop,
            running: Some(runtime.spawn(work(stopped))),
        })
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
            .as_ref()
            .is_some_and(|task| !task.is_finished())
    }

    /// Asks it to stop and waits until it has.
    pub(super) async fn stop(&mut self) {
        self.stop.send_replace(true);
        if let Some(running) = self.running.as_mut() {
            // Cancel safety: it stays in its place until it has ended, so that Drop still ends it.
            if let Err(error) = running.await
                && error.is_panic()
            {
                tracing::error!("a task of the monitor panicked");
            }
            self.running = None;
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

/// Has something run on that ends by itself.
///
/// # Panics
/// Outside of a runtime: it is for what runs in one.
pub(super) fn run_on(work: impl Future<Output = ()> + Send + 'static) {
    drop(tokio::spawn(work));
}

/// Runs an application's code on a thread where blocking does no harm.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    tokio::task::spawn_blocking(work).await
}
