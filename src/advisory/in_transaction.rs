//! More locks for a transaction that has begun.

use std::future::IntoFuture;
use std::pin::Pin;
use std::time::Duration;

use tracing::Instrument as _;

use super::preconditions::{check_capacity_on, check_locking, is_worth_counting};
use super::{LockRequest, sql};
use crate::advisory::sql::TryLockOutcome;
use crate::connection::sql::server::Server;
use crate::connection::{LockScope, PendingStatement, Sent, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify, classify_db};
use crate::key::LockKey;
use crate::meter::Waiting;
use crate::mode::AdvisoryMode;
use crate::transaction::{Tx, check_not_held};

/// Locks to be taken in a transaction that has begun: awaited, it waits for them.
///
/// From [`Tx::advisory_lock`].
#[must_use = "a description takes no lock until it is awaited"]
#[derive(Debug)]
pub struct TxAdvisoryLock<'a> {
    tx: &'a mut Tx,
    keys: Vec<LockKey>,
    mode: AdvisoryMode,
    wait: Duration,
}

impl Tx {
    /// One more transaction-level advisory lock, held until this transaction ends.
    ///
    /// Await it to take the lock, waiting at most the keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait), or what
    /// [`wait`](TxAdvisoryLock::wait) says. Locks taken one after another can deadlock with transactions that take them
    /// in another order; [`advisory_locks`](Self::advisory_locks) sorts them.
    ///
    /// ```no_run
    /// # async fn example(tx: &mut lockkeeper::Tx) -> Result<(), lockkeeper::Error> {
    /// tx.advisory_lock("acct:7").await?;
    /// if !tx.advisory_lock("acct:8").shared().try_acquire().await? {
    ///     println!("acct:8 is busy");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// A lock that the transaction holds already is not taken twice. Asking for it in the other mode is an error: two
    /// sessions that turn a shared lock into an exclusive one wait for each other for ever.
    ///
    /// # SQL
    /// `SELECT pg_try_advisory_xact_lock(…)`, one round trip when it is free. When it is not, the wait is one more
    /// message, in a savepoint of its own and under a `lock_timeout` of the whole wait, after which the timeouts are what
    /// they were. It waits on the transaction's own connection, so it is not one of those
    /// [waiters](crate::Keeper#waiting) whose number is bounded, and it does not step back for an index that is being
    /// [built](crate::Keeper#waiting): what its transaction has done would be lost. A deadlock with the builder is the
    /// server's to find.
    ///
    /// # Errors
    /// [`LockTimeout`](ErrorKind::LockTimeout) with the blockers: the transaction stays usable.
    /// [`Config`](ErrorKind::Config) when the transaction's isolation level is REPEATABLE READ or SERIALIZABLE: it reads
    /// from a snapshot older than the lock would be, so the lock would protect nothing that is read; take the lock with
    /// [`Keeper::advisory_lock`](crate::Keeper::advisory_lock) and its `isolation` instead. [`Deadlock`](ErrorKind::Deadlock)
    /// and the connection's errors end the transaction.
    ///
    /// # Cancel safety
    /// A wait that is dropped is cancelled on the server, which fails the transaction, or a later statement of it, or comes
    /// too late: roll it back.
    ///
    /// # Longest silence
    /// The wait, and one [`longest_silence`](crate::KeeperBuilder::longest_silence).
    pub fn advisory_lock(&mut self, key: impl Into<LockKey>) -> TxAdvisoryLock<'_> {
        self.advisory_locks([key])
    }

    /// Several more locks: sorted, without repeats, all or none of them, under one total wait.
    ///
    /// As [`advisory_lock`](Self::advisory_lock).
    pub fn advisory_locks<K: Into<LockKey>>(
        &mut self,
        keys: impl IntoIterator<Item = K>,
    ) -> TxAdvisoryLock<'_> {
        let wait = self.lock_wait();
        TxAdvisoryLock {
            tx: self,
            keys: keys.into_iter().map(Into::into).collect(),
            mode: AdvisoryMode::Exclusive,
            wait,
        }
    }
}

impl<'a> TxAdvisoryLock<'a> {
    /// Held together with other shared holders, never with an exclusive one.
    pub fn shared(mut self) -> Self {
        self.mode = AdvisoryMode::Shared;
        self
    }

    /// How long to wait in all.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Takes the locks if they are free; `false`, and none is taken, if one of them is not.
    ///
    /// # Errors
    /// As [`Tx::advisory_lock`], without `LockTimeout`.
    ///
    /// # Cancel safety
    /// Dropped, the locks may have been taken; they end with the transaction.
    ///
    /// # Longest silence
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) for each of at most three messages.
    pub async fn try_acquire(self) -> Result<bool, Error> {
        let (tx, request) = self.checked()?;
        let pending = begin_call(tx, "try_advisory_lock", &request);
        let call = request.call("tx.try_advisory_lock", tx.session().connections());
        let tried = try_once(tx, request).instrument(call.span()).await;
        let locked = call
            .tried(tried.map(Result::ok))
            .map(|tried| tried.is_some());
        end(pending, &locked);
        locked
    }

    async fn acquire(self) -> Result<(), Error> {
        let deadline = Deadline::after(self.wait);
        let (tx, request) = self.checked()?;
        let pending = begin_call(tx, "advisory_lock", &request);
        let call = request.call("tx.advisory_lock", tx.session().connections());
        let locked = async {
            match try_once(tx, request).await? {
                Ok(()) => Ok(()),
                Err((tx, request, server)) => wait(tx, request, server.as_ref(), &deadline).await,
            }
        }
        .instrument(call.span())
        .await;
        let locked = call.acquired(locked);
        end(pending, &locked);
        locked
    }

    /// Refuses what would change the mode of a lock that is held.
    ///
    /// A lock that is held in the same mode is asked for again all the same: the server grants it at once, and it alone
    /// knows whether a savepoint that was rolled back has returned it.
    fn checked(self) -> Result<(&'a mut Tx, Box<LockRequest>), Error> {
        let request = LockRequest::new(self.keys, self.mode, self.wait)?;
        let session = self.tx.session();
        let (connections, own) = (session.connections(), Some(session.id()));
        check_not_held(connections, own, request.keys(), self.mode, || {
            let site = self.tx.call_site();
            site.map_or(String::new(), |site| {
                format!(" in the transaction of {site}")
            })
        })?;
        for key in request.keys() {
            if let Some(held) = self.tx.mode_of(key).filter(|held| *held != self.mode) {
                return Err(Error::config(format!(
                    "held on this connection as {held} already, and a lock's mode is not changed while it is held; take \
                     it as {} first",
                    self.mode
                ))
                .with_key(key));
            }
        }
        Ok((self.tx, request))
    }
}

