//! Session-level locks, held on a connection of their own until they are released.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::release::{ReleasePlan, is_unlocked};
use super::wait_queue::{HeldKeys, WaitQueue};
use super::{LockRequest, sql};
use crate::advisory::sql::Locks;
use crate::call_site::CallSite;
use crate::connection::sql::Probe;
use crate::connection::sql::server::{is_fresh, xact_start};
use crate::connection::{Loss, LossSignal, OnAbandon, Session, query_methods, run_shielded};
use crate::error::{Error, ErrorKind, Failure, classify, is_failed_check};
use crate::key::LockKey;
use crate::key::names::Registration;
use crate::meter::{Held, milliseconds};
use crate::mode::AdvisoryMode;
use crate::postgres::sql::Message;
use crate::transaction::sql::{Begin, begin_transaction};
use crate::transaction::{AsyncFunc, Carried, Carry, Resolve, TransactionOptions, Tx, commit};

/// Session-level advisory locks, held over any number of transactions.
///
/// The guard owns the connection that holds the locks, and the locks live no longer than that connection: when it ends
/// (the backend is terminated, the server restarts, the network fails) they are gone, whatever this process believes.
/// [`is_lost`](Self::is_lost) and [`loss`](Self::loss) tell without waiting for a query, and [`run`](Self::run) ends work when
/// they are gone. Work that must not happen without the
/// lock is safest on the guard's own connection, with [`transaction`](Self::transaction): it fails with it.
///
/// The connection goes by the call site in `application_name` while it holds the locks.
///
/// # Dropping
/// The unlock is sent at once, without waiting; the connection is back in the pool when the server has said that the
/// locks are gone, and closed when it says anything else.
///
/// Where others wait for the same key through the same [`Keeper`](crate::Keeper), exclusively and for the session, they
/// wait in line without a connection, first come, first served. The first of them takes the connection over instead of
/// the pool, if nothing was run on it and nobody waits for one of the pool's: the message that unlocks tries the lock once
/// more in its name. Waiters of other processes, which stand in the server's own queue, come first.
#[must_use = "dropping the guard releases the lock at once"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct SessionGuard {
    // `None` while a transaction has it, and after the end.
    session: Option<Session>,
    keys: Vec<LockKey>,
    mode: AdvisoryMode,
    _names: Vec<Registration>,
    /// The session's own `application_name`, to be put back.
    application_name: Option<String>,
    /// The name of the prepared `try`, with which its unlock was prepared.
    prepared: Option<Arc<str>>,
    /// Where others of this process wait for its session.
    queue: Option<Arc<WaitQueue>>,
    call_site: Option<CallSite>,
    lock_wait: Duration,
    since: Instant,
    loss: LossSignal,
    _counted: Held,
    #[cfg(feature = "coordination")]
    issued: Option<(i64, i64)>,
}

impl SessionGuard {
    pub(super) fn new(
        mut session: Session,
        request: LockRequest,
        application_name: Option<String>,
        prepared: Option<Arc<str>>,
        held: HeldKeys,
    ) -> Self {
        let mode = request.mode();
        let call_site = request.call_site;
        session.mark_locked();
        let queue = held.queue_to_hand_over();
        session.keep_until_clean(Box::new(held));
        // Ends that of the guard which has handed the session over, if there was one.
        drop(session.begin_observation(call_site, None, true));
        let lock_wait = request.lock_wait;
        let (keys, names) = request.into_parts();
        let loss = LossSignal::new();
        let searched: Vec<_> = keys.iter().take(sql::MOST_SEARCHED).cloned().collect();
        let are_held = move || {
            let keys = &searched;
            sql::are_held(Locks { keys, mode })
        };
        session.watch(&loss, are_held);
        let counted = Held::begin(&keys[0], "session");
        Self {
            session: Some(session),
            keys,
            mode,
            _names: names,
            application_name,
            prepared,
            queue,
            call_site,
            lock_wait,
            since: Instant::now(),
            loss,
            _counted: counted,
            #[cfg(feature = "coordination")]
            issued: None,
        }
    }

    pub(crate) fn session(&self) -> &Session {
        self.session
            .as_ref()
            .expect("a guard has its session until it ends")
    }

