//! A transaction that holds its locks until it ends.

use tokio_postgres::types::ToSql;

use super::TxAdvisoryLock;
use crate::connection::{Session, query_methods};
use crate::error::Error;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::TableName;
use crate::transaction::{AsyncFunc, LockRows, Tx};

/// One transaction and the transaction-level advisory locks taken at its beginning.
///
/// The locks live exactly as long as the transaction: [`commit`](Self::commit), [`rollback`](Self::rollback) and drop
/// all release them, and so does the end of the connection, whatever its cause. There is no way to release them
/// earlier, and none to forget them.
///
/// It has the driver's query methods, which run in that transaction.
///
/// # Dropping
/// ROLLBACK is sent at once, without waiting; the connection is back in the pool as soon as the server has answered. If
/// a statement is still running, because its future was dropped, it is cancelled and the connection closed.
#[must_use = "dropping the guard rolls back and releases the lock at once"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct XactGuard {
    tx: Tx,
}

impl XactGuard {
    pub(crate) fn new(tx: Tx) -> Self {
        Self { tx }
    }

    fn session(&self) -> &Session {
        self.tx.session()
    }

    /// Commits, and so releases the locks.
    ///
    /// # SQL
    /// `COMMIT`, one round trip; `SELECT; COMMIT` in one message where a statement has failed, or may have: the empty
    /// SELECT makes the server say so, where COMMIT alone would roll back and report success.
    ///
    /// # Errors
    /// [`CommitUnknown`](crate::ErrorKind::CommitUnknown) when the connection was lost meanwhile;
    /// [`ConnectionLost`](crate::ErrorKind::ConnectionLost) when it had been lost before. The kind of the first error
    /// when a statement had failed, whose error was swallowed: the transaction is rolled back. The kind of COMMIT's
    /// own error (a deferred constraint, a serialization failure) otherwise. The locks are released in each case.
    ///
    /// # Cancel safety
    /// Once polled, the commit goes on in the background if this is dropped; whether it happened is then not known.
    ///
    /// # Longest silence
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence).
    pub async fn commit(self) -> Result<(), Error> {
        self.tx.commit().await
    }

    /// Rolls back, and so releases the locks; the connection is back in the pool, or closed, when this returns. Where a
    /// statement whose future was dropped is still running on it, that happens in the background: the statement is
    /// cancelled, and the connection closed.
    ///
    /// # Cancel safety
    /// Once polled, it goes on in the background if this is dropped.
    ///
    /// # Longest silence
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence).
    pub async fn rollback(self) {
        self.tx.rollback().await;
    }

    /// The keys held, in the order they were granted.
    pub fn held_keys(&self) -> impl Iterator<Item = &LockKey> {
        self.tx.held_keys()
    }

    /// The backend's process id, as `pg_locks` and `pg_stat_activity` show it.
    #[must_use]
    pub fn backend_pid(&self) -> Option<i32> {
        self.tx.backend_pid()
    }

    /// How the locks are held.
    #[must_use]
    pub fn mode(&self) -> AdvisoryMode {
        self.tx
            .held()
            .first()
            .map_or_else(AdvisoryMode::default, |held| held.mode)
    }

    /// One more lock in the same transaction: see [`Tx::advisory_lock`].
    pub fn advisory_lock(&mut self, key: impl Into<LockKey>) -> TxAdvisoryLock<'_> {
        self.tx.advisory_lock(key)
    }

    /// Several more locks in the same transaction: see [`Tx::advisory_locks`].
    pub fn advisory_locks<K: Into<LockKey>>(
        &mut self,
        keys: impl IntoIterator<Item = K>,
    ) -> TxAdvisoryLock<'_> {
        self.tx.advisory_locks(keys)
    }

    /// Rows locked in the order of their keys: see [`Tx::lock_rows`].
    pub fn lock_rows<T>(
        &self,
        table: impl Into<TableName>,
        key: impl Into<String>,
        ids: impl AsRef<[T]>,
    ) -> LockRows<'_, T>
    where
        T: ToSql + Clone + Send + Sync,
    {
        self.tx.lock_rows(table, key, ids)
    }

    /// Has `hook` run once [`commit`](Self::commit) has committed: see [`Tx::after_commit`].
    pub fn after_commit(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.tx.after_commit(hook);
    }

    /// A part of the transaction that can fail by itself: see [`Tx::savepoint`].
    ///
    /// # Errors
    /// As [`Tx::savepoint`].
    ///
    /// # Cancel safety
    /// As [`Tx::savepoint`].
    ///
    /// # Longest silence
    /// As [`Tx::savepoint`].
    pub async fn savepoint<R, E, F>(&mut self, f: F) -> Result<R, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send,
        E: From<Error> + Send,
        R: Send,
    {
        self.tx.savepoint(f).await
    }
}

query_methods!(XactGuard);
