//! Many waiters for one key: most of them wait inside the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use futures::future::join_all;
use lockkeeper::LockKey;
use lockkeeper_testkit::{CLEANED_UP_WITHIN, ENDLESS, in_time_of, is_pending};

use super::{Scope, ms, take, time, timed_out, warm};

/// Two waiters of a keeper with eight connections wait at the server, the others in line in the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_in_the_line_of_the_process_times_out_in_time_too() {
    let scene = warm(8).await;
    let key = LockKey::from(512);
    let holder = scene.holder(&key).await;
    let pid = holder.pid;
    let crowd: Vec<_> = (0..4)
        .map(|_| {
            let lock = scene.keeper.advisory_lock(512).wait(ENDLESS);
            tokio::spawn(async move { drop(lock.acquire().await.unwrap()) })
        })
        .collect();
    scene.until_awaited_by(2, &key).await;
    let asked = ms(250);
    for scope in [Scope::Xact, Scope::Session, Scope::Snapshot] {
        time(asked, &format!("{scope:?}"), async |asked| {
            let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
            assert_eq!(error.key(), Some(&key));
            assert!(error.waited().unwrap() >= asked);
            // The crowd may be listed too: it queues ahead.
            let holders: Vec<_> = error.blockers().iter().filter(|b| b.is_holder()).collect();
            assert_eq!(holders.len(), 1, "{error}");
            assert_eq!(holders[0].pid(), Some(pid), "{error}");
            for waiter in error.blockers().iter().filter(|b| !b.is_holder()) {
                let name = waiter.application_name().unwrap();
                assert!(name.contains("tests/it/timeouts/crowds.rs:"), "{name}");
            }
        })
        .await;
    }
    // Without a connection to ask on it is in time all the same. Two wait, and one is what they are watched over.
    let rest = join_all((0..5).map(|_| scene.pool.get())).await;
    for scope in [Scope::Xact, Scope::Session, Scope::Snapshot] {
        time(
            asked,
            &format!("{scope:?} without a connection"),
            async |asked| {
                let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
                assert_eq!(error.key(), Some(&key));
            },
        )
        .await;
    }
    drop(rest);
    drop(holder);
    for waiter in crowd {
        in_time_of(CLEANED_UP_WITHIN, "a waiter is stuck", waiter)
            .await
            .unwrap();
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_in_the_line_of_the_process_are_served_in_their_order() {
    let scene = Arc::new(warm(8).await);
    let key = LockKey::from(513);
    let holder = scene.holder(&key).await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut crowd = Vec::new();
    for n in 0..12 {
        // The first two stand at the server, which shows them. The others stand in the line of the process, where the first
        // poll of a call takes its place.
        let lock = scene.keeper.advisory_lock(&key).wait(ENDLESS);
        let mut waiting = Box::pin(lock.acquire());
        assert!(is_pending(&mut waiting).await);
        let (order, seen, theirs) = (order.clone(), scene.clone(), key.clone());
        crowd.push(tokio::spawn(async move {
            let guard = waiting.await.unwrap();
            let left = {
                let mut order = order.lock().unwrap();
                order.push(n);
                12 - order.len()
            };
            // Until the next ones have joined the server's queue.
            seen.until_awaited_by(left.min(2), theirs).await;
            guard.commit().await.unwrap();
        }));
        scene.until_awaited_by((n + 1).min(2), &key).await;
    }
    drop(holder);
    for waiter in crowd {
        waiter.await.unwrap();
    }
    let order = order.lock().unwrap().clone();
    assert_eq!(order.len(), 12);
    assert!(order.is_sorted(), "{order:?}");
    scene.nothing_left().await;
}

/// How long other work on a pool takes.
async fn other_work(pool: &Pool) -> Duration {
    let asked = Instant::now();
    let object = pool.get().await.unwrap();
    object.batch_execute("SELECT 1").await.unwrap();
    drop(object);
    asked.elapsed()
}

/// One hundred tasks under one key on a pool of eight, and other work on the same pool meanwhile.
async fn a_hundred_tasks(scope: Scope) {
    let scene = warm(8).await;
    let key = LockKey::from(518);
    // How long the same work takes while the key is free.
    let mut calm = Vec::new();
    for _ in 0..20 {
        calm.push(other_work(&scene.pool).await);
        // The pace of the other work, here and below.
        tokio::time::sleep(ms(2)).await;
    }
    calm.sort();
    let calm = calm[calm.len() / 2];
    let counter = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let (keeper, key, counter) = (scene.keeper.clone(), key.clone(), counter.clone());
            tokio::spawn(async move {
                let guard = take(&keeper, scope, key, Duration::from_secs(60))
                    .await
                    .unwrap();
                assert_eq!(counter.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                // The time itself is what is tested: another holder would be seen in it.
                tokio::time::sleep(ms(5)).await;
                counter.fetch_sub(1, Ordering::SeqCst);
                drop(guard);
            })
        })
        .collect();
    let over = Arc::new(AtomicBool::new(false));
    let other = tokio::spawn({
        let (pool, over) = (scene.pool.clone(), over.clone());
        async move {
            let mut latencies = Vec::new();
            while !over.load(Ordering::Relaxed) {
                latencies.push(other_work(&pool).await);
                tokio::time::sleep(ms(2)).await;
            }
            latencies
        }
    });
    for task in join_all(tasks).await {
        task.unwrap();
    }
    let took = started.elapsed();
    over.store(true, Ordering::Relaxed);
    let mut latencies = other.await.unwrap();
    latencies.sort();
    let median = latencies[latencies.len() / 2];
    assert!(took < Duration::from_secs(30), "{took:?}");
    assert!(
        latencies.len() > 10,
        "other work stood still: {latencies:?}"
    );
    assert!(
        median < ms(100).max(20 * calm),
        "other work took {median:?}, without the tasks {calm:?}"
    );
    let longest = latencies.last().unwrap();
    assert!(
        *longest < Duration::from_secs(2).max(20 * calm),
        "other work took {longest:?}, without the tasks {calm:?}"
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_tasks_under_one_lock_are_never_two_inside() {
    a_hundred_tasks(Scope::Xact).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_tasks_under_one_session_lock_are_never_two_inside() {
    a_hundred_tasks(Scope::Session).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_tasks_before_a_snapshot_are_never_two_inside() {
    a_hundred_tasks(Scope::Snapshot).await;
}