    pub(super) fn locks(&self) -> Locks<'_> {
        Locks {
            keys: &self.keys,
            mode: self.mode,
        }
    }

    /// The keys held, sorted.
    #[must_use]
    pub fn held_keys(&self) -> &[LockKey] {
        &self.keys
    }

    /// How they are held.
    #[must_use]
    pub fn mode(&self) -> AdvisoryMode {
        self.mode
    }

    /// For how long they have been held.
    #[must_use]
    pub fn held_for(&self) -> Duration {
        self.since.elapsed()
    }

    /// The backend's process id, as `pg_locks` and `pg_stat_activity` show it.
    #[must_use]
    pub fn backend_pid(&self) -> Option<i32> {
        self.session().server_pid()
    }

    /// Whether the locks are lost: the connection has ended, or the server does not answer, or does not show them any more.
    /// Costs nothing, and sends nothing.
    ///
    /// A server that ends the connection is noticed at once. A server that vanishes without a word (a power cut, a
    /// network that drops packets) is noticed by the [`heartbeat`](crate::KeeperBuilder::heartbeat), within 13 seconds by
    /// default, while the guard is idle; during a statement after
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence). Whether such a server still holds the locks cannot be
    /// known.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.loss.is_lost() || self.session.as_ref().is_none_or(Session::is_closed)
    }

    /// A future that completes when the locks are lost, or released. It is owned, so that it can stand in a `select!` beside a
    /// [`transaction`](Self::transaction) of the guard, or in another task. See [`Loss`].
    ///
    /// It completes within a fifth of a second after the end of the connection, mostly within 20 ms, and as
    /// [`is_lost`](Self::is_lost) says otherwise. The runtime in which the guard was acquired finds that out, and its end counts as
    /// a loss.
    pub fn loss(&self) -> Loss {
        self.loss.loss()
    }

    /// Runs work, and ends it when the locks are lost: its future is dropped where it stands.
    ///
    /// Dropping it ends neither what it has spawned nor what it has sent to other servers. For what must not happen without
    /// the lock use a [`transaction`](Self::transaction), whose COMMIT fails without it.
    ///
    /// # Errors
    /// [`LockLost`](ErrorKind::LockLost) where the locks were lost before the work was done. It says why. What the work had
    /// done by then stays done.
    ///
    /// # Cancel safety
    /// As the work's own. The locks stay held.
    ///
    /// # Longest silence
    /// As long as the work: it asks the server nothing.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn consume() {}
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let guard = keeper.advisory_lock("consumer").session().acquire().await?;
    /// guard.run(async { consume().await }).await?;
    /// guard.release().await
    /// # }
    /// ```
    pub async fn run<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        let done = self.loss.run(&self.keys[0], work).await?;
        if self.is_lost() {
            return Err(self.lost());
        }
        Ok(done)
    }

    fn lost(&self) -> Error {
        self.loss.error(&self.keys[0])
    }

    /// Releases the locks, and reports whether they were held to the end.
    ///
    /// A transaction that was left open on the guard's connection is rolled back.
    ///
    /// # SQL
    /// `SELECT pg_advisory_unlock(…)` and the session's former `application_name`: one round trip.
    ///
    /// # Errors
    /// [`LockLost`](crate::ErrorKind::LockLost) when the connection had ended (with the server's reason as its source, where that is
    /// known), or the server says that the lock was not
    /// held: somebody else may have held it since. Nothing is left to release then.
    ///
    /// # Cancel safety
    /// Once polled, the release continues in the background if this is dropped. A statement whose future was dropped may
    /// still be running on the guard's connection: it is cancelled, and the connection closed.
    ///
    /// # Longest silence
    /// Three times [`longest_silence`](crate::KeeperBuilder::longest_silence): for the answer, while what may still run on the
    /// connection is cancelled, and for the rollback of a transaction that was left open and has failed. A server that falls
    /// silent and stays so takes it at most twice.
    pub async fn release(mut self) -> Result<(), Error> {
        let lost = self.lost();
        let Some(mut session) = self.session.take() else {
            return Err(lost);
        };
        if session.is_closed() {
            // Boxed, because it is rare.
            let why = Box::pin(session.ending(session.idle())).await;
            return Err(match why {
                Some(why) => lost.with_source(why),
                None => lost,
            });
        }
        self.end_loss(&mut session);
        // Reported as lost before: others have acted on that, whatever the server says now.
        let was_lost = self.loss.is_lost();
        let ending = ReleasePlan::of(&self, &mut session);
        self.trace_end();
        let released = if ending.hands_off {
            // The next one shall not have to wait until this future is polled again.
            run_shielded(self.end(session, ending)).await
        } else {
            Some(self.end(session, ending).await)
        };
        match released {
            Some(Ok(())) if was_lost => Err(lost),
            Some(released) => released,
            None => Err(lost),
        }
    }

    async fn end(self, session: Session, ending: ReleasePlan) -> Result<(), Error> {
        let lost = self.lost();
        let ReleasePlan { message, then, .. } = ending;
        // A statement that was given up is cancelled; what became of the locks is asked all the same.
        let request = session.send(message, then.undo());
        let Some((session, answer)) = request.wait_cancelling().await else {
            return Err(lost.with_detail("no answer from the server, the connection was closed"));
        };
        match answer {
            Ok(reply) if !is_unlocked(&reply) => Err(lost),
            Ok(reply) => {
                then.read(&reply).carry_out(session).await;
                Ok(())
            }
            Err(error) => match classify(&error) {
                Failure::ConnectionLost | Failure::Driver => Err(lost.with_source(error)),
                // A transaction that failed and was left open refuses the unlock: it is ended first. And a cancel of a
                // statement that was given up can hit the unlock instead. Or somebody has deallocated it.
                failure @ (Failure::Aborted | Failure::Cancelled | Failure::MissingStatement) => {
                    let sql = format!("{}; {}", sql::ROLLBACK, self.release_text());
                    match session.send(sql, OnAbandon::Finish).answered().await {
                        Some((session, Ok(reply))) if is_unlocked(&reply) => {
                            session.mark_nothing_left();
                            session.return_to_pool();
                            Ok(())
                        }
                        // What was cancelled had unlocked already: the session is the same, and has lost nothing.
                        Some((_, Ok(_))) if failure == Failure::Cancelled => Ok(()),
                        Some((_, Ok(_))) => Err(lost),
                        Some((_, Err(error))) => Err(lost.with_source(error)),
                        None => Err(lost
                            .with_detail("no answer from the server, the connection was closed")),
                    }
                }
                // The connection is closed with the session, and that releases.
                failure => Err(Error::new(failure.kind())
                    .with_key(&self.keys[0])
                    .with_detail("the unlock failed, the connection was closed instead")
                    .with_source(error)),
            },
        }
    }

    /// Runs a transaction on the guard's own connection, so that it cannot commit once the locks are lost. The closure runs
    /// once, whatever fails.
    ///
    /// As [`transaction_with`](Self::transaction_with) and the defaults of [`TransactionOptions`].
    ///
    /// # Errors
    /// As [`transaction_with`](Self::transaction_with).
    ///
    /// # Cancel safety
    /// As [`transaction_with`](Self::transaction_with).
    ///
    /// # Longest silence
    /// As [`transaction_with`](Self::transaction_with).
    pub async fn transaction<R, E, F>(&mut self, f: F) -> Result<R, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send,
        E: From<Error> + Send,
        R: Send,
    {
        self.transaction_with(TransactionOptions::new(), f).await
    }

    /// Runs a transaction on the guard's own connection, as the options say: its isolation level, its timeouts, and whether
    /// a COMMIT whose answer is lost is looked up.
    ///
    /// It is run once, not retried, whatever the options say of attempts, and under no conflict group: `Ok` commits, `Err`
    /// rolls back. The locks stay held either way. COMMIT is run only if the connection still holds them, by the
    /// server's word in the same message.
    ///
    /// # Errors
    /// The closure's own; an [`Error`], with the guard's first key, where the transaction cannot begin or commit:
    /// [`LockLost`](ErrorKind::LockLost) where the connection has ended, or holds the locks no more, and nothing is
    /// committed; [`Config`](ErrorKind::Config) where a transaction was left open on the guard before (one that has failed
    /// is rolled back instead; one that has not fails where the options set an isolation level);
    /// [`TransactionEnded`](ErrorKind::TransactionEnded) where the closure has ended the transaction itself; otherwise as
    /// [`XactGuard::commit`](crate::XactGuard::commit).
    ///
    /// # Cancel safety
    /// Dropped, the transaction is rolled back; the locks stay held. Dropped during COMMIT, it may have committed.
    ///
    /// # Longest silence
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) for each of BEGIN, COMMIT and ROLLBACK; and what the
    /// options say for looking COMMIT up. A statement in the closure: twice that, and up to a second more.
    pub async fn transaction_with<R, E, F, P>(
        &mut self,
        options: TransactionOptions<P>,
        f: F,
    ) -> Result<R, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send,
        E: From<Error> + Send,
        R: Send,
        P: Send,
    {
        options.check()?;
        if self.is_lost() {
            return Err(self.lost().into());
        }
        let begin = options.begin(None);
        let mut loan = Loan::new(self, options.resolve());
        drop(options);
        loan.begin(&begin).await?;
        match f(loan.tx_mut()).await {
            Ok(value) => {
                loan.commit().await?;
                Ok(value)
            }
            Err(error) => {
                loan.rollback().await;
                Err(error)
            }
        }
    }

    /// How long a lock may be waited for on the guard's connection where the call does not say.
    #[cfg(feature = "coordination")]
    pub(crate) fn lock_wait(&self) -> Duration {
        self.lock_wait
    }

    /// Has the server say that the connection holds the locks.
    ///
    /// Cancel safety: dropped, the question stays unanswered, and the connection is not used again after the guard.
    #[cfg(feature = "coordination")]
    pub(crate) async fn confirm(&self) -> Result<(), Error> {
        let lost = Error::new(ErrorKind::LockLost).with_key(&self.keys[0]);
        if self.is_lost() {
            return Err(lost);
        }
        let check = sql::check_held(self.locks());
        let confirmed = self.session().message(&check).await;
        confirmed.map(drop).map_err(|error| lost.with_source(error))
    }

    /// The fencing token of this tenure, once it is issued.
    #[cfg(feature = "coordination")]
    pub(crate) fn issued(&mut self) -> &mut Option<(i64, i64)> {
        &mut self.issued
    }

    pub(super) fn application_name(&self) -> Option<&str> {
        self.application_name.as_deref()
    }

    /// The name of the prepared `try`.
    pub(super) fn prepared(&self) -> Option<&str> {
        self.prepared.as_deref()
    }

    pub(super) fn queue(&self) -> Option<&Arc<WaitQueue>> {
        self.queue.as_ref()
    }

    pub(super) fn release_text(&self) -> String {
        sql::unlock(self.locks(), self.application_name.as_deref())
    }

    /// Who works under the locks is told to end, and no heartbeat comes behind what releases them.
    fn end_loss(&self, session: &mut Session) {
        self.loss.release();
        session.end_watch();
    }

    fn trace_end(&self) {
        for key in &self.keys {
            tracing::debug!(%key, mode = %self.mode, held_ms = milliseconds(self.since.elapsed()), "session lock released");
        }
    }
}

