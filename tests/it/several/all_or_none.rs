//! All of the keys or none.

use std::time::Duration;

use lockkeeper::{Error, ErrorKind, LockKey};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, lock_by_sql, pid_of, unlock_by_sql,
};

use super::{SCOPES, Scope, acquire, many_keys, try_acquire};

#[tokio::test]
async fn keys_are_sorted_and_taken_once() {
    let scene = Scene::new(1).await;
    let given = [
        LockKey::from((2, 1)),
        "b".into(),
        5.into(),
        "a".into(),
        (-2, 1).into(),
        5.into(),
        "b".into(),
        i64::MIN.into(),
        (2, 1).into(),
    ];
    let mut sorted = given.to_vec();
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), 6);
    for scope in SCOPES {
        let guard = acquire(&scene.keeper, &given, scope, GIVE_UP_AFTER)
            .await
            .unwrap();
        assert_eq!(guard.keys(), sorted);
        assert_eq!(scene.advisory_locks().await, 6);
        for key in &given {
            assert_eq!(scene.holders(key).await, [guard.pid()]);
        }
        guard.end().await;
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn no_keys_at_all_are_a_mistake_of_the_caller() {
    let scene = Scene::new(1).await;
    let none = || Vec::<LockKey>::new();
    // No connection is needed to say so.
    let taken = scene.pool.get().await.unwrap();
    for scope in SCOPES {
        let error = acquire(&scene.keeper, none(), scope, GIVE_UP_AFTER)
            .await
            .unwrap_err();
        assert_error(&error, ErrorKind::Config, "no keys given");
        let error = try_acquire(&scene.keeper, none(), scope).await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "no keys given");
    }
    drop(taken);
    let section = scene.keeper.transaction(async |tx| {
        let error = tx.advisory_locks(none()).await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "no keys given");
        let error = tx.advisory_locks(none()).try_acquire().await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "no keys given");
        tx.query_one("SELECT 1", &[]).await?;
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test]
async fn one_busy_key_and_none_is_taken() {
    let scene = Scene::new(2).await;
    let holder = scene.database.connect().await;
    let keys = [
        LockKey::from(1),
        2.into(),
        3.into(),
        (1, 1).into(),
        (1, 2).into(),
    ];
    for busy in &keys {
        lock_by_sql(&holder, busy).await;
        for scope in SCOPES {
            assert!(
                try_acquire(&scene.keeper, &keys, scope)
                    .await
                    .unwrap()
                    .is_none()
            );
            scene.nothing_but(1).await;
            for millis in [0, 30, 700] {
                let wait = Duration::from_millis(millis);
                let error = acquire(&scene.keeper, &keys, scope, wait)
                    .await
                    .unwrap_err();
                assert_error(&error, ErrorKind::LockTimeout, "1: and 4 more after");
                let blockers: Vec<_> = error
                    .blockers()
                    .iter()
                    .map(lockkeeper::Blocker::pid)
                    .collect();
                assert_eq!(blockers, [Some(pid_of(&holder).await)]);
                scene.nothing_but(1).await;
            }
        }
        unlock_by_sql(&holder, busy).await;
    }
    scene.nothing_left().await;
}

