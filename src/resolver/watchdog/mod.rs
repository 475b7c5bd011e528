//! A background task that reports problems with locks, and clears them only if the policy allows it.

mod finding;
mod policy;

pub use finding::{Finding, FindingKind};
pub use policy::WatchdogPolicy;

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::signal::SignalOutcome;
use super::{Monitor, check_protection};
use crate::connection;
use crate::connection::task::{self, Task};
use crate::deadline::Deadline;
use crate::error::Error;
use crate::resolver::sql::signal::{Exclusions, Signal};
use finding::FindingId;
use policy::FindingCallback;

/// The maximum number of findings that are queued for a slow callback; more are dropped.
const QUEUE: usize = 64;
/// How long the findings of one sample may take to be queued.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a stop waits for the callback to receive the queued findings.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// A background task that finds leaked advisory locks, idle sessions that block others, and lock waits that will never
/// end: [`Monitor::watchdog`], [`Keeper::watchdog`](crate::Keeper::watchdog). It only reports them unless the policy
/// allows it to act.
///
/// It ends with this handle: at once when the handle is dropped, and in an orderly way by [`stop`](Self::stop). After a
/// sample that fails, for example because the server restarts, the next one is taken as usual.
///
/// # What is cleared, if allowed
///
/// | finding | how | checked again in the same statement |
/// |---|---|---|
/// | leaked advisory lock | the session is terminated | that it is the same session, outside of a transaction, idle since the same moment |
/// | idle blocker | the session is terminated | that it is the same session and transaction, idle since the same moment |
/// | zombie waiter | its statement is cancelled | that it is the same session and transaction, and runs a statement |
///
/// Sessions that a [`Resolver`](crate::Resolver) leaves alone are left alone here too; the finding says so.
#[must_use = "the watchdog ends when its handle is dropped"]
#[derive(Debug)]
pub struct Watchdog {
    sampling: Task,
    reporting: Option<Task>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    samples: AtomicU64,
    failures: AtomicU64,
}

impl Monitor {
    /// Starts a watchdog.
    ///
    /// # SQL
    /// As [`leaks`](Self::leaks) and [`snapshot`](Self::snapshot) at each interval, as far as the policy requires them.
    /// To clear a finding, one message over `pg_stat_activity`, `pg_roles` and the progress views, and that of
    /// [`terminate`](Self::terminate) or [`cancel`](Self::cancel).
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for an invalid policy, and outside of a Tokio runtime.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// use lockkeeper::WatchdogPolicy;
    ///
    /// let policy = WatchdogPolicy::new().on_finding(|finding| eprintln!("{finding}"));
    /// let watchdog = keeper.monitor().watchdog(policy)?;
    /// // … for as long as the application runs …
    /// watchdog.stop().await;
    /// # Ok(())
    /// # }
    /// ```
    pub fn watchdog(&self, policy: WatchdogPolicy) -> Result<Watchdog, Error> {
        policy.check()?;
        let (sender, reporting) = match policy.callback.clone() {
            Some(callback) => {
                let (sender, queue) = mpsc::channel(QUEUE);
                // This task ends when the sampling task, which owns the sender, has ended.
                let reporting = Task::start(|_| run_callback(queue, callback))?;
                (Some(sender), Some(reporting))
            }
            None => (None, None),
        };
        let counts = Arc::new(Counts::default());
        let task = WatchdogTask {
            monitor: self.clone(),
            policy,
            sender,
            reported: HashMap::new(),
            counts: Arc::clone(&counts),
        };
        Ok(Watchdog {
            sampling: Task::start(|stop| task.run(stop))?,
            reporting,
            counts,
        })
    }
}

