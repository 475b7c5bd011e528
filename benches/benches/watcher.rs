//! The watcher's cost while 50 of its transactions wait and 200 sessions are idle.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Effort, Failure, Observer, watcher};

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let effort = Effort::from_args();
    let database = watcher::server()?.database().await;
    let observer = Observer::new(&database).await?;
    watcher::prepare(&observer).await?;
    let costs = watcher::costs(&database, &observer, effort).await?;
    println!("{}", watcher::table_of_costs(&costs));
    let throughputs = watcher::throughputs(&database, &observer, effort).await?;
    println!("{}", watcher::table_of_throughputs(&throughputs));
    observer.nothing_is_left().await
}
