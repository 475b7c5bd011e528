//! Guards and sections: who gets the lock when, what is committed, what a drop leaves behind.

use std::time::{Duration, Instant};

use futures::{SinkExt as _, StreamExt as _, TryStreamExt as _, pin_mut};
use lockkeeper::{Error, ErrorKind, LockKey};
use lockkeeper_testkit::{
    AppError, Scene, Server, eventually, lock_by_sql, median, sqlstate, unlock_by_sql,
};
use tokio_postgres::types::Type;

async fn notes(scene: &Scene) -> Vec<i32> {
    scene.column("SELECT n FROM note ORDER BY n").await
}

async fn scene_with_notes(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene.run("CREATE TABLE note (n int4 PRIMARY KEY)").await;
    scene
}

fn divided_by_zero(error: &Error) -> bool {
    sqlstate(error) == "22012"
}

#[tokio::test]
async fn a_held_key_is_busy_for_every_scope_and_another_key_is_free() {
    let scene = Scene::new(3).await;
    let keeper = &scene.keeper;
    for holder_in_session in [false, true] {
        // The holder, in either scope.
        let (xact, session) = if holder_in_session {
            (
                None,
                Some(keeper.advisory_lock("k").session().acquire().await.unwrap()),
            )
        } else {
            (
                Some(keeper.advisory_lock("k").acquire().await.unwrap()),
                None,
            )
        };
        let holder = xact
            .as_ref()
            .and_then(lockkeeper::XactGuard::backend_pid)
            .or(session
                .as_ref()
                .and_then(lockkeeper::SessionGuard::backend_pid))
            .unwrap();
        assert_eq!(scene.holders("k").await, [holder]);

        assert!(
            keeper
                .advisory_lock("k")
                .try_acquire()
                .await
                .unwrap()
                .is_none()
        );
        assert!(
            keeper
                .advisory_lock("k")
                .session()
                .try_acquire()
                .await
                .unwrap()
                .is_none()
        );
        // A refusal leaves nothing behind.
        assert_eq!(scene.advisory_locks().await, 1);

        let other = keeper.advisory_lock("another").try_acquire().await.unwrap();
        let other = other.expect("another key is free");
        let session_other = keeper
            .advisory_lock("a third")
            .session()
            .try_acquire()
            .await
            .unwrap()
            .expect("a third key is free");
        let pids = [
            Some(holder),
            other.backend_pid(),
            session_other.backend_pid(),
        ];
        assert!(
            pids.iter().all(Option::is_some)
                && pids[0] != pids[1]
                && pids[1] != pids[2]
                && pids[0] != pids[2],
            "{pids:?}"
        );
        // B goes on using its connection, so that the one which gets the key next is another one than A's.
        drop(session_other);
        drop((xact, session));
        let waits = keeper.advisory_lock("k").wait(Duration::from_secs(5));
        let after = waits.acquire().await.unwrap();
        assert_eq!(scene.holders("k").await, [after.backend_pid().unwrap()]);
        after.rollback().await;
        other.rollback().await;
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_gets_the_key_when_its_holder_ends_in_any_way() {
    let scene = Scene::new(2).await;
    for end in ["drop", "commit", "rollback", "session drop", "release"] {
        let keeper = scene.keeper.clone();
        let (xact, session) = if matches!(end, "session drop" | "release") {
            let lock = keeper.advisory_lock("k").session();
            (None, Some(lock.acquire().await.unwrap()))
        } else {
            (
                Some(keeper.advisory_lock("k").acquire().await.unwrap()),
                None,
            )
        };
        let holder = scene.holders("k").await;
        let waiter = tokio::spawn(async move {
            let guard = keeper
                .advisory_lock("k")
                .wait(Duration::from_secs(20))
                .acquire()
                .await
                .unwrap();
            let pid = guard.backend_pid().unwrap();
            guard.commit().await.unwrap();
            pid
        });
        eventually("no waiter", async || !scene.waiters("k").await.is_empty()).await;
        assert!(!waiter.is_finished());
        match (xact, session) {
            (Some(guard), _) if end == "drop" => drop(guard),
            (Some(guard), _) if end == "commit" => guard.commit().await.unwrap(),
            (Some(guard), _) => guard.rollback().await,
            (_, Some(guard)) if end == "release" => guard.release().await.unwrap(),
            (_, guard) => drop(guard),
        }
        let pid = tokio::time::timeout(Duration::from_secs(5), waiter)
            .await
            .expect("it gets the key soon")
            .unwrap();
        assert_ne!([pid], *holder, "{end}: another backend");
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn a_section_commits_on_ok_and_rolls_back_on_err() {
    let scene = scene_with_notes(2).await;
    let keeper = &scene.keeper;

    let (value, pid) = keeper
        .with_advisory_lock("k", async |tx| {
            tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
            Ok::<_, AppError>((17, tx.backend_pid()))
        })
        .await
        .unwrap();
    assert_eq!(value, 17);
    assert_eq!(notes(&scene).await, [1]);

    let failed: Result<(), AppError> = keeper
        .with_advisory_lock("k", async |tx| {
            tx.execute("INSERT INTO note VALUES (2)", &[]).await?;
            Err(AppError::Own(7))
        })
        .await;
    assert!(matches!(failed, Err(AppError::Own(7))), "{failed:?}");
    assert_eq!(notes(&scene).await, [1]);

    // The driver's error is the driver's, untouched.
    let failed: Result<(), AppError> = keeper
        .with_advisory_lock("k", async |tx| {
            tx.execute("INSERT INTO note VALUES (3)", &[]).await?;
            tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
            Ok(())
        })
        .await;
    let Err(AppError::Driver(error)) = failed else {
        panic!("not as it was: {failed:?}");
    };
    assert_eq!(error.code().map(|code| code.code()), Some("23505"));
    assert_eq!(notes(&scene).await, [1]);

    // The same connection served all of it.
    assert_eq!(Some(scene.next_pid().await), pid);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_section_holds_its_lock_while_it_runs() {
    let scene = scene_with_notes(3).await;
    let keeper = &scene.keeper;
    keeper
        .with_advisory_lock("k", async |tx| {
            assert_eq!(scene.holders("k").await, [tx.backend_pid().unwrap()]);
            assert_eq!(tx.held_keys().collect::<Vec<_>>(), [&LockKey::from("k")]);
            let ran = keeper
                .try_with_advisory_lock("k", async |_| Ok::<_, AppError>("ran"))
                .await?;
            assert_eq!(ran, None);
            let elsewhere = keeper
                .try_with_advisory_lock("another", async |other| {
                    assert_ne!(other.backend_pid(), tx.backend_pid());
                    Ok::<_, AppError>(())
                })
                .await?;
            assert_eq!(elsewhere, Some(()));
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_try_section_runs_only_when_the_lock_is_free() {
    let scene = scene_with_notes(2).await;
    let keeper = &scene.keeper;
    let holder = scene.database.connect().await;
    lock_by_sql(&holder, "k").await;

    let began = Instant::now();
    let section = async |tx: &mut lockkeeper::Tx| {
        tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
        Ok::<_, AppError>(1)
    };
    assert_eq!(
        keeper.try_with_advisory_lock("k", section).await.unwrap(),
        None
    );
    assert!(began.elapsed() < Duration::from_secs(5), "it never waits");
    assert_eq!(notes(&scene).await, [0; 0]);

    unlock_by_sql(&holder, "k").await;
    assert_eq!(
        keeper.try_with_advisory_lock("k", section).await.unwrap(),
        Some(1)
    );
    assert_eq!(notes(&scene).await, [1]);

    let failed: Result<Option<()>, AppError> = keeper
        .try_with_advisory_lock("k", async |tx| {
            tx.execute("INSERT INTO note VALUES (2)", &[]).await?;
            Err(AppError::Own(9))
        })
        .await;
    assert!(matches!(failed, Err(AppError::Own(9))), "{failed:?}");
    assert_eq!(notes(&scene).await, [1]);
    scene.nothing_left().await;
}

#[tokio::test]
async fn the_next_holder_sees_what_the_last_one_committed() {
    let scene = scene_with_notes(2).await;
    let first = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    first
        .execute("INSERT INTO note VALUES (1)", &[])
        .await
        .unwrap();
    let next = tokio::spawn({
        let keeper = scene.keeper.clone();
        async move {
            keeper
                .with_advisory_lock("k", async |tx| {
                    let row = tx.query_one("SELECT count(*) FROM note", &[]).await?;
                    Ok::<i64, AppError>(row.get(0))
                })
                .await
                .unwrap()
        }
    });
    eventually("no waiter", async || !scene.waiters("k").await.is_empty()).await;
    first.commit().await.unwrap();
    assert_eq!(next.await.unwrap(), 1);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_guard_frees_its_key_at_once_and_its_connection_goes_on() {
    let scene = Scene::new(1).await;
    let client = scene.database.connect().await;
    for scope in ["transaction", "session", "several", "shared session"] {
        let (mut took, mut plain) = (Vec::new(), Vec::new());
        let mut pids = Vec::new();
        for _ in 0..15 {
            plain.push(scene.time_of_release_by_sql(&client).await);
            let lock = scene.keeper.advisory_locks(["k", "l"]);
            let session = |lock: lockkeeper::AdvisoryLock| async move {
                let guard = lock.session().acquire().await.unwrap();
                (guard.backend_pid(), Some(guard))
            };
            let (pid, xact, session) = match scope {
                "transaction" => {
                    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
                    (guard.backend_pid(), Some(guard), None)
                }
                "several" => {
                    let guard = lock.acquire().await.unwrap();
                    (guard.backend_pid(), Some(guard), None)
                }
                "session" => {
                    let (pid, guard) = session(scene.keeper.advisory_lock("k")).await;
                    (pid, None, guard)
                }
                _ => {
                    let (pid, guard) = session(lock.shared()).await;
                    (pid, None, guard)
                }
            };
            assert!(scene.is_held("k").await);
            pids.push(pid.unwrap());
            let dropped = Instant::now();
            drop((xact, session));
            // A machine that stands still for a while is no bug of ours: the median judges.
            took.push(scene.time_until_no_advisory_lock(dropped).await);
        }
        let (took, plain) = (median(took), median(plain));
        let most = Duration::from_millis(50) + plain;
        assert!(took < most, "{scope}: {took:?} and not {plain:?}");
        let same = scene.next_pid().await;
        assert!(pids.iter().all(|pid| *pid == same), "{scope}: {pids:?}");
        scene.nothing_left().await;
    }
}

fn warnings(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| line.contains("WARNING:"))
        .collect()
}

/// All that an application does in a day: none of it is worth a WARNING in the server's log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn normal_use_writes_no_warning_to_the_servers_log() {
    let server = Server::start(&[]).unwrap();
    let scene = Scene::on(&server, 4).await;
    let keeper = &scene.keeper;
    scene
        .observer
        .batch_execute("CREATE TABLE note (n int4 PRIMARY KEY)")
        .await
        .unwrap();
    let holder = scene.database.connect().await;
    let before = server.log_len();

    // Acquire, and each end there is.
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    guard.commit().await.unwrap();
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    guard.rollback().await;
    drop(keeper.advisory_lock("k").acquire().await.unwrap());
    drop(keeper.advisory_locks(["k", "l"]).acquire().await.unwrap());
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    guard.release().await.unwrap();
    drop(keeper.advisory_lock("k").session().acquire().await.unwrap());
    let set = || keeper.advisory_locks([LockKey::from("k"), (1, 2).into()]);
    set()
        .session()
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    drop(set().session().shared().acquire().await.unwrap());
    scene.nothing_left().await;

    // Busy, and waits that end in vain, in every form.
    lock_by_sql(&holder, "k").await;
    let short = Duration::from_millis(700);
    assert!(
        keeper
            .advisory_lock("k")
            .try_acquire()
            .await
            .unwrap()
            .is_none()
    );
    assert!(set().try_acquire().await.unwrap().is_none());
    let session = keeper.advisory_lock("k").session();
    assert!(session.clone().try_acquire().await.unwrap().is_none());
    assert!(set().session().try_acquire().await.unwrap().is_none());
    for wait in [Duration::ZERO, short] {
        let lock = keeper.advisory_lock("k").wait(wait);
        let error = lock.clone().acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout);
        let error = set().wait(wait).acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout);
        let error = session.clone().wait(wait).acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout);
        let error = set().session().wait(wait).acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout);
    }
    keeper
        .transaction(async |tx| {
            let error = tx.advisory_lock("k").wait(Duration::from_millis(30)).await;
            assert_eq!(error.unwrap_err().kind(), ErrorKind::LockTimeout);
            let error = tx.advisory_lock("k").wait(Duration::ZERO).await;
            assert_eq!(error.unwrap_err().kind(), ErrorKind::LockTimeout);
            assert!(!tx.advisory_lock("k").try_acquire().await?);
            tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();

    // Cancelled waits.
    for millis in [0, 1, 3, 20, 120] {
        let limit = Duration::from_millis(millis);
        drop(tokio::time::timeout(limit, keeper.advisory_lock("k").acquire()).await);
        drop(tokio::time::timeout(limit, session.clone().acquire()).await);
        drop(tokio::time::timeout(limit, set().acquire()).await);
        drop(tokio::time::timeout(limit, set().session().acquire()).await);
        let section =
            keeper.transaction(async |tx| Ok::<_, AppError>(tx.advisory_lock("k").await?));
        drop(tokio::time::timeout(limit, section).await);
    }
    unlock_by_sql(&holder, "k").await;
    scene.nothing_left().await;
    // And tries whose answer nobody waits for.
    for _ in 0..10 {
        for millis in [0, 1, 2] {
            let limit = Duration::from_millis(millis);
            drop(tokio::time::timeout(limit, keeper.advisory_lock("k").acquire()).await);
            drop(tokio::time::timeout(limit, session.clone().acquire()).await);
            drop(tokio::time::timeout(limit, set().session().try_acquire()).await);
        }
    }
    scene.nothing_left().await;

    // Errors in the section, swallowed and not.
    let failed: Result<(), AppError> = keeper
        .with_advisory_lock("k", async |tx| {
            tx.query("SELECT 1/0", &[]).await?;
            Ok(())
        })
        .await;
    assert!(matches!(failed, Err(AppError::Driver(_))));
    let swallowed: Result<(), AppError> = keeper
        .with_advisory_lock("k", async |tx| {
            drop(tx.query("SELECT 1/0", &[]).await);
            Ok(())
        })
        .await;
    let Err(AppError::Keeper(error)) = swallowed else {
        panic!("not the crate's own: {swallowed:?}");
    };
    assert!(divided_by_zero(&error), "{error}");
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    guard.query("SELECT 1/0", &[]).await.unwrap_err();
    drop(guard);
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    guard.query("SELECT 1/0", &[]).await.unwrap_err();
    guard.release().await.unwrap();
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    guard.batch_execute("BEGIN; SELECT 1").await.unwrap();
    guard.query("SELECT 1/0", &[]).await.unwrap_err();
    guard.release().await.unwrap();
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    guard.batch_execute("BEGIN; SELECT 1").await.unwrap();
    drop(guard);
    scene.nothing_left().await;

    // Transactions on a session guard, and savepoints.
    let mut guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    let failed: Result<(), AppError> = guard.transaction(async |_| Err(AppError::Own(1))).await;
    assert!(failed.is_err());
    let swallowed: Result<(), AppError> = guard
        .transaction(async |tx| {
            drop(tx.query("SELECT 1/0", &[]).await);
            Ok(())
        })
        .await;
    assert!(swallowed.is_err());
    guard
        .transaction(async |tx| {
            let failed: Result<(), AppError> = tx
                .savepoint(async |tx| {
                    tx.advisory_lock("inside").await?;
                    tx.query("SELECT 1/0", &[]).await?;
                    Ok(())
                })
                .await;
            assert!(failed.is_err());
            tx.savepoint(async |tx| {
                tx.execute("INSERT INTO note VALUES (2)", &[]).await?;
                Ok::<_, AppError>(())
            })
            .await
        })
        .await
        .unwrap();
    drop(guard);

    // Another isolation level, by either way in.
    let level = tokio_postgres::IsolationLevel::RepeatableRead;
    let guard = keeper.advisory_lock("k").isolation(level);
    guard
        .clone()
        .acquire()
        .await
        .unwrap()
        .commit()
        .await
        .unwrap();
    drop(guard.try_acquire().await.unwrap());
    scene.nothing_left().await;

    let log = server.log_since(before);
    assert_eq!(warnings(&log), [""; 0]);
    // And a WARNING would have been seen.
    let before = server.log_len();
    scene.observer.batch_execute("ROLLBACK").await.unwrap();
    eventually("the log shows no WARNING", async || {
        !warnings(&server.log_since(before)).is_empty()
    })
    .await;
}

/// After an error of COMMIT itself there is no transaction left that could be rolled back.
#[tokio::test]
async fn a_commit_that_fails_by_itself_writes_no_warning_either() {
    let server = Server::start(&[]).unwrap();
    let scene = Scene::on(&server, 2).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE note (n int4 PRIMARY KEY DEFERRABLE INITIALLY DEFERRED); INSERT INTO note VALUES (1)",
        )
        .await
        .unwrap();
    let before = server.log_len();
    let duplicate = "INSERT INTO note VALUES (1)";
    let unique = |error: Error| {
        assert_eq!(error.kind(), ErrorKind::Database);
        assert_eq!(error.sqlstate().map(|code| code.code()), Some("23505"));
    };

    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    let pid = guard.backend_pid();
    guard.execute(duplicate, &[]).await.unwrap();
    unique(guard.commit().await.unwrap_err());
    assert!(!scene.is_held("k").await);
    assert_eq!(Some(scene.next_pid().await), pid, "the connection goes on");

    let error = scene.keeper.transaction(async |tx| {
        tx.execute(duplicate, &[]).await?;
        Ok::<_, Error>(())
    });
    unique(error.await.unwrap_err());

    let lock = scene.keeper.advisory_lock("k").session();
    let mut guard = lock.acquire().await.unwrap();
    let error = guard.transaction(async |tx| {
        tx.execute(duplicate, &[]).await?;
        Ok::<_, Error>(())
    });
    unique(error.await.unwrap_err());
    guard.release().await.unwrap();
    scene.nothing_left().await;
    let log = server.log_since(before);
    assert_eq!(warnings(&log), [""; 0]);
}

#[tokio::test]
async fn commit_of_an_aborted_transaction_is_an_error() {
    let scene = scene_with_notes(2).await;
    let keeper = &scene.keeper;

    // On a guard.
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    guard
        .execute("INSERT INTO note VALUES (1)", &[])
        .await
        .unwrap();
    guard.query("SELECT 1/0", &[]).await.unwrap_err();
    guard.query("SELECT 1", &[]).await.unwrap_err();
    let error = guard.commit().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database);
    assert!(divided_by_zero(&error), "{error}");
    assert_eq!(error.key(), Some(&LockKey::from("k")));
    assert!(!scene.is_held("k").await);

    // In a section, by each method that can fail.
    for way in [
        "query",
        "simple",
        "batch",
        "prepare",
        "raw",
        "client",
        "savepoint",
    ] {
        let result = keeper
            .with_advisory_lock("k", async |tx| {
                tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                match way {
                    "query" => drop(tx.query("SELECT 1/0", &[]).await),
                    "simple" => drop(tx.simple_query("SELECT 1/0").await),
                    "batch" => drop(tx.batch_execute("SELECT 1/0").await),
                    "prepare" => drop(tx.prepare("SELECT nothing_of_the_kind").await),
                    "raw" => {
                        let rows = tx.query_raw("SELECT 1/0", &[] as &[i32]).await?;
                        drop(rows.try_collect::<Vec<_>>().await);
                    }
                    "client" => drop(tx.client().query("SELECT 1/0", &[]).await),
                    // Inside a savepoint that was let go as if all were well.
                    _ => {
                        let swallowed = tx.savepoint(async |tx| {
                            drop(tx.query("SELECT 1/0", &[]).await);
                            Ok::<_, Error>(())
                        });
                        let error = swallowed.await.unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::Database);
                        // The savepoint was rolled back, so the rest can go on: it fails again, outside.
                        drop(tx.query("SELECT 1/0", &[]).await);
                    }
                }
                Ok::<_, Error>(())
            })
            .await;
        let error = result.expect_err(way);
        assert_eq!(error.kind(), ErrorKind::Database, "{way}");
        if matches!(way, "query" | "simple" | "batch" | "savepoint") {
            assert!(divided_by_zero(&error), "{way}: {error}");
        }
        assert_eq!(notes(&scene).await, [0; 0], "{way}");
    }
    scene.nothing_left().await;
}

/// Generic over the driver's trait.
async fn one_by_driver(client: &impl tokio_postgres::GenericClient) -> i32 {
    client.query_one("SELECT 1", &[]).await.unwrap().get(0)
}

/// Generic over the pool's trait.
async fn one_by_pool(client: &impl deadpool_postgres::GenericClient) -> i32 {
    let statement = client.prepare_cached("SELECT 1").await.unwrap();
    client.query_one(&statement, &[]).await.unwrap().get(0)
}

/// Every query method of `$owner`, all of them on one backend; leaves the rows 1 to 7 in `note`.
macro_rules! use_every_method {
    ($owner:expr) => {{
        let owner = $owner;
        let pid = owner.backend_pid().unwrap();
        const PID: &str = "SELECT pg_backend_pid()";

        let rows = owner.query(PID, &[]).await.unwrap();
        assert_eq!(rows[0].get::<_, i32>(0), pid);
        let row = owner
            .query_one("SELECT $1::int4 + 1", &[&1_i32])
            .await
            .unwrap();
        assert_eq!(row.get::<_, i32>(0), 2);
        owner
            .query_one("SELECT 1 WHERE false", &[])
            .await
            .unwrap_err();
        assert!(
            owner
                .query_opt("SELECT 1 WHERE false", &[])
                .await
                .unwrap()
                .is_none()
        );
        assert!(owner.query_opt(PID, &[]).await.unwrap().is_some());
        let rows = owner
            .query_raw("SELECT generate_series(1, $1)", [3_i32])
            .await
            .unwrap();
        assert_eq!(rows.try_collect::<Vec<_>>().await.unwrap().len(), 3);
        let rows = owner
            .query_typed("SELECT $1 || 'b'", &[(&"a", Type::TEXT)])
            .await
            .unwrap();
        assert_eq!(rows[0].get::<_, &str>(0), "ab");

        let insert = "INSERT INTO note VALUES ($1)";
        assert_eq!(owner.execute(insert, &[&1_i32]).await.unwrap(), 1);
        assert_eq!(
            owner
                .execute_typed(insert, &[(&2_i32, Type::INT4)])
                .await
                .unwrap(),
            1
        );
        assert_eq!(owner.execute_raw(insert, [3_i32]).await.unwrap(), 1);
        owner
            .batch_execute("INSERT INTO note VALUES (4); SELECT 1")
            .await
            .unwrap();
        let messages = owner.simple_query("SELECT 1; SELECT 2").await.unwrap();
        let rows = messages
            .iter()
            .filter(|message| matches!(message, tokio_postgres::SimpleQueryMessage::Row(_)));
        assert_eq!(rows.count(), 2);

        let statement = owner.prepare(insert).await.unwrap();
        assert_eq!(owner.execute(&statement, &[&5_i32]).await.unwrap(), 1);
        let statement = owner
            .prepare_typed("SELECT $1", &[Type::INT8])
            .await
            .unwrap();
        assert_eq!(
            owner
                .query_one(&statement, &[&6_i64])
                .await
                .unwrap()
                .get::<_, i64>(0),
            6
        );
        let statement = owner.prepare_cached(insert).await.unwrap();
        assert_eq!(owner.execute(&statement, &[&6_i32]).await.unwrap(), 1);
        let statement = owner
            .prepare_typed_cached("SELECT $1", &[Type::INT4])
            .await
            .unwrap();
        assert_eq!(
            owner
                .query_one(&statement, &[&6_i32])
                .await
                .unwrap()
                .get::<_, i32>(0),
            6
        );

        let sink = owner.copy_in("COPY note FROM STDIN").await.unwrap();
        pin_mut!(sink);
        sink.send(bytes_of("7\n")).await.unwrap();
        assert_eq!(sink.finish().await.unwrap(), 1);
        let out = owner
            .copy_out("COPY (SELECT n FROM note ORDER BY n) TO STDOUT")
            .await
            .unwrap();
        pin_mut!(out);
        let mut copied = Vec::new();
        while let Some(chunk) = out.next().await {
            copied.extend_from_slice(&chunk.unwrap());
        }
        assert_eq!(String::from_utf8_lossy(&copied), "1\n2\n3\n4\n5\n6\n7\n");

        assert_eq!(one_by_driver(&***owner.client()).await, 1);
        assert_eq!(one_by_pool(owner.client()).await, 1);
        let row = owner.client().query_one(PID, &[]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), pid);
        pid
    }};
}

/// Tries a few times whether a connection goes on. One whose plain client was given to the caller has only some
/// milliseconds for the answer that tells its state, which not every machine always has.
async fn keeps_its_connection(mut goes_on: impl AsyncFnMut() -> bool) {
    for _ in 0..5 {
        if goes_on().await {
            return;
        }
    }
    panic!("the connection does not go on");
}

async fn delete_notes(scene: &Scene) {
    let delete = scene.observer.batch_execute("DELETE FROM note");
    delete.await.unwrap();
}

fn bytes_of(text: &'static str) -> std::io::Cursor<&'static [u8]> {
    std::io::Cursor::new(text.as_bytes())
}

#[tokio::test]
async fn a_transaction_guard_offers_the_drivers_methods_inside_its_transaction() {
    let scene = scene_with_notes(1).await;
    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    let pid = use_every_method!(&guard);
    assert_eq!(notes(&scene).await, [0; 0], "not before the commit");
    guard.commit().await.unwrap();
    assert_eq!(notes(&scene).await, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(scene.next_pid().await, pid, "the connection goes on");

    // And a drop undoes all of it.
    delete_notes(&scene).await;
    keeps_its_connection(async || {
        let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
        let pid = use_every_method!(&guard);
        drop(guard);
        scene.nothing_left().await;
        assert_eq!(notes(&scene).await, [0; 0]);
        pid == scene.next_pid().await
    })
    .await;
}

#[tokio::test]
async fn a_transaction_offers_the_drivers_methods() {
    let scene = scene_with_notes(1).await;
    let pid = scene
        .keeper
        .transaction(async |tx| {
            let pid = use_every_method!(&*tx);
            assert_eq!(notes(&scene).await, [0; 0], "not before the commit");
            Ok::<_, Error>(pid)
        })
        .await
        .unwrap();
    assert_eq!(notes(&scene).await, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(scene.next_pid().await, pid, "the connection goes on");
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_session_guard_offers_the_drivers_methods() {
    let scene = scene_with_notes(1).await;
    let lock = scene.keeper.advisory_lock("k").session();
    keeps_its_connection(async || {
        delete_notes(&scene).await;
        let guard = lock.clone().acquire().await.unwrap();
        let pid = use_every_method!(&guard);
        assert_eq!(
            notes(&scene).await,
            [1, 2, 3, 4, 5, 6, 7],
            "each for itself"
        );
        assert_eq!(scene.holders("k").await, [pid]);
        guard.release().await.unwrap();
        pid == scene.next_pid().await
    })
    .await;

    keeps_its_connection(async || {
        delete_notes(&scene).await;
        let mut guard = lock.clone().acquire().await.unwrap();
        let pid = guard.backend_pid().unwrap();
        guard
            .transaction(async |tx| {
                assert_eq!(use_every_method!(&*tx), pid);
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        drop(guard);
        scene.nothing_left().await;
        pid == scene.next_pid().await
    })
    .await;
}

#[tokio::test]
async fn savepoints_nest_and_a_failing_one_leaves_the_outer_usable() {
    let scene = scene_with_notes(2).await;
    let mut guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    let insert = "INSERT INTO note VALUES ($1)";
    let held =
        |tx: &lockkeeper::Tx| -> Vec<String> { tx.held_keys().map(ToString::to_string).collect() };
    guard
        .savepoint(async |tx| {
            tx.execute(insert, &[&1_i32]).await?;
            tx.advisory_lock("outer").await?;
            // Fails by the server, by its own will, and with the error swallowed.
            for way in ["server", "own", "swallowed"] {
                let failed: Result<(), AppError> = tx
                    .savepoint(async |tx| {
                        tx.execute(insert, &[&2_i32]).await?;
                        tx.advisory_lock(("inner", way)).await?;
                        tx.savepoint(async |tx| {
                            tx.execute(insert, &[&3_i32]).await?;
                            tx.advisory_lock(("innermost", way)).await?;
                            Ok::<_, AppError>(())
                        })
                        .await?;
                        assert!(scene.is_held(("inner", way)).await);
                        assert!(scene.is_held(("innermost", way)).await);
                        assert_eq!(tx.held_keys().count(), 4);
                        match way {
                            "server" => drop(tx.query("SELECT 1/0", &[]).await?),
                            "own" => return Err(AppError::Own(5)),
                            _ => drop(tx.query("SELECT 1/0", &[]).await),
                        }
                        Ok(())
                    })
                    .await;
                match (way, failed) {
                    ("server", Err(AppError::Driver(_)))
                    | ("own", Err(AppError::Own(5)))
                    | ("swallowed", Err(AppError::Keeper(_))) => {}
                    (way, other) => panic!("{way}: {other:?}"),
                }
                // What was taken inside is gone with it, here and on the server.
                assert!(!scene.is_held(("inner", way)).await, "{way}");
                assert!(!scene.is_held(("innermost", way)).await, "{way}");
                assert!(scene.is_held("outer").await);
                assert_eq!(held(tx), [r#""k""#, r#""outer""#], "{way}");
            }
            tx.execute(insert, &[&4_i32]).await?;
            Ok::<_, AppError>(())
        })
        .await
        .unwrap();
    assert!(scene.is_held("k").await);
    assert!(scene.is_held("outer").await, "kept with its savepoint");
    guard.execute(insert, &[&5_i32]).await.unwrap();
    guard.commit().await.unwrap();
    assert_eq!(notes(&scene).await, [1, 4, 5]);
    scene.nothing_left().await;
}

/// A lock that is gone with a savepoint is taken again when it is asked for again, whoever set the savepoint.
#[tokio::test]
async fn a_lock_lost_with_a_savepoint_is_not_taken_to_be_held() {
    let scene = Scene::new(2).await;
    let mut guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    let failed: Result<(), AppError> = guard
        .savepoint(async |tx| {
            tx.advisory_lock("inside").await?;
            Err(AppError::Own(1))
        })
        .await;
    assert!(failed.is_err());
    assert!(!scene.is_held("inside").await);
    guard.advisory_lock("inside").await.unwrap();
    assert!(scene.is_held("inside").await);

    guard.batch_execute("SAVEPOINT mine").await.unwrap();
    guard.advisory_lock("plain").await.unwrap();
    assert!(scene.is_held("plain").await);
    guard
        .batch_execute("ROLLBACK TO SAVEPOINT mine")
        .await
        .unwrap();
    assert!(!scene.is_held("plain").await);
    guard.advisory_lock("plain").await.unwrap();
    assert!(
        scene.is_held("plain").await,
        "said to be held, and is not held"
    );
    guard.rollback().await;
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_guard_tells_what_it_holds() {
    let scene = Scene::new(2).await;
    let guard = scene
        .keeper
        .advisory_lock("k")
        .shared()
        .acquire()
        .await
        .unwrap();
    assert_eq!(guard.mode().to_string(), "ShareLock");
    assert_eq!(guard.held_keys().collect::<Vec<_>>(), [&LockKey::from("k")]);
    assert_eq!(
        guard.backend_pid().map(|pid| vec![pid]),
        Some(scene.holders("k").await)
    );
    drop(guard);
    let lock = scene.keeper.advisory_lock(7).session();
    let guard = lock.acquire().await.unwrap();
    assert_eq!(guard.mode().to_string(), "ExclusiveLock");
    assert_eq!(guard.held_keys(), [LockKey::from(7)]);
    assert!(!guard.is_lost());
    drop(guard);
    scene.nothing_left().await;
}
