//! What a keeper has found out about a pooler is found out again after a minute.

use std::time::Duration;

use lockkeeper::{ErrorKind, Keeper};
use lockkeeper_testkit::{BouncerScene, PoolMode, assert_error, eventually, until_pooler_is_known};

/// Lets all findings of a keeper grow old.
async fn a_minute_passes() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(61)).await;
    tokio::time::resume();
}

async fn until_refused(keeper: &Keeper) {
    eventually("session locks are not refused", async || {
        let first = keeper.advisory_lock("first").session().acquire().await;
        first.is_err_and(|error| error.to_string().contains("to several clients"))
    })
    .await;
}

#[tokio::test]
async fn session_locks_are_granted_once_the_pooler_keeps_sessions() {
    let test = "session_locks_are_granted_once_the_pooler_keeps_sessions";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    let keeper = &behind.keeper;
    until_refused(keeper).await;
    behind.bouncer.set_pool_mode(PoolMode::Session).await;
    // Known for a while.
    let error = keeper
        .advisory_lock("k")
        .session()
        .acquire()
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::TransactionPooler, "to several clients");
    a_minute_passes().await;
    until_pooler_is_known(keeper).await;
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    guard.release().await.unwrap();
    behind.nothing_left().await;
}

#[tokio::test]
async fn session_locks_are_refused_once_the_pooler_shares_sessions() {
    let test = "session_locks_are_refused_once_the_pooler_shares_sessions";
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 4, &[]).await else {
        return;
    };
    let keeper = &behind.keeper;
    until_pooler_is_known(keeper).await;
    behind.bouncer.set_pool_mode(PoolMode::Transaction).await;
    a_minute_passes().await;
    until_refused(keeper).await;
    let error = keeper
        .advisory_lock("k")
        .session()
        .try_acquire()
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::TransactionPooler, "to several clients");
    // Transaction locks are as good as before.
    keeper
        .advisory_lock("k")
        .acquire()
        .await
        .unwrap()
        .commit()
        .await
        .unwrap();
    behind.nothing_left().await;
}

/// Guards that fill the pooler do not keep it from being used as before.
#[tokio::test]
async fn a_full_session_pooler_is_still_gone_through() {
    let test = "a_full_session_pooler_is_still_gone_through";
    let settings = [("default_pool_size", "3")];
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 3, &settings).await else {
        return;
    };
    let keeper = &behind.keeper;
    until_pooler_is_known(keeper).await;
    let first = keeper.advisory_lock("a").session().acquire().await.unwrap();
    let second = keeper.advisory_lock("b").session().acquire().await.unwrap();
    a_minute_passes().await;
    let third = keeper.advisory_lock("c").session().acquire().await.unwrap();
    for guard in [first, second, third] {
        guard.release().await.unwrap();
    }
    behind.nothing_left().await;
}
