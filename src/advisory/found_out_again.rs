//! What has been found out about a pooler or a server is found out again after a while, which is short in these tests.

#![allow(
    clippy::unwrap_used,
    reason = "a test says what went wrong by panicking"
)]

use std::time::Duration;

use lockkeeper_testkit::{BouncerScene, PoolMode, Scene, eventually};

use crate::{Error, ErrorKind, Keeper};

async fn take(keeper: &Keeper) -> Result<(), Error> {
    let guard = keeper.advisory_lock("k").session().acquire().await?;
    guard.release().await
}

async fn until_granted(keeper: &Keeper) {
    let granted = async || match take(keeper).await {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::TransactionPooler, "{error}");
            false
        }
    };
    eventually("session locks are not granted", granted).await;
}

async fn until_refused(keeper: &Keeper) {
    // Not for want of a second connection.
    let refused = async || {
        take(keeper)
            .await
            .is_err_and(|error| error.to_string().contains("to several clients"))
    };
    eventually("session locks are not refused", refused).await;
}

#[tokio::test]
async fn session_locks_follow_the_mode_of_the_pooler() {
    let test = "session_locks_follow_the_mode_of_the_pooler";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    let keeper = Keeper::new(behind.pool.clone());
    for _ in 0..2 {
        behind.bouncer.set_pool_mode(PoolMode::Transaction).await;
        until_refused(&keeper).await;
        behind.bouncer.set_pool_mode(PoolMode::Session).await;
        until_granted(&keeper).await;
    }
    behind.nothing_left().await;
}

/// Guards that fill the pooler, so that nothing can be found out, do not forbid any other.
#[tokio::test]
async fn a_full_session_pooler_is_still_gone_through() {
    let test = "a_full_session_pooler_is_still_gone_through";
    let settings = [("default_pool_size", "3")];
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 3, &settings).await else {
        return;
    };
    let keeper = Keeper::new(behind.pool.clone());
    until_granted(&keeper).await;
    let lock = |key| keeper.advisory_lock(key).session().acquire();
    let guards = [lock("a").await.unwrap(), lock("b").await.unwrap()];
    // The time itself is what is tested.
    tokio::time::sleep(Duration::from_millis(600)).await;
    lock("c").await.unwrap().release().await.unwrap();
    for guard in guards {
        guard.release().await.unwrap();
    }
    behind.nothing_left().await;
}

/// On the same connection.
#[tokio::test]
async fn a_right_that_is_granted_later_is_used() {
    let scene = Scene::new(1).await;
    let role = format!("later_{}", scene.database.name());
    let sql = format!("CREATE ROLE {role} LOGIN; REVOKE SELECT ON pg_locks FROM PUBLIC");
    scene.run(&sql).await;
    let pool = scene.database.pool_as(&role, 1);
    let keeper = Keeper::new(pool.clone());
    let holder = scene.holder("k").await;
    let sees_the_holder = async || {
        let lock = keeper.advisory_lock("k").wait(Duration::from_millis(30));
        let error = lock.acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
        !error.blockers().is_empty()
    };
    assert!(!sees_the_holder().await);
    scene
        .run(&format!("GRANT SELECT ON pg_locks TO {role}"))
        .await;
    eventually("the right is not used", sees_the_holder).await;
    scene
        .run(&format!("REVOKE SELECT ON pg_locks FROM {role}"))
        .await;
    drop(holder);
    pool.close();
    scene.run(&format!("DROP ROLE {role}")).await;
}
