//! Rows locked in the order of their keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use lockkeeper::{Error, ErrorKind, Keeper, RowLock, TransactionOptions, Tx};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, poll_times_and_drop,
};
use tokio_postgres::Client;

/// A table `t (id, n)` with the rows 1 to `rows`, written in the opposite order.
async fn scene(pool_size: usize, rows: u32) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene
        .observer
        .batch_execute(&format!(
            "CREATE TABLE t (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0); \
             INSERT INTO t SELECT {rows} + 1 - i FROM generate_series(1, {rows}) AS i; ANALYZE t"
        ))
        .await
        .unwrap();
    scene
}

/// The rows of `t` that are locked against `FOR NO KEY UPDATE`.
async fn locked(client: &Client) -> Vec<i64> {
    let sql = "SELECT id FROM t WHERE id NOT IN (SELECT id FROM t FOR NO KEY UPDATE SKIP LOCKED) ORDER BY id";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_locked_in_the_order_of_their_keys() {
    // Whatever plan there is.
    for off in [
        "",
        "enable_indexscan, enable_bitmapscan",
        "enable_seqscan, enable_bitmapscan",
        "enable_seqscan, enable_indexscan",
    ] {
        let scene = scene(2, 300).await;
        for setting in off.split(", ").filter(|name| !name.is_empty()) {
            let name = scene.database.name();
            let set = format!("ALTER DATABASE {name} SET {setting} = off");
            scene.observer.batch_execute(&set).await.unwrap();
        }
        let holder = scene.database.connect().await;
        holder
            .batch_execute("BEGIN; SELECT FROM t WHERE id = 150 FOR UPDATE")
            .await
            .unwrap();
        let keeper = scene.keeper.clone();
        let task = tokio::spawn(async move {
            // As they lie in the table, and then some in any order.
            let ids: Vec<i64> = (100..=200).rev().chain([50, 250, 150, 60]).collect();
            keeper
                .transaction(async move |tx| {
                    let locked = tx.lock_rows("t", "id", &ids).await?;
                    Ok::<_, Error>(locked)
                })
                .await
                .unwrap()
        });
        scene.until_lock_waiters(1).await;
        // All before the one it waits for, none behind it.
        let expected: Vec<i64> = [50, 60].into_iter().chain(100..=150).collect();
        assert_eq!(locked(&scene.observer).await, expected, "without {off}");
        holder.batch_execute("COMMIT").await.unwrap();
        let expected: Vec<i64> = [50, 60].into_iter().chain(100..=200).chain([250]).collect();
        assert_eq!(task.await.unwrap(), expected, "without {off}");
        scene.nothing_left().await;
    }
}

/// What the order is good for: the same work, each in another order, never deadlocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_lock_first_never_deadlock() {
    let scene = scene(8, 8).await;
    let runs = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..8)
        .map(|worker: i64| {
            let (keeper, runs) = (scene.keeper.clone(), Arc::clone(&runs));
            tokio::spawn(async move {
                for round in 0..25_i64 {
                    let step = 1 + (worker + round) % 3 * 2;
                    let ids: Vec<i64> = (0..8)
                        .map(|n| (worker + round + n * step) % 8 + 1)
                        .collect();
                    let runs = Arc::clone(&runs);
                    keeper
                        .transaction(async move |tx| {
                            runs.fetch_add(1, Ordering::Relaxed);
                            let locked = tx.lock_rows("t", "id", &ids[..5]).await?;
                            assert_eq!(locked.len(), 5);
                            for id in &ids[..5] {
                                tx.execute("UPDATE t SET n = n + 1 WHERE id = $1", &[id])
                                    .await?;
                            }
                            Ok::<_, Error>(())
                        })
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(runs.load(Ordering::Relaxed), 8 * 25, "none was run again");
    let row = scene
        .observer
        .query_one("SELECT sum(n) FROM t", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 8 * 25 * 5);
}

async fn in_transaction<R: Send>(
    keeper: &Keeper,
    f: impl for<'r> AsyncFnOnce(&'r mut Tx) -> Result<R, Error>
    + for<'r> lockkeeper::AsyncFunc<&'r mut Tx, Result<R, Error>, Fut: Send>
    + Send
    + Clone,
) -> Result<R, Error> {
    let options = TransactionOptions::new().attempts(1);
    keeper.transaction_with(options, f).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_locked_comes_back_once_and_in_order() {
    let scene = scene(2, 5).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE of_int (id int PRIMARY KEY); INSERT INTO of_int VALUES (1), (2), (3); \
             CREATE TABLE of_numeric (id numeric PRIMARY KEY); INSERT INTO of_numeric VALUES (1), (2.5), (3.00); \
             CREATE TABLE of_varchar (id varchar(9) PRIMARY KEY); INSERT INTO of_varchar VALUES ('b'), ('a'), ('c'); \
             CREATE TABLE of_char (id char(9) PRIMARY KEY); INSERT INTO of_char VALUES ('b'), ('a'), ('c'); \
             CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy'); \
             CREATE TABLE of_enum (id mood PRIMARY KEY); INSERT INTO of_enum VALUES ('happy'), ('sad'); \
             CREATE TABLE of_time (id timestamptz PRIMARY KEY); INSERT INTO of_time VALUES ('epoch'); \
             CREATE TABLE several (id bigint, n int); INSERT INTO several VALUES (2, 1), (1, 1), (2, 2), (3, 1)",
        )
        .await
        .unwrap();
    let keeper = &scene.keeper;
    in_transaction(keeper, async |tx| {
        assert_eq!(tx.lock_rows("t", "id", [4_i64, 9, 2, 4, -1]).await?, [2, 4]);
        assert_eq!(tx.lock_rows("t", "id", vec![4_i32, 2]).await?, [2, 4]);
        assert_eq!(
            tx.lock_rows("t", "id", [Some(3_i64), None]).await?,
            [Some(3)]
        );
        assert!(tx.lock_rows::<i64>("t", "id", []).await?.is_empty());
        assert_eq!(tx.lock_rows("of_int", "id", [3_i64, 1]).await?, [1, 3]);
        assert_eq!(tx.lock_rows("of_int", "id", [3_i16, 1]).await?, [1, 3]);
        assert_eq!(tx.lock_rows("of_numeric", "id", [3_i64, 2]).await?, [3]);
        assert_eq!(
            tx.lock_rows("of_varchar", "id", ["c", "x", "a"]).await?,
            ["a", "c"]
        );
        let owned = ["c", "x", "a"].map(str::to_owned);
        assert_eq!(tx.lock_rows("of_varchar", "id", &owned).await?, ["a", "c"]);
        assert_eq!(
            tx.lock_rows("of_char", "id", ["c", "x", "a"]).await?,
            ["a", "c"]
        );
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(tx.lock_rows("of_time", "id", [epoch]).await?, [epoch]);
        assert_eq!(tx.lock_rows("several", "id", [2_i64, 1]).await?, [1, 2]);
        Ok(())
    })
    .await
    .unwrap();
    // All rows of an id.
    let other = scene.database.connect().await;
    in_transaction(keeper, async |tx| {
        tx.lock_rows("several", "id", [2_i64]).await?;
        let sql = "SELECT n FROM several WHERE id = 2 FOR NO KEY UPDATE SKIP LOCKED";
        assert_eq!(other.query(sql, &[]).await.unwrap().len(), 0);
        Ok(())
    })
    .await
    .unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_by_others_is_waited_for_refused_or_skipped() {
    let scene = scene(2, 5).await;
    let holder = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM t WHERE id = 2 FOR NO KEY UPDATE")
        .await
        .unwrap();
    let runs = AtomicU32::new(0);
    let keeper = &scene.keeper;

    let skipped = in_transaction(keeper, async |tx| {
        tx.lock_rows("t", "id", [3_i64, 2, 1]).skip_locked().await
    });
    assert_eq!(skipped.await.unwrap(), [1, 3]);

    let refused = keeper
        .transaction(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.lock_rows("t", "id", [3_i64, 2, 1]).nowait().await
        })
        .await
        .unwrap_err();
    assert_error_in(
        &refused,
        &refused,
        ErrorKind::LockTimeout,
        r#"rows of "t" (SQLSTATE 55P03)"#,
    );
    assert!(!refused.is_retryable(), "{refused}");
    assert!(refused.to_string().contains("rows of \"t\""), "{refused}");
    assert_eq!(
        runs.load(Ordering::Relaxed),
        1,
        "an answer is not asked for again"
    );

    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_millis(20));
    let late = keeper
        .transaction_with(options, async |tx| tx.lock_rows("t", "id", [2_i64]).await)
        .await
        .unwrap_err();
    assert_error_in(
        &late,
        &late,
        ErrorKind::LockTimeout,
        r#"rows of "t" (SQLSTATE 55P03)"#,
    );
    assert!(late.is_retryable(), "{late}");

    // Foreign keys are not blocked, unless asked otherwise.
    let share = in_transaction(keeper, async |tx| {
        tx.lock_rows("t", "id", [2_i64])
            .mode(RowLock::KeyShare)
            .nowait()
            .await
    });
    assert_eq!(share.await.unwrap(), [2]);
    let update = in_transaction(keeper, async |tx| {
        tx.lock_rows("t", "id", [1_i64]).await?;
        let sql = "SELECT FROM t WHERE id = 1 FOR KEY SHARE NOWAIT";
        assert_eq!(holder.query(sql, &[]).await.unwrap().len(), 1);
        Ok(())
    });
    update.await.unwrap();
    holder.batch_execute("ROLLBACK").await.unwrap();
    let update = in_transaction(keeper, async |tx| {
        tx.lock_rows("t", "id", [1_i64])
            .mode(RowLock::Update)
            .await?;
        let sql = "SELECT FROM t WHERE id = 1 FOR KEY SHARE NOWAIT";
        assert!(holder.query(sql, &[]).await.is_err());
        Ok(())
    });
    update.await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_deleted_while_it_is_waited_for_is_left_out() {
    let scene = scene(2, 3).await;
    let holder = scene.database.connect().await;
    holder
        .batch_execute("BEGIN; DELETE FROM t WHERE id = 2")
        .await
        .unwrap();
    let keeper = scene.keeper.clone();
    let task = tokio::spawn(async move {
        let tx = keeper
            .advisory_lock("a guard has it too")
            .acquire()
            .await
            .unwrap();
        tx.lock_rows("t", "id", [3_i64, 2, 1]).await.unwrap()
    });
    scene.until_lock_waiters(1).await;
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(task.await.unwrap(), [1, 3]);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_name_any_schema_and_partitions() {
    let scene = Scene::new(2).await;
    scene
        .observer
        .batch_execute(
            r#"CREATE SCHEMA "My ""Shop"; CREATE TABLE "My ""Shop"."t; DROP TABLE x" ("The ""Key" int PRIMARY KEY);
               INSERT INTO "My ""Shop"."t; DROP TABLE x" VALUES (1), (2);
               CREATE TABLE parts (id int PRIMARY KEY, key int, place int) PARTITION BY RANGE (id);
               CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
               CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
               INSERT INTO parts SELECT i FROM generate_series(0, 19) AS i"#,
        )
        .await
        .unwrap();
    in_transaction(&scene.keeper, async |tx| {
        let odd = tx.lock_rows(("My \"Shop", "t; DROP TABLE x"), "The \"Key", [2, 1]);
        assert_eq!(odd.await?, [1, 2]);
        assert_eq!(
            tx.lock_rows("parts", "id", [15, 3, 12, 5]).await?,
            [3, 5, 12, 15]
        );
        Ok(())
    })
    .await
    .unwrap();
    // Columns that are called as what surrounds them.
    in_transaction(&scene.keeper, async |tx| {
        assert!(tx.lock_rows("parts", "key", [1]).await?.is_empty());
        assert!(tx.lock_rows("parts", "place", [1]).await?.is_empty());
        Ok(())
    })
    .await
    .unwrap();
}

/// What is planted on the search_path is not run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_and_functions_are_postgresqls_own() {
    let scene = scene(1, 3).await;
    let name = scene.database.name();
    scene
        .observer
        .batch_execute(&format!(
            "CREATE SCHEMA planted; \
             CREATE FUNCTION planted.eq(bigint, bigint) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''planted''; END'; \
             CREATE OPERATOR planted.= (FUNCTION = planted.eq, LEFTARG = bigint, RIGHTARG = bigint); \
             CREATE FUNCTION planted.unnest(bigint[]) RETURNS SETOF bigint LANGUAGE sql AS 'SELECT 1::bigint'; \
             CREATE AGGREGATE planted.min(bigint) (SFUNC = int8_sum, STYPE = numeric); \
             ALTER DATABASE {name} SET search_path = planted, public, pg_catalog"
        ))
        .await
        .unwrap();
    let locked = in_transaction(&scene.keeper, async |tx| {
        tx.query_one("SELECT 1::bigint = 1::bigint", &[])
            .await
            .unwrap_err();
        Ok(())
    });
    locked.await.unwrap_err();
    let locked = in_transaction(&scene.keeper, async |tx| {
        tx.lock_rows("t", "id", [3_i64, 1]).await
    });
    assert_eq!(locked.await.unwrap(), [1, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused() {
    let scene = scene(1, 1).await;
    for (table, key, text) in [
        ("", "id", "empty name"),
        ("t", "", "empty name"),
        ("t", "a\0b", "NUL"),
        ("t", &"k".repeat(64), "64 bytes"),
    ] {
        let refused = in_transaction(&scene.keeper, async move |tx| {
            let refused = tx.lock_rows(table, key, [1_i64]).await.unwrap_err();
            // Nothing was sent that could have failed.
            tx.query("SELECT 1", &[]).await?;
            Ok(refused)
        });
        let refused = refused.await.unwrap();
        assert_error(&refused, ErrorKind::Config, text);
    }
    let unfit = in_transaction(&scene.keeper, async |tx| {
        tx.lock_rows("t", "id", ["text"]).await
    });
    let unfit = unfit.await.unwrap_err();
    assert_error(
        &unfit,
        ErrorKind::Config,
        r#"ids of type &str do not fit the key "id" of "t""#,
    );
    // Of a type that is named without asking: the server has no operator for the two.
    scene
        .observer
        .batch_execute("ALTER TABLE t ADD COLUMN name text")
        .await
        .unwrap();
    let unfit = in_transaction(&scene.keeper, async |tx| {
        tx.lock_rows("t", "name", [1_i64]).await
    });
    let unfit = unfit.await.unwrap_err();
    assert_error(
        &unfit,
        ErrorKind::Config,
        r#"ids of type i64 do not fit the key "name" of "t""#,
    );
    let missing = in_transaction(&scene.keeper, async |tx| {
        tx.lock_rows("no_such_table", "id", [1_i64]).await
    });
    assert_error(
        &missing.await.unwrap_err(),
        ErrorKind::Database,
        r#"rows of "no_such_table" (SQLSTATE 42P01)"#,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_poll_it_leaves_nothing() {
    let scene = scene(1, 5).await;
    for contended in [false, true] {
        let holder = scene.database.connect().await;
        holder.batch_execute("BEGIN").await.unwrap();
        if contended {
            holder
                .batch_execute("SELECT FROM t WHERE id = 3 FOR UPDATE")
                .await
                .unwrap();
        }
        for polls in 0.. {
            let options = TransactionOptions::new()
                .attempts(1)
                .lock_timeout(Duration::from_millis(100));
            let work = scene.keeper.transaction_with(options, async |tx| {
                tx.lock_rows("t", "id", [5_i64, 3, 1]).await
            });
            let done = poll_times_and_drop(work, polls).await;
            eventually("a row is still locked", async || {
                let others: &[i64] = if contended { &[3] } else { &[] };
                locked(&scene.observer).await == others
            })
            .await;
            if let Some(done) = done {
                assert_eq!(done.is_err(), contended);
                break;
            }
        }
        holder.batch_execute("ROLLBACK").await.unwrap();
        scene.nothing_left_within(GIVE_UP_AFTER).await;
    }
}
