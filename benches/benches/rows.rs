//! 8 workers, 4 of 40 hot rows: rows locked in the order of their keys first, and not.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Effort, Failure, Observer, rows};
use lockkeeper_testkit::Server;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared().database().await;
    let observer = Observer::new(&database).await?;
    let outcomes = rows::measure(&database, &observer, Effort::from_args()).await?;
    println!("{}", rows::table(&outcomes));
    observer.nothing_is_left().await?;
    for outcome in &outcomes {
        if outcome.way.locks_first() && outcome.deadlocks > 0 {
            return Err(format!("{}: {} deadlocks", outcome.way, outcome.deadlocks).into());
        }
    }
    Ok(())
}
