//! The description of a backfill.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::name::MAX_NAME_BYTES;
use super::run::Run;
use super::{BackfillProgress, BackfillStream};
use crate::error::Error;
use crate::postgres::{TableName, name_flaw};
use crate::schema::Env;
use crate::transaction::Policy;

const BATCH_TIME: Duration = Duration::from_millis(50);
const BATCH_ROWS: RangeInclusive<u32> = 10..=20_000;
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);
const MAX_LOCK_WAIT: Duration = Duration::from_secs(300);
const LAG: Duration = Duration::from_secs(10);
const LAG_BYTES: u64 = 256 << 20;

type OnProgress = dyn Fn(&BackfillProgress) + Send + Sync;

/// The columns of a table's key, in the order of their unique index: `"id"`, or `["tenant", "id"]`. The names are
/// case-sensitive, because they are quoted.
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

/// A change of all rows of a table, or of the rows that match a filter, in many short transactions; from
/// [`Keeper::backfill`](crate::Keeper::backfill).
///
/// # Behaviour
///
/// The table is processed in the order of its key. Each batch is a separate transaction that selects the next rows,
/// locks them in that order with `FOR NO KEY UPDATE`, and changes them. So a concurrent writer waits no longer than
/// one batch, readers and foreign key checks do not wait, and vacuum can clean up after each batch.
///
/// - **Batches adapt.** Their size is adjusted so that they take [`batch_time`](Self::batch_time); a batch is at most
///   twice as large as the one before. After a batch that another session had to wait for, the backfill pauses, and the
///   next batch is smaller.
/// - **It yields to waiters.** No batch begins while sessions wait for a lock on the table (for example a schema
///   change), or, for at most ten batch times, while they wait for its rows. A batch that has to wait for a lock longer
///   than [`lock_timeout`](Self::lock_timeout) is rolled back, which releases all its locks, and retried with half of
///   the rows after a random pause; the same applies after a deadlock.
/// - **Standbys keep up.** No batch begins while the replication lag is too large
///   ([`max_replication_lag`](Self::max_replication_lag)), as far as the role may see it.
/// - **It can be continued.** The key of a batch's last row is recorded in the batch's transaction, in the table
///   `lockkeeper_backfill` in the schema of the table. However a run ends (an error, a crash, a dropped future), the
///   next run with the same [`name`](Self::name) continues after the last committed batch, and no row is changed twice.
/// - **It runs in one process.** A session-level advisory lock of that name excludes other processes. If the lock is
///   lost with its connection, the run ends; if another process has continued the backfill meanwhile, the current batch
///   is rolled back.
///
/// # Which rows
///
/// Every row that exists when the run begins, each once. The run ends at the last of their keys, so inserts of greater
/// keys do not prolong it; [`follow_inserts`](Self::follow_inserts) goes on to the last row there is. A row that is
/// inserted among the others is processed if it is committed before the batch reaches it. So once a backfill begins,
/// inserts should set the new value themselves (by a default, a trigger, or the application). A row whose *key* changes
/// during the run can be processed twice or not at all. The filter is tested on the row version that is locked, so it
/// sees changes that other transactions have committed by then. If row-level security applies to the role, the run is
/// refused, unless [`visible_rows`](Self::visible_rows) asks for the visible rows only.
///
/// # When it is done
///
/// Without a filter: when every batch of that range has been committed to this table. With a filter: when another pass
/// over the range has found no row that matches it. Rows that match are changed by that pass, and the check is repeated,
/// up to three times; if rows match still, because a trigger keeps them from being changed or because other sessions
/// insert rows without their new values, the run ends with an error and is not done. A filter that rows match after their
/// change, too, does not tell which rows are left: then only the batches count.
///
/// A checkpoint belongs to the table and its columns, not just to their names. A run notices that the table or a column of
/// the definition was dropped and created again, restored, or truncated. If the filter tells which rows are left, it
/// starts over; otherwise it is refused, and the error names what to call: [`restart`](Self::restart) or
/// [`trust_checkpoint`](Self::trust_checkpoint). VACUUM FULL, CLUSTER and changes of types do not matter, as long as a row
/// of the last batch is as that batch has left it. Rows that were deleted and loaded again by INSERT or COPY, and
/// partitions that were attached later, are not noticed: they count as inserted later.
///
/// # The caller's SQL
///
/// [`set`](Self::set) and [`filter`](Self::filter) are inserted into the statement **unchanged**: never build them from
/// untrusted input. Column names in them refer to the table; do not use the prefix `lockkeeper_`. They must not change
/// the key. The names of the table and of the key are quoted. If the text of the key's type depends on settings
/// (floats, intervals, money; ranges, arrays and composites), the statements run with `DateStyle` ISO, `IntervalStyle`
/// postgres, `extra_float_digits` 1 and `lc_monetary` C, so that the checkpoint has the same meaning in every session.
///
/// # Limits
///
/// The key has to be one or several columns that are `NOT NULL` and have a unique index on exactly these columns in
/// that order. Any type is possible that has such an index. A table with inheritance children is refused, but a
/// partitioned table is not. A backfill needs two connections of the pool, one of them for the lock, and a server that
/// is not reached through a transaction pooler.
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
/// println!("{} rows, the longest batch took {:?}", done.rows_changed(), done.longest_batch());
/// # Ok(())
/// # }
/// ```
#[must_use = "a backfill does nothing until it is run"]
#[derive(Clone)]
pub struct Backfill {
    pub(super) env: Env,
    pub(super) policy: Policy,
    pub(super) table: TableName,
    pub(super) key: Vec<String>,
    pub(super) set: Vec<String>,
    pub(super) filter: Option<String>,
    pub(super) name: Option<String>,
    pub(super) batch_time: Duration,
    pub(super) batch_rows: RangeInclusive<u32>,
    pub(super) pause: Duration,
    pub(super) lock_timeout: Duration,
    pub(super) max_lock_wait: Duration,
    pub(super) max_lag: Option<Duration>,
    pub(super) max_lag_bytes: Option<u64>,
    pub(super) pauses_for_waiters: bool,
    pub(super) restarts: bool,
    pub(super) trusts_checkpoint: bool,
    pub(super) visible_rows: bool,
    pub(super) follows_inserts: bool,
    pub(super) wait: Duration,
    pub(super) on_progress: Option<Arc<OnProgress>>,
}

