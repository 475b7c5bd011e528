//! Changes a busy table step by step, and beside each step does the naive statement on a copy of the table under the same
//! load: what that does to those who use the table.
//!
//! `cargo run --release --example migrate` finds a PostgreSQL as the quickstart does (`DATABASE_URL`, else an installed
//! one, else one from npm), fills two tables with 250 000 rows each, and sends readers, writers and a slow report at
//! them. For each step it prints how long it took, and the longest that any statement of the load took meanwhile: a
//! statement that is over in a millisecond when it is left alone. Takes less than a minute.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lockkeeper::Keeper;
use lockkeeper_testkit::{Database, Server};
use tokio::task::JoinSet;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const ROWS: i64 = 250_000;
const CUSTOMERS: i64 = 5_000;
const READERS: u64 = 2;
const WRITERS: u64 = 2;
/// Between two statements of one session: a busy table, not a busy processor.
const THINK: Duration = Duration::from_millis(2);

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    let keeper = Keeper::builder(database.pool(6))
        .application("migrate")
        .build();
    println!(
        "two tables of {ROWS} rows, {READERS} readers, {WRITERS} writers and a report on each …\n"
    );
    for table in ["orders", "naive"] {
        fill(&database, table).await?;
    }

    println!("{:<22} {:>23}    {:>23}", "", "careful", "naive");
    println!(
        "{:<22} {:>12} {:>10}    {:>12} {:>10}",
        "step", "stall", "took", "stall", "took"
    );

    let orders = Load::on(&database, "orders").await?;
    let idle = orders
        .during(async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(())
        })
        .await?;
    println!("{:<22} {idle}", "(nothing)");

    let steps = [
        (
            Step::AddColumn,
            "ALTER TABLE naive ADD COLUMN email_lower text",
        ),
        (
            Step::Backfill,
            "UPDATE naive SET email_lower = lower(email)",
        ),
        (Step::Index, "CREATE INDEX ON naive (email_lower)"),
        (
            Step::Check,
            "ALTER TABLE naive ADD CONSTRAINT not_negative CHECK (amount >= 0)",
        ),
        (
            Step::NotNull,
            "ALTER TABLE naive ALTER COLUMN email_lower SET NOT NULL",
        ),
        (
            Step::ForeignKey,
            "ALTER TABLE naive ADD FOREIGN KEY (customer) REFERENCES customer (id)",
        ),
    ];
    let client = database.connect().await;
    for (step, naive) in steps {
        let load = Load::on(&database, "orders").await?;
        let careful = load.during(step.run(&keeper)).await?;
        let load = Load::on(&database, "naive").await?;
        let by_hand = load
            .during(async {
                client.batch_execute(naive).await?;
                Ok(())
            })
            .await?;
        println!("{:<22} {careful}    {by_hand}", step.name());
    }

    let wrong: i64 = client
        .query_one(
            "SELECT count(*) FROM orders WHERE email_lower IS DISTINCT FROM lower(email)",
            &[],
        )
        .await?
        .get(0);
    println!("\nrows that the backfill has left out: {wrong}");
    if wrong > 0 {
        return Err("the backfill has left rows out".into());
    }
    Ok(())
}

async fn fill(database: &Database, table: &str) -> Result<(), Failure> {
    let client = database.connect().await;
    client
        .batch_execute(&format!(
            "CREATE TABLE IF NOT EXISTS customer (id bigint PRIMARY KEY); \
             INSERT INTO customer SELECT i FROM generate_series(1, {CUSTOMERS}) AS i ON CONFLICT DO NOTHING; \
             CREATE TABLE {table} (id bigint PRIMARY KEY, customer bigint NOT NULL, email text NOT NULL, \
             amount bigint NOT NULL, note text NOT NULL DEFAULT repeat('.', 80)); \
             INSERT INTO {table} SELECT i, 1 + i % {CUSTOMERS}, 'Customer' || i || '@Example.org', 100 \
             FROM generate_series(1, {ROWS}) AS i"
        ))
        .await?;
    // Not within a transaction, as a message of several statements is.
    client
        .batch_execute(&format!("VACUUM ANALYZE {table}"))
        .await?;
    Ok(())
}

