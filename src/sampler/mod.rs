//! Samples the server's locks while transactions wait, because afterwards it is too late.
//!
//! When the error of a deadlock arrives, the victim's locks are gone and the survivor has continued. So each keeper has
//! one task that samples the server while a statement of any transaction has been running for some time: which
//! transactions wait, and for which sessions. It samples when it notices a wait, and again shortly before the server
//! would end that wait. The samples, the statements of both sides ([`StatementLog`]) and the server's error become an
//! [`Incident`].

mod active_transactions;
mod delivery;
mod journal;
mod look_up;
mod plan;
mod sampling;
mod sql;
mod statement_log;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::connection::{Connections, task};
use crate::error::{Failure, Report, classify_db};
use crate::graph::Relation;
use crate::incident::{
    Evidence, Incident, IncidentHistory, IncidentTrigger, Outcome, RowKey, ServerError,
};
use crate::meter;
use crate::postgres::message::{self, RowContext};
use crate::transaction::{AfterFailure, BoxFuture, Deferred, FailedAttempt, Reporter};
pub(crate) use active_transactions::ActiveTransactions;
use delivery::Delivery;
pub(crate) use delivery::IncidentSink;
use plan::SamplePlan;
use statement_log::StatementLog;

/// How often to check whether a sample is due.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// After this many ticks without any transaction the task goes to sleep.
const MAX_IDLE_CHECKS: u32 = 10;
/// A sample counts as simultaneous with an error that arrived at most this much later.
const SIMULTANEOUS: Duration = Duration::from_millis(100);
/// How long the samples of a finished statement are kept, unless its transaction failed by it and continues.
const KEEP_SAMPLES: Duration = Duration::from_secs(10);

/// How long the names for a report are looked up at most.
const LOOK_UP: Duration = Duration::from_millis(250);

/// The default duration after which a wait that continues is reported.
const DEFAULT_LONG_WAIT: Duration = Duration::from_secs(10);

/// How to sample, and which incidents to report.
pub(crate) struct SamplerOptions {
    pub(crate) enabled: bool,
    /// Whether reports show the literals of statements.
    pub(crate) literals: bool,
    /// The duration after which a wait that continues is reported; `None` for never.
    pub(crate) long_wait: Option<Duration>,
    pub(crate) sink: Option<IncidentSink>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            enabled: true,
            literals: false,
            long_wait: Some(DEFAULT_LONG_WAIT),
            sink: None,
        }
    }
}

/// The sampler of one keeper.
pub(crate) struct Sampler {
    connections: Arc<Connections>,
    transactions: Arc<ActiveTransactions>,
    options: SamplerOptions,
    running: AtomicBool,
    /// For each statement, by the number of its transaction and its own. A statement that fails may be followed by
    /// others before its failure is reported.
    plans: Mutex<HashMap<(u64, u64), SamplePlan>>,
    /// The columns of primary keys, by the relation's oid.
    primary_keys: Mutex<HashMap<u32, Arc<[String]>>>,
    /// Relations of which a server's DETAIL has only the oid.
    relations: Mutex<HashMap<u32, Relation>>,
    /// The rows of the last errors' CONTEXT, with their keys.
    context_rows: Mutex<VecDeque<(RowContext, Relation, RowKey)>>,
    /// The earliest time of the next sample.
    next_sample: Mutex<Instant>,
    /// Why the last sample failed, if it did.
    sampling_error: Mutex<Option<Arc<str>>>,
    /// How many samples have failed in a row, and until when sampling pauses.
    failed_samples: AtomicU32,
    paused_until: Mutex<Option<Instant>>,
    history: IncidentHistory,
    delivery: Delivery,
}

