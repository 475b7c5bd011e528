//! A table of a million rows, changed step by step while others read and write it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkeeper_testkit::{Scene, eventually};
use tokio::task::JoinSet;

const ROWS: i64 = 1_000_000;
/// For a machine that does other things too. A statement of the load takes a millisecond.
const STALL: Duration = Duration::from_secs(15);

/// Two that read, two that write, and one whose transactions last.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    longest: Arc<AtomicU64>,
    tasks: JoinSet<()>,
}

impl Load {
    async fn start(scene: &Scene) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            done: Arc::default(),
            longest: Arc::default(),
            tasks: JoinSet::new(),
        };
        for sql in [
            "SELECT customer FROM big WHERE id = $1",
            "SELECT customer FROM big WHERE id = $1 FOR SHARE",
            "UPDATE big SET touched = touched + 1 WHERE id = $1",
            "UPDATE big SET customer = customer WHERE id = $1",
        ] {
            let client = scene.database.connect().await;
            let statement = client.prepare(sql).await.unwrap();
            let (stop, done) = (Arc::clone(&load.stop), Arc::clone(&load.done));
            let longest = Arc::clone(&load.longest);
            load.tasks.spawn(async move {
                let mut id = 1;
                while !stop.load(Ordering::Relaxed) {
                    id = (id * 48_271) % 2_147_483_647;
                    let began = Instant::now();
                    let row = &(1 + id % ROWS);
                    client.execute(&statement, &[row]).await.unwrap();
                    let took = u64::try_from(began.elapsed().as_millis()).unwrap();
                    longest.fetch_max(took, Ordering::Relaxed);
                    done.fetch_add(1, Ordering::Relaxed);
                    // The pace of the load.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
        let client = scene.database.connect().await;
        let stop = Arc::clone(&load.stop);
        load.tasks.spawn(async move {
            let report = "BEGIN; SELECT FROM big WHERE id = 1; SELECT pg_sleep(0.2); COMMIT";
            while !stop.load(Ordering::Relaxed) {
                client.batch_execute(report).await.unwrap();
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        load
    }

    /// The load was served meanwhile, and none of its statements took long.
    async fn was_served(&self, step: &str) {
        let before = self.done.load(Ordering::Relaxed);
        eventually("the load stands still", async || {
            self.done.load(Ordering::Relaxed) > before + 8
        })
        .await;
        let longest = Duration::from_millis(self.longest.swap(0, Ordering::Relaxed));
        assert!(longest < STALL, "{step}: a statement took {longest:?}");
    }

    async fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_rows_change_under_readers_and_writers() {
    let scene = Scene::new(4).await;
    let sql = format!(
        "CREATE TABLE customer (id bigint PRIMARY KEY); INSERT INTO customer SELECT generate_series(0, 999); \
         CREATE TABLE big (id bigint PRIMARY KEY, customer bigint, touched int NOT NULL DEFAULT 0); \
         INSERT INTO big (id, customer) SELECT n, n % 1000 FROM generate_series(1, {ROWS}) AS n"
    );
    scene.observer.batch_execute(&sql).await.unwrap();
    scene.observer.batch_execute("ANALYZE big").await.unwrap();
    let load = Load::start(&scene).await;
    let schema = scene
        .keeper
        .schema()
        .lock_timeout(Duration::from_millis(50))
        .deadline(Duration::from_secs(300));

    schema.add_column("big", "filled", "int").await.unwrap();
    load.was_served("add_column").await;
    let filled = scene
        .keeper
        .backfill("big", "id")
        .set("filled = coalesce(filled, 0) + 1");
    let filled = filled.run().await.unwrap();
    assert_eq!(filled.rows_changed(), u64::try_from(ROWS).unwrap());
    load.was_served("backfill").await;
    schema.create_index("big", ["filled"]).await.unwrap();
    load.was_served("create_index").await;
    schema
        .add_check("big", "filled_once", "filled = 1")
        .await
        .unwrap();
    load.was_served("add_check").await;
    schema.set_not_null("big", "filled").await.unwrap();
    load.was_served("set_not_null").await;
    schema
        .add_foreign_key("big", ["customer"], "customer", ["id"])
        .await
        .unwrap();
    load.was_served("add_foreign_key").await;
    load.end().await;

    // The check was validated: no row is left out, none done twice.
    let sql = "SELECT (SELECT count(*) FROM pg_constraint WHERE conrelid = 'big'::regclass AND convalidated \
               AND contype IN ('c', 'f')), \
               (SELECT bool_and(indisvalid) FROM pg_index WHERE indrelid = 'big'::regclass), \
               (SELECT attnotnull FROM pg_attribute WHERE attrelid = 'big'::regclass AND attname = 'filled')";
    let row = scene.observer.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 2);
    assert!(row.get::<_, bool>(1) && row.get::<_, bool>(2));
    scene.nothing_left().await;
}
