//! What every test needs: a scene (database, pool, keeper, observer) and questions to the server from another
//! connection.

use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::{Keeper, LockKey};
use lockkeeper_testkit::{Database, Server};
use tokio_postgres::Client;

/// A database of its own, a keeper over a pool of its own, and an observer on a connection beside it.
pub(crate) struct Scene {
    pub(crate) database: Database,
    pub(crate) pool: Pool,
    pub(crate) keeper: Keeper,
    pub(crate) observer: Client,
}

impl Scene {
    pub(crate) async fn new(pool_size: usize) -> Self {
        let database = Server::shared().database().await;
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

    /// Backends that hold the key, in any mode.
    pub(crate) async fn holders(&self, key: impl Into<LockKey>) -> Vec<i32> {
        self.lock_pids(&key.into(), true).await
    }

    pub(crate) async fn is_held(&self, key: impl Into<LockKey>) -> bool {
        !self.holders(key).await.is_empty()
    }

    async fn lock_pids(&self, key: &LockKey, granted: bool) -> Vec<i32> {
        // A wait is shown a moment before its beginning is, which the library goes by.
        let sql = format!(
            "SELECT l.pid FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = {} AND l.objid = {} \
             AND l.objsubid = {} AND l.granted = {granted} AND (l.granted OR l.waitstart IS NOT NULL) \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1",
            key.classid(),
            key.objid(),
            key.objsubid()
        );
        let rows = self.observer.query(&sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// All advisory locks of this database, held or awaited.
    pub(crate) async fn advisory_locks(&self) -> i64 {
        let row = self
            .observer
            .query_one(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                &[],
            )
            .await
            .unwrap();
        row.get(0)
    }

    /// Waits for the state in which nothing is left: no advisory lock held or awaited, no open transaction but the
    /// observer's, all of the pool to be had. Panics after `within`.
    pub(crate) async fn nothing_left_within(&self, within: Duration) {
        eventually(within, "an advisory lock is left in pg_locks", async || {
            self.advisory_locks().await == 0
        })
        .await;
        eventually(within, "a transaction is left open", async || {
            let row = self
                .observer
                .query_one(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                     AND pid <> pg_backend_pid() AND xact_start IS NOT NULL AND backend_type = 'client backend'",
                    &[],
                )
                .await
                .unwrap();
            row.get::<_, i64>(0) == 0
        })
        .await;
        self.pool_is_whole_within(within).await;
    }

    /// Before those have an end that the library waits out only in doubt, ten seconds long.
    pub(crate) async fn nothing_left(&self) {
        self.nothing_left_within(Duration::from_secs(8)).await;
    }

    /// Every connection the pool may have can be had at once, and answers.
    pub(crate) async fn pool_is_whole_within(&self, within: Duration) {
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

/// Waits for a state, looking every few milliseconds; panics with `what` when it has not come.
pub(crate) async fn eventually(within: Duration, what: &str, mut state: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !state().await {
        assert!(started.elapsed() < within, "{what} (after {within:?})");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
