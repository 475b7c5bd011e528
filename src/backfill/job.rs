//! A backfill at work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::{IsolationLevel, SimpleQueryMessage};

use super::describe::Backfill;
use super::name::name_of;
use super::pace::Pace;
use super::{BackfillPause, BackfillProgress};
use crate::advisory::{AdvisoryLock, SessionGuard};
use crate::backfill::sql::{
    self as texts, Batch, Checkpoint, Done, Found, Look, Saved, Table, Target,
};
use crate::backoff::{Backoff, RetryBudget};
use crate::error::{Error, ErrorKind, Failure, Report, classify_db};
use crate::key::LockKey;
use crate::transaction::sql::Begin;
use crate::transaction::{self, FailedAttempt, NoRetry, OpenPlain, Policy, Reporter, Tx};

/// How long what was seen of waiters and standbys is good for.
const LOOK: Duration = Duration::from_millis(50);
/// The first pause for others, which doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// For how many batch times to step aside for those who wait for rows: on a table with hot rows somebody always does.
const ASIDE: u32 = 10;
/// The namespace of the locks.
const LOCKS: &str = "lockkeeper_backfill";

/// A backfill whose lock is held.
pub(super) struct Job {
    backfill: Backfill,
    target: Target,
    name: Arc<str>,
    set: String,
    policy: Policy,
    begin: Begin,
    // `None` once all is done.
    guard: Option<SessionGuard>,
    key: LockKey,
    saved: Saved,
    pace: Pace,
    progress: BackfillProgress,
    started: Instant,
    looked: Option<Instant>,
    look: Look,
    next_pause: Duration,
    stepped_aside: Duration,
}

impl Job {
    /// Waits for the lock as long as the description says.
    pub(super) async fn begin(backfill: Backfill) -> Result<Self, Error> {
        let ready = Ready::find(backfill).await?;
        let guard = ready.lock().session().acquire().await?;
        ready.with(guard).await
    }

    /// `None` while another process has it.
    pub(super) async fn try_begin(backfill: Backfill) -> Result<Option<Self>, Error> {
        let ready = Ready::find(backfill).await?;
        match ready.lock().session().try_acquire().await? {
            Some(guard) => ready.with(guard).await.map(Some),
            None => Ok(None),
        }
    }

    /// All that is left.
    pub(super) async fn finish(mut self) -> Result<BackfillProgress, Error> {
        loop {
            let progress = self.step().await?;
            if progress.is_done() {
                return Ok(progress);
            }
        }
    }

    /// One batch, or one pause.
    ///
    /// Cancel safety: dropped in a batch, that is rolled back, and the job is not to be used any more.
    pub(super) async fn step(&mut self) -> Result<BackfillProgress, Error> {
        self.progress.pause = None;
        if !self.saved.done {
            self.check_lock()?;
            self.look().await?;
            if let Some(pause) = self.reason_to_pause() {
                self.pause_for(pause).await;
            } else {
                self.batch().await?;
            }
        }
        if self.saved.done
            && let Some(guard) = self.guard.take()
            && let Err(error) = guard.release().await
        {
            // Nothing is left that it would have kept others from.
            tracing::debug!(%error, backfill = &*self.name, "lock lost behind the last batch");
        }
        self.progress.passed = self.saved.passed;
        self.progress.changed = self.saved.changed;
        self.progress.batch_rows = self.pace.rows();
        self.progress.is_done = self.saved.done;
        self.progress.standbys = self.look.standbys;
        self.progress.elapsed = self.started.elapsed();
        if let Some(tell) = &self.backfill.on_progress {
            tell(&self.progress);
        }
        Ok(self.progress.clone())
    }

    fn lost(&self) -> Error {
        Error::new(ErrorKind::LockLost).with_key(&self.key)
    }

    fn check_lock(&self) -> Result<(), Error> {
        match &self.guard {
            Some(guard) if !guard.is_lost() => Ok(()),
            _ => Err(self.lost()),
        }
    }

