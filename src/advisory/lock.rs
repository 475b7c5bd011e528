//! The description of a lock that is to be taken.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::IsolationLevel;
use tracing::Instrument as _;

use super::{Advisory, LockRequest, LockedBy, OpenLocked, SessionGuard, XactGuard};
use crate::call_site::CallSite;
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::transaction::sql::Begin;
use crate::transaction::{
    AsyncFunc, NoRetry, RetryIf, RunsAgain, TransactionOptions, Tx, check_not_held, run,
};

/// What a lock is, and how it is taken.
#[derive(Clone, Debug)]
pub(crate) struct LockDescription {
    advisory: Arc<Advisory>,
    keys: Vec<LockKey>,
    mode: AdvisoryMode,
    wait: Duration,
    lock_wait: Duration,
    begin: Begin,
    call_site: Option<CallSite>,
}

impl LockDescription {
    pub(crate) fn new(
        advisory: Arc<Advisory>,
        keys: Vec<LockKey>,
        lock_wait: Duration,
        begin: Begin,
        call_site: Option<CallSite>,
    ) -> Self {
        Self {
            advisory,
            keys,
            mode: AdvisoryMode::Exclusive,
            wait: lock_wait,
            lock_wait,
            begin,
            call_site,
        }
    }

    /// Refuses a key that is to be locked in the same transaction, where a section of this task holds it.
    pub(crate) fn check_not_held(&self, key: &LockKey, mode: AdvisoryMode) -> Result<(), Error> {
        let (connections, keys) = (&self.advisory.connections, std::slice::from_ref(key));
        check_not_held(connections, None, keys, mode, || {
            at(self.call_site.as_ref())
        })
    }

    /// What a transaction of a conflict group runs under: a shared lock, or where it is to run alone an exclusive one.
    pub(crate) fn conflict_group(
        mut self,
        alone: bool,
    ) -> Result<(Arc<Advisory>, Box<LockRequest>), Error> {
        if !alone {
            self.mode = AdvisoryMode::Shared;
        }
        let (advisory, mut request) = self.request()?;
        request.is_group = true;
        Ok((advisory, request))
    }

    /// Checks what is asked for.
    pub(crate) fn request(self) -> Result<(Arc<Advisory>, Box<LockRequest>), Error> {
        let mut request = LockRequest::new(self.keys, self.mode, self.wait)?;
        let connections = &self.advisory.connections;
        check_not_held(connections, None, request.keys(), self.mode, || {
            at(self.call_site.as_ref())
        })?;
        request.begin = self.begin;
        request.call_site = self.call_site;
        request.lock_wait = self.lock_wait;
        Ok((self.advisory, request))
    }
}

/// One or several advisory locks, described. [`run`](Self::run) and [`try_run`](Self::try_run) run a section under them;
/// [`acquire`](Self::acquire) and [`try_acquire`](Self::try_acquire) give a guard.
///
/// From [`Keeper::advisory_lock`](crate::Keeper::advisory_lock). Transaction-scoped and exclusive unless said
/// otherwise; [`session`](Self::session) makes it a session lock.
#[must_use = "a description takes no lock until it is acquired or run"]
#[derive(Clone)]
pub struct AdvisoryLock<P = NoRetry> {
    lock: LockDescription,
    options: TransactionOptions<P>,
    once: bool,
}

impl AdvisoryLock {
    pub(crate) fn new(lock: LockDescription) -> Self {
        Self {
            lock,
            options: TransactionOptions::new(),
            once: false,
        }
    }
}

impl<P> fmt::Debug for AdvisoryLock<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdvisoryLock")
            .field("lock", &self.lock)
            .field("options", &self.options)
            .finish()
    }
}

impl<P> AdvisoryLock<P> {
    /// Held together with other shared holders, never with an exclusive one.
    pub fn shared(mut self) -> Self {
        self.lock.mode = AdvisoryMode::Shared;
        self
    }

