//! Locks that are taken in savepoints.

use lockkeeper_testkit::{AppError, Scene};

use super::{notes, scene_with_notes};

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

/// A lock that is gone with a savepoint is taken again when it is asked for again, by whatever call the savepoint was set.
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
    assert!(scene.is_held("plain").await, "shown as held, and not held");
    guard.rollback().await;
    scene.nothing_left().await;
}
