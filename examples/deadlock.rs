//! Two functions that lock the same two rows in opposite order: a deadlock, explained, and both finish.
//!
//! `cargo run --example deadlock` finds or starts a PostgreSQL by itself.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::error::Error as StdError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use lockkeeper::tokio_postgres::NoTls;
use lockkeeper::{Error, Incident, Keeper};
use lockkeeper_testkit::Server;
use tokio::sync::Barrier;

/// Both functions, so that on their first attempts each has its first row before either wants its second.
struct Meeting {
    barrier: Barrier,
    arrivals: AtomicU32,
}

impl Meeting {
    async fn meet(&self) {
        if self.arrivals.fetch_add(1, Ordering::Relaxed) < 2 {
            self.barrier.wait().await;
        }
    }
}

/// Pays a bill: takes from the account, then gives to the shop.
async fn pay(keeper: &Keeper, meeting: &Meeting) -> Result<u32, Error> {
    let attempts = &AtomicU32::new(0);
    keeper
        .transaction(async |tx| {
            attempts.fetch_add(1, Ordering::Relaxed);
            tx.execute(
                "UPDATE account SET balance = balance - 30 WHERE id = 1",
                &[],
            )
            .await?;
            meeting.meet().await;
            tx.execute(
                "UPDATE account SET balance = balance + 30 WHERE id = 2",
                &[],
            )
            .await?;
            Ok(attempts.load(Ordering::Relaxed))
        })
        .await
}

/// Gives a refund: takes from the shop, then gives to the account.
async fn refund(keeper: &Keeper, meeting: &Meeting) -> Result<u32, Error> {
    let attempts = &AtomicU32::new(0);
    keeper
        .transaction(async |tx| {
            attempts.fetch_add(1, Ordering::Relaxed);
            tx.execute("UPDATE account SET balance = balance - 5 WHERE id = 2", &[])
                .await?;
            meeting.meet().await;
            tx.execute("UPDATE account SET balance = balance + 5 WHERE id = 1", &[])
                .await?;
            Ok(attempts.load(Ordering::Relaxed))
        })
        .await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    let server = Server::shared_with_progress(|step| println!("{step}"));
    let database = server.database().await;
    let client = database.connect().await;
    client
        .batch_execute(
            "CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
             INSERT INTO account VALUES (1, 100), (2, 1000)",
        )
        .await?;

    let (incidents, reported) = mpsc::channel::<Incident>();
    let keeper = Keeper::builder(database.pool(4))
        .application("shop")
        .side_connection(database.config(), NoTls)
        .on_incident(move |incident| {
            // Nobody listens any more once the example is over.
            incidents.send(incident.clone()).ok();
        })
        .build();

    let meeting = Meeting {
        barrier: Barrier::new(2),
        arrivals: AtomicU32::new(0),
    };
    println!("pay() and refund() lock the same two rows, in opposite order …\n");
    let (paid, refunded) = tokio::try_join!(pay(&keeper, &meeting), refund(&keeper, &meeting))?;

    let incident =
        tokio::task::spawn_blocking(move || reported.recv_timeout(Duration::from_secs(10)))
            .await??;
    println!("{incident}");

    println!("pay() finished in attempt {paid}, refund() in attempt {refunded}");
    for row in client
        .query("SELECT id, balance FROM account ORDER BY id", &[])
        .await?
    {
        println!("account {}: {}", row.get::<_, i32>(0), row.get::<_, i32>(1));
    }
    Ok(())
}
