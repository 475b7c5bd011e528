//! The numbers to monitor and to alert on.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::graph::{Backend, BackendId, Relation, Snapshot, TreeNode};
use crate::monitor::sql::health::HealthReply;
use crate::postgres::text::Joined;
use crate::postgres::timestamp::Age;

/// How many root blockers `Display` names.
const MAX_NAMED_ROOTS: usize = 3;

/// A value that the observing role may not be allowed to see in full.
///
/// A role sees the state and the times of its own sessions. It sees those of other roles only with the privileges of
/// `pg_read_all_stats` or `pg_monitor`: `GRANT pg_read_all_stats TO "role"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ObservedValue<T> {
    /// Everything was visible.
    Known(T),
    /// Part of it was hidden: this was visible, and there may be more or older ones.
    AtLeast(T),
    /// Part of it was hidden, and nothing was visible. The value is unknown.
    Hidden,
}

impl<T> ObservedValue<T> {
    /// The value, if everything was visible.
    #[must_use]
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::AtLeast(_) | Self::Hidden => None,
        }
    }

    /// What was visible, complete or not; `None` if everything is hidden.
    #[must_use]
    pub fn seen(&self) -> Option<&T> {
        match self {
            Self::Known(value) | Self::AtLeast(value) => Some(value),
            Self::Hidden => None,
        }
    }

    /// Whether everything was visible.
    #[must_use]
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Known(_))
    }
}

impl<T> ObservedValue<Option<T>> {
    /// The result of a search in which some sessions may have been hidden.
    fn of(found: Option<T>, hidden: bool) -> Self {
        match (found, hidden) {
            (found, false) => Self::Known(found),
            (Some(found), true) => Self::AtLeast(Some(found)),
            (None, true) => Self::Hidden,
        }
    }
}

/// The state of a server's locks: [`Monitor::health`](super::Monitor::health).
///
/// Waits, sessions, prepared transactions and the lock table cover the whole server. Deadlocks, INVALID indexes and
/// advisory locks are those of the database that the query was sent to.
///
/// `Display` writes a few lines for people. With the feature `metrics`, `record` passes the numbers to the
/// application's metrics recorder.
///
/// # JSON
///
/// With the feature `serde` it is `Serialize`. Times, durations, backends and relations are as in the documents of
/// [`graph`](crate::graph#json).
///
/// | field | what it is |
/// |---|---|
/// | `version` | 1 |
/// | `taken_at`, `took_ms`, `database` | when and in which database the sample was taken, and how long that took |
/// | `lock_waiters`, `longest_wait_ms` | numbers; the second is `null` if no session waits |
/// | `root_blockers` | an array: `pid` or `prepared`, and how many sessions it `blocks` |
/// | `cycles`, `hidden_sessions` | numbers |
/// | `oldest_transaction`, `oldest_idle_in_transaction` | a `reading` (`known`, `at_least`, `hidden`) and its `value`: a backend; `null` if there is none or it is hidden |
/// | `deadlocks` | their `count`, and `since` when; `null` if the server does not count them |
/// | `lock_table` | `entries`, and the `capacity` it is sized for |
/// | `prepared_transactions` | their `count`, and `oldest_ms` |
/// | `invalid_indexes` | a `reading` and its `value`: their `count`, and the `first` of them |
/// | `advisory_locks_held` | a number |
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// use std::time::Duration;
///
/// let health = keeper.monitor().health().await?;
/// if health.longest_wait() > Some(Duration::from_secs(30)) {
///     for (blocker, blocks) in health.root_blockers() {
///         eprintln!("{blocker} keeps {blocks} sessions waiting");
///     }
/// }
/// if health.lock_table().fill() > 0.8 {
///     eprintln!("{}", health.lock_table());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Health {
    snapshot: Snapshot,
    database: Box<str>,
    waiters: usize,
    longest_wait: Option<Duration>,
    roots: Vec<(BackendId, usize)>,
    cycles: usize,
    hidden_sessions: usize,
    oldest_transaction: ObservedValue<Option<Backend>>,
    idle_in_transaction: ObservedValue<Option<Backend>>,
    deadlocks: Option<Deadlocks>,
    lock_table: LockTableUsage,
    prepared: PreparedTransactions,
    invalid_indexes: ObservedValue<InvalidIndexes>,
    advisory_locks: u64,
}

