//! A connection that is lost around COMMIT: what is reported agrees with what the server did, and nothing is ever done
//! twice.

mod cut;
mod in_progress;
mod servers;
mod transactions;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use deadpool_postgres::Pool;
use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{Database, Proxy, Server, eventually, in_time};
use tokio_postgres::Client;

/// The advisory lock that COMMIT waits for, where a test holds it up.
const HOLD: i64 = 4711;

/// How the messages end that are cut.
const COMMIT: &str = "COMMIT";
const MARK: &str = "AS c";

/// What a transaction has done.
#[derive(Default)]
struct Counts {
    runs: AtomicU32,
    hooks: Arc<AtomicU32>,
}

impl Counts {
    fn runs(&self) -> u32 {
        self.runs.load(Ordering::Relaxed)
    }

    fn hooks(&self) -> u32 {
        self.hooks.load(Ordering::Relaxed)
    }
}

/// Adds one row.
async fn add(keeper: &Keeper, options: TransactionOptions, counts: &Counts) -> Result<(), Error> {
    keeper
        .transaction_with(options, async |tx| insert(tx, counts).await)
        .await
}

async fn insert(tx: &mut Tx, counts: &Counts) -> Result<(), Error> {
    counts.runs.fetch_add(1, Ordering::Relaxed);
    tx.execute("INSERT INTO t VALUES (10)", &[]).await?;
    let hooks = Arc::clone(&counts.hooks);
    tx.after_commit(move || {
        hooks.fetch_add(1, Ordering::Relaxed);
    });
    Ok(())
}

fn resolving() -> TransactionOptions {
    TransactionOptions::new().resolve_commit()
}

/// A table `t (id)`, and a keeper behind a proxy.
struct Lab {
    database: Database,
    observer: Client,
    proxy: Proxy,
    pool: Pool,
    keeper: Keeper,
}

impl Lab {
    async fn new(pool_size: usize) -> Self {
        Self::on(Server::shared(), pool_size).await
    }

    async fn on(server: &Server, pool_size: usize) -> Self {
        let database = server.database().await;
        let observer = database.connect().await;
        observer
            .batch_execute("CREATE TABLE t (id int NOT NULL)")
            .await
            .unwrap();
        let proxy = Proxy::before(database.server());
        let pool = proxy.pool(&database.config(), pool_size);
        let keeper = Keeper::builder(pool.clone()).watch(false).build();
        Self {
            database,
            observer,
            proxy,
            pool,
            keeper,
        }
    }

    /// COMMIT of a transaction that inserts waits until the observer lets it.
    async fn hold_commits(&self) {
        self.observer
            .batch_execute(&format!(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM pg_advisory_xact_lock({HOLD}); RETURN NULL; END $$; \
                 CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
                 FOR EACH ROW EXECUTE FUNCTION hold(); SELECT pg_advisory_lock({HOLD})"
            ))
            .await
            .unwrap();
    }

    async fn let_commit(&self) {
        let unlock = format!("SELECT pg_advisory_unlock({HOLD})");
        self.observer.batch_execute(&unlock).await.unwrap();
    }

    /// The backend whose COMMIT is held up.
    async fn held_up(&self) -> i32 {
        let mut found = None;
        eventually("no COMMIT is held up", async || {
            let sql = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
            let rows = self.observer.query(sql, &[]).await.unwrap();
            found = rows.first().map(|row| row.get(0));
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// Waits until the outcome has been asked for, while it is not decided.
    async fn asked(&self) {
        let asked = async || {
            self.count(
                "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                        AND query LIKE '%pg_xact_status%'",
            )
            .await
                > 0
        };
        eventually("the outcome is not asked for", asked).await;
    }

    async fn count(&self, from: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {from}");
        self.observer.query_one(&sql, &[]).await.unwrap().get(0)
    }

    async fn reset(&self) {
        self.observer.batch_execute("DELETE FROM t").await.unwrap();
    }

    /// No transaction is open, so that the table says what has become of all of them.
    async fn settled(&self) {
        eventually("a transaction is open still", async || {
            self.count(
                "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                 AND xact_start IS NOT NULL AND backend_type = 'client backend'",
            )
            .await
                == 0
        })
        .await;
    }

    /// What is reported is what happened, and at most once.
    async fn agrees(&self, answer: &Result<(), Error>, counts: &Counts, what: &str) -> i64 {
        self.settled().await;
        let rows = self.count("t").await;
        let hooks = counts.hooks();
        let right = match answer {
            Ok(()) => rows == 1 && hooks == 1,
            Err(error) if error.kind() == ErrorKind::CommitUnknown => rows <= 1 && hooks == 0,
            Err(_) => rows == 0 && hooks == 0,
        };
        let runs = counts.runs();
        assert!(
            right,
            "{what}: {answer:?}, but {rows} rows, {hooks} hooks and {runs} runs"
        );
        rows
    }

    /// All of the pool can be had, and answers.
    async fn pool_is_whole(&self) {
        let mut all = Vec::new();
        for _ in 0..self.pool.status().max_size {
            let object = in_time("the pool gives no connection", self.pool.get())
                .await
                .unwrap();
            drop(object.batch_execute("SELECT 1").await);
            all.push(object);
        }
    }
}

impl Lab {
    /// This backend has ended.
    async fn settled_but_one(&self, pid: i32) {
        eventually("the backend does not end", async || {
            let sql = format!("pg_stat_activity WHERE pid = {pid}");
            self.count(&sql).await == 0
        })
        .await;
    }
}
