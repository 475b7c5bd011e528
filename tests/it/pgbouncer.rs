//! Through PgBouncer: what works in transaction mode works in full, and what cannot work is refused, never shared.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::tokio_postgres::{IsolationLevel, NoTls};
use lockkeeper::{Error, ErrorKind, Keeper, KeeperBuilder, SessionGuard, Tx};
use lockkeeper_testkit::{
    BouncerScene, CLEANED_UP_WITHIN, GIVE_UP_AFTER, PoolMode, Scene, eventually, eventually_within,
    in_time, poll_times_and_drop, until_pooler_is_known,
};
use tokio::task::JoinHandle;

/// Keeps the pooler's backends busy from several clients until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<u32>>,
}

impl Load {
    fn start(behind: &BouncerScene, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let pool = behind.bouncer.pool(clients);
        let tasks = (0..clients)
            .map(|n| {
                let (stop, pool) = (Arc::clone(&stop), pool.clone());
                tokio::spawn(async move {
                    let mut statements = 0;
                    let mut client = pool.get().await.unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        let sleep = format!("SELECT pg_sleep(0.00{})", n % 3);
                        match client.batch_execute(&sleep).await {
                            Ok(()) => statements += 1,
                            // Its backend may have been ended.
                            Err(_) => client = pool.get().await.unwrap(),
                        }
                    }
                    statements
                })
            })
            .collect();
        Self { stop, tasks }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            assert!(task.await.unwrap() > 0, "no load");
        }
    }
}

