//! The line inside the process before one session lock, and what is handed over in it.

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use lockkeeper::{ErrorKind, Keeper, SessionGuard};
use lockkeeper_testkit::{
    Fault, GIVE_UP_AFTER, Proxy, Scene, eventually, pid_of, poll_times_and_drop,
};
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, JoinSet};

const LONG: Duration = Duration::from_secs(30);

async fn taken(scene: &Scene, key: i64) -> SessionGuard {
    let lock = scene.keeper.advisory_lock(key).session();
    lock.acquire().await.unwrap()
}

/// So that what is handed over is prepared on a connection of the pool.
async fn took_it_once(scene: &Scene, key: i64) {
    taken(scene, key).await.release().await.unwrap();
}

fn waiting(scene: &Scene, key: i64) -> JoinHandle<SessionGuard> {
    let lock = scene.keeper.advisory_lock(key).wait(LONG).session();
    tokio::spawn(async move { lock.acquire().await.unwrap() })
}

/// Those in line cost no connection and do not show on the server, so this is what there is to wait for.
async fn settled() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn served<T>(waiter: JoinHandle<T>) -> T {
    let served = tokio::time::timeout(GIVE_UP_AFTER, waiter).await;
    served.expect("not served").unwrap()
}

#[tokio::test]
async fn the_next_in_line_gets_the_connection_with_the_lock_under_its_own_name() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 1).await;
    let mut slow = 0;
    for by_drop in [false, true] {
        loop {
            let first = taken(&scene, 1).await;
            let pid = first.backend_pid();
            let asked = Instant::now();
            let waiter = waiting(&scene, 1);
            settled().await;
            let waiters = scene.waiters(1).await;
            if by_drop {
                drop(first);
            } else {
                first.release().await.unwrap();
            }
            // Who has stood in line for long looks for himself.
            let in_time = asked.elapsed() < Duration::from_millis(250);
            let second = served(waiter).await;
            if !in_time {
                slow += 1;
                assert!(slow < 50, "never released in time");
                second.release().await.unwrap();
                continue;
            }
            assert!(waiters.is_empty(), "nobody waits at the server");
            assert_eq!(second.backend_pid(), pid);
            assert_eq!(scene.holders(1).await, [pid.unwrap()]);
            let row = scene
                .observer
                .query_one(
                    "SELECT application_name FROM pg_stat_activity WHERE pid = $1",
                    &[&pid],
                )
                .await
                .unwrap();
            let name: String = row.get(0);
            assert!(name.starts_with("test tests/it/line.rs:"), "{name}");
            second.release().await.unwrap();
            assert_eq!(scene.show("application_name").await, "");
            break;
        }
    }
    scene.nothing_left().await;
}

/// What somebody has set on a connection is not for the next one.
#[tokio::test]
async fn a_connection_that_was_used_goes_back_to_the_pool() {
    let scene = Scene::new(4).await;
    scene.pool_is_whole_within(GIVE_UP_AFTER).await;
    took_it_once(&scene, 2).await;
    let first = taken(&scene, 2).await;
    let pid = first.backend_pid();
    first.batch_execute("SET work_mem = '7MB'").await.unwrap();
    let waiter = waiting(&scene, 2);
    settled().await;
    first.release().await.unwrap();
    let second = served(waiter).await;
    // The pool gives the connection that it got back the longest time ago.
    assert_ne!(second.backend_pid(), pid);
    second.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_pool_of_one_goes_round() {
    let scene = Scene::new(1).await;
    let running = Arc::new(AtomicU32::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let lock = scene.keeper.advisory_lock(3).wait(LONG).session();
        let running = Arc::clone(&running);
        tasks.spawn(async move {
            let guard = lock.acquire().await.unwrap();
            assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0);
            // Longer, now and then, than the first in line waits before it looks for itself.
            tokio::time::sleep(Duration::from_millis(40)).await;
            running.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
        });
    }
    let all = async { while tasks.join_next().await.transpose().unwrap().is_some() {} };
    tokio::time::timeout(LONG, all).await.expect("stuck");
    scene.nothing_left().await;
}

