//! Takes one sample for all statements that are due.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::plan::{RECHECK_INTERVAL, SamplePlan};
use super::statement_log::StatementLog;
use super::{CHECK_INTERVAL, KEEP_SAMPLES, Sampler, journal, lock, sql};
use crate::connection::Reply;
use crate::error::{Error, ErrorKind};
use crate::graph::{self, RowId, Snapshot};
use crate::incident::{Evidence, Incident, IncidentTrigger, Outcome, RowKey, WaitSample};
use crate::key::names;
use crate::sampler::sql::WaitingBackend;

/// The longest pause after failed samples.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How many rows' keys are read for one sample.
const MAX_ROWS: usize = 4;
/// How long sampling rests after a sample, in multiples of the sample's duration: a server in trouble has other work to
/// do.
const REST_FACTOR: u32 = 5;
/// How many relations' primary keys are cached.
const MAX_RELATIONS: usize = 1024;

/// A statement that is due for a sample.
struct DueStatement {
    /// The number of its transaction, and its own.
    key: (u64, u64),
    log: Arc<StatementLog>,
    pid: i32,
}

impl Sampler {
    /// Samples the statements that are due. Returns the time when the next one is due.
    pub(super) async fn sample_due(&self) -> Instant {
        let due = self.due();
        if !due.is_empty() {
            match self.sample(&due).await {
                Ok(()) => {
                    *lock(&self.sampling_error) = None;
                    self.failed_samples.store(0, Ordering::Relaxed);
                }
                Err(error) => {
                    self.note_sampling_error(&error_chain(&error));
                    // Do not retry at once, but with growing pauses: the server may have no connection to spare.
                    let failures = if error.kind() == ErrorKind::Pool {
                        // All connections of the pool are in use. That may change soon, and costs the server nothing.
                        0
                    } else {
                        self.failed_samples.fetch_add(1, Ordering::Relaxed)
                    };
                    let pause = (RECHECK_INTERVAL * 2_u32.pow(failures.min(5))).min(MAX_PAUSE);
                    let now = Instant::now();
                    self.for_each(&due, |plan, _| plan.sampling_failed(now));
                    *lock(&self.paused_until) = Some(now + pause);
                }
            }
        }
        let live = self.transactions.live();
        let now = Instant::now();
        let plans = lock(&self.plans);
        live.iter()
            .filter_map(|(number, log)| {
                let running = log.running()?;
                let plan = plans.get(&(*number, running.number));
                // A statement that has begun since has no plan yet.
                Some(plan.map_or_else(
                    || SamplePlan::new(&running, log.lock_timeout).next(),
                    SamplePlan::next,
                ))
            })
            .fold(now + CHECK_INTERVAL, Instant::min)
            .max(lock(&self.paused_until).unwrap_or(now))
    }

    /// Makes a plan for each running statement. Returns the statements that are due, and with them the ones that are
    /// due soon: one sample serves any number of statements.
    fn due(&self) -> Vec<DueStatement> {
        let now = Instant::now();
        if lock(&self.paused_until).is_some_and(|until| now < until) {
            return Vec::new();
        }
        let live = self.transactions.live();
        let mut plans = lock(&self.plans);
        let (mut due, mut others) = (Vec::new(), Vec::new());
        let mut failed = HashSet::new();
        for (number, log) in live {
            failed.extend(log.failure().map(|failing| (number, failing.number)));
            let (Some(running), Some(pid)) = (log.running(), log.pid()) else {
                continue;
            };
            let key = (number, running.number);
            let plan = plans
                .entry(key)
                .or_insert_with(|| SamplePlan::new(&running, log.lock_timeout));
            plan.ran = now;
            let list = if plan.next() <= now {
                &mut due
            } else if plan.waiting_since().is_some() || plan.next() <= now + RECHECK_INTERVAL {
                &mut others
            } else {
                continue;
            };
            list.push(DueStatement { key, log, pid });
        }
        // One sample serves all waiters, and one query all running statements, so that many statements do not mean many
        // queries.
        if !due.is_empty() {
            due.append(&mut others);
        }
        // Plans of finished statements are kept for their samples. If the transaction failed by its statement, its plan
        // is kept as long as the transaction continues.
        plans.retain(|key, plan| {
            let is_recent = now.duration_since(plan.ran) < KEEP_SAMPLES;
            plan.ran == now || plan.last_sampled().is_some() && (is_recent || failed.contains(key))
        });
        due
    }

