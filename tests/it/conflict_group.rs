//! Conflict groups: all of a group side by side, until one of them has lost twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::deadpool_postgres::Pool;
use lockkeeper::{AdvisoryMode, Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, PoolMode, Proxy, Scene, assert_error, assert_error_in, eventually, in_time,
    poll_times_and_drop, raise, until_true,
};
use tokio::sync::{Barrier, Notify};
use tokio_postgres::IsolationLevel;

const GROUP: i64 = 81;

const LEVELS: [Option<IsolationLevel>; 4] = [
    None,
    Some(IsolationLevel::ReadCommitted),
    Some(IsolationLevel::RepeatableRead),
    Some(IsolationLevel::Serializable),
];

fn grouped(level: Option<IsolationLevel>) -> TransactionOptions {
    let options = TransactionOptions::new().conflict_group(GROUP);
    match level {
        Some(level) => options.isolation(level),
        None => options,
    }
}

/// How the group's lock is held by this transaction: `ShareLock` or `ExclusiveLock`, each as often as there is one.
async fn held(tx: &Tx) -> Result<Vec<String>, Error> {
    let sql = "SELECT mode FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted";
    let rows = tx.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_run_side_by_side() {
    for level in LEVELS {
        let scene = Scene::with_two_rows(4).await;
        let met = Arc::new(Barrier::new(4));
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let (keeper, met) = (scene.keeper.clone(), Arc::clone(&met));
                tokio::spawn(async move {
                    keeper
                        .transaction_with(grouped(level), async move |tx| {
                            assert_eq!(held(tx).await?, ["ShareLock"]);
                            assert_eq!(tx.held_keys().count(), 1);
                            // Not before all of them are here.
                            met.wait().await;
                            Ok::<_, Error>(())
                        })
                        .await
                })
            })
            .collect();
        for task in tasks {
            in_time("they do not run side by side", task)
                .await
                .unwrap()
                .unwrap();
        }
        scene.nothing_left().await;
    }
}

/// The lock rides in the message that begins the transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_costs_no_message_more() {
    let scene = Scene::with_two_rows(1).await;
    let proxy = Proxy::before(scene.database.server());
    let keeper = Keeper::builder(proxy.pool(&scene.database.config(), 1))
        .watch(false)
        .build();
    for level in LEVELS {
        let mut messages = Vec::new();
        for options in [grouped(level).conflict_group(GROUP), {
            let options = TransactionOptions::new();
            match level {
                Some(level) => options.isolation(level),
                None => options,
            }
        }] {
            for warm in [true, true, true, false] {
                drop(proxy.heard());
                let transaction = keeper.transaction_with(options.clone(), async |tx| {
                    tx.batch_execute("SELECT 'body'").await?;
                    Ok::<_, Error>(())
                });
                transaction.await.unwrap();
                if !warm {
                    messages.push(proxy.heard());
                }
            }
        }
        let [(grouped, flights), (plain, plain_flights)] = &messages[..] else {
            panic!("{messages:?}")
        };
        assert_eq!(grouped.len(), 3, "{grouped:#?}");
        assert_eq!(grouped.len(), plain.len());
        assert_eq!((*flights, *plain_flights), (3, 3));
        assert!(grouped[0].starts_with("BEGIN"), "{grouped:#?}");
    }
}

/// How many others of the group run, and whether one of them ran beside a member that should be alone.
#[derive(Default)]
struct Watch {
    running: AtomicU32,
    alone: AtomicBool,
    met: AtomicU32,
}

impl Watch {
    /// An ordinary member, for a while.
    async fn beside(&self, tx: &Tx, millis: u64) -> Result<(), Error> {
        self.running.fetch_add(1, Ordering::SeqCst);
        let running = scopeguard::guard((), |()| {
            self.running.fetch_sub(1, Ordering::SeqCst);
        });
        if self.alone.load(Ordering::SeqCst) {
            self.met.fetch_add(1, Ordering::SeqCst);
        }
        tx.execute(&format!("SELECT pg_sleep(0.{millis:03})"), &[])
            .await?;
        if self.alone.load(Ordering::SeqCst) {
            self.met.fetch_add(1, Ordering::SeqCst);
        }
        drop(running);
        Ok(())
    }