    /// Looks at who waits and how far standbys are behind. On the connection with the lock, which so shows that it is
    /// alive, and is not ended by `idle_session_timeout`.
    async fn look(&mut self) -> Result<(), Error> {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return Ok(());
        }
        let Some(guard) = &self.guard else {
            return Err(self.lost());
        };
        let asked = guard.simple_query(&texts::look(&self.target.oids)).await;
        let reply = asked.map_err(|error| match Error::from(error) {
            lost if lost.kind() == ErrorKind::ConnectionLost => self.lost().with_source(lost),
            error => error,
        })?;
        let look = texts::looked(&reply).ok_or_else(unreadable)?;
        if look.standbys.hidden > 0 && self.look.standbys.hidden == 0 {
            tracing::warn!(
                backfill = &*self.name,
                standbys = look.standbys.count,
                "this role may not see how far standbys are behind (pg_monitor may); going on without"
            );
        }
        self.look = look;
        self.looked = Some(Instant::now());
        Ok(())
    }

    fn reason_to_pause(&mut self) -> Option<BackfillPause> {
        let Look {
            for_table,
            for_rows,
            standbys,
        } = self.look;
        let over = |limit: Option<Duration>, lag: Option<Duration>| {
            limit.is_some_and(|limit| lag.is_some_and(|lag| lag > limit))
        };
        let bytes = self.backfill.max_lag_bytes.zip(standbys.bytes);
        let aside = self.backfill.batch_time.saturating_mul(ASIDE);
        let reason = if over(self.backfill.max_lag, standbys.lag)
            || bytes.is_some_and(|(most, bytes)| bytes > most)
        {
            Some(BackfillPause::ReplicationLag)
        } else if self.backfill.steps_aside
            && (for_table > 0 || for_rows > 0 && self.stepped_aside < aside)
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
        tracing::debug!(backfill = &*self.name, ?reason, pause = ?self.next_pause, "backfill pauses");
        self.progress.pause = Some(reason);
        self.stepped_aside += self.next_pause;
        self.sleep(self.next_pause).await;
        self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
        self.looked = None;
    }

    async fn sleep(&mut self, pause: Duration) {
        let since = Instant::now();
        tokio::time::sleep(pause).await;
        self.progress.paused += since.elapsed();
    }

    async fn batch(&mut self) -> Result<(), Error> {
        let committed = self.run_batch().await?;
        let took = committed.began.elapsed();
        let Done {
            passed,
            changed,
            last,
        } = committed.done;
        self.saved.passed += passed;
        self.saved.changed += changed;
        self.saved.last = last.or(self.saved.last.take());
        self.saved.done = committed.is_end;
        self.stepped_aside = Duration::ZERO;
        let progress = &mut self.progress;
        progress.passed_now += passed;
        progress.changed_now += changed;
        progress.batches += 1;
        progress.last_batch = Some(took);
        progress.longest_batch = progress.longest_batch.max(took);
        tracing::debug!(
            backfill = &*self.name,
            passed,
            changed,
            ?took,
            waiting = committed.waiting,
            "batch committed"
        );
        self.pace.took(committed.rows, took);
        if self.saved.done {
            return Ok(());
        }
        let mut rest = self.backfill.rest;
        if committed.waiting > 0 && self.backfill.steps_aside {
            self.pace.was_in_the_way();
            rest = rest.max(took.min(LONGEST_PAUSE));
        }
        if !rest.is_zero() {
            self.sleep(rest).await;
        }
        Ok(())
    }

    async fn run_batch(&self) -> Result<Committed, Error> {
        let failures = AtomicU32::new(0);
        let work = Work {
            batch: Batch {
                target: &self.target,
                set: &self.set,
                filter: self.backfill.filter.as_deref(),
                last: self.saved.last.as_deref(),
            },
            at: Checkpoint {
                schema: self.target.schema(),
                name: &self.name,
            },
            saved: &self.saved,
            rows: self.pace.rows(),
            failures: &failures,
            key: &self.key,
        };
        let open = plain(&self.backfill, &self.begin);
        let run = transaction::run(&self.policy, &NoRetry, &open, async move |tx: &mut Tx| {
            work.run(tx).await
        });
        run.await?.ok_or_else(unreadable)
    }
}

/// A batch that was committed.
struct Committed {
    done: Done,
    /// How many rows it could have had.
    rows: u32,
    began: Instant,
    waiting: u64,
    is_end: bool,
}

