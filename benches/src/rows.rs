//! Workers that change a few of the same rows in any order, with and without `lock_rows` before.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::{ErrorKind, Keeper, Tx};
use lockkeeper_testkit::Database;

use crate::markdown::{Table, as_f64, quantile};
use crate::random::Random;
use crate::{Effort, Failure, Observer};

const WORKERS: usize = 8;
const ROWS: usize = 40;
const OF_THEM: usize = 4;
const ONE: &str = "UPDATE hot_row SET n = n + 1 WHERE id = $1";
/// As many write it who have a list of keys and values. Rows are locked as the plan comes to them: in the list's order,
/// where the table is looked up for each of its entries.
const ALL: &str = "UPDATE hot_row SET n = n + v.more FROM unnest($1::bigint[], $2::bigint[]) AS v (id, more) \
     WHERE hot_row.id = v.id";

/// How the rows are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One UPDATE for each, in the order they come in.
    OneByOne,
    /// The same, after `lock_rows`.
    OneByOneLocked,
    /// One UPDATE for all.
    Together,
    /// The same, after `lock_rows`.
    TogetherLocked,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::OneByOne,
        Self::OneByOneLocked,
        Self::Together,
        Self::TogetherLocked,
    ];

    /// Whether the rows are locked in order before they are changed.
    #[must_use]
    pub fn locks_first(self) -> bool {
        matches!(self, Self::OneByOneLocked | Self::TogetherLocked)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::OneByOne => "4 × `UPDATE … WHERE id = $1`",
            Self::OneByOneLocked => "`lock_rows`, then the same",
            Self::Together => "`UPDATE … FROM unnest($1, $2)`",
            Self::TogetherLocked => "`lock_rows`, then the same",
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
    /// How long each transaction took that committed within the window, in milliseconds, attempts and pauses included.
    pub times: Vec<f64>,
    /// Runs of the transactions' statements.
    pub attempts: u64,
    /// Transactions that committed, or gave up.
    pub transactions: usize,
    /// Transactions that had no more attempts.
    pub gave_up: usize,
    /// Deadlocks that the server found, by its own count.
    pub deadlocks: i64,
}

/// All ways, one after another, through `transaction` with its defaults.
///
/// # Errors
/// A failure that has nothing to do with locks; a change that is lost.
pub async fn measure(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Vec<Outcome>, Failure> {
    observer
        .client
        .batch_execute(&format!(
            "CREATE TABLE hot_row (id bigint PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 10); \
             INSERT INTO hot_row SELECT id, 0 FROM generate_series(1, {ROWS}) AS id; \
             INSERT INTO hot_row SELECT id, 0 FROM generate_series({ROWS} + 1, 20000) AS id; ANALYZE hot_row"
        ))
        .await?;
    let window = Duration::from_millis(effort.of(10_000, 1_000));
    let mut outcomes = Vec::new();
    for way in Way::ALL {
        outcomes.push(of_way(way, window, database, observer).await?);
    }
    Ok(outcomes)
}

async fn sum(observer: &Observer) -> Result<i64, Failure> {
    let sql = "SELECT sum(n)::bigint FROM hot_row";
    Ok(observer.client.query_one(sql, &[]).await?.get(0))
}

async fn of_way(
    way: Way,
    window: Duration,
    database: &Database,
    observer: &Observer,
) -> Result<Outcome, Failure> {
    let (deadlocks, before) = (observer.deadlocks_when_alone().await?, sum(observer).await?);
    let pool = database.pool(WORKERS);
    // Without a watcher: what is measured is the locks.
    let keeper = Keeper::builder(pool.clone()).watch(false).build();
    let mut warm = Vec::new();
    for _ in 0..WORKERS {
        warm.push(pool.get().await?);
    }
    drop(warm);
    let until = Instant::now() + window;
    let tasks: Vec<_> = (0..WORKERS)
        .map(|worker| tokio::spawn(work(way, keeper.clone(), worker, until)))
        .collect();
    let mut outcome = Outcome {
        way,
        window,
        times: Vec::new(),
        attempts: 0,
        transactions: 0,
        gave_up: 0,
        deadlocks: 0,
    };
    for task in tasks {
        let done = task.await??;
        outcome.times.extend(done.times);
        outcome.attempts += done.attempts;
        outcome.transactions += done.transactions;
        outcome.gave_up += done.gave_up;
    }
    pool.close();
    drop(keeper);
    outcome.deadlocks = observer.deadlocks_when_alone().await? - deadlocks;
    let written = sum(observer).await? - before;
    let committed = OF_THEM * (outcome.transactions - outcome.gave_up);
    if i64::try_from(committed)? != written {
        return Err(format!("{way}: {committed} changes committed, {written} written").into());
    }
    Ok(outcome)
}

#[derive(Debug, Default)]
struct Done {
    times: Vec<f64>,
    attempts: u64,
    transactions: usize,
    gave_up: usize,
}

async fn work(way: Way, keeper: Keeper, worker: usize, until: Instant) -> Result<Done, Failure> {
    let mut random = Random::new(u64::try_from(worker)?);
    let mut done = Done::default();
    let attempts = AtomicU64::new(0);
    loop {
        let started = Instant::now();
        if started >= until {
            done.attempts = attempts.into_inner();
            return Ok(done);
        }
        let mut ids = Vec::with_capacity(OF_THEM);
        while ids.len() < OF_THEM {
            let id = i64::try_from(random.below(ROWS))? + 1;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        done.transactions += 1;
        match change(way, &keeper, &attempts, &ids).await {
            Ok(()) if Instant::now() <= until => {
                done.times.push(started.elapsed().as_secs_f64() * 1e3);
            }
            Ok(()) => {}
            Err(error) => match error.kind() {
                ErrorKind::RetriesExhausted | ErrorKind::Deadlock => done.gave_up += 1,
                _ => return Err(error.into()),
            },
        }
    }
}

async fn change(
    way: Way,
    keeper: &Keeper,
    attempts: &AtomicU64,
    ids: &[i64],
) -> Result<(), lockkeeper::Error> {
    keeper
        .transaction(async move |tx: &mut Tx| {
            attempts.fetch_add(1, Ordering::Relaxed);
            if way.locks_first() {
                tx.lock_rows("hot_row", "id", ids).await?;
            }
            if matches!(way, Way::OneByOne | Way::OneByOneLocked) {
                let statement = tx.prepare_cached(ONE).await?;
                for id in ids {
                    tx.execute(&statement, &[id]).await?;
                }
            } else {
                let statement = tx.prepare_cached(ALL).await?;
                let more = [1_i64; OF_THEM];
                tx.execute(&statement, &[&ids, &more.as_slice()]).await?;
            }
            Ok(())
        })
        .await
}

/// Everything, a row for each way.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new([
        "8 workers, 4 of 40 rows",
        "commits/s",
        "deadlocks",
        "attempts per transaction",
        "gave up",
        "median",
        "99 %",
        "longest",
    ]);
    for outcome in outcomes {
        let attempts = as_f64(usize::try_from(outcome.attempts).unwrap_or(usize::MAX));
        let millis = |share| format!("{:.1} ms", quantile(&outcome.times, share));
        table.row([
            outcome.way.to_string(),
            format!(
                "{:.0}",
                as_f64(outcome.times.len()) / outcome.window.as_secs_f64()
            ),
            outcome.deadlocks.to_string(),
            format!("{:.2}", attempts / as_f64(outcome.transactions)),
            outcome.gave_up.to_string(),
            millis(0.5),
            millis(0.99),
            millis(1.0),
        ]);
    }
    table
}
