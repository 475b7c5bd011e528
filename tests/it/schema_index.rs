//! Index builds: failures cleaned up and repeated, others' builds left alone.

use std::sync::{Arc, Mutex};

use lockkeeper::{ErrorKind, IndexColumn, ProcedureReport};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, pid_of, poll_times_and_drop,
};
use tokio_postgres::Client;

/// The indexes of a table, and whether they are valid.
async fn indexes(scene: &Scene, table: &str) -> Vec<(String, bool)> {
    let sql = format!(
        "SELECT c.relname::text, x.indisvalid FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid \
         WHERE x.indrelid = '{table}'::regclass ORDER BY 1"
    );
    let rows = scene.observer.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn valid(names: &[&str]) -> Vec<(String, bool)> {
    names
        .iter()
        .map(|name| ((*name).to_owned(), true))
        .collect()
}

/// The backend that builds an index of the table and waits for another session, once there is one.
async fn builder(scene: &Scene, table: &str) -> i32 {
    let sql = format!(
        "SELECT pid FROM pg_stat_progress_create_index WHERE relid = '{table}'::regclass \
         AND phase LIKE 'waiting for%'"
    );
    let mut found = None;
    eventually("no build is running", async || {
        let rows = scene.observer.query(&sql, &[]).await.unwrap();
        found = rows.first().map(|row| row.get(0));
        found.is_some()
    })
    .await;
    found.unwrap()
}

/// A transaction that every concurrent build of the table has to wait for.
async fn blocker_of(scene: &Scene, table: &str) -> Client {
    let client = scene.database.connect().await;
    let sql = format!("BEGIN; UPDATE {table} SET a = a WHERE id = 1");
    client.batch_execute(&sql).await.unwrap();
    client
}

/// A table `t` in which an id is there twice.
async fn scene_with_a_duplicate() -> Scene {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    let twice = "INSERT INTO t VALUES (1, 1, 'twice')";
    scene.observer.batch_execute(twice).await.unwrap();
    scene
}

/// The same with the INVALID index `wanted` that a build has left.
async fn scene_with_a_failed_build() -> Scene {
    let scene = scene_with_a_duplicate().await;
    let left = "CREATE UNIQUE INDEX CONCURRENTLY wanted ON t (id)";
    scene.observer.batch_execute(left).await.unwrap_err();
    scene
}

fn sent(report: &ProcedureReport, word: &str) -> usize {
    report
        .steps()
        .iter()
        .filter(|(sql, _)| sql.contains(word))
        .count()
}

#[tokio::test]
async fn an_index_of_each_form() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute(
            "CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.\"Odd \"\"T\" (\"A b\" int)",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let report = schema.create_index("t", ["a", "b"]).await.unwrap();
    assert_eq!(sent(&report, "CREATE INDEX CONCURRENTLY"), 1, "{report}");
    schema
        .create_index("t", ["id"])
        .unique()
        .name("Odd \"name")
        .await
        .unwrap();
    schema
        .create_index(
            "public.t",
            [IndexColumn::expression("lower(b) -- a comment")],
        )
        .predicate("a > 0 -- another")
        .include(["id"])
        .await
        .unwrap();
    schema
        .create_index(
            "t",
            [
                IndexColumn::column("b").with("text_pattern_ops DESC"),
                "a".into(),
            ],
        )
        .name("ordered")
        .await
        .unwrap();
    schema
        .create_index("t", ["a"])
        .method("hash")
        .name("hashed")
        .await
        .unwrap();
    let all = valid(&["Odd \"name", "hashed", "ordered", "t_a_b_idx", "t_expr_idx"]);
    let mut found = indexes(&scene, "t").await;
    found.sort();
    assert_eq!(found, all);
    schema
        .create_index(("elsewhere", "Odd \"T"), ["A b"])
        .await
        .unwrap();
    assert!(
        scene
            .is_true("to_regclass('elsewhere.\"Odd \"\"T_A b_idx\"') IS NOT NULL")
            .await
    );
    // Once more: nothing is left to do, not even of those.
    assert!(
        schema
            .create_index("t", ["a", "b"])
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    assert!(
        schema
            .create_index("t", ["a"])
            .method("hash")
            .name("hashed")
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    let again = schema
        .create_index("t", [IndexColumn::expression("lower(b)")])
        .predicate("a > 0")
        .include(["id"]);
    assert!(again.await.unwrap().steps().is_empty());
    // Another one under the name is no answer.
    for other in [
        schema.create_index("t", ["b"]).name("hashed"),
        schema.create_index("t", ["a"]).name("hashed"),
        schema.create_index("t", ["a", "b"]).unique(),
        schema.create_index("t", ["a"]).name("t_a_b_idx"),
    ] {
        let error = other.await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "differs from the one wanted");
    }
    for (wrong, text) in [
        (
            schema.create_index("nowhere", ["a"]),
            r#"no table "nowhere""#,
        ),
        (
            schema.create_index("t", Vec::<String>::new()),
            "at least one column",
        ),
        (schema.create_index("t", [""]), "empty name"),
        (
            schema.create_index("t", ["a"]).name("x".repeat(64)),
            "64 bytes; at most 63",
        ),
    ] {
        assert_error(&wrong.await.unwrap_err(), ErrorKind::Config, text);
    }
    let error = schema.create_index("t", ["nothing"]).await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "42703");
    // A name that something else has.
    let error = schema
        .create_index("t", ["id"])
        .name("t")
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "42P07");
    schema.drop_index("ordered").await.unwrap();
    schema.drop_index("Odd \"name").await.unwrap();
    schema
        .drop_index(("elsewhere", "Odd \"T_A b_idx"))
        .await
        .unwrap();
    assert!(
        schema
            .drop_index("ordered")
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    assert_eq!(
        indexes(&scene, "t").await,
        valid(&["hashed", "t_a_b_idx", "t_expr_idx"])
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn what_failed_builds_have_left_is_dropped_first() {
    let scene = scene_with_a_failed_build().await;
    // A REINDEX that fails leaves one more.
    scene
        .observer
        .batch_execute("CREATE INDEX other ON t (a)")
        .await
        .unwrap();
    scene
        .observer
        .batch_execute("REINDEX INDEX CONCURRENTLY wanted")
        .await
        .unwrap_err();
    let before = indexes(&scene, "t").await;
    let expected = [
        ("other".to_owned(), true),
        ("wanted".to_owned(), false),
        ("wanted_ccnew".to_owned(), false),
    ];
    assert_eq!(before, expected);
    scene
        .observer
        .batch_execute("DELETE FROM t WHERE b = 'twice'")
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let report = schema
        .create_index("t", ["id"])
        .unique()
        .name("wanted")
        .await
        .unwrap();
    assert_eq!(sent(&report, "DROP INDEX CONCURRENTLY"), 2, "{report}");
    assert_eq!(indexes(&scene, "t").await, valid(&["other", "wanted"]));
    // Of one that is valid, too.
    scene
        .observer
        .batch_execute("DROP INDEX wanted; CREATE INDEX wanted ON t (a)")
        .await
        .unwrap();
    let left = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'wanted_ccnew'::regclass";
    scene
        .observer
        .batch_execute(&format!("CREATE INDEX wanted_ccnew ON t (a); {left}"))
        .await
        .unwrap();
    let report = schema
        .create_index("t", ["a"])
        .name("wanted")
        .await
        .unwrap();
    assert_eq!(report.steps().len(), 1, "{report}");
    assert_eq!(indexes(&scene, "t").await, valid(&["other", "wanted"]));
}

/// DROP INDEX resolves the name again once it has waited, and another session may have built a valid index under it.
#[tokio::test]
async fn a_valid_index_that_took_the_name_meanwhile_is_not_dropped() {
    let scene = scene_with_a_failed_build().await;
    let other = scene.database.connect().await;
    // To others it is there still, and not valid.
    other
        .batch_execute("BEGIN; DROP INDEX wanted")
        .await
        .unwrap();
    let build = scene
        .keeper
        .schema()
        .create_index("t", ["a"])
        .name("wanted");
    let building = tokio::spawn(build.run());
    eventually("it does not wait", async || {
        let waits = "EXISTS (SELECT FROM pg_locks WHERE relation IN ('t'::regclass, 'wanted'::regclass) AND NOT granted)";
        scene.is_true(waits).await
    })
    .await;
    other
        .batch_execute("CREATE INDEX wanted ON t (a); COMMENT ON INDEX wanted IS 'theirs'; COMMIT")
        .await
        .unwrap();
    let report = building.await.unwrap().unwrap();
    assert_eq!(sent(&report, "DROP INDEX"), 0, "{report}");
    assert!(
        scene
            .is_true("(SELECT obj_description('wanted'::regclass) = 'theirs')")
            .await
    );
    assert_eq!(indexes(&scene, "t").await, valid(&["wanted"]));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// Killed between its being named aside and its being dropped, it is found again.
#[tokio::test]
async fn what_was_named_aside_is_dropped_by_the_next_run() {
    let scene = scene_with_a_failed_build().await;
    let build = || {
        scene
            .keeper
            .schema()
            .create_index("t", ["a"])
            .name("wanted")
    };
    let in_the_way = scene.database.connect().await;
    in_the_way
        .batch_execute("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE")
        .await
        .unwrap();
    let building = tokio::spawn(build().run());
    eventually("it is not named aside", async || {
        scene.is_true("to_regclass('wanted') IS NULL").await
    })
    .await;
    building.abort();
    in_the_way.batch_execute("COMMIT").await.unwrap();
    build().await.unwrap();
    assert_eq!(indexes(&scene, "t").await, valid(&["wanted"]));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// Expressions, predicates and orders are compared too, although only the server can read them.
#[tokio::test]
async fn another_index_of_the_name_is_refused() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let schema = scene.keeper.schema();
    let lower = |sql| schema.create_index("t", [IndexColumn::expression(sql)]);
    let part = |sql: &str| schema.create_index("t", ["a"]).name("part").predicate(sql);
    let desc = |sql| {
        let column = IndexColumn::column("a").with(sql);
        schema.create_index("t", [column]).name("sorted")
    };
    let more = |column: &str| {
        schema
            .create_index("t", ["a"])
            .name("more")
            .include([column])
    };
    for first in [lower("lower(b)"), part("a > 1"), desc("DESC"), more("b")] {
        assert_eq!(first.await.unwrap().steps().len(), 1);
    }
    for same in [
        lower("lower( b )"),
        part("a > 1 -- more"),
        desc("desc"),
        more("b"),
    ] {
        assert!(same.await.unwrap().steps().is_empty());
    }
    for other in [lower("upper(b)"), part("a > 2"), desc("ASC"), more("id")] {
        let error = other.await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "differs from the one wanted");
    }
    assert_eq!(
        indexes(&scene, "t").await,
        valid(&["more", "part", "sorted", "t_expr_idx"])
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_unique_violation_is_cleaned_up_and_reported_not_repeated() {
    let scene = scene_with_a_duplicate().await;
    let schema = scene.keeper.schema();
    let error = schema.create_index("t", ["id"]).unique().await.unwrap_err();
    assert_error(&error, ErrorKind::Database, "SQLSTATE 23505");
    assert_eq!(error.sqlstate().unwrap().code(), "23505");
    assert_eq!(indexes(&scene, "t").await, valid(&[]));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_killed_or_cancelled_build_is_cleaned_up_and_repeated() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 1000).await;
    for by in ["pg_cancel_backend", "pg_terminate_backend"] {
        let in_the_way = blocker_of(&scene, "t").await;
        let schema = scene.keeper.schema();
        let building = tokio::spawn(schema.create_index("t", ["a"]).run());
        let pid = builder(&scene, "t").await;
        // Half-way: what it leaves is not valid.
        assert_eq!(indexes(&scene, "t").await, [("t_a_idx".to_owned(), false)]);
        assert!(scene.is_true(&format!("{by}({pid})")).await);
        let mut next = pid;
        in_the_way.batch_execute("COMMIT").await.unwrap();
        eventually("it is not built", async || {
            next = pid;
            building.is_finished()
        })
        .await;
        let report = building.await.unwrap().unwrap();
        assert_eq!(
            sent(&report, "DROP INDEX CONCURRENTLY"),
            1,
            "{by}: {report}"
        );
        assert_eq!(indexes(&scene, "t").await, valid(&["t_a_idx"]));
        schema.drop_index("t_a_idx").await.unwrap();
        scene.nothing_left_within(GIVE_UP_AFTER).await;
    }
}

#[tokio::test]
async fn another_sessions_build_is_left_alone_and_waited_for() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 1000).await;
    let blocking = blocker_of(&scene, "t").await;
    let other = scene.session().await;
    let others = other.start("CREATE INDEX CONCURRENTLY t_a_idx ON t (a)");
    assert_eq!(builder(&scene, "t").await, other.pid);
    let schema = scene.keeper.schema();
    // Neither the same nor another one is begun, and the half-built one is not taken for a left-over.
    let refused = schema
        .create_index("t", ["a"])
        .deadline(GIVE_UP_AFTER)
        .no_wait()
        .await
        .unwrap_err();
    assert_error_in(
        &refused,
        &refused,
        ErrorKind::LockTimeout,
        r#"builds an index of "public"."t""#,
    );
    assert_eq!(refused.blockers()[0].pid(), Some(other.pid), "{refused}");
    let waiting = schema
        .create_index("t", ["b"])
        .deadline(std::time::Duration::from_millis(300));
    let error = waiting.await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        r#"builds an index of "public"."t""#,
    );
    assert_eq!(indexes(&scene, "t").await, [("t_a_idx".to_owned(), false)]);
    assert!(!others.is_finished());
    let same = tokio::spawn(schema.create_index("t", ["a"]).run());
    let dropping = tokio::spawn(schema.drop_index("t_a_idx").run());
    // They wait without a snapshot and without a lock, so that the other build cannot wait for them: whenever it is seen.
    for _ in 0..20 {
        let condition =
            "EXISTS (SELECT FROM pg_locks WHERE relation = 't'::regclass AND NOT granted)";
        assert!(!scene.is_true(condition).await);
        assert!(!same.is_finished() && !dropping.is_finished() && !others.is_finished());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    blocking.batch_execute("COMMIT").await.unwrap();
    others
        .await
        .unwrap()
        .expect("the other build was not disturbed");
    dropping.await.unwrap().unwrap();
    same.await.unwrap().unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// Who may not see another role's progress sees its lock.
#[tokio::test]
async fn a_build_of_another_role_is_seen_too() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    let role = format!("owner_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE \"{role}\" LOGIN; ALTER TABLE t OWNER TO \"{role}\"; GRANT CREATE ON SCHEMA public TO \"{role}\""
        ))
        .await
        .unwrap();
    let pool = scene.database.pool_as(&role, 3);
    let keeper = lockkeeper::Keeper::new(pool.clone());
    let blocking = blocker_of(&scene, "t").await;
    let other = scene.session().await;
    let others = other.start("CREATE INDEX CONCURRENTLY t_a_idx ON t (a)");
    assert_eq!(builder(&scene, "t").await, other.pid);
    let error = keeper
        .schema()
        .create_index("t", ["a"])
        .no_wait()
        .await
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        "holds ShareUpdateExclusiveLock on relation public.t",
    );
    blocking.batch_execute("COMMIT").await.unwrap();
    others.await.unwrap().unwrap();
    keeper.schema().create_index("t", ["b"]).await.unwrap();
    assert_eq!(indexes(&scene, "t").await, valid(&["t_a_idx", "t_b_idx"]));
    drop((keeper, pool));
    scene.observer.batch_execute("DROP TABLE t").await.unwrap();
    scene
        .observer
        .batch_execute(&format!("DROP OWNED BY \"{role}\""))
        .await
        .unwrap();
    eventually("the role cannot be dropped", async || {
        scene
            .observer
            .batch_execute(&format!("DROP ROLE \"{role}\""))
            .await
            .is_ok()
    })
    .await;
}

