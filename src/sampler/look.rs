//! One look for all statements that are due.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::plan::{AGAIN, Plan};
use super::sql;
use super::statement_log::StatementLog;
use super::{KEEP, Sampler, TICK, journal, lock};
use crate::connection::Reply;
use crate::error::{Error, ErrorKind};
use crate::graph::{self, RowId, Snapshot};
use crate::incident::{Evidence, Incident, Kind, Look, Outcome, RowKey};
use crate::key::names;
use crate::sampler::sql::Waiting;

/// The longest pause after looks that failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Rows whose keys are looked up in one look.
const MOST_ROWS: usize = 4;
/// How many times as long as a look has taken there is none after it: a server in trouble has other things to do.
const REST: u32 = 5;
/// Relations whose primary keys are remembered.
const MOST_RELATIONS: usize = 1024;

/// A statement that is due for a look.
struct Due {
    /// The numbers of its transaction and its own.
    key: (u64, u64),
    journal: Arc<StatementLog>,
    pid: i32,
}

impl Sampler {
    /// Looks at those statements that are due. Gives the time when the next one is.
    pub(super) async fn tick(&self) -> Instant {
        let due = self.due();
        if !due.is_empty() {
            match self.look_at(&due).await {
                Ok(()) => {
                    *lock(&self.trouble) = None;
                    self.failures.store(0, Ordering::Relaxed);
                }
                Err(error) => {
                    self.trouble(&chain(&error));
                    // Not at once again, and more and more seldom: it may be a server without a connection to spare.
                    let failures = if error.kind() == ErrorKind::Pool {
                        // All of the pool is in use, which may change soon and costs the server nothing.
                        0
                    } else {
                        self.failures.fetch_add(1, Ordering::Relaxed)
                    };
                    let pause = (AGAIN * 2_u32.pow(failures.min(5))).min(LONGEST_PAUSE);
                    let now = Instant::now();
                    self.for_each(&due, |plan, _| plan.not_seen(now));
                    *lock(&self.paused_until) = Some(now + pause);
                }
            }
        }
        let live = self.transactions.live();
        let now = Instant::now();
        let plans = lock(&self.plans);
        live.iter()
            .filter_map(|(number, journal)| {
                let running = journal.running()?;
                let plan = plans.get(&(*number, running.number));
                // None for one that has begun since.
                Some(plan.map_or_else(
                    || Plan::new(&running, journal.lock_timeout).next(),
                    Plan::next,
                ))
            })
            .fold(now + TICK, Instant::min)
            .max(lock(&self.paused_until).unwrap_or(now))
    }

    /// Makes a plan for each statement that runs; those whose time has come are due, and with them those whose time is
    /// soon: however many there are, they are looked at together.
    fn due(&self) -> Vec<Due> {
        let now = Instant::now();
        if lock(&self.paused_until).is_some_and(|until| now < until) {
            return Vec::new();
        }
        let live = self.transactions.live();
        let mut plans = lock(&self.plans);
        let (mut due, mut others) = (Vec::new(), Vec::new());
        let mut failed = HashSet::new();
        for (number, journal) in live {
            failed.extend(journal.failure().map(|failing| (number, failing.number)));
            let (Some(running), Some(pid)) = (journal.running(), journal.pid()) else {
                continue;
            };
            let key = (number, running.number);
            let plan = plans
                .entry(key)
                .or_insert_with(|| Plan::new(&running, journal.lock_timeout));
            plan.ran = now;
            let due_or_not = if plan.next() <= now {
                &mut due
            } else if plan.waiting_since().is_some() || plan.next() <= now + AGAIN {
                &mut others
            } else {
                continue;
            };
            due_or_not.push(Due { key, journal, pid });
        }
        // One look serves all who wait, and one question all who run, so that many of them do not mean many.
        if !due.is_empty() {
            due.append(&mut others);
        }
        // Of those that have ended, what was seen is what is wanted; of those whose transaction has failed by them and
        // goes on with something else, for as long as it does.
        plans.retain(|key, plan| {
            let is_recent = now.duration_since(plan.ran) < KEEP;
            plan.ran == now || plan.seen().is_some() && (is_recent || failed.contains(key))
        });
        due
    }

