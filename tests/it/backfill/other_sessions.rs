//! Other sessions that use the table meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use lockkeeper::{BackfillPause, ErrorKind};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error, eventually, until_true};

use super::{all_are, checkpoint, counted, number, scene, telling};

/// Writers that add to random rows while it runs: none waits for long, and nothing of theirs is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_are_served_meanwhile() {
    const ROWS: i64 = 60_000;
    let scene = scene(4, 60_000).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3_i64)
        .map(|writer| {
            let (stop, database) = (Arc::clone(&stop), scene.database.config());
            tokio::spawn(async move {
                let (client, connection) = database.connect(tokio_postgres::NoTls).await.unwrap();
                drop(tokio::spawn(connection));
                let update = client
                    .prepare("UPDATE t SET n = n + 100000 WHERE id = $1")
                    .await
                    .unwrap();
                let (mut added, mut longest, mut id) = (0_i64, Duration::ZERO, writer);
                while !stop.load(Ordering::Relaxed) {
                    id = (id * 48_271 + 11) % ROWS;
                    let started = Instant::now();
                    client.execute(&update, &[&(id + 1)]).await.unwrap();
                    longest = longest.max(started.elapsed());
                    added += 1;
                }
                (added, longest)
            })
        })
        .collect();
    let done = counted(&scene.keeper)
        .batch_time(Duration::from_millis(20))
        .run()
        .await
        .unwrap();
    stop.store(true, Ordering::Relaxed);
    let (mut added, mut longest) = (0, Duration::ZERO);
    for writer in writers {
        let (writes, wait) = writer.await.unwrap();
        added += writes;
        longest = longest.max(wait);
    }
    assert_eq!(done.rows_changed(), ROWS.unsigned_abs());
    let sql = "SELECT count(*) FROM t WHERE n % 100000 <> 1";
    assert_eq!(
        number(&scene.observer, sql).await,
        0,
        "rows not changed once"
    );
    let sum = number(
        &scene.observer,
        "SELECT sum(n::bigint / 100000)::bigint FROM t",
    )
    .await;
    assert_eq!(sum, added, "writes were lost");
    // A writer waits for one batch, or for two that are one behind the other; the rest is the machine's.
    let bound = done.longest_batch() * 2 + Duration::from_secs(10);
    assert!(longest < bound, "{longest:?}: {done}");
    assert!(done.batches() > 20, "{done}");
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_pauses_while_a_session_waits_for_the_table() {
    let scene = scene(3, 200).await;
    let holder = scene.database.connect().await;
    let changer = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t LIMIT 1")
        .await
        .unwrap();
    let change = tokio::spawn(async move {
        changer
            .batch_execute("ALTER TABLE t ADD COLUMN m int")
            .await
    });
    eventually("the change does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;

    // It asks for the estimate, which waits behind the change too: that is given up, and tried again.
    let (backfill, told) = telling(counted(&scene.keeper).batch_rows(10..=10));
    let run = tokio::spawn(backfill.run());
    for waiters in [2, 1, 2] {
        eventually("the estimate is not tried again", async || {
            scene.lock_waiters().await == waiters
        })
        .await;
    }
    assert_eq!(
        told.lock()
            .unwrap()
            .iter()
            .filter(|progress| progress.batches() > 0)
            .count(),
        0
    );
    holder.batch_execute("COMMIT").await.unwrap();
    change.await.unwrap().unwrap();
    run.await.unwrap().unwrap();
    all_are(&scene, 1).await;
    scene.nothing_left().await;
}

/// The same with a change that comes while it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_change_in_the_middle_goes_first() {
    let scene = scene(3, 2000).await;
    let (backfill, told) = telling(counted(&scene.keeper).batch_rows(10..=10));
    let mut stream = backfill.stream();
    stream.next().await.unwrap().unwrap();
    let holder = scene.database.connect().await;
    let changer = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t LIMIT 1")
        .await
        .unwrap();
    let change = tokio::spawn(async move {
        changer
            .batch_execute("ALTER TABLE t ADD COLUMN m int")
            .await
    });
    eventually("the change does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
    // The time itself is what is tested: what was seen before is good for less than this.
    tokio::time::sleep(Duration::from_millis(60)).await;
    for _ in 0..4 {
        let paused = stream.next().await.unwrap().unwrap();
        assert_eq!(paused.pause(), Some(BackfillPause::LockWaiters), "{paused}");
        assert_eq!(paused.batches(), 1);
        assert!(paused.paused() > Duration::ZERO);
    }
    holder.batch_execute("COMMIT").await.unwrap();
    change.await.unwrap().unwrap();
    while let Some(progress) = stream.next().await {
        progress.unwrap();
    }
    assert!(
        told.lock()
            .unwrap()
            .iter()
            .any(|progress| progress.pause().is_some())
    );
    all_are(&scene, 1).await;
}

/// On a table with hot rows there is always a waiter: it pauses, but not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_pauses_for_sessions_that_wait_for_rows() {
    let scene = scene(3, 500).await;
    let holder = scene.database.connect().await;
    let waiter = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t WHERE id = 499 FOR UPDATE")
        .await
        .unwrap();
    let update = "UPDATE t SET n = n + 100 WHERE id = 499";
    let waiting = tokio::spawn(async move { waiter.batch_execute(update).await });
    eventually("it does not wait", async || scene.lock_waiters().await == 1).await;
    let backfill = counted(&scene.keeper)
        .batch_rows(10..=10)
        .batch_time(Duration::from_millis(5));
    let mut stream = backfill.stream();
    let first = stream.next().await.unwrap().unwrap();
    assert_eq!(first.pause(), Some(BackfillPause::LockWaiters));
    assert_eq!(first.batches(), 0);
    while stream.next().await.unwrap().unwrap().batches() < 3 {}
    assert_eq!(scene.lock_waiters().await, 1);
    holder.batch_execute("COMMIT").await.unwrap();
    waiting.await.unwrap().unwrap();
    while let Some(progress) = stream.next().await {
        progress.unwrap();
    }
    let wrong = "SELECT count(*) FROM t WHERE n <> CASE id WHEN 499 THEN 101 ELSE 1 END";
    assert_eq!(number(&scene.observer, wrong).await, 0);
}