/// The same inside a transaction that continues afterwards, and so would keep what it got.
#[tokio::test]
async fn one_busy_key_and_none_is_taken_inside_a_transaction() {
    let scene = Scene::new(2).await;
    let holder = scene.database.connect().await;
    let keys = [
        LockKey::from(1),
        2.into(),
        3.into(),
        (1, 1).into(),
        (1, 2).into(),
    ];
    for busy in &keys {
        lock_by_sql(&holder, busy).await;
        let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
        let taken = guard.advisory_locks(&keys).try_acquire().await.unwrap();
        assert!(!taken);
        assert_eq!(
            scene.advisory_locks().await,
            2,
            "a try in vain for five keys, {busy} of them busy, has taken some"
        );
        for millis in [0, 30] {
            let lock = guard
                .advisory_locks(&keys)
                .wait(Duration::from_millis(millis));
            let error = lock.await.unwrap_err();
            assert_error(&error, ErrorKind::LockTimeout, "1: and 4 more after");
            assert_eq!(scene.advisory_locks().await, 2, "{busy} busy, {millis} ms");
        }
        assert_eq!(guard.held_keys().count(), 1);
        // All of them once they are free, and each once.
        unlock_by_sql(&holder, busy).await;
        guard.advisory_lock(&keys[2]).await.unwrap();
        guard.advisory_locks(&keys).await.unwrap();
        assert_eq!(scene.advisory_locks().await, 6);
        assert_eq!(guard.held_keys().count(), 6);
        guard.commit().await.unwrap();
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_thousand_keys_of_both_spaces_are_one_set() {
    let scene = Scene::new(2).await;
    let keys = many_keys(3000);
    let holder = scene.database.connect().await;
    for scope in SCOPES {
        let guard = acquire(&scene.keeper, &keys, scope, GIVE_UP_AFTER).await;
        let guard = guard.unwrap_or_else(|error| panic!("{scope:?}: {error:?}"));
        assert_eq!(scene.advisory_locks().await, 3000);
        assert_eq!(guard.keys().len(), 3000);
        assert!(
            try_acquire(&scene.keeper, &keys, Scope::Xact)
                .await
                .unwrap()
                .is_none()
        );
        guard.end().await;
        scene.nothing_left().await;

        // Dropped, and by a try.
        let guard = try_acquire(&scene.keeper, &keys, scope)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(scene.advisory_locks().await, 3000);
        drop(guard);
        scene.nothing_left().await;

        // Waited for, in vain and not.
        lock_by_sql(&holder, &keys[1]).await;
        // Fewer in vain: the blockers are asked for after the end, which has to be told in two seconds.
        let some = &keys[..1000];
        let error = acquire(&scene.keeper, some, scope, Duration::from_millis(600))
            .await
            .unwrap_err();
        assert_error_in(
            format_args!("{scope:?}"),
            &error,
            ErrorKind::LockTimeout,
            "and 999 more after",
        );
        assert_eq!(error.blockers().len(), 1, "{error}");
        scene.nothing_but(1).await;
        let release = async {
            scene.until_awaited(&keys[1]).await;
            unlock_by_sql(&holder, &keys[1]).await;
        };
        let (guard, ()) =
            tokio::join!(acquire(&scene.keeper, &keys, scope, GIVE_UP_AFTER), release);
        let guard = guard.unwrap_or_else(|error| panic!("{scope:?}: {error:?}"));
        assert_eq!(scene.advisory_locks().await, 3000);
        guard.end().await;
        scene.nothing_left().await;
    }
    let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
    guard.advisory_locks(&keys).await.unwrap();
    assert_eq!(scene.advisory_locks().await, 3001);
    drop(guard);
    scene.nothing_left().await;
}

/// The connection that the pool gives is in a transaction that other code left open: it is not committed on the way.
#[tokio::test]
async fn a_connection_left_in_a_transaction_is_not_committed_for_its_owner() {
    let scene = Scene::new(1).await;
    scene
        .observer
        .batch_execute("CREATE TABLE note (n int4)")
        .await
        .unwrap();
    for keys in [vec![1], vec![1, 2]] {
        for scope in SCOPES {
            for tries in [false, true] {
                let object = scene.pool.get().await.unwrap();
                object
                    .batch_execute("BEGIN; INSERT INTO note VALUES (1)")
                    .await
                    .unwrap();
                let pid = pid_of(&object).await;
                drop(object);
                let guard = if tries {
                    try_acquire(&scene.keeper, keys.clone(), scope)
                        .await
                        .unwrap()
                        .unwrap()
                } else {
                    acquire(&scene.keeper, keys.clone(), scope, GIVE_UP_AFTER)
                        .await
                        .unwrap()
                };
                assert_ne!(guard.pid(), pid);
                assert_eq!(
                    scene.advisory_locks().await,
                    i64::try_from(keys.len()).unwrap()
                );
                guard.end().await;
                let row = scene
                    .observer
                    .query_one("SELECT count(*) FROM note", &[])
                    .await
                    .unwrap();
                assert_eq!(
                    row.get::<_, i64>(0),
                    0,
                    "{keys:?}, {scope:?}, try: {tries}: it was committed"
                );
                scene.nothing_left().await;
            }
        }
    }
}