impl Watchdog {
    /// Ends the watchdog. A sample in progress is aborted, a signal in progress is completed, and the findings so far
    /// are passed to the callback, for at most 10 seconds. The task has ended when this returns.
    ///
    /// # Longest silence
    /// As [`Monitor::cancel`], for a signal that is under way, beside the 10 seconds for the callback.
    ///
    /// # Cancel safety
    /// May be dropped at any point; the watchdog ends nevertheless.
    pub async fn stop(mut self) {
        self.sampling.stop().await;
        if let Some(reporting) = &mut self.reporting {
            let reported = tokio::time::timeout(FLUSH_TIMEOUT, reporting.stop()).await;
            if reported.is_err() {
                tracing::warn!(target: "lockkeeper::watchdog", "on_finding is too slow, findings are dropped");
            }
        }
    }

    /// Whether it is running: until the runtime that it was started in ends.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.sampling.is_running()
    }

    /// How many samples it has completed.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.counts.samples.load(Ordering::Relaxed)
    }

    /// How many samples have failed.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.counts.failures.load(Ordering::Relaxed)
    }
}

/// The task that samples the server and clears findings.
struct WatchdogTask {
    monitor: Monitor,
    policy: WatchdogPolicy,
    sender: Option<mpsc::Sender<Finding>>,
    /// The reported findings that persist, and the outcome of clearing them.
    reported: HashMap<FindingId, Option<SignalOutcome>>,
    counts: Arc<Counts>,
}

impl WatchdogTask {
    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut failing = false;
        loop {
            let found = tokio::select! {
                // Cancel safety: a sample changes nothing, and may be dropped at any point.
                _ = stop.wait_for(|stop| *stop) => return,
                found = self.find() => found,
            };
            // Not cancelled by a stop: a session that was signalled has to be reported.
            let result = match found {
                Ok(found) => self.handle(found, &mut stop).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => {
                    self.counts.samples.fetch_add(1, Ordering::Relaxed);
                    failing = false;
                }
                Err(error) => {
                    self.counts.failures.fetch_add(1, Ordering::Relaxed);
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(target: "lockkeeper::watchdog", %error, "cannot look, and goes on trying");
                    }
                }
            }
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(self.policy.interval) => {}
            }
        }
    }

    async fn find(&self) -> Result<Vec<Finding>, Error> {
        let mut found = Vec::new();
        if let Some(age) = self.policy.leaks.age {
            let leaks = self.monitor.leaks(age).await?;
            found.extend(finding::leaked_locks(&self.policy, leaks));
        }
        if self.policy.idle.age.is_some() || self.policy.zombies.age.is_some() {
            let snapshot = self.monitor.snapshot().await?;
            let own = connection::is_own_backend;
            found.extend(finding::blockers_and_zombies(&self.policy, &snapshot, own));
        }
        Ok(found)
    }

    /// Clears the findings that the policy says to clear, and reports each as soon as that is done. After a stop is
    /// requested it clears no more. A finding that cannot be cleared does not prevent the others from being cleared.
    async fn handle(
        &mut self,
        found: Vec<Finding>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let deadline = Deadline::after(REPORT_TIMEOUT);
        let mut failed = None;
        let mut reported = HashMap::new();
        for mut finding in found {
            if self.should_clear(finding.kind()) && !*stop.borrow() {
                match self.clear(&finding, stop).await {
                    Ok(outcome) => finding.cleared = outcome,
                    Err(error) => failed = Some(error),
                }
            }
            let before = self.reported.remove(&finding.id());
            reported.insert(finding.id(), finding.cleared.clone());
            if before.is_none_or(|outcome| outcome != finding.cleared) {
                self.report(finding, &deadline).await;
            }
        }
        // Findings that no longer hold are forgotten.
        self.reported = reported;
        failed.map_or(Ok(()), Err)
    }

    fn should_clear(&self, kind: FindingKind) -> bool {
        match kind {
            FindingKind::LeakedLock => self.policy.leaks.clear,
            FindingKind::IdleBlocker => self.policy.idle.clear,
            FindingKind::ZombieWaiter => self.policy.zombies.clear,
        }
    }

    /// `None` if a stop was requested before it had signalled.
    async fn clear(
        &self,
        finding: &Finding,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Option<SignalOutcome>, Error> {
        let backend = finding.backend();
        let protection = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(None),
            protection = check_protection(&self.monitor, &self.policy.protection_policy, backend) => protection?,
        };
        if let Some(protection) = protection {
            return Ok(Some(SignalOutcome::Protected(protection)));
        }
        let signal = match finding.kind() {
            FindingKind::LeakedLock | FindingKind::IdleBlocker => Signal::Terminate,
            FindingKind::ZombieWaiter => Signal::Cancel,
        };
        let exclusions = Exclusions {
            superusers: true,
            builds: true,
            ..Exclusions::default()
        };
        let outcome = self.monitor.signal(signal, backend, exclusions).await?;
        Ok(Some(outcome))
    }

    async fn report(&self, finding: Finding, deadline: &Deadline) {
        tracing::warn!(
            target: "lockkeeper::watchdog",
            kind = ?finding.kind(),
            pid = finding.backend().pid(),
            blocks = finding.blocks(),
            outcome = finding.cleared().map(tracing::field::display),
            "watchdog: {finding}"
        );
        let Some(sender) = &self.sender else {
            return;
        };
        let reported = deadline.bound(Duration::ZERO, sender.send(finding)).await;
        if reported.is_none_or(|reported| reported.is_err()) {
            tracing::warn!(target: "lockkeeper::watchdog", "on_finding is too slow, a finding is dropped");
        }
    }
}