/// Who had to wait for a batch has its row before the next one, which is smaller.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_blocked_is_followed_by_a_smaller_one() {
    let scene = scene(3, 400).await;
    scene
        .observer
        .batch_execute(
            // Until a session waits for it, however long that takes to come.
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN FOR i IN 1..600 LOOP \
                 EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))); \
                 PERFORM pg_sleep(0.05); END LOOP; RETURN NEW; END'; \
             CREATE TRIGGER slow BEFORE UPDATE ON t FOR EACH ROW WHEN (OLD.id = 200) EXECUTE FUNCTION slow()",
        )
        .await
        .unwrap();
    let backfill = counted(&scene.keeper)
        .batch_rows(1..=200)
        .batch_time(GIVE_UP_AFTER);
    let mut stream = backfill.stream();
    let waiter = scene.database.connect().await;
    let observer = scene.database.connect().await;
    let waiting = tokio::spawn(async move {
        let sleeps = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
        until_true(&observer, "the trigger does not sleep", sleeps, &[]).await;
        waiter
            .batch_execute("UPDATE t SET n = n + 100 WHERE id = 100")
            .await
    });
    let first = stream.next().await.unwrap().unwrap();
    assert_eq!((first.batches(), first.rows_processed()), (1, 200));
    assert_eq!(first.batch_rows(), 100);
    assert!(first.paused() > Duration::ZERO, "{first:?}");
    waiting.await.unwrap().unwrap();
    while let Some(progress) = stream.next().await {
        progress.unwrap();
    }
    assert_eq!(number(&scene.observer, "SELECT sum(n) FROM t").await, 500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_row_is_tried_again_until_patience_ends() {
    let scene = scene(2, 100).await;
    let holder = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t WHERE id = 55 FOR UPDATE")
        .await
        .unwrap();
    let run = || {
        counted(&scene.keeper)
            .batch_rows(10..=20)
            .lock_timeout(Duration::from_millis(10))
    };
    let error = run()
        .max_lock_wait(Duration::from_secs(3))
        .run()
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::RetriesExhausted, "SQLSTATE 55P03");
    assert!(error.attempts() > 1, "{error}");
    // All that could be done was done, in smaller and smaller batches.
    let (_, done, _) = checkpoint(&scene).await;
    assert!((40..=54).contains(&done), "{done}");

    let waiting = tokio::spawn(run().run());
    let tried = async || scene.lock_waiters().await > 0;
    eventually("it is not tried again", tried).await;
    holder.batch_execute("COMMIT").await.unwrap();
    waiting.await.unwrap().unwrap();
    all_are(&scene, 1).await;
    scene.nothing_left().await;
}

