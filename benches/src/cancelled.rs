//! Calls that are given up at random moments, and what is left of them.
//!
//! Every second call is given up, the others are waited for: were all of them given up, no pool would ever get through
//! the login of a new connection, and the figures would be about nothing else. The moments are spread over the time that
//! such a call takes here, on a fast machine and on a slow one: first some calls are made by hand and waited for, and the
//! longest patience is a few times theirs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkeeper_testkit::Database;

use crate::alarm::Alarm;
use crate::markdown::{Table, as_f64, median};
use crate::random::Random;
use crate::{Effort, Failure, Left, Observer, Peer, Pools};

const TASKS: u64 = 16;
const KEYS: usize = 4;
const POOL: usize = 8;
/// Long enough for all to be waiting at the server.
const GIVEN_UP_AFTER: Duration = Duration::from_millis(200);
/// What is left after this long is left.
const GRACE: Duration = Duration::from_secs(1);
/// When a peer is so stuck that it does not get through, its figures are those until then.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the server may take to open a whole pool.
const POOL_OPENS: Duration = Duration::from_secs(5);
/// The least patience.
const SHORTEST: Duration = Duration::from_micros(20);
/// How long a lock is held, from and to.
const HOLD: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));

/// Whose call, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// `advisory_lock(…).acquire()`.
    Lockkeeper,
    /// `advisory_lock(…).session().acquire()`.
    LockkeeperSession,
    /// `begin()` and `SELECT pg_advisory_xact_lock($1)`.
    Sqlx,
    /// `PgAdvisoryLock::acquire`.
    SqlxSession,
}

impl Caller {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Lockkeeper,
        Self::LockkeeperSession,
        Self::Sqlx,
        Self::SqlxSession,
    ];

    /// Its library.
    #[must_use]
    pub fn peer(self) -> Peer {
        match self {
            Self::Lockkeeper | Self::LockkeeperSession => Peer::Lockkeeper,
            Self::Sqlx | Self::SqlxSession => Peer::Sqlx,
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Lockkeeper => "lockkeeper, transaction lock",
            Self::LockkeeperSession => "lockkeeper, session lock",
            Self::Sqlx => "sqlx, transaction lock",
            Self::SqlxSession => "sqlx, session lock",
        })
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Who it was.
    pub caller: Caller,
    /// Calls given up.
    pub cancelled: u64,
    /// Calls that were faster, or were not to be given up.
    pub granted: u64,
    /// Calls that failed, and how the first of them did.
    pub failed: u64,
    /// The first failure.
    pub failure: Option<String>,
    /// All of it.
    pub took: Duration,
    /// Sessions that the server has begun besides the pool's first ones, whether or not the pool lived to see them.
    pub opened: u64,
    /// What was left a second later, or when it was nothing.
    pub left: Left,
    /// How long after the last call that was.
    pub after: Duration,
    /// How long it then took until all connections of the pool had answered; `None` where they did not.
    pub whole_after: Option<Duration>,
    /// What a lock that somebody keeps makes of calls that are given up.
    pub behind_a_holder: BehindAHolder,
}

/// A lock is kept by somebody else. As many calls as the pool has connections wait for it and are given up.
#[derive(Clone, Copy, Debug)]
pub struct BehindAHolder {
    /// Those that still wait at the server a second later.
    pub waiting: i64,
    /// Whether the pool gives all its connections then, while the lock is still kept.
    pub pool_is_whole: bool,
}

impl Outcome {
    /// New backends for each thousand of cancelled calls.
    #[must_use]
    pub fn opened_per_thousand(&self) -> f64 {
        let opened = as_f64(usize::try_from(self.opened).unwrap_or_default());
        let cancelled = as_f64(usize::try_from(self.cancelled).unwrap_or_default());
        opened * 1000.0 / cancelled
    }

    /// Nothing held, nothing waiting, the pool at its size.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.left.is_nothing()
            && self.whole_after.is_some()
            && self.failed == 0
            && self.behind_a_holder.waiting == 0
            && self.behind_a_holder.pool_is_whole
    }
}

