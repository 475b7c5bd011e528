//! What a checkpoint belongs to, and when a backfill is done.

use futures::StreamExt as _;
use lockkeeper::{Backfill, Error, ErrorKind, Keeper};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error_in};

use super::{all_are, checkpoint, counted, number, scene};

/// A backfill whose filter tells which rows are left.
fn filling(keeper: &Keeper) -> Backfill {
    keeper
        .backfill("t", "id")
        .set("b = id")
        .filter("b IS NULL")
        .name("count")
}

async fn with_b(scene: &Scene, rows: u32) {
    let sql = format!(
        "DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, b int); \
         INSERT INTO t SELECT i FROM generate_series(1, {rows}) AS i; ANALYZE t"
    );
    scene.observer.batch_execute(&sql).await.unwrap();
}

async fn empty_rows(scene: &Scene) -> i64 {
    number(&scene.observer, "SELECT count(*) FROM t WHERE b IS NULL").await
}

async fn steps(backfill: Backfill, n: usize) -> Result<(), Error> {
    let steps: Vec<_> = backfill.stream().take(n).collect().await;
    steps.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_another_table_or_column_is_not_continued() {
    let scene = scene(3, 0).await;
    let change = async |sql: &str| scene.observer.batch_execute(sql).await.unwrap();
    let unfiltered = || counted(&scene.keeper).batch_rows(10..=10);
    for (what, sql, words) in [
        (
            "a column",
            "ALTER TABLE t DROP COLUMN n; ALTER TABLE t ADD COLUMN n int NOT NULL DEFAULT 0",
            "a column of the definition was dropped",
        ),
        (
            "a table",
            "DROP TABLE t; CREATE TABLE t (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0); \
             INSERT INTO t SELECT i FROM generate_series(1, 20) AS i",
            "another table had the name",
        ),
        (
            "its rows",
            "TRUNCATE t; INSERT INTO t SELECT i FROM generate_series(1, 50) AS i",
            "truncated or rewritten",
        ),
    ] {
        for interrupted in [false, true] {
            change("DROP TABLE IF EXISTS lockkeeper_backfill").await;
            change(
                "DROP TABLE t; CREATE TABLE t (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT i FROM generate_series(1, 50) AS i",
            )
            .await;
            let n = if interrupted { 3 } else { usize::MAX };
            steps(unfiltered(), n).await.unwrap();
            scene.nothing_left_within(GIVE_UP_AFTER).await;
            change(sql).await;
            let error = unfiltered().run().await.unwrap_err();
            assert_error_in(what, &error, ErrorKind::Config, words);
            assert!(error.to_string().contains("restart()"), "{error}");
            all_are(&scene, 0).await;
            let trusted = unfiltered().trust_checkpoint().run().await.unwrap();
            assert!(trusted.is_done(), "{what}: {trusted}");
            unfiltered().restart().run().await.unwrap();
            let wrong = "SELECT count(*) FROM t WHERE n = 0";
            assert_eq!(number(&scene.observer, wrong).await, 0, "{what}");
        }
    }
    // Where the filter tells what is left, it starts over.
    for sql in [
        "ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN b int",
        "TRUNCATE t; INSERT INTO t SELECT i FROM generate_series(1, 50) AS i",
    ] {
        change("DROP TABLE lockkeeper_backfill").await;
        with_b(&scene, 50).await;
        filling(&scene.keeper).run().await.unwrap();
        change(sql).await;
        assert_eq!(empty_rows(&scene).await, 50);
        let done = filling(&scene.keeper).run().await.unwrap();
        assert_eq!(
            (done.rows_changed(), empty_rows(&scene).await),
            (50, 0),
            "{sql}"
        );
    }
    with_b(&scene, 20).await;
    let done = filling(&scene.keeper).run().await.unwrap();
    assert_eq!((done.rows_processed(), empty_rows(&scene).await), (20, 0));
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_was_rewritten_is_the_same() {
    let scene = scene(3, 100).await;
    for (n, sql) in (1..).zip([
        "VACUUM FULL t",
        "CLUSTER t USING t_pkey",
        "ALTER TABLE t ADD COLUMN at timestamptz DEFAULT clock_timestamp()",
    ]) {
        let backfill = || counted(&scene.keeper).batch_rows(10..=10).name("count");
        scene
            .observer
            .batch_execute("DROP TABLE IF EXISTS lockkeeper_backfill")
            .await
            .unwrap();
        let mut stream = backfill().stream();
        for _ in 0..3 {
            stream.next().await.unwrap().unwrap();
        }
        // During a run, and between two.
        scene.observer.batch_execute(sql).await.unwrap();
        for _ in 0..3 {
            stream.next().await.unwrap().unwrap();
        }
        drop(stream);
        scene.nothing_left_within(GIVE_UP_AFTER).await;
        scene.observer.batch_execute("VACUUM FULL t").await.unwrap();
        backfill().run().await.unwrap();
        all_are(&scene, n).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_replaced_during_a_run_ends_it() {
    let scene = scene(3, 100).await;
    let backfill = counted(&scene.keeper).batch_rows(10..=10);
    let mut stream = backfill.stream();
    stream.next().await.unwrap().unwrap();
    scene
        .observer
        .batch_execute("ALTER TABLE t RENAME TO before; CREATE TABLE t (LIKE before INCLUDING ALL); INSERT INTO t SELECT id FROM before")
        .await
        .unwrap();
    let error = stream.next().await.unwrap().unwrap_err();
    assert_error_in(
        "replaced",
        &error,
        ErrorKind::Config,
        "another table had the name",
    );
    all_are(&scene, 0).await;
    assert_eq!(checkpoint(&scene).await.1, 10);
    drop(stream);
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_hidden_by_policies_are_not_left_out_without_a_word() {
    let scene = scene(3, 0).await;
    with_b(&scene, 50).await;
    let role = format!("owner_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT CREATE, USAGE ON SCHEMA public TO {role}; ALTER TABLE t OWNER TO {role}; \
             ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY; \
             CREATE POLICY few ON t USING (id <= 10)"
        ))
        .await
        .unwrap();
    let keeper = Keeper::new(scene.database.pool_as(&role, 3));
    let error = filling(&keeper).run().await.unwrap_err();
    assert_error_in(
        "policies",
        &error,
        ErrorKind::Config,
        "row-level security of \"public\".\"t\"",
    );
    let tables = "SELECT count(*) FROM pg_class WHERE relname = 'lockkeeper_backfill'";
    assert_eq!(number(&scene.observer, tables).await, 0);
    assert_eq!(empty_rows(&scene).await, 50);
    let visible = filling(&keeper).visible_rows().run().await.unwrap();
    assert_eq!((visible.rows_changed(), empty_rows(&scene).await), (10, 40));
    // Another role sees other rows.
    let all = filling(&scene.keeper).run().await.unwrap();
    assert_eq!((all.rows_changed(), empty_rows(&scene).await), (40, 0));
    drop(keeper);
    let drop_role = format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}");
    scene.observer.batch_execute(&drop_role).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_ends_at_the_last_row_that_existed_when_it_began() {
    let scene = scene(3, 20).await;
    for (follows, expected) in [(false, 20), (true, 30)] {
        scene
            .observer
            .batch_execute("TRUNCATE t; INSERT INTO t SELECT i FROM generate_series(1, 20) AS i; DROP TABLE IF EXISTS lockkeeper_backfill")
            .await
            .unwrap();
        let backfill = counted(&scene.keeper).batch_rows(10..=10);
        let backfill = if follows {
            backfill.follow_inserts()
        } else {
            backfill
        };
        let mut stream = backfill.stream();
        stream.next().await.unwrap().unwrap();
        scene
            .observer
            .batch_execute("INSERT INTO t SELECT i FROM generate_series(21, 30) AS i")
            .await
            .unwrap();
        let mut last = None;
        while let Some(progress) = stream.next().await {
            last = Some(progress.unwrap());
        }
        let last = last.unwrap();
        assert!(last.is_done(), "{last}");
        assert_eq!(last.rows_processed(), expected);
        let changed = "SELECT count(*) FROM t WHERE n = 1";
        assert_eq!(
            number(&scene.observer, changed).await,
            i64::try_from(expected).unwrap()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn done_means_that_no_row_matches_the_filter() {
    let scene = scene(3, 0).await;
    with_b(&scene, 40).await;
    let backfill = || filling(&scene.keeper).batch_rows(10..=10);
    let mut stream = backfill().stream();
    for _ in 0..2 {
        stream.next().await.unwrap().unwrap();
    }
    // Behind the last batch.
    scene
        .observer
        .batch_execute("UPDATE t SET b = NULL WHERE id IN (3, 5)")
        .await
        .unwrap();
    let mut done = None;
    while let Some(progress) = stream.next().await {
        done = Some(progress.unwrap());
    }
    let done = done.unwrap();
    assert_eq!((done.rows_changed(), done.rows_processed()), (42, 40));
    assert_eq!(empty_rows(&scene).await, 0);
    // A trigger that keeps a row as it is.
    with_b(&scene, 40).await;
    scene
        .observer
        .batch_execute(
            "DROP TABLE lockkeeper_backfill; \
             CREATE FUNCTION keeps() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
             CREATE TRIGGER keeps BEFORE UPDATE ON t FOR EACH ROW WHEN (OLD.id = 7) EXECUTE FUNCTION keeps()",
        )
        .await
        .unwrap();
    let error = backfill().run().await.unwrap_err();
    assert_error_in(
        "a trigger",
        &error,
        ErrorKind::Database,
        "found rows that match its filter still: 1",
    );
    assert!(!checkpoint(&scene).await.2);
    scene
        .observer
        .batch_execute("DROP TRIGGER keeps ON t")
        .await
        .unwrap();
    let done = backfill().run().await.unwrap();
    assert!(done.is_done() && done.rows_changed() == 40, "{done}");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// The checkpoint table of an earlier version gets its new columns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checkpoint_table_of_an_earlier_version_is_used() {
    let scene = scene(3, 20).await;
    steps(counted(&scene.keeper).batch_rows(10..=10), 1)
        .await
        .unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
    scene
        .observer
        .batch_execute(
            "ALTER TABLE lockkeeper_backfill DROP COLUMN identity, DROP COLUMN filter_stays",
        )
        .await
        .unwrap();
    let error = counted(&scene.keeper).run().await.unwrap_err();
    assert_error_in("unknown", &error, ErrorKind::Config, "trust_checkpoint()");
    counted(&scene.keeper)
        .trust_checkpoint()
        .run()
        .await
        .unwrap();
    all_are(&scene, 1).await;
}
