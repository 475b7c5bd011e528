//! Transactions: what is retried and what is not, what a lost connection means, call sites, savepoints, and pools
//! whose connections come back dirty or dead.

use std::collections::HashSet;
use std::error::Error as StdError;
use std::future::pending;
use std::net::Ipv4Addr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{FutureExt as _, SinkExt as _, StreamExt as _, TryStreamExt as _};
use lockkeeper::deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use lockkeeper::tokio_postgres::{Config, IsolationLevel, NoTls};
use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    AppError, CLEANED_UP_WITHIN, CapturedLog, Fault, GIVE_UP_AFTER, Proxy, Random, Scene, Server,
    eventually, eventually_within, poll_times_and_drop, pool_of, raise, signal, sqlstate,
    until_sleeping,
};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::sync::{Barrier, Notify, oneshot};

async fn ids(scene: &Scene) -> Vec<i32> {
    scene.column("SELECT id FROM t ORDER BY id").await
}

// Retries.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opposite_row_orders_both_finish_and_exactly_one_is_retried() {
    for round in 1..=3_i64 {
        let scene = Scene::with_two_rows(4).await;
        let runs = Arc::new(AtomicU32::new(0));
        let pids = Arc::new(Mutex::new(HashSet::new()));
        let met = Arc::new(Barrier::new(2));
        // A row that has just been let go can be taken before the one that queued for it wakes up: who tries again waits
        // for the survivor's end, so that the two do not meet a second time.
        let survivor = Arc::new(Notify::new());
        let tasks = [(1, 2), (2, 1)].map(|(first, second)| {
            let keeper = scene.keeper.clone();
            let (runs, pids, met) = (Arc::clone(&runs), Arc::clone(&pids), Arc::clone(&met));
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
                            pids.lock().unwrap().insert(tx.backend_pid());
                            met.wait().await;
                        }
                        tx.execute(add, &[&second]).await?;
                        Ok::<_, AppError>(())
                    })
                    .await;
                done.notify_one();
                answer
            })
        });
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(runs.load(Ordering::Relaxed), 3, "round {round}");
        assert_eq!(pids.lock().unwrap().len(), 2, "one backend for both");
        assert_eq!(scene.count("t WHERE n = 2").await, 2);
        scene.nothing_left().await;
    }
}

/// Both closures have succeeded when the serialization failure comes, from COMMIT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_serialization_failure_of_commit_is_retried() {
    let scene = Scene::with_two_rows(4).await;
    scene
        .observer
        .batch_execute("UPDATE t SET n = 1")
        .await
        .unwrap();
    let (began, ended) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let met = Arc::new(Barrier::new(2));
    let tasks = [1, 2].map(|id: i32| {
        let keeper = scene.keeper.clone();
        let (began, ended, met) = (Arc::clone(&began), Arc::clone(&ended), Arc::clone(&met));
        tokio::spawn(async move {
            let options = TransactionOptions::new().isolation(IsolationLevel::Serializable);
            keeper
                .transaction_with(options, async move |tx| {
                    let run = began.fetch_add(1, Ordering::Relaxed);
                    let on = tx.query("SELECT id FROM t WHERE n > 0", &[]).await?;
                    if on.len() > 1 {
                        tx.execute("UPDATE t SET n = 0 WHERE id = $1", &[&id])
                            .await?;
                    }
                    if run < 2 {
                        met.wait().await;
                    }
                    ended.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, AppError>(())
                })
                .await
        })
    });
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(began.load(Ordering::Relaxed), 3);
    assert_eq!(ended.load(Ordering::Relaxed), 3);
    assert_eq!(scene.count("t WHERE n > 0").await, 1, "write skew");
    scene.nothing_left().await;
}

#[tokio::test]
async fn deadlocks_serialization_failures_and_lock_timeouts_are_retried_and_nothing_else() {
    let scene = Scene::with_two_rows(1).await;
    let pid = scene
        .keeper
        .transaction(async |tx| Ok::<_, Error>(tx.backend_pid()));
    let pid = pid.await.unwrap();
    for (raised, again) in [
        ("40001", true),
        ("40P01", true),
        ("55P03", true),
        ("40000", false),
        ("40002", false),
        ("40003", false),
        ("25P02", false),
        ("57014", false),
        ("53200", false),
        ("53300", false),
        ("23505", false),
        ("22012", false),
        ("42601", false),
        ("P0001", false),
        ("XX000", false),
    ] {
        let runs = AtomicU32::new(0);
        let answer = scene
            .keeper
            .transaction(async |tx| {
                let run = runs.fetch_add(1, Ordering::Relaxed);
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                if run == 0 {
                    tx.batch_execute(&raise(raised)).await?;
                }
                // The rollback before a retry leaves the connection in the pool.
                assert_eq!(tx.backend_pid(), pid);
                Ok::<_, AppError>(())
            })
            .await;
        assert_eq!(
            runs.load(Ordering::Relaxed),
            if again { 2 } else { 1 },
            "{raised}"
        );
        match answer {
            Ok(()) => {
                assert!(again, "{raised}");
                assert_eq!(scene.count("t WHERE id = 10").await, 1);
                scene
                    .observer
                    .batch_execute("DELETE FROM t WHERE id = 10")
                    .await
                    .unwrap();
            }
            Err(AppError::Driver(error)) => {
                assert!(!again, "{raised}");
                assert_eq!(sqlstate(&error), raised);
                assert_eq!(scene.count("t WHERE id = 10").await, 0);
            }
            Err(other) => panic!("{raised}: {other:?}"),
        }
    }
    scene.nothing_left().await;
}

