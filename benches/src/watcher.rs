//! What the watcher costs while many wait: the server's time for its questions, and the commits of everybody else.
//!
//! Those who wait are transactions of the watched keeper itself; it does not ask about others. The server's time is the
//! server's own word: the side connection has `log_min_duration_statement = 0`, so that each of its messages is in the log
//! with the time from its arrival to the end of its answer, parsing and planning included.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::{Keeper, Tx};
use lockkeeper_testkit::{Database, Server};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use crate::markdown::{Table, as_f64, median, quantile};
use crate::random::Random;
use crate::{Effort, Failure, Observer};

const IDLE: usize = 200;
const BLOCKED: usize = 50;
/// Tasks of the load.
const TASKS: usize = 4;
const ACCOUNTS: usize = 10_000;
/// Waits begin within this time, not all at once: the watcher looks at each by its own clock.
const BEGIN_WITHIN: Duration = Duration::from_secs(1);

/// What those who wait, wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All for one table lock: as many edges as waiters.
    Table,
    /// Ten for each of five rows, lined up: some hundred edges.
    Rows,
    /// All for one row, lined up: more than a thousand edges.
    Row,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Table, Self::Rows, Self::Row];

    fn hold(self) -> &'static str {
        match self {
            Self::Table => "BEGIN; LOCK TABLE queue IN ACCESS EXCLUSIVE MODE",
            Self::Rows => "BEGIN; UPDATE queue SET n = n + 1 WHERE id <= 5",
            Self::Row => "BEGIN; UPDATE queue SET n = n + 1 WHERE id = 1",
        }
    }

    fn row(self, waiter: usize) -> usize {
        match self {
            Self::Table => waiter + 1,
            Self::Rows => waiter % 5 + 1,
            Self::Row => 1,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Table => "for one table",
            Self::Rows => "for five rows",
            Self::Row => "for one row",
        })
    }
}

/// What the watcher asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Which of these wait.
    Waits,
    /// Who is in their way.
    Blocking,
    /// Keys of rows, settings.
    Other,
}

impl Question {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Waits, Self::Blocking, Self::Other];

    fn of(sql: &str) -> Self {
        if sql.contains("pg_blocking_pids") {
            Self::Blocking
        } else if sql.contains(" AS waited") {
            Self::Waits
        } else {
            Self::Other
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Waits => "who waits",
            Self::Blocking => "who is in the way",
            Self::Other => "keys of rows",
        })
    }
}

/// The server's time for the questions of one shape.
#[derive(Clone, Debug)]
pub struct Cost {
    /// What was waited for.
    pub shape: Shape,
    /// How long it was looked at.
    pub window: Duration,
    /// Each question with its time in milliseconds.
    pub asked: Vec<(Question, f64)>,
}

impl Cost {
    fn times(&self, question: Question) -> Vec<f64> {
        let asked = self.asked.iter().filter(|(asked, _)| *asked == question);
        asked.map(|(_, millis)| *millis).collect()
    }
}

/// Commits a second of the load, in rounds: with a watcher, and without.
#[derive(Clone, Debug)]
pub struct Throughput {
    /// What was waited for meanwhile.
    pub shape: Shape,
    /// The pairs.
    pub rounds: Vec<(f64, f64)>,
}

impl Throughput {
    fn column(&self, which: impl Fn(&(f64, f64)) -> f64) -> Vec<f64> {
        self.rounds.iter().map(which).collect()
    }

    /// With a watcher over without: the lower quartile, the median and the upper quartile of the rounds.
    #[must_use]
    pub fn ratio(&self) -> [f64; 3] {
        let ratios = self.column(|(with, without)| with / without);
        [0.25, 0.5, 0.75].map(|share| quantile(&ratios, share))
    }
}

/// A server for it: it needs more connections than others have, and its log.
///
/// # Errors
/// It does not start.
pub fn server() -> Result<Server, Failure> {
    Ok(Server::start(&[("max_connections", "400")])?)
}

/// Makes the tables.
///
/// # Errors
/// The server's.
pub async fn prepare(observer: &Observer) -> Result<(), Failure> {
    observer
        .client
        .batch_execute(&format!(
            "CREATE TABLE queue (id bigint PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 10); \
             INSERT INTO queue SELECT id, 0 FROM generate_series(1, {BLOCKED}) AS id; \
             CREATE TABLE load (id bigint PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50); \
             INSERT INTO load SELECT id, 0 FROM generate_series(1, {ACCOUNTS}) AS id; \
             CREATE TABLE history (id bigint, balance bigint, at timestamptz NOT NULL DEFAULT now()); \
             ANALYZE"
        ))
        .await?;
    Ok(())
}

