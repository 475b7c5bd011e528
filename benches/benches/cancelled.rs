//! 10 000 acquisitions given up at random moments.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::cancelled::{self, Caller};
use lockkeeper_benches::{Effort, Failure, Observer};
use lockkeeper_testkit::Server;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared().database().await;
    let observer = Observer::new(&database).await?;
    let outcomes = cancelled::measure(&database, &observer, Effort::from_args()).await?;
    println!("{}", cancelled::table(&outcomes));
    for outcome in &outcomes {
        let ours = matches!(
            outcome.caller,
            Caller::Lockkeeper | Caller::LockkeeperSession
        );
        if ours && !outcome.is_clean() {
            return Err(format!("{} is not clean: {outcome:?}", outcome.caller).into());
        }
    }
    Ok(())
}
