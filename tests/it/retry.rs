//! What is run again beside what PostgreSQL says of itself: errors of the application's own, searched or not; and what is
//! not, because waiting was not asked for.

use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions, Tx, is_retryable};
use lockkeeper_testkit::{
    Scene, assert_error, assert_error_in, eventually, poll_times_and_drop, raise,
};
use tokio_postgres::{Client, IsolationLevel};

/// A user's error.
#[derive(Debug, PartialEq, Eq)]
enum Mine {
    Stale(u32),
    Other(u32),
    Database(String),
}

impl From<Error> for Mine {
    fn from(error: Error) -> Self {
        Self::Database(error.to_string())
    }
}

impl From<tokio_postgres::Error> for Mine {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.code().map_or("none", |code| code.code()).to_owned())
    }
}

fn stale(error: &Mine) -> bool {
    matches!(error, Mine::Stale(_))
}

async fn rows(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene
        .observer
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0)")
        .await
        .unwrap();
    scene
}

async fn count(scene: &Scene) -> i64 {
    let sql = "SELECT count(*) FROM t";
    scene.observer.query_one(sql, &[]).await.unwrap().get(0)
}

// Errors of the application's own.

#[tokio::test]
async fn an_error_of_the_applications_own_is_retried_where_it_says_so() {
    let scene = rows(1).await;
    let runs = AtomicU32::new(0);
    let options = TransactionOptions::new().retry_if(stale);
    let pid = scene
        .keeper
        .transaction_with(options.clone(), async |tx| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("INSERT INTO t VALUES (2, 0)", &[]).await?;
            if run < 2 {
                return Err(Mine::Stale(run));
            }
            Ok(tx.backend_pid())
        })
        .await
        .unwrap();
    assert_eq!(runs.swap(0, Ordering::Relaxed), 3);
    assert_eq!(count(&scene).await, 2);

    let answer = scene
        .keeper
        .transaction_with(options, async |tx| {
            // The rollbacks before have left the connection in the pool.
            assert_eq!(tx.backend_pid(), pid);
            let run = runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("INSERT INTO t VALUES (3, 0)", &[]).await?;
            Err::<(), _>(if run == 0 {
                Mine::Stale(run)
            } else {
                Mine::Other(run)
            })
        })
        .await;
    assert_eq!(answer, Err(Mine::Other(1)));
    assert_eq!(count(&scene).await, 2);
    scene.nothing_left().await;
}

/// The last one, not one of ours about it.
#[tokio::test]
async fn it_comes_back_as_it_was_when_there_are_no_attempts_left() {
    let scene = rows(1).await;
    for attempts in [1, 4] {
        let runs = AtomicU32::new(0);
        let options = TransactionOptions::new().attempts(attempts).retry_if(stale);
        let answer = scene
            .keeper
            .transaction_with(options, async |tx| {
                tx.execute("INSERT INTO t VALUES (2, 0)", &[]).await?;
                Err::<(), _>(Mine::Stale(runs.fetch_add(1, Ordering::Relaxed)))
            })
            .await;
        assert_eq!(answer, Err(Mine::Stale(attempts - 1)));
        assert_eq!(runs.load(Ordering::Relaxed), attempts);
        assert_eq!(count(&scene).await, 1);
    }
    scene.nothing_left().await;
}

