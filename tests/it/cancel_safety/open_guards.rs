//! What is done with an open guard, dropped half-way.

use std::time::Duration;

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use lockkeeper::{Error, ErrorKind, SessionGuard, XactGuard};
use lockkeeper_testkit::{CLEANED_UP_WITHIN, Scene, poll_times_and_drop};

use super::{AFTER, BEFORE, KEY, MOST_POLLS, assert_no_trace, is_busy, with_table, work};

/// What is done with an open guard and dropped half-way, before the guard itself ends.
type OnXactGuard = for<'a> fn(&'a mut XactGuard) -> BoxFuture<'a, Result<(), Error>>;

const ON_XACT_GUARDS: &[(&str, OnXactGuard)] = &[
    ("all query methods", |guard| work(guard).boxed()),
    ("a slow statement", |guard| {
        async move { Ok(guard.batch_execute("SELECT pg_sleep(0.02)").await?) }.boxed()
    }),
    ("a slow statement that is prepared", |guard| {
        async move {
            guard.execute("SELECT pg_sleep(0.02)", &[]).await?;
            Ok(())
        }
        .boxed()
    }),
    ("a stream of rows", |guard| {
        async move {
            let sql = "SELECT repeat('x', 1000) FROM generate_series(1, 3000)";
            let rows = guard.query_raw(sql, Vec::<i32>::new()).await?;
            let mut rows = std::pin::pin!(rows);
            while let Some(row) = rows.next().await {
                row?;
                // At a poll of its own.
                tokio::task::yield_now().await;
                if rows.rows_affected().is_none() && rows.as_mut().next().await.is_some() {
                    return Ok(());
                }
            }
            Ok(())
        }
        .boxed()
    }),
    ("a savepoint", |guard| {
        guard
            .savepoint(async |tx| {
                tx.advisory_lock(AFTER).await?;
                tx.batch_execute("SELECT pg_sleep(0.001)").await?;
                Ok(())
            })
            .boxed()
    }),
    ("a savepoint in a failing savepoint", |guard| {
        async move {
            let outer = guard.savepoint(async |tx| {
                let inner = tx.savepoint(async |tx| {
                    tx.batch_execute("SELECT 1/0").await?;
                    Ok::<_, Error>(())
                });
                inner.await
            });
            assert!(outer.await.is_err());
            Ok(())
        }
        .boxed()
    }),
    ("one more lock", |guard| {
        async move { guard.advisory_lock(BEFORE).await }.boxed()
    }),
    ("more locks, one of them busy", |guard| {
        async move {
            let locks = guard.advisory_locks([BEFORE, KEY]);
            let outcome = locks.wait(Duration::from_millis(15)).await;
            assert!(is_busy(&outcome), "{outcome:?}");
            Ok(())
        }
        .boxed()
    }),
    ("a try of several free locks", |guard| {
        async move {
            assert!(guard.advisory_locks([AFTER, BEFORE]).try_acquire().await?);
            Ok(())
        }
        .boxed()
    }),
    ("a try of several locks, the last of them busy", |guard| {
        async move {
            let locks = guard.advisory_locks([KEY, BEFORE]);
            assert!(!locks.try_acquire().await?);
            Ok(())
        }
        .boxed()
    }),
    ("a try of a busy lock", |guard| {
        async move {
            assert!(!guard.advisory_lock(KEY).try_acquire().await?);
            Ok(())
        }
        .boxed()
    }),
];

async fn notes(scene: &Scene, id: i32) -> i64 {
    let sql = "SELECT count(*) FROM note WHERE id = $1";
    let row = scene.observer.query_one(sql, &[&id]).await.unwrap();
    row.get(0)
}

/// However much of it was dropped, a transaction is applied if commit says so and not if it says otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_outlives_what_is_dropped_in_it_and_ends_as_it_says() {
    let scene = with_table(Scene::new(1).await).await;
    let holder = scene.holder(KEY).await;
    let mut id = 1000;
    let mut committed = 0;
    for &(name, call) in ON_XACT_GUARDS {
        for end in ["drop", "rollback", "commit", "more locks, then commit"] {
            for polls in 0..MOST_POLLS {
                id += 1;
                let what = format!("{name}, dropped after {polls} polls, then {end}");
                let lock = scene.keeper.advisory_lock(("cancel safety", "own"));
                let mut guard = lock.acquire().await.unwrap();
                let insert = format!("INSERT INTO note VALUES ({id})");
                guard.batch_execute(&insert).await.unwrap();
                let outcome = poll_times_and_drop(call(&mut guard), polls).await;
                let mut applied = false;
                match end {
                    "drop" => drop(guard),
                    "rollback" => guard.rollback().await,
                    _ => {
                        if end.starts_with("more")
                            && guard.advisory_locks([BEFORE, AFTER]).await.is_ok()
                        {
                            let own = guard.backend_pid().unwrap();
                            for key in [BEFORE, AFTER] {
                                assert_eq!(
                                    scene.holders(key).await,
                                    [own],
                                    "{what}: {key} is not held"
                                );
                            }
                        }
                        let commit = tokio::time::timeout(CLEANED_UP_WITHIN, guard.commit()).await;
                        applied = match commit {
                            Ok(Ok(())) => true,
                            Ok(Err(error)) if error.kind() == ErrorKind::CommitUnknown => {
                                panic!("{what}: {error:?}")
                            }
                            Ok(Err(_)) => false,
                            Err(_) => panic!("{what}: commit hangs"),
                        };
                        committed += usize::from(applied);
                    }
                }
                assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
                assert_eq!(notes(&scene, id).await, i64::from(applied), "{what}");
                if let Some(outcome) = outcome {
                    assert!(outcome.is_ok(), "{what}: {outcome:?}");
                    assert!(applied || !end.ends_with("commit"), "{what}: not committed");
                    break;
                }
                assert!(polls + 1 < MOST_POLLS, "{what}: not done");
            }
        }
    }
    assert!(committed > ON_XACT_GUARDS.len());
}

