//! Session locks are refused in transaction mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::tokio_postgres::IsolationLevel;
use lockkeeper::{ErrorKind, SessionGuard};
use lockkeeper_testkit::{
    BouncerScene, GIVE_UP_AFTER, PoolMode, Scene, assert_error, eventually, in_time,
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
                            // The time itself is what is tested: another holder would be seen in it.
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
            match error {
                Some(error) if error.kind() == ErrorKind::TransactionPooler => refusals += 1,
                Some(error) => assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#),
                None => {}
            }
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

/// However short the wait: who asks again after a timeout would ask for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_session_lock_never_looks_like_a_timeout() {
    let test = "a_refused_session_lock_never_looks_like_a_timeout";
    for backends in ["1", "2", "20"] {
        let settings = [("default_pool_size", backends)];
        let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &settings).await
        else {
            return;
        };
        let keeper = behind.fresh(8);
        // A first answer may be that nothing could be found out in time.
        let known = async || {
            let first = keeper.advisory_lock("first").session().acquire().await;
            first.is_err_and(|error| error.to_string().contains("to several clients"))
        };
        eventually("the pooler is not known", known).await;
        let tasks: Vec<_> = (0..300)
            .map(|n: u64| {
                let keeper = keeper.clone();
                tokio::spawn(async move {
                    let wait = Duration::from_millis(n % 40);
                    let key = format!("k{}", n % 7);
                    let lock = keeper.advisory_lock(key.as_str()).wait(wait);
                    lock.session().acquire().await.unwrap_err()
                })
            })
            .collect();
        let mut others = Vec::new();
        for task in tasks {
            let error = in_time("a task", task).await.unwrap();
            if error.kind() != ErrorKind::TransactionPooler {
                others.push(error.to_string());
            }
        }
        assert!(
            others.is_empty(),
            "{backends} backends: {} of 300: {:?}",
            others.len(),
            others.first()
        );
        behind.nothing_left().await;
    }
}