/// The server's time for each shape.
///
/// # Errors
/// Whatever goes wrong; the log has none of the two questions.
pub async fn costs(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Vec<Cost>, Failure> {
    let _idle = idle(database, IDLE).await?;
    let mut side = database.config();
    side.options("-c log_min_duration_statement=0");
    let pool = database.pool(BLOCKED);
    all_connected(&pool).await?;
    let keeper = Keeper::builder(pool.clone())
        .side_connection(side, NoTls)
        .build();
    let window = Duration::from_millis(effort.of(8_000, 1_500));
    let mut costs = Vec::new();
    for shape in Shape::ALL {
        let blocked = Blocked::begin(shape, &keeper, database, observer).await?;
        let before = database.server().log_len();
        tokio::time::sleep(window).await;
        let log = database.server().log_since(before);
        blocked.end().await?;
        let asked: Vec<_> = log.lines().filter_map(duration).collect();
        for question in [Question::Waits, Question::Blocking] {
            if !asked.iter().any(|(asked, _)| *asked == question) {
                return Err(
                    format!("{shape}: the server's log has nothing of “{question}”").into(),
                );
            }
        }
        costs.push(Cost {
            shape,
            window,
            asked,
        });
    }
    pool.close();
    Ok(costs)
}

/// The load of one keeper with a watcher and one without, in turn, each with its own transactions waiting.
///
/// # Errors
/// Whatever goes wrong.
pub async fn throughputs(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Vec<Throughput>, Failure> {
    let pools = [(); 2].map(|()| database.pool(BLOCKED + TASKS));
    // The pool of whoever is not at work is idle too.
    let _idle = idle(database, IDLE - BLOCKED - TASKS).await?;
    let mut keepers = Vec::new();
    for (pool, watch) in pools.iter().zip([true, false]) {
        all_connected(pool).await?;
        let keeper = Keeper::builder(pool.clone())
            .side_connection(database.config(), NoTls)
            .watch(watch)
            .build();
        keepers.push(keeper);
    }
    let window = Duration::from_millis(effort.of(3_000, 500));
    load(&keepers[0], window).await?;
    let mut throughputs = Vec::new();
    for shape in Shape::ALL {
        let mut rounds = Vec::new();
        for round in 0..effort.of(6, 1) {
            let mut pair = [0.0; 2];
            for n in 0..2 {
                let which = (round + n) % 2;
                let keeper = &keepers[which];
                let blocked = Blocked::begin(shape, keeper, database, observer).await?;
                pair[which] = load(keeper, window).await?;
                blocked.end().await?;
            }
            rounds.push((pair[0], pair[1]));
        }
        throughputs.push(Throughput { shape, rounds });
    }
    for pool in pools {
        pool.close();
    }
    Ok(throughputs)
}

/// A session that keeps a lock, and transactions of a keeper that wait for it.
struct Blocked {
    holder: Client,
    tasks: Vec<JoinHandle<Result<(), Failure>>>,
}

impl Blocked {
    async fn begin(
        shape: Shape,
        keeper: &Keeper,
        database: &Database,
        observer: &Observer,
    ) -> Result<Self, Failure> {
        let holder = database.connect().await;
        holder.batch_execute(shape.hold()).await?;
        let mut random = Random::new(1);
        let tasks = (0..BLOCKED).map(|waiter| {
            let keeper = keeper.clone();
            let pause = BEGIN_WITHIN.mul_f64(random.unit());
            tokio::spawn(async move {
                let row = i64::try_from(shape.row(waiter))?;
                tokio::time::sleep(pause).await;
                keeper
                    .transaction(async move |tx: &mut Tx| {
                        tx.execute("UPDATE queue SET n = n + 1 WHERE id = $1", &[&row])
                            .await?;
                        Ok::<_, lockkeeper::Error>(())
                    })
                    .await?;
                Ok(())
            })
        });
        let tasks = tasks.collect();
        observer.waiting(BLOCKED).await?;
        Ok(Self { holder, tasks })
    }

    async fn end(self) -> Result<(), Failure> {
        self.holder.batch_execute("COMMIT").await?;
        for task in self.tasks {
            task.await??;
        }
        Ok(())
    }
}

/// Commits a second of some tasks that do what `pgbench -N` does: an UPDATE, a SELECT and an INSERT.
async fn load(keeper: &Keeper, window: Duration) -> Result<f64, Failure> {
    let over = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (keeper, over) = (keeper.clone(), Arc::clone(&over));
            tokio::spawn(async move {
                let mut random = Random::new(u64::try_from(task)?);
                let mut commits = 0;
                while !over.load(Ordering::Relaxed) {
                    let id = i64::try_from(random.below(ACCOUNTS))? + 1;
                    keeper
                        .transaction(async move |tx: &mut Tx| {
                            let update = tx
                                .prepare_cached(
                                    "UPDATE load SET balance = balance + 1 WHERE id = $1",
                                )
                                .await?;
                            tx.execute(&update, &[&id]).await?;
                            let select = tx
                                .prepare_cached("SELECT balance FROM load WHERE id = $1")
                                .await?;
                            let balance: i64 = tx.query_one(&select, &[&id]).await?.get(0);
                            let insert = tx
                                .prepare_cached("INSERT INTO history (id, balance) VALUES ($1, $2)")
                                .await?;
                            tx.execute(&insert, &[&id, &balance]).await?;
                            Ok::<_, lockkeeper::Error>(())
                        })
                        .await?;
                    commits += 1;
                }
                Ok::<usize, Failure>(commits)
            })
        })
        .collect();
    tokio::time::sleep(window).await;
    over.store(true, Ordering::Relaxed);
    let mut commits = 0;
    for task in tasks {
        commits += task.await??;
    }
    Ok(as_f64(commits) / started.elapsed().as_secs_f64())
}