/// The same for COMMIT's own errors, by a deferred trigger.
#[tokio::test]
async fn errors_of_commit_are_told_apart_too() {
    let scene = Scene::with_two_rows(1).await;
    scene
        .observer
        .batch_execute(
            "CREATE SEQUENCE runs; \
             CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF nextval('runs') = 1 THEN RAISE EXCEPTION 'raised by a test' \
             USING ERRCODE = current_setting('app.code'); END IF; RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION fail()",
        )
        .await
        .unwrap();
    for (raised, kind) in [
        ("40001", None),
        ("40P01", None),
        ("55P03", None),
        ("57014", Some(ErrorKind::Cancelled)),
        ("53200", Some(ErrorKind::OutOfLocks)),
        ("23505", Some(ErrorKind::Database)),
        ("P0001", Some(ErrorKind::Database)),
    ] {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id = 10; ALTER SEQUENCE runs RESTART")
            .await
            .unwrap();
        let runs = AtomicU32::new(0);
        let answer = scene
            .keeper
            .transaction(async |tx| {
                runs.fetch_add(1, Ordering::Relaxed);
                tx.execute("SELECT set_config('app.code', $1, true)", &[&raised])
                    .await?;
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await;
        match (answer, kind) {
            (Ok(()), None) => {
                assert_eq!(runs.load(Ordering::Relaxed), 2, "{raised}");
                assert_eq!(scene.count("t WHERE id = 10").await, 1, "{raised}");
            }
            (Err(error), Some(kind)) => {
                assert_eq!(error.kind(), kind, "{raised}");
                assert_eq!(error.sqlstate().map(|state| state.code()), Some(raised));
                assert_eq!(error.attempts(), 1);
                assert_eq!(runs.load(Ordering::Relaxed), 1, "{raised}");
                assert_eq!(scene.count("t WHERE id = 10").await, 0, "{raised}");
            }
            (answer, _) => panic!("{raised}: {answer:?}"),
        }
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_statement_is_not_retried() {
    let scene = Scene::with_two_rows(2).await;
    let runs = AtomicU32::new(0);
    let answer = scene
        .keeper
        .transaction(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            let pid = tx.backend_pid().unwrap();
            let (slept, ()) = tokio::join!(tx.batch_execute("SELECT pg_sleep(60)"), async {
                until_sleeping(&scene.observer, pid).await;
                scene.cancel(pid).await;
            });
            slept?;
            Ok::<_, Error>(())
        })
        .await;
    let error = answer.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(sqlstate(&error), "57014");
    assert!(!error.is_retryable());
    assert_eq!(runs.load(Ordering::Relaxed), 1);

    let options = TransactionOptions::new().statement_timeout(Duration::from_millis(20));
    let runs = AtomicU32::new(0);
    let answer = scene
        .keeper
        .transaction_with(options, async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute("SELECT pg_sleep(60)").await?;
            Ok::<_, Error>(())
        })
        .await;
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_closures_own_error_comes_back_as_it_was_and_rolls_back() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU64::new(0);
    let answer = scene
        .keeper
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            Err::<(), _>(AppError::Own(7 + runs.fetch_add(1, Ordering::Relaxed)))
        })
        .await;
    assert!(matches!(answer, Err(AppError::Own(7))), "{answer:?}");
    let answer = scene
        .keeper
        .with_advisory_lock("own", async |tx| {
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            Err::<(), _>(AppError::Own(8))
        })
        .await;
    assert!(matches!(answer, Err(AppError::Own(8))), "{answer:?}");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    assert_eq!(ids(&scene).await, [1, 2]);

    // The driver's error, too, is the very one that the closure had.
    let answer = scene
        .keeper
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1, 0)", &[]).await?;
            Ok::<_, Box<dyn StdError + Send + Sync>>(())
        })
        .await;
    let error = answer.unwrap_err();
    assert!(error.downcast_ref::<tokio_postgres::Error>().is_some());
    scene.nothing_left().await;
}

/// An error type that keeps nothing of its cause.
#[derive(Debug)]
struct Text(#[allow(dead_code, reason = "shown by Debug")] String);

impl<E: StdError> From<E> for Text {
    fn from(error: E) -> Self {
        Text(error.to_string())
    }
}

/// Keeps even less.
#[derive(Debug)]
struct Nothing;

impl<E: StdError> From<E> for Nothing {
    fn from(_: E) -> Self {
        Nothing
    }
}

/// Runs a closure that fails with 40001 the first time, and says how often it ran.
async fn fails_once<E>(keeper: &Keeper) -> u32
where
    E: From<Error> + From<tokio_postgres::Error> + Send + std::fmt::Debug,
{
    let runs = AtomicU32::new(0);
    keeper
        .transaction(async |tx| {
            if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                tx.batch_execute(&raise("40001")).await?;
            }
            Ok::<_, E>(())
        })
        .await
        .unwrap();
    runs.into_inner()
}

#[tokio::test]
async fn a_retryable_failure_is_recognized_whatever_the_error_type() {
    let scene = Scene::new(1).await;
    assert_eq!(fails_once::<Error>(&scene.keeper).await, 2);
    assert_eq!(fails_once::<AppError>(&scene.keeper).await, 2);
    assert_eq!(fails_once::<Text>(&scene.keeper).await, 2);
    assert_eq!(fails_once::<Nothing>(&scene.keeper).await, 2);
    assert_eq!(fails_once::<anyhow::Error>(&scene.keeper).await, 2);
    assert_eq!(
        fails_once::<Box<dyn StdError + Send + Sync>>(&scene.keeper).await,
        2
    );
    let text = scene.keeper.transaction(async |tx| {
        tx.batch_execute("SELECT 1/0").await?;
        Ok::<_, Text>(())
    });
    let text = text.await.unwrap_err();
    assert!(!text.0.is_empty());
    scene.nothing_left().await;
}

/// An error made from nothing, after a failure of the server: the failure counts. After a failure that was undone and
/// forgotten it does not.
#[tokio::test]
async fn a_failure_that_was_dealt_with_is_not_a_reason_to_retry() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU32::new(0);
    let answer = scene
        .keeper
        .transaction_with(TransactionOptions::new().attempts(3), async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            drop(tx.batch_execute(&raise("40001")).await);
            // 25P02 is not what happened.
            drop(tx.batch_execute("SELECT 1").await);
            Err::<(), _>(AppError::Own(1))
        })
        .await;
    let Err(AppError::Keeper(error)) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(error.kind(), ErrorKind::RetriesExhausted);
    assert_eq!(sqlstate(&error), "40001");
    assert_eq!(runs.swap(0, Ordering::Relaxed), 3);

    let answer = scene
        .keeper
        .transaction(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute("SAVEPOINT mine").await?;
            drop(tx.batch_execute(&raise("40001")).await);
            tx.batch_execute("ROLLBACK TO SAVEPOINT mine").await?;
            Err::<(), _>(AppError::Own(2))
        })
        .await;
    assert!(matches!(answer, Err(AppError::Own(2))), "{answer:?}");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    scene.nothing_left().await;
}

