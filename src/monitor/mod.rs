//! Observing the server: its sessions, which session waits for which, and which session holds which advisory lock.

mod advisory;
pub(crate) mod database_filter;
mod health;
#[cfg(feature = "serde")]
mod json;
#[cfg(feature = "metrics")]
mod metrics;
pub(crate) mod recovery;
mod settings;
mod settings_check;
mod sql;
pub(crate) mod wait_summary;
mod watch;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use advisory::AdvisoryLockEntry;
pub use health::{
    Deadlocks, Health, InvalidIndexes, LockTableUsage, ObservedValue, PreparedTransactions,
};
pub use recovery::{Recovery, RecoveryCheck, RecoveryCriterion, Trend};
pub use settings::{Effect, SettingsFinding, SettingsFindingKind, SettingsReport, Severity};
pub use wait_summary::WaitSummary;
pub use watch::{SnapshotDiff, Watch, WatchUpdate};

use crate::connection::Connections;
use crate::error::{Error, ErrorKind};
use crate::graph::sql::{self as graph, LockSample};
use crate::graph::{Backend, Edge, LockTree, Snapshot};
use crate::key::{KeyId, LockKey, names};
use sql::health as health_sql;

/// Observes the server's sessions and locks: [`Keeper::monitor`](crate::Keeper::monitor).
///
/// Each query is one message on the side connection, or on a connection of the pool if there is none. It takes no lock
/// that another session could wait for. It covers the whole server, but table names only of the database it is
/// connected to.
///
/// A role without `pg_read_all_stats` sees, of the sessions of other roles, which session blocks which, in which lock
/// modes and for how long, and the `application_name`, which carries the call site of sessions that use this crate. All
/// other fields are `None`, which means *unknown*: [`Backend::is_hidden`].
///
/// # Longest silence
///
/// A query waits for a silent server for at most 8 seconds: 1 on the side connection, then 1.5 until a connection of the
/// pool is free or opened, and 5 for the answer on it. The first and the last are
/// [`KeeperBuilder::longest_silence`](crate::KeeperBuilder::longest_silence) where that is less.
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let tree = keeper.monitor().lock_tree().await?;
/// println!("{tree}");
/// for root in tree.roots() {
///     println!("{} keeps {} sessions waiting", root.backend().id(), root.blocked_count());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Monitor {
    connections: Arc<Connections>,
    names: Arc<HashMap<KeyId, LockKey>>,
}

impl Monitor {
    pub(crate) fn new(connections: Arc<Connections>) -> Self {
        Self {
            connections,
            names: Arc::default(),
        }
    }

    /// Adds names under which advisory locks are shown. Names that this process has used are known already; the server
    /// itself knows only numbers.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// let monitor = keeper.monitor().names(["nightly-report", "invoice-run"]);
    /// for entry in monitor.advisory_locks().await? {
    ///     println!("{entry}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use = "gives back a monitor that knows the names"]
    pub fn names<K: Into<LockKey>>(mut self, names: impl IntoIterator<Item = K>) -> Self {
        let known = Arc::make_mut(&mut self.names);
        for key in names {
            let key = key.into();
            known.insert(key.id(), key);
        }
        self
    }

    /// Every process of the server that `pg_stat_activity` shows, including the session that runs this query.
    ///
    /// # SQL
    /// One message: the server's clock, and `pg_stat_activity`.
    ///
    /// # Errors
    /// Those of the connection: none was available, it was lost, or the server took too long to answer.
    ///
    /// # Longest silence
    /// At most 8 seconds, and less where [`longest_silence`](crate::KeeperBuilder::longest_silence)
    /// is less: see [`Monitor`](Self#longest-silence).
    ///
    /// # Cancel safety
    /// May be dropped at any point: nothing is changed on the server. The connection that was used is closed.
    pub async fn activity(&self) -> Result<Vec<Backend>, Error> {
        let (seen, _) = self.sample(&graph::activity()).await?;
        Ok(seen.backends)
    }

