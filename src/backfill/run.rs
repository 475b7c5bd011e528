//! Running a backfill whose lock is held: batches and pauses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tracing::Instrument as _;

use super::batch_sizer::BatchSizer;
use super::builder::Backfill;
use super::prepared::{Prepared, unreadable};
use super::sql::{
    self, BatchQuery, BatchResult, BatchStep, Checkpoint, CheckpointId, End, LoadSample, Sameness,
    Target,
};
use super::{BackfillPause, BackfillProgress};
use crate::advisory::SessionGuard;
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::meter::{SYSTEM, milliseconds};
use crate::transaction::{self, NoRetry, Tx};

/// How long a sample of waiters and standbys is used.
const SAMPLE_LIFETIME: Duration = Duration::from_millis(50);
/// The first pause for waiters or standbys. It doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause for sessions that wait for rows, in batch times: on a table with hot rows, some session always
/// waits.
const MAX_PAUSE_FOR_ROWS: u32 = 10;
/// How often the final check passes the rows, where it finds rows that match the filter: other sessions may have inserted
/// them meanwhile.
const MAX_CHECKS: u32 = 3;

/// A backfill whose lock is held.
pub(super) struct Run {
    prepared: Prepared,
    // `None` once the backfill is complete.
    guard: Option<SessionGuard>,
    checkpoint: Checkpoint,
    end: End,
    check: Option<FinalCheck>,
    sizer: BatchSizer,
    progress: BackfillProgress,
    started: Instant,
    sampled: Option<Instant>,
    sample: LoadSample,
    next_pause: Duration,
    paused_since_batch: Duration,
}

/// The state of the final check: rows that match the filter and were not changed before are changed by it.
#[derive(Clone, Debug, Default)]
struct FinalCheck {
    last_key: Option<Vec<String>>,
    /// Which pass over the rows it is, from 0.
    pass: u32,
    matching: u64,
    changed: u64,
}

impl Run {
    /// Waits for the lock up to the backfill's maximum.
    pub(super) async fn begin(backfill: Backfill) -> Result<Self, Error> {
        let prepared = Prepared::find(backfill).await?;
        let guard = prepared.lock().session().acquire().await?;
        Self::new(prepared, guard).await
    }

    /// `None` if another process holds the lock.
    pub(super) async fn try_begin(backfill: Backfill) -> Result<Option<Self>, Error> {
        let prepared = Prepared::find(backfill).await?;
        match prepared.lock().session().try_acquire().await? {
            Some(guard) => Self::new(prepared, guard).await.map(Some),
            None => Ok(None),
        }
    }

    async fn new(prepared: Prepared, guard: SessionGuard) -> Result<Self, Error> {
        let checkpoint = prepared.checkpoint().await?;
        let end = if checkpoint.done {
            End::Empty
        } else {
            prepared.end().await?
        };
        let backfill = &prepared.backfill;
        let sizer = BatchSizer::new(backfill.batch_rows.clone(), backfill.batch_time);
        let progress = BackfillProgress {
            name: Arc::clone(&prepared.name),
            processed: checkpoint.processed,
            changed: checkpoint.changed,
            processed_now: 0,
            changed_now: 0,
            batches: 0,
            batch_rows: sizer.rows(),
            last_batch: None,
            longest_batch: Duration::ZERO,
            elapsed: Duration::ZERO,
            paused: Duration::ZERO,
            pause: None,
            estimate: prepared.estimate,
            standbys: sql::Standbys::default(),
            is_done: checkpoint.done,
        };
        Ok(Self {
            prepared,
            guard: Some(guard),
            checkpoint,
            end,
            check: None,
            sizer,
            progress,
            started: Instant::now(),
            sampled: None,
            sample: LoadSample::default(),
            next_pause: FIRST_PAUSE,
            paused_since_batch: Duration::ZERO,
        })
    }