/// What is to be done to the table.
#[derive(Clone, Copy)]
enum Step {
    AddColumn,
    Backfill,
    Index,
    Check,
    NotNull,
    ForeignKey,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::AddColumn => "add a column",
            Self::Backfill => "fill it for all rows",
            Self::Index => "index it",
            Self::Check => "add a check",
            Self::NotNull => "set it not null",
            Self::ForeignKey => "add a foreign key",
        }
    }

    async fn run(self, keeper: &Keeper) -> Result<(), Failure> {
        // Who comes behind an attempt waits for no longer than this.
        let schema = keeper.schema().lock_timeout(Duration::from_millis(25));
        match self {
            Self::AddColumn => {
                schema
                    .add_column("orders", "email_lower", "text")
                    .run()
                    .await?;
            }
            Self::Backfill => {
                let backfill = keeper
                    .backfill("orders", "id")
                    .set("email_lower = lower(email)")
                    .filter("email_lower IS NULL")
                    .batch_time(Duration::from_millis(20));
                backfill.run().await?;
            }
            Self::Index => {
                schema.create_index("orders", ["email_lower"]).run().await?;
            }
            Self::Check => {
                schema
                    .add_check("orders", "not_negative", "amount >= 0")
                    .run()
                    .await?;
            }
            Self::NotNull => {
                schema.set_not_null("orders", "email_lower").run().await?;
            }
            Self::ForeignKey => {
                let key = schema.add_foreign_key("orders", ["customer"], "customer", ["id"]);
                key.run().await?;
            }
        }
        Ok(())
    }
}

/// How long a step took, and how long others had to wait for it.
struct Effect {
    took: Duration,
    stall: Duration,
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let millis = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        write!(f, "{:>12} {:>10}", millis(self.stall), millis(self.took))
    }
}

/// Sessions that use one table, and when each of their statements began and ended.
struct Load {
    sessions: JoinSet<Result<(), Failure>>,
    stop: Arc<AtomicBool>,
    statements: Arc<Mutex<Vec<(Instant, Instant)>>>,
}

impl Load {
    async fn on(database: &Database, table: &str) -> Result<Self, Failure> {
        let mut load = Self {
            sessions: JoinSet::new(),
            stop: Arc::default(),
            statements: Arc::default(),
        };
        let read = format!("SELECT amount FROM {table} WHERE id = $1");
        let write = format!("UPDATE {table} SET amount = amount + 1 WHERE id = $1");
        for session in 0..READERS + WRITERS {
            let client = database.connect().await;
            let statement = if session < READERS { &read } else { &write };
            let statement = client.prepare(statement).await?;
            let (stop, statements) = (Arc::clone(&load.stop), Arc::clone(&load.statements));
            load.sessions.spawn(async move {
                let mut random = session + 1;
                while !stop.load(Ordering::Relaxed) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let id = 1 + i64::try_from(random >> 33)? % ROWS;
                    let began = Instant::now();
                    client.execute(&statement, &[&id]).await?;
                    note(&statements, began);
                    tokio::time::sleep(THINK).await;
                }
                Ok(())
            });
        }
        // A report: it holds its lock on the table for a quarter of a second, and nobody waits for that, until somebody
        // wants ACCESS EXCLUSIVE.
        let client = database.connect().await;
        let report = format!(
            "BEGIN; SELECT count(*) FROM {table} WHERE id < 1000; SELECT pg_sleep(0.25); COMMIT"
        );
        let stop = Arc::clone(&load.stop);
        load.sessions.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                client.batch_execute(&report).await?;
                tokio::time::sleep(Duration::from_millis(350)).await;
            }
            Ok(())
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        Ok(load)
    }

    /// Does something to the table, and looks at what that did to the sessions, all of which have ended by then: one that
    /// still waits would not be counted.
    async fn during(
        self,
        work: impl Future<Output = Result<(), Failure>>,
    ) -> Result<Effect, Failure> {
        let began = Instant::now();
        work.await?;
        let ended = Instant::now();
        let statements = Arc::clone(&self.statements);
        self.end().await?;
        let statements = statements.lock().unwrap_or_else(PoisonError::into_inner);
        let meanwhile = statements
            .iter()
            .filter(|(from, to)| *from <= ended && *to >= began);
        let stall = meanwhile.map(|(from, to)| *to - *from).max();
        Ok(Effect {
            took: ended - began,
            stall: stall.unwrap_or_default(),
        })
    }

    async fn end(mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(session) = self.sessions.join_next().await {
            session??;
        }
        Ok(())
    }
}

fn note(statements: &Mutex<Vec<(Instant, Instant)>>, began: Instant) {
    let mut statements = statements.lock().unwrap_or_else(PoisonError::into_inner);
    statements.push((began, Instant::now()));
}