// Transaction mode: what works.

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
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
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
            name.starts_with("behind ") && name.contains("pgbouncer.rs:"),
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
    // A wait inside of a transaction has slices of twice that long: what has left before was cancelled.
    let name = behind.scene.database.name();
    let set = format!("ALTER DATABASE {name} SET deadlock_timeout = '30s'");
    behind.scene.observer.batch_execute(&set).await.unwrap();
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
                let none = format!("{what}: nobody waits");
                let waits = async || !behind.scene.waiters("k").await.is_empty();
                eventually(&none, waits).await;
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
    let waits = async || !behind.scene.waiters("k").await.is_empty();
    eventually("nobody waits", waits).await;
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
        assert!(
            error.is_retryable() || error.kind() == ErrorKind::Pool,
            "{error}"
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

// Transaction mode: what is refused.

/// Asks for session locks in each way there is; `what` says where.
async fn refused(behind: &BouncerScene, what: &str, pool_size: usize) -> Vec<String> {
    let session = |guard| Granted::Session(Box::new(guard));
    let mut wrong = Vec::new();
    for way in [
        "session",
        "try session",
        "several",
        "shared",
        "repeatable read",
        "try serializable",
    ] {
        // A new one each time: what a keeper has found out it need not find out again.
        let keeper = behind.fresh(pool_size);
        let one = || keeper.advisory_lock("k").wait(Duration::from_secs(2));
        let asked = async {
            match way {
                "session" => one().session().acquire().await.map(session),
                "shared" => one().shared().session().acquire().await.map(session),
                "try session" => {
                    let tried = one().session().try_acquire().await?;
                    Ok(tried.map_or(Granted::Busy, session))
                }
                "several" => {
                    let several = keeper.advisory_locks(["k", "l"]).session().acquire();
                    several.await.map(session)
                }
                "repeatable read" => {
                    let lock = one().isolation(IsolationLevel::RepeatableRead);
                    lock.acquire().await.map(|_| Granted::Snapshot)
                }
                _ => {
                    let lock = one().isolation(IsolationLevel::Serializable);
                    Ok(lock
                        .try_acquire()
                        .await?
                        .map_or(Granted::Busy, |_| Granted::Snapshot))
                }
            }
        };
        let started = Instant::now();
        match tokio::time::timeout(GIVE_UP_AFTER, asked).await {
            Err(_) => {
                wrong.push(format!("{what}, {way}: no end within {GIVE_UP_AFTER:?}"));
                return wrong;
            }
            Ok(Ok(granted)) => {
                let shared = match granted {
                    Granted::Session(guard) => is_shared(&behind.scene, *guard).await,
                    Granted::Busy | Granted::Snapshot => String::new(),
                };
                wrong.push(format!("{what}, {way}: granted {shared}"));
            }
            Ok(Err(error)) => {
                if error.kind() != ErrorKind::TransactionPooler {
                    wrong.push(format!("{what}, {way}: {error:?}"));
                } else if error.key().and_then(|key| key.name()).is_none() {
                    wrong.push(format!("{what}, {way}: does not say which key: {error}"));
                } else if error.is_retryable() {
                    wrong.push(format!("{what}, {way}: retryable: {error}"));
                }
                if started.elapsed() > Duration::from_secs(5) {
                    wrong.push(format!(
                        "{what}, {way}: refused after {:?}",
                        started.elapsed()
                    ));
                }
            }
        }
        // Whatever came of it, it is over. What is not is ended, so that the next one starts afresh.
        let started = Instant::now();
        while behind.scene.advisory_locks().await > 0 {
            if started.elapsed() > Duration::from_secs(2) {
                wrong.push(format!("{what}, {way}: an advisory lock is left behind"));
                end_backends(&behind.scene).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    wrong
}

enum Granted {
    Session(Box<SessionGuard>),
    Snapshot,
    Busy,
}

/// Ends all backends of the database but the observer's.
async fn end_backends(scene: &Scene) {
    scene
        .run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        .await;
}

/// What a session guard is worth that should not have been granted.
async fn is_shared(scene: &Scene, guard: SessionGuard) -> String {
    let held = scene.holders("k").await;
    let asked = guard.query_typed("SELECT pg_backend_pid()", &[]);
    let answers = match asked.await {
        Ok(rows) => rows[0].get::<_, i32>(0),
        Err(error) => return format!("and lost: {error:?}"),
    };
    let release = guard.release().await.err().map(|error| error.to_string());
    format!("held by {held:?}, {answers} answers, release: {release:?}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_locks_are_refused_behind_an_idle_transaction_pooler() {
    let test = "session_locks_are_refused_behind_an_idle_transaction_pooler";
    for backends in [1, 2, 3, 20] {
        let size = backends.to_string();
        let settings = [("default_pool_size", size.as_str())];
        let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &settings).await
        else {
            return;
        };
        let what = format!("{backends} backends, one open");
        let mut wrong = refused(&behind, &what, 4).await;
        behind.open_backends(backends).await;
        let what = format!("{backends} backends, all open");
        wrong.extend(refused(&behind, &what, 4).await);
        assert!(wrong.is_empty(), "{wrong:#?}");
        behind.nothing_left().await;
    }
}

/// By turns: a client that asks twice is answered by two backends, and two clients can meet the same ones again and
/// again without ever meeting on one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_locks_are_refused_behind_a_transaction_pooler_that_takes_turns() {
    let test = "session_locks_are_refused_behind_a_transaction_pooler_that_takes_turns";
    for backends in [1, 2, 3, 4, 20] {
        let size = backends.to_string();
        let settings = [
            ("default_pool_size", size.as_str()),
            ("server_round_robin", "1"),
        ];
        let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &settings).await
        else {
            return;
        };
        behind.open_backends(backends).await;
        let what = format!("{backends} backends by turns");
        let wrong = refused(&behind, &what, 4).await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        behind.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_locks_are_refused_behind_a_busy_transaction_pooler() {
    let test = "session_locks_are_refused_behind_a_busy_transaction_pooler";
    for (backends, clients) in [("1", 3), ("2", 4), ("4", 6), ("20", 8)] {
        for turns in ["0", "1"] {
            let settings = [
                ("default_pool_size", backends),
                ("server_round_robin", turns),
            ];
            let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &settings).await
            else {
                return;
            };
            let load = Load::start(&behind, clients);
            let mut wrong = Vec::new();
            let what = format!("{backends} backends, {clients} clients, round robin {turns}");
            for _ in 0..3 {
                wrong.extend(refused(&behind, &what, 4).await);
            }
            load.stop().await;
            assert!(wrong.is_empty(), "{wrong:#?}");
            behind.nothing_left().await;
        }
    }
}

/// Without a second connection nothing can be proven, so nothing is granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_locks_are_refused_behind_a_pooler_with_one_connection_in_the_pool() {
    let test = "session_locks_are_refused_behind_a_pooler_with_one_connection_in_the_pool";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &[]).await else {
        return;
    };
    let wrong = refused(&behind, "a pool of one", 1).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    behind.nothing_left().await;
}

/// One keeper asked by many tasks at once: whatever it grants, it grants to one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_lock_is_never_shared_behind_a_transaction_pooler() {
    let test = "a_session_lock_is_never_shared_behind_a_transaction_pooler";
    for (backends, turns) in [("1", "0"), ("2", "0"), ("2", "1"), ("20", "1")] {
        let settings = [
            ("default_pool_size", backends),
            ("server_round_robin", turns),
        ];
        let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &settings).await
        else {
            return;
        };
        let (inside, worst) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let keepers = [behind.fresh(8), behind.fresh(8)];
        let tasks: Vec<_> = (0..16)
            .map(|n| {
                let keeper = keepers[n % 2].clone();
                let (inside, worst) = (Arc::clone(&inside), Arc::clone(&worst));
                tokio::spawn(async move {
                    let lock = keeper.advisory_lock("k").wait(Duration::from_secs(1));
                    match lock.session().acquire().await {
                        Ok(guard) => {
                            let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                            worst.fetch_max(now, Ordering::SeqCst);
                            tokio::time::sleep(Duration::from_millis(20)).await;
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(guard);
                            None
                        }
                        Err(error) => Some(error),
                    }
                })
            })
            .collect();
        let mut refusals = 0;
        for task in tasks {
            let error = in_time("a task", task).await.unwrap();
            refusals += u32::from(error.is_some_and(|e| e.kind() == ErrorKind::TransactionPooler));
        }
        let worst = worst.load(Ordering::SeqCst);
        assert!(
            worst <= 1,
            "{backends} backends, round robin {turns}: {worst} holders"
        );
        assert!(
            refusals > 0,
            "{backends} backends, round robin {turns}: none was refused"
        );
        behind.nothing_left().await;
    }
}

