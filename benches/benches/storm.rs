//! 8 workers, 2 of 6 hot rows: what gets done, and how often it deadlocks.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Effort, Failure, Observer, storm};
use lockkeeper_testkit::Server;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared().database().await;
    let observer = Observer::new(&database).await?;
    let outcomes = storm::measure(&database, &observer, Effort::from_args()).await?;
    println!("{}", storm::table(&outcomes));
    observer.nothing_is_left().await
}