query_methods!(SessionGuard);

impl Drop for SessionGuard {
    fn drop(&mut self) {
        if let Some(mut session) = self.session.take() {
            self.end_loss(&mut session);
            self.trace_end();
            let ReleasePlan { message, then, .. } = ReleasePlan::of(self, &mut session);
            session.send(message, then.undo()).detach();
        }
    }
}

/// The guard's session lent to a transaction. However it ends, the session goes back to the guard.
struct Loan<'a> {
    guard: &'a mut SessionGuard,
    tx: Option<Tx>,
    /// The session that was lent.
    session: Option<u64>,
    /// Whether dropping has a transaction to roll back.
    open: AtomicBool,
}

impl<'a> Loan<'a> {
    fn new(guard: &'a mut SessionGuard, resolve: Option<Resolve>) -> Self {
        let tx = guard.session.take().map(|session| {
            let locks = guard.keys.iter().map(|key| (key.clone(), guard.mode));
            Tx::new(session, guard.call_site, guard.lock_wait, None)
                .session_locks(locks)
                .of_attempt(1, resolve)
        });
        let session = tx.as_ref().map(|tx| tx.session().id());
        Self {
            guard,
            tx,
            session,
            open: AtomicBool::new(true),
        }
    }

    fn session(&self) -> &Session {
        self.tx
            .as_ref()
            .expect("the loan has its transaction until it ends")
            .session()
    }