// Session mode.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_guards_work_behind_a_session_pooler() {
    let test = "session_guards_work_behind_a_session_pooler";
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 4, &[]).await else {
        return;
    };
    behind
        .scene
        .observer
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    let (a, b) = (&behind.keeper, behind.fresh(4));
    until_pooler_is_known(a).await;
    until_pooler_is_known(&b).await;
    let mut guard = a.advisory_lock("k").session().acquire().await.unwrap();
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    let busy = b.advisory_lock("k").session().try_acquire().await.unwrap();
    assert!(busy.is_none());
    let error = b
        .advisory_lock("k")
        .wait(Duration::from_millis(30))
        .session()
        .acquire()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout);
    assert_eq!(error.blockers()[0].pid(), guard.backend_pid());
    guard
        .transaction(async |tx| {
            tx.batch_execute("INSERT INTO t VALUES (1)").await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(behind.scene.is_held("k").await);

    // A waiter gets it when it is released, a dropped one leaves.
    let dropped = tokio::spawn({
        let b = b.clone();
        async move {
            let lock = b.advisory_lock("k").wait(Duration::from_secs(60));
            lock.session().acquire().await
        }
    });
    let waits = async || !behind.scene.waiters("k").await.is_empty();
    eventually("nobody waits", waits).await;
    dropped.abort();
    drop(dropped.await);
    let gone = async || behind.scene.waiters("k").await.is_empty();
    eventually("the waiter is left", gone).await;
    let waiter = tokio::spawn({
        let b = b.clone();
        async move {
            let lock = b.advisory_lock("k").wait(Duration::from_secs(60));
            lock.session().acquire().await
        }
    });
    eventually("nobody waits", waits).await;
    guard.release().await.unwrap();
    let guard = waiter.await.unwrap().unwrap();
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    drop(guard);
    let free = async || !behind.scene.is_held("k").await;
    eventually("held after the drop", free).await;
    behind.nothing_left().await;

    let several = a.advisory_locks(["k", "l"]).session().acquire().await;
    let several = several.unwrap();
    assert_eq!(behind.scene.advisory_locks().await, 2);
    several.release().await.unwrap();
    let lock = a
        .advisory_lock("k")
        .isolation(IsolationLevel::RepeatableRead);
    let guard = lock.acquire().await.unwrap();
    assert!(b.advisory_lock("k").try_acquire().await.unwrap().is_none());
    guard.commit().await.unwrap();
    behind.nothing_left().await;
}

/// A session pooler with one backend: the second client waits for the first one to leave, so nothing can be compared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_pooler_without_a_second_backend_does_not_hang_a_session_lock() {
    let test = "a_session_pooler_without_a_second_backend_does_not_hang_a_session_lock";
    let one = [("default_pool_size", "1")];
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 2, &one).await else {
        return;
    };
    let keeper = behind.fresh(2);
    let lock = keeper.advisory_lock("k").wait(Duration::from_secs(1));
    match in_time("a session lock", lock.session().acquire()).await {
        Ok(guard) => guard.release().await.unwrap(),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::TransactionPooler, "{error:?}");
            assert_eq!(error.key().and_then(|key| key.name()), Some("k"), "{error}");
        }
    }
    drop(keeper);
    behind.scene.nothing_left().await;
}