#[tokio::test]
async fn the_line_is_served_in_order_and_waiters_of_others_come_first() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 4).await;
    for round in 0.. {
        assert!(round < 50, "never released in time");
        let other = scene.database.connect().await;
        let pid = pid_of(&other).await;
        let first = taken(&scene, 4).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        let asked = Instant::now();
        for n in 0..3 {
            let lock = scene.keeper.advisory_lock(4).wait(LONG).session();
            let order = Arc::clone(&order);
            tasks.spawn(async move {
                let guard = lock.acquire().await.unwrap();
                order.lock().unwrap().push(format!("ours {n}"));
                guard.release().await.unwrap();
            });
            settled().await;
        }
        let stranger = {
            let order = Arc::clone(&order);
            tokio::spawn(async move {
                let lock = "SELECT pg_advisory_lock(4)";
                other.batch_execute(lock).await.unwrap();
                order.lock().unwrap().push("stranger".to_owned());
                let unlock = "SELECT pg_advisory_unlock(4)";
                other.batch_execute(unlock).await.unwrap();
            })
        };
        eventually("the stranger does not wait", async || {
            scene.waiters(4).await.contains(&pid)
        })
        .await;
        drop(first);
        // Who has stood in line for long looks for himself.
        let in_time = asked.elapsed() < Duration::from_millis(250);
        served(stranger).await;
        let all = async { while tasks.join_next().await.transpose().unwrap().is_some() {} };
        tokio::time::timeout(GIVE_UP_AFTER, all)
            .await
            .expect("stuck");
        if in_time {
            assert_eq!(
                *order.lock().unwrap(),
                ["stranger", "ours 0", "ours 1", "ours 2"]
            );
            break;
        }
    }
    scene.nothing_left().await;
}

/// A guard whose connection has ended is still somebody's, but its lock is free.
#[tokio::test]
async fn a_guard_that_has_lost_its_lock_does_not_hold_up_the_line() {
    let scene = Scene::new(4).await;
    let lost = taken(&scene, 5).await;
    let waiter = waiting(&scene, 5);
    settled().await;
    scene
        .observer
        .execute("SELECT pg_terminate_backend($1)", &[&lost.backend_pid()])
        .await
        .unwrap();
    let second = served(waiter).await;
    assert_eq!(
        lost.release().await.unwrap_err().kind(),
        ErrorKind::LockLost
    );
    assert_eq!(scene.holders(5).await, [second.backend_pid().unwrap()]);
    second.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_place_that_is_given_up_at_any_point_goes_to_the_next() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 6).await;
    for polls in 0..8 {
        let first = taken(&scene, 6).await;
        let lock = scene.keeper.advisory_lock(6).wait(LONG).session();
        let given_up = tokio::spawn(async move {
            drop(poll_times_and_drop(lock.acquire(), polls).await);
        });
        settled().await;
        let waiter = waiting(&scene, 6);
        settled().await;
        // Handed to the one that is about to give up, if it has not yet.
        drop(first);
        let second = served(waiter).await;
        served(given_up).await;
        assert_eq!(scene.holders(6).await, [second.backend_pid().unwrap()]);
        second.release().await.unwrap();
        scene.nothing_left().await;
    }
}

/// Dropped while the session is on its way to it.
#[tokio::test]
async fn a_session_that_nobody_takes_is_unlocked() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 7).await;
    for _ in 0..20 {
        let first = taken(&scene, 7).await;
        let waiter = waiting(&scene, 7);
        settled().await;
        // The message that hands over is sent; its answer has not been read.
        drop(first);
        waiter.abort();
        drop(waiter.await);
        eventually("the lock is left", async || !scene.is_held(7).await).await;
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_left_over_when_waiters_come_and_go() {
    let scene = Scene::new(4).await;
    // A login takes longer than most of them have.
    scene.pool_is_whole_within(GIVE_UP_AFTER).await;
    let inside = Arc::new(AtomicU32::new(0));
    let entered = Arc::new(AtomicU32::new(0));
    let mut tasks = JoinSet::new();
    for task in 0..16_u64 {
        let keeper = scene.keeper.clone();
        let (inside, entered) = (Arc::clone(&inside), Arc::clone(&entered));
        tasks.spawn(async move {
            for round in 0..40_u64 {
                let patience = match task {
                    // However slow the machine is, one of them is served.
                    0 => LONG,
                    _ => Duration::from_micros((task * 7919 + round * 104_729) % 30_000),
                };
                let lock = keeper.advisory_lock(8).wait(LONG).session();
                let Ok(guard) = tokio::time::timeout(patience, lock.acquire()).await else {
                    continue;
                };
                let guard = guard.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two inside");
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                entered.fetch_add(1, Ordering::SeqCst);
                if round % 2 == 0 {
                    guard.release().await.unwrap();
                }
            }
        });
    }
    let all = async { while tasks.join_next().await.transpose().unwrap().is_some() {} };
    tokio::time::timeout(LONG * 2, all).await.expect("stuck");
    assert!(entered.load(Ordering::SeqCst) > 0);
    scene.nothing_left().await;
}

/// What is handed over was prepared on the connection by an earlier acquisition.
async fn prepare(scene: &Scene, key: i64) {
    let guard = scene.keeper.advisory_lock(key).session().acquire().await;
    guard.unwrap().release().await.unwrap();
}

async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx).is_pending())).await
}

