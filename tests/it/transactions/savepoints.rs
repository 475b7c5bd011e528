//! Savepoints: what a failing one leaves, at any depth.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use lockkeeper::{Error, ErrorKind, Tx};
use lockkeeper_testkit::{AppError, Scene, assert_error, poll_times_and_drop, sqlstate};
use tokio::sync::{Barrier, Notify};

use super::{Nothing, ids, insert};

#[tokio::test]
async fn a_failing_savepoint_leaves_what_is_around_it() {
    let scene = Scene::with_two_rows(1).await;
    scene
        .keeper
        .transaction(async |tx| {
            insert(tx, 10).await?;
            let failed = tx
                .savepoint(async |tx| {
                    insert(tx, 11).await?;
                    let kept = tx
                        .savepoint(async |tx| {
                            insert(tx, 12).await?;
                            Ok::<_, AppError>(12)
                        })
                        .await?;
                    assert_eq!(kept, 12);
                    // A failure of the server.
                    insert(tx, 1).await?;
                    Ok::<_, AppError>(())
                })
                .await;
            assert!(matches!(failed, Err(AppError::Driver(_))), "{failed:?}");
            // One of the closure's own.
            let failed = tx
                .savepoint(async |tx| {
                    insert(tx, 13).await?;
                    let inner = tx
                        .savepoint(async |tx| {
                            insert(tx, 14).await?;
                            Err::<(), _>(AppError::Own(14))
                        })
                        .await;
                    assert!(matches!(inner, Err(AppError::Own(14))));
                    insert(tx, 15).await?;
                    Ok::<_, AppError>(())
                })
                .await;
            assert!(failed.is_ok());
            // Swallowed inside: an error all the same, and undone.
            let failed = tx
                .savepoint(async |tx| {
                    insert(tx, 16).await?;
                    drop(insert(tx, 1).await);
                    Ok::<_, AppError>(())
                })
                .await;
            let Err(AppError::Keeper(error)) = failed else {
                panic!("{failed:?}")
            };
            assert_error(
                &error,
                ErrorKind::Database,
                "a statement inside the savepoint failed",
            );
            insert(tx, 17).await?;
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    assert_eq!(ids(&scene).await, [1, 2, 10, 13, 15, 17]);
    scene.nothing_left().await;
}

#[tokio::test]
async fn savepoints_nest_deeply_and_roll_back_at_any_depth() {
    /// Inserts its depth, goes deeper, and fails where it is told to.
    fn nest(tx: &mut Tx, depth: i32, fails: i32) -> BoxFuture<'_, Result<(), AppError>> {
        Box::pin(async move {
            insert(tx, 100 + depth).await?;
            if depth < 5 {
                let inner = tx.savepoint(async move |tx| {
                    nest(tx, depth + 1, fails).await?;
                    if depth + 1 == fails {
                        return Err(AppError::Own(0));
                    }
                    Ok(())
                });
                let result = inner.await;
                assert_eq!(result.is_err(), depth + 1 == fails, "{result:?}");
            }
            Ok(())
        })
    }
    for fails in 0..=5 {
        let scene = Scene::with_two_rows(1).await;
        scene
            .keeper
            .transaction(async |tx| nest(tx, 0, fails).await)
            .await
            .unwrap();
        let kept = if fails == 0 { 6 } else { fails };
        let expected: Vec<i32> = [1, 2].into_iter().chain(100..100 + kept).collect();
        assert_eq!(ids(&scene).await, expected, "fails at {fails}");
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_inside_a_savepoint_retries_the_whole() {
    let scene = Scene::with_two_rows(4).await;
    let runs = Arc::new(AtomicU32::new(0));
    let met = Arc::new(Barrier::new(2));
    let survivor = Arc::new(Notify::new());
    let tasks = [(1, 2), (2, 1)].map(|(first, second)| {
        let keeper = scene.keeper.clone();
        let (runs, met) = (Arc::clone(&runs), Arc::clone(&met));
        let (survivor, done) = (Arc::clone(&survivor), Arc::clone(&survivor));
        tokio::spawn(async move {
            let answer = keeper
                .transaction(async move |tx| {
                    let run = runs.fetch_add(1, Ordering::Relaxed);
                    if run >= 2 {
                        survivor.notified().await;
                    }
                    let add = "UPDATE t SET n = n + 1 WHERE id = $1";
                    tx.execute(add, &[&first]).await?;
                    if run < 2 {
                        met.wait().await;
                    }
                    tx.savepoint(async |tx| {
                        tx.savepoint(async |tx| {
                            // The cause is dropped on the way out.
                            tx.execute(add, &[&second]).await.map_err(|_| Nothing)?;
                            Ok::<_, Nothing>(())
                        })
                        .await
                    })
                    .await
                })
                .await;
            done.notify_one();
            answer
        })
    });
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(runs.load(Ordering::Relaxed), 3);
    assert_eq!(scene.count("t WHERE n = 2").await, 2);
    scene.nothing_left().await;
}

/// However far it got: dropped, all of it is undone and the transaction continues.
#[tokio::test]
async fn a_savepoint_dropped_in_the_middle_is_rolled_back() {
    let scene = Scene::with_two_rows(1).await;
    let mut finished = false;
    let mut polls = 0;
    while !finished {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        finished = scene
            .keeper
            .transaction(async |tx| {
                insert(tx, 10).await?;
                let inner = tx.savepoint(async |tx| {
                    insert(tx, 11).await?;
                    tx.savepoint(async |tx| insert(tx, 12).await).await?;
                    drop(insert(tx, 1).await);
                    Err::<(), _>(AppError::Own(1))
                });
                let result = poll_times_and_drop(inner, polls).await;
                assert!(!matches!(result, Some(Ok(()))));
                insert(tx, 13).await?;
                let kept = tx.savepoint(async |tx| insert(tx, 14).await);
                kept.await?;
                Ok::<_, AppError>(result.is_some())
            })
            .await
            .unwrap();
        assert_eq!(ids(&scene).await, [1, 2, 10, 13, 14], "{polls} polls");
        scene.nothing_left().await;
        polls += 1;
    }
    assert!(polls > 5, "only {polls} polls");

    // During a statement, and by a panic.
    scene
        .keeper
        .transaction(async |tx| {
            let slow = tx.savepoint(async |tx| {
                insert(tx, 20).await?;
                tx.batch_execute("SELECT pg_sleep(0.3)").await?;
                Ok::<_, AppError>(())
            });
            let slow = tokio::time::timeout(Duration::from_millis(100), slow);
            assert!(slow.await.is_err());
            insert(tx, 21).await?;
            let panics = tx.savepoint(async |tx| {
                insert(tx, 22).await?;
                if tx.call_site().is_some() {
                    panic!("on purpose");
                }
                Ok::<_, AppError>(())
            });
            assert!(AssertUnwindSafe(panics).catch_unwind().await.is_err());
            insert(tx, 23).await?;
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    assert_eq!(ids(&scene).await, [1, 2, 10, 13, 14, 21, 23]);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_lock_taken_inside_a_savepoint_ends_with_its_rollback() {
    let scene = Scene::with_two_rows(2).await;
    scene
        .keeper
        .with_advisory_lock("outer", async |tx| {
            let failed = tx
                .savepoint(async |tx| {
                    tx.advisory_lock("inner").await?;
                    assert_eq!(tx.held_keys().count(), 2);
                    Err::<(), _>(AppError::Own(1))
                })
                .await;
            assert!(failed.is_err());
            assert_eq!(tx.held_keys().count(), 1);
            assert!(scene.is_held("outer").await && !scene.is_held("inner").await);
            // Not taken for held: it is taken again.
            tx.advisory_lock("inner").await?;
            assert!(scene.is_held("inner").await);
            let kept = tx.savepoint(async |tx| {
                tx.advisory_lock("kept").await?;
                Ok::<_, AppError>(())
            });
            kept.await?;
            assert_eq!(tx.held_keys().count(), 3);
            assert!(scene.is_held("kept").await);
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_savepoint_in_a_failed_transaction_is_an_error() {
    let scene = Scene::with_two_rows(1).await;
    let answer = scene
        .keeper
        .transaction(async |tx| {
            insert(tx, 10).await?;
            drop(tx.batch_execute("SELECT 1/0").await);
            let ran = AtomicBool::new(false);
            let inner = tx
                .savepoint(async |_| {
                    ran.store(true, Ordering::Relaxed);
                    Ok::<_, Error>(())
                })
                .await;
            assert!(inner.is_err() && !ran.into_inner());
            Ok::<_, AppError>(())
        })
        .await;
    let Err(AppError::Keeper(error)) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(sqlstate(&error), "22012");
    assert_eq!(ids(&scene).await, [1, 2]);
    scene.nothing_left().await;
}
