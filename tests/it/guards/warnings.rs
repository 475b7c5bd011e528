//! What the server's log says of normal use.

use std::time::Duration;

use lockkeeper::{Error, ErrorKind, LockKey};
use lockkeeper_testkit::{
    AppError, Scene, Server, assert_error, eventually, lock_by_sql, unlock_by_sql,
};

use super::divided_by_zero;

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
        assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#);
        let error = set().wait(wait).acquire().await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, r#""k": and 1 more after"#);
        let error = session.clone().wait(wait).acquire().await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#);
        let error = set().session().wait(wait).acquire().await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, r#""k": and 1 more after"#);
    }
    keeper
        .transaction(async |tx| {
            let error = tx.advisory_lock("k").wait(Duration::from_millis(30)).await;
            assert_error(&error.unwrap_err(), ErrorKind::LockTimeout, r#""k" after"#);
            let error = tx.advisory_lock("k").wait(Duration::ZERO).await;
            assert_error(&error.unwrap_err(), ErrorKind::LockTimeout, r#""k" after"#);
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
    // And tries whose answer is not awaited.
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
        assert_error(
            &error,
            ErrorKind::Database,
            "commit failed, the transaction was rolled back (SQLSTATE 23505)",
        );
        assert_eq!(error.sqlstate().map(|code| code.code()), Some("23505"));
    };

    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    let pid = guard.backend_pid();
    guard.execute(duplicate, &[]).await.unwrap();
    unique(guard.commit().await.unwrap_err());
    assert!(!scene.is_held("k").await);
    assert_eq!(Some(scene.next_pid().await), pid, "the connection is kept");

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
