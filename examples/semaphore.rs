//! Ten tasks of two keepers share three permits.
//!
//! `cargo run --example semaphore` finds a PostgreSQL as the quickstart does. It prints who works in which place, and what a
//! process is told that believes in another number of permits.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::time::{Duration, Instant};

use lockkeeper::{ErrorKind, Keeper};
use lockkeeper_testkit::Server;
use tokio::task::JoinSet;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const PERMITS: u32 = 3;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    // As two processes have them.
    let keepers: Vec<Keeper> = (0..2).map(|_| Keeper::new(database.pool(4))).collect();
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..10 {
        let keeper = keepers[task % 2].clone();
        tasks.spawn(async move {
            let permit = keeper.semaphore("thumbnails", PERMITS).acquire().await?;
            println!(
                "{:>7.1?}  task {task} works in place {}",
                began.elapsed(),
                permit.number()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
            permit.release().await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }

    let permit = keepers[0]
        .semaphore("thumbnails", PERMITS)
        .acquire()
        .await?;
    match keepers[1].semaphore("thumbnails", 5).acquire().await {
        Err(error) if error.kind() == ErrorKind::Config => println!("\n{error}"),
        other => return Err(format!("the numbers were not compared: {other:?}").into()),
    }
    permit.release().await?;
    Ok(())
}
