//! REPEATABLE READ and SERIALIZABLE under a lock: the section reads what the last holder committed, or is refused.

use std::time::Duration;

use lockkeeper::{Error, ErrorKind, LockKey, TransactionOptions, XactGuard};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, lock_by_sql, unlock_by_sql,
};
use tokio_postgres::IsolationLevel;

const LEVELS: [(IsolationLevel, &str); 4] = [
    (IsolationLevel::ReadUncommitted, "read uncommitted"),
    (IsolationLevel::ReadCommitted, "read committed"),
    (IsolationLevel::RepeatableRead, "repeatable read"),
    (IsolationLevel::Serializable, "serializable"),
];

/// A counter at 0, and sessions that begin their transactions at `level`.
async fn scene_with_counter(pool_size: usize, level: &str, of_role: bool) -> Scene {
    let scene = Scene::new(pool_size).await;
    let database = scene.database.name();
    let who = if of_role {
        format!("ROLE CURRENT_USER IN DATABASE {database}")
    } else {
        format!("DATABASE {database}")
    };
    scene
        .observer
        .batch_execute(&format!(
            "CREATE TABLE counter (n int8); INSERT INTO counter VALUES (0); \
             ALTER {who} SET default_transaction_isolation = '{level}'"
        ))
        .await
        .unwrap();
    assert_eq!(scene.show("transaction_isolation").await, level);
    scene
}

async fn counter(scene: &Scene) -> i64 {
    let row = scene
        .observer
        .query_one("SELECT n FROM counter", &[])
        .await
        .unwrap();
    row.get(0)
}

const READ: &str =
    "SELECT n, current_setting('transaction_isolation'), pg_backend_pid() FROM counter";
const WRITE: &str = "UPDATE counter SET n = $1";

/// Reads, lets others run, and writes one more, without a row lock: nothing but the advisory lock keeps two apart.
async fn increment(guard: &XactGuard, level: &str) -> Result<(), tokio_postgres::Error> {
    let row = guard.query_one(READ, &[]).await?;
    assert_eq!(row.get::<_, &str>(1), level);
    assert_eq!(Some(row.get::<_, i32>(2)), guard.backend_pid());
    tokio::task::yield_now().await;
    guard.execute(WRITE, &[&(row.get::<_, i64>(0) + 1)]).await?;
    Ok(())
}

const TASKS: i64 = 8;
const ROUNDS: i64 = 50;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sections_lose_no_update_whatever_the_default_isolation() {
    for (level, of_role) in [
        ("repeatable read", false),
        ("serializable", true),
        ("read committed", false),
    ] {
        let scene = scene_with_counter(8, level, of_role).await;
        let tasks: Vec<_> = (0..TASKS)
            .map(|_| {
                let keeper = scene.keeper.clone();
                tokio::spawn(async move {
                    let mut pids = Vec::new();
                    for _ in 0..ROUNDS {
                        let pid = keeper
                            .with_advisory_lock("counter", async |tx| {
                                let row = tx.query_one(READ, &[]).await?;
                                tokio::task::yield_now().await;
                                tx.execute(WRITE, &[&(row.get::<_, i64>(0) + 1)]).await?;
                                Ok::<i32, Error>(row.get(2))
                            })
                            .await
                            .unwrap();
                        pids.push(pid);
                    }
                    pids
                })
            })
            .collect();
        let mut pids = Vec::new();
        for task in tasks {
            pids.extend(task.await.unwrap());
        }
        pids.sort_unstable();
        pids.dedup();
        assert!(pids.len() > 1, "one backend alone has no race");
        assert_eq!(counter(&scene).await, TASKS * ROUNDS, "{level}");
        scene.nothing_left().await;
    }
}

