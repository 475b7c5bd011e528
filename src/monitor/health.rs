//! The numbers to watch and to be woken by.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::graph::{Backend, BackendId, Relation, Snapshot, TreeNode};
use crate::monitor::sql::health::Numbers;
use crate::postgres::timestamp::Age;

/// How many root blockers `Display` names.
const NAMED: usize = 3;

/// A value that the role which looked may not be allowed to see in full.
///
/// A role sees the state and the times of its own sessions, those of others only with the privileges of
/// `pg_read_all_stats` or `pg_monitor`: `GRANT pg_read_all_stats TO "role"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reading<T> {
    /// All that there is was seen.
    Known(T),
    /// Something was hidden: this was seen, and there may be more, or older ones.
    AtLeast(T),
    /// Something was hidden, and nothing seen. It says nothing.
    Hidden,
}

impl<T> Reading<T> {
    /// The value, if all was seen.
    #[must_use]
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::AtLeast(_) | Self::Hidden => None,
        }
    }

    /// What was seen, all of it or not; `None` where all is hidden.
    #[must_use]
    pub fn seen(&self) -> Option<&T> {
        match self {
            Self::Known(value) | Self::AtLeast(value) => Some(value),
            Self::Hidden => None,
        }
    }

    /// Whether all was seen.
    #[must_use]
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Known(_))
    }
}

impl<T> Reading<Option<T>> {
    /// Of something that was looked for where some may be hidden.
    fn of(found: Option<T>, hidden: bool) -> Self {
        match (found, hidden) {
            (found, false) => Self::Known(found),
            (Some(found), true) => Self::AtLeast(Some(found)),
            (None, true) => Self::Hidden,
        }
    }
}

/// How a server is doing with its locks: [`Monitor::health`](super::Monitor::health).
///
/// Waits, sessions, prepared transactions and the lock table are the whole server's; deadlocks, INVALID indexes and
/// advisory locks those of the database the look was made from.
///
/// `Display` gives a few lines for people. With the feature `metrics`, `record` hands the numbers to the application's
/// metrics.
///
/// # JSON
///
/// With the feature `serde` it is `Serialize`. Times, durations, backends and relations are as in the documents of
/// [`graph`](crate::graph#json).
///
/// | field | what it is |
/// |---|---|
/// | `version` | 1 |
/// | `taken_at`, `took_ms`, `database` | when and where it was looked, and for how long |
/// | `lock_waiters`, `longest_wait_ms` | `null` where nobody waits |
/// | `root_blockers` | an array: `pid` or `prepared`, and how many sessions it `blocks` |
/// | `cycles`, `hidden_sessions` | numbers |
/// | `oldest_transaction`, `oldest_idle_in_transaction` | a `reading` (`known`, `at_least`, `hidden`) and its `value`: a backend; `null` where there is none or it is hidden |
/// | `deadlocks` | their `count`, and `since` when; `null` where the server does not count |
/// | `lock_table` | `entries`, and the `capacity` it is made for |
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
    oldest_transaction: Reading<Option<Backend>>,
    idle_in_transaction: Reading<Option<Backend>>,
    deadlocks: Option<Deadlocks>,
    lock_table: LockTable,
    prepared: PreparedTransactions,
    invalid_indexes: Reading<InvalidIndexes>,
    advisory_locks: u64,
}