    /// One that must be alone, for a while.
    async fn alone(&self) {
        self.alone.store(true, Ordering::SeqCst);
        let alone = scopeguard::guard((), |()| self.alone.store(false, Ordering::SeqCst));
        for _ in 0..10 {
            self.met
                .fetch_add(self.running.load(Ordering::SeqCst), Ordering::SeqCst);
            // The time itself is what is tested: another member would be seen in it.
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        drop(alone);
    }
}

/// What a transaction does at its first runs to be a deadlock's victim.
async fn loses(tx: &Tx, run: u32) -> Result<(), Error> {
    if run < 2 {
        tx.batch_execute(&raise("40P01")).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_been_a_victim_twice_runs_alone() {
    for level in LEVELS {
        let scene = Scene::with_two_rows(6).await;
        let watch = Arc::new(Watch::default());
        let stop = Arc::new(AtomicBool::new(false));
        let members: Vec<_> = (0..4)
            .map(|_| {
                let (keeper, watch, stop) =
                    (scene.keeper.clone(), Arc::clone(&watch), Arc::clone(&stop));
                tokio::spawn(async move {
                    let mut times = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let watch = Arc::clone(&watch);
                        keeper
                            .transaction_with(grouped(level), async move |tx| {
                                assert_eq!(held(tx).await?, ["ShareLock"]);
                                watch.beside(tx, 10).await
                            })
                            .await
                            .unwrap();
                        times += 1;
                    }
                    times
                })
            })
            .collect();
        for _ in 0..3 {
            let runs = AtomicU32::new(0);
            let modes = scene
                .keeper
                .transaction_with(grouped(level), async |tx| {
                    let run = runs.fetch_add(1, Ordering::Relaxed);
                    let modes = held(tx).await?;
                    if run < 2 {
                        assert_eq!(modes, ["ShareLock"]);
                    }
                    loses(tx, run).await?;
                    watch.alone().await;
                    Ok::<_, Error>(modes)
                })
                .await
                .unwrap();
            // Nothing of the session lock is left that a snapshot is taken under.
            assert_eq!(modes, ["ExclusiveLock"], "{level:?}");
            assert_eq!(runs.load(Ordering::Relaxed), 3);
        }
        stop.store(true, Ordering::Relaxed);
        for member in members {
            assert!(member.await.unwrap() > 0, "others did not run at all");
        }
        assert_eq!(watch.met.load(Ordering::Relaxed), 0, "{level:?}: not alone");
        scene.nothing_left().await;
    }
}

/// Only deadlocks make a victim.
#[tokio::test]
async fn other_failures_do_not_count() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU32::new(0);
    scene
        .keeper
        .transaction_with(grouped(None).attempts(8), async |tx| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            let codes = ["40001", "55P03", "40P01", "40001", "40P01", "40001"];
            let mode = if run < 5 {
                "ShareLock"
            } else {
                "ExclusiveLock"
            };
            assert_eq!(held(tx).await?, [mode], "run {run}");
            if let Some(code) = codes.get(run as usize) {
                tx.batch_execute(&raise(code)).await?;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(runs.load(Ordering::Relaxed), 7);
    scene.nothing_left().await;
}

/// Waits until so many sessions hold the group's lock, or wait for it.
async fn until_group(scene: &Scene, granted: bool, count: i64) {
    let sql = "SELECT count(*) >= $3 FROM pg_locks WHERE locktype = 'advisory' AND classid = 0 AND objid = $1 \
               AND granted = $2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let what = format!("not {count} sessions with granted = {granted}");
    let group = u32::try_from(GROUP).unwrap();
    until_true(&scene.observer, &what, sql, &[&group, &granted, &count]).await;
}

/// Waits until a session waits for the group's lock.
async fn locked_out(scene: &Scene) {
    until_group(scene, false, 1).await;
}

/// A transaction that begins to wait before all others it meets is the victim each time: the server ends the session
/// whose check finds the deadlock first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_would_lose_each_time_loses_twice_in_a_group() {
    for in_group in [false, true] {
        let scene = Scene::with_two_rows(4).await;
        let options = || {
            if in_group {
                grouped(None)
            } else {
                TransactionOptions::new()
            }
        };
        let stop = AtomicBool::new(false);
        // The loser holds row 1; the other one holds row 2; the loser waits, and then the other one.
        let (holds, ready, over) = (Notify::new(), Notify::new(), Notify::new());
        let (runs, loser_pid) = (AtomicU32::new(0), AtomicI32::new(0));
        let loser = async {
            let answer = scene
                .keeper
                .transaction_with(options(), async |tx| {
                    if runs.fetch_add(1, Ordering::Relaxed) > 0 {
                        // A row that was let go can be taken again before who waits for it has it.
                        over.notified().await;
                    }
                    loser_pid.store(tx.backend_pid().unwrap(), Ordering::Relaxed);
                    // When its check runs, the other one waits too.
                    tx.batch_execute("SET LOCAL deadlock_timeout = '2s'")
                        .await?;
                    tx.execute("UPDATE t SET n = n + 1 WHERE id = 1", &[])
                        .await?;
                    holds.notify_one();
                    tokio::select! {
                        () = ready.notified() => {}
                        // While it is alone, no other member comes.
                        () = locked_out(&scene) => {}
                    }
                    tx.execute("UPDATE t SET n = n + 1 WHERE id = 2", &[])
                        .await?;
                    Ok::<_, Error>(())
                })
                .await;
            stop.store(true, Ordering::Relaxed);
            holds.notify_one();
            answer
        };
        let others = async {
            loop {
                holds.notified().await;
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let survives = scene.keeper.transaction_with(options(), async |tx| {
                    tx.batch_execute("SET LOCAL deadlock_timeout = '1min'")
                        .await?;
                    tx.execute("UPDATE t SET n = n + 1 WHERE id = 2", &[])
                        .await?;
                    ready.notify_one();
                    let started = Instant::now();
                    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = $1";
                    let pid = loser_pid.load(Ordering::Relaxed);
                    while started.elapsed() < GIVE_UP_AFTER {
                        let row = scene.observer.query_one(waits, &[&pid]).await?;
                        if row.get::<_, i64>(0) > 0 {
                            break;
                        }
                    }
                    tx.execute("UPDATE t SET n = n + 1 WHERE id = 1", &[])
                        .await?;
                    Ok::<_, Error>(())
                });
                // In the group the last of them meets no other transaction, and waits for none.
                tokio::select! {
                    answer = survives => {
                        answer.unwrap();
                        over.notify_one();
                    }
                    () = async { while !stop.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    } } => {}
                }
            }
        };
        let (answer, ()) = tokio::join!(loser, others);
        if in_group {
            answer.unwrap();
            assert_eq!(runs.load(Ordering::Relaxed), 3);
        } else {
            let error = answer.expect_err("the test did not show what it should");
            assert_error(
                &error,
                ErrorKind::RetriesExhausted,
                "5 attempts (SQLSTATE 40P01)",
            );
            assert_eq!(error.sqlstate().map(|state| state.code()), Some("40P01"));
            assert_eq!(runs.load(Ordering::Relaxed), 5);
        }
        scene.nothing_left().await;
    }
}

/// Others come and go all the time, each for longer than one wait at the server may take: who is to run alone gets its
/// turn all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_is_to_run_alone_is_not_starved() {
    for level in [None, Some(IsolationLevel::Serializable)] {
        let scene = Scene::with_two_rows(12).await;
        // As other processes would.
        let keepers: Vec<_> = (0..8).map(|_| Keeper::new(scene.pool.clone())).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let watch = Arc::new(Watch::default());
        let members: Vec<_> = keepers
            .into_iter()
            .map(|keeper| {
                let (watch, stop) = (Arc::clone(&watch), Arc::clone(&stop));
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let watch = Arc::clone(&watch);
                        keeper
                            .transaction_with(grouped(level), async move |tx| {
                                watch.beside(tx, 120).await
                            })
                            .await
                            .unwrap();
                    }
                })
            })
            .collect();
        eventually("no load", async || {
            watch.running.load(Ordering::Relaxed) > 4
        })
        .await;
        let started = Instant::now();
        let runs = AtomicU32::new(0);
        let answer = scene
            .keeper
            .transaction_with(grouped(level), async |tx| {
                let run = runs.fetch_add(1, Ordering::Relaxed);
                loses(tx, run).await?;
                watch.alone().await;
                Ok::<_, Error>(())
            })
            .await;
        let took = started.elapsed();
        stop.store(true, Ordering::Relaxed);
        for member in members {
            member.await.unwrap();
        }
        answer.unwrap();
        assert_eq!(watch.met.load(Ordering::Relaxed), 0, "not alone");
        assert!(took < Duration::from_secs(30), "{took:?}");
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn the_lock_ends_with_its_transaction() {
    let scene = Scene::with_two_rows(2).await;
    for lost in [0, 2] {
        for way in ["commit", "error", "server", "panic", "drop", "retry"] {
            let runs = Arc::new(AtomicU32::new(0));
            let (keeper, counter) = (scene.keeper.clone(), Arc::clone(&runs));
            let task = tokio::spawn(async move {
                keeper
                    .transaction_with(grouped(None), async move |tx| {
                        let run = counter.fetch_add(1, Ordering::Relaxed);
                        if run < lost {
                            loses(tx, run).await?;
                        }
                        match way {
                            "error" => drop(tx.query_one("SELECT 1 WHERE false", &[]).await?),
                            "server" => tx.batch_execute("SELECT 1/0").await?,
                            "panic" => assert!(tx.backend_pid().is_none(), "on purpose"),
                            "drop" => std::future::pending().await,
                            "retry" if run == lost => tx.batch_execute(&raise("40001")).await?,
                            _ => {}
                        }
                        Ok::<_, Error>(())
                    })
                    .await
            });
            if way == "drop" {
                let began = async || runs.load(Ordering::Relaxed) > lost;
                eventually("it does not begin", began).await;
                assert!(scene.is_held(GROUP).await);
                task.abort();
            }
            let answer = task.await;
            let good = matches!(way, "commit" | "retry");
            assert_eq!(matches!(answer, Ok(Ok(()))), good, "{way}: {answer:?}");
            scene.nothing_left().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_groups_own_lock_is_waited_for_as_long_as_the_keeper_says() {
    let wait = Duration::from_millis(300);
    let scene = Scene::with(2, |builder| builder.lock_wait(wait)).await;
    scene
        .observer
        .batch_execute(&format!("SELECT pg_advisory_lock({GROUP})"))
        .await
        .unwrap();
    for level in LEVELS {
        for options in [
            grouped(level),
            // Its own timeouts are for its statements.
            grouped(level).lock_timeout(Duration::from_millis(1)),
            grouped(level).statement_timeout(Duration::from_millis(200)),
        ] {
            let runs = AtomicU32::new(0);
            let started = Instant::now();
            let error = scene
                .keeper
                .transaction_with(options.clone(), async |_| {
                    runs.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, Error>(())
                })
                .await
                .unwrap_err();
            let what = format!("{options:?}: {error}");
            assert_error_in(&what, &error, ErrorKind::LockTimeout, "holds ExclusiveLock");
            assert!(started.elapsed() >= wait, "{what}");
            assert!(started.elapsed() < Duration::from_secs(5), "{what}");
            assert_eq!(error.key().and_then(|key| key.as_i64()), Some(GROUP));
            assert_eq!(error.blockers().len(), 1, "{what}");
            assert_eq!(runs.load(Ordering::Relaxed), 0);
            // It was never run.
            assert_eq!(error.attempts(), 0, "{what}");
        }
    }
    // And what is set for the statements is set.
    scene
        .observer
        .batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .unwrap();
    for level in LEVELS {
        for lost in [0, 2] {
            let runs = AtomicU32::new(0);
            let options = grouped(level)
                .lock_timeout(Duration::from_millis(1234))
                .statement_timeout(Duration::from_millis(5678))
                .idle_timeout(Duration::from_millis(9876));
            scene
                .keeper
                .transaction_with(options, async |tx| {
                    let run = runs.fetch_add(1, Ordering::Relaxed);
                    for (setting, value) in [
                        ("lock_timeout", "1234ms"),
                        ("statement_timeout", "5678ms"),
                        ("idle_in_transaction_session_timeout", "9876ms"),
                    ] {
                        let row = tx.query_one(&format!("SHOW {setting}"), &[]).await?;
                        assert_eq!(row.get::<_, &str>(0), value);
                    }
                    let isolation = tx.query_one("SHOW transaction_isolation", &[]).await?;
                    let isolation: &str = isolation.get(0);
                    match level {
                        Some(IsolationLevel::Serializable) => assert_eq!(isolation, "serializable"),
                        Some(IsolationLevel::RepeatableRead) => {
                            assert_eq!(isolation, "repeatable read");
                        }
                        _ => assert_eq!(isolation, "read committed"),
                    }
                    if run < lost {
                        loses(tx, run).await?;
                    }
                    Ok::<_, Error>(())
                })
                .await
                .unwrap();
            assert_eq!(runs.load(Ordering::Relaxed), lost + 1);
        }
    }
    scene.nothing_left().await;
}

/// Under a snapshot the one that runs alone must not read what was there before it was alone: it would lose again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_runs_alone_reads_what_the_others_have_committed() {
    for level in [IsolationLevel::RepeatableRead, IsolationLevel::Serializable] {
        let scene = Scene::with_two_rows(4).await;
        let runs = AtomicU32::new(0);
        let begun = Notify::new();
        let alone = scene
            .keeper
            .transaction_with(grouped(Some(level)), async |tx| {
                let run = runs.fetch_add(1, Ordering::Relaxed);
                if run == 1 {
                    begun.notify_one();
                    until_group(&scene, true, 2).await;
                }
                loses(tx, run).await?;
                tx.execute("UPDATE t SET n = n + 1 WHERE id = 1", &[])
                    .await?;
                Ok::<_, Error>(())
            });
        let other = async {
            begun.notified().await;
            scene
                .keeper
                .transaction_with(grouped(Some(level)), async |tx| {
                    tx.execute("UPDATE t SET n = n + 10 WHERE id = 1", &[])
                        .await?;
                    // Until the other one waits to be alone.
                    locked_out(&scene).await;
                    Ok::<_, Error>(())
                })
                .await
        };
        let (alone, other) = tokio::join!(alone, other);
        alone.unwrap();
        other.unwrap();
        let row = scene
            .observer
            .query_one("SELECT n FROM t WHERE id = 1", &[]);
        assert_eq!(row.await.unwrap().get::<_, i32>(0), 11);
        assert_eq!(runs.load(Ordering::Relaxed), 3, "{level:?}: lost once more");
        scene.nothing_left().await;
    }
}

/// More transactions than connections, some of which run alone: none waits for a connection that does not come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_pool_does_not_stand_still() {
    for pool_size in 1..=3 {
        for level in [None, Some(IsolationLevel::RepeatableRead)] {
            let scene = Scene::with_two_rows(pool_size).await;
            let watch = Arc::new(Watch::default());
            let tasks: Vec<_> = (0..12)
                .map(|task| {
                    let (keeper, watch) = (scene.keeper.clone(), Arc::clone(&watch));
                    tokio::spawn(async move {
                        let runs = AtomicU32::new(0);
                        keeper
                            .transaction_with(grouped(level), async |tx| {
                                let run = runs.fetch_add(1, Ordering::Relaxed);
                                if task % 3 == 0 {
                                    loses(tx, run).await?;
                                    watch.alone().await;
                                } else {
                                    watch.beside(tx, 5).await?;
                                }
                                Ok::<_, Error>(())
                            })
                            .await
                    })
                })
                .collect();
            let started = Instant::now();
            for task in tasks {
                task.await.unwrap().unwrap();
            }
            assert!(started.elapsed() < Duration::from_secs(30));
            assert_eq!(watch.met.load(Ordering::Relaxed), 0, "not alone");
            scene.nothing_left().await;
        }
    }
}

/// A lock of the caller's own is not the group's, unless it has the same key.
#[tokio::test]
async fn the_groups_key_is_held_and_cannot_be_taken_otherwise() {
    let scene = Scene::with_two_rows(1).await;
    scene
        .keeper
        .transaction_with(grouped(None), async |tx| {
            let keys: Vec<_> = tx.held_keys().cloned().collect();
            assert_eq!(keys.len(), 1);
            assert_eq!(keys[0].as_i64(), Some(GROUP));
            tx.advisory_lock(GROUP + 1).await?;
            tx.advisory_lock(GROUP).shared().await?;
            let error = tx.advisory_lock(GROUP).await.unwrap_err();
            assert_error(
                &error,
                ErrorKind::Config,
                "81: held on this connection as ShareLock already",
            );
            assert_eq!(tx.held_keys().count(), 2);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    // A session that takes the key by itself keeps the group out.
    let guard = scene.keeper.advisory_lock(GROUP).acquire().await.unwrap();
    assert_eq!(guard.mode(), AdvisoryMode::Exclusive);
    guard.rollback().await;
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_transaction_pooler_too() {
    for level in LEVELS {
        let scene = Scene::with_two_rows(4).await;
        let server = scene.database.server();
        let bouncer = match server.pgbouncer(PoolMode::Transaction, scene.database.name()) {
            Ok(bouncer) => bouncer,
            Err(skip) => return skip.report("conflict_group::through_a_transaction_pooler_too"),
        };
        let pool: Pool = bouncer.pool(8);
        let keeper = Keeper::builder(pool).watch(false).build();
        let watch = Arc::new(Watch::default());
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (keeper, watch) = (keeper.clone(), Arc::clone(&watch));
                tokio::spawn(async move {
                    for _ in 0..5 {
                        let runs = AtomicU32::new(0);
                        keeper
                            .transaction_with(grouped(level), async |tx| {
                                let run = runs.fetch_add(1, Ordering::Relaxed);
                                if task % 4 == 0 {
                                    loses(tx, run).await?;
                                    assert_eq!(held(tx).await?, ["ExclusiveLock"]);
                                    watch.alone().await;
                                } else {
                                    watch.beside(tx, 5).await?;
                                }
                                Ok::<_, Error>(())
                            })
                            .await?;
                    }
                    Ok::<_, Error>(())
                })
            })
            .collect();
        for task in tasks {
            task.await
                .unwrap()
                .unwrap_or_else(|error| panic!("{level:?}: {error}"));
        }
        assert_eq!(watch.met.load(Ordering::Relaxed), 0, "not alone");
        scene.nothing_left().await;
    }
}

/// Dropped at every point, with the group free, or held by another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_nothing_is_left() {
    for level in [None, Some(IsolationLevel::Serializable)] {
        for busy in [false, true] {
            let scene = Scene::with_two_rows(2).await;
            let mut polls = 0;
            let finished = loop {
                if busy {
                    let sql = format!("SELECT pg_advisory_lock({GROUP})");
                    scene.observer.batch_execute(&sql).await.unwrap();
                }
                let runs = AtomicU32::new(0);
                let transaction = scene.keeper.transaction_with(grouped(level), async |tx| {
                    let run = runs.fetch_add(1, Ordering::Relaxed);
                    loses(tx, run).await?;
                    tx.execute("UPDATE t SET n = n + 1", &[]).await?;
                    Ok::<_, Error>(())
                });
                let finished = if busy {
                    // Some way into the wait, too.
                    let dropped = tokio::time::timeout(
                        Duration::from_secs(1),
                        poll_times_and_drop(transaction, polls),
                    );
                    match dropped.await {
                        Ok(finished) => {
                            assert!(finished.is_none(), "{finished:?}");
                            false
                        }
                        Err(_) => true,
                    }
                } else {
                    match poll_times_and_drop(transaction, polls).await {
                        Some(answer) => {
                            answer.unwrap();
                            true
                        }
                        None => false,
                    }
                };
                let sql = "SELECT pg_advisory_unlock_all()";
                scene.observer.batch_execute(sql).await.unwrap();
                scene.nothing_left().await;
                if finished {
                    break polls;
                }
                polls += 1;
            };
            assert!(finished > 2, "only {finished} polls");
        }
    }
}
