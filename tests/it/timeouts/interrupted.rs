//! Waits that are ended from outside, and networks that are slow or silent.

use std::error::Error as _;
use std::time::Duration;

use futures::future::join_all;
use lockkeeper::{ErrorKind, Keeper, LockKey};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Proxy, Scene, assert_error, assert_error_in, eventually,
    eventually_within, in_time_of,
};

use super::{SCOPES, Scope, ms, take};

/// The waiter's own backend is stopped: the wait is over, and the next one is granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_backend_is_stopped_says_so() {
    let scene = Scene::new(3).await;
    let key = LockKey::from(523);
    for (signal, kind, text) in [
        ("pg_cancel_backend", ErrorKind::Cancelled, "SQLSTATE 57014"),
        (
            "pg_terminate_backend",
            ErrorKind::ConnectionLost,
            "SQLSTATE 57P01",
        ),
    ] {
        for scope in SCOPES {
            let what = format!("{scope:?}, {signal}");
            let holder = scene.holder(&key).await;
            let (keeper, theirs) = (scene.keeper.clone(), key.clone());
            let waiter =
                tokio::spawn(async move { take(&keeper, scope, theirs, ENDLESS).await.map(drop) });
            // Before it waits there is nothing to cancel: once more.
            let stopped = async || {
                let sql = format!(
                    "SELECT {signal}(l.pid) FROM pg_locks l WHERE locktype = 'advisory' AND NOT granted \
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                );
                scene.observer.query(&sql, &[]).await.unwrap();
                waiter.is_finished()
            };
            eventually_within(CLEANED_UP_WITHIN, &format!("{what}: it waits on"), stopped).await;
            let error = waiter.await.unwrap().unwrap_err();
            assert_error_in(&what, &error, kind, text);
            assert!(error.source().is_some(), "{what}: {error:?}");
            drop(holder);
            let next = take(&scene.keeper, scope, key.clone(), ENDLESS)
                .await
                .unwrap();
            drop(next);
            scene.nothing_left().await;
        }
    }
}

/// Deadlocks of advisory locks are found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_transactions_that_wait_for_each_other_are_told_of_the_deadlock() {
    let apart = [0, 300, 700, 1_200].into_iter().map(|apart| async move {
        let scene = Scene::new(2).await;
        let mut first = scene.keeper.advisory_lock(524).acquire().await.unwrap();
        let mut second = scene.keeper.advisory_lock(525).acquire().await.unwrap();
        assert_ne!(first.backend_pid(), second.backend_pid());
        let scene = &scene;
        let first = async move {
            let outcome = first.advisory_lock(525).wait(ENDLESS).await;
            first.rollback().await;
            outcome
        };
        let second = async move {
            if apart > 0 {
                scene.until_awaited_for(ms(apart), 525).await;
            }
            let outcome = second.advisory_lock(524).wait(ENDLESS).await;
            second.rollback().await;
            outcome
        };
        let both = async { tokio::join!(first, second) };
        let both = tokio::time::timeout(Duration::from_secs(8), both).await;
        let both = both.unwrap_or_else(|_| panic!("{apart} ms apart: not found"));
        let ((Err(error), Ok(())) | (Ok(()), Err(error))) = both else {
            panic!("{apart} ms apart: {both:?}");
        };
        assert_error(&error, ErrorKind::Deadlock, "SQLSTATE 40P01");
        scene.nothing_left().await;
    });
    join_all(apart).await;
}

/// An answer that is late is an answer, as long as the wait is not over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_wait_survives_a_network_slower_than_each_of_them() {
    let scopes = [Scope::Xact, Scope::Session, Scope::Snapshot];
    let scopes = scopes.into_iter().map(|scope| async move {
        let mut scene = Scene::new(1).await;
        let proxy = Proxy::before(scene.database.server());
        proxy.delay(ms(300));
        scene.pool = proxy.pool(&scene.database.config(), 1);
        let keeper = Keeper::new(scene.pool.clone());
        scene.pool_is_whole_within(2 * CLEANED_UP_WITHIN).await;
        let key = LockKey::from(526);
        let holder = scene.holder(&key).await;
        let theirs = key.clone();
        let waiter = tokio::spawn(async move { take(&keeper, scope, theirs, ENDLESS).await });
        let waits = async || !scene.waiters(key.clone()).await.is_empty();
        eventually_within(2 * CLEANED_UP_WITHIN, "it does not wait", waits).await;
        // Until one has been answered, and another is under way: in a pool of one, nobody watches it.
        let flights = proxy.traffic().flights;
        eventually("the wait is not repeated", async || {
            proxy.traffic().flights >= flights + 2
        })
        .await;
        drop(holder);
        let guard = in_time_of(2 * CLEANED_UP_WITHIN, "not granted", waiter)
            .await
            .unwrap();
        let guard = guard.unwrap_or_else(|error| panic!("{scope:?}: {error:?}"));
        assert_eq!(scene.holders(key.clone()).await, [guard.pid().unwrap()]);
        drop(guard);
        scene.nothing_left_within(2 * CLEANED_UP_WITHIN).await;
    });
    join_all(scopes).await;
}

/// The network goes silent: a bounded wait ends all the same, and when the network is back nothing is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_though_the_network_is_silent() {
    let scopes = [Scope::Xact, Scope::Session, Scope::Snapshot];
    let cases = scopes.map(|scope| [(scope, false), (scope, true)]).concat();
    join_all(
        cases
            .into_iter()
            .map(|(scope, busy)| wait_in_silence(scope, busy)),
    )
    .await;
}

async fn wait_in_silence(scope: Scope, busy: bool) {
    let what = format!("{scope:?}, busy {busy}");
    let mut scene = Scene::new(4).await;
    let proxy = Proxy::before(scene.database.server());
    scene.pool = proxy.pool(&scene.database.config(), 4);
    let keeper = Keeper::new(scene.pool.clone());
    let key = LockKey::from(527);
    scene.pool_is_whole().await;
    let client = if busy {
        Some(scene.holder(&key).await)
    } else {
        None
    };
    let (theirs, asked) = (key.clone(), ms(700));
    // Silent from the beginning where the lock is free, and in the middle of the wait where it is not.
    proxy.stall(!busy);
    let waiter = tokio::spawn(async move { take(&keeper, scope, theirs, asked).await });
    if busy {
        scene.until_awaited(&key).await;
        proxy.stall(true);
    }
    let outcome = tokio::time::timeout(asked + CLEANED_UP_WITHIN, waiter).await;
    let outcome = outcome
        .unwrap_or_else(|_| panic!("{what}: it hangs"))
        .unwrap();
    let Err(error) = outcome else {
        panic!("{what}: granted");
    };
    assert_error_in(
        &what,
        &error,
        ErrorKind::ConnectionLost,
        "no answer from the server after",
    );
    assert_eq!(error.key(), Some(&key), "{what}: {error:?}");
    proxy.stall(false);
    drop(client);
    scene.nothing_left().await;
}
