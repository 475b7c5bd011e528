//! A holder that has lost its lock without knowing it tries to write, and is refused.
//!
//! `cargo run --example fencing` finds a PostgreSQL as the quickstart does. It takes a lock and its fencing token, has the
//! server end that session, gives the lock to another one, and shows who may write to a table in the same database and to one
//! that only has a column for the newest token.

#![allow(clippy::print_stdout, reason = "an example talks to people")]

use lockkeeper::{ErrorKind, FencingToken, Keeper};
use lockkeeper_testkit::Server;

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = Server::shared_with_progress(|step| println!("{step}"))
        .database()
        .await;
    let keeper = Keeper::builder(database.pool(4))
        .application("fencing")
        .build();
    // Once, for instance with the migrations.
    keeper.fencing().set_up().await?;
    let observer = database.connect().await;
    observer
        .batch_execute(
            "CREATE TABLE ledger (total bigint NOT NULL, fence bigint NOT NULL DEFAULT 0); \
             INSERT INTO ledger VALUES (0)",
        )
        .await?;

    let mut first = keeper.advisory_lock("ledger").session().acquire().await?;
    let old = first.fencing_token().await?;
    println!("the first holder's token is  {old}");
    write(&keeper, old).await?;

    // Its session ends, and it does nothing that would tell it.
    let pid = first.backend_pid().ok_or("no backend")?;
    observer
        .execute("SELECT pg_terminate_backend($1, 5000)", &[&pid])
        .await?;
    let mut second = keeper.advisory_lock("ledger").session().acquire().await?;
    let new = second.fencing_token().await?;
    println!("the second holder's token is {new}\n");

    match write(&keeper, old).await {
        Err(error) if error.kind() == ErrorKind::Fenced => {
            println!("the first one writes: {error}")
        }
        other => return Err(format!("the first one was not refused: {other:?}").into()),
    }
    write(&keeper, new).await?;
    println!("the second one writes: done\n");

    // Where the table is in another database, or the checker is no PostgreSQL, it keeps the newest token itself.
    let sql = "UPDATE ledger SET total = total + 1, fence = $1 WHERE fence <= $1";
    for token in [new, old] {
        let rows = observer.execute(sql, &[&token.to_i64()?]).await?;
        println!("by a column of the table, {token} updates {rows} rows");
    }
    let total: i64 = observer
        .query_one("SELECT total FROM ledger", &[])
        .await?
        .get(0);
    if total != 3 {
        return Err(format!("{total} writes, and not 3").into());
    }
    second.release().await?;
    Ok(())
}

async fn write(keeper: &Keeper, token: FencingToken) -> Result<(), lockkeeper::Error> {
    keeper
        .transaction(async |tx| {
            tx.check_fencing(token).await?;
            tx.execute("UPDATE ledger SET total = total + 1", &[])
                .await?;
            Ok::<_, lockkeeper::Error>(())
        })
        .await
}