#[tokio::test]
async fn when_attempts_are_exhausted_the_last_real_error_is_the_source() {
    let scene = Scene::with_two_rows(1).await;
    for attempts in [2, 4] {
        let runs = AtomicU32::new(0);
        let error = scene
            .keeper
            .transaction_with(TransactionOptions::new().attempts(attempts), async |tx| {
                let run = runs.fetch_add(1, Ordering::Relaxed) + 1;
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                let last = run == attempts;
                tx.batch_execute(&raise(if last { "40P01" } else { "40001" }))
                    .await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap_err();
        assert_eq!(runs.load(Ordering::Relaxed), attempts);
        assert_eq!(error.kind(), ErrorKind::RetriesExhausted);
        assert_eq!(error.attempts(), attempts);
        assert_eq!(error.sqlstate().map(|state| state.code()), Some("40P01"));
        assert_eq!(sqlstate(error.source().unwrap()), "40P01");
        assert!(!error.is_retryable());
        let text = error.to_string();
        assert!(text.contains(&format!("{attempts} attempts")), "{text}");
        assert!(text.contains("40P01"), "{text}");
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(scene.count("t WHERE id = 10").await, 0);
    }

    // From COMMIT, the same; its error is one of this crate, with the server's behind it.
    scene
        .observer
        .batch_execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             RAISE EXCEPTION 'raised by a test' USING ERRCODE = '40001'; END $$; \
             CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION fail()",
        )
        .await
        .unwrap();
    let error = scene
        .keeper
        .transaction_with(TransactionOptions::new().attempts(2), async |tx| {
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RetriesExhausted);
    assert_eq!(error.attempts(), 2);
    assert_eq!(sqlstate(&error), "40001");
    scene.nothing_left().await;
}

#[tokio::test]
async fn one_attempt_gives_the_error_itself() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU32::new(0);
    let once = TransactionOptions::new().attempts(1);
    let answer = scene
        .keeper
        .transaction_with(once, async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute(&raise("40001")).await?;
            Ok::<_, AppError>(())
        })
        .await;
    let Err(AppError::Driver(error)) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(sqlstate(&error), "40001");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    scene.nothing_left().await;
}

#[tokio::test]
async fn no_attempt_begins_after_the_deadline() {
    let scene = Scene::new(1).await;
    let always = async |tx: &mut Tx| {
        tx.batch_execute(&raise("40001")).await?;
        Ok::<_, Error>(())
    };
    // The time counts from before the connection is there.
    scene.pool_is_whole_within(GIVE_UP_AFTER).await;
    let started = Instant::now();
    let options = TransactionOptions::new()
        .attempts(u32::MAX)
        .deadline(Duration::from_secs(2));
    let error = scene
        .keeper
        .transaction_with(options, always)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RetriesExhausted);
    assert!(error.attempts() > 1, "{error}");
    assert!(error.to_string().contains("time"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));

    // The first attempt is always made.
    let options = TransactionOptions::new().deadline(Duration::ZERO);
    let ran = scene
        .keeper
        .transaction_with(options, async |_| Ok::<_, Error>(1));
    assert_eq!(ran.await.unwrap(), 1);
    scene.nothing_left().await;
}

/// Many transactions that all fail at once stop retrying together: 100 retries in all, however many they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_failures_runs_out_of_its_retry_budget() {
    let scene = Scene::new(8).await;
    let runs = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let (keeper, runs) = (scene.keeper.clone(), Arc::clone(&runs));
            tokio::spawn(async move {
                let options = TransactionOptions::new().attempts(6);
                keeper
                    .transaction_with(options, async move |tx| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        tx.batch_execute(&raise("40001")).await?;
                        Ok::<_, Error>(())
                    })
                    .await
            })
        })
        .collect();
    let mut out_of_budget = 0;
    for task in tasks {
        let error = task.await.unwrap().unwrap_err();
        assert_eq!(sqlstate(&error), "40001");
        out_of_budget += u32::from(error.to_string().contains("budget"));
    }
    assert_eq!(runs.load(Ordering::Relaxed), 150);
    assert!(out_of_budget > 0);
    scene.nothing_left().await;
}

#[tokio::test]
async fn options_that_cannot_work_are_refused_before_any_sql() {
    let scene = Scene::new(1).await;
    for options in [
        TransactionOptions::new().attempts(0),
        TransactionOptions::new().lock_timeout(Duration::ZERO),
        TransactionOptions::new().statement_timeout(Duration::ZERO),
        TransactionOptions::new().idle_timeout(Duration::ZERO),
    ] {
        let error = scene
            .keeper
            .transaction_with(options.clone(), async |_| Ok::<_, Error>(()))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{options:?}");
        assert_eq!(error.attempts(), 0);
    }
    assert_eq!(scene.pool.status().size, 0, "a connection was opened");
}

/// Less than a millisecond is one, not none; the most that fits is taken as it is.
#[tokio::test]
async fn timeouts_of_any_length_are_set() {
    let scene = Scene::new(1).await;
    for (timeout, shown) in [
        (Duration::from_nanos(1), "1ms"),
        (Duration::from_micros(1001), "2ms"),
        (Duration::from_secs(90), "90s"),
        (Duration::MAX, "2147483647ms"),
    ] {
        let options = TransactionOptions::new()
            .lock_timeout(timeout)
            .idle_timeout(Duration::from_secs(60));
        let found = scene
            .keeper
            .transaction_with(options, async |tx| {
                let lock = tx.query_one("SHOW lock_timeout", &[]).await?;
                Ok::<String, Error>(lock.get(0))
            })
            .await
            .unwrap();
        assert_eq!(found, shown, "{timeout:?}");
    }
    assert_eq!(scene.show("lock_timeout").await, "0");
    assert_eq!(scene.show("idle_in_transaction_session_timeout").await, "0");
}

#[tokio::test]
async fn isolation_and_access_mode_are_what_was_asked_for() {
    let scene = Scene::with_two_rows(1).await;
    for (level, shown) in [
        (IsolationLevel::ReadCommitted, "read committed"),
        (IsolationLevel::RepeatableRead, "repeatable read"),
        (IsolationLevel::Serializable, "serializable"),
    ] {
        let options = TransactionOptions::new()
            .isolation(level)
            .read_only(true)
            .deferrable(true);
        let answer = scene
            .keeper
            .transaction_with(options, async |tx| {
                for (setting, expected) in [
                    ("transaction_isolation", shown),
                    ("transaction_read_only", "on"),
                    ("transaction_deferrable", "on"),
                ] {
                    let row = tx.query_one(&format!("SHOW {setting}"), &[]).await?;
                    assert_eq!(row.get::<_, &str>(0), expected);
                }
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await;
        assert_eq!(sqlstate(&answer.unwrap_err()), "25006");
    }
    assert_eq!(scene.show("transaction_isolation").await, "read committed");
    assert_eq!(scene.show("transaction_read_only").await, "off");
    scene.nothing_left().await;
}

// Errors that were swallowed.

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
                        // Its error arrives when nobody is there any more.
                        let sleep = tx.batch_execute("SELECT pg_sleep(0.05); SELECT 1/0");
                        assert!(sleep.now_or_never().is_none());
                    }
                    _ => unreachable!(),
                }
                Ok::<_, Error>(())
            })
            .await;
        let error = answer.expect_err(way);
        assert_eq!(error.kind(), ErrorKind::Database, "{way}: {error}");
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
    assert_eq!(
        (error.kind(), sqlstate(&error)),
        (ErrorKind::Database, "22012")
    );
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

