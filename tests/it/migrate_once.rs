//! One process of many migrates, and the others see that it is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::{Error, ErrorKind, Keeper, Schema};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, poll_times_and_drop, pool_of,
};

/// As another process would have it: a pool and a keeper of its own.
fn process(scene: &Scene) -> Schema {
    Keeper::new(scene.database.pool(3)).schema()
}

#[tokio::test]
async fn of_many_one_runs_it_while_the_others_wait_beside_its_index_build() {
    let scene = Scene::new(2).await;
    scene.table("t", 20_000).await;
    let ran = Arc::new(AtomicU32::new(0));
    let mut tasks = Vec::new();
    for _ in 0..6 {
        let (schema, ran) = (process(&scene), Arc::clone(&ran));
        tasks.push(tokio::spawn(async move {
            schema
                .migrate_once("add index", async |migration| {
                    ran.fetch_add(1, Ordering::Relaxed);
                    // Any waiter with a snapshot would deadlock with these.
                    for _ in 0..3 {
                        migration.schema().create_index("t", ["a"]).await?;
                        migration.schema().drop_index("t_a_idx").await?;
                    }
                    let report = migration.schema().create_index("t", ["a"]).await?;
                    Ok::<_, Error>(report.steps().len())
                })
                .await
        }));
    }
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap().unwrap());
    }
    assert_eq!(ran.load(Ordering::Relaxed), 1);
    assert_eq!(
        outcomes.iter().flatten().collect::<Vec<_>>(),
        [&1],
        "{outcomes:?}"
    );
    assert!(
        scene
            .is_true("(SELECT indisvalid FROM pg_index WHERE indexrelid = 't_a_idx'::regclass)")
            .await
    );
    let row = scene
        .observer
        .query_one(
            "SELECT key, done_by, done_at <= now() FROM public.lockkeeper_migration",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "add index");
    assert!(row.get::<_, &str>(1).contains("migrate_once.rs"), "{row:?}");
    assert!(row.get::<_, bool>(2));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// Between the check whether it is done and the lock it can become done.
