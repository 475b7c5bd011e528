//! A transaction that owns its connection.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use super::hooks::Hooks;
use super::report::{AfterFailure, Deferred, FailedAttempt, Reporting};
use super::runner::is_about_locks;
use super::section::Section;
use super::{HeldLock, Resolve, sql};
use crate::call_site::CallSite;
use crate::connection::{Observation, OnAbandon, Session, query_methods};
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::meter::{Held, milliseconds};
use crate::mode::AdvisoryMode;

/// An open transaction on a connection of its own.
///
/// It has the driver's query methods. Closures get it as `&mut Tx`; whoever runs the closure commits or rolls back.
/// When it is dropped, ROLLBACK is sent at once, and the connection goes back to the pool after the server has answered
/// it.
#[must_use = "a transaction that is not used is rolled back when it is dropped"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct Tx {
    // Invariant: `Some` until the transaction ends; an open transaction is on it.
    pub(super) session: Option<Session>,
    held: Vec<HeldLock>,
    /// Session locks on the same connection, which are not this transaction's.
    session_locks: Vec<(LockKey, AdvisoryMode)>,
    depth: u32,
    call_site: Option<CallSite>,
    lock_wait: Duration,
    pub(super) hooks: Hooks,
    /// How a COMMIT whose answer is lost is looked up.
    pub(super) resolve: Option<Resolve>,
    attempt: u32,
    /// Who is told of failures that a savepoint catches.
    reporting: Option<Reporting>,
    caught: Vec<Caught>,
    /// The section whose closure it is given to.
    section: Option<Arc<Section>>,
    /// The observation of the guard that has lent the session.
    outer: Option<Observation>,
}

/// A failure that a savepoint was rolled back for.
struct Caught {
    /// Which of the session's failures it is.
    failure: u64,
    report: Deferred,
}

impl fmt::Debug for Caught {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caught")
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

/// What ends a transaction's life by its owner's will.
pub(super) enum End {
    Commit,
    Rollback,
}

impl Tx {
    /// A transaction that has begun on `session`.
    pub(crate) fn new(
        mut session: Session,
        call_site: Option<CallSite>,
        lock_wait: Duration,
        lock_timeout: Option<Duration>,
    ) -> Self {
        session.mark_begun();
        let outer = session.begin_observation(call_site, lock_timeout, false);
        Self {
            session: Some(session),
            held: Vec::new(),
            session_locks: Vec::new(),
            depth: 0,
            call_site,
            lock_wait,
            hooks: Hooks::default(),
            resolve: None,
            attempt: 1,
            reporting: None,
            caught: Vec::new(),
            section: None,
            outer,
        }
    }

    /// Notes which attempt of its runner this is, and how COMMIT is looked up where its answer is lost.
    pub(crate) fn of_attempt(mut self, attempt: u32, resolve: Option<Resolve>) -> Self {
        self.attempt = attempt;
        self.resolve = resolve;
        self
    }

    /// Has failures reported that a savepoint catches.
    pub(crate) fn report_to(&mut self, reporting: Reporting) {
        self.reporting = Some(reporting);
    }

    /// Notes that a savepoint was rolled back for a failure. It is reported when the transaction ends, unless it is that
    /// failure which ends it.
    ///
    /// Cancel safety: dropped, the failure is not reported.
    pub(super) async fn note_caught(&mut self, error: &DbError) {
        if !is_about_locks(error) {
            return;
        }
        let (Some(reporting), Some(observed)) = (&self.reporting, self.session().observed()) else {
            return;
        };
        let (reporting, observed) = (reporting.clone(), Arc::clone(observed));
        let failure = self.session().failures();
        let failed = FailedAttempt {
            observed: &observed,
            error,
            attempt: reporting.attempt,
            attempts: reporting.attempts,
            then: AfterFailure::Continue,
        };
        reporting.reporter.look_up(&failed).await;
        let Some(report) = Arc::clone(&reporting.reporter).caught(&failed) else {
            return;
        };
        // An outer savepoint that is rolled back for the same failure.
        self.caught.retain(|caught| caught.failure != failure);
        self.caught.push(Caught { failure, report });
    }

    /// Reports no failure that is the transaction's still.
    pub(super) fn forget_caught(&mut self) {
        let session = self.session();
        if session.failure().is_some() {
            let failure = session.failures();
            self.caught.retain(|caught| caught.failure != failure);
        }
    }

    fn report_caught(&mut self) {
        for caught in self.caught.drain(..) {
            (caught.report)();
        }
    }

    /// The section that its closure runs in.
    pub(super) fn begin_section(&mut self) -> Arc<Section> {
        let session = self.session();
        let connections = session.connections();
        let section = Section::new(connections, session.id(), self.call_site, &self.held);
        self.section = Some(Arc::clone(&section));
        section
    }

    /// Tells its section what it holds.
    fn note_held(&self) {
        if let Some(section) = &self.section {
            section.note(&self.held);
        }
    }

    pub(crate) fn resolve(&self) -> Option<Resolve> {
        self.resolve
    }

    pub(crate) fn session(&self) -> &Session {
        self.session
            .as_ref()
            .expect("a transaction has its session until it ends")
    }

    /// The backend's process id, as `pg_stat_activity` shows it; `None` where nothing has asked the server yet.
    #[must_use]
    pub fn backend_pid(&self) -> Option<i32> {
        self.session().server_pid()
    }

    /// Where in the code this transaction was asked for; `None` where call sites are switched off.
    #[must_use]
    pub fn call_site(&self) -> Option<&CallSite> {
        self.call_site.as_ref()
    }