impl Health {
    pub(super) fn new(numbers: Numbers, took: Duration) -> Self {
        let hidden = numbers.hidden_sessions > 0;
        let snapshot = numbers.seen.snapshot(took);
        let now = snapshot.taken_at();
        let tree = snapshot.tree();
        let is_root = |node: &TreeNode<'_>| !node.is_in_cycle();
        let indexes = InvalidIndexes {
            count: numbers.invalid_total,
            first: numbers.invalid,
        };
        Self {
            database: numbers.database,
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
            hidden_sessions: numbers.hidden_sessions,
            oldest_transaction: Reading::of(numbers.oldest_transaction, hidden),
            idle_in_transaction: Reading::of(numbers.idle_in_transaction, hidden),
            deadlocks: numbers.deadlocks.map(|count| Deadlocks {
                count,
                since: numbers.deadlocks_since,
                seen_at: now,
            }),
            lock_table: LockTable {
                entries: numbers.lock_entries,
                capacity: numbers.lock_capacity,
            },
            prepared: PreparedTransactions {
                count: numbers.prepared,
                oldest: numbers.oldest_prepared,
            },
            invalid_indexes: match (indexes.count, numbers.invalid_unsure) {
                (_, 0) => Reading::Known(indexes),
                (0, _) => Reading::Hidden,
                _ => Reading::AtLeast(indexes),
            },
            advisory_locks: numbers.advisory,
            snapshot,
        }
    }

    /// Who waited for whom in this look: what the first numbers are from.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The name of the database the look was made from.
    #[must_use]
    pub fn database(&self) -> &str {
        &self.database
    }

    /// How many sessions wait for a lock. Every role sees all of them.
    #[must_use]
    pub fn lock_waiters(&self) -> usize {
        self.waiters
    }

    /// For how long the one among them has waited that has waited longest; `None` where nobody waits.
    #[must_use]
    pub fn longest_wait(&self) -> Option<Duration> {
        self.longest_wait
    }

    /// Those who are in the way of others and wait for no lock themselves, with the number of sessions that could not
    /// go on before they do: first the one that keeps most waiting. Sessions that wait in a circle are in
    /// [`cycles`](Self::cycles) instead.
    #[must_use]
    pub fn root_blockers(&self) -> &[(BackendId, usize)] {
        &self.roots
    }

    /// In how many circles sessions wait for one another: deadlocks that the server has not ended yet.
    #[must_use]
    pub fn cycles(&self) -> usize {
        self.cycles
    }

    /// How many sessions there are of which the role may see neither state nor times (or which hide them themselves,
    /// by `track_activities`). Where there are any, the two readings below do not say all.
    #[must_use]
    pub fn hidden_sessions(&self) -> usize {
        self.hidden_sessions
    }

    /// The session whose transaction has been open for longest, [`Backend::transaction_age`]: what VACUUM and
    /// `CREATE INDEX CONCURRENTLY` wait for. Autovacuum's own are left out. `Known(None)` where no transaction is open.
    #[must_use]
    pub fn oldest_transaction(&self) -> &Reading<Option<Backend>> {
        &self.oldest_transaction
    }

    /// The session that has been idle in its transaction for longest, [`Backend::state_age`]: it keeps its locks and
    /// does nothing. `Known(None)` where there is none.
    #[must_use]
    pub fn oldest_idle_in_transaction(&self) -> &Reading<Option<Backend>> {
        &self.idle_in_transaction
    }

    /// The deadlocks that the server has ended in this database; `None` where it does not count (`track_counts`).
    #[must_use]
    pub fn deadlocks(&self) -> Option<Deadlocks> {
        self.deadlocks
    }

    /// How full the server's lock table is.
    #[must_use]
    pub fn lock_table(&self) -> LockTable {
        self.lock_table
    }

    /// The prepared transactions, which hold their locks without any session.
    #[must_use]
    pub fn prepared_transactions(&self) -> PreparedTransactions {
        self.prepared
    }

    /// The INVALID indexes of this database that nobody is at work on: what a failed `CREATE INDEX CONCURRENTLY` leaves
    /// behind, which costs writes and serves no query, or an index of a partitioned table that lacks partitions.
    ///
    /// Of an index that is being built the progress is hidden without `pg_read_all_stats`; INVALID indexes of a table
    /// on which somebody hidden builds one are not counted, and on a standby none.
    #[must_use]
    pub fn invalid_indexes(&self) -> &Reading<InvalidIndexes> {
        &self.invalid_indexes
    }

