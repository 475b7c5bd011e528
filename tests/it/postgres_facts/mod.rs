//! What the crate relies on in PostgreSQL and in the driver, shown without the crate: a server that changes one of
//! these fails here first. They hold on PostgreSQL 14 to 18; where the versions differ the test says so.

mod advisory_locks;
mod lock_timeouts;
mod sessions;
mod transactions;

use lockkeeper_testkit::{Database, Server};
use tokio_postgres::{Client, Error, SimpleQueryMessage};

async fn database() -> Database {
    Server::shared().database().await
}

/// The SQLSTATE of a failed statement.
fn code<T>(answer: Result<T, Error>) -> String {
    match answer {
        Ok(_) => "00000".to_owned(),
        Err(error) => error
            .code()
            .map_or_else(|| format!("{error:?}"), |code| code.code().to_owned()),
    }
}

/// The first column of each row of a simple query.
async fn texts(client: &Client, sql: &str) -> Vec<String> {
    let reply = client.simple_query(sql).await.unwrap();
    let rows = reply.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    rows.collect()
}

/// How many advisory locks the backend holds, or awaits.
async fn advisory(observer: &Client, pid: i32, granted: bool) -> i64 {
    let row = observer
        .query_one(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = $1 AND granted = $2",
            &[&pid, &granted],
        )
        .await;
    row.unwrap().get(0)
}