impl<'a> IntoFuture for TxAdvisoryLock<'a> {
    type Output = Result<(), Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.acquire())
    }
}

/// Notes the request in the transaction's journal.
fn begin_call(tx: &Tx, call: &str, request: &LockRequest) -> Option<PendingStatement> {
    let mut text = format!("{call}({}", request.keys()[0]);
    if let more @ 1.. = request.keys().len() - 1 {
        text.push_str(&format!(" and {more} more"));
    }
    text.push(')');
    tx.session().begin_statement(Sent::Call(&text))
}

fn end<T>(pending: Option<PendingStatement>, locked: &Result<T, Error>) {
    if let Some(pending) = pending {
        let error = locked.as_ref().err();
        pending.end(error.map(|error| error.as_db_error().map_or(Failure::Driver, classify_db)));
    }
}

/// A lock that was busy, with all that is needed to wait for it.
type Busy<'a> = (&'a mut Tx, Box<LockRequest>, Option<Server>);

async fn try_once(tx: &mut Tx, request: Box<LockRequest>) -> Result<Result<(), Busy<'_>>, Error> {
    if is_worth_counting(request.keys()) {
        check_capacity_on(tx.session(), request.keys(), true).await?;
    }
    let several = request.keys().len() > 1;
    let sql = if several {
        sql::try_at_savepoint(request.locks())
    } else {
        sql::try_in_transaction(request.locks())
    };
    let failed =
        |error: tokio_postgres::Error| request.error(classify(&error).kind()).with_source(error);
    let reply = tx.session().message(&sql).await.map_err(failed)?;
    let Some(tried) = sql::tried(&reply) else {
        return Err(no_answer(&request));
    };
    if several {
        let end = if tried.verdict == TryLockOutcome::Granted {
            sql::KEEP_TRIED
        } else {
            sql::UNDO_TRIED
        };
        tx.session().message(end).await.map_err(failed)?;
    }
    match tried.verdict {
        TryLockOutcome::Granted => {
            check_locking(tx.session(), LockScope::Transaction, tried.server.as_ref(), request.locks()).await?;
            hold(tx, *request);
            Ok(Ok(()))
        }
        TryLockOutcome::Snapshot if request.keys().iter().all(|key| tx.mode_of(key).is_some()) => Ok(Ok(())),
        TryLockOutcome::Busy => Ok(Err((tx, request, tried.server))),
        TryLockOutcome::Snapshot => Err(request.error(ErrorKind::Config).with_detail(
            "this transaction's isolation level reads from a snapshot taken before the lock; take the lock first, with \
             the keeper's advisory_lock(…).isolation(…), or use READ COMMITTED",
        )),
        _ => Err(super::acquire::standby(&request)),
    }
}

fn no_answer(request: &LockRequest) -> Error {
    request
        .error(ErrorKind::Database)
        .with_detail("no answer to a lock request")
}

async fn wait(
    tx: &mut Tx,
    request: Box<LockRequest>,
    server: Option<&Server>,
    deadline: &Deadline,
) -> Result<(), Error> {
    let _counted = Waiting::begin();
    let mut after_timeout = false;
    while !deadline.has_passed() {
        let wait = deadline.remaining();
        // A second time only where the wait is longer than the longest lock_timeout.
        let sql = if after_timeout {
            sql::wait_at_savepoint_again(request.locks(), wait)
        } else {
            sql::wait_at_savepoint(request.locks(), wait)
        };
        // Cancel safety: a waiter nobody waits for is cancelled, by the drop of this.
        let cancel = scopeguard::guard(tx.session(), Session::cancel_in_background);
        let answer = tx.session().message_waiting(&sql, wait).await;
        let _: &Session = scopeguard::ScopeGuard::into_inner(cancel);
        let Err(error) = answer else {
            hold(tx, *request);
            return Ok(());
        };
        if classify(&error) != Failure::LockTimeout {
            return Err(request
                .error(classify(&error).kind())
                .with_waited(deadline.waited())
                .with_source(error));
        }
        after_timeout = true;
    }
    let denied = server.map_or_else(|| tx.session().denied(), |server| server.denied);
    if !after_timeout {
        // No wait at all: only the savepoint that is gone back to below.
        tx.session().message(sql::MARK).await?;
    }
    let reply = tx
        .session()
        .message(&sql::undo_wait_at_savepoint(request.locks(), denied))
        .await?;
    Err(super::acquire::timed_out(
        &request, deadline, &reply, denied,
    ))
}

fn hold(tx: &mut Tx, request: LockRequest) {
    for key in request.keys() {
        tracing::debug!(%key, mode = %request.mode(), "advisory lock acquired in a transaction");
    }
    let depth = tx.depth();
    tx.hold(request.into_held(depth));
}
