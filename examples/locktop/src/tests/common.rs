//! A scene on a server of its own, and questions to it from another connection.

use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::Keeper;
use lockkeeper_testkit::{Database, Server};
use tokio_postgres::Client;

/// A database, a keeper over a pool, and an observer on a connection beside it.
pub(super) struct Scene {
    pub(super) database: Database,
    pub(super) pool: Pool,
    pub(super) keeper: Keeper,
    pub(super) observer: Client,
}

impl Scene {
    pub(super) async fn on(server: &Server, pool_size: usize) -> Self {
        let database = server.database().await;
        let pool = database.pool(pool_size);
        let keeper = Keeper::builder(pool.clone()).application("test").build();
        let observer = database.connect().await;
        Self {
            database,
            pool,
            keeper,
            observer,
        }
    }

    /// Every connection the pool may have can be had at once, and answers.
    pub(super) async fn pool_is_whole_within(&self, within: Duration) {
        let all = async {
            let mut objects = Vec::new();
            for _ in 0..self.pool.status().max_size {
                let object = self.pool.get().await.unwrap();
                object.batch_execute("SELECT 1").await.unwrap();
                objects.push(object);
            }
        };
        tokio::time::timeout(within, all)
            .await
            .expect("the pool does not give all of its connections");
    }
}

/// The backend of a plain client.
pub(super) async fn pid_of(client: &Client) -> i32 {
    let row = client
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap();
    row.get(0)
}

/// Waits until a backend waits for a lock, as the looks of the library see it: when it began is noted a moment after it
/// began, and they keep no wait without that.
pub(super) async fn until_it_waits(observer: &Client, pid: i32, within: Duration) {
    eventually(within, "it does not wait", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks \
                   WHERE pid = $1 AND NOT granted AND waitstart IS NOT NULL)";
        observer.query_one(sql, &[&pid]).await.unwrap().get(0)
    })
    .await;
}

/// Waits for a state, looking every few milliseconds; panics with `what` when it has not come.
pub(super) async fn eventually(within: Duration, what: &str, mut state: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !state().await {
        assert!(started.elapsed() < within, "{what} (after {within:?})");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