#[tokio::test]
async fn however_short_it_is_it_runs_once() {
    let scene = Scene::new(2).await;
    let processes: Vec<_> = (0..6).map(|_| process(&scene)).collect();
    for round in 0..40 {
        let ran = Arc::new(AtomicU32::new(0));
        let mut tasks = Vec::new();
        for schema in &processes {
            let (schema, ran) = (schema.clone(), Arc::clone(&ran));
            tasks.push(tokio::spawn(async move {
                let count = async |_: &mut lockkeeper::Migration| {
                    ran.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, Error>(())
                };
                schema.migrate_once(format!("round {round}"), count).await
            }));
        }
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(ran.load(Ordering::Relaxed), 1, "round {round}");
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn what_fails_is_not_done_and_the_next_one_runs_it() {
    let scene = Scene::new(3).await;
    let schema = scene.keeper.schema();
    let failed: Result<Option<()>, Error> = schema
        .migrate_once("k'e\\y", async |migration| {
            migration
                .schema()
                .change("CREATE TABLE half (a int)")
                .await?;
            migration
                .schema()
                .change("CREATE TABLE half (a int)")
                .await?;
            Ok(())
        })
        .await;
    assert_eq!(failed.unwrap_err().sqlstate().unwrap().code(), "42P07");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
    for expected in [Some(7), None, None] {
        let ran = schema
            .migrate_once("k'e\\y", async |_| Ok::<_, Error>(7))
            .await;
        assert_eq!(ran.unwrap(), expected);
    }
    // Another key is another migration.
    assert_eq!(
        schema
            .migrate_once("key", async |_| Ok::<_, Error>(8))
            .await
            .unwrap(),
        Some(8)
    );
    assert!(
        scene
            .is_true("(SELECT count(*) = 2 FROM lockkeeper_migration)")
            .await
    );
    let error = schema
        .migrate_once("\0", async |_| Ok::<_, Error>(()))
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Config, "NUL");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_dropped_or_killed_one_is_taken_over() {
    let scene = Scene::new(3).await;
    let schema = scene.keeper.schema();
    for polls in [1, 3, 5, 8, 12, 16, 20] {
        let once = schema.migrate_once("k", async |_| {
            // Pending at each poll.
            while !GIVE_UP_AFTER.is_zero() {
                tokio::task::yield_now().await;
            }
            Ok::<_, Error>(())
        });
        assert!(poll_times_and_drop(once, polls).await.is_none());
    }
    // A backend that is killed meanwhile: not noted as done, which is reported.
    let observer = scene.database.connect().await;
    let lost = schema
        .migrate_once("k", async |migration| {
            let pid = migration.guard().backend_pid().unwrap();
            let sql = format!("SELECT pg_terminate_backend({pid})");
            observer.batch_execute(&sql).await?;
            migration.guard().loss().await;
            Ok::<_, Error>(())
        })
        .await;
    assert_error(
        &lost.unwrap_err(),
        ErrorKind::LockLost,
        r#""lockkeeper migration"/"k": the migration has run"#,
    );
    assert_eq!(
        schema
            .migrate_once("k", async |_| Ok::<_, Error>(1))
            .await
            .unwrap(),
        Some(1)
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// A process that has lost the lock stops, since another one has it by now.
#[tokio::test]
async fn it_is_stopped_once_the_lock_is_lost() {
    let scene = Scene::new(3).await;
    let schema = scene.keeper.schema();
    let (started, stopped) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (pid, end) = (Arc::clone(&started), Arc::clone(&stopped));
    let first = tokio::spawn(async move {
        let stay = async |migration: &mut lockkeeper::Migration| {
            let _end = scopeguard::guard((), |()| end.store(1, Ordering::Relaxed));
            let backend = migration.guard().backend_pid().unwrap();
            pid.store(u32::try_from(backend).unwrap(), Ordering::Relaxed);
            std::future::pending::<Result<(), Error>>().await
        };
        schema.migrate_once("k", stay).await
    });
    eventually("it does not run", async || {
        started.load(Ordering::Relaxed) > 0
    })
    .await;
    let sql = format!(
        "SELECT pg_terminate_backend({})",
        started.load(Ordering::Relaxed)
    );
    scene.observer.batch_execute(&sql).await.unwrap();
    let error = tokio::time::timeout(GIVE_UP_AFTER, first)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockLost,
        r#""lockkeeper migration"/"k": the migration was stopped"#,
    );
    assert_eq!(stopped.load(Ordering::Relaxed), 1);
    let next = process(&scene)
        .migrate_once("k", async |_| Ok::<_, Error>(2))
        .await;
    assert_eq!(next.unwrap(), Some(2));
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// A transaction that is left open would take with it the note, and what the note is about.
#[tokio::test]
async fn a_transaction_left_open_is_not_done() {
    let scene = Scene::new(3).await;
    let schema = scene.keeper.schema();
    for sql in ["BEGIN; CREATE TABLE made (a int)", "BEGIN; SAVEPOINT s"] {
        let outcome = schema
            .migrate_once("k", async |migration| {
                migration.guard().batch_execute(sql).await?;
                Ok::<_, Error>(1)
            })
            .await;
        let error = outcome.unwrap_err();
        assert_error_in(
            sql,
            &error,
            ErrorKind::Config,
            r#""lockkeeper migration"/"k": the migration has run"#,
        );
        scene.nothing_left_within(GIVE_UP_AFTER).await;
    }
    // What is done stays so, although the lock is gone before it is released.
    scene
        .observer
        .batch_execute(
            "CREATE FUNCTION unlock() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_advisory_unlock_all(); RETURN NULL; END $$; \
             CREATE TRIGGER unlock AFTER INSERT ON lockkeeper_migration EXECUTE FUNCTION unlock()",
        )
        .await
        .unwrap();
    for expected in [Some(2), None] {
        let ran = schema.migrate_once("k", async |_| Ok::<_, Error>(2)).await;
        assert_eq!(ran.unwrap(), expected);
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn who_waits_too_long_says_so() {
    let scene = Scene::new(3).await;
    let (schema, other) = (scene.keeper.schema(), process(&scene));
    let outcome = schema
        .migrate_once("slow", async |_| {
            let other = other.clone().deadline(Duration::from_millis(200));
            let waited = other
                .migrate_once("slow", async |_| Ok::<_, Error>(()))
                .await;
            Ok::<_, Error>(waited.unwrap_err())
        })
        .await;
    let error = outcome.unwrap().unwrap();
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        r#""lockkeeper migration"/"slow""#,
    );
    assert_eq!(
        error.key().unwrap().to_string(),
        lockkeeper::LockKey::from(("lockkeeper migration", "slow")).to_string()
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// The table is created by one of them, wherever it is wanted, and later ones need no right to.
#[tokio::test]
async fn the_table_is_created_once_in_any_schema() {
    let scene = Scene::new(3).await;
    scene
        .observer
        .batch_execute("CREATE SCHEMA \"Book \"\"keeping\"")
        .await
        .unwrap();
    let mut tasks = Vec::new();
    for n in 0..8 {
        let schema = process(&scene).bookkeeping("Book \"keeping");
        tasks.push(tokio::spawn(async move {
            schema
                .migrate_once(format!("migration {n}"), async |_| Ok::<_, Error>(()))
                .await
        }));
    }
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap(), Some(()));
    }
    assert!(
        scene
            .is_true("(SELECT count(*) = 8 FROM \"Book \"\"keeping\".lockkeeper_migration)")
            .await
    );
    let role = format!("reader_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE \"{role}\" LOGIN; GRANT USAGE ON SCHEMA \"Book \"\"keeping\" TO \"{role}\"; \
             GRANT SELECT, INSERT ON \"Book \"\"keeping\".lockkeeper_migration TO \"{role}\""
        ))
        .await
        .unwrap();
    let pool = scene.database.pool_as(&role, 2);
    let schema = Keeper::new(pool.clone())
        .schema()
        .bookkeeping("Book \"keeping");
    for (key, expected) in [("migration 1", None), ("one of its own", Some(()))] {
        let ran = schema.migrate_once(key, async |_| Ok::<_, Error>(())).await;
        assert_eq!(ran.unwrap(), expected);
    }
    let error = schema
        .bookkeeping("nowhere")
        .migrate_once("k", async |_| Ok::<_, Error>(()))
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "3F000", "{error}");
    pool.close();
    drop(pool);
    eventually("the role cannot be dropped", async || {
        let sql = format!("DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\"");
        scene.observer.batch_execute(&sql).await.is_ok()
    })
    .await;
}

/// The key is not sent as it is: a server of another encoding refuses characters that it does not have (22P05).
#[tokio::test]
async fn a_key_of_any_characters_is_noted_in_a_database_of_another_encoding() {
    let scene = Scene::new(1).await;
    let name = format!("{}_latin1", scene.database.name());
    let create = format!(
        "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    );
    scene.observer.batch_execute(&create).await.unwrap();
    let mut config = scene.database.config();
    config.dbname(&name);
    let keeper = Keeper::builder(pool_of(config, 3))
        .application("日本")
        .build();
    let schema = keeper.schema();
    for key in ["größe", "日本 🔒", r"\u{e9}", "é", "e"] {
        for expected in [Some(key), None] {
            let ran = schema
                .migrate_once(key, async |_| Ok::<_, Error>(key))
                .await;
            assert_eq!(ran.unwrap(), expected, "{key}");
        }
    }
    drop((schema, keeper));
    let drop_it = format!("DROP DATABASE {name} WITH (FORCE)");
    scene.observer.batch_execute(&drop_it).await.unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}
