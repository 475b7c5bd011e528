//! What most tests need: a database, a keeper over a pool, and questions to the server from another connection.

use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::{Keeper, KeeperBuilder, LockKey, Monitor};
use tokio_postgres::{Client, NoTls};

use crate::database::Database;
use crate::server::Server;
use crate::session::{Session, cancel, lock_by_sql, pid_of, terminate, unlock_by_sql};
use crate::wait::{
    CLEANED_UP_WITHIN, GIVE_UP_AFTER, eventually, eventually_within, in_time_of, until_true,
    until_true_within,
};

/// A database of its own, a keeper over a pool of its own, and an observer on a connection beside it.
#[derive(Debug)]
pub struct Scene {
    /// The database, in the server that all tests share or in one of the test's own.
    pub database: Database,
    /// The keeper's pool.
    pub pool: Pool,
    /// A keeper of the application `test`.
    pub keeper: Keeper,
    /// Asks the server about all of this.
    pub observer: Client,
}

impl Scene {
    /// One in the shared server, with a pool of so many connections.
    pub async fn new(pool_size: usize) -> Scene {
        Scene::with(pool_size, |builder| builder).await
    }

    /// The same, with a keeper that is configured.
    pub async fn with(
        pool_size: usize,
        configure: impl FnOnce(KeeperBuilder) -> KeeperBuilder,
    ) -> Scene {
        let mut scene = Scene::on(Server::shared(), pool_size).await;
        scene.keeper = configure(scene.builder()).build();
        scene
    }

    /// One in another server.
    pub async fn on(server: &Server, pool_size: usize) -> Scene {
        let database = server.database().await;
        let pool = database.pool(pool_size);
        Scene {
            observer: database.connect().await,
            keeper: Keeper::builder(pool.clone()).application("test").build(),
            database,
            pool,
        }
    }

    /// One whose keeper has a side connection.
    pub async fn with_side_connection(pool_size: usize) -> Scene {
        let mut scene = Scene::new(pool_size).await;
        let side = scene.database.config();
        scene.keeper = scene.builder().side_connection(side, NoTls).build();
        scene
    }

    /// One with a table `t (id, n)`, rows 1 and 2 at zero, and deadlocks that are found within 100 ms.
    pub async fn with_two_rows(pool_size: usize) -> Scene {
        let scene = Scene::new(pool_size).await;
        scene
            .run("CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL); INSERT INTO t VALUES (1, 0), (2, 0)")
            .await;
        scene.set("deadlock_timeout", "100ms").await;
        scene
    }

    /// A builder of another keeper over the same pool.
    pub fn builder(&self) -> KeeperBuilder {
        Keeper::builder(self.pool.clone()).application("test")
    }

