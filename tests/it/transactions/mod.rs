//! Transactions, by subject.

mod call_sites;
mod literals;
mod lost_connections;
mod model;
mod options;
mod pools;
mod retries;
mod savepoints;
mod swallowed_errors;

use std::error::Error as StdError;
use std::sync::atomic::{AtomicU32, Ordering};

use lockkeeper::{Error, Keeper, Tx};
use lockkeeper_testkit::{AppError, Scene, raise};

async fn ids(scene: &Scene) -> Vec<i32> {
    scene.column("SELECT id FROM t ORDER BY id").await
}

/// Keeps even less.
#[derive(Debug)]
struct Nothing;

impl<E: StdError> From<E> for Nothing {
    fn from(_: E) -> Self {
        Nothing
    }
}

/// Runs a closure that fails with 40001 the first time, and says how often it ran.
async fn fails_once<E>(keeper: &Keeper) -> u32
where
    E: From<Error> + From<tokio_postgres::Error> + Send + std::fmt::Debug,
{
    let runs = AtomicU32::new(0);
    keeper
        .transaction(async |tx| {
            if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                tx.batch_execute(&raise("40001")).await?;
            }
            Ok::<_, E>(())
        })
        .await
        .unwrap();
    runs.into_inner()
}

async fn insert(tx: &Tx, id: i32) -> Result<(), AppError> {
    tx.execute("INSERT INTO t VALUES ($1, 0)", &[&id]).await?;
    Ok(())
}