    /// How long to wait in all, for a connection and for all of the locks; instead of the keeper's
    /// [`lock_wait`](crate::KeeperBuilder::lock_wait). Zero tries once. There is no upper limit.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.lock.wait = wait;
        self
    }

    /// The isolation level of the transaction; the session's default where it is not said.
    ///
    /// Under REPEATABLE READ and SERIALIZABLE the lock is taken before the transaction's snapshot, which costs one round
    /// trip more, so that what is read under the lock is what its last holder committed. Behind a transaction pooler
    /// that cannot be done, and is refused. Under SERIALIZABLE a commit can still fail with a serialization failure,
    /// although the lock was right: the server releases it before it forgets what the transaction has read.
    ///
    /// A session lock has no transaction of its own, and takes no notice of this.
    pub fn isolation(mut self, level: IsolationLevel) -> Self {
        self.lock.begin.isolation = Some(level);
        self
    }

    /// How the transaction is begun, and how often a section is tried: everything of [`TransactionOptions`], in the place of
    /// what was said before. An [`isolation`](Self::isolation) stays, unless the options have one.
    ///
    /// A guard is begun with them, and has nothing else of them: its caller runs it once. The lock of a
    /// [`conflict_group`](TransactionOptions::conflict_group) is taken after the locks described here, which costs one round
    /// trip more, and has a wait of its own, as long as the keeper's. Under REPEATABLE READ and SERIALIZABLE that is refused.
    pub fn options<Q>(self, options: TransactionOptions<Q>) -> AdvisoryLock<Q> {
        let mut lock = self.lock;
        let before = std::mem::replace(&mut lock.begin, options.begin(None));
        lock.begin.application_name = before.application_name;
        lock.begin.isolation = lock.begin.isolation.or(before.isolation);
        AdvisoryLock {
            lock,
            options,
            once: self.once,
        }
    }

    /// One attempt, whatever fails: a section never runs again.
    pub fn once(mut self) -> Self {
        self.once = true;
        self
    }

    /// A session lock instead: held over several transactions, until it is released.
    pub fn session(self) -> SessionAdvisoryLock {
        SessionAdvisoryLock { lock: self.lock }
    }

    /// Begins a transaction that holds the locks, waiting for them as long as [`wait`](Self::wait) says.
    ///
    /// Several keys are taken in one order, the same for all callers, all or none.
    ///
    /// # SQL
    /// One message, so one round trip, when the locks are free: `BEGIN`, `SET LOCAL application_name`, and a SELECT of
    /// `pg_try_advisory_xact_lock`. When they are not, one more message waits for `pg_advisory_xact_lock`: under a
    /// `lock_timeout` of what is left of the wait, without `statement_timeout` and `transaction_timeout`, and on Linux with a
    /// `client_connection_check_interval` of 500 ms. They are put back in the same message. Where the wait
    /// [cannot be watched](crate::Keeper#waiting) there are several such messages, one after another. How many wait at the server at a time is bounded, see
    /// [`Keeper`](crate::Keeper#waiting).
    ///
    /// # Errors
    /// [`Deadlock`](crate::ErrorKind::Deadlock) when the server finds that this call, which has been granted some of several
    /// keys, waits for a session that waits for one of those; [`LockTimeout`](crate::ErrorKind::LockTimeout) when the wait is over, with the [`blockers`](Error::blockers) where
    /// there was a connection to ask on in the end; [`Pool`](crate::ErrorKind::Pool) when no connection was to be had until
    /// then, not even to try the lock once, and nobody of this keeper stood in line for it;
    /// [`KeyCollision`](crate::ErrorKind::KeyCollision) and [`Config`](crate::ErrorKind::Config) before anything is
    /// sent; [`ReadOnlyServer`](crate::ErrorKind::ReadOnlyServer),
    /// [`NoAdvisoryLocks`](crate::ErrorKind::NoAdvisoryLocks) and [`OutOfLocks`](crate::ErrorKind::OutOfLocks) when the
    /// server cannot do it. [`AlreadyHeld`](crate::ErrorKind::AlreadyHeld) inside the closure of a section that holds one of
    /// the locks. Nothing is held after any of them.
    ///
    /// # Cancel safety
    /// May be dropped at any point. A wait under way is cancelled on the server and its connection closed; a lock that
    /// was granted meanwhile is released.
    ///
    /// # Longest silence
    /// The wait of the lock, and one [`longest_silence`](crate::KeeperBuilder::longest_silence). A silent connection is replaced while the wait lasts.
    pub async fn acquire(self) -> Result<XactGuard, Error> {
        self.options.check()?;
        let (advisory, request) = self.lock.request()?;
        let call = request.call("acquire", &advisory.connections);
        let acquired = advisory.acquire(request).instrument(call.span()).await;
        call.acquired(acquired).map(XactGuard::new)
    }

    /// The same if the locks are free; `None` if one of them is not. Never waits for a lock, only for a connection.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`acquire`](Self::acquire).
    ///
    /// # Longest silence
    /// As `acquire`, with the keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait) as its wait.
    pub async fn try_acquire(self) -> Result<Option<XactGuard>, Error> {
        self.options.check()?;
        let (advisory, request) = self.lock.request()?;
        let call = request.call("try_acquire", &advisory.connections);
        let tried = advisory.try_acquire(request).instrument(call.span()).await;
        let tx = call.tried(tried)?;
        Ok(tx.map(XactGuard::new))
    }

    /// Runs a section: one transaction that holds the locks. **It may run more than once**: after a deadlock, a serialization
    /// failure or a lock timeout inside, all of it runs again, from a clone of the closure. [`once`](Self::once) forbids it,
    /// [`Tx::attempt`] tells the attempt, and [`Tx::after_commit`] is for what may happen only once.
    ///
    /// A lock that the section holds is refused inside the closure, on any other connection of this keeper, with
    /// [`AlreadyHeld`](ErrorKind::AlreadyHeld): the section would wait for itself. The closure's own transaction takes it again
    /// ([`Tx::advisory_lock`]). Shared inside shared is not refused, but waits behind an exclusive request that has queued
    /// meanwhile. A task that is spawned inside the closure waits, and so do two sections that one task runs side by side.
    ///
    /// `Ok` commits, `Err` rolls back and comes back as it was. The locks are released by the end of the transaction, so
    /// the next holder sees what this one committed.
    ///
    /// # SQL
    /// Two round trips besides the section's own: `BEGIN`, settings and locks in one message, and COMMIT. See
    /// [`acquire`](Self::acquire).
    ///
    /// # Errors
    /// The closure's own; an [`Error`] as of [`acquire`](Self::acquire) and [`XactGuard::commit`], turned into the closure's
    /// error type; [`RetriesExhausted`](ErrorKind::RetriesExhausted) when every attempt failed.
    ///
    /// # Cancel safety
    /// May be dropped at any point: a waiting lock request is cancelled on the server, an open transaction rolled back.
    /// Dropped during COMMIT, it may have committed.
    ///
    /// # Longest silence
    /// As [`acquire`](Self::acquire), and then as [`Keeper::transaction_with`](crate::Keeper::transaction_with).
    ///
    /// # Examples
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let lock = keeper.advisory_lock(("invoice", "42")).wait(Duration::from_secs(2)).once();
    /// lock.run(async |tx| {
    ///     tx.execute("UPDATE invoice SET paid = true WHERE id = $1", &[&42_i64]).await?;
    ///     Ok::<_, lockkeeper::Error>(())
    /// })
    /// .await
    /// # }
    /// ```
    pub fn run<R, E, F>(self, f: F) -> impl Future<Output = Result<R, E>> + Send + use<P, R, E, F>
    where
        P: RetryIf<E>,
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        let running = self.section(LockedBy::Waiting, f);
        async move {
            let value = running.await?;
            value.ok_or_else(|| Error::new(ErrorKind::LockTimeout).into())
        }
    }

    /// The same if the locks are free; `None`, without running the section, if one of them is not. Never waits for a lock. As
    /// with [`run`](Self::run), the section may run more than once.
    ///
    /// # Errors
    /// As [`run`](Self::run), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`run`](Self::run).
    ///
    /// # Longest silence
    /// As [`run`](Self::run).
    pub fn try_run<R, E, F>(
        self,
        f: F,
    ) -> impl Future<Output = Result<Option<R>, E>> + Send + use<P, R, E, F>
    where
        P: RetryIf<E>,
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        self.section(LockedBy::Trying, f)
    }

    fn section<R, E, F>(
        self,
        how: LockedBy,
        f: F,
    ) -> impl Future<Output = Result<Option<R>, E>> + Send + use<P, R, E, F>
    where
        P: RetryIf<E>,
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + RunsAgain,
        E: From<Error> + Send,
        R: Send,
    {
        let Self {
            lock,
            mut options,
            once,
        } = self;
        if once {
            options = options.once();
        }
        let policy = lock.advisory.runner.policy(&options);
        let group = options.group().cloned();
        let open = OpenLocked { lock, how, group };
        async move {
            options.check()?;
            run(&policy, options.retries(), &open, f).await
        }
    }
}