/// All callers, one after another.
///
/// # Errors
/// Whatever goes wrong besides the calls.
pub async fn measure(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Vec<Outcome>, Failure> {
    let longest = 4 * usual_time(database, effort).await?;
    let mut outcomes = Vec::new();
    for caller in Caller::ALL {
        outcomes.push(of_caller(caller, longest, database, observer, effort).await?);
    }
    Ok(outcomes)
}

/// How long it takes to get a lock here when nobody gives up.
async fn usual_time(database: &Database, effort: Effort) -> Result<Duration, Failure> {
    let pools = Arc::new(Pools::new(&database.config(), POOL)?);
    pools.all_answer(Peer::ByHand).await?;
    let alarm = Alarm::new();
    let calls = effort.of(40, 5);
    let tasks: Vec<_> = (0..TASKS)
        .map(|seed| {
            let (pools, alarm) = (Arc::clone(&pools), alarm.clone());
            tokio::spawn(async move {
                let mut random = Random::new(seed);
                let mut times = Vec::new();
                for _ in 0..calls {
                    let key = i64::try_from(random.below(KEYS))?;
                    let started = Instant::now();
                    let client = pools.by_hand.get().await?;
                    client
                        .execute("SELECT pg_advisory_lock($1)", &[&key])
                        .await?;
                    times.push(started.elapsed().as_secs_f64());
                    alarm.after(random.time(HOLD.0, HOLD.1)).await;
                    client
                        .execute("SELECT pg_advisory_unlock($1)", &[&key])
                        .await?;
                }
                Ok::<_, Failure>(times)
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    pools.close().await;
    Ok(Duration::from_secs_f64(median(&times)))
}

async fn of_caller(
    caller: Caller,
    longest: Duration,
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Outcome, Failure> {
    let sessions = observer.sessions_when_alone().await?;
    let pools = Arc::new(Pools::new(&database.config(), POOL)?);
    let peer = caller.peer();
    pools.all_answer(peer).await?;

    let run = Arc::new(Run {
        target: effort.of(10_000, 200),
        longest,
        cancelled: AtomicU64::new(0),
        granted: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        alarm: Alarm::new(),
        pools: Arc::clone(&pools),
    });
    let started = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|seed| {
            let run = Arc::clone(&run);
            tokio::spawn(async move { run.task(caller, seed, started + LIMIT).await })
        })
        .collect();
    let mut failure = None;
    for task in tasks {
        failure = failure.or(task.await?);
    }
    let took = started.elapsed();

    let (left, after) = observer.left_within(GRACE).await?;
    let asked = Instant::now();
    let whole = tokio::time::timeout(POOL_OPENS, pools.all_answer(peer)).await;
    let whole_after = matches!(whole, Ok(Ok(()))).then(|| asked.elapsed());
    pools.close().await;
    let begun = observer.sessions_when_alone().await? - sessions;
    Ok(Outcome {
        caller,
        cancelled: run.cancelled.load(Ordering::Relaxed),
        granted: run.granted.load(Ordering::Relaxed),
        failed: run.failed.load(Ordering::Relaxed),
        failure,
        took,
        opened: u64::try_from(begun)?.saturating_sub(u64::try_from(POOL)?),
        left,
        after,
        whole_after,
        behind_a_holder: behind_a_holder(caller, database, observer).await?,
    })
}

async fn behind_a_holder(
    caller: Caller,
    database: &Database,
    observer: &Observer,
) -> Result<BehindAHolder, Failure> {
    let pools = Arc::new(Pools::new(&database.config(), POOL)?);
    let holders = Pools::new(&database.config(), 1)?;
    let held = acquire(&holders, caller, 0).await?;
    pools.all_answer(caller.peer()).await?;
    let waiters: Vec<_> = (0..POOL)
        .map(|_| {
            let pools = Arc::clone(&pools);
            tokio::spawn(async move { acquire(&pools, caller, 0).await.map(drop) })
        })
        .collect();
    tokio::time::sleep(GIVEN_UP_AFTER).await;
    for waiter in &waiters {
        waiter.abort();
    }
    for waiter in waiters {
        // An error is what an aborted task ends with.
        waiter.await.ok();
    }
    let started = Instant::now();
    let mut waiting = observer.left().await?.waiting;
    while waiting > 0 && started.elapsed() < GRACE {
        tokio::time::sleep(Duration::from_millis(5)).await;
        waiting = observer.left().await?.waiting;
    }
    let whole = tokio::time::timeout(GRACE, pools.all_answer(caller.peer())).await;
    held.end(true).await?;
    holders.close().await;
    pools.close().await;
    Ok(BehindAHolder {
        waiting,
        pool_is_whole: matches!(whole, Ok(Ok(()))),
    })
}

/// What the tasks share.
struct Run {
    target: u64,
    /// The most patience that a call is given.
    longest: Duration,
    cancelled: AtomicU64,
    granted: AtomicU64,
    failed: AtomicU64,
    alarm: Alarm,
    pools: Arc<Pools>,
}

impl Run {
    /// Calls until the target is reached; the first failure, if any.
    async fn task(&self, caller: Caller, seed: u64, limit: Instant) -> Option<String> {
        let mut random = Random::new(seed);
        let mut failure = None;
        while self.cancelled.load(Ordering::Relaxed) < self.target && Instant::now() < limit {
            let key = random.below(KEYS);
            let patience = random.time(SHORTEST, self.longest);
            let hold = random.time(HOLD.0, HOLD.1);
            let release = random.below(2) == 0;
            let give_up = random.below(2) == 0;
            let result = tokio::select! {
                biased;
                () = self.alarm.after(patience), if give_up => {
                    self.cancelled.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                guard = acquire(&self.pools, caller, key) => guard,
            };
            let ended = match result {
                Ok(guard) => {
                    self.granted.fetch_add(1, Ordering::Relaxed);
                    self.alarm.after(hold).await;
                    guard.end(release).await
                }
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                self.failed.fetch_add(1, Ordering::Relaxed);
                failure.get_or_insert(error.to_string());
            }
        }
        failure
    }
}

async fn acquire(pools: &Pools, caller: Caller, key: usize) -> Result<Guard, Failure> {
    Ok(match caller {
        Caller::Lockkeeper => {
            let lock = pools.keeper.advisory_lock(pools.names[key].as_str());
            Guard::Lockkeeper(lock.acquire().await?)
        }
        Caller::LockkeeperSession => {
            let lock = pools.keeper.advisory_lock(pools.names[key].as_str());
            Guard::LockkeeperSession(lock.session().acquire().await?)
        }
        Caller::Sqlx => {
            let mut tx = pools.sqlx.begin().await?;
            sqlx::query("SELECT pg_advisory_xact_lock($1)")
                .bind(i64::try_from(key)?)
                .execute(&mut *tx)
                .await?;
            Guard::Sqlx(tx)
        }
        Caller::SqlxSession => {
            let connection = pools.sqlx.acquire().await?;
            Guard::SqlxSession(pools.sqlx_locks[key].acquire(connection).await?)
        }
    })
}

enum Guard {
    Lockkeeper(lockkeeper::XactGuard),
    LockkeeperSession(lockkeeper::SessionGuard),
    Sqlx(sqlx::Transaction<'static, sqlx::Postgres>),
    SqlxSession(sqlx::postgres::PgAdvisoryLockGuard<sqlx::pool::PoolConnection<sqlx::Postgres>>),
}

impl Guard {
    /// Released, or only dropped.
    async fn end(self, release: bool) -> Result<(), Failure> {
        if !release {
            return Ok(());
        }
        match self {
            Self::Lockkeeper(guard) => guard.commit().await?,
            Self::LockkeeperSession(guard) => guard.release().await?,
            Self::Sqlx(tx) => tx.commit().await?,
            Self::SqlxSession(guard) => drop(guard.release_now().await?),
        }
        Ok(())
    }
}

/// Everything, a row for each caller.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new([
        "who",
        "cancelled",
        "granted",
        "failed",
        "took",
        "left within 1 s",
        "after",
        "pool whole",
        "new backends per 1000 cancelled",
        "behind a holder: waiting after 1 s",
        "pool whole then",
    ]);
    for outcome in outcomes {
        table.row([
            outcome.caller.to_string(),
            outcome.cancelled.to_string(),
            outcome.granted.to_string(),
            match &outcome.failure {
                Some(failure) => format!("{} ({failure})", outcome.failed),
                None => outcome.failed.to_string(),
            },
            format!("{:.1} s", outcome.took.as_secs_f64()),
            outcome.left.to_string(),
            format!("{:.0} ms", outcome.after.as_secs_f64() * 1e3),
            match outcome.whole_after {
                Some(after) => format!("after {:.0} ms", after.as_secs_f64() * 1e3),
                None => "no".to_owned(),
            },
            format!("{:.1}", outcome.opened_per_thousand()),
            outcome.behind_a_holder.waiting.to_string(),
            yes_or_no(outcome.behind_a_holder.pool_is_whole),
        ]);
    }
    table
}

fn yes_or_no(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}
