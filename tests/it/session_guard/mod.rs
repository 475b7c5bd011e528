//! Session guards: what happens to the lock, the connection and the caller when something goes wrong while it is held.

mod heartbeat;
mod index_build;
mod loss;
mod release;
mod transactions;

use lockkeeper::{Keeper, LockKey, SessionGuard};
use lockkeeper_testkit::Scene;
use tokio_postgres::SimpleQueryMessage;

async fn take(keeper: &Keeper, key: impl Into<LockKey>) -> SessionGuard {
    keeper.advisory_lock(key).session().acquire().await.unwrap()
}

/// What a pool of one connection gives next: its pid, whether it is in a transaction, its name.
async fn next_borrower(scene: &Scene) -> (i32, bool, String) {
    let object = scene.pool.get().await.unwrap();
    // A transaction that was open before began before this message. (The messages of a prepared statement have several
    // times of their own.)
    let sql = "SELECT pg_backend_pid(), now() <> statement_timestamp(), current_setting('application_name')";
    let reply = object.simple_query(sql).await.unwrap();
    let row = reply.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let column = |n| row.unwrap().get(n).unwrap();
    (
        column(0).parse().unwrap(),
        column(1) == "t",
        column(2).to_owned(),
    )
}
