//! Three candidates, one leader: it is cut off, resigns, and is followed each time.
//!
//! `cargo run --example leader` finds a PostgreSQL as the quickstart does. It runs three keepers with pools of their own, as
//! three processes have them, ends the session of the first leader, and has each later one resign after its work. The takeover
//! delay is one second here, to be watched.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::time::{Duration, Instant};

use lockkeeper::Keeper;
use lockkeeper_testkit::{Database, Server};
use tokio::task::JoinSet;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    let observer = database.connect().await;
    Keeper::new(database.pool(1)).fencing().set_up().await?;

    let began = Instant::now();
    let mut candidates = JoinSet::new();
    for name in ["ann", "bob", "eve"] {
        candidates.spawn(candidate(name, began, keeper(&database)));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    println!("{:>7.1?}  the leader's session is ended", began.elapsed());
    observer
        .batch_execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        .await?;
    while let Some(done) = candidates.join_next().await {
        done??;
    }
    Ok(())
}

fn keeper(database: &Database) -> Keeper {
    Keeper::builder(database.pool(2))
        .application("leader")
        .build()
}

async fn candidate(name: &str, began: Instant, keeper: Keeper) -> Result<(), lockkeeper::Error> {
    let leader = keeper
        .leader("scheduler")
        .poll_interval(Duration::from_millis(50))
        .step_down_after(Duration::from_millis(900))
        .takeover_delay(Duration::from_secs(1));
    let led = leader.run(async |term| {
        println!(
            "{:>7.1?}  {name} leads, term {}",
            began.elapsed(),
            term.token()
        );
        // The work. It ends here if the term does, and `run` makes a candidate of this process again.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok::<_, lockkeeper::Error>(())
    });
    led.await?;
    println!("{:>7.1?}  {name} has resigned", began.elapsed());
    Ok(())
}
