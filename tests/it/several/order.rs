//! Opposite orders: no deadlock with a set, and one without.

use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, LockKey};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, Server};

use super::{Scope, acquire};

/// Callers that name the same keys in opposite orders: neither waits for the other's second key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opposite_orders_never_deadlock() {
    const ROUNDS: usize = 60;
    let scene = Scene::new(6).await;
    let began = Instant::now();
    let mut callers = Vec::new();
    for (n, scope) in [
        Scope::Xact,
        Scope::Session,
        Scope::Snapshot,
        Scope::Xact,
        Scope::Session,
    ]
    .into_iter()
    .enumerate()
    {
        let keeper = scene.keeper.clone();
        callers.push(tokio::spawn(async move {
            let mut keys = vec![
                LockKey::from("acct:1"),
                "acct:2".into(),
                (1, 2).into(),
                4_294_967_298.into(),
            ];
            if n % 2 == 1 {
                keys.reverse();
            }
            let mut pids = Vec::new();
            for round in 0..ROUNDS {
                keys.rotate_left(round % 2);
                let guard = acquire(&keeper, &keys, scope, Duration::from_secs(60))
                    .await
                    .unwrap();
                pids.push(guard.pid());
                tokio::task::yield_now().await;
                if round % 3 == 0 {
                    drop(guard);
                } else {
                    guard.end().await;
                }
            }
            pids
        }));
    }
    let mut pids = Vec::new();
    for caller in callers {
        pids.extend(caller.await.unwrap());
    }
    pids.sort_unstable();
    pids.dedup();
    assert!(pids.len() > 1, "one backend does not wait for itself");
    scene.nothing_left().await;
    // A cycle of waiters would end only with the server's deadlock check, a second each.
    assert!(
        began.elapsed() < Duration::from_secs(90),
        "{:?}",
        began.elapsed()
    );
    scene
        .observer
        .batch_execute("SELECT pg_stat_clear_snapshot()")
        .await
        .unwrap();
    let row = scene
        .observer
        .query_one(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 0);
}

/// Locks taken one by one in opposite orders are a deadlock. The server finds it, whatever its `deadlock_timeout`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_taken_one_by_one_in_opposite_orders_end_as_a_deadlock() {
    for timeout in ["100ms", "3s"] {
        let server = Server::start(&[("deadlock_timeout", timeout)]).unwrap();
        let scene = Scene::on(&server, 2).await;
        let both_hold = std::sync::Arc::new(tokio::sync::Barrier::new(2));
        let began = Instant::now();
        let callers: Vec<_> = [(1, 2), (2, 1)]
            .into_iter()
            .map(|(first, second)| {
                let keeper = scene.keeper.clone();
                let both_hold = std::sync::Arc::clone(&both_hold);
                tokio::spawn(async move {
                    let mut guard = keeper.advisory_lock(first).acquire().await.unwrap();
                    both_hold.wait().await;
                    let result = guard.advisory_lock(second).wait(GIVE_UP_AFTER).await;
                    if result.is_ok() {
                        assert_eq!(guard.held_keys().count(), 2);
                        guard.commit().await.unwrap();
                    }
                    result
                })
            })
            .collect();
        let mut errors = Vec::new();
        for caller in callers {
            errors.extend(caller.await.unwrap().err());
        }
        let kinds: Vec<_> = errors.iter().map(Error::kind).collect();
        assert_eq!(
            kinds,
            [ErrorKind::Deadlock],
            "{timeout}, after {:?}",
            began.elapsed()
        );
        assert!(errors[0].is_retryable());
        scene.nothing_left().await;
    }
}
