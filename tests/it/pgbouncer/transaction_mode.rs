//! What works in transaction mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::tokio_postgres::NoTls;
use lockkeeper::{Error, ErrorKind, Keeper, KeeperBuilder, Tx};
use lockkeeper_testkit::{
    BouncerScene, CLEANED_UP_WITHIN, PoolMode, assert_error, eventually, eventually_within,
    in_time, poll_times_and_drop,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_locks_exclude_and_are_freed_in_transaction_mode() {
    let test = "transaction_locks_exclude_and_are_freed_in_transaction_mode";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 8, &[]).await else {
        return;
    };
    let (a, b, direct) = (&behind.keeper, behind.fresh(4), &behind.scene.keeper);

    // Two clients of the pooler, and one that goes around it.
    let guard = a.advisory_lock("k").acquire().await.unwrap();
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    assert!(b.advisory_lock("k").try_acquire().await.unwrap().is_none());
    assert!(
        direct
            .advisory_lock("k")
            .try_acquire()
            .await
            .unwrap()
            .is_none()
    );
    let other = b.advisory_lock("other").acquire().await.unwrap();
    assert_ne!(other.backend_pid(), guard.backend_pid());
    let ran = b.try_with_advisory_lock("k", async |_| Ok::<_, Error>(()));
    assert!(ran.await.unwrap().is_none());
    guard.commit().await.unwrap();
    let ran = b.try_with_advisory_lock("k", async |_| Ok::<_, Error>(1));
    assert_eq!(ran.await.unwrap(), Some(1));
    drop(other);
    behind.nothing_left().await;

    // Shared, and a set of keys in both key spaces.
    let one = a.advisory_lock("k").shared().acquire().await.unwrap();
    let two = b.advisory_lock("k").shared().acquire().await.unwrap();
    assert!(a.advisory_lock("k").try_acquire().await.unwrap().is_none());
    one.rollback().await;
    drop(two);
    let keys = || {
        [
            lockkeeper::LockKey::from(7),
            lockkeeper::LockKey::from((1, 2)),
            lockkeeper::LockKey::from("k"),
        ]
    };
    let all = a.advisory_locks(keys()).acquire().await.unwrap();
    assert_eq!(behind.scene.advisory_locks().await, 3);
    for key in keys() {
        let busy = b.advisory_lock(key).try_acquire().await.unwrap();
        assert!(busy.is_none());
    }
    all.commit().await.unwrap();
    behind.nothing_left().await;

    // Inside a transaction, and inside a savepoint.
    a.transaction(async |tx| {
        tx.advisory_lock("k").await?;
        assert!(b.advisory_lock("k").try_acquire().await?.is_none());
        let inner = tx.savepoint(async |tx| {
            tx.advisory_lock("inner").await?;
            tx.batch_execute("SELECT 1/0").await?;
            Ok::<_, Error>(())
        });
        assert!(inner.await.is_err());
        assert!(b.advisory_lock("inner").try_acquire().await?.is_some());
        Ok::<_, Error>(())
    })
    .await
    .unwrap();
    behind.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_counter_is_never_two_behind_a_pooler() {
    let test = "a_counter_is_never_two_behind_a_pooler";
    for backends in ["2", "20"] {
        let settings = [("default_pool_size", backends), ("server_round_robin", "1")];
        let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 8, &settings).await
        else {
            return;
        };
        let (inside, worst, done) = (
            Arc::new(AtomicU32::new(0)),
            Arc::new(AtomicU32::new(0)),
            Arc::new(AtomicU32::new(0)),
        );
        // As long as all of them take on two backends.
        let patient = |builder: KeeperBuilder| builder.lock_wait(Duration::from_secs(60));
        let keepers = [
            patient(Keeper::builder(behind.scene.pool.clone())).build(),
            behind.fresh_with(4, patient),
            behind.fresh_with(8, patient),
        ];
        let tasks: Vec<_> = (0..60)
            .map(|n| {
                let keeper = keepers[n % 3].clone();
                let (inside, worst, done) =
                    (Arc::clone(&inside), Arc::clone(&worst), Arc::clone(&done));
                let section = async move |tx: &mut Tx| {
                    let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                    worst.fetch_max(now, Ordering::SeqCst);
                    tx.batch_execute("SELECT pg_sleep(0.002)").await?;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    done.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, Error>(())
                };
                tokio::spawn(async move {
                    if n % 2 == 0 {
                        keeper.with_advisory_lock("counter", section).await
                    } else {
                        let mut guard = keeper.advisory_lock("counter").acquire().await?;
                        guard.savepoint(section).await?;
                        guard.commit().await
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(worst.load(Ordering::SeqCst), 1, "{backends} backends");
        assert_eq!(done.load(Ordering::SeqCst), 60);
        behind.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlocks_are_retried_behind_a_pooler() {
    let test = "deadlocks_are_retried_behind_a_pooler";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    behind
        .scene
        .observer
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0), (2, 0)",
        )
        .await
        .unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let met = Arc::new(tokio::sync::Barrier::new(2));
    // Who tries again waits for the survivor's end, so that the two do not meet a second time.
    let survivor = Arc::new(tokio::sync::Notify::new());
    let tasks = [(1, 2), (2, 1)].map(|(first, second)| {
        let keeper = behind.keeper.clone();
        let (runs, met) = (Arc::clone(&runs), Arc::clone(&met));
        let (survivor, done) = (Arc::clone(&survivor), Arc::clone(&survivor));
        tokio::spawn(async move {
            let answer = keeper
                .transaction(async move |tx| {
                    let run = runs.fetch_add(1, Ordering::Relaxed);
                    if run >= 2 {
                        survivor.notified().await;
                    }
                    for id in [first, second] {
                        let sql = format!("UPDATE t SET n = n + 1 WHERE id = {id}");
                        tx.batch_execute(&sql).await?;
                        if id == first && run < 2 {
                            met.wait().await;
                        }
                    }
                    Ok::<_, Error>(())
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
    behind.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_behind_a_pooler_names_the_backend_that_blocks() {
    let test = "a_timeout_behind_a_pooler_names_the_backend_that_blocks";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    let guard = behind.keeper.advisory_lock("k").acquire().await.unwrap();
    let other = behind.fresh(2);
    for wait in [
        Duration::ZERO,
        Duration::from_millis(5),
        Duration::from_millis(700),
    ] {
        let started = Instant::now();
        let error = other
            .advisory_lock("k")
            .wait(wait)
            .acquire()
            .await
            .unwrap_err();
        assert!(started.elapsed() >= wait);
        assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#);
        assert_eq!(error.key().unwrap().name(), Some("k"));
        let [blocker] = error.blockers() else {
            panic!("{error}")
        };
        assert_eq!(
            blocker.pid(),
            guard.backend_pid(),
            "the pooler's pid, not the server's"
        );
        let name = blocker.application_name().unwrap();
        assert!(
            name.starts_with("behind ") && name.contains("transaction_mode.rs:"),
            "{name}"
        );
    }
    let answer = other
        .transaction(async |tx| {
            let error = tx
                .advisory_lock("k")
                .wait(Duration::from_millis(20))
                .await
                .unwrap_err();
            assert_eq!(error.blockers()[0].pid(), guard.backend_pid());
            tx.batch_execute("SELECT 1").await?;
            Ok::<_, Error>(())
        })
        .await;
    answer.unwrap();
    guard.commit().await.unwrap();
    behind.nothing_left().await;
}

/// However the waiter got there, and whatever connection there is to cancel it with. Repeated: one cancel in six goes
/// wrong when PgBouncer is asked to pass it on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_wait_behind_a_pooler_leaves_no_waiter() {
    let test = "a_cancelled_wait_behind_a_pooler_leaves_no_waiter";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    let side = behind.scene.database.config();
    // With a connection beside the pooler one connection of the pool is enough.
    let keepers = [
        ("pool", behind.fresh(3)),
        (
            "side",
            behind.fresh_with(1, |builder| builder.side_connection(side, NoTls)),
        ),
    ];
    let guard = behind.keeper.advisory_lock("k").acquire().await.unwrap();
    for round in 0..4 {
        for (by, keeper) in &keepers {
            for how in ["guard", "section", "inside"] {
                let keeper = keeper.clone();
                let wait = tokio::spawn(async move {
                    let long = Duration::from_secs(60);
                    match how {
                        "guard" => drop(keeper.advisory_lock("k").wait(long).acquire().await),
                        "section" => drop(
                            keeper
                                .with_advisory_lock("k", async |_| Ok::<_, Error>(()))
                                .await,
                        ),
                        _ => drop(
                            keeper
                                .transaction(async move |tx| {
                                    tx.advisory_lock("k").wait(long).await?;
                                    Ok::<_, Error>(())
                                })
                                .await,
                        ),
                    }
                });
                let what = format!("{how} by {by}, round {round}");
                behind.scene.until_awaited("k").await;
                wait.abort();
                drop(wait.await);
                let left = format!("{what}: the waiter is left");
                let gone = async || behind.scene.waiters("k").await.is_empty();
                eventually(&left, gone).await;
                // The holder was not hit.
                assert_eq!(
                    behind.scene.holders("k").await,
                    [guard.backend_pid().unwrap()],
                    "{what}"
                );
            }
        }
    }
    guard.execute_typed("SELECT 1", &[]).await.unwrap();
    guard.commit().await.unwrap();
    behind.nothing_left().await;
    let log = behind.bouncer.log();
    assert!(!log.contains("FATAL"), "{log}");
}

/// The connection to cancel with is asked in vain; the pool has another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_side_connection_does_not_keep_anything_running_behind_a_pooler() {
    let test = "a_silent_side_connection_does_not_keep_anything_running_behind_a_pooler";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut side = lockkeeper::tokio_postgres::Config::new();
    let port = silent.local_addr().unwrap().port();
    side.host("127.0.0.1").port(port).user("nobody");
    let keeper = behind.fresh_with(4, |builder| builder.side_connection(side, NoTls));

    // A wait for a lock.
    let guard = behind.keeper.advisory_lock("k").acquire().await.unwrap();
    let waiting = keeper.clone();
    let wait = tokio::spawn(async move {
        let body = async |tx: &mut Tx| tx.advisory_lock("k").wait(Duration::from_secs(60)).await;
        waiting.transaction(body).await
    });
    behind.scene.until_awaited("k").await;
    wait.abort();
    drop(wait.await);
    let gone = async || behind.scene.waiters("k").await.is_empty();
    eventually("the waiter is left", gone).await;
    guard.commit().await.unwrap();

    // A statement of the caller's, under a lock.
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    let sleep = guard.batch_execute("SELECT pg_sleep(60)");
    let sleep = tokio::time::timeout(Duration::from_millis(100), sleep);
    assert!(sleep.await.is_err());
    drop(guard);
    let free = async || !behind.scene.is_held("k").await;
    eventually("held after the drop", free).await;
    behind.nothing_left().await;
    drop(silent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_guard_behind_a_pooler_frees_its_key() {
    let test = "dropping_a_guard_behind_a_pooler_frees_its_key";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &[]).await else {
        return;
    };
    for what in ["idle", "failed", "asleep", "dropped query"] {
        let guard = behind.keeper.advisory_lock("k").acquire().await.unwrap();
        let pid = guard.backend_pid().unwrap();
        match what {
            "failed" => assert!(guard.batch_execute("SELECT 1/0").await.is_err()),
            "asleep" => {
                let sleep = guard.batch_execute("SELECT pg_sleep(60)");
                let sleep = tokio::time::timeout(Duration::from_millis(100), sleep);
                assert!(sleep.await.is_err());
            }
            "dropped query" => {
                let query = guard.query("SELECT pg_sleep(0.05)", &[]);
                assert!(poll_times_and_drop(query, 1).await.is_none());
            }
            _ => {}
        }
        // A failed transaction has lost its locks already.
        if what != "failed" {
            assert_eq!(behind.scene.holders("k").await, [pid], "{what}");
        }
        drop(guard);
        let left = format!("{what}: held after the drop");
        let free = async || !behind.scene.is_held("k").await;
        // A cancel behind a pooler may have to wait for a connection, twice.
        eventually_within(CLEANED_UP_WITHIN, &left, free).await;
    }
    behind.nothing_left().await;
}

/// Where the one backend is taken, a wait stands in the pooler's queue, where no `lock_timeout` counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_in_the_poolers_own_queue_ends_in_time() {
    let test = "a_wait_in_the_poolers_own_queue_ends_in_time";
    let one = [("default_pool_size", "1")];
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &one).await else {
        return;
    };
    let guard = behind.keeper.advisory_lock("k").acquire().await.unwrap();
    for key in ["k", "free"] {
        let started = Instant::now();
        let wait = Duration::from_millis(200);
        let lock = behind.keeper.advisory_lock(key).wait(wait);
        let error = in_time(key, lock.acquire()).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(5), "{error}");
        assert_eq!(error.key().unwrap().name(), Some(key));
        assert_error(
            &error,
            ErrorKind::ConnectionLost,
            "no answer from the server after",
        );
    }
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    guard.commit().await.unwrap();
    behind.nothing_left().await;
    behind
        .keeper
        .with_advisory_lock("k", async |_| Ok::<_, Error>(()))
        .await
        .unwrap();
    behind.nothing_left().await;
}

/// With one backend for all, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_share_one_backend() {
    let test = "many_tasks_share_one_backend";
    let one = [("default_pool_size", "1")];
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 8, &one).await else {
        return;
    };
    let done = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..24)
        .map(|n| {
            let (keeper, done) = (behind.keeper.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let section = async move |tx: &mut Tx| {
                    tx.batch_execute("SELECT pg_sleep(0.001)").await?;
                    done.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, Error>(())
                };
                if n % 2 == 0 {
                    keeper.transaction(section).await
                } else {
                    keeper.with_advisory_lock("k", section).await
                }
            })
        })
        .collect();
    for task in tasks {
        in_time("section", task).await.unwrap().unwrap();
    }
    assert_eq!(done.load(Ordering::Relaxed), 24);
    behind.nothing_left().await;
}

/// What cannot run in a transaction needs settings of the session, which the pooler would give to another client: none is
/// left, not by what is refused either.
#[tokio::test]
async fn schema_changes_in_transactions_work_and_others_leave_no_setting() {
    let Some(behind) = BouncerScene::new("schema_changes", PoolMode::Transaction, 3, &[]).await
    else {
        return;
    };
    let schema = behind.keeper.schema();
    schema.change("CREATE TABLE t (a int)").await.unwrap();
    let settings = "SELECT current_setting('lock_timeout'), current_setting('statement_timeout'), current_setting('application_name')";
    let all = async || {
        let client = behind.pool.get().await.unwrap();
        let reply = client.simple_query(settings).await.unwrap();
        let row = reply.iter().find_map(|message| match message {
            lockkeeper::tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let row = row.unwrap();
        [0, 1, 2].map(|n| row.get(n).map(str::to_owned))
    };
    let before = all().await;
    for refused in [
        schema.change("VACUUM t").await.map(drop),
        schema.create_index("t", ["a"]).await.map(drop),
    ] {
        let error = refused.unwrap_err();
        assert_error(
            &error,
            ErrorKind::TransactionPooler,
            "cannot run in a transaction",
        );
    }
    assert_eq!(all().await, before);
    schema.change("ALTER TABLE t ADD b int").await.unwrap();
    assert_eq!(all().await, before);
    behind.nothing_left().await;
}