/// A line that never ends goes round on one connection; somebody waits for the pool's.
#[tokio::test]
async fn a_line_does_not_keep_the_pools_connection_from_others() {
    let scene = Scene::new(1).await;
    let rounds = Arc::new(AtomicU32::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..3 {
        let (keeper, rounds) = (scene.keeper.clone(), Arc::clone(&rounds));
        tasks.spawn(async move {
            loop {
                let lock = keeper.advisory_lock(9).wait(LONG).session();
                let guard = lock.acquire().await.unwrap();
                rounds.fetch_add(1, Ordering::SeqCst);
                guard.release().await.unwrap();
            }
        });
    }
    eventually("the lock does not go round", async || {
        rounds.load(Ordering::SeqCst) > 10
    })
    .await;
    let others = tokio::time::timeout(GIVE_UP_AFTER, scene.pool.get()).await;
    tasks.shutdown().await;
    drop(
        others
            .expect("the pool's connection never came back")
            .unwrap(),
    );
    scene.nothing_left().await;
}

/// A current-thread runtime does nothing outside of `block_on`, so it cannot see to a session on its way to another one.
#[test]
fn a_guard_dropped_beside_its_idle_runtime_is_handed_over() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let scene = runtime.block_on(async {
        let scene = Scene::new(1).await;
        prepare(&scene, 10).await;
        scene
    });
    let idle = Builder::new_current_thread().enable_all().build().unwrap();
    let lock = scene.keeper.advisory_lock(10).session();
    let first = idle.block_on(lock.acquire()).unwrap();
    let lock = scene.keeper.advisory_lock(10).wait(LONG).session();
    let mut waiter = Box::pin(lock.acquire());
    assert!(runtime.block_on(is_pending(&mut waiter)));
    drop(first);
    let second = runtime.block_on(async { tokio::time::timeout(GIVE_UP_AFTER, waiter).await });
    drop(second.expect("not served").unwrap());
    runtime.block_on(scene.nothing_left());
}

/// Its future is alive, and whoever has it is busy with something else.
#[tokio::test]
async fn a_release_that_nobody_polls_to_its_end_reaches_the_next() {
    let scene = Scene::new(4).await;
    prepare(&scene, 11).await;
    let lock = scene.keeper.advisory_lock(11).session();
    let first = lock.acquire().await.unwrap();
    let waiter = waiting(&scene, 11);
    settled().await;
    let mut release = Box::pin(first.release());
    assert!(is_pending(&mut release).await);
    let second = served(waiter).await;
    second.release().await.unwrap();
    release.await.unwrap();
    scene.nothing_left().await;
}

/// The connection on which the lock was to be handed over has fallen silent, and the server has given it up: whoever it
/// was to go to looks for itself.
#[tokio::test]
async fn a_hand_over_that_is_never_answered_does_not_hold_up_the_next() {
    let scene = Scene::new(1).await;
    let proxy = Proxy::before(scene.database.server());
    let pool = proxy.pool(&scene.database.config(), 2);
    let keeper = Keeper::builder(pool).application("test").build();
    let lock = keeper.advisory_lock(12).wait(LONG).session();
    lock.clone()
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    let first = lock.clone().acquire().await.unwrap();
    let pid = first.backend_pid();
    let waiter = tokio::spawn(async move { lock.acquire().await.unwrap() });
    settled().await;
    // The holder's own name, which is put back if the next one does not get the lock.
    proxy.fault(", '')", Fault::Stall);
    drop(first);
    eventually("not handed over", async || proxy.faults_left() == 0).await;
    scene
        .observer
        .execute("SELECT pg_terminate_backend($1)", &[&pid])
        .await
        .unwrap();
    let soon = Duration::from_secs(5);
    let second = tokio::time::timeout(soon, waiter).await;
    drop(second.expect("not served").unwrap());
    eventually("the lock is left", async || !scene.is_held(12).await).await;
}