/// One batch, to be tried any number of times.
#[derive(Clone, Copy)]
struct Work<'a> {
    batch: Batch<'a>,
    at: Checkpoint<'a>,
    saved: &'a Saved,
    rows: u32,
    failures: &'a AtomicU32,
    key: &'a LockKey,
}

impl Work<'_> {
    async fn run(self, tx: &mut Tx) -> Result<Committed, Error> {
        let began = Instant::now();
        // What met a lock meets fewer with fewer rows.
        let failures = self.failures.fetch_add(1, Ordering::Relaxed);
        let rows = self.rows.checked_shr(failures).unwrap_or(0).max(1);
        let reply = tx.simple_query(&texts::batch(&self.batch, rows)).await?;
        let done = texts::done(self.batch.target, &reply).ok_or_else(unreadable)?;
        let is_end = done.passed < u64::from(rows);
        let advance = texts::advance(&self.at, self.saved, &done, is_end);
        let reply = tx.simple_query(&advance).await?;
        let Some(waiting) = texts::advanced(&reply) else {
            return Err(Error::new(ErrorKind::LockLost)
                .with_key(self.key)
                .with_detail(
                    "another process has gone on with the backfill, this batch was rolled back",
                ));
        };
        Ok(Committed {
            done,
            rows,
            began,
            waiting,
            is_end,
        })
    }
}

/// A backfill that can be run, before it is.
struct Ready {
    backfill: Backfill,
    target: Target,
    name: Arc<str>,
    set: String,
    definition: String,
    key: LockKey,
    estimate: Option<u64>,
    policy: Policy,
    begin: Begin,
}

impl Ready {
    /// Looks for the table and its key.
    async fn find(backfill: Backfill) -> Result<Self, Error> {
        backfill.check()?;
        let begin = Begin {
            // What a batch has waited for, it must see as it is then.
            isolation: Some(IsolationLevel::ReadCommitted),
            read_only: Some(false),
            application_name: backfill.means.application_name.clone(),
            lock_timeout: Some(backfill.lock_timeout),
            ..Begin::default()
        };
        let policy = policy(&backfill);
        let catalog = texts::catalog(&backfill.table, &backfill.key);
        let reply = ask(&backfill, &policy, &begin, &catalog).await?;
        let target = match texts::found(&backfill.table, &backfill.key, &reply) {
            Found::Target(target) => target,
            Found::Flaw(flaw) => return Err(Error::config(flaw)),
        };
        let estimate = ask(&backfill, &policy, &begin, &texts::estimate(&target.table)).await?;
        let set = backfill.set.join("\n, ");
        let definition = target.definition(&set, backfill.filter.as_deref());
        let name = match &backfill.name {
            Some(name) => name.clone(),
            None => name_of(&definition),
        };
        Ok(Self {
            key: LockKey::from((LOCKS, format!("{}.{name}", target.schema()))),
            estimate: texts::estimated(&estimate),
            name: name.into(),
            backfill,
            target,
            set,
            definition,
            policy,
            begin,
        })
    }

    fn lock(&self) -> AdvisoryLock {
        let means = &self.backfill.means;
        let begin = Begin {
            application_name: means.application_name.clone(),
            ..Begin::default()
        };
        let lock = AdvisoryLock::new(
            Arc::clone(&means.advisory),
            vec![self.key.clone()],
            means.lock_wait,
            begin,
            means.call_site,
        );
        lock.wait(self.backfill.wait)
    }

