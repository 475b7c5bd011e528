//! Schema changes: short waits and long pauses, refusals, what is known beforehand, and what others feel of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockkeeper::{
    Change, ChangeFailed, ErrorKind, LockMode, Schema, TableName, TableWork, tokio_postgres,
};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use crate::common::{Scene, eventually, poll_times_and_drop};

/// Far more than anything here takes on a slow machine.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A scene with a side connection.
pub(crate) async fn scene() -> Scene {
    let scene = Scene::new(4).await;
    let keeper = lockkeeper::Keeper::builder(scene.pool.clone())
        .application("test")
        .side_connection(scene.database.config(), NoTls)
        .build();
    Scene { keeper, ..scene }
}

/// A table of so many rows.
pub(crate) async fn table(scene: &Scene, name: &str, rows: u32) {
    let sql = format!(
        "CREATE TABLE {name} (id int, a int, b text); \
         INSERT INTO {name} SELECT n, n % 10, 'row ' || n FROM generate_series(1, {rows}) n"
    );
    scene.observer.batch_execute(&sql).await.unwrap();
}

pub(crate) async fn pid(client: &Client) -> i32 {
    let row = client.query_one("SELECT pg_backend_pid()", &[]).await;
    row.unwrap().get(0)
}

/// One boolean of the observer's.
pub(crate) async fn holds(scene: &Scene, condition: &str) -> bool {
    let row = scene
        .observer
        .query_one(&format!("SELECT {condition}"), &[])
        .await;
    row.unwrap().get(0)
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn short(change: Change) -> Change {
    change.lock_timeout(millis(20)).deadline(LONG)
}

#[tokio::test]
async fn a_statement_and_a_batch() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    let schema = scene.keeper.schema();
    let report = schema
        .change("ALTER TABLE t ADD COLUMN c int")
        .await
        .unwrap();
    assert_eq!(report.attempts().len(), 1);
    assert!(report.attempts()[0].succeeded() && report.attempts()[0].blockers().is_empty());
    assert!(report.elapsed() >= report.attempts()[0].elapsed());
    schema
        .change("ALTER TABLE t DROP COLUMN c; CREATE TABLE u (v text DEFAULT ';'); -- the end")
        .run()
        .await
        .unwrap();
    assert!(holds(&scene, "to_regclass('u') IS NOT NULL").await);
    // All or nothing, and at once.
    let started = Instant::now();
    let error = schema
        .change("DROP TABLE u; ALTER TABLE nowhere ADD COLUMN c int")
        .deadline(LONG * 4)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database);
    assert_eq!(error.sqlstate().unwrap().code(), "42P01");
    assert!(started.elapsed() < LONG);
    assert!(holds(&scene, "to_regclass('u') IS NOT NULL").await);
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_anything_is_sent() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    let schema = scene.keeper.schema();
    for (change, word) in [
        (schema.change(""), "no statement"),
        (schema.change("BEGIN; DROP TABLE t; COMMIT"), "BEGIN"),
        (schema.change("DROP TABLE t; VACUUM t"), "batch"),
        (schema.change("SET search_path = a; DROP TABLE t"), "LOCAL"),
        (
            schema.change("SET LOCAL lock_timeout = 0; DROP TABLE t"),
            "timeout",
        ),
        (
            schema.change("SET LOCAL \"Lock_Timeout\" = 0; DROP TABLE t"),
            "timeout",
        ),
        (
            schema.change(r"COMMENT ON TABLE t IS 'C:\'; COMMIT; DROP TABLE t"),
            "C:",
        ),
        (
            schema.change("DROP TABLE t").lock_timeout(Duration::ZERO),
            "lock_timeout",
        ),
        (
            schema
                .change("DROP TABLE t")
                .statement_timeout(Duration::ZERO),
            "statement_timeout",
        ),
    ] {
        let error = change.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    // A dry run would commit.
    let smuggled = r"COMMENT ON TABLE t IS 'C:\'; DROP TABLE t; COMMIT";
    let error = schema.dry_run(smuggled).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(holds(&scene, "to_regclass('t') IS NOT NULL").await);
}