type OnSessionGuard = for<'a> fn(&'a mut SessionGuard, i32) -> BoxFuture<'a, Result<(), Error>>;

const ON_SESSION_GUARDS: &[(&str, OnSessionGuard)] = &[
    ("a transaction", |guard, id| {
        guard
            .transaction(async move |tx| {
                tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                Ok(())
            })
            .boxed()
    }),
    ("a transaction that returns an error", |guard, id| {
        async move {
            let failed = guard.transaction(async move |tx| {
                tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                tx.batch_execute("SELECT 1/0").await?;
                Ok::<_, Error>(())
            });
            assert!(failed.await.is_err());
            Ok(())
        }
        .boxed()
    }),
    (
        "a transaction that takes a lock and has a savepoint",
        |guard, id| {
            guard
                .transaction(async move |tx| {
                    tx.advisory_lock(AFTER).await?;
                    let savepoint = tx.savepoint(async move |tx| {
                        tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                        Ok::<_, Error>(())
                    });
                    savepoint.await
                })
                .boxed()
        },
    ),
    ("a transaction that waits for a busy lock", |guard, id| {
        async move {
            let outcome = guard.transaction(async move |tx| {
                tx.execute("INSERT INTO note VALUES ($1)", &[&id]).await?;
                tx.advisory_lock(KEY).wait(Duration::from_millis(15)).await
            });
            let outcome: Result<(), Error> = outcome.await;
            assert!(is_busy(&outcome), "{outcome:?}");
            Ok(())
        }
        .boxed()
    }),
    ("statements", |guard, _| {
        async move {
            guard.query("SELECT 1", &[]).await?;
            guard.batch_execute("SELECT pg_sleep(0.01)").await?;
            Ok(())
        }
        .boxed()
    }),
    ("the wait for its loss", |guard, _| {
        async move {
            drop(tokio::time::timeout(Duration::from_millis(5), guard.loss()).await);
            Ok(())
        }
        .boxed()
    }),
];

/// Whatever is dropped on a session guard, the lock stays held until the guard ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_guard_outlives_what_is_dropped_on_it() {
    let scene = with_table(Scene::new(1).await).await;
    let holder = scene.holder(KEY).await;
    let own = ("cancel safety", "own session");
    let mut id = 2000;
    for &(name, call) in ON_SESSION_GUARDS {
        for end in ["drop", "release", "another transaction, then release"] {
            for polls in 0..MOST_POLLS {
                id += 1;
                let what = format!("{name}, dropped after {polls} polls, then {end}");
                let lock = scene.keeper.advisory_lock(own).session();
                let mut guard = lock.acquire().await.unwrap();
                let outcome = poll_times_and_drop(call(&mut guard, id), polls).await;
                assert_eq!(
                    scene.holders(own).await.len(),
                    1,
                    "{what}: not held any more"
                );
                assert!(!guard.is_lost(), "{what}: lost");
                let ending = async {
                    match end {
                        "drop" => drop(guard),
                        "release" => guard
                            .release()
                            .await
                            .unwrap_or_else(|e| panic!("{what}: {e:?}")),
                        _ => {
                            let again = guard.transaction(async move |tx| {
                                tx.execute("INSERT INTO note VALUES ($1)", &[&-id]).await?;
                                Ok::<_, Error>(())
                            });
                            again.await.unwrap_or_else(|e| panic!("{what}: {e:?}"));
                            guard
                                .release()
                                .await
                                .unwrap_or_else(|e| panic!("{what}: {e:?}"));
                        }
                    }
                };
                let ending = tokio::time::timeout(CLEANED_UP_WITHIN, ending).await;
                assert!(ending.is_ok(), "{what}: it hangs");
                assert_no_trace(&scene, Some(holder.pid), CLEANED_UP_WITHIN, &what).await;
                let again = i64::from(end.starts_with("another"));
                assert_eq!(notes(&scene, -id).await, again, "{what}");
                if let Some(outcome) = outcome {
                    assert!(outcome.is_ok(), "{what}: {outcome:?}");
                    break;
                }
                assert!(polls + 1 < MOST_POLLS, "{what}: not done");
            }
        }
    }
}
