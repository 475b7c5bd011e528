//! Every future may be dropped at every point: soon afterwards nothing is held or awaited, the next borrower of the
//! connection is not delayed, and all of the pool can be had.

mod at_random;
mod calls;
mod late_cancels;
mod open_guards;
mod prepared;

use std::time::Duration;

use deadpool_postgres::Pool;
use futures::future::FutureExt;
use futures::{SinkExt, TryStreamExt};
use lockkeeper::{Error, ErrorKind, Keeper, XactGuard};
use lockkeeper_testkit::{Scene, eventually_within};

/// What the calls ask for, and what another session holds in a busy scene.
const KEY: i64 = 71;

/// Free in every scene; sorted before and after [`KEY`].
const BEFORE: i64 = 70;
const AFTER: i64 = 72;

/// More polls than any call needs.
const MOST_POLLS: usize = 300;

/// The query methods, one after another.
async fn work(guard: &XactGuard) -> Result<(), Error> {
    guard.execute("INSERT INTO note VALUES ($1)", &[&2]).await?;
    guard.query("SELECT id FROM note", &[]).await?;
    guard.query_one("SELECT 1", &[]).await?;
    guard.query_opt("SELECT 1 WHERE false", &[]).await?;
    guard.simple_query("SELECT 1").await?;
    let statement = guard.prepare_cached("SELECT $1::int4").await?;
    let rows = guard.query_raw(&statement, [7]).await?;
    rows.try_collect::<Vec<_>>().await?;
    let sink = guard.copy_in("COPY note FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from_static(b"3\n")).await?;
    sink.finish().await?;
    let rows = guard.copy_out("COPY note TO STDOUT").await?;
    rows.try_collect::<Vec<_>>().await?;
    Ok(())
}

async fn with_table(scene: Scene) -> Scene {
    let create = scene.observer.batch_execute("CREATE TABLE note (id int4)");
    create.await.unwrap();
    scene
}

/// A keeper that has seen nothing of its server yet.
fn new_keeper(pool: &Pool, wait: Duration) -> Keeper {
    Keeper::builder(pool.clone())
        .application("test")
        .lock_wait(wait)
        .build()
}

/// All advisory locks of the scene's database: backend and whether it is granted.
async fn locks(scene: &Scene) -> Vec<(i32, bool)> {
    let rows = scene
        .observer
        .query(
            "SELECT pid, granted FROM pg_locks WHERE locktype = 'advisory' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY pid",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Asserts that a call which was dropped (or is over) has left nothing: `holder` alone holds a lock, no session waits, no
/// transaction is open, the next borrower and all others are served at once.
async fn assert_no_trace(scene: &Scene, holder: Option<i32>, within: Duration, what: &str) {
    let borrower = async {
        let object = scene.pool.get().await.unwrap();
        if let Err(error) = object.batch_execute("SELECT 1").await {
            panic!("{what}: the next borrower gets {error:?}");
        }
    };
    if tokio::time::timeout(within, borrower).await.is_err() {
        panic!("{what}: the next borrower is delayed");
    }
    let expected: Vec<_> = holder.iter().map(|&pid| (pid, true)).collect();
    let complaint = format!("{what}: there is more in pg_locks than should be");
    eventually_within(within, &complaint, async || locks(scene).await == expected).await;
    let complaint = format!("{what}: a transaction is left open");
    eventually_within(within, &complaint, async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND pid <> pg_backend_pid() AND xact_start IS NOT NULL";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    let whole = scene.pool_is_whole_within(within);
    if std::panic::AssertUnwindSafe(whole)
        .catch_unwind()
        .await
        .is_err()
    {
        panic!("{what}: the pool is not whole");
    }
}

/// Busy is `None`, `false` or a timeout.
fn is_busy(outcome: &Result<(), Error>) -> bool {
    match outcome {
        Ok(()) => true,
        Err(error) => error.kind() == ErrorKind::LockTimeout,
    }
}
