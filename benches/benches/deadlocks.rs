//! 40 deadlocks at random moments, and how many reports tell everything of them.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::{Effort, Failure, Observer, deadlocks};

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let effort = Effort::from_args();
    let database = deadlocks::server()?.database().await;
    let observer = Observer::new(&database).await?;
    let outcomes = deadlocks::measure(&database, &observer, effort).await?;
    println!("{}", deadlocks::table(&outcomes));
    observer.nothing_is_left().await?;
    for outcome in &outcomes {
        // In a trial anything else may have had the processor in the last milliseconds before the server looks.
        if effort == Effort::Full && outcome.complete() + 1 < outcome.rounds.len() {
            return Err(format!("{}: more than one report is not complete", outcome.other).into());
        }
    }
    Ok(())
}
