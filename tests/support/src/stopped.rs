//! A backend that stands still, as on a machine that swaps or a disk that hangs.

use tokio_postgres::Client;

use crate::guardian;
use crate::wait::until_true;

/// A backend that has got SIGSTOP. Dropped, this lets it go on.
#[derive(Debug)]
pub struct StoppedBackend {
    pid: u32,
}

impl StoppedBackend {
    /// Stops a backend while it waits for its client or for a lock: then it holds none of the locks that the server itself
    /// needs, and all other backends go on.
    ///
    /// # Panics
    ///
    /// When the backend does not come to wait, or cannot be signalled.
    pub async fn new(observer: &Client, pid: i32) -> StoppedBackend {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity \
                   WHERE pid = $1 AND wait_event_type IN ('Client', 'Lock'))";
        let what = format!("{pid} does not wait");
        loop {
            until_true(observer, &what, sql, &[&pid]).await;
            let stopped = StoppedBackend {
                pid: pid.try_into().expect("a process id"),
            };
            guardian::signal_pid(stopped.pid, "STOP").expect("a signal to a backend");
            // A message may have reached it before the signal did.
            let waits = observer.query_one(sql, &[&pid]).await;
            if waits.expect("an observer that is not stopped").get(0) {
                return stopped;
            }
        }
    }
}

impl Drop for StoppedBackend {
    fn drop(&mut self) {
        // An error says that it has ended.
        guardian::signal_pid(self.pid, "CONT").ok();
    }
}