    /// Runs all remaining steps.
    pub(super) async fn finish(mut self) -> Result<BackfillProgress, Error> {
        loop {
            let progress = self.step().await?;
            if progress.is_done() {
                return Ok(progress);
            }
        }
    }

    /// Runs one batch or one pause.
    ///
    /// Cancel safety: dropped during a batch, the batch is rolled back, and the run must not be used any more.
    pub(super) async fn step(&mut self) -> Result<BackfillProgress, Error> {
        self.progress.pause = None;
        if !self.checkpoint.done {
            self.check_lock()?;
            self.sample().await?;
            if let Some(pause) = self.reason_to_pause() {
                self.pause_for(pause).await;
            } else {
                self.batch().await?;
            }
        }
        if self.checkpoint.done
            && let Some(guard) = self.guard.take()
            && let Err(error) = guard.release().await
        {
            // The backfill is complete, so the lock protects nothing any more.
            tracing::debug!(%error, backfill = &*self.prepared.name, "lock lost behind the last batch");
        }
        self.progress.processed = self.checkpoint.processed;
        self.progress.changed = self.checkpoint.changed;
        self.progress.batch_rows = self.sizer.rows();
        self.progress.is_done = self.checkpoint.done;
        self.progress.standbys = self.sample.standbys;
        self.progress.elapsed = self.started.elapsed();
        if let Some(on_progress) = &self.prepared.backfill.on_progress {
            on_progress(&self.progress);
        }
        Ok(self.progress.clone())
    }

    fn lost(&self) -> Error {
        Error::new(ErrorKind::LockLost).with_key(&self.prepared.key)
    }

    fn check_lock(&self) -> Result<(), Error> {
        match &self.guard {
            Some(guard) if !guard.is_lost() => Ok(()),
            _ => Err(self.lost()),
        }
    }

    /// Samples the waiters and the replication lag. The query runs on the connection that holds the lock, which
    /// verifies that the connection is alive, and keeps `idle_session_timeout` from ending it.
    async fn sample(&mut self) -> Result<(), Error> {
        if (self.sampled).is_some_and(|sampled| sampled.elapsed() < SAMPLE_LIFETIME) {
            return Ok(());
        }
        let Some(guard) = &self.guard else {
            return Err(self.lost());
        };
        let query = sql::load_sample(&self.prepared.target.oids);
        let reply =
            (guard.simple_query(&query).await).map_err(|error| match Error::from(error) {
                lost if lost.kind() == ErrorKind::ConnectionLost => self.lost().with_source(lost),
                error => error,
            })?;
        let sample = sql::read_load_sample(&reply).ok_or_else(unreadable)?;
        if sample.standbys.hidden > 0 && self.sample.standbys.hidden == 0 {
            tracing::warn!(
                backfill = &*self.prepared.name,
                standbys = sample.standbys.count,
                "this role may not see how far standbys are behind (pg_monitor may); going on without"
            );
        }
        self.sample = sample;
        self.sampled = Some(Instant::now());
        Ok(())
    }

    fn reason_to_pause(&mut self) -> Option<BackfillPause> {
        let LoadSample {
            table_waiters,
            row_waiters,
            standbys,
        } = self.sample;
        let backfill = &self.prepared.backfill;
        let max_lag = backfill.max_lag.zip(standbys.lag);
        let max_lag_bytes = backfill.max_lag_bytes.zip(standbys.bytes);
        let max_pause_for_rows = backfill.batch_time.saturating_mul(MAX_PAUSE_FOR_ROWS);
        let reason = if max_lag.is_some_and(|(max, lag)| lag > max)
            || max_lag_bytes.is_some_and(|(max, bytes)| bytes > max)
        {
            Some(BackfillPause::ReplicationLag)
        } else if backfill.pauses_for_waiters
            && (table_waiters > 0
                || row_waiters > 0 && self.paused_since_batch < max_pause_for_rows)
        {
            Some(BackfillPause::LockWaiters)
        } else {
            None
        };
        if reason.is_none() {
            self.next_pause = FIRST_PAUSE;
        }
        reason
    }