    /// Reads the checkpoint, or writes the first one.
    async fn with(self, guard: SessionGuard) -> Result<Job, Error> {
        let schema = self.target.schema();
        self.ensure_table(schema).await?;
        let at = Checkpoint {
            schema,
            name: &self.name,
        };
        if self.backfill.restarts {
            self.ask(&texts::forget(&at)).await?;
        }
        let reply = self
            .ask(&texts::load(&at, &self.target, &self.definition))
            .await?;
        let saved = texts::loaded(&self.target, &reply).ok_or_else(unreadable)?;
        if saved.definition != self.definition {
            return Err(Error::config(format!(
                "the backfill {:?} in {schema}.{} does something else than this one; give this one another name, or \
                 restart it",
                self.name,
                texts::TABLE
            )));
        }
        if !saved.same_order {
            return Err(Error::config(format!(
                "the key of {} is ordered otherwise than when the backfill {:?} began (its type, collation or index has \
                 changed), so the rows that are left are not known; restart it",
                self.target.table, self.name
            )));
        }
        let pace = Pace::new(self.backfill.batch_rows.clone(), self.backfill.batch_time);
        let progress = BackfillProgress {
            name: Arc::clone(&self.name),
            passed: saved.passed,
            changed: saved.changed,
            passed_now: 0,
            changed_now: 0,
            batches: 0,
            batch_rows: pace.rows(),
            last_batch: None,
            longest_batch: Duration::ZERO,
            elapsed: Duration::ZERO,
            paused: Duration::ZERO,
            pause: None,
            estimate: self.estimate,
            standbys: texts::Standbys::default(),
            is_done: saved.done,
        };
        Ok(Job {
            backfill: self.backfill,
            target: self.target,
            name: self.name,
            set: self.set,
            policy: self.policy,
            begin: self.begin,
            guard: Some(guard),
            key: self.key,
            saved,
            pace,
            progress,
            started: Instant::now(),
            looked: None,
            look: Look::default(),
            next_pause: FIRST_PAUSE,
            stepped_aside: Duration::ZERO,
        })
    }

    async fn ensure_table(&self, schema: &str) -> Result<(), Error> {
        if self.has_table().await? {
            return Ok(());
        }
        let create = texts::create(schema);
        let Err(error) = self.ask(&create).await else {
            return Ok(());
        };
        // Another backfill may have been faster.
        if self.has_table().await? {
            return Ok(());
        }
        Err(Error::new(error.kind())
            .with_detail(format!(
                "the table for checkpoints is missing and could not be created; its owner shall be who may: {create}"
            ))
            .with_source(error))
    }

    /// An error for one that is not to be used.
    async fn has_table(&self) -> Result<bool, Error> {
        let reply = self.ask(&texts::look_for(&self.target)).await?;
        match texts::seen(&self.target, &reply) {
            Table::Missing => Ok(false),
            Table::Usable => Ok(true),
            Table::Flaw(flaw) => Err(Error::config(flaw)),
        }
    }

    async fn ask(&self, sql: &str) -> Result<Vec<SimpleQueryMessage>, Error> {
        ask(&self.backfill, &self.policy, &self.begin, sql).await
    }
}

/// One message in a transaction of its own.
async fn ask(
    backfill: &Backfill,
    policy: &Policy,
    begin: &Begin,
    sql: &str,
) -> Result<Vec<SimpleQueryMessage>, Error> {
    let open = plain(backfill, begin);
    let run = transaction::run(policy, &NoRetry, &open, async move |tx: &mut Tx| {
        Ok::<_, Error>(tx.simple_query(sql).await?)
    });
    run.await?.ok_or_else(unreadable)
}

fn plain(backfill: &Backfill, begin: &Begin) -> OpenPlain {
    let means = &backfill.means;
    OpenPlain {
        connections: Arc::clone(&means.advisory.connections),
        begin: begin.clone(),
        call_site: means.call_site,
        lock_wait: means.lock_wait,
    }
}

fn policy(backfill: &Backfill) -> Policy {
    let policy = backfill.means.policy.clone();
    Policy {
        attempts: u32::MAX,
        deadline: Some(backfill.patience),
        // Those who queued behind a batch that waited have time to go on.
        backoff: Backoff::new(
            backfill.lock_timeout,
            backfill.lock_timeout.saturating_mul(10),
        ),
        // The application's own retries are not to pay for it, and its patience has an end.
        budget: Arc::new(RetryBudget::new(1, 0, 0)),
        resolves: true,
        reporter: policy
            .reporter
            .map(|reporter| Arc::new(Rarely(reporter)) as Arc<dyn Reporter>),
        ..policy
    }
}

/// Reports what is worth it: a batch that has met a lock and will be tried again is all in a day's work.
#[derive(Debug)]
struct Rarely(Arc<dyn Reporter>);

impl Reporter for Rarely {
    fn failed(&self, failed: &FailedAttempt<'_>) -> Option<Box<dyn Report>> {
        if failed.pause.is_some() && classify_db(failed.error) != Failure::Deadlock {
            return None;
        }
        self.0.failed(failed)
    }
}

fn unreadable() -> Error {
    Error::new(ErrorKind::Database).with_detail("the server's answer to a backfill cannot be read")
}