    async fn look_at(&self, due: &[Due]) -> Result<(), Error> {
        let pids: Vec<i32> = due.iter().map(|due| due.pid).collect();
        let reply = self.ask(&sql::waits(&pids)).await?;
        let now = Instant::now();
        let waiting: HashMap<i32, Waiting> = sql::waiting(&reply)
            .into_iter()
            .map(|waiting| (waiting.pid, waiting))
            .collect();
        self.for_each(due, |plan, due| match waiting.get(&due.pid) {
            None => plan.is_running(now),
            Some(waiting) => plan.is_waiting(
                now,
                now.checked_sub(waiting.waited).unwrap_or(now),
                [waiting.deadlock_timeout, due.journal.lock_timeout]
                    .into_iter()
                    .flatten(),
            ),
        });
        if waiting.is_empty() {
            return Ok(());
        }
        let rested = *lock(&self.rested);
        if now < rested {
            // What was seen a moment ago has to do, or what will be seen in another.
            self.for_each(due, |plan, _| plan.not_before(rested));
            return Ok(());
        }
        let pids: Vec<i32> = waiting.keys().copied().collect();
        let asked = Instant::now();
        let reply = self.ask(&graph::sql::wait_graph(Some(&pids))).await?;
        let answered = Instant::now();
        let took = answered - asked;
        *lock(&self.rested) = answered + took * REST;
        let Some(seen) = graph::sql::read_sample(&reply, &names::named) else {
            return Ok(());
        };
        let snapshot = Arc::new(seen.snapshot(took));
        self.keep(due, &snapshot, answered);
        // After what matters most has been kept: a row's key can take a moment.
        let row_keys = self.row_keys(&snapshot).await;
        if !row_keys.is_empty() {
            self.for_each(due, |plan, _| plan.learned(&snapshot, &row_keys));
        }
        self.report_long_waits(due);
        Ok(())
    }

    /// Adds what was seen to the plans of those who wait in it.
    fn keep(&self, due: &[Due], snapshot: &Arc<Snapshot>, answered: Instant) {
        self.for_each(due, |plan, due| {
            if snapshot.edges_of(&due.pid.into()).next().is_some() {
                plan.saw(Look {
                    snapshot: Arc::clone(snapshot),
                    after: answered.saturating_duration_since(plan.since()),
                    row_keys: Vec::new(),
                });
            }
        });
    }

    /// The plans of those who are due, and there still.
    fn for_each(&self, due: &[Due], mut note: impl FnMut(&mut Plan, &Due)) {
        let mut plans = lock(&self.plans);
        for due in due {
            if let Some(plan) = plans.get_mut(&due.key) {
                note(plan, due);
            }
        }
    }

    /// The keys of the rows in dispute, where they can be read.
    async fn row_keys(&self, snapshot: &Snapshot) -> Vec<(RowId, RowKey)> {
        let mut rows: Vec<&RowId> = Vec::new();
        for row in snapshot.edges().iter().filter_map(|edge| edge.row()) {
            if !rows.contains(&row) && rows.len() < MOST_ROWS {
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
                    // The key may be another one by now.
                    drop(lock(&self.keys).remove(&row.relation().oid()));
                }
            }
        }
        keys
    }

    async fn row_key(&self, row: &RowId) -> Result<Option<RowKey>, Error> {
        if row.relation().database().is_some() {
            return Ok(None);
        }
        let oid = row.relation().oid();
        let known = lock(&self.keys).get(&oid).cloned();
        let columns = match known {
            Some(columns) => columns,
            None => {
                let reply = self.ask(&sql::primary_key(oid)).await?;
                let columns: Arc<[String]> = sql::key_columns(&reply).into();
                let mut keys = lock(&self.keys);
                if keys.len() >= MOST_RELATIONS {
                    keys.clear();
                }
                keys.insert(oid, Arc::clone(&columns));
                columns
            }
        };
        if columns.is_empty() {
            return Ok(None);
        }
        let Some(question) = sql::row_key(row, &columns) else {
            return Ok(None);
        };
        let reply = self.ask(&question).await?;
        Ok(sql::key_values(&reply).map(|values| RowKey::new(columns.iter().cloned().zip(values))))
    }

    /// Reports waits that are longer than they should be, each once.
    fn report_long_waits(&self, due: &[Due]) {
        let Some(long) = self.settings.long_wait else {
            return;
        };
        for due in due {
            let (looks, seen) = {
                let mut plans = lock(&self.plans);
                let Some(plan) = plans.get_mut(&due.key) else {
                    continue;
                };
                let waited = plan.waiting_since().map(|since| since.elapsed());
                if plan.reported_long || waited.is_none_or(|waited| waited < long) {
                    continue;
                }
                plan.reported_long = true;
                (plan.looks(), plan.seen())
            };
            let now = Instant::now();
            let others = self.others(&due.journal, &looks, None, seen.unwrap_or(now));
            let (attempt, attempts) = due.journal.attempt.get().copied().unwrap_or((1, 1));
            let evidence = Evidence {
                kind: Kind::LongWait,
                occurred: SystemTime::now(),
                victim: journal::of(&due.journal, now),
                attempt,
                attempts,
                outcome: Outcome::StillWaiting,
                error: None,
                looks,
                others,
                missing: Vec::new(),
                literals: self.settings.literals,
            };
            self.publish(&Incident::new(evidence, &self.history));
        }
    }

    async fn ask(&self, sql: &str) -> Result<Reply, Error> {
        self.connections.ask_soon(sql).await
    }
}

/// An error and what is behind it, in one line.
pub(super) fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
