//! What is run again, how often, and what is held in between.

use std::collections::HashSet;
use std::error::Error as StdError;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockkeeper::tokio_postgres::IsolationLevel;
use lockkeeper::{Error, ErrorKind, TransactionOptions, Tx};
use lockkeeper_testkit::{
    AppError, CapturedLog, GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, raise,
    sqlstate, until_sleeping,
};
use tokio::sync::{Barrier, Notify};

use super::{Nothing, fails_once, ids, insert};

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
                assert_error_in(raised, &error, kind, &format!("(SQLSTATE {raised})"));
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
    assert_error(&error, ErrorKind::Cancelled, "SQLSTATE 57014");
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
    assert_error(&answer.unwrap_err(), ErrorKind::Cancelled, "SQLSTATE 57014");
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
    assert_error(
        &error,
        ErrorKind::RetriesExhausted,
        "3 attempts (SQLSTATE 40001)",
    );
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
        assert_error(&error, ErrorKind::RetriesExhausted, "(SQLSTATE 40P01)");
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
    assert_error(
        &error,
        ErrorKind::RetriesExhausted,
        "2 attempts (SQLSTATE 40001)",
    );
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
    assert_error(&error, ErrorKind::RetriesExhausted, "out of time");
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
}