/// Of many that want the same index at once, all find it in the end.
#[tokio::test]
async fn many_at_once() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 1000).await;
    let mut tasks = Vec::new();
    for _ in 0..3 {
        let create = scene.keeper.schema().create_index("t", ["a"]);
        tasks.push(tokio::spawn(create.run()));
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(indexes(&scene, "t").await, valid(&["t_a_idx"]));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn progress_is_told_and_a_dropped_build_is_cancelled() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 1000).await;
    let blocking = blocker_of(&scene, "t").await;
    let blocking_pid = pid_of(&blocking).await;
    let told = Arc::new(Mutex::new(Vec::new()));
    let also = Arc::clone(&told);
    let create = scene
        .keeper
        .schema()
        .create_index("t", ["a"])
        .on_progress(move |progress| also.lock().unwrap().push(progress.clone()));
    let building = tokio::spawn(create.run());
    let pid = builder(&scene, "t").await;
    eventually("no progress is told", async || {
        !told.lock().unwrap().is_empty()
    })
    .await;
    let first = told.lock().unwrap()[0].clone();
    assert_eq!(first.pid(), pid);
    eventually("it waits for no session", async || {
        (told.lock().unwrap().iter()).any(|one| one.waits_for() == Some(blocking_pid))
    })
    .await;
    assert!(first.to_string().starts_with(first.phase()));
    building.abort();
    eventually("the build still runs", async || {
        scene.is_true("NOT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database())",
        )
        .await
    })
    .await;
    blocking.batch_execute("COMMIT").await.unwrap();
    scene
        .keeper
        .schema()
        .create_index("t", ["a"])
        .await
        .unwrap();
    assert_eq!(indexes(&scene, "t").await, valid(&["t_a_idx"]));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn dropped_at_any_poll_it_can_be_begun_again() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    let schema = scene.keeper.schema();
    for polls in 0..200 {
        let done = poll_times_and_drop(schema.create_index("t", ["a"]).run(), polls).await;
        eventually("the build still runs", async || {
            let condition = "NOT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database()) \
                             AND NOT EXISTS (SELECT FROM pg_locks WHERE relation = 't'::regclass)";
            scene.is_true(condition).await
        })
        .await;
        if done.is_some() {
            break;
        }
    }
    schema.create_index("t", ["a"]).await.unwrap();
    assert_eq!(indexes(&scene, "t").await, valid(&["t_a_idx"]));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_partitioned_table_gets_one_for_each_partition() {
    let scene = Scene::with_side_connection(4).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE p (id int, a int) PARTITION BY RANGE (id); \
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); \
             CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20) PARTITION BY LIST (a); \
             CREATE TABLE p21 PARTITION OF p2 FOR VALUES IN (1); CREATE TABLE p22 PARTITION OF p2 DEFAULT; \
             INSERT INTO p SELECT n, n FROM generate_series(0, 19) n",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    // Half-way at first.
    scene
        .observer
        .batch_execute("CREATE INDEX p_a_idx ON ONLY p (a)")
        .await
        .unwrap();
    schema.create_index("p", ["a"]).await.unwrap();
    for table in ["p", "p1", "p2", "p21", "p22"] {
        assert_eq!(
            indexes(&scene, table).await,
            valid(&[&format!("{table}_a_idx")]),
            "{table}"
        );
    }
    assert!(scene.is_true("(SELECT count(*) = 4 FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid AND c.relkind IN ('i', 'I'))").await);
    assert!(
        schema
            .create_index("p", ["a"])
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    schema.drop_index("p_a_idx").await.unwrap();
    for table in ["p", "p1", "p21"] {
        assert_eq!(indexes(&scene, table).await, [], "{table}");
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}
