//! Looking at the server: who is there, who waits for whom, and who holds which advisory lock.

mod advisory;
mod doctor;
mod health;
#[cfg(feature = "serde")]
mod json;
#[cfg(feature = "metrics")]
mod metrics;
pub(crate) mod recovery;
mod settings;
mod sql;
pub(crate) mod waits;
mod watch;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use advisory::AdvisoryLockEntry;
pub use health::{Deadlocks, Health, InvalidIndexes, LockTable, PreparedTransactions, Reading};
pub use recovery::{Recovery, RecoveryCheck, RecoveryCriterion, Trend};
pub use settings::{Effect, Settings, SettingsFinding, SettingsFindingKind, Severity};
pub use waits::Waits;
pub use watch::{Changes, Watch, WatchUpdate};

use crate::connection::Connections;
use crate::error::{Error, ErrorKind};
use crate::graph::sql::{self as graph, LockSample};
use crate::graph::{Backend, Edge, LockTree, Snapshot};
use crate::key::{KeyId, LockKey, names};
use sql::health as numbers;

/// Looks at the server's sessions and locks: [`Keeper::monitor`](crate::Keeper::monitor).
///
/// Every look is one message on the connection beside the pool, or on one of the pool's where there is none, and takes
/// no lock that somebody would wait for. It sees the whole server; the names of tables only in the database it is
/// connected to.
///
/// A role without `pg_read_all_stats` sees of other roles' sessions who is in whose way, in which modes and for how
/// long, and `application_name` (with the call site of those who use this crate). The rest is `None`, which
/// means *unknown*: [`Backend::is_hidden`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let tree = keeper.monitor().lock_tree().await?;
/// println!("{tree}");
/// for root in tree.roots() {
///     println!("{} keeps {} sessions waiting", root.backend().id(), root.blocks());
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

    /// Names under which advisory locks are shown, besides those that this process has used itself: the server knows
    /// numbers only.
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

    /// Every process of the server that `pg_stat_activity` shows, this look's own too.
    ///
    /// # SQL
    /// One message: the server's clock, and `pg_stat_activity`.
    ///
    /// # Errors
    /// The connection's: no connection was to be had, or it was lost, or the server took too long to answer.
    ///
    /// # Cancel safety
    /// May be dropped at any point: nothing is changed on the server. The connection it was asked on is closed.
    pub async fn activity(&self) -> Result<Vec<Backend>, Error> {
        let (seen, _) = self.look(&graph::activity()).await?;
        Ok(seen.backends)
    }

    /// Who waits for whom, in every database of the server: what [`blocking`](Self::blocking) and
    /// [`lock_tree`](Self::lock_tree) are made from.
    ///
    /// # SQL
    /// One message: the server's clock, and one statement over `pg_locks`, `pg_blocking_pids` for those who wait,
    /// `pg_stat_activity`, `pg_prepared_xacts`, and `pg_class` for the names. Where nobody waits, it reads the lock
    /// table and nothing else.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn snapshot(&self) -> Result<Snapshot, Error> {
        let (seen, took) = self.look(&graph::wait_graph(None)).await?;
        Ok(seen.snapshot(took))
    }

    /// The same of a few sessions: those of these process ids that wait, who is in their way, who is in the way of
    /// these, and so on.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot), but `pg_blocking_pids` is asked about those waits only.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn snapshot_of(&self, pids: &[i32]) -> Result<Snapshot, Error> {
        let (seen, took) = self.look(&graph::wait_graph(Some(pids))).await?;
        Ok(seen.snapshot(took))
    }

    /// Every pair of a session that waits for a lock and one that is in its way.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn blocking(&self) -> Result<Vec<Edge>, Error> {
        Ok(self.snapshot().await?.edges().to_vec())
    }

    /// Who waits for whom as a forest, root blockers first. The tree is built here, not by the server.
    ///
    /// # SQL
    /// As [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn lock_tree(&self) -> Result<LockTree, Error> {
        Ok(self.snapshot().await?.tree())
    }

    /// Every advisory lock of the database that is held or awaited, by whomever: sorted by key, holders before waiters.
    ///
    /// # SQL
    /// One message: the server's clock, and one statement over `pg_locks`, `pg_stat_activity` and
    /// `pg_prepared_xacts`.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn advisory_locks(&self) -> Result<Vec<AdvisoryLockEntry>, Error> {
        let (seen, _) = self.look(&graph::advisory_locks()).await?;
        Ok(advisory::entries(seen))
    }

    /// The advisory locks that look forgotten: held by a session that has been idle, outside of any transaction, for at
    /// least this long, and that no guard of this process owns.
    ///
    /// Guards of other processes are not known here: choose an age beyond which none of them rests. A holder whose
    /// state the role may not see is never among them.
    ///
    /// # SQL
    /// As [`advisory_locks`](Self::advisory_locks).
    ///
    /// # Errors
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

    /// The numbers to watch: who waits and for how long, how old transactions get, how full the lock table is, and what
    /// was left behind.
    ///
    /// # SQL
    /// One message, made to be sent every few seconds: what [`snapshot`](Self::snapshot) sends; one row of numbers
    /// from `pg_locks`, `pg_prepared_xacts`, `pg_stat_database` and `pg_stat_activity`; the INVALID indexes from
    /// `pg_index`, without those that `pg_stat_progress_create_index` or a lock shows to be at work; two rows of
    /// `pg_stat_activity`.
    ///
    /// # Errors
    /// As [`activity`](Self::activity).
    ///
    /// # Cancel safety
    /// As [`activity`](Self::activity).
    pub async fn health(&self) -> Result<Health, Error> {
        let started = Instant::now();
        let reply = self.connections.ask(&numbers::health()).await?;
        let took = started.elapsed();
        let numbers =
            numbers::numbers(&reply, &|key| self.named(key)).ok_or_else(|| unreadable("health"))?;
        Ok(Health::new(numbers, took))
    }

    /// The server's settings and this role's privileges as they concern locks, with what to mend.
    ///
    /// The values are those that the application's own connections see: asked on one of the pool's, as the pool gives
    /// it, with what the role, the database, the connection string and the pool's hooks have set. The privileges are
    /// those of the role that looks, which is the side connection's where there is one.
    ///
    /// # SQL
    /// One message on a connection of the pool: `pg_settings`, and where the server and this connection are. One on
    /// the connection that looks: the role's privileges, and how full the lock table is. Where a pooler stands
    /// between, two more on two connections of the pool. Nothing is set.
    ///
    /// # Errors
    /// As [`activity`](Self::activity); without a connection of the pool the settings are not known.
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
    pub async fn settings(&self) -> Result<Settings, Error> {
        settings::examine(&self.connections).await
    }

    /// The connections it asks on.
    #[cfg(feature = "resolver")]
    pub(crate) fn connections(&self) -> &Arc<Connections> {
        &self.connections
    }

    async fn look(&self, sql: &str) -> Result<(LockSample, Duration), Error> {
        let started = Instant::now();
        let reply = self.connections.ask(sql).await?;
        let took = started.elapsed();
        let seen = graph::read_sample(&reply, &|key| self.named(key))
            .ok_or_else(|| unreadable("locks"))?;
        Ok((seen, took))
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
