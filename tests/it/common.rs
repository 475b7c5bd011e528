//! What every test needs: a scene (database, pool, keeper, observer) and questions to the server from another
//! connection.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::{Keeper, KeeperBuilder, LockKey};
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
        Self::with(pool_size, |builder| builder).await
    }

    pub(crate) async fn with(
        pool_size: usize,
        configure: impl FnOnce(KeeperBuilder) -> KeeperBuilder,
    ) -> Self {
        let database = Server::shared().database().await;
        let pool = database.pool(pool_size);
        let keeper = configure(Keeper::builder(pool.clone()).application("test")).build();
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

    /// Backends that wait for the key.
    pub(crate) async fn waiters(&self, key: impl Into<LockKey>) -> Vec<i32> {
        self.lock_pids(&key.into(), false).await
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

    /// How many sessions of this database wait for a lock of any kind.
    pub(crate) async fn lock_waiters(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                   WHERE NOT l.granted AND l.waitstart IS NOT NULL AND a.datname = current_database()";
        self.observer.query_one(sql, &[]).await.unwrap().get(0)
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

    /// One setting as the next borrower of some pool connection finds it.
    pub(crate) async fn show(&self, setting: &str) -> String {
        let object = self.pool.get().await.unwrap();
        let row = object
            .query_one(&format!("SHOW {setting}"), &[])
            .await
            .unwrap();
        row.get(0)
    }
}

/// Waits until a backend waits for a lock, as the looks of the library see it: when it began is noted a moment after it
/// began, and they keep no wait without that.
pub(crate) async fn until_it_waits(observer: &Client, pid: i32, within: Duration) {
    eventually(within, "it does not wait", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks \
                   WHERE pid = $1 AND NOT granted AND waitstart IS NOT NULL)";
        observer.query_one(sql, &[&pid]).await.unwrap().get(0)
    })
    .await;
}

/// Waits for a state, looking every few milliseconds; panics with `what` when it has not come.
pub(crate) async fn eventually(within: Duration, what: &str, mut state: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !state().await {
        assert!(started.elapsed() < within, "{what} (after {within:?})");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Polls a future `polls` times, each time it asks to be, and drops it; `Some` if it was done by then.
pub(crate) async fn poll_times_and_drop<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|cx: &mut Context<'_>| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match Pin::as_mut(&mut future).poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// A writer that keeps what it is given.
#[derive(Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl io::Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything this thread logs from now on, until the second value is dropped.
pub(crate) fn kept_log() -> (Kept, tracing::subscriber::DefaultGuard) {
    // While there is only one subscriber, a place in the code that is first reached by a thread without it is silenced
    // for all threads: so there is another one.
    static ANOTHER: LazyLock<tracing::Dispatch> = LazyLock::new(|| {
        let sink = tracing_subscriber::fmt().with_writer(io::sink);
        tracing::Dispatch::new(sink.finish())
    });
    LazyLock::force(&ANOTHER);
    let kept = Kept::default();
    let writer = kept.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    (kept, tracing::subscriber::set_default(subscriber))
}