/// Readers of the partition itself would wait behind it for as long as somebody is in it.
#[tokio::test]
async fn a_detach_gives_way_to_readers_of_the_partition() {
    let scene = scene().await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE p (id int) PARTITION BY RANGE (id); CREATE TABLE q PARTITION OF p FOR VALUES FROM (0) TO (10)",
        )
        .await
        .unwrap();
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM q").await.unwrap();
    let change = scene
        .keeper
        .schema()
        .change("ALTER TABLE p DETACH PARTITION q CONCURRENTLY")
        .lock_timeout(millis(50))
        .deadline(LONG * 4);
    let changing = tokio::spawn(change.run());
    eventually(LONG, "it is not begun", async || {
        holds(
            &scene,
            "EXISTS (SELECT FROM pg_inherits WHERE inhdetachpending)",
        )
        .await
    })
    .await;
    // The holder stays, so a reader that waits for a wait without bound waits for ever.
    let reader = scene.database.connect().await;
    for _ in 0..5 {
        let read = tokio::time::timeout(LONG, reader.batch_execute("SELECT FROM q"));
        read.await
            .expect("the reader waits for the detach")
            .unwrap();
    }
    assert!(!changing.is_finished());
    holder.batch_execute("COMMIT").await.unwrap();
    changing.await.unwrap().unwrap();
    assert!(holds(&scene, "NOT EXISTS (SELECT FROM pg_inherits)").await);
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn it_gives_way_until_the_table_is_free_and_says_who_was_there() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    let holder = scene.database.connect().await;
    let sql = "SET application_name = 'the reader'; BEGIN; SELECT FROM t";
    holder.batch_execute(sql).await.unwrap();
    let holder_pid = pid(&holder).await;
    let told = Arc::new(Mutex::new(Vec::new()));
    let also = Arc::clone(&told);
    let change = scene
        .keeper
        .schema()
        .change("ALTER TABLE t ADD COLUMN c int")
        .lock_timeout(millis(150))
        .deadline(LONG * 2)
        .on_attempt(move |attempt| also.lock().unwrap().push(attempt.clone()));
    let changing = tokio::spawn(change.run());
    eventually(LONG, "no attempt has failed", async || {
        told.lock().unwrap().iter().any(|one| !one.succeeded())
    })
    .await;
    holder.batch_execute("COMMIT").await.unwrap();
    let report = changing.await.unwrap().unwrap();
    let attempts = report.attempts();
    assert!(attempts.len() >= 2, "{report}");
    let (last, failed) = attempts.split_last().unwrap();
    assert!(last.succeeded() && last.pause().is_none());
    for attempt in failed {
        assert_eq!(attempt.failure(), Some(ErrorKind::LockTimeout));
        assert_eq!(attempt.sqlstate(), Some("55P03"));
        assert!(attempt.elapsed() >= millis(150));
        // At least ten times the timeout.
        assert!(attempt.pause().unwrap() >= millis(1500));
    }
    let seen = failed.iter().flat_map(|one| one.blockers()).next();
    let seen = seen.unwrap_or_else(|| panic!("nobody was seen: {report}"));
    assert_eq!(seen.pid(), Some(holder_pid));
    assert_eq!(seen.application_name(), Some("the reader"));
    assert_eq!(seen.state(), Some("idle in transaction"));
    assert_eq!(seen.lock_mode(), LockMode::AccessShare);
    assert!(
        seen.is_holder() && seen.object().unwrap().contains("public.t"),
        "{seen}"
    );
    assert_eq!(told.lock().unwrap().len(), attempts.len());
    assert!(report.to_string().contains("the reader"), "{report}");
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn at_the_deadline_it_gives_up_without_a_longer_attempt() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    let holder = scene.database.connect().await;
    let sql = "BEGIN; LOCK TABLE t IN ROW EXCLUSIVE MODE";
    holder.batch_execute(sql).await.unwrap();
    let holder_pid = pid(&holder).await;
    let error = scene
        .keeper
        .schema()
        .change("ALTER TABLE t ADD COLUMN c int")
        .lock_timeout(millis(200))
        .deadline(millis(3000))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    assert_eq!(error.sqlstate().unwrap().code(), "55P03");
    assert_eq!(error.blockers()[0].pid(), Some(holder_pid), "{error}");
    assert!(
        error.to_string().contains(&format!("pid {holder_pid}")),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains("RowExclusiveLock on relation public.t"),
        "{error}"
    );
    let failed =
        std::error::Error::source(&error).and_then(|one| one.downcast_ref::<ChangeFailed>());
    let attempts = failed.unwrap().report().attempts();
    assert_eq!(error.attempts() as usize, attempts.len());
    assert!(attempts.iter().all(|one| !one.succeeded()));
    assert!(attempts.last().unwrap().pause().is_none());
    holder.batch_execute("ROLLBACK").await.unwrap();
    scene.nothing_left_within(LONG).await;
    assert!(
        !holds(
            &scene,
            "EXISTS (SELECT FROM pg_attribute WHERE attname = 'c' AND attrelid = 't'::regclass)"
        )
        .await
    );
}

