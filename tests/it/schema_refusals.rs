//! What schema changes refuse, lift or explain, besides what they lock.

use std::time::Duration;

use lockkeeper::{ErrorKind, Keeper};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error_in, eventually};

#[tokio::test]
async fn an_invalid_index_is_not_a_success() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    scene.run("INSERT INTO t VALUES (1, 1, 'twice')").await;
    let failed = scene
        .observer
        .batch_execute("CREATE UNIQUE INDEX CONCURRENTLY i ON t (id)")
        .await;
    failed.unwrap_err();
    let schema = scene.keeper.schema();
    for sql in [
        "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS i ON t (id)",
        "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS \"i\" ON public.t (id)",
    ] {
        let error = schema.change(sql).await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::Config, "exists and is INVALID");
    }
    scene
        .run("DELETE FROM t WHERE b = 'twice'; DROP INDEX i; CREATE INDEX i ON t (id)")
        .await;
    schema
        .change("CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON t (id)")
        .await
        .unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn files_for_psql_are_explained() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    for (sql, words) in [
        ("\u{feff}ALTER TABLE t ADD c int", "byte-order mark"),
        ("COPY t FROM STDIN;\n1\t2\tx\n\\.\n", "FROM STDIN"),
    ] {
        let error = scene.keeper.schema().change(sql).await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::Config, words);
    }
    assert_eq!(scene.count("t").await, 10);
}

/// The role's limit is not meant for what takes long and blocks no other session.
#[tokio::test]
async fn the_roles_statement_timeout_does_not_end_a_validation() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 20).await;
    scene
        .run(
            "CREATE FUNCTION slow(int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS \
             'BEGIN PERFORM pg_sleep(0.03); RETURN true; END'",
        )
        .await;
    let name = scene.database.name();
    scene.set("statement_timeout", "300ms").await;
    let keeper = Keeper::builder(scene.database.pool(3))
        .application("test")
        .build();
    let schema = keeper.schema();
    schema.add_check("t", "slowly", "slow(id)").await.unwrap();
    assert!(
        scene
            .is_true("(SELECT convalidated FROM pg_constraint WHERE conname = 'slowly')")
            .await
    );
    schema
        .replace_table("t", "t_new")
        .build(
            "CREATE TABLE t_new (LIKE t INCLUDING CONSTRAINTS); INSERT INTO t_new SELECT * FROM t",
        )
        .await
        .unwrap();
    // A limit that the caller has set holds.
    let add = schema.add_check("t", "again", "slow(id)");
    let error = add
        .statement_timeout(Duration::from_millis(100))
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "57014", "{error} {name}");
}

#[tokio::test]
async fn columns_that_would_rewrite_the_table_are_refused_with_a_way_that_works() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let schema = scene.keeper.schema();
    for (ty, words) in [
        ("serial", "nextval('s')"),
        ("bigint GENERATED ALWAYS AS IDENTITY", "ADD GENERATED"),
        ("int GENERATED ALWAYS AS (a + 1) STORED", "trigger"),
    ] {
        let error = schema.add_column("t", "c", ty).await.unwrap_err();
        assert_error_in(ty, &error, ErrorKind::Config, words);
        assert!(!error.to_string().contains("allow_rewrite"), "{error}");
    }
    // The way to a serial, and from there to an identity column.
    schema.change("CREATE SEQUENCE s").await.unwrap();
    schema
        .add_column("t", "c", "integer")
        .default("nextval('s')")
        .await
        .unwrap();
    scene.run("ALTER TABLE t ADD PRIMARY KEY (id)").await;
    let fill = scene
        .keeper
        .backfill("t", "id")
        .set("c = DEFAULT")
        .filter("c IS NULL");
    assert_eq!(fill.run().await.unwrap().rows_changed(), 10);
    schema.set_not_null("t", "c").await.unwrap();
    schema
        .change("ALTER SEQUENCE s OWNED BY t.c")
        .await
        .unwrap();
    schema
        .change("ALTER TABLE t ALTER COLUMN c DROP DEFAULT, ALTER COLUMN c ADD GENERATED ALWAYS AS IDENTITY (START WITH 11)")
        .await
        .unwrap();
    scene.run("INSERT INTO t (id) VALUES (11)").await;
    assert!(
        scene
            .is_true("(SELECT count(DISTINCT c) = 11 AND max(c) = 11 FROM t)")
            .await
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// The build waits for the tool's snapshot, and the tool for the lock under which the build runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migrator_that_waits_for_our_lock_is_reported_so() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let guard = scene
        .keeper
        .advisory_lock("migrations")
        .session()
        .acquire()
        .await
        .unwrap();
    let tool = scene.database.connect().await;
    let key = lockkeeper::LockKey::from("migrations").as_i64().unwrap();
    let waiting = tokio::spawn(async move {
        tool.batch_execute(&format!("SELECT pg_advisory_lock({key})"))
            .await
    });
    eventually("the tool does not wait", async || {
        scene.lock_waiters().await == 1
    })
    .await;
    let build = scene.keeper.schema().create_index("t", ["a"]);
    let error = build.deadline(Duration::from_secs(2)).await.unwrap_err();
    assert_error_in(
        "build",
        &error,
        ErrorKind::LockTimeout,
        "and itself waits for our lock on",
    );
    let waits = error.blockers()[0].waits_for_us().unwrap();
    assert!(waits.contains("migrations"), "{waits}");
    guard.release().await.unwrap();
    waiting.await.unwrap().unwrap();
    scene
        .keeper
        .schema()
        .create_index("t", ["a"])
        .await
        .unwrap();
}