    /// How many advisory locks are held in this database: rows of `pg_locks`, in which a lock taken several times by
    /// one session counts once.
    #[must_use]
    pub fn advisory_locks_held(&self) -> u64 {
        self.advisory_locks
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
    /// How many, since the statistics began.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// When the statistics were last reset (`pg_stat_database.stats_reset`); `None` if they never were, by hand or by a
    /// crash of the server.
    #[must_use]
    pub fn since(&self) -> Option<SystemTime> {
        self.since
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

/// How full the server's lock table is, the one all sessions share.
///
/// It is made for `max_locks_per_transaction` objects for each process the server may have (`max_connections`,
/// autovacuum, background workers, walsenders) and each prepared transaction it may keep. When it is full, whoever
/// needs one more lock fails with *out of shared memory*, and nobody can log in. The server has some memory in
/// reserve, so that it may hold more than 100 % for a while.
///
/// The usual weak locks of statements on tables (up to 16 for each session, more from version 18 on) take the *fast
/// path* and need no room in it; they are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockTable {
    entries: u64,
    capacity: u64,
}

impl LockTable {
    /// Objects that are locked or waited for in it, each of them once.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// How many it is made for.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Entries by capacity: 1.0 is full.
    #[must_use]
    pub fn fill(&self) -> f64 {
        self.entries as f64 / self.capacity.max(1) as f64
    }
}

/// `lock table: 312 of 15168 entries (2 %)`
impl fmt::Display for LockTable {
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

/// Transactions that were prepared for a two-phase commit and wait for its second phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreparedTransactions {
    count: u64,
    oldest: Option<Duration>,
}

impl PreparedTransactions {
    /// How many, in all databases.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// For how long the oldest has been prepared; `None` where there are none.
    #[must_use]
    pub fn oldest(&self) -> Option<Duration> {
        self.oldest
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
    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The first 20 of them, by schema and name.
    #[must_use]
    pub fn first(&self) -> &[Relation] {
        &self.first
    }
}

/// `2 INVALID indexes: public.a, public.b`
impl fmt::Display for InvalidIndexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let es = if self.count == 1 { "" } else { "es" };
        write!(f, "{} INVALID index{es}", self.count)?;
        for (at, index) in self.first.iter().enumerate() {
            let before = if at == 0 { ": " } else { ", " };
            write!(f, "{before}{index}")?;
        }
        if self.count > self.first.len() {
            f.write_str(", …")?;
        }
        Ok(())
    }
}

/// A few lines, each with what it is about.
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
            Reading::Known(indexes) => writeln!(f, "{indexes}"),
            Reading::AtLeast(indexes) => writeln!(f, "at least {indexes}"),
            Reading::Hidden => writeln!(
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
        for (at, (id, blocks)) in self.roots.iter().take(NAMED).enumerate() {
            let before = if at == 0 { "; root blockers: " } else { ", " };
            write!(f, "{before}{id} (blocks {blocks})")?;
        }
        if self.roots.len() > NAMED {
            write!(f, " and {} more", self.roots.len() - NAMED)?;
        }
        if self.cycles > 0 {
            let s = if self.cycles == 1 { "" } else { "s" };
            write!(f, "; {} circle{s}", self.cycles)?;
        }
        writeln!(f)
    }
}

fn session(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    reading: &Reading<Option<Backend>>,
    hidden: usize,
) -> fmt::Result {
    write!(f, "{what}: ")?;
    match reading.seen() {
        Some(Some(backend)) => write!(f, "{backend}")?,
        Some(None) => f.write_str("none")?,
        None => f.write_str("unknown")?,
    }
    match reading {
        Reading::Known(_) => writeln!(f),
        Reading::AtLeast(_) => writeln!(f, ", or one of {hidden} sessions hidden from this role"),
        Reading::Hidden => writeln!(f, ", {hidden} sessions hidden from this role"),
    }
}
