//! Round trips of each call, through a proxy that makes them countable.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Case, Effort, Failure, Observer, round_trips};
use lockkeeper_testkit::Server;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared().database().await;
    let observer = Observer::new(&database).await?;
    let trips = round_trips::measure(&database, &Case::ALL, Effort::from_args()).await?;
    println!("{}", round_trips::table(&trips));
    observer.nothing_is_left().await
}
