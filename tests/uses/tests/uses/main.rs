//! The crate in the hands of applications, beside the crates that they use. One binary, so that one throw-away server
//! serves all of it; each test has a database of its own.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    reason = "a test says what went wrong by panicking"
)]

mod applications;
mod driver;
mod health_metrics;
mod lock_metrics;
mod services;

use std::time::Duration;

use lockkeeper::{Error, Tx, tokio_postgres};
use lockkeeper_testkit::Scene;

pub(crate) const SOON: Duration = Duration::from_secs(5);

/// A scene with a table `acct (id text, n int8)` that has accounts `a` and `b` of 100 each.
pub(crate) async fn accounts(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE acct (id text PRIMARY KEY, n int8 NOT NULL CHECK (n >= 0)); \
             INSERT INTO acct VALUES ('a', 100), ('b', 100)",
        )
        .await
        .unwrap();
    scene
}

pub(crate) async fn balance(scene: &Scene, id: &str) -> i64 {
    let sql = "SELECT n FROM acct WHERE id = $1";
    scene.observer.query_one(sql, &[&id]).await.unwrap().get(0)
}

/// A user's error, as one writes it with thiserror.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BankError {
    #[error("database")]
    Database(#[from] tokio_postgres::Error),
    #[error("lock")]
    Lock(#[from] Error),
    #[error("no account {0}")]
    NoAccount(String),
    #[error("{0} is short of {1}")]
    Short(String, i64),
}

pub(crate) async fn withdraw(tx: &Tx, id: &str, amount: i64) -> Result<i64, BankError> {
    let row = tx
        .query_opt("SELECT n FROM acct WHERE id = $1 FOR UPDATE", &[&id])
        .await?;
    let have: i64 = row
        .ok_or_else(|| BankError::NoAccount(id.to_owned()))?
        .get(0);
    if have < amount {
        return Err(BankError::Short(id.to_owned(), amount - have));
    }
    tx.execute("UPDATE acct SET n = n - $2 WHERE id = $1", &[&id, &amount])
        .await?;
    Ok(have - amount)
}
