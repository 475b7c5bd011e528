//! Workers that lock the same few rows in any order, and what each way of dealing with it gets done.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::{ErrorKind, IncidentKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::Database;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use crate::markdown::{Table, as_f64, quantile};
use crate::random::Random;
use crate::{Effort, Failure, Observer};

const WORKERS: usize = 8;
const ROWS: usize = 6;
/// Connections of each pool: nobody waits for one.
const POOL: usize = WORKERS + 2;
const LOCK_TIMEOUT: Duration = Duration::from_millis(50);
const UPDATE: &str = "UPDATE hot SET n = n + 1 WHERE id = $1";

/// How the two rows are locked, and what is done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// tokio-postgres over deadpool-postgres; after a deadlock once more, at once, as often as it takes.
    ByHand,
    /// `transaction`.
    Ours,
    /// `transaction_with` a `lock_timeout` of 50 ms.
    OursLockTimeout,
    /// The same without a watcher.
    OursUnwatched,
    /// `transaction`, which updates the rows in the order of their keys.
    OursInOrder,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::ByHand,
        Self::Ours,
        Self::OursLockTimeout,
        Self::OursUnwatched,
        Self::OursInOrder,
    ];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ByHand => "by hand, retried at once",
            Self::Ours => "lockkeeper",
            Self::OursLockTimeout => "lockkeeper, `lock_timeout` 50 ms",
            Self::OursUnwatched => "… and no watcher",
            Self::OursInOrder => "lockkeeper, rows in order",
        })
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it was done.
    pub way: Way,
    /// How long transactions were begun.
    pub window: Duration,
    /// Until the last of them had ended.
    pub lasted: Duration,
    /// Transactions that committed.
    pub commits: usize,
    /// How long each of those took that committed within the window, in milliseconds, all attempts and pauses included.
    pub times: Vec<f64>,
    /// Runs of the transactions' statements.
    pub attempts: u64,
    /// Transactions that ended with a deadlock, a lock timeout, or no more attempts.
    pub gave_up: u64,
    /// Deadlocks that the server found, by its own count.
    pub deadlocks: i64,
    /// Incidents by kind: deadlocks, hidden deadlocks, lock timeouts; by hand there are none.
    pub incidents: Option<[u64; 3]>,
}

impl Outcome {
    /// Commits a second.
    #[must_use]
    pub fn commits_per_second(&self) -> f64 {
        as_f64(self.times.len()) / self.window.as_secs_f64()
    }

    /// Deadlocks a second.
    #[must_use]
    pub fn deadlocks_per_second(&self) -> f64 {
        let deadlocks = as_f64(usize::try_from(self.deadlocks).unwrap_or_default());
        deadlocks / self.lasted.as_secs_f64()
    }
}

/// All ways, one after another.
///
/// # Errors
/// A failure that has nothing to do with locks; a commit that is not in the table, or one too many.
pub async fn measure(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Vec<Outcome>, Failure> {
    // Room on the page for the versions of a hot row, as whoever has such rows would give them.
    observer
        .client
        .batch_execute(&format!(
            "CREATE TABLE hot (id bigint PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 10); \
             INSERT INTO hot SELECT id, 0 FROM generate_series(1, {ROWS}) AS id"
        ))
        .await?;
    let window = Duration::from_millis(effort.of(10_000, 1_500));
    let mut outcomes = Vec::new();
    for way in Way::ALL {
        outcomes.push(of_way(way, window, database, observer).await?);
    }
    Ok(outcomes)
}

async fn of_way(
    way: Way,
    window: Duration,
    database: &Database,
    observer: &Observer,
) -> Result<Outcome, Failure> {
    let sum = || async {
        let row = observer
            .client
            .query_one("SELECT sum(n)::bigint FROM hot", &[])
            .await?;
        Ok::<i64, Failure>(row.get(0))
    };
    let (deadlocks, before) = (observer.deadlocks_when_alone().await?, sum().await?);
    let run = Arc::new(Run::new(way, database));
    run.connect().await?;
    let started = Instant::now();
    let tasks: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let run = Arc::clone(&run);
            tokio::spawn(async move { run.work(worker, started + window).await })
        })
        .collect();
    let mut done = Done::default();
    for task in tasks {
        done.add(task.await??);
    }
    let lasted = started.elapsed();
    run.pool.close();
    let incidents = run.incidents();
    let attempts = run.attempts.load(Ordering::Relaxed);
    // The keeper's side connection goes with it.
    drop(run);
    let written = sum().await? - before;
    if i64::try_from(2 * done.commits)? != written {
        return Err(format!("{way}: {} commits of 2, {written} written", done.commits).into());
    }
    Ok(Outcome {
        way,
        window,
        lasted,
        commits: done.commits,
        times: done.times,
        attempts,
        gave_up: done.gave_up,
        deadlocks: observer.deadlocks_when_alone().await? - deadlocks,
        incidents,
    })
}

/// What one worker did, or all.
#[derive(Debug, Default)]
struct Done {
    commits: usize,
    times: Vec<f64>,
    gave_up: u64,
}

impl Done {
    fn add(&mut self, other: Self) {
        self.commits += other.commits;
        self.times.extend(other.times);
        self.gave_up += other.gave_up;
    }
}

