//! What is known of a change beforehand.

use lockkeeper::{ErrorKind, LockMode, TableWork};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error, eventually, in_time, pid_of};

#[tokio::test]
async fn preflight_names_the_blockers_and_never_waits() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE child (id int, t int); ALTER TABLE t ADD PRIMARY KEY (id); \
             ALTER TABLE child ADD CONSTRAINT fk FOREIGN KEY (t) REFERENCES t",
        )
        .await
        .unwrap();
    // What a session has counted is told some time later, and then added to what ANALYZE has found.
    eventually("its rows are not counted", async || {
        scene
            .is_true("pg_stat_get_live_tuples('t'::regclass) = 100")
            .await
    })
    .await;
    scene.observer.batch_execute("ANALYZE t").await.unwrap();
    let holder = scene.database.connect().await;
    let sql =
        "SET application_name = 'everything'; BEGIN; LOCK TABLE t, child IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(sql).await.unwrap();
    let holder_pid = pid_of(&holder).await;
    let waiter = scene.database.connect().await;
    let waiter_pid = pid_of(&waiter).await;
    let waiting = tokio::spawn(async move { waiter.batch_execute("SELECT FROM t").await });
    eventually("the reader waits", async || {
        scene
            .is_true(&format!(
                "EXISTS (SELECT FROM pg_locks WHERE pid = {waiter_pid} AND NOT granted)"
            ))
            .await
    })
    .await;
    let schema = scene.keeper.schema();
    // Everything is asked while the table is locked: nothing of it waits.
    let asking = async {
        let preflight = schema
            .preflight("DROP TABLE child; ALTER TABLE t ADD note text")
            .await
            .unwrap();
        for table in ["t", "child"] {
            let lock = preflight.lock_on(table).unwrap();
            assert_eq!(lock.mode(), LockMode::AccessExclusive);
            assert_eq!(lock.work(), TableWork::Brief);
            assert!(
                lock.blockers()
                    .iter()
                    .any(|one| one.pid() == Some(holder_pid)),
                "{preflight}"
            );
            assert!(lock.blocks().starts_with("everything"));
        }
        let lock = preflight.lock_on("public.t").unwrap();
        assert_eq!(lock.rows(), Some(100));
        assert!(
            lock.waiting()
                .iter()
                .any(|one| one.pid() == Some(waiter_pid)),
            "{preflight}"
        );
        let who = &lock.blockers()[0];
        assert_eq!(who.application_name(), Some("everything"));
        assert!(who.transaction_age().is_some() && who.is_holder());
        assert!(!preflight.is_clear() && preflight.unrecognized().is_empty());
        assert!(preflight.to_string().contains("everything"), "{preflight}");

        let typed = schema
            .preflight("ALTER TABLE t ALTER a TYPE bigint")
            .await
            .unwrap();
        assert_eq!(typed.lock_on("t").unwrap().work(), TableWork::Rewrite);
        assert!(typed.lock_on("t").unwrap().advice().is_some());
        let key = schema
            .preflight("ALTER TABLE child DROP CONSTRAINT fk")
            .await
            .unwrap();
        assert_eq!(
            key.lock_on("t").unwrap().mode(),
            LockMode::AccessExclusive,
            "{key}"
        );
        let read = schema
            .preflight(("t", LockMode::AccessShare))
            .await
            .unwrap();
        assert!(read.blockers().any(|one| one.pid() == Some(holder_pid)));
        let build = schema
            .preflight("CREATE INDEX CONCURRENTLY ON t (a)")
            .await
            .unwrap();
        assert_eq!(
            build.lock_on("t").unwrap().mode(),
            LockMode::ShareUpdateExclusive
        );
        assert!(build.lock_on("t").unwrap().advice().is_none());
        let unread = schema.preflight("DO $$ BEGIN END $$").await.unwrap();
        assert_eq!(unread.unrecognized(), ["DO $$ BEGIN END $$"]);
        let nothing = schema
            .preflight("ALTER TABLE nowhere ADD c int")
            .await
            .unwrap();
        assert!(nothing.is_clear() && nothing.locks().is_empty());
        let error = schema
            .preflight(("nowhere", LockMode::Share))
            .await
            .unwrap_err();
        assert_error(&error, ErrorKind::Config, r#"no table "nowhere""#);
    };
    in_time("preflight waits", asking).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    waiting.await.unwrap().unwrap();
    let weak = scene.database.connect().await;
    weak.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    let clear = schema
        .preflight(("t", LockMode::RowExclusive))
        .await
        .unwrap();
    assert!(clear.is_clear(), "{clear}");
    let add = schema
        .preflight("ALTER TABLE t ADD note text")
        .await
        .unwrap();
    assert_eq!(add.blockers().count(), 1, "{add}");
}

