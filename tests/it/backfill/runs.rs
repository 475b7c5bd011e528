//! Runs that come to their end, and runs at the same time.

use std::time::Duration;

use futures::StreamExt as _;
use lockkeeper::{BackfillProgress, ErrorKind, Keeper, ReplicationLag};
use lockkeeper_testkit::{GIVE_UP_AFTER, assert_error, assert_error_in};

use super::{all_are, checkpoint, counted, number, scene, telling};

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
        assert_error_in(
            &late,
            &late,
            ErrorKind::LockTimeout,
            r#""lockkeeper_backfill"/"public.count" after"#,
        );
        assert!(!late.blockers().is_empty(), "{late}");
    }
    // Another one of the same table is not kept out.
    let another = other
        .backfill("t", "id")
        .set("n = n")
        .name("another")
        .try_run();
    assert!(another.await.unwrap().is_some());

    let waiting = tokio::spawn(counted(&other).wait(GIVE_UP_AFTER).run());
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
    assert_error(
        &error,
        ErrorKind::Config,
        r#"the backfill "count" in public.lockkeeper_backfill"#,
    );
    assert!(error.to_string().contains("another name"), "{error}");
    other.restart().run().await.unwrap();
    all_are(&scene, 2).await;
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
