//! What other sessions notice of a change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, eventually};
use tokio::task::JoinHandle;

use super::millis;

/// Readers and writers that note the longest of their statements.
struct Load {
    stop: Arc<AtomicBool>,
    longest: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start(scene: &Scene) -> Self {
        let (stop, longest) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let done = Arc::new(AtomicU64::new(0));
        let mut tasks = Vec::new();
        for n in 0..6_u32 {
            let client = scene.database.connect().await;
            let (stop, longest, done) =
                (Arc::clone(&stop), Arc::clone(&longest), Arc::clone(&done));
            let sql = match n % 3 {
                0 => "SELECT count(*) FROM busy WHERE id < 100".to_owned(),
                1 => format!("UPDATE busy SET a = a + 1 WHERE id = {n}"),
                _ => "INSERT INTO busy (id, a) VALUES (0, 0)".to_owned(),
            };
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    client.batch_execute(&sql).await.unwrap();
                    let took = u64::try_from(started.elapsed().as_millis()).unwrap();
                    longest.fetch_max(took, Ordering::Relaxed);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Self {
            stop,
            longest,
            done,
            tasks,
        }
    }

    /// The longest statement since the last call.
    fn longest(&self) -> Duration {
        millis(self.longest.swap(0, Ordering::Relaxed))
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// The longest that others waited for the table is bounded by the timeout, although a long transaction blocks for
/// many times as long: waits as the server counts them, so that a slow machine makes no difference.
#[tokio::test]
async fn under_load_no_session_waits_longer_than_the_timeout() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("busy", 100_000).await;
    scene
        .observer
        .batch_execute("CREATE INDEX ON busy (id)")
        .await
        .unwrap();
    let load = Load::start(&scene).await;
    let log_before = scene.database.server().log_len();
    // A long transaction.
    let holder = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM busy LIMIT 1")
        .await
        .unwrap();
    let timeout = millis(100);
    let schema = scene
        .keeper
        .schema()
        .lock_timeout(timeout)
        .deadline(GIVE_UP_AFTER * 4);
    let failed = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&failed);
    let change = schema
        .change(
            "DO $$ BEGIN RAISE LOG 'in % under %', current_database(), current_setting('lock_timeout'); END $$; \
             ALTER TABLE busy ADD COLUMN note text; ALTER TABLE busy ALTER b SET DEFAULT 'x'",
        )
        .allow_unknown()
        .on_attempt(move |attempt| {
            count.fetch_add(u64::from(!attempt.succeeded()), Ordering::Relaxed);
        });
    eventually("the load does not run", async || {
        load.done.load(Ordering::Relaxed) > 100
    })
    .await;
    load.longest();
    let started = Instant::now();
    let changing = tokio::spawn(change.run());
    let mut longest_wait = 0.0_f64;
    // Until a wait was seen, or there is none.
    while failed.load(Ordering::Relaxed) < 6
        || longest_wait == 0.0 && failed.load(Ordering::Relaxed) < 30
    {
        let sql = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float8 FROM pg_locks \
                   WHERE relation = 'busy'::regclass AND NOT granted AND mode <> 'AccessExclusiveLock'";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        longest_wait = longest_wait.max(row.get(0));
        tokio::time::sleep(millis(5)).await;
        assert!(
            started.elapsed() < GIVE_UP_AFTER * 2,
            "six attempts have not failed"
        );
    }
    let held = started.elapsed();
    holder.batch_execute("COMMIT").await.unwrap();
    let report = changing.await.unwrap().unwrap();
    let longest = load.longest();
    load.end().await;
    assert!(report.attempts().len() >= 7, "{report}");
    // Whatever the machine: each attempt ran under the timeout asked for, which is what ended those that failed, and the
    // pauses leave the table to others for ten times as long.
    let log = scene.database.server().log_since(log_before);
    let name = scene.database.name();
    let under = |timeout: &str| log.matches(&format!("in {name} under {timeout}")).count();
    assert_eq!(under("100ms\n"), report.attempts().len(), "{report}");
    assert_eq!(under(""), report.attempts().len(), "{report}");
    let (_, failed) = report.attempts().split_last().unwrap();
    for attempt in failed {
        assert_eq!(attempt.sqlstate(), Some("55P03"), "{report}");
        assert!(attempt.pause().unwrap() >= timeout * 10, "{report}");
    }
    // The naive statement would have kept them waiting for all of it.
    assert!(held > timeout * 50, "{held:?}");
    assert!(
        longest_wait > 0.0,
        "no session ever queued, so this shows nothing"
    );
    assert!(longest_wait < 2.5, "a session waited {longest_wait} s");
    assert!(longest < held, "the longest statement took {longest:?}");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}
