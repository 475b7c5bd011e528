//! The description of a lock that is to be taken.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::IsolationLevel;
use tracing::Instrument as _;

use super::{Advisory, LockRequest, SessionGuard, XactGuard};
use crate::call_site::CallSite;
use crate::error::Error;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::transaction::sql::Begin;

/// One or several advisory locks, described; [`acquire`](Self::acquire) and [`try_acquire`](Self::try_acquire) take
/// them in a transaction of their own.
///
/// From [`Keeper::advisory_lock`](crate::Keeper::advisory_lock). Transaction-scoped and exclusive unless said
/// otherwise; [`session`](Self::session) makes it a session lock.
#[must_use = "a description takes no lock until it is acquired"]
#[derive(Clone, Debug)]
pub struct AdvisoryLock {
    advisory: Arc<Advisory>,
    keys: Vec<LockKey>,
    mode: AdvisoryMode,
    wait: Duration,
    lock_wait: Duration,
    begin: Begin,
    call_site: Option<CallSite>,
}

impl AdvisoryLock {
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

    /// Held together with other shared holders, never with an exclusive one.
    pub fn shared(mut self) -> Self {
        self.mode = AdvisoryMode::Shared;
        self
    }

    /// How long to wait in all, for a connection and for all of the locks; instead of the keeper's
    /// [`lock_wait`](crate::KeeperBuilder::lock_wait). Zero tries once. There is no upper limit.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// The isolation level of the guard's transaction; the session's default where it is not said.
    ///
    /// Under REPEATABLE READ and SERIALIZABLE the lock is taken before the transaction's snapshot, which costs one round
    /// trip more, so that what is read under the lock is what its last holder committed. Behind a transaction pooler
    /// that cannot be done, and is refused. Under SERIALIZABLE a commit can still fail with a serialization failure,
    /// although the lock was right: the server releases it before it forgets what the transaction has read.
    ///
    /// A session lock has no transaction of its own, and takes no notice of this.
    pub fn isolation(mut self, level: IsolationLevel) -> Self {
        self.begin.isolation = Some(level);
        self
    }

    /// A session lock instead: held over several transactions, until it is released.
    pub fn session(self) -> SessionAdvisoryLock {
        SessionAdvisoryLock { lock: self }
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
    /// server cannot do it. Nothing is held after any of them.
    ///
    /// # Cancel safety
    /// May be dropped at any point. A wait under way is cancelled on the server and its connection closed; a lock that
    /// was granted meanwhile is released.
    ///
    /// # Longest silence
    /// The wait of the lock, and one [`longest_silence`](crate::KeeperBuilder::longest_silence). A silent connection is replaced while the wait lasts.
    pub async fn acquire(self) -> Result<XactGuard, Error> {
        let (advisory, request) = self.request()?;
        let span = request.span("acquire");
        advisory
            .acquire(request)
            .instrument(span)
            .await
            .map(XactGuard::new)
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
        let (advisory, request) = self.request()?;
        let span = request.span("try_acquire");
        let tx = advisory.try_acquire(request).instrument(span).await?;
        Ok(tx.map(XactGuard::new))
    }

    /// What a transaction of a conflict group runs under: a shared lock, or where it is to run alone an exclusive one.
    pub(crate) fn conflict_group(
        mut self,
        alone: bool,
    ) -> Result<(Arc<Advisory>, LockRequest), Error> {
        if !alone {
            self.mode = AdvisoryMode::Shared;
        }
        let (advisory, mut request) = self.request()?;
        request.is_group = true;
        Ok((advisory, request))
    }

    /// Checks what is asked for.
    pub(crate) fn request(self) -> Result<(Arc<Advisory>, LockRequest), Error> {
        let mut request = LockRequest::new(self.keys, self.mode, self.wait)?;
        request.begin = self.begin;
        request.call_site = self.call_site;
        request.lock_wait = self.lock_wait;
        Ok((self.advisory, request))
    }
}

/// One or several session-level advisory locks, described; from [`AdvisoryLock::session`].
#[must_use = "a description takes no lock until it is acquired"]
#[derive(Clone, Debug)]
pub struct SessionAdvisoryLock {
    lock: AdvisoryLock,
}

impl SessionAdvisoryLock {
    /// See [`AdvisoryLock::shared`].
    pub fn shared(self) -> Self {
        Self {
            lock: self.lock.shared(),
        }
    }

    /// See [`AdvisoryLock::wait`].
    pub fn wait(self, wait: Duration) -> Self {
        Self {
            lock: self.lock.wait(wait),
        }
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
        let span = request.span("acquire_session");
        advisory.acquire_session(request).instrument(span).await
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
        let span = request.span("try_acquire_session");
        advisory.try_acquire_session(request).instrument(span).await
    }
}
