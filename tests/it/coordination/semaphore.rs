//! As many permits as were asked for, over all processes, and none lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::join_all;
use lockkeeper::{Error, ErrorKind, Keeper, SemaphorePermit};
use lockkeeper_testkit::{
    ENDLESS, Proxy, Scene, assert_error, assert_error_in, eventually, in_time, is_pending,
    poll_times_and_drop, quoted,
};

use super::process;

async fn take(keeper: &Keeper, permits: u32) -> SemaphorePermit {
    let permit = keeper.semaphore("s", permits).wait(ENDLESS).acquire();
    in_time("a permit", permit).await.unwrap()
}

async fn is_full(keeper: &Keeper, permits: u32) -> bool {
    keeper
        .semaphore("s", permits)
        .try_acquire()
        .await
        .unwrap()
        .is_none()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_than_the_permits_are_held_over_all_processes() {
    let scene = Scene::new(6).await;
    let other = Keeper::new(scene.database.pool(6));
    let (held, most, served) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let work = async |keeper: &Keeper| {
        for _ in 0..6 {
            let permit = take(keeper, 3).await;
            let now = held.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(now, Ordering::SeqCst);
            tokio::task::yield_now().await;
            held.fetch_sub(1, Ordering::SeqCst);
            served.fetch_add(1, Ordering::SeqCst);
            if now % 2 == 0 {
                drop(permit);
            } else {
                permit.release().await.unwrap();
            }
        }
    };
    join_all((0..8).map(|n| work(if n % 2 == 0 { &scene.keeper } else { &other }))).await;
    assert_eq!(served.into_inner(), 48);
    assert!(most.into_inner() <= 3);

    let all = join_all((0..3).map(|n| take(if n == 0 { &scene.keeper } else { &other }, 3))).await;
    let mut numbers: Vec<u32> = all.iter().map(SemaphorePermit::number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1, 2]);
    assert!(is_full(&scene.keeper, 3).await && is_full(&other, 3).await);
    // Another name is another semaphore.
    drop(scene.keeper.semaphore("other", 3).acquire().await.unwrap());
    let brief = scene
        .keeper
        .semaphore("s", 3)
        .wait(Duration::from_millis(50));
    let error = brief.acquire().await.unwrap_err();
    let text = "lock not granted in time: \"lockkeeper semaphore\"/\"s\": all 3 permits are held";
    assert_error(&error, ErrorKind::LockTimeout, text);
    drop(all);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_of_a_keeper_are_served_in_order() {
    let scene = Scene::new(4).await;
    let first = take(&scene.keeper, 1).await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiting = Vec::new();
    for n in 0..5 {
        let mut waiter = Box::pin({
            let (keeper, order) = (scene.keeper.clone(), Arc::clone(&order));
            async move {
                let permit = take(&keeper, 1).await;
                order.lock().unwrap().push(n);
                drop(permit);
            }
        });
        // The first stands in line once it has found the semaphore busy, and given its connection back; those behind it at
        // once.
        let mut polls = 0;
        while polls < 20 {
            assert!(is_pending(&mut waiter).await);
            let pool = scene.pool.status();
            polls += u32::from(pool.size > 1 && pool.available + 1 == pool.size);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        waiting.push(waiter);
    }
    // One who leaves is no hindrance, and who comes later does not overtake, also where a permit is free.
    drop(waiting.remove(2));
    first.release().await.unwrap();
    assert!(is_full(&scene.keeper, 1).await);
    let overtaking = scene.keeper.semaphore("s", 1).wait(Duration::ZERO);
    let error = overtaking.acquire().await.unwrap_err();
    assert_error(&error, ErrorKind::LockTimeout, "held, or waited for");
    in_time("the line", join_all(waiting)).await;
    assert_eq!(*order.lock().unwrap(), [0, 1, 3, 4]);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permit_that_is_lost_is_free_and_says_so() {
    let scene = Scene::new(3).await;
    let other = process(&scene);
    let permits = [take(&scene.keeper, 2).await, take(&scene.keeper, 2).await];
    let losses = permits.each_ref().map(SemaphorePermit::loss);
    let mut waiting = Box::pin(take(&other, 2));
    assert!(is_pending(&mut waiting).await);
    let sql = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database = \
               (SELECT oid FROM pg_database WHERE datname = current_database()) LIMIT 1";
    scene.terminate(scene.column(sql).await[0]).await;
    let permit = in_time("the lost permit", waiting).await;
    let lost = async || permits.iter().any(SemaphorePermit::is_lost);
    eventually("the loss is not noticed", lost).await;
    let [first, second] = permits;
    let [of_first, of_second] = losses;
    let (lost, kept, loss_of_lost, loss_of_kept) = if first.is_lost() {
        (first, second, of_first, of_second)
    } else {
        (second, first, of_second, of_first)
    };
    in_time("the loss", loss_of_lost.clone()).await;
    assert!(loss_of_lost.is_lost());
    assert_eq!(lost.number(), permit.number());
    assert_error(
        &lost.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "permit",
    );
    assert!(!kept.is_lost());
    assert!(is_full(&other, 2).await);
    let mut loss = loss_of_kept.clone();
    assert!(is_pending(&mut loss).await);
    kept.release().await.unwrap();
    in_time("the end", loss).await;
    assert!(!loss_of_kept.is_lost());
    permit.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test]
async fn who_disagrees_on_the_number_is_told_both() {
    let scene = Scene::new(4).await;
    let other = process(&scene);
    let permit = take(&scene.keeper, 2).await;
    let text = "a semaphore of 5 permits, and it is held elsewhere as one of 2";
    let error = other.semaphore("s", 5).acquire().await.unwrap_err();
    assert_error(&error, ErrorKind::Config, text);
    assert_error(&error, ErrorKind::Config, "\"lockkeeper semaphore\"/\"s\"");
    let error = other.semaphore("s", 5).try_acquire().await.unwrap_err();
    assert_error(&error, ErrorKind::Config, text);
    // Also to who finds it full.
    let second = take(&scene.keeper, 2).await;
    let error = other.semaphore("s", 1).acquire().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Config,
        "a semaphore of 1 permits, and it is held elsewhere as one of 2",
    );
    drop((permit, second));
    scene.nothing_left().await;
    // Once nobody holds one, the number can be another.
    drop(take(&other, 5).await);
    for permits in [0, 4097, u32::MAX] {
        let error = other.semaphore("s", permits).acquire().await.unwrap_err();
        assert_error(&error, ErrorKind::Config, "at least 1, at most 4096");
    }
    drop(take(&other, 4096).await);
    scene.nothing_left().await;

    // Without the right to know, the permits are counted all the same.
    let role = format!("semaphore_{}", scene.database.name());
    scene
        .run(&format!(
            "CREATE ROLE {role} LOGIN; REVOKE SELECT ON pg_locks FROM PUBLIC"
        ))
        .await;
    let restricted = Keeper::new(scene.database.pool_as(&role, 3));
    let permits = [take(&restricted, 2).await, take(&restricted, 2).await];
    assert!(is_full(&restricted, 2).await && is_full(&other, 2).await);
    drop(permits);
    scene.nothing_left().await;
    scene
        .run(&format!("DROP OWNED BY {0}; DROP ROLE {0}", quoted(&role)))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_a_call_leaves_no_permit() {
    let scene = Scene::new(3).await;
    for full in [false, true] {
        for polls in 0..40 {
            let held = match full {
                true => Some(take(&scene.keeper, 1).await),
                false => None,
            };
            let call = scene.keeper.semaphore("s", 1).wait(ENDLESS).acquire();
            let call =
                tokio::time::timeout(Duration::from_millis(100), poll_times_and_drop(call, polls));
            let completed = call.await.is_ok_and(|completed| completed.is_some());
            drop(held);
            scene.nothing_left().await;
            drop(take(&scene.keeper, 1).await);
            scene.nothing_left().await;
            if completed || full && polls > 10 {
                break;
            }
        }
    }
}

/// The pool has no more connections than there are permits: who waits for one waits for the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_of_as_many_connections_as_permits_is_enough() {
    let scene = Scene::new(2).await;
    let served = AtomicU32::new(0);
    let work = async || {
        for _ in 0..3 {
            let permit = take(&scene.keeper, 2).await;
            served.fetch_add(1, Ordering::Relaxed);
            permit.release().await.unwrap();
        }
    };
    in_time("all", join_all((0..6).map(|_| work()))).await;
    assert_eq!(served.into_inner(), 18);
    scene.nothing_left().await;
}

/// A network that is cut while permits are held, and a server that answers nobody: errors, and nothing left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_an_error_and_leaves_nothing() {
    let scene = Scene::new(2).await;
    let proxy = Proxy::before(scene.database.server());
    let keeper = Keeper::builder(proxy.pool(&scene.database.config(), 2))
        .longest_silence(Duration::from_millis(300))
        .lock_wait(Duration::from_millis(500))
        .watch(false)
        .build();
    let permit = take(&keeper, 1).await;
    proxy.stall(true);
    let waiting = keeper.semaphore("s", 1).acquire();
    let error: Error = in_time("an answer", waiting).await.unwrap_err();
    let kinds = [
        ErrorKind::LockTimeout,
        ErrorKind::ConnectionLost,
        ErrorKind::Pool,
    ];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    let released = in_time("the release", permit.release()).await;
    assert_error_in(
        "release",
        &released.unwrap_err(),
        ErrorKind::LockLost,
        "permit",
    );
    proxy.stall(false);
    drop(take(&scene.keeper, 1).await);
    scene.nothing_left().await;
}

/// Who has the wrong number is refused, and takes nothing that one with the right number could meet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_the_right_number_is_not_refused_with_who_has_not() {
    let scene = Scene::new(4).await;
    let other = Keeper::new(scene.database.pool(4));
    let held = take(&scene.keeper, 2).await;
    let wrong = async || {
        for _ in 0..100 {
            let error = other.semaphore("s", 5).try_acquire().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
        }
    };
    let right = async || {
        for _ in 0..100 {
            take(&scene.keeper, 2).await.release().await.unwrap();
        }
    };
    tokio::join!(wrong(), wrong(), right());
    held.release().await.unwrap();
    scene.nothing_left().await;
}

/// The wait is for a connection, too, also where it is longer than that of the keeper.
#[tokio::test]
async fn a_pool_that_is_full_for_a_while_is_waited_for() {
    let scene = Scene::new(1).await;
    let hasty = Keeper::builder(scene.pool.clone())
        .lock_wait(Duration::from_millis(50))
        .build();
    let in_use = scene.pool.get().await.unwrap();
    let error = hasty.semaphore("s", 2).acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Pool, "{error:?}");
    let mut waiting = Box::pin(hasty.semaphore("s", 2).wait(ENDLESS).acquire());
    // Longer than a connection to ask on is waited for.
    let early = tokio::time::timeout(Duration::from_millis(1300), &mut waiting).await;
    assert!(early.is_err(), "{early:?}");
    drop(in_use);
    in_time("a permit", waiting)
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    scene.nothing_left().await;
}
