//! 32 tasks that want one session lock.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use std::time::Duration;

use lockkeeper_benches::{Effort, Failure, Observer, contended};
use lockkeeper_testkit::Server;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared().database().await;
    let observer = Observer::new(&database).await?;
    let outcomes = contended::measure(&database, &observer, Effort::from_args()).await?;
    println!("{}", contended::table(&outcomes));
    let (left, _) = observer.left_within(Duration::from_secs(1)).await?;
    if !left.is_nothing() {
        return Err(format!("left in pg_locks: {left}").into());
    }
    Ok(())
}
