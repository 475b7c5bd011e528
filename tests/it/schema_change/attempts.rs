//! Attempts: how long they wait, and what ends them.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use lockkeeper::{ChangeFailed, ErrorKind, LockMode, Schema};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, pid_of, poll_times_and_drop,
};

use super::millis;

#[tokio::test]
async fn a_statement_and_a_batch() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
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
    assert!(scene.is_true("to_regclass('u') IS NOT NULL").await);
    // All or nothing, and at once.
    let started = Instant::now();
    let error = schema
        .change("DROP TABLE u; ALTER TABLE nowhere ADD COLUMN c int")
        .deadline(GIVE_UP_AFTER * 4)
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Database, "SQLSTATE 42P01");
    assert_eq!(error.sqlstate().unwrap().code(), "42P01");
    assert!(started.elapsed() < GIVE_UP_AFTER);
    assert!(scene.is_true("to_regclass('u') IS NOT NULL").await);
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// Readers of the partition itself would wait behind it for as long as a transaction uses it.
#[tokio::test]
async fn a_detach_gives_way_to_readers_of_the_partition() {
    let scene = Scene::with_side_connection(4).await;
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
        .deadline(GIVE_UP_AFTER * 4);
    let changing = tokio::spawn(change.run());
    eventually("it is not begun", async || {
        scene
            .is_true("EXISTS (SELECT FROM pg_inherits WHERE inhdetachpending)")
            .await
    })
    .await;
    // The holder stays, so a reader that waits for a wait without bound waits for ever.
    let reader = scene.database.connect().await;
    for _ in 0..5 {
        let read = tokio::time::timeout(GIVE_UP_AFTER, reader.batch_execute("SELECT FROM q"));
        read.await
            .expect("the reader waits for the detach")
            .unwrap();
    }
    assert!(!changing.is_finished());
    holder.batch_execute("COMMIT").await.unwrap();
    changing.await.unwrap().unwrap();
    assert!(scene.is_true("NOT EXISTS (SELECT FROM pg_inherits)").await);
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn it_gives_way_until_the_table_is_free_and_says_who_was_there() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let holder = scene.database.connect().await;
    let sql = "SET application_name = 'the reader'; BEGIN; SELECT FROM t";
    holder.batch_execute(sql).await.unwrap();
    let holder_pid = pid_of(&holder).await;
    let told = Arc::new(Mutex::new(Vec::new()));
    let also = Arc::clone(&told);
    let change = scene
        .keeper
        .schema()
        .change("ALTER TABLE t ADD COLUMN c int")
        .lock_timeout(millis(150))
        .deadline(GIVE_UP_AFTER * 2)
        .on_attempt(move |attempt| also.lock().unwrap().push(attempt.clone()));
    let changing = tokio::spawn(change.run());
    eventually("no attempt has failed", async || {
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
    let seen = seen.unwrap_or_else(|| panic!("no blocker was seen: {report}"));
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
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn at_the_deadline_it_gives_up_without_a_longer_attempt() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let holder = scene.database.connect().await;
    let sql = "BEGIN; LOCK TABLE t IN ROW EXCLUSIVE MODE";
    holder.batch_execute(sql).await.unwrap();
    let holder_pid = pid_of(&holder).await;
    let error = scene
        .keeper
        .schema()
        .change("ALTER TABLE t ADD COLUMN c int")
        .lock_timeout(millis(200))
        .deadline(millis(3000))
        .await
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        "the change was given up after",
    );
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
    scene.nothing_left_within(GIVE_UP_AFTER).await;
    assert!(
        !scene
            .is_true(
                "EXISTS (SELECT FROM pg_attribute WHERE attname = 'c' AND attrelid = 't'::regclass)"
            )
            .await
    );
}

/// Several locks one after another: the waits together are bounded, not only each.
#[tokio::test]
async fn the_waits_of_a_batch_are_bounded_together() {
    let scene = Scene::with_side_connection(4).await;
    for name in ["t1", "t2", "t3"] {
        scene.table(name, 1).await;
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
        eventually("it waits for the next", async || {
            let condition = format!(
                "EXISTS (SELECT FROM pg_locks WHERE relation = '{name}'::regclass AND NOT granted \
                 AND waitstart < clock_timestamp() - interval '6.5 s')"
            );
            changing.is_finished() || scene.is_true(&condition).await
        })
        .await;
        holder.batch_execute("COMMIT").await.unwrap();
    }
    let error = changing.await.unwrap().unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        "holds AccessShareLock on relation public.t3",
    );
    // Two such waits are more than one may be; a third is not begun.
    let condition = "EXISTS (SELECT FROM pg_locks WHERE relation = 't3'::regclass AND NOT granted)";
    assert!(!scene.is_true(condition).await);
    let source = std::error::Error::source(&error).unwrap();
    let failed = source.downcast_ref::<ChangeFailed>().unwrap();
    assert_eq!(
        failed.report().attempts()[0].sqlstate(),
        Some("57014"),
        "{error}"
    );
    holders[2].batch_execute("COMMIT").await.unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn what_cannot_be_in_a_transaction_is_sent_alone_and_settings_are_put_back() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
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
        .statement_timeout(GIVE_UP_AFTER)
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
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn dropped_at_any_poll_it_leaves_nothing() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    let schema: Schema = scene.keeper.schema();
    for sql in ["ALTER TABLE t ADD COLUMN c int", "VACUUM (FREEZE) t"] {
        let conflicting = sql.starts_with("ALTER");
        for polls in 0..60 {
            let change = schema
                .change(sql)
                .lock_timeout(millis(50))
                .deadline(GIVE_UP_AFTER);
            let done = poll_times_and_drop(change.run(), polls).await;
            eventually("a session still waits for the table", async || {
                scene.is_true("NOT EXISTS (SELECT FROM pg_locks WHERE relation = 't'::regclass AND NOT granted)").await
            })
            .await;
            if done.is_some() || conflicting && polls > 30 {
                break;
            }
        }
    }
    holder.batch_execute("COMMIT").await.unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
    let condition =
        "NOT EXISTS (SELECT FROM pg_attribute WHERE attname = 'c' AND attrelid = 't'::regclass)";
    assert!(scene.is_true(condition).await);
}