    async fn pause_for(&mut self, reason: BackfillPause) {
        tracing::debug!(
            backfill = &*self.prepared.name,
            ?reason,
            pause = ?self.next_pause,
            "backfill pauses"
        );
        self.progress.pause = Some(reason);
        self.paused_since_batch += self.next_pause;
        self.sleep(self.next_pause).await;
        self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
        self.sampled = None;
    }

    async fn sleep(&mut self, pause: Duration) {
        let since = Instant::now();
        tokio::time::sleep(pause).await;
        self.progress.paused += since.elapsed();
    }

    async fn batch(&mut self) -> Result<(), Error> {
        let span = tracing::debug_span!(
            "backfill_batch",
            "db.system.name" = SYSTEM,
            backfill = &*self.prepared.name,
            batch = self.progress.batches + 1,
            rows = self.sizer.rows(),
        );
        let is_other = AtomicBool::new(false);
        // Boxed, so that the compiler need not look through it in each caller's future.
        let committed = match Box::pin(self.run_batch(&is_other)).instrument(span).await {
            // The batch was rolled back. The table has been changed meanwhile, and maybe the run can continue.
            Err(_) if is_other.load(Ordering::Relaxed) => {
                self.checkpoint = self.prepared.continued().await?;
                self.end = self.prepared.end().await?;
                self.check = None;
                return Ok(());
            }
            committed => committed?,
        };
        let duration = committed.began.elapsed();
        let result = committed.result;
        let (processed, changed) = (result.processed, result.changed);
        self.checkpoint.changed += changed;
        self.checkpoint.filter_stays |= result.still_matching > 0;
        self.checkpoint.done = committed.is_done;
        if let Some(check) = &mut self.check {
            check.matching += result.matching;
            check.changed += changed;
            check.last_key = result.last_key.or(check.last_key.take());
        } else {
            self.checkpoint.processed += processed;
            self.checkpoint.last_key = result.last_key.or(self.checkpoint.last_key.take());
        }
        if committed.is_end && !committed.is_done {
            self.next_check()?;
        }
        self.paused_since_batch = Duration::ZERO;
        let progress = &mut self.progress;
        if self.check.is_none() {
            progress.processed_now += processed;
        }
        progress.changed_now += changed;
        progress.batches += 1;
        progress.last_batch = Some(duration);
        progress.longest_batch = progress.longest_batch.max(duration);
        tracing::debug!(
            backfill = &*self.prepared.name,
            passed = processed,
            changed,
            took_ms = milliseconds(duration),
            waiting = committed.waiting,
            "batch committed"
        );
        self.sizer.record(committed.rows, duration);
        if self.checkpoint.done {
            return Ok(());
        }
        let mut pause = self.prepared.backfill.pause;
        if committed.waiting > 0 && self.prepared.backfill.pauses_for_waiters {
            self.sizer.record_waiters();
            pause = pause.max(duration.min(LONGEST_PAUSE));
        }
        if !pause.is_zero() {
            self.sleep(pause).await;
        }
        Ok(())
    }

    /// Begins the final check, or its next pass.
    fn next_check(&mut self) -> Result<(), Error> {
        let Some(FinalCheck {
            pass,
            matching,
            changed,
            ..
        }) = self.check.take()
        else {
            self.check = Some(FinalCheck::default());
            return Ok(());
        };
        // Without progress, another pass finds the same rows.
        if changed == 0 || pass + 1 == MAX_CHECKS {
            return Err(Error::new(ErrorKind::Database).with_detail(format!(
                "the final check of the backfill {:?} found rows that match its filter still: {matching}, of which it \
                 changed {changed}; a trigger may keep rows from being changed, or other sessions may insert rows without \
                 their new values; it is not done",
                self.prepared.name
            )));
        }
        self.check = Some(FinalCheck {
            pass: pass + 1,
            ..FinalCheck::default()
        });
        Ok(())
    }

