//! Runs that end in the middle, and are continued.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use lockkeeper::{BackfillProgress, Error, ErrorKind};
use lockkeeper_testkit::{GIVE_UP_AFTER, assert_error, eventually, poll_times_and_drop};

use super::{all_are, checkpoint, counted, number, scene};

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
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_poll_it_continues_where_it_was() {
    let scene = scene(3, 400).await;
    let mut dropped = 0;
    for polls in 0.. {
        let run = counted(&scene.keeper)
            .batch_rows(10..=10)
            .wait(GIVE_UP_AFTER)
            .run();
        let ended = poll_times_and_drop(run, polls).await;
        // What was dropped is undone or done, never half of it.
        eventually("the rows and the checkpoint differ", async || {
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
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_violated_constraint_ends_the_run_and_the_next_continues_behind_the_last_batch() {
    let scene = scene(2, 1000).await;
    scene
        .observer
        .batch_execute("ALTER TABLE t ADD CONSTRAINT not_this CHECK (id <> 777 OR n = 0)")
        .await
        .unwrap();
    let run = async || counted(&scene.keeper).batch_rows(50..=50).run().await;
    let error = run().await.unwrap_err();
    assert_error(&error, ErrorKind::Database, "SQLSTATE 23514");
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
            .lock_timeout(GIVE_UP_AFTER);
        tokio::spawn(backfill.run())
    };
    eventually("it does not wait", async || scene.lock_waiters().await == 1).await;
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
    assert_error(&error, ErrorKind::LockLost, "this batch was rolled back");
    assert_eq!(number(&scene.observer, "SELECT sum(n) FROM t").await, 10);
    scene.nothing_left().await;
}

/// Overtaken by one that has come as far over other rows, and by one that does something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_not_the_one_it_knows_ends_a_run() {
    let scene = scene(3, 100).await;
    for change in ["last_key = '{12}'", "definition = 'something else'"] {
        let backfill = counted(&scene.keeper).restart().batch_rows(10..=10);
        let mut steps = backfill.wait(GIVE_UP_AFTER).stream();
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
        assert_error(&error, ErrorKind::LockLost, "this batch was rolled back");
        let after = number(&scene.observer, "SELECT sum(n) FROM t").await;
        assert_eq!(before, after, "{change}");
    }
}