/// What is predicted is what is locked.
#[tokio::test]
async fn a_dry_run_takes_what_preflight_says() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int REFERENCES p); INSERT INTO p VALUES (1); \
             CREATE TABLE parts (a int) PARTITION BY LIST (a); \
             CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1); \
             CREATE TABLE parts_d PARTITION OF parts DEFAULT; CREATE TABLE parts_2 (a int); \
             CREATE INDEX i ON t (a)",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema().lock_timeout(GIVE_UP_AFTER);
    for sql in [
        "ALTER TABLE t ADD note text",
        "ALTER TABLE t ADD CONSTRAINT k CHECK (a > -1) NOT VALID",
        "ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES p NOT VALID",
        "ALTER TABLE t SET (fillfactor = 80)",
        "ALTER TABLE t ALTER a SET STATISTICS 50",
        "ALTER TABLE t RENAME b TO bb",
        "ALTER TABLE parts ADD b int",
        "ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES IN (2)",
        "ALTER TABLE parts DETACH PARTITION parts_1",
        "CREATE INDEX ON t (b)",
        "CREATE INDEX ON parts (a)",
        "CREATE INDEX ON ONLY parts (a)",
        "DROP INDEX i",
        "DROP TABLE c",
        "DROP TABLE p CASCADE",
        "DROP TABLE parts_1",
        "DROP TABLE parts",
        "ALTER TABLE c DROP CONSTRAINT c_id_fkey",
        "TRUNCATE t",
        "LOCK TABLE t IN SHARE ROW EXCLUSIVE MODE",
        "CREATE TRIGGER g BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE TABLE new (a int REFERENCES p)",
        "COMMENT ON TABLE t IS 'x'",
        "INSERT INTO c VALUES (1)",
    ] {
        let predicted = schema.preflight(sql).await.unwrap();
        let taken = match schema.dry_run(sql).await {
            Ok(taken) => taken,
            // Only for updates.
            Err(error) if sql.contains("TRIGGER") => panic!("{sql}: {error}"),
            Err(error) => panic!("{sql}: {error} {:?}", std::error::Error::source(&error)),
        };
        for (relation, mode) in taken.locks() {
            // There is no wait for what is new, nor for indexes that go with their table.
            let name = relation.name();
            let goes_along = name == "i" || name.ends_with("idx") || name.ends_with("pkey");
            if goes_along || name == "new" {
                continue;
            }
            let lock = predicted.lock_on(relation);
            let lock = lock.unwrap_or_else(|| {
                panic!("{sql}: {relation} is locked in {mode}, and is not in\n{predicted}")
            });
            assert!(
                lock.mode() >= *mode,
                "{sql}: {relation} {mode}\n{predicted}"
            );
        }
        for lock in predicted.locks() {
            if lock.relation().name().ends_with("pkey") || lock.relation().name() == "i" {
                continue;
            }
            let mode = taken.mode_on(lock.relation());
            assert_eq!(
                mode,
                Some(lock.mode()),
                "{sql}: {}\n{taken}",
                lock.relation()
            );
        }
    }
    // Nothing of it has stayed.
    assert!(
        scene
            .is_true("to_regclass('new') IS NULL AND to_regclass('parts_1') IS NOT NULL")
            .await
    );
    for sql in [
        "CREATE INDEX CONCURRENTLY ON t (a)",
        "VACUUM t",
        "DROP TABLE t; COMMIT",
    ] {
        let error = schema.dry_run(sql).await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "cannot run in a transaction");
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}