impl Sampler {
    pub(crate) fn new(
        connections: Arc<Connections>,
        transactions: Arc<ActiveTransactions>,
        options: SamplerOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            connections,
            transactions,
            delivery: Delivery::new(options.sink.clone()),
            options,
            running: AtomicBool::new(false),
            plans: Mutex::default(),
            primary_keys: Mutex::default(),
            relations: Mutex::default(),
            context_rows: Mutex::default(),
            next_sample: Mutex::new(Instant::now()),
            sampling_error: Mutex::default(),
            failed_samples: AtomicU32::new(0),
            paused_until: Mutex::default(),
            history: IncidentHistory::default(),
        })
    }

    /// Makes sure that the task runs. Called when a transaction is about to begin.
    fn start(self: &Arc<Self>) {
        if !self.options.enabled || self.running.load(Ordering::Relaxed) {
            return;
        }
        if self.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let guard = TaskGuard(Arc::downgrade(self));
        let transactions = Arc::clone(&self.transactions);
        // Without a runtime the future is dropped, and the task does not run.
        let _ = task::run_in_background(run(guard, transactions));
    }

    /// What is known of a failed attempt. `None` for a cancelled statement that the server did not show waiting.
    fn evidence(&self, failed: &FailedAttempt<'_>, log: &StatementLog) -> Option<Evidence> {
        let trigger = match classify_db(failed.error) {
            Failure::Deadlock => IncidentTrigger::Deadlock,
            _ => IncidentTrigger::LockTimeout,
        };
        let failure = log.failure();
        let now = Instant::now();
        // The closure may have run other statements since.
        let ended = failure.map_or(now, |failure| failure.ended);
        let mut caveats = Vec::new();
        let (samples, seen, was_waiting) = {
            let plans = lock(&self.plans);
            let plan = failure.and_then(|failure| plans.get(&(log.number, failure.number)));
            plan.map_or((Vec::new(), None, false), |plan| {
                let was_waiting = plan.waiting_since().is_some();
                (plan.samples(), plan.last_sampled(), was_waiting)
            })
        };
        let is_cancelled = classify_db(failed.error) == Failure::Cancelled;
        let is_a_wait = was_waiting && !samples.is_empty();
        if is_cancelled && !is_a_wait {
            return None;
        }
        // A recent sample gives the better time, because the error may have reached its task late.
        let at = seen
            .map(|seen| seen.min(ended))
            .filter(|seen| ended.duration_since(*seen) < SIMULTANEOUS);
        if !self.options.enabled {
            caveats.push("watching is switched off".into());
        } else if samples.is_empty() {
            caveats.push(
                lock(&self.sampling_error).clone().unwrap_or_else(|| {
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
        let others = self.others(log, &samples, detail, at.unwrap_or(ended));
        Some(Evidence {
            trigger,
            occurred: SystemTime::now()
                .checked_sub(now.saturating_duration_since(ended))
                .unwrap_or_else(SystemTime::now),
            victim: journal::from_log(log, ended),
            attempt: failed.attempt,
            attempts: failed.attempts,
            outcome: match failed.then {
                AfterFailure::Retry(pause) => Outcome::retried(pause),
                AfterFailure::GiveUp => Outcome::GaveUp,
                AfterFailure::Pass => Outcome::NotRetried,
                AfterFailure::Continue => Outcome::CaughtBySavepoint,
            },
            relations: self.relations_of(detail),
            context_row: self.context_row(error.context.as_deref()),
            error: Some(error),
            samples,
            others,
            caveats,
            literals: self.options.literals,
        })
    }

    /// The journals of the other participants that are transactions of this keeper and used their backends at that
    /// time.
    fn others(
        &self,
        victim: &StatementLog,
        samples: &[crate::incident::WaitSample],
        detail: Option<&str>,
        at: Instant,
    ) -> Vec<crate::incident::Journal> {
        let mut pids: Vec<i32> = Vec::new();
        for edge in samples.iter().flat_map(|sample| sample.snapshot.edges()) {
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
                // Later statements are not part of the incident, least of all its COMMIT.
                Some(journal::from_log(&log, at))
            })
            .collect()
    }

    /// Notes why sampling fails.
    fn note_sampling_error(&self, why: &str) {
        tracing::debug!(why, "the sampler cannot look");
        let sampling_error = format!("the server could not be looked at: {why}");
        *lock(&self.sampling_error) = Some(sampling_error.into());
    }

    fn publish(&self, incident: &Incident) {
        self.delivery.deliver(incident);
    }
}

impl Reporter for Sampler {
    fn begins(self: Arc<Self>) {
        self.start();
    }

    fn look_up<'a>(&'a self, failed: &'a FailedAttempt<'a>) -> BoxFuture<'a, ()> {
        Box::pin(async {
            if !self.options.enabled || classify_db(failed.error) == Failure::Cancelled {
                return;
            }
            // What is not known in time is not in the report.
            let _ = tokio::time::timeout(LOOK_UP, self.look_up_names(failed)).await;
        })
    }

    fn failed(&self, failed: &FailedAttempt<'_>) -> Option<Box<dyn Report>> {
        let log = StatementLog::of(failed.observed)?;
        let evidence = self.evidence(failed, &log)?;
        let incident = Incident::new(evidence, &self.history);
        if classify_db(failed.error) == Failure::Deadlock {
            meter::deadlocked(&incident.fingerprint().to_string());
        }
        self.publish(&incident);
        Some(Box::new(incident))
    }

    fn caught(self: Arc<Self>, failed: &FailedAttempt<'_>) -> Option<Deferred> {
        let log = StatementLog::of(failed.observed)?;
        let evidence = self.evidence(failed, &log)?;
        Some(Box::new(move || {
            self.publish(&Incident::new(evidence, &self.history));
        }))
    }
}

/// The task waits for transactions, so it has to be woken to notice that there will be none.
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

/// Held by the task. The task ends with its runtime, and the next transaction starts another.
struct TaskGuard(Weak<Sampler>);

impl Drop for TaskGuard {
    fn drop(&mut self) {
        if let Some(sampler) = self.0.upgrade() {
            sampler.running.store(false, Ordering::Release);
        }
    }
}

async fn run(guard: TaskGuard, transactions: Arc<ActiveTransactions>) {
    if let Some(sampler) = guard.0.upgrade() {
        // Opened early, because later there may be no connection available.
        if sampler.connections.has_side() {
            sampler.note_sampling_error("the side connection is still being opened");
        }
        match sampler.connections.open_side().await {
            Ok(()) => *lock(&sampler.sampling_error) = None,
            Err(error) => sampler.note_sampling_error(&sampling::error_chain(&error)),
        }
    }
    loop {
        transactions.begun().await;
        let mut idle_checks = 0;
        while idle_checks < MAX_IDLE_CHECKS {
            let Some(sampler) = guard.0.upgrade() else {
                return;
            };
            let next = sampler.sample_due().await;
            drop(sampler);
            idle_checks = if transactions.is_empty() {
                idle_checks + 1
            } else {
                0
            };
            tokio::time::sleep_until(next.min(Instant::now() + CHECK_INTERVAL).into()).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
