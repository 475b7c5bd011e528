//! Tasks that outlive a call, and calls of an application's code that must not hold them up.

use tokio::runtime::Handle;
#[cfg(feature = "resolver")]
use tokio::sync::watch;
#[cfg(feature = "incidents")]
use tokio::task::JoinError;
#[cfg(feature = "resolver")]
use tokio::task::JoinHandle;

#[cfg(feature = "resolver")]
use crate::error::Error;

/// A task that is asked to stop, and ends with its handle.
#[cfg(feature = "resolver")]
#[derive(Debug)]
pub(crate) struct Task {
    stop: watch::Sender<bool>,
    running: Option<JoinHandle<()>>,
}

#[cfg(feature = "resolver")]
impl Task {
    /// Runs what is made of a signal to stop.
    pub(crate) fn start<F>(work: impl FnOnce(watch::Receiver<bool>) -> F) -> Result<Self, Error>
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

    pub(crate) fn is_running(&self) -> bool {
        self.running
            .as_ref()
            .is_some_and(|task| !task.is_finished())
    }

    /// Asks it to stop and waits until it has.
    pub(crate) async fn stop(&mut self) {
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

#[cfg(feature = "resolver")]
impl Drop for Task {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

/// Spawns what ends by itself; gives false, and drops it, outside of a runtime.
#[must_use = "tells whether it runs"]
pub(crate) fn run_in_background(work: impl Future<Output = ()> + Send + 'static) -> bool {
    let Ok(runtime) = Handle::try_current() else {
        return false;
    };
    drop(runtime.spawn(work));
    true
}

/// Runs an application's code on a thread where blocking does no harm.
#[cfg(feature = "incidents")]
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    tokio::task::spawn_blocking(work).await
}
