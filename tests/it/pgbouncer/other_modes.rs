//! Session mode and statement mode.

use std::time::Duration;

use lockkeeper::tokio_postgres::IsolationLevel;
use lockkeeper::{Error, ErrorKind, Tx};
use lockkeeper_testkit::{
    BouncerScene, PoolMode, assert_error, eventually, in_time, until_pooler_is_known,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_guards_work_behind_a_session_pooler() {
    let test = "session_guards_work_behind_a_session_pooler";
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 4, &[]).await else {
        return;
    };
    behind
        .scene
        .observer
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    let (a, b) = (&behind.keeper, behind.fresh(4));
    until_pooler_is_known(a).await;
    until_pooler_is_known(&b).await;
    let mut guard = a.advisory_lock("k").session().acquire().await.unwrap();
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    let busy = b.advisory_lock("k").session().try_acquire().await.unwrap();
    assert!(busy.is_none());
    let error = b
        .advisory_lock("k")
        .wait(Duration::from_millis(30))
        .session()
        .acquire()
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#);
    assert_eq!(error.blockers()[0].pid(), guard.backend_pid());
    guard
        .transaction(async |tx| {
            tx.batch_execute("INSERT INTO t VALUES (1)").await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(behind.scene.is_held("k").await);

    // A waiter gets it when it is released, a dropped one leaves.
    let dropped = tokio::spawn({
        let b = b.clone();
        async move {
            let lock = b.advisory_lock("k").wait(Duration::from_secs(60));
            lock.session().acquire().await
        }
    });
    let waits = async || !behind.scene.waiters("k").await.is_empty();
    eventually("no session waits", waits).await;
    dropped.abort();
    drop(dropped.await);
    let gone = async || behind.scene.waiters("k").await.is_empty();
    eventually("the waiter is left", gone).await;
    let waiter = tokio::spawn({
        let b = b.clone();
        async move {
            let lock = b.advisory_lock("k").wait(Duration::from_secs(60));
            lock.session().acquire().await
        }
    });
    eventually("no session waits", waits).await;
    guard.release().await.unwrap();
    let guard = waiter.await.unwrap().unwrap();
    assert_eq!(
        behind.scene.holders("k").await,
        [guard.backend_pid().unwrap()]
    );
    drop(guard);
    let free = async || !behind.scene.is_held("k").await;
    eventually("held after the drop", free).await;
    behind.nothing_left().await;

    let several = a.advisory_locks(["k", "l"]).session().acquire().await;
    let several = several.unwrap();
    assert_eq!(behind.scene.advisory_locks().await, 2);
    several.release().await.unwrap();
    let lock = a
        .advisory_lock("k")
        .isolation(IsolationLevel::RepeatableRead);
    let guard = lock.acquire().await.unwrap();
    assert!(b.advisory_lock("k").try_acquire().await.unwrap().is_none());
    guard.commit().await.unwrap();
    behind.nothing_left().await;
}

/// A session pooler with one backend: the second client waits for the first one to leave, so nothing can be compared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_pooler_without_a_second_backend_does_not_hang_a_session_lock() {
    let test = "a_session_pooler_without_a_second_backend_does_not_hang_a_session_lock";
    let one = [("default_pool_size", "1")];
    let Some(behind) = BouncerScene::new(test, PoolMode::Session, 2, &one).await else {
        return;
    };
    let keeper = behind.fresh(2);
    let lock = keeper.advisory_lock("k").wait(Duration::from_secs(1));
    match in_time("a session lock", lock.session().acquire()).await {
        Ok(guard) => guard.release().await.unwrap(),
        Err(error) => {
            assert_error(
                &error,
                ErrorKind::TransactionPooler,
                "no second connection was to be had",
            );
            assert_eq!(error.key().and_then(|key| key.name()), Some("k"), "{error}");
        }
    }
    drop(keeper);
    behind.scene.nothing_left().await;
}

/// PgBouncer refuses transactions there; what cannot be had is an error, with the pooler's words behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_statement_mode_everything_fails_clearly_and_leaks_nothing() {
    let test = "in_statement_mode_everything_fails_clearly_and_leaks_nothing";
    let Some(behind) = BouncerScene::new(test, PoolMode::Statement, 4, &[]).await else {
        return;
    };
    behind
        .scene
        .observer
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    let mut wrong = Vec::new();
    for way in [
        "transaction",
        "with",
        "guard",
        "try",
        "several",
        "session",
        "several session",
        "snapshot",
    ] {
        let keeper = behind.fresh(4);
        let body = async |tx: &mut Tx| {
            tx.batch_execute("INSERT INTO t VALUES (1)").await?;
            Ok::<_, Error>(())
        };
        let one = || keeper.advisory_lock("k").wait(Duration::from_secs(1));
        let several = || {
            keeper
                .advisory_locks(["k", "l"])
                .wait(Duration::from_secs(1))
        };
        let asked = async {
            match way {
                "transaction" => keeper.transaction(body).await,
                "with" => keeper.with_advisory_lock("k", body).await,
                "guard" => one().acquire().await.map(drop),
                "try" => one().try_acquire().await.map(drop),
                "several" => several().acquire().await.map(drop),
                "session" => one().session().acquire().await.map(drop),
                "several session" => several().session().acquire().await.map(drop),
                _ => {
                    let lock = one().isolation(IsolationLevel::RepeatableRead);
                    lock.acquire().await.map(drop)
                }
            }
        };
        match in_time(way, asked).await {
            Ok(()) => wrong.push(format!("{way}: granted")),
            Err(error) => {
                let mut text = error.to_string();
                let mut next = std::error::Error::source(&error);
                while let Some(source) = next {
                    text = format!("{text}: {source}");
                    next = source.source();
                }
                if !text.contains("pool") {
                    wrong.push(format!("{way}: does not say why: {text}"));
                }
            }
        }
        behind.scene.nothing_left().await;
    }
    let row = behind
        .scene
        .observer
        .query_one("SELECT count(*) FROM t", &[]);
    assert_eq!(row.await.unwrap().get::<_, i64>(0), 0);
    assert!(wrong.is_empty(), "{wrong:#?}");
}