// Statement mode.

/// PgBouncer refuses transactions there; what cannot be had is an error, with the pooler's words behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_statement_mode_everything_fails_clearly_and_leaks_nothing() {
    let test = "in_statement_mode_everything_fails_clearly_and_leaks_nothing";
    let Some(behind) = BouncerScene::new(test, PoolMode::Statement, 4, &[]).await else {
        return;
    };
    behind
        .scene
        .observer
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    let mut wrong = Vec::new();
    for way in [
        "transaction",
        "with",
        "guard",
        "try",
        "several",
        "session",
        "several session",
        "snapshot",
    ] {
        let keeper = behind.fresh(4);
        let body = async |tx: &mut Tx| {
            tx.batch_execute("INSERT INTO t VALUES (1)").await?;
            Ok::<_, Error>(())
        };
        let one = || keeper.advisory_lock("k").wait(Duration::from_secs(1));
        let several = || {
            keeper
                .advisory_locks(["k", "l"])
                .wait(Duration::from_secs(1))
        };
        let asked = async {
            match way {
                "transaction" => keeper.transaction(body).await,
                "with" => keeper.with_advisory_lock("k", body).await,
                "guard" => one().acquire().await.map(drop),
                "try" => one().try_acquire().await.map(drop),
                "several" => several().acquire().await.map(drop),
                "session" => one().session().acquire().await.map(drop),
                "several session" => several().session().acquire().await.map(drop),
                _ => {
                    let lock = one().isolation(IsolationLevel::RepeatableRead);
                    lock.acquire().await.map(drop)
                }
            }
        };
        match in_time(way, asked).await {
            Ok(()) => wrong.push(format!("{way}: granted")),
            Err(error) => {
                let mut text = error.to_string();
                let mut next = std::error::Error::source(&error);
                while let Some(source) = next {
                    text = format!("{text}: {source}");
                    next = source.source();
                }
                if !text.contains("pool") {
                    wrong.push(format!("{way}: does not say why: {text}"));
                }
            }
        }
        behind.scene.nothing_left().await;
    }
    let row = behind
        .scene
        .observer
        .query_one("SELECT count(*) FROM t", &[]);
    assert_eq!(row.await.unwrap().get::<_, i64>(0), 0);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What cannot run in a transaction needs settings of the session, which the pooler would give to somebody else: none is
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
        assert_eq!(error.kind(), ErrorKind::TransactionPooler, "{error}");
    }
    assert_eq!(all().await, before);
    schema.change("ALTER TABLE t ADD b int").await.unwrap();
    assert_eq!(all().await, before);
    behind.nothing_left().await;
}
