//! Looking while transactions wait, because afterwards it is too late.
//!
//! When a deadlock's error arrives, the victim's locks are gone and the survivor goes on. So one task for each keeper
//! looks at the server while any transaction's statement has been running for a while: who of them waits, and for whom;
//! once when a wait is noticed, and again shortly before the server would end it. What it has seen, what both sides have
//! said ([`StatementLog`]) and what the server's error says become an [`Incident`].

mod active_transactions;
mod deliver;
mod journal;
mod look;
mod plan;
mod sql;
mod statement_log;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::connection::{Connections, task};
use crate::error::{Failure, Report, classify_db};
use crate::incident::{Evidence, History, Incident, Kind, Outcome, ServerError};
use crate::postgres::message;
use crate::transaction::{FailedAttempt, Reporter};
pub(crate) use active_transactions::ActiveTransactions;
use deliver::Delivery;
pub(crate) use deliver::Sink;
use plan::Plan;
use statement_log::StatementLog;

/// How often to see whether there is something to look at.
const TICK: Duration = Duration::from_millis(100);
/// After so many ticks without any transaction the task goes to sleep.
const QUIET_TICKS: u32 = 10;
/// What was seen so long before an error was there is of the same time.
const SHORTLY: Duration = Duration::from_millis(100);
/// How long what was seen of a statement that has ended is kept, unless its transaction failed by it and goes on.
const KEEP: Duration = Duration::from_secs(10);

/// After how long a wait that continues is reported, by default.
const LONG_WAIT: Duration = Duration::from_secs(10);

/// How to sample, and what to report.
pub(crate) struct Settings {
    pub(crate) enabled: bool,
    /// Whether reports show the literals of statements.
    pub(crate) literals: bool,
    /// After how long a wait is reported although it goes on; `None` for never.
    pub(crate) long_wait: Option<Duration>,
    pub(crate) sink: Option<Sink>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            literals: false,
            long_wait: Some(LONG_WAIT),
            sink: None,
        }
    }
}

/// The sampler of one keeper.
pub(crate) struct Sampler {
    connections: Arc<Connections>,
    transactions: Arc<ActiveTransactions>,
    settings: Settings,
    running: AtomicBool,
    /// Of each statement, by the numbers of its flight and its own. The one that fails may be followed by others before
    /// anybody hears of it.
    plans: Mutex<HashMap<(u64, u64), Plan>>,
    /// Columns of primary keys, by the relation's oid.
    keys: Mutex<HashMap<u32, Arc<[String]>>>,
    /// When the next look at who waits for whom may be.
    rested: Mutex<Instant>,
    /// Why the last look failed, if it did.
    trouble: Mutex<Option<Arc<str>>>,
    /// How many looks have failed one after another, and until when there is none.
    failures: AtomicU32,
    paused_until: Mutex<Option<Instant>>,
    history: History,
    delivery: Delivery,
}