impl Backfill {
    pub(crate) fn new(env: Env, policy: Policy, table: TableName, key: BackfillKey) -> Self {
        Self {
            wait: env.lock_wait,
            env,
            policy,
            table,
            key: key.0,
            set: Vec::new(),
            filter: None,
            name: None,
            batch_time: BATCH_TIME,
            batch_rows: BATCH_ROWS,
            pause: Duration::ZERO,
            lock_timeout: LOCK_TIMEOUT,
            max_lock_wait: MAX_LOCK_WAIT,
            max_lag: Some(LAG),
            max_lag_bytes: Some(LAG_BYTES),
            pauses_for_waiters: true,
            restarts: false,
            trusts_checkpoint: false,
            visible_rows: false,
            follows_inserts: false,
            on_progress: None,
        }
    }

    /// The `SET` list of the `UPDATE`: `email_lower = lower(email)`. It is the caller's SQL, see [the type](Self).
    /// Calling this more than once appends to the list.
    pub fn set(mut self, assignments: impl Into<String>) -> Self {
        self.set.push(assignments.into());
        self
    }

    /// The `WHERE` condition of the rows to change: `email_lower IS NULL`; by default all rows are changed. It is the
    /// caller's SQL, see [the type](Self).
    pub fn filter(mut self, condition: impl Into<String>) -> Self {
        self.filter = Some(condition.into());
        self
    }