#[tokio::test]
async fn it_is_asked_for_what_postgresql_does_not_decide() {
    let scene = rows(1).await;
    for (code, asked) in [
        ("40001", 0),
        ("40P01", 0),
        ("55P03", 0),
        ("23505", 2),
        ("57014", 2),
        ("P0001", 2),
    ] {
        let (asks, runs) = (AtomicU32::new(0), AtomicU32::new(0));
        let options = TransactionOptions::new().attempts(5).retry_if(|error| {
            asks.fetch_add(1, Ordering::Relaxed);
            assert_eq!(*error, Mine::Database(code.to_owned()));
            true
        });
        scene
            .keeper
            .transaction_with(options, async |tx| {
                if runs.fetch_add(1, Ordering::Relaxed) < 2 {
                    tx.batch_execute(&raise(code)).await?;
                }
                Ok::<_, Mine>(())
            })
            .await
            .unwrap();
        assert_eq!(runs.load(Ordering::Relaxed), 3, "{code}");
        assert_eq!(asks.load(Ordering::Relaxed), asked, "{code}");
    }
    // Nor for COMMIT's errors, which are not the closure's.
    scene
        .observer
        .batch_execute("CREATE TABLE d (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        .await
        .unwrap();
    let options = TransactionOptions::new().retry_if(|error: &Mine| panic!("asked for {error:?}"));
    let answer = scene
        .keeper
        .transaction_with(options, async |tx| {
            tx.batch_execute("INSERT INTO d VALUES (1), (1)").await?;
            Ok::<_, Mine>(())
        })
        .await;
    assert!(matches!(answer, Err(Mine::Database(_))));
    scene.nothing_left().await;
}

#[tokio::test]
async fn its_retries_have_the_same_deadline_and_budget() {
    let scene = Scene::new(1).await;
    let options = TransactionOptions::new()
        .attempts(u32::MAX)
        .deadline(Duration::from_secs(2))
        .retry_if(stale);
    let runs = AtomicU32::new(0);
    // The time counts from before the connection is there.
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    let started = Instant::now();
    let always = async |_: &mut Tx| Err::<(), _>(Mine::Stale(runs.fetch_add(1, Ordering::Relaxed)));
    let answer = scene.keeper.transaction_with(options, always).await;
    let ran = runs.swap(0, Ordering::Relaxed);
    assert_eq!(answer, Err(Mine::Stale(ran - 1)));
    assert!((2..100).contains(&ran), "{ran} runs");
    assert!(started.elapsed() < Duration::from_secs(10));

    // A hundred retries in a row, of all transactions together, and then one for five that succeed.
    let keeper = Keeper::new(scene.pool.clone());
    let options = TransactionOptions::new().attempts(41).retry_if(stale);
    for (more, left) in [(40, 60), (40, 20), (20, 0), (0, 0)] {
        let answer = keeper
            .clone()
            .transaction_with(options.clone(), always)
            .await;
        let ran = runs.swap(0, Ordering::Relaxed);
        assert_eq!(ran, more + 1, "{left} left");
        assert_eq!(answer, Err(Mine::Stale(ran - 1)));
    }
    // Postgresql's own failures have none left either.
    let error = keeper
        .transaction(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute(&raise("40001")).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("40001"));
    assert_eq!(runs.swap(0, Ordering::Relaxed), 1);
    for _ in 0..5 {
        keeper
            .transaction(async |_| Ok::<_, Error>(()))
            .await
            .unwrap();
    }
    drop(keeper.transaction_with(options, always).await);
    assert_eq!(runs.load(Ordering::Relaxed), 2);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_question_that_panics_leaves_nothing_behind() {
    let scene = rows(1).await;
    let keeper = scene.keeper.clone();
    let task = tokio::spawn(async move {
        let options = TransactionOptions::new().retry_if(|_: &Mine| panic!("on purpose"));
        keeper
            .transaction_with(options, async |tx| {
                tx.execute("INSERT INTO t VALUES (2, 0)", &[]).await?;
                Err::<(), _>(Mine::Other(0))
            })
            .await
    });
    assert!(task.await.unwrap_err().is_panic());
    assert_eq!(count(&scene).await, 1);
    scene.nothing_left().await;
}

// Errors with others behind them.

/// An error type with a source.
#[derive(Debug, thiserror::Error)]
#[error("while paying")]
struct Paying(#[source] Box<dyn StdError + Send + Sync>);

impl From<Error> for Paying {
    fn from(error: Error) -> Self {
        Self(error.into())
    }
}

impl From<tokio_postgres::Error> for Paying {
    fn from(error: tokio_postgres::Error) -> Self {
        Self(error.into())
    }
}

#[derive(Debug, thiserror::Error)]
enum Deep {
    #[error("one floor up")]
    Up(#[from] Middle),
    #[error(transparent)]
    Through(#[from] Error),
}

#[derive(Debug, thiserror::Error)]
#[error("in the middle")]
struct Middle(#[source] Error);

/// What the server says to a statement.
async fn failure(client: &Client, sql: &str) -> tokio_postgres::Error {
    let error = client.batch_execute(sql).await.unwrap_err();
    client.batch_execute("ROLLBACK").await.unwrap();
    error
}

#[tokio::test]
async fn a_failure_is_found_behind_other_errors() {
    let scene = rows(1).await;
    let client = scene.database.connect().await;
    for (code, again) in [
        ("40001", true),
        ("40P01", true),
        ("55P03", true),
        ("57014", false),
        ("25P02", false),
        ("23505", false),
    ] {
        let raised = async || failure(&client, &raise(code)).await;
        let error = raised().await;
        assert_eq!(is_retryable(&error), again, "{code}");
        assert_eq!(is_retryable(error.as_db_error().unwrap()), again, "{code}");
        assert_eq!(Error::from(error).is_retryable(), again, "{code}");
        assert_eq!(is_retryable(&Error::from(raised().await)), again, "{code}");

        let boxed: Box<dyn StdError + Send + Sync> = raised().await.into();
        assert_eq!(is_retryable(&*boxed), again, "{code}");
        assert_eq!(is_retryable(&Paying(boxed)), again, "{code}");
        let twice = Paying(Box::new(Paying(Error::from(raised().await).into())));
        assert_eq!(is_retryable(&twice), again, "{code}");

        let error = anyhow::Error::new(raised().await)
            .context("one")
            .context("two");
        assert_eq!(is_retryable(error.as_ref()), again, "{code}");
        let error = anyhow::Error::new(Error::from(raised().await)).context("one");
        assert_eq!(is_retryable(&*error), again, "{code}");

        let deep = Deep::Up(Middle(raised().await.into()));
        assert_eq!(is_retryable(&deep), again, "{code}");
        let deep = Deep::Through(raised().await.into());
        assert_eq!(is_retryable(&deep), again, "{code}");
    }
    // What another keeper has retried already is not retried again.
    let exhausted = scene
        .keeper
        .transaction_with(TransactionOptions::new().attempts(2), async |tx| {
            tx.batch_execute(&raise("40001")).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_error(
        &exhausted,
        ErrorKind::RetriesExhausted,
        "2 attempts (SQLSTATE 40001)",
    );
    assert!(!is_retryable(&exhausted) && !is_retryable(&Paying(exhausted.into())));
    assert!(!is_retryable(&std::fmt::Error));
}

/// The closure's type keeps its sources, and the failure is another connection's: what this transaction has seen says
/// nothing of it.
#[tokio::test]
async fn failures_of_other_connections_are_retried_by_their_sources() {
    let scene = rows(1).await;
    let other = scene.database.connect().await;
    for (options, runs_expected) in [(false, 1), (true, 3)] {
        let runs = AtomicU32::new(0);
        let body = async |_: &mut Tx| {
            if runs.fetch_add(1, Ordering::Relaxed) < 2 {
                other.batch_execute(&raise("40001")).await?;
            }
            Ok::<_, Paying>(())
        };
        let answer = if options {
            let options = TransactionOptions::new().retry_if(|error: &Paying| is_retryable(error));
            scene.keeper.transaction_with(options, body).await
        } else {
            scene.keeper.transaction(body).await
        };
        assert_eq!(answer.is_ok(), options);
        assert_eq!(runs.load(Ordering::Relaxed), runs_expected);
    }
    scene.nothing_left().await;
}

/// A connection that is lost inside the closure has applied nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_connection_is_retried_where_the_caller_says_so() {
    let scene = rows(2).await;
    let runs = AtomicU32::new(0);
    let options = TransactionOptions::new().retry_if(Error::is_retryable);
    scene
        .keeper
        .transaction_with(options, async |tx| {
            tx.execute("INSERT INTO t VALUES (2, 0)", &[]).await?;
            if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                let pid = tx.backend_pid().unwrap();
                scene
                    .observer
                    .execute("SELECT pg_terminate_backend($1)", &[&pid])
                    .await?;
                tx.execute("SELECT 1", &[]).await?;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(runs.load(Ordering::Relaxed), 2);
    assert_eq!(count(&scene).await, 2);
    scene.nothing_left().await;
}

// Locks that are not waited for.

/// NOWAIT asks for an answer now, and has it. A timeout says that waiting was in vain, this time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nowait_is_not_retried_and_a_lock_timeout_is() {
    let scene = rows(2).await;
    let (queued, holder) = (
        scene.database.connect().await,
        scene.database.connect().await,
    );
    scene
        .observer
        .batch_execute(
            "CREATE VIEW v AS SELECT * FROM t; CREATE TABLE p (id int) PARTITION BY RANGE (id); \
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)",
        )
        .await
        .unwrap();
    for (held, asked) in [
        ("UPDATE t SET n = 1", "SELECT FROM t FOR UPDATE"),
        ("LOCK TABLE t", "LOCK TABLE t"),
        ("LOCK TABLE t", "LOCK TABLE v"),
        ("LOCK TABLE p1", "LOCK TABLE p"),
        ("queued", "SELECT FROM t FOR UPDATE"),
    ] {
        let begin = format!(
            "BEGIN; {}",
            if held == "queued" {
                "UPDATE t SET n = 1"
            } else {
                held
            }
        );
        holder.batch_execute(&begin).await.unwrap();
        let waiter = async {
            if held == "queued" {
                queued.batch_execute("UPDATE t SET n = 2").await.unwrap();
            }
        };
        let asks = async {
            if held == "queued" {
                // Another session is the next already.
                eventually("no session waits", async || {
                    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                               AND wait_event_type = 'Lock'";
                    let row = scene.observer.query_one(sql, &[]).await.unwrap();
                    row.get::<_, i64>(0) == 1
                })
                .await;
            }
            for (nowait, runs_expected) in [(true, 1), (false, 3)] {
                let sql = if nowait {
                    format!("{asked} NOWAIT")
                } else {
                    asked.to_owned()
                };
                let runs = AtomicU32::new(0);
                let options = TransactionOptions::new()
                    .attempts(3)
                    .lock_timeout(Duration::from_millis(10))
                    .retry_if(|error: &Error| is_retryable(error));
                let answer = scene
                    .keeper
                    .transaction_with(options, async |tx| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        tx.batch_execute(&sql).await?;
                        Ok::<_, Error>(())
                    })
                    .await;
                let error = answer.unwrap_err();
                assert_eq!(runs.load(Ordering::Relaxed), runs_expected, "{held}: {sql}");
                let kind = if nowait {
                    ErrorKind::LockTimeout
                } else {
                    ErrorKind::RetriesExhausted
                };
                assert_error_in(&sql, &error, kind, "(SQLSTATE 55P03)");
                assert!(
                    !error.is_retryable() && !is_retryable(&error),
                    "{held}: {sql}"
                );
            }
            holder.batch_execute("ROLLBACK").await.unwrap();
        };
        tokio::join!(waiter, asks);
    }
    scene.nothing_left().await;
}

/// Transactions that meet again and again: as many retries as the budget has, and no more, and what is done is done once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_deadlocks_stays_within_its_budget() {
    let scene = Scene::new(8).await;
    scene
        .observer
        .batch_execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL); \
             INSERT INTO t SELECT g, 0 FROM generate_series(0, 3) AS g (g); \
             ALTER DATABASE {} SET deadlock_timeout = '10ms'",
            scene.database.name()
        ))
        .await
        .unwrap();
    let (runs, done) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let tasks: Vec<_> = (0..8_i32)
        .map(|task| {
            let keeper = scene.keeper.clone();
            let (runs, done) = (Arc::clone(&runs), Arc::clone(&done));
            tokio::spawn(async move {
                for turn in 0..40 {
                    let runs = Arc::clone(&runs);
                    let options = TransactionOptions::new().attempts(20);
                    let answer = keeper
                        .transaction_with(options, async move |tx| {
                            runs.fetch_add(1, Ordering::Relaxed);
                            // Each in an order of its own.
                            for step in 0..3 {
                                let id = if task % 2 == 0 {
                                    (turn + step) % 4
                                } else {
                                    (turn + 3 - step) % 4
                                };
                                tx.execute("UPDATE t SET n = n + 1 WHERE id = $1", &[&id])
                                    .await?;
                            }
                            Ok::<_, Error>(())
                        })
                        .await;
                    match answer {
                        Ok(()) => drop(done.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => {
                            let code = error.sqlstate().map(|state| state.code());
                            assert_eq!(code, Some("40P01"), "{error}");
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let (runs, done) = (runs.load(Ordering::Relaxed), done.load(Ordering::Relaxed));
    let row = scene.observer.query_one("SELECT sum(n) FROM t", &[]);
    assert_eq!(row.await.unwrap().get::<_, i64>(0), i64::from(done) * 3);
    // 100, and one for five that have succeeded.
    let retries = runs - 320;
    assert!(retries <= 100 + done / 5, "{retries} retries, {done} done");
    assert!(done > 40, "{done} of 320 done, {retries} retries");
    scene.nothing_left().await;
}

/// All options at once, dropped at every point.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_all_options_it_may_be_dropped_at_any_point() {
    let scene = rows(2).await;
    let mut polls = 0;
    loop {
        let runs = AtomicU32::new(0);
        let hooks = Arc::new(AtomicU32::new(0));
        let options = TransactionOptions::new()
            .isolation(IsolationLevel::RepeatableRead)
            .lock_timeout(Duration::from_secs(1))
            .deadline(Duration::from_secs(60))
            .resolve_commit()
            .conflict_group("group")
            .retry_if(stale);
        let transaction = scene.keeper.transaction_with(options, async |tx| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("UPDATE t SET n = n + 1", &[]).await?;
            let counter = Arc::clone(&hooks);
            tx.after_commit(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            match run {
                0 | 1 => tx.batch_execute(&raise("40P01")).await?,
                2 => {
                    tx.savepoint(async |_| Err::<(), _>(Mine::Stale(run)))
                        .await?;
                }
                _ => {}
            }
            Ok::<_, Mine>(())
        });
        let finished = poll_times_and_drop(transaction, polls).await;
        scene.nothing_left().await;
        let row = scene.observer.query_one("SELECT n FROM t", &[]);
        let n: i32 = row.await.unwrap().get(0);
        let hooks = hooks.load(Ordering::Relaxed);
        scene
            .observer
            .batch_execute("UPDATE t SET n = 0")
            .await
            .unwrap();
        match finished {
            Some(answer) => {
                answer.unwrap();
                assert_eq!(runs.load(Ordering::Relaxed), 4);
                assert_eq!((n, hooks), (1, 1));
                break;
            }
            // Dropped in COMMIT it is committed, and the caller is not told.
            None => assert!(
                n <= 1 && hooks == 0,
                "{polls} polls: {n} times, {hooks} hooks"
            ),
        }
        polls += 1;
    }
    assert!(polls > 20, "only {polls} polls");
}