    fn tx_mut(&mut self) -> &mut Tx {
        self.tx
            .as_mut()
            .expect("the loan has its transaction until it ends")
    }

    async fn begin(&mut self, begin: &Begin) -> Result<(), Error> {
        let begin = begin_transaction(begin, &Probe::Minimal).text;
        let begun = match self.session().message(&begin).await {
            // A failed transaction was left open before: it is ended, and this one begun.
            Err(error) if classify(&error) == Failure::Aborted => {
                let again = format!("{}; {begin}", sql::ROLLBACK);
                self.session().message(&again).await
            }
            begun => begun,
        };
        let left_open = || {
            Error::new(ErrorKind::Config).with_detail(
                "a transaction was left open on the guard; commit it or roll it back before another one is begun",
            )
        };
        let failed = match begun {
            Ok(reply) if is_fresh(&reply) => {
                self.session().mark_begun_at(xact_start(&reply));
                return Ok(());
            }
            Ok(_) => left_open(),
            // It has run a statement already, so that it can have no other isolation level.
            Err(error) if classify(&error) == Failure::InTransaction => {
                left_open().with_source(error)
            }
            Err(error) if classify(&error) == Failure::ConnectionLost => {
                Error::new(ErrorKind::LockLost).with_source(error)
            }
            Err(error) => error.into(),
        };
        self.open.store(false, Ordering::Relaxed);
        Err(failed.with_key(&self.guard.keys[0]))
    }