/// A batch that waits has locked what is before the row it waits for, in the order of the keys, and nothing behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_locks_its_rows_in_order() {
    for off in [
        "",
        "enable_nestloop, enable_mergejoin",
        "enable_nestloop, enable_hashjoin",
        "enable_indexscan, enable_bitmapscan",
    ] {
        let scene = Scene::new(2).await;
        scene
            .observer
            .batch_execute(
                "CREATE TABLE t (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT 401 - i FROM generate_series(1, 400) AS i; ANALYZE t",
            )
            .await
            .unwrap();
        for setting in off.split(", ").filter(|name| !name.is_empty()) {
            let name = scene.database.name();
            let set = format!("ALTER DATABASE {name} SET {setting} = off");
            scene.observer.batch_execute(&set).await.unwrap();
        }
        let holder = scene.database.connect().await;
        holder
            .batch_execute("BEGIN; SELECT FROM t WHERE id = 40 FOR UPDATE")
            .await
            .unwrap();
        let backfill = counted(&scene.keeper)
            .batch_rows(80..=80)
            .lock_timeout(GIVE_UP_AFTER);
        let run = tokio::spawn(backfill.run());
        eventually("it does not wait", async || scene.lock_waiters().await == 1).await;
        let locked = "SELECT id FROM t WHERE id NOT IN (SELECT id FROM t FOR UPDATE SKIP LOCKED) ORDER BY id";
        let locked = scene.observer.query(locked, &[]).await.unwrap();
        let locked: Vec<i64> = locked.iter().map(|row| row.get(0)).collect();
        let expected: Vec<i64> = (1..=40).collect();
        assert_eq!(locked, expected, "without {off}");
        // A foreign key may refer to them meanwhile.
        let share = "SELECT FROM t WHERE id < 40 FOR KEY SHARE NOWAIT";
        assert_eq!(scene.observer.query(share, &[]).await.unwrap().len(), 39);
        holder.batch_execute("COMMIT").await.unwrap();
        run.await.unwrap().unwrap();
    }
}

/// The filter and the assignments see the row as others have left it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_others_change_meanwhile_is_seen_as_it_is_then() {
    let scene = scene(2, 20).await;
    let holder = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; UPDATE t SET n = 5 WHERE id = 3; UPDATE t SET n = -1 WHERE id = 4; DELETE FROM t WHERE id = 5")
        .await
        .unwrap();
    let run = tokio::spawn(
        counted(&scene.keeper)
            .filter("n >= 0")
            .lock_timeout(GIVE_UP_AFTER)
            .run(),
    );
    eventually("it does not wait", async || scene.lock_waiters().await == 1).await;
    holder.batch_execute("COMMIT").await.unwrap();
    let done = run.await.unwrap().unwrap();
    assert_eq!((done.rows_changed(), done.rows_processed()), (18, 20));
    let wrong = "SELECT count(*) FROM t WHERE n <> CASE id WHEN 3 THEN 6 WHEN 4 THEN -1 ELSE 1 END";
    assert_eq!(number(&scene.observer, wrong).await, 0);
}

/// The victim of a deadlock is run again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_is_no_end() {
    let scene = scene(2, 100).await;
    let name = scene.database.name();
    let set = format!("ALTER DATABASE {name} SET deadlock_timeout = '2s'");
    scene.observer.batch_execute(&set).await.unwrap();
    let other = scene.database.connect().await;
    other
        .batch_execute("SET deadlock_timeout = '1h'; BEGIN; UPDATE t SET n = n + 10 WHERE id = 90")
        .await
        .unwrap();
    let backfill = counted(&scene.keeper)
        .batch_rows(100..=100)
        .lock_timeout(GIVE_UP_AFTER);
    let run = tokio::spawn(backfill.run());
    eventually("it does not wait", async || scene.lock_waiters().await == 1).await;
    other
        .batch_execute("UPDATE t SET n = n + 10 WHERE id = 10; COMMIT")
        .await
        .unwrap();
    let done = run.await.unwrap().unwrap();
    assert_eq!(done.rows_changed(), 100);
    let wrong = "SELECT count(*) FROM t WHERE n <> CASE WHEN id IN (10, 90) THEN 11 ELSE 1 END";
    assert_eq!(number(&scene.observer, wrong).await, 0);
    scene.nothing_left().await;
}
