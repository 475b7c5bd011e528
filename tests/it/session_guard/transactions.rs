//! Transactions on a session guard.

use lockkeeper::{Error, ErrorKind};
use lockkeeper_testkit::{Scene, assert_error};
use tokio_postgres::error::SqlState;

use super::{next_borrower, take};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_transaction_is_rolled_back_and_the_lock_stays() {
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 701).await;
    let pid = guard.backend_pid().unwrap();
    for _ in 0..2 {
        let transaction = guard.transaction(async |tx| {
            tx.batch_execute("CREATE TABLE note (id int)").await?;
            tx.batch_execute("SELECT 1/0").await?;
            Ok::<_, Error>(())
        });
        let error = transaction.await.unwrap_err();
        assert_eq!(
            error.sqlstate(),
            Some(&SqlState::DIVISION_BY_ZERO),
            "{error:?}"
        );
        assert_eq!(scene.holders(701).await, [pid]);
        // Usable, and outside of a transaction.
        guard
            .batch_execute("CREATE TABLE note (id int); DROP TABLE note")
            .await
            .unwrap();
    }
    guard.release().await.unwrap();
    assert_eq!(
        next_borrower(&scene).await.0,
        pid,
        "the connection was not kept"
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_callers_own_error_comes_back_as_it_was() {
    #[derive(Debug)]
    enum Mine {
        Number(i32),
        Lock(#[allow(dead_code, reason = "shown by a failing test")] Error),
    }
    impl From<Error> for Mine {
        fn from(error: Error) -> Self {
            Self::Lock(error)
        }
    }
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 702).await;
    let transaction = guard.transaction(async |tx| {
        tx.batch_execute("CREATE TABLE note (id int)")
            .await
            .map_err(Error::from)?;
        Err::<(), _>(Mine::Number(7))
    });
    assert!(matches!(transaction.await, Err(Mine::Number(7))));
    let sql = "SELECT to_regclass('note') IS NULL";
    let rolled_back: bool = guard.query_one(sql, &[]).await.unwrap().get(0);
    assert!(rolled_back);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// Whatever transaction was left open, and however the guard ends, the next borrower finds a clean connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_left_open_keeps_neither_the_lock_nor_the_connection() {
    let scene = Scene::new(1).await;
    let own = next_borrower(&scene).await.2;
    scene
        .observer
        .batch_execute("CREATE TABLE note (id int)")
        .await
        .unwrap();
    for keys in [vec![703], vec![703, 704]] {
        for through_client in [false, true] {
            for (failed, sql) in [
                (false, "BEGIN; INSERT INTO note VALUES (1)"),
                (true, "BEGIN; INSERT INTO note VALUES (1); SELECT 1/0"),
            ] {
                for release in [false, true] {
                    let what =
                        format!("{sql}, client {through_client}, release {release}, {keys:?}");
                    let locks = scene.keeper.advisory_locks(keys.clone()).session();
                    let guard = locks.acquire().await.unwrap();
                    let left_open = if through_client {
                        guard.client().batch_execute(sql).await
                    } else {
                        guard.batch_execute(sql).await
                    };
                    match left_open {
                        Ok(()) => assert!(!failed, "{what}"),
                        Err(error) => {
                            assert!(failed, "{what}");
                            assert_eq!(error.code(), Some(&SqlState::DIVISION_BY_ZERO), "{what}");
                        }
                    }
                    for &key in &keys {
                        assert!(scene.is_held(key).await, "{what}");
                    }
                    if release {
                        let released = guard.release().await;
                        assert!(released.is_ok(), "{what}: {released:?}");
                        assert_eq!(
                            scene.advisory_locks().await,
                            0,
                            "{what}: not released on return"
                        );
                    } else {
                        drop(guard);
                    }
                    scene.nothing_left().await;
                    let (_, in_transaction, name) = next_borrower(&scene).await;
                    assert!(
                        !in_transaction,
                        "{what}: the connection is in a transaction"
                    );
                    assert_eq!(name, own, "{what}");
                }
            }
        }
    }
    let sql = "SELECT count(*) FROM note";
    let notes: i64 = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(notes, 0, "it was committed");
}

/// The guard's own transaction after one that was left open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_after_one_that_failed_and_was_left_open_begins_anew() {
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 705).await;
    assert!(guard.batch_execute("BEGIN; SELECT 1/0").await.is_err());
    let transaction = guard.transaction(async |tx| {
        tx.batch_execute("CREATE TABLE note (id int)").await?;
        Ok::<_, Error>(())
    });
    transaction.await.unwrap();
    let sql = "SELECT to_regclass('note') IS NOT NULL";
    let committed: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert!(committed);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_commits_and_the_lock_stays() {
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 706).await;
    for n in 0..3 {
        let transaction = guard.transaction(async move |tx| {
            tx.batch_execute(&format!("CREATE TABLE note_{n} (id int)"))
                .await?;
            tx.advisory_lock(707).await?;
            Ok::<_, Error>(n)
        });
        assert_eq!(transaction.await.unwrap(), n);
        let sql = format!("SELECT to_regclass('note_{n}') IS NOT NULL");
        let committed: bool = scene.observer.query_one(&sql, &[]).await.unwrap().get(0);
        assert!(committed);
        assert!(scene.is_held(706).await);
        assert!(
            !scene.is_held(707).await,
            "the transaction's lock outlives it"
        );
    }
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// A swallowed error and a failing COMMIT are errors, and the lock stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_cannot_commit_says_so() {
    let scene = Scene::new(1).await;
    let create = "CREATE TABLE note (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)";
    scene.observer.batch_execute(create).await.unwrap();
    let mut guard = take(&scene.keeper, 708).await;
    let swallowed = guard.transaction(async |tx| {
        tx.batch_execute("INSERT INTO note VALUES (1)").await?;
        assert!(tx.batch_execute("SELECT 1/0").await.is_err());
        Ok::<_, Error>(())
    });
    let error = swallowed.await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Database,
        "an earlier statement of the transaction failed, so it was rolled back (SQLSTATE 22012)",
    );
    let swallowed = guard.transaction(async |tx| {
        assert!(tx.client().batch_execute("SELECT 1/0").await.is_err());
        Ok::<_, Error>(())
    });
    assert!(swallowed.await.is_err());
    let deferred = guard.transaction(async |tx| {
        tx.batch_execute("INSERT INTO note VALUES (1), (1)").await?;
        Ok::<_, Error>(())
    });
    let error = deferred.await.unwrap_err();
    assert_eq!(
        error.sqlstate(),
        Some(&SqlState::UNIQUE_VIOLATION),
        "{error:?}"
    );
    assert!(scene.is_held(708).await);
    let sql = "SELECT count(*) FROM note";
    let notes: i64 = guard.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(notes, 0);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}