impl fmt::Debug for WatchdogTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchdogTask").finish_non_exhaustive()
    }
}

/// Calls the callback with one finding after another, on a thread on which blocking is permitted.
async fn run_callback(mut queue: mpsc::Receiver<Finding>, callback: FindingCallback) {
    while let Some(finding) = queue.recv().await {
        let callback = Arc::clone(&callback);
        let called =
            task::blocking(move || catch_unwind(AssertUnwindSafe(|| callback(&finding))).is_ok());
        if !called.await.unwrap_or(false) {
            tracing::error!(target: "lockkeeper::watchdog", "on_finding panicked; later findings are handed to it all the same");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use deadpool_postgres::{Manager, Pool};

    use super::*;
    use crate::monitor::testing::{backend, edge, snapshot};

    #[tokio::test]
    async fn more_findings_of_one_sample_than_the_queue_holds_reach_a_quick_callback() {
        let manager = Manager::new(tokio_postgres::Config::new(), tokio_postgres::NoTls);
        let pool = Pool::builder(manager).build().expect("nothing is opened");
        let policy = WatchdogPolicy::new();
        let backends = (1..=200).map(|pid| {
            let mut idle = backend(pid);
            idle.state = Some("idle in transaction".into());
            idle.state_age = Some(Duration::from_secs(3600));
            idle
        });
        let edges = (1..=200).map(|pid| edge(pid + 1000, pid, Duration::ZERO));
        let seen = snapshot(backends.collect(), edges.collect());
        let found = finding::blockers_and_zombies(&policy, &seen, |_| false);
        assert_eq!(found.len(), 200);

        let reported = Arc::new(Mutex::new(0));
        let count = Arc::clone(&reported);
        let callback: FindingCallback =
            Arc::new(move |_| *count.lock().expect("nobody panics") += 1);
        let (sender, queue) = mpsc::channel(QUEUE);
        let reporting = tokio::spawn(run_callback(queue, callback));
        let mut task = WatchdogTask {
            monitor: Monitor::new(connection::Connections::new(
                pool,
                None,
                None,
                connection::LONGEST_SILENCE,
                connection::HeartbeatOptions::DEFAULT,
            )),
            policy,
            sender: Some(sender),
            reported: HashMap::new(),
            counts: Arc::default(),
        };
        let (_stop, mut stopped) = watch::channel(false);
        task.handle(found, &mut stopped)
            .await
            .expect("nothing is asked");
        drop(task);
        reporting.await.expect("no panic");
        assert_eq!(*reported.lock().expect("nobody panics"), 200);
    }
}