/// Several locks one after another: the waits together are bounded, not only each.
#[tokio::test]
async fn the_waits_of_a_batch_are_bounded_together() {
    let scene = scene().await;
    for name in ["t1", "t2", "t3"] {
        table(&scene, name, 1).await;
    }
    let mut holders = Vec::new();
    for name in ["t1", "t2", "t3"] {
        let holder = scene.database.connect().await;
        holder
            .batch_execute(&format!("BEGIN; SELECT FROM {name}"))
            .await
            .unwrap();
        holders.push(holder);
    }
    let wait = millis(12_000);
    let change = scene
        .keeper
        .schema()
        .change("ALTER TABLE t1 ADD c int; ALTER TABLE t2 ADD c int; ALTER TABLE t3 ADD c int")
        .lock_timeout(wait)
        .deadline(millis(1));
    let changing = tokio::spawn(change.run());
    // Each gives way once it has been waited for more than half of the time.
    for (name, holder) in ["t1", "t2"].iter().zip(&holders) {
        eventually(LONG, "it waits for the next", async || {
            let condition = format!(
                "EXISTS (SELECT FROM pg_locks WHERE relation = '{name}'::regclass AND NOT granted \
                 AND waitstart < clock_timestamp() - interval '6.5 s')"
            );
            changing.is_finished() || holds(&scene, &condition).await
        })
        .await;
        holder.batch_execute("COMMIT").await.unwrap();
    }
    let error = changing.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    // Two such waits are more than one may be; a third is not begun.
    let condition = "EXISTS (SELECT FROM pg_locks WHERE relation = 't3'::regclass AND NOT granted)";
    assert!(!holds(&scene, condition).await);
    let source = std::error::Error::source(&error).unwrap();
    let failed = source.downcast_ref::<ChangeFailed>().unwrap();
    assert_eq!(
        failed.report().attempts()[0].sqlstate(),
        Some("57014"),
        "{error}"
    );
    holders[2].batch_execute("COMMIT").await.unwrap();
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn what_goes_through_a_table_is_refused_with_the_better_way() {
    let scene = scene().await;
    table(&scene, "t", 100).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE empty (LIKE t); CREATE TABLE p (id int PRIMARY KEY); \
             CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
             CREATE FUNCTION same() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1'; \
             CREATE DOMAIN positive AS int CHECK (VALUE > 0); \
             ALTER TABLE t ADD COLUMN v varchar(10), ADD COLUMN n numeric(10, 2); \
             CREATE INDEX i ON t (a)",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    for (sql, better) in [
        ("CREATE INDEX ON t (a)", "create_index"),
        ("CREATE UNIQUE INDEX j ON public.t (a)", "create_index"),
        ("ALTER TABLE t ALTER a TYPE bigint", "new column"),
        ("ALTER TABLE t ALTER v TYPE varchar(5)", "new column"),
        ("ALTER TABLE t ALTER n TYPE numeric(10, 3)", "new column"),
        ("ALTER TABLE t ADD c float DEFAULT random()", "add_column"),
        ("ALTER TABLE t ADD c int DEFAULT mine()", "add_column"),
        ("ALTER TABLE t ADD c serial", "add_column"),
        ("ALTER TABLE t ADD c positive", "base type"),
        (
            "ALTER TABLE t ADD c int GENERATED ALWAYS AS (a + 1) STORED",
            "add_column",
        ),
        ("ALTER TABLE t ADD CHECK (a >= 0)", "add_check"),
        (
            "ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES p",
            "add_foreign_key",
        ),
        ("ALTER TABLE t ADD PRIMARY KEY (id)", "add_primary_key"),
        ("ALTER TABLE t ADD UNIQUE (id)", "create_index"),
        ("ALTER TABLE t ALTER id SET NOT NULL", "set_not_null"),
        ("VACUUM FULL t", "replace_table"),
        ("VACUUM (FULL) t", "replace_table"),
        ("VACUUM FULL", "replace_table"),
        ("CLUSTER t USING i", "replace_table"),
        ("REINDEX TABLE t", "CONCURRENTLY"),
        ("REINDEX INDEX i", "CONCURRENTLY"),
    ] {
        let error = schema.change(sql).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{sql}: {error}");
        assert!(error.to_string().contains(better), "{sql}: {error}");
        assert!(error.to_string().contains(".allow_"), "{sql}: {error}");
    }
    // What is brief, or of an empty table, or allowed.
    for sql in [
        "ALTER TABLE t ADD c1 timestamptz DEFAULT now()",
        "ALTER TABLE t ADD c2 int NOT NULL DEFAULT same()",
        "ALTER TABLE t ALTER v TYPE varchar(20)",
        "ALTER TABLE t ALTER v TYPE text",
        "ALTER TABLE t ALTER n TYPE numeric(12, 2)",
        "ALTER TABLE t ADD CONSTRAINT k CHECK (a IS NOT NULL) NOT VALID",
        "ALTER TABLE t VALIDATE CONSTRAINT k",
        "ALTER TABLE t ALTER a SET NOT NULL",
        "CREATE INDEX ON empty (a)",
        "ALTER TABLE empty ALTER a TYPE bigint",
        "CREATE TABLE fresh (a int); CREATE INDEX ON fresh (a)",
        "VACUUM t",
        "ANALYZE t",
        "TRUNCATE empty",
    ] {
        schema
            .change(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    schema
        .change("CREATE INDEX ON t (a)")
        .allow_scan()
        .await
        .unwrap();
    let error = schema
        .change("CLUSTER t USING i")
        .allow_scan()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    schema
        .change("CLUSTER t USING i")
        .allow_rewrite()
        .await
        .unwrap();
    schema
        .change("VACUUM FULL t")
        .allow_rewrite()
        .await
        .unwrap();
    // Who keeps us from asking for the size does not make it pass.
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let refused = short(schema.change("ALTER TABLE t ALTER a TYPE bigint")).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Config);
    drop(holder);
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn partitions_count_and_odd_names_are_found() {
    let scene = scene().await;
    scene
        .observer
        .batch_execute(
            "CREATE SCHEMA \"Odd Schema\"; \
             CREATE TABLE \"Odd Schema\".\"T.\"\"1\" (a int) PARTITION BY LIST (a); \
             CREATE TABLE \"Odd Schema\".one PARTITION OF \"Odd Schema\".\"T.\"\"1\" FOR VALUES IN (1); \
             INSERT INTO \"Odd Schema\".one VALUES (1)",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let table = "\"Odd Schema\".\"T.\"\"1\"";
    let error = schema
        .change(format!("CREATE INDEX ON {table} (a)"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    let sql = format!("ALTER TABLE {table} ALTER a TYPE text");
    assert_eq!(
        schema.change(&sql).await.unwrap_err().kind(),
        ErrorKind::Config
    );
    let preflight = schema.preflight(sql).await.unwrap();
    let name = TableName::from(("Odd Schema", "T.\"1"));
    let lock = preflight.lock_on(&name).unwrap();
    assert_eq!(
        (lock.mode(), lock.work()),
        (LockMode::AccessExclusive, TableWork::Rewrite)
    );
    assert!(
        preflight.lock_on(("Odd Schema", "one")).is_some(),
        "{preflight}"
    );
}

#[tokio::test]
async fn what_cannot_be_in_a_transaction_is_sent_alone_and_settings_are_put_back() {
    let scene = scene().await;
    table(&scene, "t", 100).await;
    let schema = scene.keeper.schema();
    let settings = async || {
        let mut all = Vec::new();
        for name in ["lock_timeout", "statement_timeout", "application_name"] {
            all.push(scene.show(name).await);
        }
        all
    };
    let before = settings().await;
    schema
        .change("VACUUM t")
        .statement_timeout(LONG)
        .await
        .unwrap();
    schema
        .change("CREATE INDEX CONCURRENTLY i ON t (a)")
        .await
        .unwrap();
    schema.change("REINDEX INDEX CONCURRENTLY i").await.unwrap();
    schema.change("DROP INDEX CONCURRENTLY i").await.unwrap();
    let error = schema
        .change("DROP INDEX CONCURRENTLY i")
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "42704");
    assert_eq!(settings().await, before);
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn dropped_at_any_poll_it_leaves_nothing() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    let schema: Schema = scene.keeper.schema();
    for sql in ["ALTER TABLE t ADD COLUMN c int", "VACUUM (FREEZE) t"] {
        let conflicting = sql.starts_with("ALTER");
        for polls in 0..60 {
            let change = schema.change(sql).lock_timeout(millis(50)).deadline(LONG);
            let done = poll_times_and_drop(change.run(), polls).await;
            eventually(LONG, "somebody waits for the table", async || {
                holds(&scene, "NOT EXISTS (SELECT FROM pg_locks WHERE relation = 't'::regclass AND NOT granted)").await
            })
            .await;
            if done.is_some() || conflicting && polls > 30 {
                break;
            }
        }
    }
    holder.batch_execute("COMMIT").await.unwrap();
    scene.nothing_left_within(LONG).await;
    let condition =
        "NOT EXISTS (SELECT FROM pg_attribute WHERE attname = 'c' AND attrelid = 't'::regclass)";
    assert!(holds(&scene, condition).await);
}

#[tokio::test]
async fn a_killed_or_cancelled_attempt_is_the_end_of_it() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    for (by, kind) in [
        ("pg_terminate_backend", ErrorKind::ConnectionLost),
        ("pg_cancel_backend", ErrorKind::Cancelled),
    ] {
        let holder = scene.database.connect().await;
        holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
        let change = scene
            .keeper
            .schema()
            .change("ALTER TABLE t ADD COLUMN c int")
            .lock_timeout(LONG)
            .deadline(LONG * 4);
        let changing = tokio::spawn(change.run());
        eventually(LONG, "it does not wait", async || {
            let sql = format!(
                "coalesce((SELECT bool_or({by}(pid)) FROM pg_locks WHERE relation = 't'::regclass AND NOT granted), false)"
            );
            holds(&scene, &sql).await
        })
        .await;
        let error = changing.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        holder.batch_execute("COMMIT").await.unwrap();
        scene.nothing_left_within(LONG).await;
    }
}

#[tokio::test]
async fn a_pool_of_one_connection_is_enough() {
    let scene = Scene::new(1).await;
    table(&scene, "t", 10).await;
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    let schema = scene
        .keeper
        .schema()
        .lock_timeout(millis(50))
        .deadline(millis(1));
    let error = schema
        .change("ALTER TABLE t ADD COLUMN c int")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    holder.batch_execute("COMMIT").await.unwrap();
    schema
        .change("ALTER TABLE t ADD COLUMN c int")
        .await
        .unwrap();
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn preflight_says_who_is_in_the_way_and_waits_for_nobody() {
    let scene = scene().await;
    table(&scene, "t", 100).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE child (id int, t int); ALTER TABLE t ADD PRIMARY KEY (id); \
             ALTER TABLE child ADD CONSTRAINT fk FOREIGN KEY (t) REFERENCES t",
        )
        .await
        .unwrap();
    // What a session has counted is told some time later, and then added to what ANALYZE has found.
    eventually(LONG, "its rows are not counted", async || {
        holds(&scene, "pg_stat_get_live_tuples('t'::regclass) = 100").await
    })
    .await;
    scene.observer.batch_execute("ANALYZE t").await.unwrap();
    let holder = scene.database.connect().await;
    let sql =
        "SET application_name = 'everything'; BEGIN; LOCK TABLE t, child IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(sql).await.unwrap();
    let holder_pid = pid(&holder).await;
    let waiter = scene.database.connect().await;
    let waiter_pid = pid(&waiter).await;
    let waiting = tokio::spawn(async move { waiter.batch_execute("SELECT FROM t").await });
    eventually(LONG, "the reader waits", async || {
        holds(
            &scene,
            &format!("EXISTS (SELECT FROM pg_locks WHERE pid = {waiter_pid} AND NOT granted)"),
        )
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
        assert!(who.in_transaction().is_some() && who.is_holder());
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
        assert_eq!(error.kind(), ErrorKind::Config);
    };
    tokio::time::timeout(LONG, asking)
        .await
        .expect("preflight waits for nobody");
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
    let scene = scene().await;
    table(&scene, "t", 100).await;
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
    let schema = scene.keeper.schema().lock_timeout(LONG);
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
            // What is new, and indexes that go with their table, are nobody's to wait for.
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
        holds(
            &scene,
            "to_regclass('new') IS NULL AND to_regclass('parts_1') IS NOT NULL"
        )
        .await
    );
    for sql in [
        "CREATE INDEX CONCURRENTLY ON t (a)",
        "VACUUM t",
        "DROP TABLE t; COMMIT",
    ] {
        let error = schema.dry_run(sql).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
    scene.nothing_left_within(LONG).await;
}

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

/// The longest that others waited for the table is bounded by the timeout, although a long transaction is in the way for
/// many times as long: waits as the server counts them, so that a slow machine makes no difference.
#[tokio::test]
async fn under_load_nobody_waits_longer_than_the_timeout() {
    let scene = scene().await;
    table(&scene, "busy", 100_000).await;
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
        .deadline(LONG * 4);
    let failed = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&failed);
    let change = schema
        .change(
            "DO $$ BEGIN RAISE LOG 'in % under %', current_database(), current_setting('lock_timeout'); END $$; \
             ALTER TABLE busy ADD COLUMN note text; ALTER TABLE busy ALTER b SET DEFAULT 'x'",
        )
        .on_attempt(move |attempt| {
            count.fetch_add(u64::from(!attempt.succeeded()), Ordering::Relaxed);
        });
    eventually(LONG, "the load does not run", async || {
        load.done.load(Ordering::Relaxed) > 100
    })
    .await;
    load.longest();
    let started = Instant::now();
    let changing = tokio::spawn(change.run());
    let mut longest_wait = 0.0_f64;
    // Until somebody was seen to wait, or there is nobody.
    while failed.load(Ordering::Relaxed) < 6
        || longest_wait == 0.0 && failed.load(Ordering::Relaxed) < 30
    {
        let sql = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float8 FROM pg_locks \
                   WHERE relation = 'busy'::regclass AND NOT granted AND mode <> 'AccessExclusiveLock'";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        longest_wait = longest_wait.max(row.get(0));
        tokio::time::sleep(millis(5)).await;
        assert!(started.elapsed() < LONG * 2, "six attempts have not failed");
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
        "nobody ever queued, so this shows nothing"
    );
    assert!(longest_wait < 2.5, "somebody waited {longest_wait} s");
    assert!(longest < held, "the longest statement took {longest:?}");
    scene.nothing_left_within(LONG).await;
}

#[tokio::test]
async fn a_role_without_rights_learns_so_at_once() {
    let scene = scene().await;
    table(&scene, "t", 10).await;
    let role = format!("plain_{}", scene.database.name());
    scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE \"{role}\" LOGIN; GRANT SELECT ON t TO \"{role}\""
        ))
        .await
        .unwrap();
    let pool = scene.database.pool_as(&role, 2);
    let keeper = lockkeeper::Keeper::new(pool.clone());
    let schema = keeper.schema();
    let error = schema
        .change("ALTER TABLE t ADD c int")
        .deadline(LONG)
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "42501", "{error}");
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    // Who is in the way it may see, and what they do it may not.
    let preflight = schema.preflight("ALTER TABLE t ADD c int").await.unwrap();
    let blocker = preflight.blockers().next().unwrap();
    assert_eq!(blocker.pid(), Some(pid(&holder).await));
    assert_eq!(blocker.state(), None);
    drop((keeper, pool, preflight));
    let sql = format!("DROP OWNED BY \"{role}\"");
    scene.observer.batch_execute(&sql).await.unwrap();
    eventually(LONG, "the role cannot be dropped", async || {
        scene
            .observer
            .batch_execute(&format!("DROP ROLE \"{role}\""))
            .await
            .is_ok()
    })
    .await;
}