impl Sampler {
    pub(crate) fn new(
        connections: Arc<Connections>,
        transactions: Arc<ActiveTransactions>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            connections,
            transactions,
            delivery: Delivery::new(settings.sink.clone()),
            settings,
            running: AtomicBool::new(false),
            plans: Mutex::default(),
            keys: Mutex::default(),
            rested: Mutex::new(Instant::now()),
            trouble: Mutex::default(),
            failures: AtomicU32::new(0),
            paused_until: Mutex::default(),
            history: History::default(),
        })
    }

    /// Sees to it that the task runs, from when the first transaction is about to begin.
    pub(crate) fn start(self: &Arc<Self>) {
        if !self.settings.enabled || self.running.load(Ordering::Relaxed) {
            return;
        }
        if self.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let running = Running(Arc::downgrade(self));
        let transactions = Arc::clone(&self.transactions);
        // Without a runtime it is dropped, and is not running.
        let _ = task::run_in_background(watch(running, transactions));
    }

    /// The incident that a failed attempt was.
    fn incident(&self, failed: &FailedAttempt<'_>, log: &StatementLog) -> Incident {
        let kind = match classify_db(failed.error) {
            Failure::Deadlock => Kind::Deadlock,
            _ => Kind::LockTimeout,
        };
        let failure = log.failure();
        let now = Instant::now();
        // The closure may have done other things since.
        let ended = failure.map_or(now, |failure| failure.ended);
        let mut missing = Vec::new();
        let (looks, seen) = {
            let plans = lock(&self.plans);
            let plan = failure.and_then(|failure| plans.get(&(log.number, failure.number)));
            plan.map_or((Vec::new(), None), |plan| (plan.looks(), plan.seen()))
        };
        // What was seen shortly before is nearer to the truth: an error may be a while on its way to its task.
        let at = seen
            .map(|seen| seen.min(ended))
            .filter(|seen| ended.duration_since(*seen) < SHORTLY);
        if !self.settings.enabled {
            missing.push("watching is switched off".into());
        } else if looks.is_empty() {
            missing.push(
                lock(&self.trouble).clone().unwrap_or_else(|| {
                    "the wait was over before the first look at the server".into()
                }),
            );
        }
        let error = ServerError {
            sqlstate: failed.error.code().code().to_owned(),
            message: failed.error.message().to_owned(),
            detail: failed.error.detail().map(str::to_owned),
            context: failed.error.where_().map(str::to_owned),
            routine: failed.error.routine().map(str::to_owned),
        };
        let detail = error.detail.as_deref();
        let others = self.others(log, &looks, detail, at.unwrap_or(ended));
        let evidence = Evidence {
            kind,
            occurred: SystemTime::now()
                .checked_sub(now.saturating_duration_since(ended))
                .unwrap_or_else(SystemTime::now),
            victim: journal::of(log, ended),
            attempt: failed.attempt,
            attempts: failed.attempts,
            outcome: match failed.pause {
                Some(pause) => Outcome::retried(pause),
                None if failed.attempts == 1 => Outcome::NotRetried,
                None => Outcome::GaveUp,
            },
            error: Some(error),
            looks,
            others,
            missing,
            literals: self.settings.literals,
        };
        Incident::new(evidence, &self.history)
    }

    /// What the other participants have said, where they are transactions of this keeper: of those that were on their
    /// backends at that time.
    fn others(
        &self,
        victim: &StatementLog,
        looks: &[crate::incident::Look],
        detail: Option<&str>,
        at: Instant,
    ) -> Vec<crate::incident::Journal> {
        let mut pids: Vec<i32> = Vec::new();
        for edge in looks.iter().flat_map(|look| look.snapshot.edges()) {
            pids.extend(edge.waiter().pid());
            pids.extend(edge.blocker().pid());
        }
        if let Some(detail) = detail {
            for wait in message::deadlock_detail(detail).waits() {
                pids.extend([wait.waiter, wait.blocker]);
            }
        }
        pids.sort_unstable();
        pids.dedup();
        pids.into_iter()
            .filter(|pid| victim.pid() != Some(*pid))
            .filter_map(|pid| {
                let log = self.transactions.of_backend(pid, at)?;
                // What it said later is no part of it, its COMMIT least of all.
                Some(journal::of(&log, at))
            })
            .collect()
    }

    /// Notes why nothing is seen.
    fn trouble(&self, why: &str) {
        tracing::debug!(why, "the sampler cannot look");
        let trouble = format!("the server could not be looked at: {why}");
        *lock(&self.trouble) = Some(trouble.into());
    }

    fn publish(&self, incident: &Incident) {
        self.delivery.deliver(incident);
    }
}

impl Reporter for Sampler {
    fn failed(&self, failed: &FailedAttempt<'_>) -> Option<Box<dyn Report>> {
        let log = StatementLog::of(failed.observed)?;
        let incident = self.incident(failed, &log);
        self.publish(&incident);
        Some(Box::new(incident))
    }
}

/// So that the task, which waits for transactions, sees that there will be none.
impl Drop for Sampler {
    fn drop(&mut self) {
        self.transactions.wake();
    }
}

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler")
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

/// The task while it runs; with its runtime it ends, and the next transaction starts another.
struct Running(Weak<Sampler>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(sampler) = self.0.upgrade() {
            sampler.running.store(false, Ordering::Release);
        }
    }
}

async fn watch(running: Running, transactions: Arc<ActiveTransactions>) {
    if let Some(sampler) = running.0.upgrade() {
        // Opened before there is trouble, which may leave no connection to be had.
        if sampler.connections.has_side() {
            sampler.trouble("the side connection is still being opened");
        }
        match sampler.connections.open_side().await {
            Ok(()) => *lock(&sampler.trouble) = None,
            Err(error) => sampler.trouble(&look::chain(&error)),
        }
    }
    loop {
        transactions.begun().await;
        let mut quiet = 0;
        while quiet < QUIET_TICKS {
            let Some(sampler) = running.0.upgrade() else {
                return;
            };
            let next = sampler.tick().await;
            drop(sampler);
            quiet = if transactions.is_empty() {
                quiet + 1
            } else {
                0
            };
            tokio::time::sleep_until(next.min(Instant::now() + TICK).into()).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