/// What the workers share.
struct Run {
    way: Way,
    pool: Pool,
    keeper: Keeper,
    options: TransactionOptions,
    attempts: AtomicU64,
    incidents: Arc<[AtomicU64; 3]>,
}

impl Run {
    fn new(way: Way, database: &Database) -> Self {
        let pool = database.pool(POOL);
        let incidents = Arc::new([const { AtomicU64::new(0) }; 3]);
        let counted = Arc::clone(&incidents);
        let keeper = Keeper::builder(pool.clone())
            .side_connection(database.config(), NoTls)
            .watch(way != Way::OursUnwatched)
            .on_incident(move |incident| {
                let kind = match incident.kind() {
                    IncidentKind::Deadlock => 0,
                    IncidentKind::HiddenDeadlock => 1,
                    IncidentKind::LockTimeout => 2,
                    _ => return,
                };
                counted[kind].fetch_add(1, Ordering::Relaxed);
            })
            .build();
        let options = TransactionOptions::new();
        let options = match way {
            Way::OursLockTimeout | Way::OursUnwatched => options.lock_timeout(LOCK_TIMEOUT),
            _ => options,
        };
        Self {
            way,
            pool,
            keeper,
            options,
            attempts: AtomicU64::new(0),
            incidents,
        }
    }

    /// Logins are not part of it.
    async fn connect(&self) -> Result<(), Failure> {
        let mut all = Vec::new();
        for _ in 0..POOL {
            all.push(self.pool.get().await?);
        }
        Ok(())
    }

    fn incidents(&self) -> Option<[u64; 3]> {
        let count = |n: usize| self.incidents[n].load(Ordering::Relaxed);
        (self.way != Way::ByHand).then(|| [0, 1, 2].map(count))
    }

    /// One transaction after another, until then.
    async fn work(&self, worker: usize, until: Instant) -> Result<Done, Failure> {
        let mut random = Random::new(u64::try_from(worker)?);
        let mut done = Done::default();
        loop {
            let started = Instant::now();
            if started >= until {
                return Ok(done);
            }
            let first = random.below(ROWS);
            let second = (first + 1 + random.below(ROWS - 1)) % ROWS;
            let mut rows = [i64::try_from(first)? + 1, i64::try_from(second)? + 1];
            if self.way == Way::OursInOrder {
                rows.sort_unstable();
            }
            let committed = match self.way {
                Way::ByHand => self.by_hand(rows).await?,
                _ => self.ours(rows).await?,
            };
            if !committed {
                done.gave_up += 1;
                continue;
            }
            done.commits += 1;
            if Instant::now() <= until {
                done.times.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
    }

    async fn by_hand(&self, rows: [i64; 2]) -> Result<bool, Failure> {
        let mut client = self.pool.get().await?;
        loop {
            self.attempts.fetch_add(1, Ordering::Relaxed);
            let tx = client.transaction().await?;
            let updated = async {
                let statement = tx.prepare_cached(UPDATE).await?;
                for row in rows {
                    tx.execute(&statement, &[&row]).await?;
                }
                Ok::<_, tokio_postgres::Error>(())
            };
            match updated.await {
                Ok(()) => {
                    tx.commit().await?;
                    return Ok(true);
                }
                Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => {
                    tx.rollback().await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn ours(&self, rows: [i64; 2]) -> Result<bool, Failure> {
        let attempts = &self.attempts;
        let ran = self
            .keeper
            .transaction_with(self.options.clone(), async move |tx: &mut Tx| {
                attempts.fetch_add(1, Ordering::Relaxed);
                let statement = tx.prepare_cached(UPDATE).await?;
                for row in rows {
                    tx.execute(&statement, &[&row]).await?;
                }
                Ok::<_, lockkeeper::Error>(())
            })
            .await;
        match ran {
            Ok(()) => Ok(true),
            Err(error) => match error.kind() {
                ErrorKind::RetriesExhausted | ErrorKind::Deadlock | ErrorKind::LockTimeout => {
                    Ok(false)
                }
                _ => Err(error.into()),
            },
        }
    }
}

/// Everything, a row for each way.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new([
        "8 workers, 2 of 6 rows",
        "commits/s",
        "deadlocks/s",
        "attempts per commit",
        "gave up",
        "median",
        "99 %",
        "longest",
        "reported: deadlocks, hidden, lock timeouts",
    ]);
    for outcome in outcomes {
        let commits = as_f64(outcome.commits);
        let attempts = as_f64(usize::try_from(outcome.attempts).unwrap_or(usize::MAX));
        let millis = |share| format!("{:.1} ms", quantile(&outcome.times, share));
        table.row([
            outcome.way.to_string(),
            format!("{:.0}", outcome.commits_per_second()),
            format!("{:.1}", outcome.deadlocks_per_second()),
            format!("{:.2}", attempts / commits),
            outcome.gave_up.to_string(),
            millis(0.5),
            millis(0.99),
            millis(1.0),
            match outcome.incidents {
                Some([deadlocks, hidden, timeouts]) => {
                    format!("{deadlocks}, {hidden}, {timeouts}")
                }
                None => "–".to_owned(),
            },
        ]);
    }
    table
}