    /// The name of the backfill in its checkpoint, its lock and its progress: at most 200 bytes, and unique among the
    /// backfills of one schema. The default is derived from the definition with its literals removed, plus a hash of
    /// the full definition if the two differ.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The target duration of a batch; 50 ms by default. A concurrent writer may have to wait about as long.
    pub fn batch_time(mut self, time: Duration) -> Self {
        self.batch_time = time;
        self
    }

    /// The range of the number of rows of a batch, including those that the filter leaves out; 10 to 20 000 by default.
    /// The first batch has 200 rows, or the nearest number in the range.
    pub fn batch_rows(mut self, rows: RangeInclusive<u32>) -> Self {
        self.batch_rows = rows;
        self
    }

    /// The pause after each batch, which leaves I/O capacity to other sessions; none by default.
    pub fn pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// How long a batch may wait for one lock before it is rolled back and retried later; 100 ms by default, rounded
    /// up to whole milliseconds.
    pub fn lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// How long one batch is retried after lock timeouts, deadlocks and serialization failures, before the run
    /// ends with [`RetriesExhausted`](crate::ErrorKind::RetriesExhausted); 5 minutes by default.
    pub fn max_lock_wait(mut self, wait: Duration) -> Self {
        self.max_lock_wait = wait;
        self
    }

    /// Pauses while the lag of a standby or a subscriber is larger than this (`pg_stat_replication.replay_lag`); 10
    /// seconds by default, `None` for no limit. A standby with an intended delay needs another value.
    ///
    /// Only members of `pg_monitor` can see the lag. For other roles it is
    /// [`Unknown`](crate::ReplicationLag::Unknown): the backfill logs one `warn` event and ignores the lag.
    pub fn max_replication_lag(mut self, lag: impl Into<Option<Duration>>) -> Self {
        self.max_lag = lag.into();
        self
    }

