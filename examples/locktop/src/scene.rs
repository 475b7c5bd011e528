//! Something to see, on a database of its own: sessions that keep one another waiting, and never learn.

use std::time::Duration;

use lockkeeper::{Keeper, TransactionOptions};
use lockkeeper_testkit::Database;
use tokio::time::sleep;
use tokio_postgres::{Client, Error};

/// A pause before the same again.
const AGAIN: Duration = Duration::from_secs(2);

/// How many sessions wait when all of them are there.
pub(crate) const WAITERS: usize = 7;

/// Starts all actors. They go on, with new connections where theirs were terminated, until the program ends.
pub(crate) async fn start(database: &'static Database) -> Result<(), Error> {
    let client = database.connect().await;
    client
        .batch_execute(
            "CREATE TABLE invoice (id int PRIMARY KEY, paid boolean NOT NULL DEFAULT false); \
             INSERT INTO invoice SELECT id FROM generate_series(1, 9) AS id; \
             CREATE TABLE customer (id int PRIMARY KEY, name text)",
        )
        .await?;
    let keeper = Keeper::builder(database.pool(8))
        .application("billing")
        .watch(false)
        .build();

    // Somebody who went for lunch, and keeps two locks of different kinds.
    act(
        database,
        "psql",
        "BEGIN; UPDATE invoice SET paid = true WHERE id = 1; SELECT FROM customer",
    );
    until_held(&client, "RowExclusiveLock").await?;
    // One who waits for that, with others behind.
    let pay = keeper.clone();
    drop(tokio::spawn(async move {
        loop {
            let options = TransactionOptions::new().lock_timeout(Duration::from_secs(3600));
            let paid = pay.transaction_with(options, async |tx| {
                tx.execute("UPDATE invoice SET paid = true WHERE id = 2", &[])
                    .await?;
                tx.execute("UPDATE invoice SET paid = true WHERE id = 1", &[])
                    .await?;
                Ok::<_, lockkeeper::Error>(())
            });
            paid.await.ok();
            sleep(AGAIN).await;
        }
    }));
    until_waiting(&client, 1).await?;
    act(
        database,
        "reminders",
        "UPDATE invoice SET paid = false WHERE id = 2",
    );
    // A migration queues for the table that the lunch keeps, and everybody else behind the migration.
    act(
        database,
        "migration 0042",
        "ALTER TABLE customer ADD COLUMN IF NOT EXISTS email text",
    );
    until_waiting(&client, 3).await?;
    act(database, "web 1", "SELECT name FROM customer WHERE id = 7");
    act(database, "web 2", "SELECT name FROM customer WHERE id = 8");
    // A transaction that was prepared, and then forgotten.
    if let Err(error) = client
        .batch_execute(
            "BEGIN; UPDATE invoice SET paid = true WHERE id = 3; PREPARE TRANSACTION 'order-7'",
        )
        .await
    {
        // Where the server has no prepared transactions, this one is not to be seen.
        client.batch_execute("ROLLBACK").await?;
        if error.code().is_none() {
            return Err(error);
        }
    }
    act(
        database,
        "shop",
        "UPDATE invoice SET paid = false WHERE id = 3",
    );
    // Advisory locks: one with waiters, one left behind.
    let leader = keeper.clone();
    drop(tokio::spawn(async move {
        loop {
            // Held until its session is terminated.
            if let Ok(guard) = leader.advisory_lock("leader").session().acquire().await {
                guard.loss().await;
            }
            sleep(AGAIN).await;
        }
    }));
    for _ in 0..2 {
        let report = keeper.clone();
        drop(tokio::spawn(async move {
            loop {
                let wait = Duration::from_secs(3600);
                let lock = report.advisory_lock("nightly-report").wait(wait);
                if let Ok(guard) = lock.acquire().await {
                    sleep(Duration::from_secs(3600)).await;
                    drop(guard);
                }
            }
        }));
    }
    act(database, "old worker", "SELECT pg_advisory_lock(4711)");
    Ok(())
}

/// Runs a statement on a connection of its own, keeps that for as long as it lasts, and does it again.
fn act(database: &'static Database, name: &'static str, sql: &'static str) {
    drop(tokio::spawn(async move {
        loop {
            let client = database.connect().await;
            let hello = format!("SET application_name = '{name}'; SET deadlock_timeout = '1h'");
            if client.batch_execute(&hello).await.is_ok() && client.batch_execute(sql).await.is_ok()
            {
                while !client.is_closed() {
                    sleep(Duration::from_millis(100)).await;
                }
            }
            sleep(AGAIN).await;
        }
    }));
}

async fn until_held(client: &Client, mode: &str) -> Result<(), Error> {
    let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE granted AND mode = $1 AND relation = 'invoice'::regclass)";
    while !client.query_one(sql, &[&mode]).await?.get::<_, bool>(0) {
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn until_waiting(client: &Client, sessions: i64) -> Result<(), Error> {
    let sql = "SELECT count(DISTINCT l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
               WHERE NOT l.granted AND a.datname = current_database()";
    while client.query_one(sql, &[]).await?.get::<_, i64>(0) < sessions {
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
