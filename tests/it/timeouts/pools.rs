//! Waits on a pool that has no connection.

use std::time::Instant;

use lockkeeper::{Error, ErrorKind, Keeper, LockKey};
use lockkeeper_testkit::{Proxy, Scene, assert_error};

use super::{Scope, ms, take, time};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exhausted_pool_is_said_in_time() {
    let scene = Scene::new(2).await;
    let taken = [
        scene.pool.get().await.unwrap(),
        scene.pool.get().await.unwrap(),
    ];
    for asked in [ms(0), ms(150), ms(800)] {
        for scope in [Scope::Xact, Scope::Session, Scope::Snapshot] {
            time(asked, &format!("{scope:?} {asked:?}"), async |asked| {
                let Err(error) = take(&scene.keeper, scope, LockKey::from(510), asked).await else {
                    panic!("no connection could be had");
                };
                assert_error(&error, ErrorKind::Pool, "2 of 2 in use after");
                assert_eq!(error.key(), Some(&LockKey::from(510)), "{error}");
            })
            .await;
        }
    }
    drop(taken);
    scene.nothing_left().await;
}

/// A transaction waits for a connection as long as the keeper waits for locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_on_an_exhausted_pool_says_so_in_time() {
    let asked = ms(150);
    let scene = Scene::new(1).await;
    let waiting = |wait| {
        let builder = Keeper::builder(scene.pool.clone());
        builder.application("test").lock_wait(wait).build()
    };
    let taken = scene.pool.get().await.unwrap();
    time(asked, "transaction", async |asked| {
        let keeper = waiting(asked);
        let transaction = keeper.transaction(async |_| Ok::<_, Error>(()));
        let error = transaction.await.unwrap_err();
        assert_error(&error, ErrorKind::Pool, "1 of 1 in use after");
    })
    .await;
    time(asked, "try_acquire", async |asked| {
        let tried = waiting(asked).advisory_lock(511).try_acquire().await;
        assert_error(
            &tried.unwrap_err(),
            ErrorKind::Pool,
            "511: none became free, 1 of 1 in use after",
        );
    })
    .await;
    drop(taken);
}

/// "Zero tries once", also where the connection to try on has to be opened first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_wait_on_an_empty_pool_tries_once_all_the_same() {
    let mut scene = Scene::new(1).await;
    let proxy = Proxy::before(scene.database.server());
    proxy.delay(ms(40));
    for wait in [ms(0), ms(5), ms(60)] {
        for scope in [Scope::Xact, Scope::Session, Scope::Snapshot] {
            let mut tries = 0;
            let guard = loop {
                tries += 1;
                // Each has a login of 80 ms at least before it.
                scene.pool = proxy.pool(&scene.database.config(), 1);
                let keeper = Keeper::new(scene.pool.clone());
                let started = Instant::now();
                match take(&keeper, scope, LockKey::from(528), wait).await {
                    Ok(guard) => break guard,
                    // A login that takes half a second is not waited for.
                    Err(error) => assert!(
                        error.kind() == ErrorKind::Pool
                            && started.elapsed() >= ms(500)
                            && tries < 20,
                        "{scope:?}, {wait:?}: {error:?}"
                    ),
                }
            };
            assert_eq!(scene.holders(528).await, [guard.pid().unwrap()]);
            drop(guard);
            scene.nothing_left().await;
        }
    }
}
