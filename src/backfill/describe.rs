//! What a backfill is to do.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::job::Job;
use super::name::MOST_NAME;
use super::{BackfillProgress, BackfillStream};
use crate::advisory::Advisory;
use crate::call_site::CallSite;
use crate::error::Error;
use crate::postgres::TableName;
use crate::postgres::name_flaw;
use crate::transaction::Policy;

/// How long a batch should take where nothing says otherwise.
const BATCH_TIME: Duration = Duration::from_millis(50);
const BATCH_ROWS: RangeInclusive<u32> = 10..=20_000;
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);
/// For how long a batch is tried again.
const PATIENCE: Duration = Duration::from_secs(300);
const LAG: Duration = Duration::from_secs(10);
const LAG_BYTES: u64 = 256 << 20;

/// What of a keeper a backfill needs.
#[derive(Clone, Debug)]
pub(crate) struct Means {
    pub(crate) advisory: Arc<Advisory>,
    pub(crate) policy: Policy,
    pub(crate) application_name: Option<String>,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) lock_wait: Duration,
}

type OnProgress = dyn Fn(&BackfillProgress) + Send + Sync;

/// The columns of a table's key, in the order of their unique index: `"id"`, or `["tenant", "id"]`. The names are taken
/// exactly as they are, and quoted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackfillKey(Vec<String>);

impl From<&str> for BackfillKey {
    fn from(column: &str) -> Self {
        Self(vec![column.to_owned()])
    }
}

