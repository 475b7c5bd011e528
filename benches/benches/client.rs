//! What a call costs its own process, in instructions, cache misses and allocations.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Effort, Failure, Observer, client};
use lockkeeper_testkit::Server;

fn main() -> Result<(), Failure> {
    match client::child() {
        Some(outcome) => outcome,
        None => tokio::runtime::Runtime::new()?.block_on(compare()),
    }
}

async fn compare() -> Result<(), Failure> {
    if !client::is_available() {
        println!("nothing is counted: valgrind is not installed");
        return Ok(());
    }
    let database = Server::shared().database().await;
    let observer = Observer::new(&database).await?;
    let effort = Effort::from_args();
    let costs = client::measure(&database, effort).await?;
    println!("{}", client::table(&costs));
    observer.nothing_is_left().await?;
    client::check(&costs)
}
