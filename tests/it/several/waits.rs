//! One wait for all of the keys.

use std::time::{Duration, Instant};

use lockkeeper::ErrorKind;
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, lock_by_sql, pid_of,
    unlock_by_sql,
};

use super::{SCOPES, Scope, acquire, many_keys};

/// The wait is for all of the keys together, however the holders make room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wait_covers_all_of_the_keys() {
    const WAIT: Duration = Duration::from_secs(3);
    /// One for the key that is let go after 2.5 s, and another for the one that is not.
    const TWO_WAITS: Duration = Duration::from_millis(5500);
    let scene = Scene::new(2).await;
    let (second, third) = (
        scene.database.connect().await,
        scene.database.connect().await,
    );
    lock_by_sql(&third, 3).await;
    for scope in SCOPES {
        lock_by_sql(&second, 2).await;
        let began = Instant::now();
        let release = async {
            let most_of_it = Duration::from_millis(2500);
            scene.until_awaited_for(most_of_it, 2).await;
            unlock_by_sql(&second, 2).await;
        };
        let (result, ()) = tokio::join!(acquire(&scene.keeper, [1, 2, 3], scope, WAIT), release);
        let took = began.elapsed();
        let error = result.unwrap_err();
        assert_error_in(
            format_args!("{scope:?}"),
            &error,
            ErrorKind::LockTimeout,
            "1: and 2 more after",
        );
        assert!(took >= WAIT, "{scope:?}: {took:?} is too early");
        assert!(
            took < TWO_WAITS,
            "{scope:?}: {took:?} is more than one wait"
        );
        scene.nothing_but(1).await;
    }
    let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
    lock_by_sql(&second, 2).await;
    let began = Instant::now();
    let release = async {
        scene
            .until_awaited_for(Duration::from_millis(2500), 2)
            .await;
        unlock_by_sql(&second, 2).await;
    };
    let waiting = async { guard.advisory_locks([1, 2, 3]).wait(WAIT).await };
    let (result, ()) = tokio::join!(waiting, release);
    let took = began.elapsed();
    assert_error(
        &result.unwrap_err(),
        ErrorKind::LockTimeout,
        "1: and 2 more after",
    );
    assert!(took >= WAIT && took < TWO_WAITS, "{took:?}");
    drop((guard, second, third));
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_become_free_one_after_another_are_all_granted() {
    let scene = Scene::new(2).await;
    let holders = [
        scene.database.connect().await,
        scene.database.connect().await,
    ];
    for scope in SCOPES {
        lock_by_sql(&holders[0], 2).await;
        lock_by_sql(&holders[1], 3).await;
        let release = async {
            for (holder, key) in holders.iter().zip([2, 3]) {
                scene.until_awaited(key).await;
                assert_eq!(scene.holders(key).await, [pid_of(holder).await]);
                unlock_by_sql(holder, key).await;
            }
        };
        let (guard, ()) = tokio::join!(
            acquire(&scene.keeper, [3, 2, 1], scope, GIVE_UP_AFTER),
            release
        );
        let guard = guard.unwrap();
        for key in [1, 2, 3] {
            assert_eq!(scene.holders(key).await, [guard.pid()], "{scope:?}");
        }
        guard.end().await;
        scene.nothing_left().await;
    }
}

/// Sets that wait for one of their keys do not keep other calls from another of them, which is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_free_key_is_granted_while_sets_with_it_wait_for_another() {
    let scene = Scene::new(8).await;
    lock_by_sql(&scene.observer, 1).await;
    let mut sets = Vec::new();
    for scope in [Scope::Xact, Scope::Session, Scope::Xact] {
        let keeper = scene.keeper.clone();
        sets.push(tokio::spawn(async move {
            acquire(&keeper, [1, 2], scope, GIVE_UP_AFTER)
                .await
                .unwrap()
                .end()
                .await;
        }));
    }
    eventually("no waiters", async || scene.waiters(1).await.len() >= 2).await;
    for scope in SCOPES {
        assert!(!scene.is_held(2).await);
        let began = Instant::now();
        let guard = acquire(&scene.keeper, [2], scope, Duration::from_secs(20))
            .await
            .unwrap();
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(4),
            "{scope:?}: {took:?} for a free key"
        );
        guard.end().await;
    }
    // And one that is busy for a moment is waited for where its holder releases it.
    let holder = scene.database.connect().await;
    for scope in SCOPES {
        lock_by_sql(&holder, 2).await;
        let release = async {
            scene.until_awaited(2).await;
            unlock_by_sql(&holder, 2).await;
        };
        let (guard, ()) = tokio::join!(acquire(&scene.keeper, [2], scope, GIVE_UP_AFTER), release);
        guard.unwrap().end().await;
    }
    unlock_by_sql(&scene.observer, 1).await;
    for set in sets {
        set.await.unwrap();
    }
    scene.nothing_left().await;
}

/// A large set needs to know the room in the lock table, and a connection to ask on. It waits for that one too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_set_waits_for_a_connection_as_long_as_a_small_one() {
    let scene = Scene::new(1).await;
    for keys in [many_keys(2), many_keys(200)] {
        for scope in SCOPES {
            let taken = scene.pool.get().await.unwrap();
            let later = async {
                let waits = async || scene.pool.status().waiting == 1;
                eventually("no call waits for the connection", waits).await;
                // The time itself is what is tested: it is longer than any other bound that a call could have here.
                tokio::time::sleep(Duration::from_millis(1500)).await;
                drop(taken);
            };
            let (guard, ()) =
                tokio::join!(acquire(&scene.keeper, &keys, scope, GIVE_UP_AFTER), later);
            let guard =
                guard.unwrap_or_else(|error| panic!("{} keys, {scope:?}: {error}", keys.len()));
            guard.end().await;
        }
    }
    scene.nothing_left().await;
}
