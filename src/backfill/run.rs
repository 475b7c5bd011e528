//! Running a backfill whose lock is held: batches and pauses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tracing::Instrument as _;

use super::batch_sizer::BatchSizer;
use super::builder::Backfill;
use super::prepared::{Prepared, unreadable};
use super::sql::{self, BatchQuery, BatchResult, Checkpoint, CheckpointId, LoadSample};
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

/// A backfill whose lock is held.
pub(super) struct Run {
    prepared: Prepared,
    // `None` once the backfill is complete.
    guard: Option<SessionGuard>,
    checkpoint: Checkpoint,
    sizer: BatchSizer,
    progress: BackfillProgress,
    started: Instant,
    sampled: Option<Instant>,
    sample: LoadSample,
    next_pause: Duration,
    paused_since_batch: Duration,
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
        // Boxed, so that the compiler need not look through it in each caller's future.
        let committed = Box::pin(self.run_batch()).instrument(span).await?;
        let duration = committed.began.elapsed();
        let BatchResult {
            processed,
            changed,
            last_key,
        } = committed.result;
        self.checkpoint.processed += processed;
        self.checkpoint.changed += changed;
        self.checkpoint.last_key = last_key.or(self.checkpoint.last_key.take());
        self.checkpoint.done = committed.is_end;
        self.paused_since_batch = Duration::ZERO;
        let progress = &mut self.progress;
        progress.processed_now += processed;
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

    async fn run_batch(&self) -> Result<CommittedBatch, Error> {
        let prepared = &self.prepared;
        let failures = AtomicU32::new(0);
        let batch = Batch {
            query: BatchQuery {
                target: &prepared.target,
                set: &prepared.set,
                filter: prepared.backfill.filter.as_deref(),
                last_key: self.checkpoint.last_key.as_deref(),
            },
            id: prepared.checkpoint_id(),
            checkpoint: &self.checkpoint,
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
    is_end: bool,
}

/// One batch, which can be attempted any number of times.
#[derive(Clone, Copy)]
struct Batch<'a> {
    query: BatchQuery<'a>,
    id: CheckpointId<'a>,
    checkpoint: &'a Checkpoint,
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
        let advance = sql::advance(&self.id, self.checkpoint, &result, is_end);
        let reply = tx.simple_query(&advance).await?;
        let Some(waiting) = sql::read_advance(&reply) else {
            return Err(Error::new(ErrorKind::LockLost)
                .with_key(self.key)
                .with_detail(
                    "another process has gone on with the backfill, this batch was rolled back",
                ));
        };
        Ok(CommittedBatch {
            result,
            rows,
            began,
            waiting,
            is_end,
        })
    }
}