    async fn commit(mut self) -> Result<(), Error> {
        let key = self.guard.keys[0].clone();
        let lost = || Error::new(ErrorKind::LockLost).with_key(&key);
        if let (Some(tx), Some(session)) = (&self.tx, self.session) {
            tx.check_session(session)
                .map_err(|error| error.with_key(&key))?;
        }
        if self.session().is_closed() {
            self.open.store(false, Ordering::Relaxed);
            return Err(lost());
        }
        let resolve = self.tx_mut().resolve();
        let check = sql::check_held(self.guard.locks());
        let (_, committed) = commit(&self, resolve, Some(&check)).await;
        self.open.store(false, Ordering::Relaxed);
        let committed = match committed {
            // By the check, or by COMMIT itself: the check alone tells.
            Err(error)
                if is_failed_check(&error) && self.session().message(&check).await.is_err() =>
            {
                Err(lost().with_detail("the connection no longer holds it; nothing is committed"))
            }
            committed => committed,
        };
        let committed = self.tx_mut().finish(committed);
        committed.map_err(|error| error.with_key(&key))
    }

    async fn rollback(self) {
        self.open.store(false, Ordering::Relaxed);
        // An error here means that the connection is gone, which the guard notices by itself.
        drop(self.session().message(sql::ROLLBACK).await);
    }
}

/// Cancel safety: dropped, what was sent goes on, and whoever has the session finds it unanswered.
impl Carry for &Loan<'_> {
    fn session(&self) -> &Session {
        Loan::session(self)
    }

    async fn carry(self, message: Message, undo: OnAbandon) -> Option<(Self, Carried)> {
        if let OnAbandon::Finish = undo {
            // It is on its way and ends the transaction, so a drop must not.
            self.open.store(false, Ordering::Relaxed);
        }
        let answer = Loan::session(self).message(&message.text).await;
        Some((self, answer))
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        let Some(session) = self.tx.take().and_then(Tx::into_session) else {
            return;
        };
        if Some(session.id()) != self.session {
            // Exchanged for the session of another transaction. Closed, it is rolled back, and the guard has lost its own.
            return;
        }
        if self.open.load(Ordering::Relaxed) {
            session.queue(sql::ROLLBACK);
        }
        // Whatever is sent later finds it ended.
        session.mark_ended();
        self.guard.session = Some(session);
    }
}