impl Health {
    pub(super) fn new(reply: HealthReply, elapsed: Duration) -> Self {
        let hidden = reply.hidden_sessions > 0;
        let snapshot = reply.seen.snapshot(elapsed);
        let now = snapshot.taken_at();
        let tree = snapshot.tree();
        let is_root = |node: &TreeNode<'_>| !node.is_in_cycle();
        let indexes = InvalidIndexes {
            count: reply.invalid_total,
            first: reply.invalid,
        };
        Self {
            database: reply.database,
            waiters: snapshot.waiters().len(),
            longest_wait: snapshot
                .edges()
                .iter()
                .filter_map(|edge| edge.wait_age())
                .max(),
            roots: tree
                .roots()
                .filter(is_root)
                .map(|node| (node.backend().id().clone(), node.blocked_count()))
                .collect(),
            cycles: tree.cycles().len(),
            hidden_sessions: reply.hidden_sessions,
            oldest_transaction: ObservedValue::of(reply.oldest_transaction, hidden),
            idle_in_transaction: ObservedValue::of(reply.idle_in_transaction, hidden),
            deadlocks: reply.deadlocks.map(|count| Deadlocks {
                count,
                since: reply.deadlocks_since,
                seen_at: now,
            }),
            lock_table: LockTableUsage {
                entries: reply.lock_entries,
                capacity: reply.lock_capacity,
            },
            prepared: PreparedTransactions {
                count: reply.prepared,
                oldest: reply.oldest_prepared,
            },
            invalid_indexes: match (indexes.count, reply.invalid_unsure) {
                (_, 0) => ObservedValue::Known(indexes),
                (0, _) => ObservedValue::Hidden,
                _ => ObservedValue::AtLeast(indexes),
            },
            advisory_locks: reply.advisory,
            snapshot,
        }
    }

    getters! {
        /// Which session waited for which in this sample: the numbers about waits are computed from it.
        snapshot: &Snapshot;

        /// The name of the database that the query was sent to.
        database: &str;

        /// How many sessions wait for a lock. Every role sees all of them.
        lock_waiters: usize = waiters;

        /// The longest current wait; `None` if no session is waiting.
        longest_wait: Option<Duration>;

        /// The sessions that block others and wait for no lock themselves, each with the number of sessions that cannot
        /// continue before it does, most blocked sessions first. Sessions that wait in a cycle are counted by
        /// [`cycles`](Self::cycles) instead.
        root_blockers: &[(BackendId, usize)] = roots;

        /// How many wait cycles there are: deadlocks that the server has not ended yet.
        cycles: usize;

        /// How many sessions there are whose state and times are hidden from the role, or not recorded because of their
        /// own
        /// `track_activities`. If there are any, the two observations below are not complete.
        hidden_sessions: usize;

        /// The session with the oldest open transaction, [`Backend::transaction_age`]: VACUUM and `CREATE INDEX
        /// CONCURRENTLY` wait for it. Transactions of autovacuum are excluded. `Known(None)` if no transaction is open.
        oldest_transaction: &ObservedValue<Option<Backend>>;

        /// The session that has been idle in its transaction for longest, [`Backend::state_age`]: it keeps its locks
        /// and does nothing. `Known(None)` if there is none.
        oldest_idle_in_transaction: &ObservedValue<Option<Backend>> = idle_in_transaction;

        /// The deadlocks that the server has ended in this database; `None` if it does not count them (`track_counts`).
        deadlocks: Option<Deadlocks>;

        /// How full the server's lock table is.
        lock_table: LockTableUsage;

        /// The prepared transactions, which hold their locks without a session.
        prepared_transactions: PreparedTransactions = prepared;

        /// The INVALID indexes of this database that no session is building or dropping. A failed `CREATE INDEX
        /// CONCURRENTLY` leaves such an index behind, which slows writes and serves no query; the index of a
        /// partitioned table that lacks partitions is INVALID too.
        ///
        /// The progress of an index build is hidden without `pg_read_all_stats`. INVALID indexes of a table on which a
        /// hidden session builds an index are not counted. On a standby none is counted.
        invalid_indexes: &ObservedValue<InvalidIndexes>;

        /// How many advisory locks are held in this database: rows of `pg_locks`, in which a lock that one session has
        /// taken several times counts once.
        advisory_locks_held: u64 = advisory_locks;
    }
}

/// Deadlocks that the server has ended by failing a session, in one database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlocks {
    count: u64,
    since: Option<SystemTime>,
    seen_at: SystemTime,
}

impl Deadlocks {
    getters! {
        /// How many deadlocks, since the statistics began.
        count: u64;

        /// When the statistics were last reset (`pg_stat_database.stats_reset`), by hand or by a crash of the server;
        /// `None` if they never were.
        since: Option<SystemTime>;
    }
}

/// `3 deadlocks within 5d 02h`
impl fmt::Display for Deadlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.count == 1 { "" } else { "s" };
        write!(f, "{} deadlock{s}", self.count)?;
        let age = self.since.map(|since| self.seen_at.duration_since(since));
        match age {
            Some(age) => write!(f, " within {}", Age(age.unwrap_or_default())),
            None => f.write_str(" since the statistics began"),
        }
    }
}

/// How full the server's lock table is, which all sessions share.
///
/// The table is sized for `max_locks_per_transaction` objects for each process the server may have (`max_connections`,
/// autovacuum, background workers, walsenders) and each prepared transaction it may keep. When it is full, a session
/// that needs one more lock fails with *out of shared memory*, and no client can log in. The server has some memory in
/// reserve, so usage may exceed 100 % for a while.
///
/// The usual weak locks that statements take on tables (up to 16 for each session, more since version 18) use the *fast
/// path* and occupy no entry; they are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockTableUsage {
    entries: u64,
    capacity: u64,
}

