//! Connections that are cut before, in and after COMMIT.

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::tokio_postgres::{Config, NoTls};
use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, Fault, GIVE_UP_AFTER, Proxy, Scene, assert_error, assert_error_in,
    eventually, eventually_within, signal, until_closed, until_sleeping,
};
use tokio::net::TcpListener;

use super::{fails_once, ids};

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
                _ => until_closed(tx.client()).await,
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
            assert_error_in(
                way,
                &error,
                ErrorKind::ConnectionLost,
                "before commit, nothing is applied",
            );
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
            until_closed(tx.client()).await;
            Ok::<_, Error>(())
        })
        .await;
    assert_error(
        &answer.unwrap_err(),
        ErrorKind::ConnectionLost,
        "before commit, nothing is applied",
    );
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    assert_eq!(ids(&scene).await, [1, 2]);
    scene.nothing_left().await;
}

/// A side connection that is refused, or never answered: everything works without it.
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
        assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#);
        assert_eq!(error.blockers()[0].pid(), guard.backend_pid());
        let waiter = tokio::spawn({
            let keeper = keeper.clone();
            async move {
                let body =
                    async |tx: &mut Tx| tx.advisory_lock("k").wait(Duration::from_secs(60)).await;
                keeper.transaction(body).await
            }
        });
        scene.until_awaited("k").await;
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
    // Nothing but the test's own transactions is to end with COMMIT.
    let pool = proxy.pool(&scene.database.config(), 2);
    let keeper = Keeper::builder(pool).watch(false).build();
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
                    assert_error_in(&what, error, ErrorKind::CommitUnknown, "outcome unknown");
                    assert!(!error.is_retryable(), "{what}");
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
    // And the pool behind the proxy still works.
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

/// COMMIT is held up by a deferred trigger, and its backend terminated, or the COMMIT cancelled. The server says so in the
/// place of COMMIT's answer, so it is known that nothing is committed.
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
    for (function, kind, text) in [
        (
            "pg_terminate_backend",
            ErrorKind::ConnectionLost,
            "the server ended the session before COMMIT (SQLSTATE 57P01)",
        ),
        ("pg_cancel_backend", ErrorKind::Cancelled, "SQLSTATE 57014"),
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
        assert_error_in(function, &error, kind, text);
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        assert_eq!(scene.count("t WHERE id = 10").await, 0);
        scene.nothing_left().await;
    }
}

/// Dropped while COMMIT waits for its answer: COMMIT continues, and the connection comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_dropped_continues() {
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