/// A guard is not repeated, so its serialization failures come out. Under REPEATABLE READ there is none: no other transaction writes
/// beside it. Under SERIALIZABLE the server can see one where there was none: it gives the lock on while the last
/// holder's read locks are still there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guards_lose_no_update_whatever_the_isolation() {
    for (default, asked) in [
        ("repeatable read", None),
        ("serializable", None),
        (
            "read committed",
            Some((IsolationLevel::Serializable, "serializable")),
        ),
        (
            "serializable",
            Some((IsolationLevel::ReadCommitted, "read committed")),
        ),
    ] {
        let scene = scene_with_counter(8, default, false).await;
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let keeper = scene.keeper.clone();
                tokio::spawn(async move {
                    let mut round = 0;
                    while round < ROUNDS {
                        // Alone, or in a set, or after a try: it is one counter.
                        let mut lock = match (task + round) % 3 {
                            0 => keeper.advisory_lock("counter"),
                            _ => keeper.advisory_locks([LockKey::from("counter"), (1, 2).into()]),
                        };
                        lock = lock.wait(GIVE_UP_AFTER);
                        if let Some((level, _)) = asked {
                            lock = lock.isolation(level);
                        }
                        let tried = if round % 5 == 0 {
                            lock.clone().try_acquire().await.unwrap()
                        } else {
                            None
                        };
                        let guard = match tried {
                            Some(guard) => guard,
                            None => lock.acquire().await.unwrap(),
                        };
                        let level = asked.map_or(default, |(_, name)| name);
                        let done = match increment(&guard, level).await {
                            Ok(()) => guard.commit().await,
                            Err(error) => Err(Error::from(error)),
                        };
                        match done {
                            Ok(()) => round += 1,
                            Err(error) => {
                                assert_error(&error, ErrorKind::Serialization, "commit failed, the transaction was rolled back (SQLSTATE 40001)");
                                assert_eq!(level, "serializable");
                            }
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(
            counter(&scene).await,
            TASKS * ROUNDS,
            "{default}, {asked:?}"
        );
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_on_a_session_guard_lose_no_update() {
    let scene = scene_with_counter(6, "repeatable read", false).await;
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let keeper = scene.keeper.clone();
            tokio::spawn(async move {
                for _ in 0..30 {
                    let lock = keeper
                        .advisory_lock("counter")
                        .session()
                        .wait(GIVE_UP_AFTER);
                    let mut guard = lock.acquire().await.unwrap();
                    guard
                        .transaction(async |tx| {
                            let row = tx.query_one(READ, &[]).await?;
                            assert_eq!(row.get::<_, &str>(1), "repeatable read");
                            tokio::task::yield_now().await;
                            tx.execute(WRITE, &[&(row.get::<_, i64>(0) + 1)]).await?;
                            Ok::<_, Error>(())
                        })
                        .await
                        .unwrap();
                    guard.release().await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(counter(&scene).await, 150);
    scene.nothing_left().await;
}

/// The one case that matters, step by step: the snapshot is younger than the grant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_reads_what_was_committed_while_it_waited() {
    let scene = scene_with_counter(2, "read committed", false).await;
    let mut expected = 0;
    for (level, name) in LEVELS {
        for several in [false, true] {
            for shared in [false, true] {
                let writer = scene
                    .keeper
                    .advisory_lock("counter")
                    .acquire()
                    .await
                    .unwrap();
                let waiting = tokio::spawn({
                    let mut lock = if several {
                        scene.keeper.advisory_locks(["another", "counter"])
                    } else {
                        scene.keeper.advisory_lock("counter")
                    };
                    lock = if shared { lock.shared() } else { lock };
                    async move {
                        let guard = lock
                            .isolation(level)
                            .wait(GIVE_UP_AFTER)
                            .acquire()
                            .await
                            .unwrap();
                        let row = guard.query_one(READ, &[]).await.unwrap();
                        let pid = guard.backend_pid();
                        guard.commit().await.unwrap();
                        (row, pid)
                    }
                });
                scene.until_awaited("counter").await;
                expected += 1;
                writer.execute(WRITE, &[&expected]).await.unwrap();
                let writers_pid = writer.backend_pid();
                writer.commit().await.unwrap();
                let (row, pid) = waiting.await.unwrap();
                assert_ne!(pid, writers_pid);
                assert_eq!(
                    row.get::<_, i64>(0),
                    expected,
                    "{name}, {several}, {shared}"
                );
                assert_eq!(row.get::<_, &str>(1), name);
                scene.nothing_left().await;
            }
        }
    }
}

/// While it is held, a snapshot's lock is a transaction's lock and nothing else.
#[tokio::test]
async fn a_lock_with_a_snapshot_is_transaction_scoped_in_the_end() {
    let scene = scene_with_counter(1, "read committed", false).await;
    let pid = scene.next_pid().await;
    for (level, name) in LEVELS {
        for keys in [vec![1], vec![1, 2, 3]] {
            let lock = || scene.keeper.advisory_locks(keys.clone()).isolation(level);
            for tries in [false, true] {
                let guard = if tries {
                    lock().try_acquire().await.unwrap().unwrap()
                } else {
                    lock().acquire().await.unwrap()
                };
                assert_eq!(guard.backend_pid(), Some(pid));
                assert_eq!(
                    scene.advisory_locks().await,
                    i64::try_from(keys.len()).unwrap()
                );
                let row = guard.query_one(READ, &[]).await.unwrap();
                assert_eq!(row.get::<_, &str>(1), name);
                // The server itself ends them with the transaction: no session lock is left under them.
                guard.client().batch_execute("ROLLBACK").await.unwrap();
                assert_eq!(scene.advisory_locks().await, 0, "{name} {keys:?}");
                guard.client().batch_execute("BEGIN").await.unwrap();
                drop(guard);
                scene.nothing_left().await;
                assert_eq!(scene.next_pid().await, pid, "the connection is kept");
                assert_eq!(
                    scene.show("default_transaction_isolation").await,
                    "read committed"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_busy_lock_is_busy_at_every_level() {
    let scene = scene_with_counter(2, "serializable", false).await;
    let holder = scene.database.connect().await;
    lock_by_sql(&holder, "counter").await;
    let keeper = &scene.keeper;
    for level in LEVELS
        .map(|(level, _)| Some(level))
        .into_iter()
        .chain([None])
    {
        let lock = || {
            let lock = keeper.advisory_lock("counter");
            level.map_or(lock.clone(), |level| lock.isolation(level))
        };
        assert!(lock().try_acquire().await.unwrap().is_none());
        for millis in [0, 30, 700] {
            let wait = Duration::from_millis(millis);
            let error = lock().wait(wait).acquire().await.unwrap_err();
            assert_error_in(
                format_args!("{level:?}"),
                &error,
                ErrorKind::LockTimeout,
                r#""counter" after"#,
            );
            assert_eq!(error.blockers().len(), 1);
            assert!(error.waited().unwrap() >= wait);
        }
    }
    let ran = keeper.try_with_advisory_lock("counter", async |_| Ok::<_, Error>(()));
    assert_eq!(ran.await.unwrap(), None);
    unlock_by_sql(&holder, "counter").await;
    scene.nothing_left().await;
}

#[tokio::test]
async fn one_more_lock_is_refused_in_a_transaction_that_has_its_snapshot() {
    for (level, name) in LEVELS {
        let by_default = scene_with_counter(2, name, true).await;
        let asked_for = scene_with_counter(2, "read committed", false).await;
        let has_snapshot = !name.starts_with("read ");
        for (scene, options) in [
            (&by_default, TransactionOptions::new()),
            (&asked_for, TransactionOptions::new().isolation(level)),
        ] {
            // Free or held: a lock that is refused is not waited for.
            for held in [false, true] {
                if held {
                    lock_by_sql(&scene.observer, "counter").await;
                }
                let expected = i64::from(held);
                let options = options.clone();
                let section = scene.keeper.transaction_with(options, async |tx| {
                    let row = tx.query_one(READ, &[]).await?;
                    assert_eq!(row.get::<_, &str>(1), name);
                    if has_snapshot {
                        let results = [
                            tx.advisory_lock("counter").await,
                            tx.advisory_lock("counter").shared().await,
                            tx.advisory_lock("counter").try_acquire().await.map(drop),
                            tx.advisory_locks(["a", "counter", "z"]).await,
                        ];
                        for result in results {
                            let error = result.unwrap_err();
                            assert_error(
                                &error,
                                ErrorKind::Config,
                                "snapshot taken before the lock",
                            );
                            assert!(error.to_string().contains("snapshot"), "{error}");
                            assert!(error.key().is_some());
                        }
                        assert_eq!(scene.advisory_locks().await, expected, "nothing is granted");
                        assert_eq!(tx.held_keys().count(), 0);
                    } else if held {
                        assert!(!tx.advisory_lock("counter").try_acquire().await?);
                    } else {
                        tx.advisory_lock("counter").await?;
                        assert!(tx.advisory_lock("z").try_acquire().await?);
                        assert_eq!(scene.advisory_locks().await, 2);
                    }
                    // The transaction continues.
                    tx.execute("UPDATE counter SET n = n + 1", &[]).await?;
                    Ok::<_, Error>(())
                });
                section.await.unwrap();
                if held {
                    unlock_by_sql(&scene.observer, "counter").await;
                }
                scene.nothing_left().await;
            }
            assert_eq!(counter(scene).await, 2);
        }
    }
}

/// And in one that took its first lock rightly, before its snapshot.
#[tokio::test]
async fn a_second_lock_is_refused_behind_the_snapshot_of_the_first() {
    let scene = scene_with_counter(2, "repeatable read", false).await;
    let section = scene.keeper.with_advisory_lock("counter", async |tx| {
        let error = tx.advisory_lock("another").await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::Config,
            r#""another": this transaction's isolation level"#,
        );
        // The one that it has is not asked for again.
        tx.advisory_lock("counter").await?;
        assert_eq!(scene.advisory_locks().await, 1);
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    let mut guard = scene
        .keeper
        .advisory_lock("counter")
        .session()
        .acquire()
        .await
        .unwrap();
    let section = guard.transaction(async |tx| {
        let error = tx.advisory_lock("another").await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::Config,
            r#""another": this transaction's isolation level"#,
        );
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    drop(guard);
    scene.nothing_left().await;
}
