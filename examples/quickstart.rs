//! Eight workers pay the same invoices under `with_advisory_lock`, on a real server.
//!
//! `cargo run --example quickstart` finds a PostgreSQL (`DATABASE_URL`, else an installed one that it starts for
//! itself, else one from npm), and prints who waited for whom, a busy `try`, a timeout that names its blocker, and that
//! nothing is left in `pg_locks` at the end.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::time::{Duration, Instant};

use lockkeeper::{ErrorKind, Keeper};
use lockkeeper_testkit::Server;
use tokio::task::JoinSet;

/// An application's own error: both conversions are all it needs.
#[derive(Debug, thiserror::Error)]
enum PayError {
    #[error("invoice {0} does not exist")]
    NoSuchInvoice(i64),
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Lock(#[from] lockkeeper::Error),
}

const WORKERS: usize = 8;
const INVOICES: i64 = 3;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    let keeper = Keeper::builder(database.pool(WORKERS))
        .application("quickstart")
        .build();
    let observer = database.connect().await;
    observer
        .batch_execute(
            "CREATE TABLE invoice (id bigint PRIMARY KEY, paid_by int); \
             INSERT INTO invoice SELECT id FROM generate_series(1, 3) AS id",
        )
        .await?;

    println!("{WORKERS} workers, each wants to pay each of {INVOICES} invoices:");
    let mut workers = JoinSet::new();
    for worker in 0..WORKERS {
        let keeper = keeper.clone();
        workers.spawn(async move { pay_all(&keeper, worker).await });
    }
    while let Some(paid) = workers.join_next().await {
        paid??;
    }
    let paid: i64 = observer
        .query_one(
            "SELECT count(*) FROM invoice WHERE paid_by IS NOT NULL",
            &[],
        )
        .await?
        .get(0);
    println!("{paid} of {INVOICES} invoices paid, each of them once\n");

    // A guard holds its lock until it is committed, rolled back or dropped.
    let guard = keeper.advisory_lock("nightly-report").acquire().await?;

    let ran = keeper
        .try_with_advisory_lock("nightly-report", async |_tx| Ok::<_, PayError>("ran"))
        .await?;
    println!("try while it is held: {}", ran.unwrap_or("busy"));

    let refused = keeper
        .advisory_lock("nightly-report")
        .wait(Duration::from_millis(300))
        .acquire()
        .await;
    match refused {
        Err(error) if error.kind() == ErrorKind::LockTimeout => {
            println!("wait for 300 ms:      {error}")
        }
        Err(error) => return Err(error.into()),
        Ok(_) => return Err("two holders of one exclusive lock".into()),
    }

    drop(guard);
    let guard = keeper
        .advisory_lock("nightly-report")
        .session()
        .acquire()
        .await?;
    println!("after the drop:       granted, as a session lock");
    guard.release().await?;

    let left: i64 = observer
        .query_one(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            &[],
        )
        .await?
        .get(0);
    println!("left in pg_locks:     {left}");
    if left > 0 {
        return Err("advisory locks were left behind".into());
    }
    Ok(())
}

/// Pays what is not paid yet. The lock makes "look, then pay" one step for all workers.
async fn pay_all(keeper: &Keeper, worker: usize) -> Result<(), PayError> {
    for invoice in 1..=INVOICES {
        let asked = Instant::now();
        let line = keeper
            .with_advisory_lock(("invoice", invoice.to_string()), async |tx| {
                let waited = asked.elapsed();
                let row = tx
                    .query_opt("SELECT paid_by FROM invoice WHERE id = $1", &[&invoice])
                    .await?
                    .ok_or(PayError::NoSuchInvoice(invoice))?;
                let paid_by: Option<i32> = row.get(0);
                if let Some(other) = paid_by {
                    return Ok::<_, PayError>(format!(
                        "waited {waited:>6.1?}, worker {other} had paid"
                    ));
                }
                let me = i32::try_from(worker).unwrap_or(i32::MAX);
                tx.execute(
                    "UPDATE invoice SET paid_by = $1 WHERE id = $2",
                    &[&me, &invoice],
                )
                .await?;
                // The work that must not be done twice.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok(format!("waited {waited:>6.1?}, paid"))
            })
            .await?;
        println!("  worker {worker}, invoice {invoice}: {line}");
    }
    Ok(())
}