    async fn run_batch(&self, is_other: &AtomicBool) -> Result<CommittedBatch, Error> {
        let prepared = &self.prepared;
        let failures = AtomicU32::new(0);
        let last_key = match &self.check {
            Some(check) => check.last_key.as_deref(),
            None => self.checkpoint.last_key.as_deref(),
        };
        let batch = Batch {
            query: BatchQuery {
                target: &prepared.target,
                set: &prepared.set,
                filter: prepared.backfill.filter.as_deref(),
                last_key,
                end: &self.end,
                visible_rows: prepared.backfill.visible_rows,
            },
            id: prepared.checkpoint_id(),
            checkpoint: &self.checkpoint,
            check: self.check.as_ref(),
            is_other,
            rows: self.sizer.rows(),
            failures: &failures,
            key: &prepared.key,
        };
        let open = prepared.backfill.env.opener(&prepared.begin);
        let run = transaction::run(
            &prepared.policy,
            &NoRetry,
            &open,
            async move |tx: &mut Tx| batch.run(tx).await,
        );
        run.await?.ok_or_else(unreadable)
    }
}

/// A batch that was committed.
struct CommittedBatch {
    result: BatchResult,
    /// The maximum number of rows of the batch.
    rows: u32,
    began: Instant,
    waiting: u64,
    /// Whether no rows are left behind it.
    is_end: bool,
    is_done: bool,
}

/// One batch, which can be attempted any number of times.
#[derive(Clone, Copy)]
struct Batch<'a> {
    query: BatchQuery<'a>,
    id: CheckpointId<'a>,
    checkpoint: &'a Checkpoint,
    check: Option<&'a FinalCheck>,
    /// Set if the table is not the checkpoint's any more.
    is_other: &'a AtomicBool,
    rows: u32,
    failures: &'a AtomicU32,
    key: &'a LockKey,
}

impl Batch<'_> {
    async fn run(self, tx: &mut Tx) -> Result<CommittedBatch, Error> {
        let began = Instant::now();
        // After a conflict, fewer rows make another one less likely.
        let failures = self.failures.fetch_add(1, Ordering::Relaxed);
        let rows = self.rows.checked_shr(failures).unwrap_or(0).max(1);
        let reply = tx.simple_query(&sql::batch(&self.query, rows)).await?;
        let result = sql::read_batch(self.query.target, &reply).ok_or_else(unreadable)?;
        let is_end = result.processed < u64::from(rows);
        let step = BatchStep {
            is_done: is_end && self.is_done_with(&result),
            is_check: self.check.is_some(),
            visible_rows: self.query.visible_rows,
        };
        let target: &Target = self.query.target;
        let advance = sql::advance(&self.id, target, self.checkpoint, &result, step);
        let reply = tx.simple_query(&advance).await?;
        let Some((waiting, same)) = sql::read_advance(&reply) else {
            return Err(Error::new(ErrorKind::LockLost)
                .with_key(self.key)
                .with_detail(
                    "another process has gone on with the backfill, this batch was rolled back",
                ));
        };
        let Sameness {
            table,
            columns,
            rows: same_rows,
            files,
            ..
        } = same;
        if !(table && columns && same_rows && files) {
            self.is_other.store(true, Ordering::Relaxed);
            return Err(Error::config(format!(
                "{} has been changed since the last batch",
                target.table
            )));
        }
        Ok(CommittedBatch {
            result,
            rows,
            began,
            waiting,
            is_end,
            is_done: step.is_done,
        })
    }

    /// Whether nothing is left to do if this batch is the last one of its pass.
    fn is_done_with(&self, result: &BatchResult) -> bool {
        // Without a filter, all batches of the range have been committed. A filter that changed rows match still does not
        // tell what is left.
        if self.query.filter.is_none() || self.checkpoint.filter_stays || result.still_matching > 0
        {
            return true;
        }
        self.check
            .is_some_and(|check| check.matching + result.matching == 0)
    }
}
