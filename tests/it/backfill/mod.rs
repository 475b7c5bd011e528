//! Backfills: every row once, whatever ends a run, and beside other sessions.

mod identity;
mod interrupted;
mod keys;
mod other_sessions;
mod roles_and_standbys;
mod runs;

use std::sync::{Arc, Mutex};

use lockkeeper::{Backfill, BackfillProgress, Keeper};
use lockkeeper_testkit::Scene;
use tokio_postgres::Client;

/// A table `t (id, n)` with so many rows at zero.
async fn scene(pool_size: usize, rows: u32) -> Scene {
    let scene = Scene::new(pool_size).await;
    table(&scene.observer, rows).await;
    scene
}

async fn table(client: &Client, rows: u32) {
    client
        .batch_execute(&format!(
            "CREATE TABLE t (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0); \
             INSERT INTO t SELECT i FROM generate_series(1, {rows}) AS i; ANALYZE t"
        ))
        .await
        .unwrap();
}

fn counted(keeper: &Keeper) -> Backfill {
    keeper.backfill("t", "id").set("n = n + 1").name("count")
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

/// Every row of `t` was changed so often, and no more.
async fn all_are(scene: &Scene, n: i32) {
    let wrong = format!("SELECT count(*) FROM t WHERE n <> {n}");
    assert_eq!(
        number(&scene.observer, &wrong).await,
        0,
        "rows that are not {n}"
    );
}

async fn checkpoint(scene: &Scene) -> (Option<Vec<String>>, i64, bool) {
    let sql = "SELECT last_key, rows_done, done FROM lockkeeper_backfill WHERE name = 'count'";
    let row = scene.observer.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1), row.get(2))
}

/// A list that a callback fills.
type Told = Arc<Mutex<Vec<BackfillProgress>>>;

fn telling(backfill: Backfill) -> (Backfill, Told) {
    let told = Told::default();
    let list = Arc::clone(&told);
    let backfill =
        backfill.on_progress(move |progress| list.lock().unwrap().push(progress.clone()));
    (backfill, told)
}