impl LockTableUsage {
    getters! {
        /// The objects in it that are locked or waited for, each counted once.
        entries: u64;

        /// How many objects it is sized for.
        capacity: u64;
    }

    /// Entries divided by capacity: 1.0 is full.
    #[must_use]
    pub fn fill(&self) -> f64 {
        self.entries as f64 / self.capacity.max(1) as f64
    }
}

/// `lock table: 312 of 15168 entries (2 %)`
impl fmt::Display for LockTableUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "lock table: {} of {} entries ({:.0} %)",
            self.entries,
            self.capacity,
            self.fill() * 100.0
        )
    }
}

/// Transactions that were prepared for a two-phase commit and await its second phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreparedTransactions {
    count: u64,
    oldest: Option<Duration>,
}

impl PreparedTransactions {
    getters! {
        /// How many, in all databases.
        count: u64;

        /// How long ago the oldest was prepared; `None` if there is none.
        oldest: Option<Duration>;
    }
}

/// `2 prepared transactions, the oldest for 3h 05min`
impl fmt::Display for PreparedTransactions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.count == 1 { "" } else { "s" };
        write!(f, "{} prepared transaction{s}", self.count)?;
        match self.oldest {
            Some(age) => write!(f, ", the oldest for {}", Age(age)),
            None => Ok(()),
        }
    }
}

/// INVALID indexes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidIndexes {
    count: usize,
    first: Vec<Relation>,
}

impl InvalidIndexes {
    getters! {
        /// How many.
        count: usize;

        /// The first 20 of them, by schema and name.
        first: &[Relation];
    }
}

/// `2 INVALID indexes: public.a, public.b`
impl fmt::Display for InvalidIndexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let es = if self.count == 1 { "" } else { "es" };
        write!(f, "{} INVALID index{es}", self.count)?;
        if !self.first.is_empty() {
            write!(f, ": {}", Joined(&self.first, ", "))?;
        }
        if self.count > self.first.len() {
            f.write_str(", …")?;
        }
        Ok(())
    }
}

/// A few labelled lines.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.waits(f)?;
        let hidden = self.hidden_sessions;
        session(f, "oldest transaction", &self.oldest_transaction, hidden)?;
        session(
            f,
            "longest idle in transaction",
            &self.idle_in_transaction,
            hidden,
        )?;
        writeln!(f, "{}", self.lock_table)?;
        write!(f, "database {}: ", self.database.escape_debug())?;
        match self.deadlocks {
            Some(deadlocks) => write!(f, "{deadlocks}")?,
            None => f.write_str("deadlocks not counted (track_counts is off)")?,
        }
        writeln!(f, ", {} advisory locks held", self.advisory_locks)?;
        writeln!(f, "{}", self.prepared)?;
        match &self.invalid_indexes {
            ObservedValue::Known(indexes) => writeln!(f, "{indexes}"),
            ObservedValue::AtLeast(indexes) => writeln!(f, "at least {indexes}"),
            ObservedValue::Hidden => writeln!(
                f,
                "INVALID indexes unknown: somebody may be at work on them"
            ),
        }
    }
}

impl Health {
    fn waits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.waiters == 0 {
            return writeln!(f, "nobody waits for a lock");
        }
        let s = if self.waiters == 1 { "" } else { "s" };
        write!(f, "{} session{s} waiting for a lock", self.waiters)?;
        if let Some(age) = self.longest_wait {
            write!(f, ", the longest for {}", Age(age))?;
        }
        for (at, (id, blocks)) in self.roots.iter().take(MAX_NAMED_ROOTS).enumerate() {
            let before = if at == 0 { "; root blockers: " } else { ", " };
            write!(f, "{before}{id} (blocks {blocks})")?;
        }
        if self.roots.len() > MAX_NAMED_ROOTS {
            write!(f, " and {} more", self.roots.len() - MAX_NAMED_ROOTS)?;
        }
        if self.cycles > 0 {
            let s = if self.cycles == 1 { "" } else { "s" };
            write!(f, "; {} cycle{s}", self.cycles)?;
        }
        writeln!(f)
    }
}

fn session(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    observed: &ObservedValue<Option<Backend>>,
    hidden: usize,
) -> fmt::Result {
    write!(f, "{what}: ")?;
    match observed.seen() {
        Some(Some(backend)) => write!(f, "{backend}")?,
        Some(None) => f.write_str("none")?,
        None => f.write_str("unknown")?,
    }
    match observed {
        ObservedValue::Known(_) => writeln!(f),
        ObservedValue::AtLeast(_) => {
            writeln!(f, ", or one of {hidden} sessions hidden from this role")
        }
        ObservedValue::Hidden => writeln!(f, ", {hidden} sessions hidden from this role"),
    }
}