#[tokio::test]
async fn a_killed_or_cancelled_attempt_is_the_end_of_it() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    for (by, kind, text) in [
        (
            "pg_terminate_backend",
            ErrorKind::ConnectionLost,
            "SQLSTATE 57P01",
        ),
        ("pg_cancel_backend", ErrorKind::Cancelled, "SQLSTATE 57014"),
    ] {
        let holder = scene.database.connect().await;
        holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
        let change = scene
            .keeper
            .schema()
            .change("ALTER TABLE t ADD COLUMN c int")
            .lock_timeout(GIVE_UP_AFTER)
            .deadline(GIVE_UP_AFTER * 4);
        let changing = tokio::spawn(change.run());
        eventually("it does not wait", async || {
            let sql = format!(
                "coalesce((SELECT bool_or({by}(pid)) FROM pg_locks WHERE relation = 't'::regclass AND NOT granted), false)"
            );
            scene.is_true(&sql).await
        })
        .await;
        let error = changing.await.unwrap().unwrap_err();
        assert_error_in(by, &error, kind, text);
        holder.batch_execute("COMMIT").await.unwrap();
        scene.nothing_left_within(GIVE_UP_AFTER).await;
    }
}

#[tokio::test]
async fn a_pool_of_one_connection_is_enough() {
    let scene = Scene::new(1).await;
    scene.table("t", 10).await;
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
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        "holds AccessShareLock on relation public.t",
    );
    holder.batch_execute("COMMIT").await.unwrap();
    schema
        .change("ALTER TABLE t ADD COLUMN c int")
        .await
        .unwrap();
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_role_without_rights_learns_so_at_once() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
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
        .deadline(GIVE_UP_AFTER)
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "42501", "{error}");
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    // It may see which session blocks, and not what it does.
    let preflight = schema.preflight("ALTER TABLE t ADD c int").await.unwrap();
    let blocker = preflight.blockers().next().unwrap();
    assert_eq!(blocker.pid(), Some(pid_of(&holder).await));
    assert_eq!(blocker.state(), None);
    drop((keeper, pool, preflight));
    let sql = format!("DROP OWNED BY \"{role}\"");
    scene.observer.batch_execute(&sql).await.unwrap();
    eventually("the role cannot be dropped", async || {
        scene
            .observer
            .batch_execute(&format!("DROP ROLE \"{role}\""))
            .await
            .is_ok()
    })
    .await;
}