    /// Pauses while a standby or a subscriber has more WAL to replay than this, in bytes; 256 MiB by default, `None`
    /// for no limit.
    pub fn max_replication_lag_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_lag_bytes = bytes.into();
        self
    }

    /// Whether to pause while sessions wait for the table or its rows; `true` by default.
    pub fn pause_for_waiters(mut self, pause: bool) -> Self {
        self.pauses_for_waiters = pause;
        self
    }

    /// Restarts at the first row, even if an earlier run has processed rows or is complete.
    pub fn restart(mut self) -> Self {
        self.restarts = true;
        self
    }

    /// Continues from the checkpoint even if it is not of the table as it is now: the table or a column was dropped and
    /// created again, restored, truncated or rewritten. Call it only if the rows before the checkpoint have their new
    /// values.
    pub fn trust_checkpoint(mut self) -> Self {
        self.trusts_checkpoint = true;
        self
    }

    /// Changes only the rows that row-level security lets this role see. By default the run is refused before it changes
    /// a row if row-level security applies to the role, because hidden rows would be left out without a word. A
    /// checkpoint of visible rows is not continued by another role.
    pub fn visible_rows(mut self) -> Self {
        self.visible_rows = true;
        self
    }

    /// Ends when no rows are left, rather than at the last row that existed when the run began. If rows are inserted
    /// faster than they are changed, the run does not end.
    pub fn follow_inserts(mut self) -> Self {
        self.follows_inserts = true;
        self
    }

    /// How long [`run`](Self::run) and [`stream`](Self::stream) wait if another process runs this backfill; the
    /// keeper's [`lock_wait`](crate::KeeperBuilder::lock_wait) by default.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Calls `f` with the progress after each batch, and about once a second during a pause. The run calls it between
    /// two transactions, so `f` must not block.
    pub fn on_progress(mut self, f: impl Fn(&BackfillProgress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Arc::new(f));
        self
    }

    /// Runs the backfill to its end. Returns at once if an earlier run has completed it.
    ///
    /// # SQL
    /// Once: queries of the catalogs, `EXPLAIN SELECT FROM table`, the lock (see
    /// [`SessionAdvisoryLock::acquire`](crate::SessionAdvisoryLock::acquire)), `CREATE TABLE lockkeeper_backfill` if it
    /// does not exist, and the row of the checkpoint. Before a batch, at most every 50 ms: `pg_locks` and
    /// `pg_stat_replication`. For a batch: `BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE` and settings; one
    /// statement that selects the rows, locks and changes them; one message that writes the checkpoint and queries who
    /// waits for this transaction; the statement with which a lost COMMIT can be resolved
    /// ([`resolve_commit`](crate::TransactionOptions::resolve_commit)); COMMIT.
    ///
    /// The role needs the privileges SELECT and UPDATE on the table, and either CREATE on its schema or an existing
    /// `lockkeeper_backfill` there that it may read and write; without them, the error contains the statement that
    /// creates the table. The owner of `lockkeeper_backfill` has to be this role, or a role that has all privileges of
    /// the owner of the backfilled table or of the schema. Any other owner is refused, because its triggers on the
    /// table would run as this role.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) if the definition is invalid (it is checked against the catalogs before
    /// anything is changed), or if there is a checkpoint of that name from which the run cannot continue: of a
    /// different definition, of a key whose type, collation or index has changed since, or of another table or other
    /// columns (see [the type](Self)); and if row-level security applies to the role.
    /// [`Database`](crate::ErrorKind::Database) if the final check found rows that match the filter still.
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) if another process has been running the backfill for the whole
    /// [`wait`](Self::wait). [`LockLost`](crate::ErrorKind::LockLost) if the connection with the lock has ended, or
    /// another process has continued the backfill. [`RetriesExhausted`](crate::ErrorKind::RetriesExhausted) if a batch
    /// failed for the whole of [`max_lock_wait`](Self::max_lock_wait). Other errors of a batch: a violated constraint,
    /// a lost connection. After any of them, the previous batches are committed, and another run continues after them.
    ///
    /// # Cancel safety
    /// Can be dropped at any point: the current batch is cancelled and rolled back, and the lock released. If the
    /// future is dropped during COMMIT, the batch and its checkpoint are either both committed or both rolled back.
    ///
    /// # Longest silence
    /// One [`longest_silence`](crate::KeeperBuilder::longest_silence) for each of BEGIN, COMMIT and ROLLBACK; for a statement
    /// of a batch twice that, and up to a second more, unless its backend is executing it. A batch that was lost is run
    /// again, up to [`max_lock_wait`](Self::max_lock_wait).
    pub async fn run(self) -> Result<BackfillProgress, Error> {
        self.begin().await?.finish().await
    }

    /// Runs the backfill unless another process runs it; `None`, without changing anything, if one does.
    ///
    /// # Errors
    /// As [`run`](Self::run), without `LockTimeout`.
    ///
    /// # Cancel safety
    /// As [`run`](Self::run).
    ///
    /// # Longest silence
    /// One [`longest_silence`](crate::KeeperBuilder::longest_silence) for each of BEGIN, COMMIT and ROLLBACK; for a statement
    /// of a batch twice that, and up to a second more, unless its backend is executing it. A batch that was lost is run
    /// again, up to [`max_lock_wait`](Self::max_lock_wait).
    pub async fn try_run(self) -> Result<Option<BackfillProgress>, Error> {
        match Run::try_begin(self).await? {
            Some(run) => run.finish().await.map(Some),
            None => Ok(None),
        }
    }

    /// Runs the backfill step by step, as a `Stream` of its progress. It works only while it is polled, and holds the
    /// lock until it ends or is dropped.
    pub fn stream(self) -> BackfillStream {
        BackfillStream::new(self)
    }

    pub(super) async fn begin(self) -> Result<Run, Error> {
        Run::begin(self).await
    }

    /// Refuses definitions that are invalid regardless of the database.
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
            .is_some_and(|name| name.is_empty() || name.len() > MAX_NAME_BYTES)
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
        if self.env.connections().most() < 2 {
            return Some(
                "the pool has one connection; a backfill needs two, one of which holds its lock",
            );
        }
        None
    }
}

/// Without the caller's SQL, which can contain data.
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