async fn idle(database: &Database, count: usize) -> Result<Pool, Failure> {
    let pool = database.pool(count);
    all_connected(&pool).await?;
    Ok(pool)
}

/// Opens all connections that the pool may have.
async fn all_connected(pool: &Pool) -> Result<(), Failure> {
    let mut all = Vec::new();
    for _ in 0..pool.status().max_size {
        all.push(pool.get().await?);
    }
    Ok(())
}

/// One line of the log: `… LOG:  duration: 0.412 ms  statement: …`. Only the side connection has such lines.
fn duration(line: &str) -> Option<(Question, f64)> {
    let (_, rest) = line.split_once("LOG:  duration: ")?;
    let (millis, rest) = rest.split_once(" ms")?;
    let (_, sql) = rest.split_once("statement: ")?;
    Some((Question::of(sql), millis.parse().ok()?))
}

/// The server's time, a row for each shape and question.
#[must_use]
pub fn table_of_costs(costs: &[Cost]) -> Table {
    let mut table = Table::new([
        "50 wait, 200 idle",
        "question",
        "a second",
        "median",
        "95 %",
        "longest",
        "server's time in a second",
    ]);
    for cost in costs {
        for question in Question::ALL {
            let times = cost.times(question);
            if times.is_empty() {
                continue;
            }
            let seconds = cost.window.as_secs_f64();
            let millis = |share| format!("{:.2} ms", quantile(&times, share));
            table.row([
                cost.shape.to_string(),
                question.to_string(),
                format!("{:.1}", as_f64(times.len()) / seconds),
                millis(0.5),
                millis(0.95),
                millis(1.0),
                format!("{:.1} ms", times.iter().sum::<f64>() / seconds),
            ]);
        }
    }
    table
}

/// The load, a row for each shape.
#[must_use]
pub fn table_of_throughputs(throughputs: &[Throughput]) -> Table {
    let mut table = Table::new([
        "50 wait, 200 idle",
        "commits/s, watched",
        "not watched",
        "watched ÷ not (quartiles)",
    ]);
    for throughput in throughputs {
        let [lower, middle, upper] = throughput.ratio();
        table.row([
            throughput.shape.to_string(),
            format!("{:.0}", median(&throughput.column(|(with, _)| *with))),
            format!("{:.0}", median(&throughput.column(|(_, without)| *without))),
            format!("{middle:.3} ({lower:.3} – {upper:.3})"),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_has_a_question_and_its_time() {
        let line = "2024-05-01 10:00:00.000 UTC [42] LOG:  duration: 0.412 ms  statement: SELECT l.pid, 1 AS waited";
        assert_eq!(duration(line), Some((Question::Waits, 0.412)));
        assert_eq!(
            duration("2024-05-01 UTC [42] ERROR:  deadlock detected"),
            None
        );
    }
}