/// Where something was asked for, as far as that is known.
fn at(site: Option<&CallSite>) -> String {
    site.map_or(String::new(), |site| format!(" at {site}"))
}

/// One or several session-level advisory locks, described; from [`AdvisoryLock::session`].
#[must_use = "a description takes no lock until it is acquired"]
#[derive(Clone, Debug)]
pub struct SessionAdvisoryLock {
    lock: LockDescription,
}

impl SessionAdvisoryLock {
    /// See [`AdvisoryLock::shared`].
    pub fn shared(mut self) -> Self {
        self.lock.mode = AdvisoryMode::Shared;
        self
    }

    /// See [`AdvisoryLock::wait`].
    pub fn wait(mut self, wait: Duration) -> Self {
        self.lock.wait = wait;
        self
    }

    /// Takes the locks, waiting for them as long as [`wait`](Self::wait) says.
    ///
    /// # SQL
    /// One message, so one round trip, when the locks are free: a SELECT of `pg_try_advisory_lock`, which sets
    /// `application_name` too if it gets them. When they are not free, waiting for a session lock directly would leak it
    /// when a timeout strikes late; so transaction locks are waited for, and
    /// the session locks are taken while those are held: `BEGIN`, `SELECT pg_advisory_xact_lock`,
    /// `SELECT pg_advisory_lock`, `COMMIT` in one message.
    ///
    /// # Errors
    /// As [`AdvisoryLock::acquire`], and [`TransactionPooler`](crate::ErrorKind::TransactionPooler) behind a pooler that
    /// does not keep one server session for each client.
    ///
    /// # Cancel safety
    /// May be dropped at any point. A wait under way is cancelled on the server and its connection closed; a lock that
    /// was granted meanwhile is released.
    ///
    /// # Longest silence
    /// As [`AdvisoryLock::acquire`].
    pub async fn acquire(self) -> Result<SessionGuard, Error> {
        let (advisory, request) = self.lock.request()?;
        let call = request.call("acquire_session", &advisory.connections);
        let span = call.span();
        call.acquired(advisory.acquire_session(request).instrument(span).await)
    }

    /// The same if the locks are free; `None` if one of them is not. Never waits for a lock, only for a connection.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`acquire`](Self::acquire).
    ///
    /// # Longest silence
    /// As [`AdvisoryLock::try_acquire`].
    pub async fn try_acquire(self) -> Result<Option<SessionGuard>, Error> {
        let (advisory, request) = self.lock.request()?;
        let call = request.call("try_acquire_session", &advisory.connections);
        let span = call.span();
        call.tried(advisory.try_acquire_session(request).instrument(span).await)
    }
}