    /// Which attempt of its section or transaction this is, from 1. An attempt that failed while it took its locks counts
    /// too, although the closure did not run. 1 where nothing runs it again.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The advisory locks that this transaction holds through this crate, in the order they were granted.
    pub fn held_keys(&self) -> impl Iterator<Item = &LockKey> {
        self.held.iter().map(|held| &held.key)
    }

    pub(crate) fn held(&self) -> &[HeldLock] {
        &self.held
    }

    pub(crate) fn hold(&mut self, locks: impl IntoIterator<Item = HeldLock>) {
        let locks: Vec<HeldLock> = locks.into_iter().collect();
        if let Some(observed) = self.session().observed() {
            let taken = locks.iter().map(|lock| (lock.key.clone(), lock.mode));
            observed.locks_taken(taken.collect());
        }
        let mut counted = false;
        for mut lock in locks {
            if !self.held.iter().any(|held| held.key.same_lock(&lock.key)) {
                // Those of one call count as one.
                if !std::mem::replace(&mut counted, true) {
                    lock.counted = Some(Held::begin(&lock.key, "transaction"));
                }
                self.held.push(lock);
            }
        }
        self.note_held();
    }

    pub(crate) fn holding(mut self, locks: impl IntoIterator<Item = HeldLock>) -> Self {
        self.hold(locks);
        self
    }

    /// Notes session locks that are held on the connection already.
    pub(crate) fn session_locks(
        mut self,
        locks: impl IntoIterator<Item = (LockKey, AdvisoryMode)>,
    ) -> Self {
        self.session_locks.extend(locks);
        self
    }

    /// How the key is held on this connection.
    pub(crate) fn mode_of(&self, key: &LockKey) -> Option<AdvisoryMode> {
        let held = self.held.iter().map(|held| (&held.key, held.mode));
        let session_locks = self.session_locks.iter().map(|(key, mode)| (key, *mode));
        held.chain(session_locks)
            .find(|(held, _)| held.same_lock(key))
            .map(|(_, mode)| mode)
    }

    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    pub(crate) fn enter_savepoint(&mut self) -> u32 {
        self.depth += 1;
        self.depth
    }

    /// Back outside the savepoint `depth`; rolled back, its locks have been returned.
    pub(crate) fn leave_savepoint(&mut self, depth: u32, rolled_back: bool) {
        self.depth = depth - 1;
        self.hooks.leave_savepoint(depth, rolled_back);
        if rolled_back {
            self.held.retain(|held| held.depth < depth);
        } else {
            for held in &mut self.held {
                held.depth = held.depth.min(self.depth);
            }
        }
        self.note_held();
    }

    /// Refuses a transaction that is not the one that a closure was given: in safe code two `&mut Tx` can be swapped.
    ///
    /// # Errors
    /// `TransactionEnded`.
    pub(crate) fn check_session(&self, id: u64) -> Result<(), Error> {
        if self
            .session
            .as_ref()
            .is_some_and(|session| session.id() == id)
        {
            return Ok(());
        }
        Err(Error::new(ErrorKind::TransactionEnded)
            .with_detail("it was exchanged for another transaction; both are rolled back"))
    }

    /// How long a lock may be waited for where the call does not say.
    pub(crate) fn lock_wait(&self) -> Duration {
        self.lock_wait
    }

    /// Gives the session out of a transaction whose end is somebody else's business from now on.
    pub(crate) fn into_session(mut self) -> Option<Session> {
        let mut session = self.session.take()?;
        session.resume_observation(self.outer.take());
        Some(session)
    }

    /// Has `hook` run once this transaction has been committed: after the server's answer, in the order they were given.
    ///
    /// It is not run when the transaction is rolled back, with the [`savepoint`](Self::savepoint) it was given in or as a
    /// whole, nor when COMMIT's outcome is not known. An attempt that is repeated starts without hooks. A hook must not
    /// block; for more than a moment's work spawn a task. A panic in one is logged, and the others run.
    ///
    /// # Cancel safety
    /// Where the future that commits is dropped half-way, the transaction may commit and the hook is not run: what must
    /// not be lost belongs into the transaction (an outbox table).
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// keeper
    ///     .transaction(async |tx| {
    ///         tx.execute("UPDATE invoice SET paid = true WHERE id = $1", &[&42_i64]).await?;
    ///         tx.after_commit(|| println!("paid"));
    ///         Ok::<_, lockkeeper::Error>(())
    ///     })
    ///     .await
    /// # }
    /// ```
    pub fn after_commit(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.push(self.depth, Box::new(hook));
    }

    /// ROLLBACK, after which the connection is back in the pool, or closed.
    ///
    /// Cancel safety: once polled it goes on in the background.
    pub(crate) async fn rollback(mut self) {
        self.trace_end(&End::Rollback);
        if let Some(session) = self.session.take() {
            super::commit::roll_back(session).await;
        }
    }

    pub(super) fn error_with_keys(&self, error: Error) -> Error {
        match self.held.first() {
            Some(held) => error.with_key(&held.key),
            None => error,
        }
    }

    pub(super) fn trace_end(&self, end: &End) {
        for held in &self.held {
            tracing::debug!(
                key = %held.key,
                mode = %held.mode,
                held_ms = milliseconds(held.since.elapsed()),
                by = match end {
                    End::Commit => "commit",
                    End::Rollback => "rollback",
                },
                "advisory lock released"
            );
        }
    }
}

query_methods!(Tx);

impl Drop for Tx {
    fn drop(&mut self) {
        self.report_caught();
        if let Some(session) = self.session.take() {
            self.trace_end(&End::Rollback);
            if !session.is_lost() {
                session.forget_prepared_if_untracked();
                session.send(sql::rollback(), OnAbandon::Finish).detach();
            }
        }
    }
}
