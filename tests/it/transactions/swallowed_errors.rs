//! Errors that a body keeps to itself, or that the library does not see.

use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};

use futures::{FutureExt as _, SinkExt as _, StreamExt as _, TryStreamExt as _};
use lockkeeper::{Error, ErrorKind, TransactionOptions};
use lockkeeper_testkit::{AppError, Scene, assert_error, assert_error_in, raise, sqlstate};

use super::{ids, insert};

/// Every way to lose an error, then `Ok`: the caller hears of it, and nothing is committed.
#[tokio::test]
async fn a_swallowed_error_is_never_a_silent_rollback() {
    let scene = Scene::with_two_rows(1).await;
    for way in [
        "execute",
        "query_one",
        "batch",
        "prepared",
        "client",
        "stream",
        "copy",
        "dropped",
        "prepare",
    ] {
        let answer = scene
            .keeper
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                match way {
                    "execute" => drop(tx.execute("SELECT 1/0", &[]).await),
                    "query_one" => drop(tx.query_one("SELECT 1/0", &[]).await),
                    "batch" => drop(tx.batch_execute("SELECT 1/0").await),
                    "prepare" => drop(tx.prepare("SELECT").await.and(tx.prepare("nonsense").await)),
                    "prepared" => {
                        let divide = tx.prepare_cached("SELECT 1 / $1::int").await?;
                        drop(tx.query(&divide, &[&0]).await);
                    }
                    "client" => drop(tx.client().execute("SELECT 1/0", &[]).await),
                    "stream" => {
                        let rows = tx
                            .query_raw(
                                "SELECT 1 / (3 - n) FROM generate_series(1, 3) AS g (n)",
                                Vec::<i32>::new(),
                            )
                            .await?;
                        let rows: Vec<_> = pin!(rows).collect().await;
                        assert!(rows.last().unwrap().is_err());
                    }
                    "copy" => {
                        let sink = tx.copy_in("COPY t FROM STDIN").await?;
                        let mut sink = pin!(sink);
                        sink.send(bytes::Bytes::from_static(b"11\tnonsense\n"))
                            .await?;
                        drop(sink.finish().await);
                    }
                    "dropped" => {
                        // Its error arrives when the future is gone.
                        let sleep = tx.batch_execute("SELECT pg_sleep(0.05); SELECT 1/0");
                        assert!(sleep.now_or_never().is_none());
                    }
                    _ => unreachable!(),
                }
                Ok::<_, Error>(())
            })
            .await;
        let error = answer.expect_err(way);
        assert_error_in(
            way,
            &error,
            ErrorKind::Database,
            "an earlier statement of the transaction failed",
        );
        assert_eq!(ids(&scene).await, [1, 2], "{way}");
        assert!(!error.is_retryable());
        if ["execute", "query_one", "batch", "prepared"].contains(&way) {
            assert_eq!(sqlstate(&error), "22012", "{way}: {error:?}");
        }
        scene.nothing_left().await;
    }

    let guard = scene.keeper.advisory_lock("swallow").acquire().await;
    let guard = guard.unwrap();
    guard
        .execute("INSERT INTO t VALUES (10, 0)", &[])
        .await
        .unwrap();
    drop(guard.execute("SELECT 1/0", &[]).await);
    let error = guard.commit().await.unwrap_err();
    assert_error(&error, ErrorKind::Database, "(SQLSTATE 22012)");
    assert_eq!(ids(&scene).await, [1, 2]);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_swallowed_retryable_failure_is_retried() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU32::new(0);
    scene
        .keeper
        .transaction(async |tx| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            if run == 0 {
                drop(tx.batch_execute(&raise("40P01")).await);
                drop(tx.batch_execute("SELECT 1").await);
            }
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    assert_eq!(runs.load(Ordering::Relaxed), 2);
    assert_eq!(ids(&scene).await, [1, 2, 10]);
    scene.nothing_left().await;
}

/// A mistake of the driver's user, which the server never saw, fails nothing.
#[tokio::test]
async fn an_error_the_server_never_saw_does_not_fail_the_transaction() {
    let scene = Scene::with_two_rows(1).await;
    scene
        .keeper
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            assert!(tx.query_one("SELECT id FROM t", &[]).await.is_err());
            assert!(tx.execute("SELECT $1::int", &[&"text"]).await.is_err());
            assert!(tx.batch_execute("SELECT '\0'").await.is_err());
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    assert_eq!(ids(&scene).await, [1, 2, 10]);
    scene.nothing_left().await;
}

/// Errors met on the way of a row stream come back as they are, and nothing is committed.
#[tokio::test]
async fn what_is_not_watched_is_handed_back_as_it_was() {
    let scene = Scene::with_two_rows(1).await;
    for way in ["client", "stream"] {
        let answer = scene
            .keeper
            .transaction_with(TransactionOptions::new().attempts(2), async |tx| {
                insert(tx, 10).await?;
                if way == "client" {
                    tx.client().batch_execute(&raise("23505")).await?;
                } else {
                    let rows = tx
                        .query_raw(
                            "SELECT 1 / (3 - n) FROM generate_series(1, 3) AS g (n)",
                            Vec::<i32>::new(),
                        )
                        .await?;
                    let rows: Vec<_> = pin!(rows).try_collect().await?;
                    assert!(rows.is_empty(), "no error in the stream");
                }
                Ok::<_, AppError>(())
            })
            .await;
        assert!(
            matches!(answer, Err(AppError::Driver(_))),
            "{way}: {answer:?}"
        );
        assert_eq!(ids(&scene).await, [1, 2]);
        scene.nothing_left().await;
    }
}