impl From<String> for BackfillKey {
    fn from(column: String) -> Self {
        Self(vec![column])
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for BackfillKey {
    fn from(columns: [S; N]) -> Self {
        Self(columns.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for BackfillKey {
    fn from(columns: Vec<S>) -> Self {
        Self(columns.into_iter().map(Into::into).collect())
    }
}

/// A change of all rows of a table, or of those that a filter lets through, in many short transactions; from
/// [`Keeper::backfill`](crate::Keeper::backfill).
///
/// # How it goes
///
/// The table is gone through in the order of its key. Each batch is a transaction of its own that takes the next rows,
/// locks them in that order with `FOR NO KEY UPDATE`, and changes them. So a concurrent writer waits for no longer than
/// one batch, readers and foreign key checks wait for nothing, and vacuum can clean up behind it.
///
/// - **Batches adapt.** They are made larger or smaller to take [`batch_time`](Self::batch_time), at most twice as large
///   as the one before. One that somebody else had to wait for is followed by a smaller one, after a pause.
/// - **It steps aside.** No batch begins while sessions wait for a lock on the table (a schema change, say), nor, for ten
///   batch times at most, while they wait for its rows. A batch that meets a lock of others gives up after
///   [`lock_timeout`](Self::lock_timeout), with all that it held, and is tried again with half of the rows after a
///   random pause; the same after a deadlock.
/// - **Standbys keep up.** No batch begins while they are too far behind
///   ([`max_replication_lag`](Self::max_replication_lag)), as far as the role may see that.
/// - **It goes on where it stopped.** The key of a batch's last row is noted in the batch's own transaction, in the table
///   `lockkeeper_backfill` beside the table itself. Whatever ends a run (an error, a crash, a dropped future), the next
///   one with the same [`name`](Self::name) goes on behind the last committed batch, and no row is changed twice.
/// - **One at a time.** A session-level advisory lock of that name keeps other processes out. Should it be lost with its
///   connection, the run ends; a batch of its that another process has overtaken is rolled back.
///
/// # Which rows
///
/// Every row that is there when the run begins, each once. Rows that are inserted meanwhile are met where their keys are
/// above the batch's, and not where they are below, or are committed only after the batch has gone by: as soon as a
/// backfill begins, inserts should bring the new value themselves (a default, a trigger, or the application). A row whose
/// *key* is changed meanwhile can be met twice or not at all. Rows that row-level security hides from the role, and those
/// that a trigger keeps from being changed, are gone by as those that the filter leaves out. The filter is tested on the row as it is when it has been
/// locked, so what others have changed in time is seen.
///
/// # The caller's SQL
///
/// [`set`](Self::set) and [`filter`](Self::filter) are put into the statement **as they are**: never build them from
/// what somebody has typed in. Column names in them mean the table's; `lockkeeper_` is a prefix not to use. They must
/// not change the key. The table's and the key's own names are quoted. Where the key is of a type that is written in
/// different ways (floats, intervals, money; ranges, arrays and composites), they are run with `DateStyle` ISO,
/// `IntervalStyle` postgres, `extra_float_digits` 1 and `lc_monetary` C, so that the checkpoint means the same to every
/// session.
///
/// # Limits
///
/// The key is one or several columns that are `NOT NULL` and have a unique index of their own in that order, of any type
/// that has one; anything else is refused. A table that others inherit from is refused too; partitioned ones are not. It
/// needs two connections of the pool, one of them for the lock, and a server that is not reached through a
/// transaction pooler.
///
/// # Examples
/// ```no_run
/// use std::time::Duration;
///
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let done = keeper
///     .backfill("account", "id")
///     .name("account-email-lower")
///     .set("email_lower = lower(email)")
///     .filter("email_lower IS NULL")
///     .batch_time(Duration::from_millis(20))
///     .on_progress(|progress| println!("{progress}"))
///     .run()
///     .await?;
/// println!("{} rows, the longest batch took {:?}", done.rows_done(), done.longest_batch());
/// # Ok(())
/// # }
/// ```
#[must_use = "a backfill does nothing until it is run"]
#[derive(Clone)]
pub struct Backfill {
    pub(super) means: Means,
    pub(super) table: TableName,
    pub(super) key: Vec<String>,
    pub(super) set: Vec<String>,
    pub(super) filter: Option<String>,
    pub(super) name: Option<String>,
    pub(super) batch_time: Duration,
    pub(super) batch_rows: RangeInclusive<u32>,
    pub(super) rest: Duration,
    pub(super) lock_timeout: Duration,
    pub(super) patience: Duration,
    pub(super) max_lag: Option<Duration>,
    pub(super) max_lag_bytes: Option<u64>,
    pub(super) steps_aside: bool,
    pub(super) restarts: bool,
    pub(super) wait: Duration,
    pub(super) on_progress: Option<Arc<OnProgress>>,
}

impl Backfill {
    pub(crate) fn new(means: Means, table: TableName, key: BackfillKey) -> Self {
        Self {
            wait: means.lock_wait,
            means,
            table,
            key: key.0,
            set: Vec::new(),
            filter: None,
            name: None,
            batch_time: BATCH_TIME,
            batch_rows: BATCH_ROWS,
            rest: Duration::ZERO,
            lock_timeout: LOCK_TIMEOUT,
            patience: PATIENCE,
            max_lag: Some(LAG),
            max_lag_bytes: Some(LAG_BYTES),
            steps_aside: true,
            restarts: false,
            on_progress: None,
        }
    }

    /// What each row gets, as in UPDATE: `email_lower = lower(email)`. Run as it is; see [the type](Self). Given several
    /// times, all of it.
    pub fn set(mut self, assignments: impl Into<String>) -> Self {
        self.set.push(assignments.into());
        self
    }

    /// Which rows are changed, as in WHERE: `email_lower IS NULL`; all of them where it is not said. Run as it is; see
    /// [the type](Self).
    pub fn filter(mut self, condition: impl Into<String>) -> Self {
        self.filter = Some(condition.into());
        self
    }

    /// What the backfill is called in its checkpoint, its lock and its progress: of all in one schema each needs a name
    /// of its own, at most 200 bytes. Without one it is called after what it does, less the literals, and a number that
    /// stands for all of it.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How long a batch should take, which is about how long a writer may have to wait; 50 ms by default.
    pub fn batch_time(mut self, time: Duration) -> Self {
        self.batch_time = time;
        self
    }

    /// How many rows a batch goes by, those included that the filter leaves out; 10 to 20 000 by default. The first batch
    /// has 200, or the nearest of the range.
    pub fn batch_rows(mut self, rows: RangeInclusive<u32>) -> Self {
        self.batch_rows = rows;
        self
    }

    /// How long to pause after each batch, to leave the server's disks to others; not at all by default.
    pub fn pause(mut self, pause: Duration) -> Self {
        self.rest = pause;
        self
    }

    /// How long a batch may wait for one lock before it lets go of all and tries again later; 100 ms by default, rounded
    /// up to whole milliseconds.
    pub fn lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// For how long one batch is tried again after lock timeouts, deadlocks and serialization failures, before the run
    /// ends with [`RetriesExhausted`](crate::ErrorKind::RetriesExhausted); 5 minutes by default.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Pauses while a standby or a subscriber is further behind than this (`pg_stat_replication.replay_lag`); 10 seconds
    /// by default, `None` for any. A standby that is delayed on purpose needs another value.
    ///
    /// Only members of `pg_monitor` see how far standbys are behind. For other roles it is
    /// [`Unknown`](crate::ReplicationLag::Unknown), one `warn` event says so, and the backfill goes on without looking.
    pub fn max_replication_lag(mut self, lag: impl Into<Option<Duration>>) -> Self {
        self.max_lag = lag.into();
        self
    }

    /// The same in bytes of WAL that are not replayed yet; 256 MiB by default.
    pub fn max_replication_lag_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_lag_bytes = bytes.into();
        self
    }

    /// Whether to pause for sessions that wait for the table or its rows; it does by default.
    pub fn pause_for_waiters(mut self, pause: bool) -> Self {
        self.steps_aside = pause;
        self
    }

    /// Begins at the first row again, also where an earlier run has come further or to the end.
    pub fn restart(mut self) -> Self {
        self.restarts = true;
        self
    }

    /// How long [`run`](Self::run) and [`stream`](Self::stream) wait while another process runs this backfill; the keeper's
    /// [`lock_wait`](crate::KeeperBuilder::lock_wait) by default.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Is told how far it has come after each batch, and about once a second during a pause. It is called in the middle
    /// of the run, between two transactions, and must not block.
    pub fn on_progress(mut self, f: impl Fn(&BackfillProgress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Arc::new(f));
        self
    }

    /// Runs it to the end. Where an earlier run has done so, returns at once.
    ///
    /// # SQL
    /// Once: a look into the catalogs, `EXPLAIN SELECT FROM table`, the lock (see
    /// [`SessionAdvisoryLock::acquire`](crate::SessionAdvisoryLock::acquire)), `CREATE TABLE lockkeeper_backfill` where it
    /// is missing, and the row of the checkpoint. Before a batch, at most every 50 ms: `pg_locks` and
    /// `pg_stat_replication`. For a batch: `BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE` and settings; one statement
    /// that finds the rows, locks and changes them; one message that writes the checkpoint and asks who waits for this
    /// transaction; what a lost COMMIT is found again by
    /// ([`resolve_commit`](crate::TransactionOptions::resolve_commit)); COMMIT.
    ///
    /// The role needs the privileges SELECT and UPDATE of the table, and either CREATE of its schema or a
    /// `lockkeeper_backfill` there that it may read and write; the error of a missing one has its text. One that belongs to
    /// anybody but this role and those who can do what the owner of the table or of the schema can is refused: its
    /// triggers would run as this role.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for what cannot work: nothing is changed then. Most of it needs the catalogs,
    /// so those are read before. So it is for a checkpoint of the same name that cannot be gone on from: of a backfill that
    /// does something else, or where the key's type, collation or index has changed since.
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) when another process has been running it for the whole
    /// [`wait`](Self::wait). [`LockLost`](crate::ErrorKind::LockLost) when the connection with the lock has ended, or
    /// another process has gone on with the backfill. [`RetriesExhausted`](crate::ErrorKind::RetriesExhausted) when a
    /// batch failed for all of [`patience`](Self::patience). What a batch fails with otherwise: a violated constraint, a lost
    /// connection. After any of them the batches before are committed, and another run goes on behind them.
    ///
    /// # Cancel safety
    /// May be dropped at any point: the batch under way is cancelled and rolled back, and the lock released. Dropped
    /// during COMMIT, the batch and its checkpoint may have been committed, both or neither.
    pub async fn run(self) -> Result<BackfillProgress, Error> {
        self.begin().await?.finish().await
    }

    /// The same if no other process runs it; `None`, without changing anything, if one does.
    ///
    /// # Errors
    /// As [`run`](Self::run), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`run`](Self::run).
    pub async fn try_run(self) -> Result<Option<BackfillProgress>, Error> {
        match Job::try_begin(self).await? {
            Some(job) => job.finish().await.map(Some),
            None => Ok(None),
        }
    }

    /// The same step by step, as a `Stream` of how far it has come: it works only while it is polled, and the lock is
    /// held until it is dropped or at its end.
    pub fn stream(self) -> BackfillStream {
        BackfillStream::new(self)
    }

    pub(super) async fn begin(self) -> Result<Job, Error> {
        Job::begin(self).await
    }

    /// Refuses what no server could do.
    pub(super) fn check(&self) -> Result<(), Error> {
        let columns = self.key.iter().map(|name| name_flaw("column", name));
        let flaw = self.table.flaw().or_else(|| columns.flatten().next());
        let flaw = flaw.or_else(|| self.flaw().map(str::to_owned));
        flaw.map_or(Ok(()), |flaw| Err(Error::config(flaw)))
    }

    fn flaw(&self) -> Option<&'static str> {
        let blank = |text: &String| text.trim().is_empty();
        let nul = |text: &String| text.contains('\0');
        if self.key.is_empty() {
            return Some("the key has no columns; at least one");
        }
        if (1..self.key.len()).any(|n| self.key[..n].contains(&self.key[n])) {
            return Some("the key names a column twice");
        }
        if self.set.is_empty() || self.set.iter().any(blank) {
            return Some(
                "a backfill sets nothing; say what each row gets with set(\"column = …\")",
            );
        }
        if self.filter.iter().any(blank) {
            return Some("the filter is empty; leave it out to change all rows");
        }
        if self
            .set
            .iter()
            .chain(&self.filter)
            .chain(&self.name)
            .any(nul)
        {
            return Some("a NUL in the assignments, the filter or the name, which no SQL can have");
        }
        if self
            .name
            .as_ref()
            .is_some_and(|name| name.is_empty() || name.len() > MOST_NAME)
        {
            return Some("the backfill's name is empty or longer than 200 bytes");
        }
        if self.batch_rows.is_empty() || *self.batch_rows.start() == 0 {
            return Some("batch_rows is empty or begins with 0; at least 1..=1");
        }
        if self.batch_time.is_zero() {
            return Some("batch_time is 0; a batch needs some time, 1 ms or more");
        }
        if self.lock_timeout.is_zero() {
            return Some(
                "lock_timeout is 0, which PostgreSQL takes to mean no limit; at least 1 ms",
            );
        }
        if self.means.advisory.connections.most() < 2 {
            return Some(
                "the pool has one connection; a backfill needs two, one of which holds its lock",
            );
        }
        None
    }
}

/// Without the caller's SQL, which may have data in it.
impl fmt::Debug for Backfill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backfill")
            .field("table", &self.table)
            .field("key", &self.key)
            .field("name", &self.name)
            .field("batch_time", &self.batch_time)
            .field("batch_rows", &self.batch_rows)
            .finish_non_exhaustive()
    }
}