    /// A monitor that sees the server over a side connection.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        let keeper = self
            .builder()
            .side_connection(self.database.config(), NoTls);
        keeper.build().monitor()
    }

    /// Runs statements on the observer's connection.
    pub async fn run(&self, sql: &str) {
        let ran = self.observer.batch_execute(sql).await;
        ran.expect(sql);
    }

    /// Sets a parameter for all connections to the database that are opened from now on.
    pub async fn set(&self, name: &str, value: &str) {
        let database = self.database.name();
        self.run(&format!("ALTER DATABASE {database} SET {name} = '{value}'"))
            .await;
    }

    /// Whether an SQL condition is true.
    pub async fn is_true(&self, condition: &str) -> bool {
        let sql = format!("SELECT {condition}");
        let row = self.observer.query_one(&sql, &[]).await;
        row.expect(&sql).get(0)
    }

    /// The first column of a query's rows.
    pub async fn column(&self, sql: &str) -> Vec<i32> {
        let rows = self.observer.query(sql, &[]).await.expect(sql);
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Makes a table `name (id, a, b)` of so many rows.
    pub async fn table(&self, name: &str, rows: u32) {
        self.run(&format!(
            "CREATE TABLE {name} (id int, a int, b text); \
             INSERT INTO {name} SELECT n, n % 10, 'row ' || n FROM generate_series(1, {rows}) n"
        ))
        .await;
    }

    /// How many rows there are in a table, or in what else may stand behind `FROM`.
    pub async fn count(&self, from: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {from}");
        let row = self.observer.query_one(&sql, &[]).await;
        row.expect(&sql).get(0)
    }

    /// A session that does not use the library.
    pub async fn session(&self) -> Session {
        Session::connect(&self.database.config()).await
    }

    /// The same with a session lock, which it holds until it is dropped.
    pub async fn holder(&self, key: impl Into<LockKey>) -> Session {
        let session = self.session().await;
        lock_by_sql(&session.client, key).await;
        session
    }

    /// Ends a backend.
    pub async fn terminate(&self, pid: i32) {
        terminate(&self.observer, pid).await;
    }

    /// Cancels what a backend runs.
    pub async fn cancel(&self, pid: i32) {
        cancel(&self.observer, pid).await;
    }

    /// Backends that hold the key, in any mode.
    pub async fn holders(&self, key: impl Into<LockKey>) -> Vec<i32> {
        self.lock_pids(&key.into(), true).await
    }

    /// Backends that wait for the key.
    pub async fn waiters(&self, key: impl Into<LockKey>) -> Vec<i32> {
        self.lock_pids(&key.into(), false).await
    }

    /// Whether a backend holds the key.
    pub async fn is_held(&self, key: impl Into<LockKey>) -> bool {
        !self.holders(key).await.is_empty()
    }

    async fn lock_pids(&self, key: &LockKey, granted: bool) -> Vec<i32> {
        let sql = format!(
            "SELECT l.pid FROM pg_locks l WHERE {} ORDER BY 1",
            is_lock(key, granted)
        );
        self.column(&sql).await
    }

    /// Waits until a backend waits for the key. Its pid.
    pub async fn until_awaited(&self, key: impl Into<LockKey>) -> i32 {
        let key = key.into();
        let started = Instant::now();
        loop {
            if let Some(pid) = self.waiters(&key).await.first() {
                return *pid;
            }
            assert!(
                started.elapsed() < GIVE_UP_AFTER,
                "no session waits for {key}"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until so many backends wait for the key, and no more.
    pub async fn until_awaited_by(&self, count: usize, key: impl Into<LockKey>) {
        let sql = format!(
            "SELECT count(*) = {count} FROM pg_locks l WHERE {}",
            is_lock(&key.into(), false)
        );
        let what = format!("not {count} sessions wait for the lock");
        until_true(&self.observer, &what, &sql, &[]).await;
    }

    /// Waits until the key has been waited for for so long, by the server's clock. Waits that are repeated count together.
    pub async fn until_awaited_for(&self, time: Duration, key: impl Into<LockKey>) {
        let sql = format!(
            "SELECT extract(epoch FROM min(l.waitstart))::float8, extract(epoch FROM clock_timestamp())::float8 \
             FROM pg_locks l WHERE {}",
            is_lock(&key.into(), false)
        );
        let what = format!("no session waits for the lock for {time:?}");
        let mut began = None;
        eventually(&what, async || {
            let row = self.observer.query_one(&sql, &[]).await.expect(&sql);
            let Some(this_wait) = row.get::<_, Option<f64>>(0) else {
                return false;
            };
            let began = *began.get_or_insert(this_wait);
            row.get::<_, f64>(1) - began > time.as_secs_f64()
        })
        .await;
    }

    /// Waits until no backend holds the key.
    pub async fn until_free(&self, key: impl Into<LockKey>) {
        let sql = format!(
            "SELECT NOT EXISTS (SELECT FROM pg_locks l WHERE {})",
            is_lock(&key.into(), true)
        );
        let what = "the lock is still held";
        until_true_within(CLEANED_UP_WITHIN, &self.observer, what, &sql, &[]).await;
    }

    /// How many sessions of this database wait for a lock of any kind.
    pub async fn lock_waiters(&self) -> i64 {
        self.count(
            "pg_locks l JOIN pg_stat_activity a USING (pid) \
             WHERE NOT l.granted AND l.waitstart IS NOT NULL AND a.datname = current_database()",
        )
        .await
    }

    /// Waits until so many sessions of this database, or more, wait for a lock of any kind.
    pub async fn until_lock_waiters(&self, count: i64) {
        let what = format!("not {count} sessions wait for a lock");
        eventually(&what, async || self.lock_waiters().await >= count).await;
    }

    /// All advisory locks of this database, held or awaited.
    pub async fn advisory_locks(&self) -> i64 {
        self.count(ADVISORY_LOCKS).await
    }

    /// Waits for the state in which only so many advisory locks are held, and none is awaited.
    pub async fn nothing_but(&self, locks: i64) {
        let count = format!("SELECT count(*) FROM {ADVISORY_LOCKS}");
        eventually_within(CLEANED_UP_WITHIN, "an advisory lock is left", async || {
            // The server sends an error before it has released what the failed transaction held: while the lock table is
            // full because of that, even the observer gets no lock on a catalog.
            match self.observer.query_one(&count, &[]).await {
                Ok(row) => row.get::<_, i64>(0) == locks,
                Err(error) => {
                    assert_eq!(error.code().map(|code| code.code()), Some("53200"));
                    false
                }
            }
        })
        .await;
    }

    /// Waits until no transaction of this database is open but the observer's.
    pub async fn until_no_transaction(&self) {
        self.no_transaction_within(CLEANED_UP_WITHIN).await;
    }

    async fn no_transaction_within(&self, within: Duration) {
        eventually_within(within, "a transaction is left open", async || {
            self.count(
                "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                 AND xact_start IS NOT NULL AND backend_type = 'client backend'",
            )
            .await
                == 0
        })
        .await;
    }

    /// Waits for the state in which nothing is left: no advisory lock held or awaited, no open transaction but the
    /// observer's, all of the pool to be had.
    pub async fn nothing_left(&self) {
        self.nothing_left_within(CLEANED_UP_WITHIN).await;
    }

    /// The same, for a network or a machine that is slow.
    pub async fn nothing_left_within(&self, within: Duration) {
        eventually_within(within, "an advisory lock is left in pg_locks", async || {
            self.advisory_locks().await == 0
        })
        .await;
        self.no_transaction_within(within).await;
        self.pool_is_whole_within(within).await;
    }

    /// Every connection the pool may have can be had at once, and answers.
    pub async fn pool_is_whole(&self) {
        self.pool_is_whole_within(CLEANED_UP_WITHIN).await;
    }

    /// The same, for a network or a machine that is slow.
    pub async fn pool_is_whole_within(&self, within: Duration) {
        let all = async {
            let mut objects = Vec::new();
            for _ in 0..self.pool.status().max_size {
                let object = self.pool.get().await.expect("a connection");
                object.batch_execute("SELECT 1").await.expect("an answer");
                objects.push(object);
            }
        };
        in_time_of(within, "the pool does not give all of its connections", all).await;
    }

    /// Opens all of the pool's connections but so many that are in use.
    pub async fn open_connections_but(&self, in_use: usize) {
        let mut objects = Vec::new();
        for _ in in_use..self.pool.status().max_size {
            objects.push(self.pool.get().await.expect("a connection"));
        }
    }

    /// The backend that the pool gives next.
    pub async fn next_pid(&self) -> i32 {
        pid_of(&self.pool.get().await.expect("a connection")).await
    }

    /// One setting as the next borrower of some pool connection finds it.
    pub async fn show(&self, setting: &str) -> String {
        let object = self.pool.get().await.expect("a connection");
        let row = object.query_one(&format!("SHOW {setting}"), &[]).await;
        row.expect(setting).get(0)
    }

    /// The `application_name` of a backend.
    pub async fn application_name(&self, pid: i32) -> String {
        let sql = "SELECT application_name FROM pg_stat_activity WHERE pid = $1";
        let row = self.observer.query_one(sql, &[&pid]).await;
        row.expect(sql).get(0)
    }

    /// How long it takes to see a lock go that a session without the library releases, on this machine at this moment.
    pub async fn time_of_release_by_sql(&self, client: &Client) -> Duration {
        lock_by_sql(client, "by sql").await;
        let started = Instant::now();
        unlock_by_sql(client, "by sql").await;
        self.time_until_no_advisory_lock(started).await
    }

    /// How long it takes until no advisory lock is held, asked for without a pause.
    pub async fn time_until_no_advisory_lock(&self, started: Instant) -> Duration {
        while self.advisory_locks().await > 0 {
            assert!(started.elapsed() < CLEANED_UP_WITHIN, "a lock is left");
            tokio::task::yield_now().await;
        }
        started.elapsed()
    }
}

const ADVISORY_LOCKS: &str = "pg_locks WHERE locktype = 'advisory' \
                              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// The condition for the rows of `pg_locks l` that show a key of this database.
fn is_lock(key: &LockKey, granted: bool) -> String {
    // A wait is shown a moment before its beginning is, which the library goes by.
    format!(
        "l.locktype = 'advisory' AND l.classid = {} AND l.objid = {} AND l.objsubid = {} \
         AND l.granted = {granted} AND (l.granted OR l.waitstart IS NOT NULL) \
         AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        key.classid(),
        key.objid(),
        key.objsubid()
    )
}

/// The middle one of some times.
#[must_use]
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