    async fn sample(&self, due: &[DueStatement]) -> Result<(), Error> {
        let pids: Vec<i32> = due.iter().map(|due| due.pid).collect();
        let reply = self.query(&sql::waits(&pids)).await?;
        let now = Instant::now();
        let waiting: HashMap<i32, WaitingBackend> = sql::waiting_backends(&reply)
            .into_iter()
            .map(|waiting| (waiting.pid, waiting))
            .collect();
        self.for_each(due, |plan, due| match waiting.get(&due.pid) {
            None => plan.not_waiting(now),
            Some(waiting) => plan.waiting(
                now,
                now.checked_sub(waiting.waited).unwrap_or(now),
                [waiting.deadlock_timeout, due.log.lock_timeout]
                    .into_iter()
                    .flatten(),
            ),
        });
        if waiting.is_empty() {
            return Ok(());
        }
        let next_sample = *lock(&self.next_sample);
        if now < next_sample {
            // The last sample or the next one has to be enough.
            self.for_each(due, |plan, _| plan.not_before(next_sample));
            return Ok(());
        }
        let pids: Vec<i32> = waiting.keys().copied().collect();
        let asked = Instant::now();
        let reply = self.query(&graph::sql::wait_graph(Some(&pids))).await?;
        let answered = Instant::now();
        let duration = answered - asked;
        *lock(&self.next_sample) = answered + duration * REST_FACTOR;
        let Some(reply) = graph::sql::read_sample(&reply, &names::named) else {
            return Ok(());
        };
        let snapshot = Arc::new(reply.snapshot(duration));
        self.add_samples(due, &snapshot, answered);
        // The sample is kept before the keys of rows are read, which can take a moment.
        let row_keys = self.row_keys(&snapshot).await;
        if !row_keys.is_empty() {
            self.for_each(due, |plan, _| plan.add_row_keys(&snapshot, &row_keys));
        }
        self.report_long_waits(due);
        Ok(())
    }

    /// Adds the sample to the plans of the statements that wait in it.
    fn add_samples(&self, due: &[DueStatement], snapshot: &Arc<Snapshot>, answered: Instant) {
        self.for_each(due, |plan, due| {
            if snapshot.edges_of(&due.pid.into()).next().is_some() {
                plan.add_sample(WaitSample {
                    snapshot: Arc::clone(snapshot),
                    after: answered.saturating_duration_since(plan.since()),
                    row_keys: Vec::new(),
                });
            }
        });
    }

    /// The plans of the due statements that still exist.
    fn for_each(&self, due: &[DueStatement], mut f: impl FnMut(&mut SamplePlan, &DueStatement)) {
        let mut plans = lock(&self.plans);
        for due in due {
            if let Some(plan) = plans.get_mut(&due.key) {
                f(plan, due);
            }
        }
    }

    /// The keys of the rows that are waited for, if they can be read.
    async fn row_keys(&self, snapshot: &Snapshot) -> Vec<(RowId, RowKey)> {
        let mut rows: Vec<&RowId> = Vec::new();
        for row in snapshot.edges().iter().filter_map(|edge| edge.row()) {
            if !rows.contains(&row) && rows.len() < MAX_ROWS {
                rows.push(row);
            }
        }
        let mut keys = Vec::new();
        for row in rows {
            match self.row_key(row).await {
                Ok(Some(key)) => keys.push((row.clone(), key)),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, %row, "the row's key could not be read");
                    // The relation may have another key by now.
                    drop(lock(&self.primary_keys).remove(&row.relation().oid()));
                }
            }
        }
        keys
    }

    pub(super) async fn row_key(&self, row: &RowId) -> Result<Option<RowKey>, Error> {
        if row.relation().database().is_some() {
            return Ok(None);
        }
        let oid = row.relation().oid();
        let known = lock(&self.primary_keys).get(&oid).cloned();
        let columns = match known {
            Some(columns) => columns,
            None => {
                let reply = self.query(&sql::primary_key(oid)).await?;
                let columns: Arc<[String]> = sql::key_columns(&reply).into();
                let mut keys = lock(&self.primary_keys);
                if keys.len() >= MAX_RELATIONS {
                    keys.clear();
                }
                keys.insert(oid, Arc::clone(&columns));
                columns
            }
        };
        if columns.is_empty() {
            return Ok(None);
        }
        let Some(query_text) = sql::row_key(row, &columns) else {
            return Ok(None);
        };
        let reply = self.query(&query_text).await?;
        Ok(sql::key_values(&reply).map(|values| RowKey::new(columns.iter().cloned().zip(values))))
    }

    /// Reports waits that last too long, each once.
    fn report_long_waits(&self, due: &[DueStatement]) {
        let Some(long) = self.options.long_wait else {
            return;
        };
        for due in due {
            let (samples, seen) = {
                let mut plans = lock(&self.plans);
                let Some(plan) = plans.get_mut(&due.key) else {
                    continue;
                };
                let waited = plan.waiting_since().map(|since| since.elapsed());
                if plan.reported_long || waited.is_none_or(|waited| waited < long) {
                    continue;
                }
                plan.reported_long = true;
                (plan.samples(), plan.last_sampled())
            };
            let now = Instant::now();
            let others = self.others(&due.log, &samples, None, seen.unwrap_or(now));
            let (attempt, attempts) = due.log.attempt.get().copied().unwrap_or((1, 1));
            let evidence = Evidence {
                trigger: IncidentTrigger::LongWait,
                occurred: SystemTime::now(),
                victim: journal::from_log(&due.log, now),
                attempt,
                attempts,
                outcome: Outcome::StillWaiting,
                error: None,
                samples,
                relations: Vec::new(),
                context_row: None,
                others,
                caveats: Vec::new(),
                literals: self.options.literals,
            };
            self.publish(&Incident::new(evidence, &self.history));
        }
    }

    pub(super) async fn query(&self, sql: &str) -> Result<Reply, Error> {
        self.connections.ask_soon(sql).await
    }
}

/// An error and its sources, in one line.
pub(super) fn error_chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
