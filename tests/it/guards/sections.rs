//! Sections: what is committed and what is rolled back.

use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use lockkeeper::{Error, ErrorKind, LockKey};
use lockkeeper_testkit::{AppError, assert_error, assert_error_in, lock_by_sql, unlock_by_sql};

use super::{divided_by_zero, notes, scene_with_notes};

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
            // On another connection, from outside of the section.
            let other = keeper.clone();
            let ran = tokio::spawn(async move {
                let ran = async |_: &mut lockkeeper::Tx| Ok::<_, lockkeeper::Error>("ran");
                other.try_with_advisory_lock("k", ran).await
            });
            assert_eq!(ran.await.unwrap().unwrap(), None);
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
    assert_error(
        &error,
        ErrorKind::Database,
        r#""k": an earlier statement of the transaction failed"#,
    );
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
                        // The error is that of the call, or the stream's.
                        if let Ok(rows) = tx.query_raw("SELECT 1/0", &[] as &[i32]).await {
                            drop(rows.try_collect::<Vec<_>>().await);
                        }
                    }
                    "client" => drop(tx.client().query("SELECT 1/0", &[]).await),
                    // Inside a savepoint that was let go as if all were well.
                    _ => {
                        let swallowed = tx.savepoint(async |tx| {
                            drop(tx.query("SELECT 1/0", &[]).await);
                            Ok::<_, Error>(())
                        });
                        let error = swallowed.await.unwrap_err();
                        assert_error(
                            &error,
                            ErrorKind::Database,
                            "a statement inside the savepoint failed",
                        );
                        // The savepoint was rolled back, so the rest can be run: it fails again, outside.
                        drop(tx.query("SELECT 1/0", &[]).await);
                    }
                }
                Ok::<_, Error>(())
            })
            .await;
        let error = result.expect_err(way);
        assert_error_in(
            way,
            &error,
            ErrorKind::Database,
            r#""k": an earlier statement of the transaction failed"#,
        );
        if matches!(way, "query" | "simple" | "batch" | "savepoint") {
            assert!(divided_by_zero(&error), "{way}: {error}");
        }
        assert_eq!(notes(&scene).await, [0; 0], "{way}");
    }
    scene.nothing_left().await;
}