// Connections that are cut.

/// An answer about one insert must agree with the table: never applied twice, and where it is certain, right.
fn agrees(answer: &Result<(), Error>, applied: i64, what: &str) {
    let right = match answer {
        Ok(()) => applied == 1,
        Err(error) => match error.kind() {
            ErrorKind::CommitUnknown => applied <= 1,
            ErrorKind::ConnectionLost => applied == 0,
            _ => false,
        },
    };
    assert!(right, "{what}: {answer:?}, {applied} rows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_before_commit_nothing_is_applied() {
    let scene = Scene::with_two_rows(2).await;
    scene
        .observer
        .batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await
        .unwrap();
    for way in ["statement", "noticed", "at once", "locked"] {
        let runs = AtomicU32::new(0);
        let body = async |tx: &mut Tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            let pid = tx.backend_pid().unwrap();
            scene.terminate(pid).await;
            match way {
                "statement" => {
                    tx.execute("SELECT 1", &[]).await?;
                }
                "at once" => {}
                // The driver learns of it without being used.
                _ => {
                    while !tx.client().is_closed() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            }
            Ok::<_, Error>(())
        };
        let answer = if way == "locked" {
            scene.keeper.with_advisory_lock("cut", body).await
        } else {
            scene.keeper.transaction(body).await
        };
        let applied = scene.count("t WHERE id = 10").await;
        agrees(&answer, applied, way);
        assert_eq!(applied, 0, "{way}");
        let error = answer.unwrap_err();
        if way != "at once" {
            assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{way}");
            assert!(error.is_retryable());
        }
        if way == "locked" {
            assert_eq!(error.key().unwrap().name(), Some("cut"));
        }
        scene.nothing_left().await;
    }
}

/// The server's own cut of a transaction that idles for too long.
#[tokio::test]
async fn a_transaction_that_idles_for_too_long_is_lost_before_commit() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU32::new(0);
    let idle = TransactionOptions::new().idle_timeout(Duration::from_millis(30));
    let answer = scene
        .keeper
        .transaction_with(idle, async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
            while !tx.client().is_closed() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok::<_, Error>(())
        })
        .await;
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionLost);
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    assert_eq!(ids(&scene).await, [1, 2]);
    scene.nothing_left().await;
}

