//! Work that runs once in each period, whoever asks first.

use std::time::Duration;

use super::set_up::{SetUp, set_up};
use super::sql::once::{self as sql, Claim};
use super::{Coordination, begin_error, plain, table};
use crate::advisory::{LockedBy, OpenLocked};
use crate::error::{
    Error, ErrorKind, is_insufficient_privilege, is_invalid_parameter, is_missing_table,
};
use crate::key::LockKey;
use crate::postgres::TableName;
use crate::transaction::{AsyncFunc, BoxFuture, NoRetry, Open, Tx, run};

const DAY: u64 = 86_400;

/// Work that runs once in each period, over all processes that ask for it under the same name.
///
/// From [`Keeper::once`](crate::Keeper::once). Every process calls [`run`](Self::run) as often as it likes, for instance once a
/// minute: the first one in the period runs the work, in a transaction that also records the run. What fails is rolled back
/// with its record, and the next call of any process runs it again.
///
/// - A period is a bucket of the calendar, by the server's clock: with a period of a day, from midnight to midnight, UTC
///   unless a [`time_zone`](Self::time_zone) is given; weeks begin on Mondays. Any other length counts from Monday,
///   2001-01-01. Or it is the time [since the last run](Self::since_last_run).
/// - At most one run in a period is committed. A clock that is put back does not repeat it. A clock that was ahead delays the
///   next run until it would be due by the clock as it was, unless the row of the name in `lockkeeper_once` is deleted.
/// - All calls of a name have to agree on the period, the time zone and [`since_last_run`](Self::since_last_run). The last run
///   is all that is recorded, and each call decides by its own period whether another one is due.
/// - Effects outside the transaction belong behind its COMMIT ([`Tx::after_commit`]): the work may fail, and may run again
///   after a deadlock, like every section.
///
/// # Examples
/// ```no_run
/// # use std::time::Duration;
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let nightly = keeper.once("nightly", Duration::from_secs(86_400)).time_zone("Europe/Berlin");
/// nightly.set_up().await?;
/// let ran = nightly
///     .run(async |tx| {
///         let deleted = tx.execute("DELETE FROM visit WHERE at < now() - interval '90 days'", &[]).await?;
///         Ok::<_, lockkeeper::Error>(deleted)
///     })
///     .await?;
/// match ran {
///     Some(deleted) => println!("{deleted} rows deleted"),
///     None => println!("done already, or being done by another process"),
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing runs before `run` is awaited"]
pub struct Once {
    coordination: Coordination,
    name: String,
    period: Duration,
    time_zone: Option<String>,
    since_last_run: bool,
    wait: Option<Duration>,
}

impl Once {
    pub(crate) fn new(coordination: Coordination, name: String, period: Duration) -> Self {
        Self {
            coordination,
            name,
            period,
            time_zone: None,
            since_last_run: false,
            wait: None,
        }
    }

    /// The time zone in which days begin at midnight, by its name at the server, such as `Europe/Berlin`; UTC by default.
    ///
    /// Only for a period of whole days: where clocks are put back, an hour happens twice.
    pub fn time_zone(mut self, zone: impl Into<String>) -> Self {
        self.time_zone = Some(zone.into());
        self
    }

    /// At least one period from the beginning of a run to that of the next, instead of once in each bucket of the calendar.
    pub fn since_last_run(mut self) -> Self {
        self.since_last_run = true;
        self
    }

    /// Waits for a run of another process that is under way, at most for so long. `None` then means that the work of this
    /// period is done and committed. Without it, [`run`](Self::run) gives `None` at once.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Makes the table `lockkeeper_once`, if it is missing. It is the same one for all names.
    ///
    /// # SQL
    /// One transaction under an advisory lock of its own: a query, and what [`sql`](Self::sql) shows if the table is missing.
    /// Roles that run the work need `SELECT, INSERT, UPDATE` on it.
    ///
    /// # Errors
    /// [`Database`](ErrorKind::Database) with what to grant, where the role may not do it; as
    /// [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire) and [`XactGuard::commit`](crate::XactGuard::commit) besides.
    ///
    /// # Cancel safety
    /// Dropped, it is rolled back. Dropped during COMMIT, it may have committed. It can be called again.
    ///
    /// # Longest silence
    /// As [`AdvisoryLock::acquire`](crate::AdvisoryLock::acquire), and then as a transaction.
    pub async fn set_up(&self) -> Result<(), Error> {
        let table = self.table()?;
        let what = SetUp {
            tables: &[&table],
            create: sql::create(&table),
            is_done: None,
            finish: None,
            more_rights: "",
            documented: "Once::sql",
        };
        set_up(&self.coordination, &what).await
    }

    /// The statement of [`set_up`](Self::set_up), for a role that may run it; it can be run again at any time.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) where no schema can have the name that the keeper was built with.
    pub fn sql(&self) -> Result<String, Error> {
        Ok(format!("{};\n", sql::create(&self.table()?)))
    }

    fn table(&self) -> Result<TableName, Error> {
        table(self.coordination.connections(), sql::TABLE)
    }

