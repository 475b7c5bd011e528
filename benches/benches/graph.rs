//! What a look at who waits for whom costs, with up to 500 sessions that wait.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Effort, Failure, graph};

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let outcomes = graph::measure(Effort::from_args()).await?;
    println!("{}", graph::table(&outcomes));
    Ok(())
}
