//! Backfills: each row once whatever ends a run, and others go on meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use lockkeeper::{
    Backfill, BackfillPause, BackfillProgress, Error, ErrorKind, Keeper, ReplicationLag,
};
use lockkeeper_testkit::Server;
use tokio_postgres::Client;

use crate::common::{Scene, eventually, poll_times_and_drop};

const SOON: Duration = Duration::from_secs(30);

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_is_changed_once_and_a_second_run_has_nothing_to_do() {
    let scene = scene(2, 5000).await;
    let (backfill, told) = telling(counted(&scene.keeper).batch_rows(100..=400));
    let done = backfill.run().await.unwrap();
    assert!(done.is_done());
    assert_eq!((done.rows_changed(), done.rows_processed()), (5000, 5000));
    assert_eq!(done.remaining(), Some(Duration::ZERO));
    assert!(
        done.batches() >= 13 && done.longest_batch() > Duration::ZERO,
        "{done:?}"
    );
    assert_eq!(done.replication_lag(), ReplicationLag::NoStandbys);
    all_are(&scene, 1).await;
    assert_eq!(
        checkpoint(&scene).await,
        (Some(vec!["5000".to_owned()]), 5000, true)
    );
    {
        let told = told.lock().unwrap();
        assert!(
            told.windows(2)
                .all(|two| two[0].rows_changed() <= two[1].rows_changed())
        );
        let first = &told[0];
        assert_eq!(first.estimated_rows(), Some(5000));
        assert!(
            first.rows_per_second() > 0.0 && first.remaining().is_some(),
            "{first:?}"
        );
        assert!(told.last().unwrap().is_done());
    }

    let again = counted(&scene.keeper).run().await.unwrap();
    assert!(again.is_done());
    assert_eq!((again.rows_changed(), again.batches()), (5000, 0));
    all_are(&scene, 1).await;

    let restarted = counted(&scene.keeper).restart().run().await.unwrap();
    assert_eq!(restarted.rows_changed_by_this_run(), 5000);
    all_are(&scene, 2).await;
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_filter_leaves_rows_out_and_comments_end_with_their_line() {
    let scene = scene(2, 1000).await;
    let done = scene
        .keeper
        .backfill("t", "id")
        .set("n = t.n + 1 -- one more")
        .set("id = t.id")
        .filter("id % 10 = 3 OR id = 999 -- some")
        .batch_rows(64..=64)
        .run()
        .await
        .unwrap();
    assert_eq!((done.rows_changed(), done.rows_processed()), (101, 1000));
    // Without what may be data, since names are shown in logs.
    let shown = "\"public\".\"t\" (\"id\") SET n = t.n + ? , id = t.id WHERE id % ? = ? OR id = ? ";
    assert!(done.name().starts_with(shown), "{}", done.name());
    let sum = number(
        &scene.observer,
        "SELECT sum(n) FROM t WHERE id % 10 = 3 OR id = 999",
    )
    .await;
    assert_eq!(sum, 101);
    assert_eq!(number(&scene.observer, "SELECT sum(n) FROM t").await, 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_table_is_done_at_once() {
    let scene = scene(2, 0).await;
    let done = counted(&scene.keeper).run().await.unwrap();
    assert!(done.is_done() && done.rows_changed() == 0);
    assert_eq!(checkpoint(&scene).await, (None, 0, true));
}

// What ends a run in the middle.

/// Runs it again and again until it is done; gives how many runs that took.
async fn until_done(mut run: impl AsyncFnMut() -> Result<BackfillProgress, Error>) -> u32 {
    for runs in 1..10_000 {
        match run().await {
            Ok(done) => {
                assert!(done.is_done());
                return runs;
            }
            Err(error) => {
                let expected = [
                    ErrorKind::ConnectionLost,
                    ErrorKind::LockLost,
                    ErrorKind::CommitUnknown,
                    ErrorKind::Pool,
                ];
                assert!(
                    expected.contains(&error.kind()),
                    "{error} {:?}",
                    std::error::Error::source(&error).map(ToString::to_string)
                );
            }
        }
    }
    panic!("never done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_killed_at_any_moment_leave_each_row_changed_once() {
    let scene = scene(3, 3000).await;
    let killer = scene.database.connect().await;
    let stop = Arc::new(AtomicBool::new(false));
    let kills = Arc::new(AtomicU64::new(0));
    let killing = {
        let (stop, kills) = (Arc::clone(&stop), Arc::clone(&kills));
        tokio::spawn(async move {
            let sql = "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity \
                       WHERE datname = current_database() AND application_name LIKE 'test %' ORDER BY random() LIMIT 1) AS one";
            let mut wait = 1;
            while !stop.load(Ordering::Relaxed) {
                let killed = number(&killer, sql).await;
                kills.fetch_add(killed.unsigned_abs(), Ordering::Relaxed);
                // Moments of all kinds.
                wait = (wait * 7 + 3) % 83;
                tokio::time::sleep(Duration::from_millis(wait)).await;
            }
        })
    };
    let runs = until_done(async || {
        // Ends once it has seen some, however fast it is.
        if kills.load(Ordering::Relaxed) >= 25 {
            stop.store(true, Ordering::Relaxed);
        }
        counted(&scene.keeper)
            .batch_rows(20..=20)
            .pause(Duration::from_millis(1))
            .run()
            .await
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    killing.await.unwrap();
    assert!(
        runs > 1,
        "{} kills and one run",
        kills.load(Ordering::Relaxed)
    );
    all_are(&scene, 1).await;
    assert_eq!(checkpoint(&scene).await.1, 3000);
    scene.nothing_left_within(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_poll_it_goes_on_where_it_was() {
    let scene = scene(3, 400).await;
    let mut dropped = 0;
    for polls in 0.. {
        let run = counted(&scene.keeper).batch_rows(10..=10).wait(SOON).run();
        let ended = poll_times_and_drop(run, polls).await;
        // What was dropped is undone or done, never half of it.
        eventually(SOON, "the rows and the checkpoint differ", async || {
            let exists = "SELECT count(*) FROM pg_class WHERE relname = 'lockkeeper_backfill'";
            if number(&scene.observer, exists).await == 0 {
                return number(&scene.observer, "SELECT sum(n) FROM t").await == 0;
            }
            let differ = "SELECT coalesce((SELECT rows_done FROM lockkeeper_backfill), 0) - (SELECT sum(n) FROM t)";
            number(&scene.observer, differ).await == 0
        })
        .await;
        match ended {
            Some(done) => {
                done.unwrap();
                break;
            }
            None => dropped += 1,
        }
    }
    assert!(dropped > 10, "{dropped}");
    all_are(&scene, 1).await;
    scene.nothing_left_within(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_violated_constraint_ends_the_run_and_the_next_goes_on_behind_the_last_batch() {
    let scene = scene(2, 1000).await;
    scene
        .observer
        .batch_execute("ALTER TABLE t ADD CONSTRAINT not_this CHECK (id <> 777 OR n = 0)")
        .await
        .unwrap();
    let run = async || counted(&scene.keeper).batch_rows(50..=50).run().await;
    let error = run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database, "{error}");
    assert_eq!(error.sqlstate().unwrap().code(), "23514");
    assert_eq!(
        checkpoint(&scene).await,
        (Some(vec!["750".to_owned()]), 750, false)
    );
    run().await.unwrap_err();
    assert_eq!(number(&scene.observer, "SELECT sum(n) FROM t").await, 750);
    scene
        .observer
        .batch_execute("ALTER TABLE t DROP CONSTRAINT not_this")
        .await
        .unwrap();
    let done = run().await.unwrap();
    assert_eq!(
        (done.rows_changed(), done.rows_changed_by_this_run()),
        (1000, 250)
    );
    all_are(&scene, 1).await;
    scene.nothing_left().await;
}

/// The lock is gone and another process has gone on: the batch is not applied twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_was_overtaken_changes_nothing_more() {
    let scene = scene(3, 100).await;
    let holder = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t WHERE id = 15 FOR UPDATE")
        .await
        .unwrap();
    let overtaken = {
        let backfill = counted(&scene.keeper)
            .batch_rows(10..=10)
            .lock_timeout(SOON);
        tokio::spawn(backfill.run())
    };
    eventually(SOON, "it does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
    assert_eq!(checkpoint(&scene).await.1, 10);
    // What another process would have written.
    scene
        .observer
        .batch_execute(
            "UPDATE lockkeeper_backfill SET rows_passed = 20, rows_done = 20, last_key = '{20}'",
        )
        .await
        .unwrap();
    holder.batch_execute("COMMIT").await.unwrap();
    let error = overtaken.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockLost, "{error}");
    assert_eq!(number(&scene.observer, "SELECT sum(n) FROM t").await, 10);
    scene.nothing_left().await;
}

/// Overtaken by one that has come as far over other rows, and by one that does something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_not_the_one_it_knows_ends_a_run() {
    let scene = scene(3, 100).await;
    for change in ["last_key = '{12}'", "definition = 'something else'"] {
        let backfill = counted(&scene.keeper).restart().batch_rows(10..=10);
        let mut steps = backfill.wait(SOON).stream();
        steps.next().await.unwrap().unwrap();
        let change = format!("UPDATE lockkeeper_backfill SET {change}");
        scene.observer.batch_execute(&change).await.unwrap();
        let before = number(&scene.observer, "SELECT sum(n) FROM t").await;
        let error = loop {
            // A pause is a step too.
            match steps.next().await.unwrap() {
                Ok(step) => assert!(step.batches() < 2, "{change}"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::LockLost, "{error}");
        let after = number(&scene.observer, "SELECT sum(n) FROM t").await;
        assert_eq!(before, after, "{change}");
    }
}

// One at a time.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_one_runs_and_the_others_find_it_busy_or_wait() {
    let scene = scene(4, 300).await;
    let slow = || counted(&scene.keeper).batch_rows(10..=10);
    let mut stream = slow().stream();
    let first = stream.next().await.unwrap().unwrap();
    assert!(!first.is_done());

    // Also through another keeper: that is another process, as far as the server knows.
    let other = Keeper::new(scene.database.pool(2));
    for keeper in [&scene.keeper, &other] {
        assert!(counted(keeper).try_run().await.unwrap().is_none());
        let late = counted(keeper)
            .wait(Duration::from_millis(100))
            .run()
            .await
            .unwrap_err();
        assert_eq!(late.kind(), ErrorKind::LockTimeout, "{late}");
        assert!(!late.blockers().is_empty(), "{late}");
    }
    // Another one of the same table is not kept out.
    let another = other
        .backfill("t", "id")
        .set("n = n")
        .name("another")
        .try_run();
    assert!(another.await.unwrap().is_some());

    let waiting = tokio::spawn(counted(&other).wait(SOON).run());
    while let Some(progress) = stream.next().await {
        progress.unwrap();
    }
    let waited = waiting.await.unwrap().unwrap();
    assert_eq!((waited.rows_changed(), waited.batches()), (300, 0));
    all_are(&scene, 1).await;
    assert!(stream.next().await.is_none());
    drop(stream);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_dropped_frees_its_lock() {
    let scene = scene(2, 300).await;
    let mut stream = counted(&scene.keeper).batch_rows(10..=10).stream();
    for _ in 0..3 {
        stream.next().await.unwrap().unwrap();
    }
    drop(stream);
    scene.nothing_left().await;
    let done = counted(&scene.keeper).try_run().await.unwrap().unwrap();
    assert_eq!(done.rows_changed_by_this_run(), 270);
    all_are(&scene, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_that_make_the_checkpoints_table_at_once_all_succeed() {
    let scene = scene(8, 50).await;
    let runs: Vec<_> = (0..4)
        .map(|n| {
            let backfill = scene.keeper.backfill("t", "id").set("n = n + 1");
            tokio::spawn(backfill.name(format!("number {n}")).run())
        })
        .collect();
    for run in runs {
        run.await.unwrap().unwrap();
    }
    all_are(&scene, 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_belongs_to_what_it_does() {
    let scene = scene(2, 10).await;
    counted(&scene.keeper).run().await.unwrap();
    let other = counted(&scene.keeper).filter("n > 0");
    let error = other.clone().run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("another name"), "{error}");
    other.restart().run().await.unwrap();
    all_are(&scene, 2).await;
}

// Others go on.

/// Writers that add to random rows while it runs: none waits for long, and nothing of theirs is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_go_on_meanwhile() {
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
async fn it_pauses_while_somebody_waits_for_the_table() {
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
    eventually(SOON, "the change does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;

    // It asks for the estimate, which waits behind the change too: that is tried again.
    let (backfill, told) = telling(counted(&scene.keeper).batch_rows(10..=10));
    let run = tokio::spawn(backfill.run());
    tokio::time::sleep(Duration::from_millis(300)).await;
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
    eventually(SOON, "the change does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
    // What was seen before is good for a moment.
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

/// On a table with hot rows somebody always waits: it steps aside, but not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_steps_aside_for_those_who_wait_for_rows() {
    let scene = scene(3, 500).await;
    let holder = scene.database.connect().await;
    let waiter = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t WHERE id = 499 FOR UPDATE")
        .await
        .unwrap();
    let update = "UPDATE t SET n = n + 100 WHERE id = 499";
    let waiting = tokio::spawn(async move { waiter.batch_execute(update).await });
    eventually(SOON, "it does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
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
async fn a_batch_that_was_in_the_way_is_followed_by_a_smaller_one() {
    let scene = scene(3, 400).await;
    scene
        .observer
        .batch_execute(
            // Until somebody waits for it, however long they need to come.
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN FOR i IN 1..600 LOOP \
                 EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))); \
                 PERFORM pg_sleep(0.05); END LOOP; RETURN NEW; END'; \
             CREATE TRIGGER slow BEFORE UPDATE ON t FOR EACH ROW WHEN (OLD.id = 200) EXECUTE FUNCTION slow()",
        )
        .await
        .unwrap();
    let backfill = counted(&scene.keeper).batch_rows(1..=200).batch_time(SOON);
    let mut stream = backfill.stream();
    let waiter = scene.database.connect().await;
    let observer = scene.database.connect().await;
    let waiting = tokio::spawn(async move {
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
        while number(&observer, sleeps).await == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
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
    assert_eq!(error.kind(), ErrorKind::RetriesExhausted, "{error}");
    assert!(error.attempts() > 1, "{error}");
    // All that could be done was done, in smaller and smaller batches.
    let (_, done, _) = checkpoint(&scene).await;
    assert!((40..=54).contains(&done), "{done}");

    let waiting = tokio::spawn(run().run());
    let tried = async || scene.lock_waiters().await > 0;
    eventually(SOON, "it is not tried again", tried).await;
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
            .lock_timeout(SOON);
        let run = tokio::spawn(backfill.run());
        eventually(SOON, "it does not wait", async || {
            scene.lock_waiters().await == 1
        })
        .await;
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
            .lock_timeout(SOON)
            .run(),
    );
    eventually(SOON, "it does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
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
        .lock_timeout(SOON);
    let run = tokio::spawn(backfill.run());
    eventually(SOON, "it does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_grow_and_shrink_to_their_time() {
    let scene = scene(2, 3000).await;
    // Where rows are fast, more of them.
    let (backfill, told) = telling(counted(&scene.keeper).batch_time(Duration::from_secs(30)));
    backfill.run().await.unwrap();
    let sizes: Vec<u32> = told
        .lock()
        .unwrap()
        .iter()
        .map(BackfillProgress::batch_rows)
        .collect();
    assert_eq!(
        sizes[..3],
        [400, 800, 1600],
        "at most twice as many at a time"
    );

    // 2 ms a row.
    scene
        .observer
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END'; \
             CREATE TRIGGER slow BEFORE UPDATE ON t FOR EACH ROW WHEN (NEW.id < 600) EXECUTE FUNCTION slow()",
        )
        .await
        .unwrap();
    let backfill = counted(&scene.keeper)
        .restart()
        .batch_time(Duration::from_millis(40));
    let (backfill, told) = telling(backfill.batch_rows(1..=2000));
    let done = backfill.run().await.unwrap();
    let told = told.lock().unwrap();
    let slow: Vec<u32> = told
        .iter()
        .filter(|progress| progress.rows_processed() < 500)
        .map(BackfillProgress::batch_rows)
        .collect();
    assert!(slow.iter().skip(2).all(|rows| *rows <= 40), "{slow:?}");
    let fast = told.iter().map(BackfillProgress::batch_rows).max().unwrap();
    assert!(fast > 40, "{fast}: {done}");
}

// Any table, any key.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_every_type() {
    let scene = Scene::new(2).await;
    let name = scene.database.name();
    // Settings that change how values are written.
    scene
        .observer
        .batch_execute(&format!(
            "ALTER DATABASE {name} SET DateStyle = 'SQL, DMY'; ALTER DATABASE {name} SET TimeZone = 'Asia/Kathmandu'; \
             ALTER DATABASE {name} SET IntervalStyle = 'sql_standard'; ALTER DATABASE {name} SET bytea_output = 'escape'; \
             CREATE TYPE mood AS ENUM ('bad', 'ok', 'good', 'ab''c\"d', 'z'); CREATE DOMAIN code AS text CHECK (value <> '')"
        ))
        .await
        .unwrap();
    for (n, (key, values)) in [
        ("smallint", "i - 100"),
        ("int", "i * 1000 - 100000"),
        ("bigint", "(i - 100)::bigint << 40"),
        ("numeric", "(i - 100) / 7.0"),
        ("real", "(i - 100)::real / 7"),
        ("double precision", "(i - 100) / 7.0::float8"),
        ("uuid", "md5(i::text)::uuid"),
        ("text", r#"CASE i % 5 WHEN 0 THEN 'É' WHEN 1 THEN '''\"' WHEN 2 THEN E'\n\\' ELSE 'a' END || i"#),
        ("text COLLATE \"C\"", "CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i"),
        ("varchar(20)", "'ä' || i"),
        ("char(20)", "'ä' || i"),
        ("name", "'x' || i"),
        ("code", "'x' || i"),
        ("date", "'0044-01-01 BC'::date + i * 4000"),
        ("timestamp", "CASE i WHEN 7 THEN '-infinity' ELSE '2024-10-27 01:00:00'::timestamp + i * interval '17 minutes 1 microsecond' END"),
        ("timestamptz", "CASE i WHEN 7 THEN 'infinity' ELSE '2024-10-27 00:00:00+00'::timestamptz + i * interval '17 minutes 1 microsecond' END"),
        ("interval", "i * interval '-3 days 4 hours 5.000001 seconds'"),
        ("bytea", "decode(md5(i::text), 'hex')"),
        ("inet", "'10.0.0.0'::inet + i"),
        ("oid", "4294967295 - i"),
        ("mood", "(ARRAY['bad', 'ok', 'good', 'ab''c\"d', 'z'])[i]::mood"),
        ("bool", "i = 1"),
        ("pg_lsn", "'0/0'::pg_lsn + i"),
        ("int[]", "ARRAY[i % 3, i]"),
    ]
    .into_iter()
    .enumerate()
    {
        let rows = match key {
            "mood" => 5,
            "bool" => 2,
            _ => 200,
        };
        scene
            .observer
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS t; CREATE TABLE t (id {key} PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT {values} FROM generate_series(1, {rows}) AS i"
            ))
            .await
            .unwrap_or_else(|error| panic!("{key}: {error:?}"));
        let size = if rows < 10 { 1 } else { 17 };
        let backfill = scene.keeper.backfill("t", "id").set("n = n + 1").name(format!("{n}"));
        let done = backfill.batch_rows(size..=size).run().await;
        let done = done.unwrap_or_else(|error| panic!("{key}: {error} {:?}", std::error::Error::source(&error).map(|error| format!("{error:?}"))));
        assert_eq!(done.rows_changed(), rows, "{key}");
        let wrong = number(&scene.observer, "SELECT count(*) FROM t WHERE n <> 1").await;
        assert_eq!(wrong, 0, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_several_columns_and_partitions_and_odd_names() {
    let scene = Scene::new(2).await;
    let name = scene.database.name();
    scene
        .observer
        .batch_execute(&format!(
            r#"CREATE SCHEMA "My ""Shop"; CREATE SCHEMA planted;
               CREATE FUNCTION planted.count() RETURNS bigint LANGUAGE sql AS 'SELECT 7::bigint';
               CREATE FUNCTION planted.gt(bigint, bigint) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''planted''; END';
               CREATE OPERATOR planted.> (FUNCTION = planted.gt, LEFTARG = bigint, RIGHTARG = bigint);
               CREATE OPERATOR planted.= (FUNCTION = planted.gt, LEFTARG = bigint, RIGHTARG = bigint);
               CREATE TABLE "My ""Shop"."t; DROP TABLE x" ("The ""Key" bigint PRIMARY KEY, n int NOT NULL DEFAULT 0);
               INSERT INTO "My ""Shop"."t; DROP TABLE x" SELECT i FROM generate_series(1, 100) AS i;
               CREATE TABLE parts (at date, id bigint, "End" text, n int NOT NULL DEFAULT 0, PRIMARY KEY (at, id, "End"))
                   PARTITION BY RANGE (at);
               CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM ('2024-06-01') TO ('2025-01-01') PARTITION BY HASH (id);
               CREATE TABLE parts_2a PARTITION OF parts_2 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
               CREATE TABLE parts_2b PARTITION OF parts_2 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
               CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2024-06-01');
               INSERT INTO parts SELECT '2024-01-01'::date + i % 7 * 30, i % 10, 'x''' || i FROM generate_series(1, 500) AS i;
               ALTER DATABASE {name} SET search_path = planted, public, pg_catalog"#
        ))
        .await
        .unwrap();
    let odd = scene
        .keeper
        .backfill(("My \"Shop", "t; DROP TABLE x"), "The \"Key");
    let done = odd
        .set("n = n OPERATOR(pg_catalog.+) 1")
        .batch_rows(7..=7)
        .name("it's \"odd\" \\")
        .run();
    assert_eq!(done.await.unwrap().rows_changed(), 100);
    let sql = r#"SELECT pg_catalog.count(*) FROM "My ""Shop"."t; DROP TABLE x" WHERE n OPERATOR(pg_catalog.<>) 1"#;
    assert_eq!(number(&scene.observer, sql).await, 0);
    let sql = r#"SELECT pg_catalog.count(*) FROM "My ""Shop".lockkeeper_backfill WHERE done"#;
    assert_eq!(number(&scene.observer, sql).await, 1);

    let parts = scene
        .keeper
        .backfill("parts", ["at", "id", "End"])
        .set("n = parts.n + 1");
    let done = parts.batch_rows(13..=13).run().await.unwrap();
    assert_eq!(done.rows_changed(), 500);
    assert_eq!(
        number(
            &scene.observer,
            "SELECT pg_catalog.count(*) FROM parts WHERE n <> 1"
        )
        .await,
        0
    );
}

/// Two sessions that write values differently go on with each other's checkpoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_is_read_as_it_was_written() {
    let scene = Scene::new(1).await;
    let name = scene.database.name();
    for (key, values, first, second) in [
        (
            "double precision",
            "1 + i * 1e-9::float8",
            "SET extra_float_digits = -9",
            "SET extra_float_digits = 1",
        ),
        (
            "interval",
            "i * interval '-3 days -4 hours'",
            "SET IntervalStyle = sql_standard",
            "SET IntervalStyle = postgres",
        ),
        (
            "date[]",
            "ARRAY['2024-01-01'::date + i]",
            "SET DateStyle = 'SQL, DMY'",
            "SET DateStyle = 'SQL, MDY'",
        ),
        (
            "daterange",
            "daterange('2024-01-01'::date + i, NULL)",
            "SET DateStyle = 'SQL, MDY'",
            "SET DateStyle = 'SQL, DMY'",
        ),
        (
            "tstzrange",
            "tstzrange('2024-10-27 00:00+00'::timestamptz + i * interval '10 minutes', NULL)",
            "SET TimeZone = 'Europe/Berlin'",
            "SET TimeZone = 'Asia/Kathmandu'",
        ),
        (
            "timestamptz",
            "'2024-10-27 00:00+00'::timestamptz + i * interval '10 minutes'",
            "SET TimeZone = 'Europe/Berlin'",
            "SET TimeZone = 'Asia/Kathmandu'",
        ),
    ] {
        scene
            .observer
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS t, lockkeeper_backfill; \
                 CREATE TABLE t (id {key} PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT {values} FROM generate_series(1, 100) AS i"
            ))
            .await
            .unwrap();
        for (setting, batches) in [(first, 3), (second, usize::MAX)] {
            let set = format!("ALTER DATABASE {name} {setting}");
            scene.observer.batch_execute(&set).await.unwrap();
            let keeper = Keeper::new(scene.database.pool(2));
            let backfill = counted(&keeper).batch_rows(7..=7).wait(SOON);
            let mut steps = backfill.stream().take(batches);
            while let Some(step) = steps.next().await {
                step.unwrap_or_else(|error| panic!("{key}: {error}"));
            }
        }
        let wrong = number(&scene.observer, "SELECT count(*) FROM t WHERE n <> 1").await;
        assert_eq!(wrong, 0, "{key}");
        assert!(checkpoint(&scene).await.2, "{key}");
        let reset = format!("ALTER DATABASE {name} RESET ALL");
        scene.observer.batch_execute(&reset).await.unwrap();
    }
}

/// What is behind a key is something else where the keys' order has become another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_ordered_otherwise_is_no_place_to_go_on_from() {
    let scene = Scene::new(2).await;
    let steps = async |n| {
        let backfill = counted(&scene.keeper).batch_rows(7..=7).wait(SOON);
        let steps: Vec<_> = backfill.stream().take(n).collect().await;
        steps.into_iter().collect::<Result<Vec<_>, Error>>()
    };
    for (before, change) in [
        ("int PRIMARY KEY", "ALTER COLUMN id TYPE text"),
        (
            "text COLLATE \"C\" PRIMARY KEY",
            "ALTER COLUMN id TYPE text COLLATE \"POSIX\"",
        ),
        (
            "text PRIMARY KEY",
            "DROP CONSTRAINT t_pkey, ALTER id SET NOT NULL; CREATE UNIQUE INDEX ON t (id text_pattern_ops)",
        ),
    ] {
        scene
            .observer
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS t, lockkeeper_backfill; CREATE TABLE t (id {before}, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT i FROM generate_series(1, 100) AS i"
            ))
            .await
            .unwrap();
        assert_eq!(steps(2).await.unwrap().len(), 2);
        let change = format!("ALTER TABLE t {change}");
        scene.observer.batch_execute(&change).await.unwrap();
        let error = steps(usize::MAX).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{change}: {error}");
        assert!(error.to_string().contains("ordered otherwise"), "{error}");
        assert_eq!(
            number(&scene.observer, "SELECT sum(n) FROM t").await,
            14,
            "{change}"
        );
        let restarted = counted(&scene.keeper).restart().run().await.unwrap();
        assert_eq!(restarted.rows_changed(), 100);
    }
    // Wider, and in the same order.
    scene
        .observer
        .batch_execute(
            "DROP TABLE t, lockkeeper_backfill; CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0); \
             INSERT INTO t SELECT i FROM generate_series(1, 100) AS i",
        )
        .await
        .unwrap();
    steps(2).await.unwrap();
    let change = "ALTER TABLE t ALTER COLUMN id TYPE bigint";
    scene.observer.batch_execute(change).await.unwrap();
    steps(usize::MAX).await.unwrap();
    all_are(&scene, 1).await;
}

/// An extension's type, whose operators are wherever the extension is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_with_operators_of_their_own() {
    let scene = Scene::new(2).await;
    let create = "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; \
                  CREATE TABLE t (id ext.citext PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                  INSERT INTO t SELECT CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i FROM generate_series(1, 100) AS i";
    if let Err(error) = scene.observer.batch_execute(create).await {
        lockkeeper_testkit::Skip::new("citext", format!("{error:?}"))
            .report("keys_with_operators_of_their_own");
        return;
    }
    counted(&scene.keeper)
        .batch_rows(9..=9)
        .run()
        .await
        .unwrap();
    all_are(&scene, 1).await;
    scene
        .observer
        .batch_execute(
            "DROP TABLE t; CREATE TABLE t (id text NOT NULL, n int NOT NULL DEFAULT 0); \
             CREATE UNIQUE INDEX ON t (id text_pattern_ops) INCLUDE (n); \
             INSERT INTO t SELECT CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i FROM generate_series(1, 100) AS i",
        )
        .await
        .unwrap();
    counted(&scene.keeper)
        .restart()
        .batch_rows(9..=9)
        .run()
        .await
        .unwrap();
    all_are(&scene, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_is_refused_before_anything_is_changed() {
    let scene = scene(2, 10).await;
    scene
        .observer
        .batch_execute(
            "ALTER TABLE t ADD COLUMN nullable int UNIQUE, ADD COLUMN twice int NOT NULL DEFAULT 1, \
             ADD COLUMN part int NOT NULL DEFAULT 1, ADD COLUMN gone int; ALTER TABLE t DROP COLUMN gone; \
             CREATE UNIQUE INDEX ON t (part) WHERE id < 0; CREATE UNIQUE INDEX ON t (lower(twice::text)) WHERE id < 0; \
             CREATE UNIQUE INDEX ON t (id, twice); CREATE VIEW v AS SELECT * FROM t; \
             CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child () INHERITS (parent)",
        )
        .await
        .unwrap();
    let keeper = &scene.keeper;
    let t = |key: &'static str| keeper.backfill("t", key).set("n = 1");
    let cases = [
        (t("nullable"), "may be NULL"),
        (t("twice"), "no unique index"),
        (t("part"), "no unique index"),
        (t("gone"), "no column \"gone\""),
        (t("ID"), "no column \"ID\""),
        (t("ctid"), "no column \"ctid\""),
        (
            keeper.backfill("t", ["twice", "id"]).set("n = 1"),
            "in this order",
        ),
        (keeper.backfill("t", ["id", "id"]).set("n = 1"), "twice"),
        (
            keeper.backfill("t", Vec::<String>::new()).set("n = 1"),
            "no columns",
        ),
        (
            keeper.backfill("T", "id").set("n = 1"),
            "there is no table \"T\"",
        ),
        (keeper.backfill("v", "id").set("n = 1"), "is not a table"),
        (keeper.backfill("parent", "id").set("n = 1"), "inherit"),
        (keeper.backfill("", "id").set("n = 1"), "empty name"),
        (keeper.backfill("t", "id"), "sets nothing"),
        (keeper.backfill("t", "id").set(" "), "sets nothing"),
        (t("id").set("n = 2\0"), "NUL"),
        (t("id").filter(""), "filter is empty"),
        (t("id").name(""), "name is empty"),
        (t("id").name("x".repeat(201)), "200"),
        (t("id").batch_rows(0..=5), "batch_rows"),
        (
            t("id").batch_rows(std::ops::RangeInclusive::new(5, 4)),
            "batch_rows",
        ),
        (t("id").batch_time(Duration::ZERO), "batch_time is 0"),
        (t("id").lock_timeout(Duration::ZERO), "lock_timeout is 0"),
        (
            Keeper::new(scene.database.pool(1))
                .backfill("t", "id")
                .set("n = 1"),
            "needs two",
        ),
    ];
    for (backfill, said) in cases {
        let error = backfill.run().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{said}: {error}");
        assert!(error.to_string().contains(said), "{said}: {error}");
    }
    all_are(&scene, 0).await;
    let made = "SELECT count(*) FROM pg_class WHERE relname = 'lockkeeper_backfill'";
    assert_eq!(number(&scene.observer, made).await, 0);
    // What the server refuses is the server's error.
    let error = t("id").filter("no_such = 1").run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database, "{error}");
    scene.nothing_left().await;
}

// Roles and standbys.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_privileges_is_told_what_it_needs() {
    let scene = scene(2, 100).await;
    let role = format!("plain_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; REVOKE CREATE ON SCHEMA public FROM public; GRANT SELECT, UPDATE (n) ON t TO {role}"
        ))
        .await
        .unwrap();
    let pool = scene.database.pool_as(&role, 3);
    let keeper = Keeper::builder(pool).application("test").build();
    let error = counted(&keeper).run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database, "{error}");
    let text = error.to_string();
    let (_, create) = text
        .split_once("who may: ")
        .unwrap_or_else(|| panic!("{text}"));
    let (create, _) = create.rsplit_once(" (SQLSTATE").unwrap();
    scene.observer.batch_execute(create).await.unwrap();
    let grant = format!("GRANT SELECT, INSERT, UPDATE, DELETE ON lockkeeper_backfill TO {role}");
    scene.observer.batch_execute(&grant).await.unwrap();
    let done = counted(&keeper).batch_rows(10..=10).run().await.unwrap();
    assert_eq!(done.rows_changed(), 100);
    all_are(&scene, 1).await;
    counted(&keeper).restart().run().await.unwrap();
    drop(keeper);
    let drop_role = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    scene.observer.batch_execute(&drop_role).await.unwrap();
}

/// Triggers of a table run as those who write to it: one that anybody may have made is none for checkpoints.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoints_table_of_somebody_else_is_not_written_to() {
    let scene = scene(2, 100).await;
    let role = format!("mallory_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}; SET ROLE {role}; \
             CREATE TABLE lockkeeper_backfill (name text PRIMARY KEY, definition text, key_types text[], \
             key_order text[], last_key text[], rows_passed int8 DEFAULT 0, rows_done int8 DEFAULT 0, \
             done bool DEFAULT false, updated_at timestamptz); \
             CREATE TABLE ran_as AS SELECT current_user AS who WHERE false; GRANT ALL ON ran_as TO public; \
             CREATE FUNCTION planted() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO ran_as VALUES (current_user); RETURN NEW; END'; \
             CREATE TRIGGER planted BEFORE INSERT ON lockkeeper_backfill FOR EACH ROW EXECUTE FUNCTION planted(); \
             GRANT ALL ON lockkeeper_backfill TO public; RESET ROLE"
        ))
        .await
        .unwrap();
    let error = counted(&scene.keeper).run().await.unwrap_err();
    let ran = number(&scene.observer, "SELECT count(*) FROM ran_as").await;
    assert_eq!(ran, 0, "{error}");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains(&role), "{error}");
    all_are(&scene, 0).await;

    // It is trusted with the table itself.
    let give =
        format!("DROP TRIGGER planted ON lockkeeper_backfill; ALTER TABLE t OWNER TO {role}");
    scene.observer.batch_execute(&give).await.unwrap();
    counted(&scene.keeper).run().await.unwrap();
    all_are(&scene, 1).await;
    let drop_role = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    scene.observer.batch_execute(&drop_role).await.unwrap();

    let view =
        "CREATE TABLE t (id int PRIMARY KEY, n int); CREATE VIEW lockkeeper_backfill AS SELECT";
    scene.observer.batch_execute(view).await.unwrap();
    let error = counted(&scene.keeper).run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("is not a table"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_pauses_while_a_standby_is_behind() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let client = database.connect().await;
    table(&client, 2000).await;
    let standby = match server.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report("it_pauses_while_a_standby_is_behind"),
    };
    let mut config = standby.config();
    config.dbname("postgres");
    let (follower, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    drop(tokio::spawn(connection));
    let follows = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND replay_lsn IS NOT NULL";
    eventually(SOON, "no standby", async || {
        number(&client, follows).await == 1
    })
    .await;
    follower
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .unwrap();

    let keeper = Keeper::new(database.pool(2));
    let backfill = counted(&keeper)
        .batch_rows(50..=50)
        .max_replication_lag_bytes(30_000);
    let mut stream = backfill.clone().max_replication_lag(None).stream();
    let paused = loop {
        let progress = stream.next().await.unwrap().unwrap();
        assert!(!progress.is_done(), "it never paused: {progress:?}");
        if progress.pause().is_some() {
            break progress;
        }
    };
    assert_eq!(paused.pause(), Some(BackfillPause::ReplicationLag));
    let ReplicationLag::Behind { bytes, .. } = paused.replication_lag() else {
        panic!("{paused:?}");
    };
    assert!(bytes > 30_000, "{bytes}");
    for _ in 0..3 {
        let progress = stream.next().await.unwrap().unwrap();
        assert_eq!(progress.batches(), paused.batches(), "{progress}");
    }
    follower
        .batch_execute("SELECT pg_wal_replay_resume()")
        .await
        .unwrap();
    let mut last = None;
    while let Some(progress) = stream.next().await {
        last = Some(progress.unwrap());
    }
    assert!(last.unwrap().is_done());

    // Who may not see it says so, and goes on.
    follower
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .unwrap();
    client
        .batch_execute(
            "CREATE ROLE plain LOGIN; GRANT SELECT, UPDATE ON t TO plain; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON lockkeeper_backfill TO plain",
        )
        .await
        .unwrap();
    let pool = database.pool_as("plain", 2);
    let done = counted(&Keeper::new(pool))
        .restart()
        .max_replication_lag_bytes(1)
        .run();
    let done = done.await.unwrap();
    assert_eq!(done.replication_lag(), ReplicationLag::Unknown);
    assert_eq!(
        number(&client, "SELECT count(*) FROM t WHERE n <> 2").await,
        0
    );
}
