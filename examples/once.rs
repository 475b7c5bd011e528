//! Three processes ask for the nightly work every moment, and one of them does it.
//!
//! `cargo run --example once` finds a PostgreSQL as the quickstart does. The first run fails, and does not count.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use std::time::Duration;

use lockkeeper::{Keeper, Once};
use lockkeeper_testkit::Server;

type Failure = Box<dyn std::error::Error>;

fn nightly(keeper: &Keeper) -> Once {
    keeper
        .once("nightly", Duration::from_secs(86_400))
        .time_zone("Europe/Berlin")
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    // As three processes have them.
    let keepers: Vec<Keeper> = (0..3).map(|_| Keeper::new(database.pool(2))).collect();
    // Once, for instance with the migrations.
    nightly(&keepers[0]).set_up().await?;
    let observer = database.connect().await;
    observer
        .batch_execute("CREATE TABLE report (made_by int)")
        .await?;

    let failed = nightly(&keepers[0]).run(async |tx| {
        tx.execute("INSERT INTO report VALUES (0)", &[]).await?;
        tx.execute("SELECT 1 / 0", &[]).await?;
        Ok::<_, lockkeeper::Error>(())
    });
    println!(
        "process 0: {}",
        failed.await.err().ok_or("it did not fail")?
    );
    for round in 1..=2 {
        for (process, keeper) in (0_i32..).zip(&keepers) {
            let ran = nightly(keeper).run(async |tx| {
                let sql = "INSERT INTO report VALUES ($1)";
                Ok::<_, lockkeeper::Error>(tx.execute(sql, &[&process]).await?)
            });
            let ran = ran.await?.map_or("not due", |_| "ran");
            println!("round {round}, process {process}: {ran}");
        }
    }
    let reports: i64 = observer
        .query_one("SELECT count(*) FROM report", &[])
        .await?
        .get(0);
    println!("reports: {reports}");
    match reports {
        1 => Ok(()),
        _ => Err("not one report".into()),
    }
}