    fn check(&self) -> Result<(), Error> {
        let (seconds, nanos) = (self.period.as_secs(), self.period.subsec_nanos());
        let flaw = if self.name.contains('\0') {
            "the name has a NUL in it, which no text of PostgreSQL's can have"
        } else if self.period < Duration::from_millis(1) || seconds > i32::MAX.unsigned_abs().into()
        {
            "the period has to be between 1 ms and 68 years"
        } else if self
            .time_zone
            .as_deref()
            .is_some_and(|zone| zone.contains('\0'))
        {
            "the time zone has a NUL in it, which no text of PostgreSQL's can have"
        } else if self.time_zone.is_some() && (seconds % DAY != 0 || nanos != 0) {
            "a time zone is for periods of whole days; in others an hour that happens twice would be one or two buckets"
        } else if self.time_zone.is_some() && self.since_last_run {
            "a time zone says when a day begins, which does not matter to the time since the last run"
        } else {
            return Ok(());
        };
        Err(Error::config(format!(
            "once({:?}, {:?}): {flaw}",
            self.name, self.period
        )))
    }

    /// Runs the work if no run of this period is recorded, and none is under way; `None`, without running it, otherwise. **It
    /// may run more than once**, as [`AdvisoryLock::run`](crate::AdvisoryLock::run) does, and is committed once.
    ///
    /// `Ok` commits the work together with the record that it ran. `Err` rolls both back, and comes back as it was.
    ///
    /// # SQL
    /// Three round trips besides the work's own: `BEGIN` and the lock ("lockkeeper once" and the name), the record in
    /// `lockkeeper_once`, and COMMIT.
    ///
    /// # Errors
    /// The closure's own; [`Config`](ErrorKind::Config), before anything is sent, for a period that cannot be;
    /// [`Database`](ErrorKind::Database) with what to do, where there is no table, no such time zone, or no right to the table;
    /// [`LockTimeout`](ErrorKind::LockTimeout) only with [`wait`](Self::wait); otherwise as
    /// [`AdvisoryLock::run`](crate::AdvisoryLock::run).
    ///
    /// # Cancel safety
    /// May be dropped at any point: work and record are rolled back. Dropped during COMMIT, both may have been committed.
    ///
    /// # Longest silence
    /// As [`AdvisoryLock::run`](crate::AdvisoryLock::run), and one more for the record.
    pub async fn run<R, E, F>(self, f: F) -> Result<Option<R>, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send
            + Clone,
        E: From<Error> + Send,
        R: Send,
    {
        let open = self.open()?;
        let policy = self.coordination.advisory.runner.policy(&plain());
        run(&policy, &NoRetry, &open, f).await
    }

    fn open(&self) -> Result<OpenOnce, Error> {
        self.check()?;
        let table = self.table()?;
        let key = LockKey::from(("lockkeeper once", &self.name));
        let (how, wait) = match self.wait {
            Some(wait) => (LockedBy::Waiting, wait),
            None => (LockedBy::Trying, self.coordination.lock_wait),
        };
        let lock = self.coordination.describe(key.clone(), wait);
        let claim = Claim {
            name: &self.name,
            by: &self.coordination.application_name,
            period: self.period,
            time_zone: self.time_zone.as_deref().unwrap_or("UTC"),
            since_last_run: self.since_last_run,
        };
        Ok(OpenOnce {
            claim: sql::claim(&table, &claim),
            locked: OpenLocked {
                lock,
                how,
                group: None,
            },
            table,
            time_zone: self.time_zone.clone(),
            key,
        })
    }
}

/// Transactions that have recorded their run.
struct OpenOnce {
    locked: OpenLocked,
    claim: String,
    table: TableName,
    time_zone: Option<String>,
    key: LockKey,
}

impl Open for OpenOnce {
    fn open(&self, times_victim: u32) -> BoxFuture<'_, Result<Option<Tx>, Error>> {
        Box::pin(async move {
            let opened = self.locked.open(times_victim).await;
            let Some(tx) = opened.map_err(begin_error)? else {
                return Ok(None);
            };
            // Cancel safety: dropped, the transaction is rolled back in the background.
            let claimed = tx.session().message(&self.claim).await;
            if claimed.as_ref().is_ok_and(|reply| sql::is_claimed(reply)) {
                return Ok(Some(tx));
            }
            tx.rollback().await;
            claimed.map(|_| None).map_err(|error| self.explain(error))
        })
    }

    fn operation(&self) -> &'static str {
        "once"
    }
}

impl OpenOnce {
    fn explain(&self, error: tokio_postgres::Error) -> Error {
        let (table, error) = (&self.table, Error::from(error).with_key(&self.key));
        if is_missing_table(&error) {
            error.with_kind(ErrorKind::Database).with_detail(format!(
                "there is no {table}; call set_up() of keeper.once(…), or have the SQL of Once::sql run"
            ))
        } else if is_insufficient_privilege(&error) {
            error.with_detail(format!(
                "what runs once needs GRANT SELECT, INSERT, UPDATE ON {table}, and USAGE on its schema"
            ))
        } else if let Some(zone) = &self.time_zone
            && is_invalid_parameter(&error)
        {
            error.with_detail(format!(
                "the server has no time zone {zone:?}; pg_timezone_names lists those that it has"
            ))
        } else {
            error
        }
    }
}