/// A side connection that is refused, or that nobody answers: all goes on without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_connection_that_cannot_be_opened_is_no_matter() {
    let scene = Scene::with_two_rows(4).await;
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let refused = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let ports = [&silent, &refused].map(|listener| listener.local_addr().unwrap().port());
    drop(refused);
    for port in ports {
        let mut side = Config::new();
        side.host("127.0.0.1").port(port).user("nobody");
        let keeper = Keeper::builder(scene.pool.clone())
            .side_connection(side, NoTls)
            .build();
        let started = Instant::now();
        assert_eq!(fails_once::<Error>(&keeper).await, 2);
        let guard = keeper.advisory_lock("k").acquire().await.unwrap();
        let wait = Duration::from_millis(20);
        let error = keeper.advisory_lock("k").wait(wait).acquire().await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout);
        assert_eq!(error.blockers()[0].pid(), guard.backend_pid());
        let waiter = tokio::spawn({
            let keeper = keeper.clone();
            async move {
                let body =
                    async |tx: &mut Tx| tx.advisory_lock("k").wait(Duration::from_secs(60)).await;
                keeper.transaction(body).await
            }
        });
        let waits = async || !scene.waiters("k").await.is_empty();
        eventually("nobody waits", waits).await;
        waiter.abort();
        drop(waiter.await);
        let gone = async || scene.waiters("k").await.is_empty();
        eventually_within(CLEANED_UP_WITHIN, "the waiter is left", gone).await;
        guard.commit().await.unwrap();
        assert!(started.elapsed() < GIVE_UP_AFTER);
        scene.nothing_left().await;
    }
    drop(silent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_during_commit_it_is_never_applied_twice() {
    let scene = Scene::with_two_rows(1).await;
    scene
        .observer
        .batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await
        .unwrap();
    let proxy = Proxy::before(scene.database.server());
    let keeper = Keeper::new(proxy.pool(&scene.database.config(), 2));
    for (fault, applied) in [
        (Some(Fault::CutBefore), 0),
        (Some(Fault::Reset), 0),
        (Some(Fault::CutDuring), 1),
        (Some(Fault::CutAnswer), 1),
        (Some(Fault::CutAfter), 1),
        (None, 1),
    ] {
        let cut_commit = || {
            if let Some(fault) = fault {
                proxy.fault("COMMIT", fault);
            }
        };
        for way in ["transaction", "lock", "guard"] {
            scene
                .observer
                .batch_execute("DELETE FROM t WHERE id = 10")
                .await
                .unwrap();
            let runs = AtomicU32::new(0);
            let body = async |tx: &mut Tx| {
                runs.fetch_add(1, Ordering::Relaxed);
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                cut_commit();
                Ok::<_, Error>(())
            };
            let answer = match way {
                "transaction" => keeper.transaction(body).await,
                "lock" => keeper.with_advisory_lock("cut", body).await,
                _ => {
                    let guard = keeper.advisory_lock("cut").acquire().await.unwrap();
                    guard
                        .execute("INSERT INTO t VALUES (10, 0)", &[])
                        .await
                        .unwrap();
                    runs.fetch_add(1, Ordering::Relaxed);
                    cut_commit();
                    guard.commit().await
                }
            };
            scene.until_no_transaction().await;
            let what = format!("{fault:?} {way}");
            assert_eq!(proxy.faults_left(), 0, "{what}");
            assert_eq!(scene.count("t WHERE id = 10").await, applied, "{what}");
            agrees(&answer, applied, &what);
            assert_eq!(runs.load(Ordering::Relaxed), 1, "{what}");
            match &answer {
                Err(error) => {
                    assert!(!error.is_retryable() || applied == 0, "{what}");
                    let certain = matches!(fault, None | Some(Fault::CutAfter));
                    assert!(!certain, "{what}: {error:?}");
                    if way != "transaction" {
                        assert_eq!(error.key().unwrap().name(), Some("cut"), "{what}");
                    }
                }
                Ok(()) => assert_eq!(applied, 1),
            }
            scene.nothing_left().await;
        }
    }
    // And the pool behind the proxy goes on.
    for _ in 0..4 {
        keeper
            .transaction(async |tx| {
                tx.execute("SELECT 1", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
    }
}

/// COMMIT is held up by a deferred trigger, and its backend terminated, or the COMMIT cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_ends_during_commit_has_not_committed() {
    let scene = Scene::with_two_rows(2).await;
    scene
        .observer
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        .await
        .unwrap();
    for (function, kind) in [
        ("pg_terminate_backend", ErrorKind::CommitUnknown),
        ("pg_cancel_backend", ErrorKind::Cancelled),
    ] {
        let runs = AtomicU32::new(0);
        let pid = Mutex::new(None);
        let (answer, ()) = tokio::join!(
            scene.keeper.transaction(async |tx| {
                runs.fetch_add(1, Ordering::Relaxed);
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                *pid.lock().unwrap() = tx.backend_pid();
                Ok::<_, Error>(())
            }),
            async {
                let known = async || pid.lock().unwrap().is_some();
                eventually("the transaction does not begin", known).await;
                let pid = pid.lock().unwrap().unwrap();
                until_sleeping(&scene.observer, pid).await;
                signal(&scene.observer, function, pid).await;
            }
        );
        let error = answer.unwrap_err();
        // Whoever looks at the transaction's status may know better than that it is unknown.
        let known = function == "pg_terminate_backend" && error.kind() == ErrorKind::ConnectionLost;
        assert!(error.kind() == kind || known, "{function}: {error:?}");
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        assert_eq!(scene.count("t WHERE id = 10").await, 0);
        scene.nothing_left().await;
    }
}

/// Dropped while COMMIT waits for its answer: it goes on, and the connection comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_dropped_goes_on() {
    let scene = Scene::with_two_rows(1).await;
    scene
        .observer
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        .await
        .unwrap();
    let done = AtomicBool::new(false);
    let transaction = scene.keeper.transaction(async |tx| {
        tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
        done.store(true, Ordering::Relaxed);
        Ok::<_, Error>(())
    });
    let mut transaction = Box::pin(transaction);
    while !done.load(Ordering::Relaxed) {
        assert!(futures::poll!(transaction.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    drop(transaction);
    eventually("the dropped COMMIT was lost", async || {
        scene.count("t WHERE id = 10").await == 1
    })
    .await;
    scene.nothing_left().await;
}

// Call sites.

/// What the server shows during the body of a transaction, and the line that asked for it.
async fn shown(scene: &Scene, keeper: &Keeper) -> (String, Option<u32>) {
    let body = async |tx: &mut Tx| {
        let name = scene.application_name(tx.backend_pid().unwrap()).await;
        if let Some(site) = tx.call_site() {
            assert_eq!(site.file(), file!());
        }
        Ok::<_, Error>((name, tx.call_site().map(|site| site.line())))
    };
    let asked = line!() + 1;
    let (name, site) = keeper.transaction(body).await.unwrap();
    assert!(site.is_none_or(|site| site == asked));

    // A lock shows the same.
    let line = line!() + 1;
    let (locked, site) = keeper.with_advisory_lock("name", body).await.unwrap();
    if let Some(site) = site {
        assert_eq!(site, line);
        assert!(locked.ends_with(&format!(":{line}")), "{locked}");
    } else {
        assert_eq!(locked, name);
    }
    (name, site.map(|_| asked))
}

#[tokio::test]
async fn application_name_is_the_prefix_and_the_call_site_during_the_body() {
    let scene = Scene::new(1).await;
    let before = scene.show("application_name").await;
    let log = scene.database.server().log_len();
    scene
        .observer
        .batch_execute(&format!(
            "ALTER DATABASE {} SET log_min_messages = 'notice'",
            scene.database.name()
        ))
        .await
        .unwrap();
    drop(scene.pool.retain(|_, _| false));
    let here = file!();
    for (prefix, starts) in [
        ("billing".to_owned(), "billing ".to_owned()),
        (String::new(), here.to_owned()),
        ("p".repeat(200), "p".repeat(24)),
        ("zoë's \\ größe\n\0😀".to_owned(), "zo?? ".to_owned()),
        (
            "'; DROP TABLE t; --".to_owned(),
            "?; DROP TABLE t; -- ".to_owned(),
        ),
        ("%s %n $1 $$".to_owned(), "%s %n $1 $$ ".to_owned()),
    ] {
        let keeper = Keeper::builder(scene.pool.clone())
            .application(prefix.clone())
            .build();
        let (name, line) = shown(&scene, &keeper).await;
        assert!(name.is_ascii() && name.len() <= 63, "{name}");
        assert!(name.ends_with(&format!(":{}", line.unwrap())), "{name}");
        if !prefix.starts_with("zo") {
            assert!(name.starts_with(&starts), "{prefix:?}: {name}");
        }
        assert!(name.contains("transactions.rs"), "{name}");
        assert_eq!(scene.show("application_name").await, before);

        let keeper = Keeper::builder(scene.pool.clone())
            .application(prefix.clone())
            .call_sites(false)
            .build();
        let (name, line) = shown(&scene, &keeper).await;
        assert_eq!(line, None);
        assert!(name.len() <= 63 && !name.contains(".rs"), "{name}");
        assert_eq!(name.is_empty(), prefix.is_empty());
        assert_eq!(scene.show("application_name").await, before);
    }
    let log = scene.database.server().log_since(log);
    let notices: Vec<_> = log
        .lines()
        .filter(|line| line.contains("identifier") && line.contains("application_name"))
        .chain(
            log.lines()
                .filter(|line| line.contains("will be truncated")),
        )
        .collect();
    assert!(notices.is_empty(), "{notices:#?}");
    scene.nothing_left().await;
}

/// The connection's own name is back after each way a transaction can end.
#[tokio::test]
async fn application_name_is_restored_after_every_end() {
    let scene = Scene::with_two_rows(1).await;
    let mut config = scene.database.config();
    config.application_name("mine");
    let own = pool_of(config, 1);
    let keeper = Keeper::builder(own.clone()).application("keeper").build();
    let shown = async || {
        let object = own.get().await.unwrap();
        let row = object.query_one(
            "SELECT pg_backend_pid(), current_setting('application_name')",
            &[],
        );
        let row = row.await.unwrap();
        (row.get::<_, i32>(0), row.get::<_, String>(1))
    };
    let (pid, name) = shown().await;
    assert_eq!(name, "mine");
    for end in ["commit", "error", "failure", "retry", "drop", "savepoint"] {
        let runs = AtomicU32::new(0);
        let body = async |tx: &mut Tx| {
            let name = scene.application_name(tx.backend_pid().unwrap()).await;
            assert!(name.starts_with("keeper tests/"), "{name}");
            match end {
                "error" => return Err(AppError::Own(1)),
                "failure" => tx.batch_execute("SELECT 1/0").await?,
                "retry" if runs.fetch_add(1, Ordering::Relaxed) == 0 => {
                    tx.batch_execute(&raise("40001")).await?;
                }
                "drop" => pending().await,
                "savepoint" => {
                    let inner = tx.savepoint(async |tx| {
                        tx.batch_execute("SELECT 1/0").await?;
                        Ok::<_, AppError>(())
                    });
                    assert!(inner.await.is_err());
                    assert_eq!(
                        scene.application_name(tx.backend_pid().unwrap()).await,
                        name
                    );
                }
                _ => {}
            }
            Ok(())
        };
        let transaction = keeper.transaction(body);
        let within = if end == "drop" {
            Duration::from_millis(200)
        } else {
            GIVE_UP_AFTER
        };
        drop(tokio::time::timeout(within, transaction).await);
        assert_eq!(shown().await, (pid, "mine".to_owned()), "{end}");
    }
}

#[tokio::test]
async fn a_keeper_without_call_sites_tells_none() {
    let scene = Scene::with(1, |builder| builder.call_sites(false)).await;
    let site = scene
        .keeper
        .transaction(async |tx| Ok::<_, Error>(tx.call_site().copied()));
    assert_eq!(site.await.unwrap(), None);
    let keeper = Keeper::new(scene.pool.clone());
    let line = line!() + 1;
    let site = keeper.transaction(async |tx| Ok::<_, Error>(tx.call_site().copied()));
    let site = site.await.unwrap().unwrap();
    assert_eq!((site.file(), site.line()), (file!(), line));
}

// Savepoints.

async fn insert(tx: &Tx, id: i32) -> Result<(), AppError> {
    tx.execute("INSERT INTO t VALUES ($1, 0)", &[&id]).await?;
    Ok(())
}

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
            assert_eq!(error.kind(), ErrorKind::Database);
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

/// However far it got: dropped, all of it is undone and the transaction goes on.
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

// A model of it all.

/// What a body may do.
#[derive(Clone, Debug)]
enum Step {
    /// An insert by one of the ways that statements can go.
    Insert(i32, Way),
    /// A statement that fails, its error swallowed.
    Fail(Way),
    /// An error that the server never sees.
    Mistake,
    Savepoint(Vec<Step>, End),
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Watched,
    Batch,
    /// Through the bare client.
    Bare,
    /// Sent, and dropped before it is answered.
    Dropped,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Ok,
    Err,
    /// The savepoint's future is dropped when all steps are done.
    Dropped,
}

fn random_way(random: &mut Random) -> Way {
    random.one_of(&[Way::Watched, Way::Batch, Way::Bare, Way::Dropped])
}

fn random_steps(random: &mut Random, depth: u32, next_id: &mut i32) -> Vec<Step> {
    let count = 1 + random.below(4);
    let mut steps = Vec::new();
    for _ in 0..count {
        steps.push(match random.below(10) {
            0..5 => {
                *next_id += 1;
                Step::Insert(*next_id, random_way(random))
            }
            5 => Step::Fail(random_way(random)),
            6 => Step::Mistake,
            _ if depth < 3 => {
                let inner = random_steps(random, depth + 1, next_id);
                Step::Savepoint(inner, random.one_of(&[End::Ok, End::Err, End::Dropped]))
            }
            _ => Step::Mistake,
        });
    }
    steps
}

/// What a transaction comes to: its rows, and whether it has failed.
#[derive(Clone, Default)]
struct Model {
    rows: Vec<i32>,
    failed: bool,
}

impl Model {
    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                _ if self.failed => {}
                Step::Insert(id, _) => self.rows.push(*id),
                Step::Fail(_) => self.failed = true,
                Step::Mistake => {}
                Step::Savepoint(inner, end) => {
                    let before = self.clone();
                    self.run(inner);
                    if self.failed || !matches!(end, End::Ok) {
                        *self = before;
                    }
                }
            }
        }
    }
}

async fn send(tx: &Tx, sql: &str, way: Way) {
    match way {
        Way::Watched => drop(tx.execute(sql, &[]).await),
        Way::Batch => drop(tx.batch_execute(sql).await),
        Way::Bare => drop(tx.client().execute(sql, &[]).await),
        Way::Dropped => drop(tx.batch_execute(sql).now_or_never()),
    }
}

/// Does what the steps say, and swallows all errors.
fn act<'a>(tx: &'a mut Tx, steps: &'a [Step]) -> BoxFuture<'a, ()> {
    Box::pin(async move {
        for step in steps {
            match step {
                Step::Insert(id, way) => {
                    let sql = format!("INSERT INTO t VALUES ({id}, 0)");
                    send(tx, &sql, *way).await;
                }
                Step::Fail(way) => send(tx, "SELECT 1/0", *way).await,
                Step::Mistake => drop(tx.query("SELECT $1::int", &[&"text"]).await),
                Step::Savepoint(inner, end) => {
                    let (done, reached) = oneshot::channel();
                    let savepoint = tx.savepoint(async move |tx| {
                        act(tx, inner).await;
                        match end {
                            End::Ok => Ok(()),
                            End::Err => Err(AppError::Own(0)),
                            End::Dropped => {
                                assert!(done.send(()).is_ok());
                                pending().await
                            }
                        }
                    });
                    tokio::select! {
                        result = savepoint => assert!(result.is_err() || matches!(end, End::Ok)),
                        Ok(()) = reached => {}
                    }
                }
            }
        }
    })
}

/// Whatever a body does and however it hides it: `Ok` means that all of it is there, an error that none of it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_is_what_the_table_says_whatever_the_body_does() {
    let scene = Scene::with_two_rows(2).await;
    let mut failures = 0;
    for seed in 1..=150_u64 {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        let steps = random_steps(&mut Random::new(seed), 0, &mut 10);
        let mut model = Model::default();
        model.run(&steps);
        let body = async |tx: &mut Tx| {
            act(tx, &steps).await;
            Ok::<_, Error>(())
        };
        let answer = match seed % 3 {
            0 => scene.keeper.transaction(body).await,
            1 => scene.keeper.with_advisory_lock("model", body).await,
            _ => {
                let lock = scene.keeper.advisory_lock("model").session();
                let mut guard = lock.acquire().await.unwrap();
                let answer = guard.transaction(body).await;
                assert!(scene.is_held("model").await, "seed {seed}");
                guard.release().await.unwrap();
                answer
            }
        };
        let mut expected = vec![1, 2];
        if !model.failed {
            expected.extend(&model.rows);
        }
        assert_eq!(
            answer.is_err(),
            model.failed,
            "seed {seed}: {answer:?} {steps:#?}"
        );
        assert_eq!(ids(&scene).await, expected, "seed {seed}: {steps:#?}");
        failures += u32::from(model.failed);
    }
    assert!(
        (20..130).contains(&failures),
        "{failures} failures are no mixture"
    );
    scene.nothing_left().await;
}

// Pools whose connections are not what they should be.

/// Every way to begin something, each of which inserts row 20.
const CALLS: [&str; 10] = [
    "transaction",
    "serializable",
    "read write",
    "with lock",
    "try with lock",
    "guard",
    "repeatable read guard",
    "several",
    "session",
    "several session",
];

/// The backend on which it was done; `None` where a `try` found the lock busy.
async fn call(keeper: &Keeper, how: &str) -> Result<Option<i32>, Error> {
    const INSERT: &str = "INSERT INTO t VALUES (20, 0)";
    let body = async |tx: &mut Tx| {
        tx.execute(INSERT, &[]).await?;
        Ok::<_, Error>(tx.backend_pid())
    };
    let options = TransactionOptions::new();
    let one = || keeper.advisory_lock("dirty");
    let three = || keeper.advisory_locks(["dirty", "more", "most"]);
    let guard = match how {
        "transaction" => return keeper.transaction(body).await,
        "serializable" => {
            let options = options.isolation(IsolationLevel::Serializable);
            return keeper.transaction_with(options, body).await;
        }
        "read write" => {
            let options = options.read_only(false).deferrable(true);
            return keeper.transaction_with(options, body).await;
        }
        "with lock" => return keeper.with_advisory_lock("dirty", body).await,
        "try with lock" => {
            let ran = keeper.try_with_advisory_lock("dirty", body).await?;
            return Ok(ran.flatten());
        }
        "session" | "several session" => {
            let lock = if how == "session" { one() } else { three() };
            let guard = lock.session().acquire().await?;
            let pid = guard.backend_pid();
            guard.execute(INSERT, &[]).await?;
            guard.release().await?;
            return Ok(pid);
        }
        "guard" => one().acquire().await?,
        "several" => three().acquire().await?,
        _ => {
            let lock = one().isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await?
        }
    };
    let pid = guard.backend_pid();
    guard.execute(INSERT, &[]).await?;
    guard.commit().await?;
    Ok(pid)
}

/// What other code may leave on a connection. None of it may be committed, and nothing of ours may be inside it.
const DIRT: [&str; 5] = [
    "BEGIN; INSERT INTO t VALUES (10, 0)",
    "BEGIN; INSERT INTO t VALUES (10, 0); SELECT 1/0",
    "BEGIN",
    "BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO t VALUES (10, 0)",
    "BEGIN READ ONLY; SELECT count(*) FROM t",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_ours_runs_in_a_transaction_that_others_left_open() {
    let scene = Scene::with_two_rows(2).await;
    let clean = ManagerConfig {
        recycling_method: RecyclingMethod::Clean,
    };
    let clean = Manager::from_config(scene.database.config(), NoTls, clean);
    let clean = Pool::builder(clean).max_size(2).build().unwrap();
    let pools = [(&scene.pool, &DIRT[..]), (&clean, &DIRT[..1])];
    let mut wrong = Vec::new();
    for (pool, dirts) in pools {
        let keeper = Keeper::new(pool.clone());
        for (how, dirt) in CALLS
            .iter()
            .flat_map(|how| dirts.iter().map(move |dirt| (*how, *dirt)))
        {
            scene
                .observer
                .batch_execute("DELETE FROM t WHERE id > 2")
                .await
                .unwrap();
            let mut dirty = Vec::new();
            let objects = [pool.get().await.unwrap(), pool.get().await.unwrap()];
            for (n, object) in objects.iter().enumerate() {
                let row = object.query_one("SELECT pg_backend_pid()", &[]).await;
                dirty.push(row.unwrap().get::<_, i32>(0));
                // The second one would wait for the row of the first: it has one of its own.
                drop(
                    object
                        .batch_execute(&dirt.replace("10", &format!("1{n}")))
                        .await,
                );
            }
            drop(objects);
            match call(&keeper, how).await {
                Ok(Some(pid)) => assert!(!dirty.contains(&pid), "{how} after {dirt}"),
                Ok(None) => wrong.push(format!("{how} after {dirt}: a free lock is busy")),
                Err(error) => wrong.push(format!("{how} after {dirt}: {error:?}")),
            }
            // The pool may have kept a dirty one, whose leak is not ours to end; it must not be committed.
            drop(pool.retain(|_, _| false));
            scene.nothing_left().await;
            let mut left = ids(&scene).await;
            left.retain(|id| *id != 20);
            if left != [1, 2] {
                wrong.push(format!(
                    "{how} after {dirt}: committed what others left open: {left:?}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What a try gets inside somebody's open transaction is not in the way of the next try.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dirty_connection_does_not_make_a_free_lock_busy() {
    let scene = Scene::new(4).await;
    let mut busy = Vec::new();
    for round in 0..30 {
        let mut all = Vec::new();
        for _ in 0..4 {
            let object = scene.pool.get().await.unwrap();
            // A large transaction takes its time to end when its connection is closed.
            object
                .batch_execute("BEGIN; CREATE TEMP TABLE leak AS SELECT generate_series(1, 20000)")
                .await
                .unwrap();
            all.push(object);
        }
        drop(all);
        let lock = scene.keeper.advisory_lock("k");
        let taken = match round % 3 {
            0 => lock.try_acquire().await.unwrap().map(drop),
            1 => lock.session().try_acquire().await.unwrap().map(drop),
            _ => lock.wait(Duration::ZERO).acquire().await.ok().map(drop),
        };
        if taken.is_none() {
            busy.push(round);
        }
        drop(scene.pool.retain(|_, _| false));
        scene.nothing_left().await;
    }
    assert!(busy.is_empty(), "busy in rounds {busy:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_died_in_the_pool_are_not_an_error() {
    let scene = Scene::with_two_rows(12).await;
    for how in CALLS {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        scene.pool_is_whole_within(GIVE_UP_AFTER).await;
        assert_eq!(scene.pool.status().size, 12);
        scene
            .observer
            .batch_execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            .await
            .unwrap();
        // At once, before the driver can have noticed all of them.
        if let Err(error) = call(&scene.keeper, how).await {
            panic!("{how}: {error:?}");
        }
        assert_eq!(ids(&scene).await, [1, 2, 20], "{how}");
        // Those that were not needed are dead still.
        drop(scene.pool.retain(|_, _| false));
        scene.nothing_left().await;
    }
}

/// As a firewall leaves them that has forgotten them: whether a connection is dead shows only when it is used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_died_without_a_word_are_not_an_error() {
    let scene = Scene::with_two_rows(1).await;
    let proxy = Proxy::before(scene.database.server());
    let pool = proxy.pool(&scene.database.config(), 12);
    let keeper = Keeper::new(pool.clone());
    let mut wrong = Vec::new();
    for how in CALLS {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        let mut all = Vec::new();
        for _ in 0..12 {
            all.push(pool.get().await.unwrap());
        }
        drop(all);
        assert_eq!(pool.status().size, 12);
        proxy.forget_connections();
        match call(&keeper, how).await {
            Ok(pid) => {
                assert!(pid.is_some(), "{how}: a free lock is busy");
                assert_eq!(ids(&scene).await, [1, 2, 20], "{how}");
            }
            Err(error) => wrong.push(format!("{how}: {error:?}")),
        }
        scene.nothing_left().await;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_the_server_the_next_call_simply_works() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let observer = database.connect().await;
    observer
        .batch_execute("CREATE TABLE t (id int, n int)")
        .await
        .unwrap();
    let pool = database.pool(4);
    let keeper = Keeper::new(pool.clone());
    for how in [
        "transaction",
        "with lock",
        "session",
        "repeatable read guard",
    ] {
        let mut all = Vec::new();
        for _ in 0..4 {
            all.push(pool.get().await.unwrap());
        }
        drop(all);
        tokio::task::block_in_place(|| server.restart());
        if let Err(error) = call(&keeper, how).await {
            panic!("{how}: {error:?}");
        }
    }
    let observer = database.connect().await;
    let row = observer
        .query_one(
            "SELECT count(*), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') FROM t WHERE id = 20",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 4);
    eventually("an advisory lock is left", async || {
        let row = observer
            .query_one(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
                &[],
            )
            .await;
        row.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// A server that is not there is an error soon, and not for longer than it is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_down_is_an_error_of_the_pool() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let keeper = Keeper::new(database.pool(2));
    keeper
        .transaction(async |_| Ok::<_, Error>(()))
        .await
        .unwrap();
    tokio::task::block_in_place(|| server.stop());
    let runs = AtomicU32::new(0);
    let answer = keeper
        .transaction(async |_| {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Error>(())
        })
        .await;
    let error = answer.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Pool | ErrorKind::ConnectionLost),
        "{error:?}"
    );
    assert_eq!(runs.load(Ordering::Relaxed), 0);
    tokio::task::block_in_place(|| server.restart());
    keeper
        .transaction(async |_| Ok::<_, Error>(()))
        .await
        .unwrap();
}

// What errors and logs show.

#[tokio::test]
async fn every_attempt_is_in_the_log() {
    let scene = Scene::new(1).await;
    let (log, _logging) = CapturedLog::start();
    let options = TransactionOptions::new().attempts(4);
    let answer = scene
        .keeper
        .transaction_with(options, async |tx| {
            tx.batch_execute(&raise("40P01")).await?;
            Ok::<_, Error>(())
        })
        .await;
    assert!(answer.is_err());
    let log = log.text();
    for attempt in 1..=4 {
        let lines: Vec<_> = log
            .lines()
            .filter(|line| line.contains(&format!("attempt failed attempt={attempt} ")))
            .collect();
        assert_eq!(lines.len(), 1, "attempt {attempt}: {log}");
        assert!(lines[0].contains("40P01"), "{}", lines[0]);
    }
    scene.nothing_left().await;
}

/// What our errors and log lines say of themselves. A source says what it likes, to who asks for it.
#[tokio::test]
async fn no_literal_of_the_users_sql_is_in_our_errors_and_logs() {
    const SECRET: &str = "sekret-4711";
    let scene = Scene::with_two_rows(1).await;
    scene
        .observer
        .batch_execute(&format!(
            "CREATE TABLE s (name text UNIQUE, c text CHECK (c <> '{SECRET}')); INSERT INTO s VALUES ('{SECRET}')"
        ))
        .await
        .unwrap();
    let (log, logging) = CapturedLog::start();
    let mut errors: Vec<Error> = Vec::new();
    for sql in [
        format!("INSERT INTO s VALUES ('{SECRET}')"),
        format!("INSERT INTO s VALUES ('x', '{SECRET}')"),
        format!("SELECT '{SECRET}'::int"),
        format!("SELECT '{SECRET}' nonsense nonsense"),
        format!(
            "DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING DETAIL = '{SECRET}', HINT = '{SECRET}'; END $$"
        ),
        format!(
            "DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING ERRCODE = '40001', DETAIL = '{SECRET}'; END $$"
        ),
        format!(
            "DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING ERRCODE = '55P03', DETAIL = '{SECRET}'; END $$"
        ),
        format!("SELECT pg_terminate_backend(pg_backend_pid()), '{SECRET}'"),
    ] {
        for swallow in [false, true] {
            let options = TransactionOptions::new().attempts(2);
            let answer = scene
                .keeper
                .transaction_with(options, async |tx| {
                    let failed = tx.batch_execute(&sql).await;
                    if !swallow {
                        failed?;
                    }
                    Ok::<_, Error>(())
                })
                .await;
            errors.push(answer.expect_err(&sql));
            let answer = scene
                .keeper
                .transaction_with(TransactionOptions::new().attempts(2), async |tx| {
                    let inner = tx.savepoint(async |tx| {
                        let failed = tx.batch_execute(&sql).await;
                        if !swallow {
                            failed?;
                        }
                        Ok::<_, Error>(())
                    });
                    inner.await
                })
                .await;
            errors.push(answer.expect_err(&sql));
        }
    }
    drop(logging);
    let log = log.text();
    assert!(log.contains("attempt=1"), "nothing was logged");
    assert!(!log.contains(SECRET), "{log}");
    for error in &errors {
        let text = error.to_string();
        assert!(!text.contains(SECRET), "Display: {text}");
    }
    for error in &errors {
        let text = format!("{error:?}");
        assert!(!text.contains(SECRET), "Debug: {text}");
    }
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

/// A transaction that is dropped between two attempts holds nothing, not even a connection.
#[tokio::test]
async fn between_two_attempts_nothing_is_held() {
    let scene = Scene::with_two_rows(1).await;
    let runs = AtomicU32::new(0);
    let transaction =
        scene
            .keeper
            .transaction_with(TransactionOptions::new().attempts(50), async |tx| {
                runs.fetch_add(1, Ordering::Relaxed);
                insert(tx, 10).await?;
                tx.batch_execute(&raise("40001")).await?;
                Ok::<_, AppError>(())
            });
    let mut transaction = Box::pin(transaction);
    tokio::select! {
        answer = &mut transaction => panic!("{answer:?}"),
        () = eventually("no fourth run", async || runs.load(Ordering::Relaxed) >= 4) => {}
    }
    drop(transaction);
    scene.nothing_left().await;
    assert_eq!(ids(&scene).await, [1, 2]);
    let before = runs.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(runs.load(Ordering::Relaxed), before);
}