    /// Which session waits for which, in every database of the server. [`blocking`](Self::blocking) and
    /// [`lock_tree`](Self::lock_tree) are built from it.
    ///
    /// # SQL
    /// One message: the server's clock, and one statement over `pg_locks`, `pg_blocking_pids` for the waiting sessions,
    /// `pg_stat_activity`, `pg_prepared_xacts`, and `pg_class` for the names. If no session waits, it reads only the
    /// lock table.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn snapshot(&self) -> Result<Snapshot, Error> {
        let (seen, elapsed) = self.sample(&graph::wait_graph(None)).await?;
        Ok(seen.snapshot(elapsed))
    }

    /// A snapshot limited to a few sessions: those of these process ids that wait, their blockers, the blockers of
    /// these, and so on.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot), but `pg_blocking_pids` is called only for those waits.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn snapshot_of(&self, pids: &[i32]) -> Result<Snapshot, Error> {
        let (seen, elapsed) = self.sample(&graph::wait_graph(Some(pids))).await?;
        Ok(seen.snapshot(elapsed))
    }

    /// Every pair of a session that waits for a lock and a session that blocks it.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn blocking(&self) -> Result<Vec<Edge>, Error> {
        Ok(self.snapshot().await?.edges().to_vec())
    }

    /// Which session waits for which, as a forest with the root blockers first. The tree is built by this crate, not by
    /// the server.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn lock_tree(&self) -> Result<LockTree, Error> {
        Ok(self.snapshot().await?.tree())
    }

    /// Every advisory lock of the database that any session holds or waits for, sorted by key, holders before waiters.
    ///
    /// # SQL
    /// One message: the server's clock, and one statement over `pg_locks`, `pg_stat_activity` and
    /// `pg_prepared_xacts`.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn advisory_locks(&self) -> Result<Vec<AdvisoryLockEntry>, Error> {
        let (seen, _) = self.sample(&graph::advisory_locks()).await?;
        Ok(advisory::entries(seen))
    }

    /// The advisory locks that are probably forgotten: the holder has been idle, outside of any transaction, for at
    /// least `age`, and no guard of this process owns the lock.
    ///
    /// Guards of other processes are not known here: choose an age that none of them reaches while idle. A holder whose
    /// state is hidden from the role is never included.
    ///
    /// # SQL
    /// As [`advisory_locks`](Self::advisory_locks).
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn leaks(&self, age: Duration) -> Result<Vec<AdvisoryLockEntry>, Error> {
        let mut entries = self.advisory_locks().await?;
        entries.retain(|entry| {
            entry.is_held()
                && !entry.is_guarded()
                && entry.idle_for().is_some_and(|idle| idle >= age)
        });
        Ok(entries)
    }

    /// The numbers to monitor: how many sessions wait and for how long, the oldest transactions, how full the lock
    /// table is, and what was left behind.
    ///
    /// # SQL
    /// One message, cheap enough to be sent every few seconds: what [`snapshot`](Self::snapshot) sends; one row of
    /// numbers from `pg_locks`, `pg_prepared_xacts`, `pg_stat_database` and `pg_stat_activity`; the INVALID indexes
    /// from `pg_index`, without those that are being built or dropped according to `pg_stat_progress_create_index` or a
    /// lock; two rows of `pg_stat_activity`.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn health(&self) -> Result<Health, Error> {
        let started = Instant::now();
        let reply = self.connections.look(&health_sql::query()).await?;
        let elapsed = started.elapsed();
        let reply =
            health_sql::read(&reply, &|key| self.named(key)).ok_or_else(|| unreadable("health"))?;
        Ok(Health::new(reply, elapsed))
    }

    /// The server's settings and this role's privileges as far as they concern locks, with recommended fixes.
    ///
    /// The values are those that the application's own connections see: they are read on a connection of the pool, as
    /// the pool returns it, with everything that the role, the database, the connection string and the pool's hooks
    /// have set. The privileges are those of the role that monitors: the role of the side connection if there is one.
    ///
    /// # SQL
    /// One message on a connection of the pool: `pg_settings`, and which server, database and role it is connected to.
    /// One message on the connection that monitors: the role's privileges, and how full the lock table is. If a pooler
    /// stands between the pool and the server, two more messages on two connections of the pool. No setting is changed.
    ///
    /// # Errors
    /// As [`activity`](Self::activity); the settings cannot be read without a connection of the pool.
    ///
    /// # Longest silence
    /// As [`activity`](Self::activity), and then 16 seconds for the pool's connections; 6 of these, for a connection, are not
    /// shortened by [`longest_silence`](crate::KeeperBuilder::longest_silence).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
    /// for finding in keeper.monitor().settings().await?.findings() {
    ///     eprintln!("{finding}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn settings(&self) -> Result<SettingsReport, Error> {
        settings::examine(&self.connections).await
    }

    /// The connections that the queries are sent on.
    #[cfg(feature = "resolver")]
    pub(crate) fn connections(&self) -> &Arc<Connections> {
        &self.connections
    }

    async fn sample(&self, sql: &str) -> Result<(LockSample, Duration), Error> {
        let started = Instant::now();
        let reply = self.connections.look(sql).await?;
        let elapsed = started.elapsed();
        let seen = graph::read_sample(&reply, &|key| self.named(key))
            .ok_or_else(|| unreadable("locks"))?;
        Ok((seen, elapsed))
    }

    fn named(&self, key: LockKey) -> LockKey {
        let given = self.names.get(&key.id()).cloned();
        given.unwrap_or_else(|| names::named(key))
    }
}

fn unreadable(what: &str) -> Error {
    Error::new(ErrorKind::Database).with_detail(format!(
        "the server's answer about its {what} cannot be read"
    ))
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod testing;
