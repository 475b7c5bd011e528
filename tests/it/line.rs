//! The line inside the process before one session lock, and what is handed over in it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockkeeper::{ErrorKind, Keeper, SessionGuard};
use lockkeeper_testkit::{
    ENDLESS, Fault, GIVE_UP_AFTER, Proxy, Scene, assert_error, eventually, in_time, is_pending,
    lock_by_sql, poll_times_and_drop, unlock_by_sql,
};
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, JoinSet};

use super::waiters::occupy;

async fn taken(scene: &Scene, key: i64) -> SessionGuard {
    let lock = scene.keeper.advisory_lock(key).session();
    lock.acquire().await.unwrap()
}

/// So that what is handed over is prepared on a connection of the pool.
async fn took_it_once(scene: &Scene, key: i64) {
    taken(scene, key).await.release().await.unwrap();
}

/// A call that stands in line: its first poll takes the place, which no server shows.
async fn waiting(scene: &Scene, key: i64) -> JoinHandle<SessionGuard> {
    let lock = scene
        .keeper
        .advisory_lock(key)
        .wait(GIVE_UP_AFTER)
        .session();
    let mut waiting = Box::pin(lock.acquire());
    assert!(is_pending(&mut waiting).await);
    tokio::spawn(async move { waiting.await.unwrap() })
}

async fn served<T>(waiter: JoinHandle<T>) -> T {
    in_time("not served", waiter).await.unwrap()
}

/// The clock of a runtime of one thread, which stands still until this is dropped.
///
/// The first in line tries the lock by itself a few times a second. While the clock stands still it does not, so it gets
/// what it is handed or nothing.
struct StoppedClock {
    _running: std::sync::mpsc::Sender<()>,
}

impl StoppedClock {
    fn stop() -> Self {
        tokio::time::pause();
        // A clock that is paused goes forward when the runtime has nothing to do, unless a blocking task runs.
        let (running, until_dropped) = std::sync::mpsc::channel::<()>();
        drop(tokio::task::spawn_blocking(move || until_dropped.recv()));
        Self { _running: running }
    }

    /// What a task gives, without a timer.
    async fn served<T>(&self, waiter: JoinHandle<T>) -> T {
        self.until("not served", || waiter.is_finished()).await;
        waiter.await.unwrap()
    }

    async fn until(&self, what: &str, state: impl Fn() -> bool) {
        let started = Instant::now();
        while !state() {
            assert!(started.elapsed() < GIVE_UP_AFTER, "{what}");
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for StoppedClock {
    fn drop(&mut self) {
        tokio::time::resume();
    }
}

#[tokio::test]
async fn the_next_in_line_gets_the_connection_with_the_lock_under_its_own_name() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 1).await;
    for by_drop in [false, true] {
        let first = taken(&scene, 1).await;
        let pid = first.backend_pid().unwrap();
        let clock = StoppedClock::stop();
        let waiter = waiting(&scene, 1).await;
        assert_eq!(scene.waiters(1).await, [0; 0], "it waits at the server");
        if by_drop {
            drop(first);
        } else {
            first.release().await.unwrap();
        }
        let second = clock.served(waiter).await;
        drop(clock);
        assert_eq!(second.backend_pid(), Some(pid));
        assert_eq!(scene.holders(1).await, [pid]);
        let name = scene.application_name(pid).await;
        assert!(name.starts_with("test tests/it/line.rs:"), "{name}");
        second.release().await.unwrap();
        assert_eq!(scene.show("application_name").await, "");
    }
    scene.nothing_left().await;
}

/// What was set on a connection is not for the next one.
#[tokio::test]
async fn a_connection_that_was_used_goes_back_to_the_pool() {
    let scene = Scene::new(4).await;
    scene.pool_is_whole_within(GIVE_UP_AFTER).await;
    took_it_once(&scene, 2).await;
    let first = taken(&scene, 2).await;
    let pid = first.backend_pid();
    first.batch_execute("SET work_mem = '7MB'").await.unwrap();
    let waiter = waiting(&scene, 2).await;
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
        let lock = scene.keeper.advisory_lock(3).wait(GIVE_UP_AFTER).session();
        let running = Arc::clone(&running);
        tasks.spawn(async move {
            let guard = lock.acquire().await.unwrap();
            assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0);
            // The time itself is what is tested: some wait for longer than the first in line does before it tries the lock.
            tokio::time::sleep(Duration::from_millis(40)).await;
            running.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
        });
    }
    let all = async { while tasks.join_next().await.transpose().unwrap().is_some() {} };
    in_time("stuck", all).await;
    scene.nothing_left().await;
}

#[tokio::test]
async fn the_line_is_served_in_order_and_waiters_of_others_come_first() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 4).await;
    let other = scene.session().await;
    let first = taken(&scene, 4).await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let clock = StoppedClock::stop();
    let mut ours = Vec::new();
    for n in 0..3 {
        let (waiter, order) = (waiting(&scene, 4).await, Arc::clone(&order));
        ours.push(tokio::spawn(async move {
            let guard = waiter.await.unwrap();
            order.lock().unwrap().push(format!("ours {n}"));
            guard.release().await.unwrap();
        }));
    }
    let pid = other.pid;
    let stranger = {
        let order = Arc::clone(&order);
        tokio::spawn(async move {
            lock_by_sql(&other.client, 4).await;
            order.lock().unwrap().push("stranger".to_owned());
            unlock_by_sql(&other.client, 4).await;
        })
    };
    let started = Instant::now();
    while scene.waiters(4).await != [pid] {
        assert!(
            started.elapsed() < GIVE_UP_AFTER,
            "the stranger does not wait"
        );
    }
    drop(first);
    clock.served(stranger).await;
    // Which one is handed a session without the lock waits at the server: that takes a clock.
    drop(clock);
    for waiter in ours {
        served(waiter).await;
    }
    assert_eq!(
        *order.lock().unwrap(),
        ["stranger", "ours 0", "ours 1", "ours 2"]
    );
    scene.nothing_left().await;
}

/// A guard whose connection has ended still has its owner, but its lock is free.
#[tokio::test]
async fn a_guard_that_has_lost_its_lock_does_not_hold_up_the_line() {
    let scene = Scene::new(4).await;
    let lost = taken(&scene, 5).await;
    let waiter = waiting(&scene, 5).await;
    scene.terminate(lost.backend_pid().unwrap()).await;
    let second = served(waiter).await;
    assert_error(
        &lost.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "lock lost with its connection: 5",
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
        let lock = scene.keeper.advisory_lock(6).wait(GIVE_UP_AFTER).session();
        let mut gives_up = Box::pin(poll_times_and_drop(lock.acquire(), polls));
        let gives_up = is_pending(&mut gives_up).await.then_some(gives_up);
        let waiter = waiting(&scene, 6).await;
        // Handed to the one that is about to give up, if it has not yet.
        drop(first);
        let gives_up = gives_up.map(|gives_up| tokio::spawn(async { drop(gives_up.await) }));
        let second = served(waiter).await;
        if let Some(gives_up) = gives_up {
            served(gives_up).await;
        }
        assert_eq!(scene.holders(6).await, [second.backend_pid().unwrap()]);
        second.release().await.unwrap();
        scene.nothing_left().await;
    }
}

/// Dropped while the session is on its way to it.
#[tokio::test]
async fn a_session_that_is_not_taken_is_unlocked() {
    let scene = Scene::new(4).await;
    took_it_once(&scene, 7).await;
    for _ in 0..20 {
        let first = taken(&scene, 7).await;
        let waiter = waiting(&scene, 7).await;
        // The message that hands over is sent; its answer has not been read.
        drop(first);
        waiter.abort();
        drop(waiter.await);
        scene.until_free(7).await;
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_waiter_is_left_over_when_waiters_come_and_go() {
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
                    0 => GIVE_UP_AFTER,
                    _ => Duration::from_micros((task * 7919 + round * 104_729) % 30_000),
                };
                let lock = keeper.advisory_lock(8).wait(GIVE_UP_AFTER).session();
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
    tokio::time::timeout(GIVE_UP_AFTER * 2, all)
        .await
        .expect("stuck");
    assert!(entered.load(Ordering::SeqCst) > 0);
    scene.nothing_left().await;
}

/// What is handed over was prepared on the connection by an earlier acquisition.
async fn prepare(scene: &Scene, key: i64) {
    let guard = scene.keeper.advisory_lock(key).session().acquire().await;
    guard.unwrap().release().await.unwrap();
}

/// A line that never ends uses one connection in turns, while another task waits for a connection of the pool.
#[tokio::test]
async fn a_line_does_not_keep_the_pools_connection_from_others() {
    let scene = Scene::new(1).await;
    let rounds = Arc::new(AtomicU32::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..3 {
        let (keeper, rounds) = (scene.keeper.clone(), Arc::clone(&rounds));
        tasks.spawn(async move {
            loop {
                let lock = keeper.advisory_lock(9).wait(GIVE_UP_AFTER).session();
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
    let lock = scene.keeper.advisory_lock(10).wait(GIVE_UP_AFTER).session();
    let mut waiter = Box::pin(lock.acquire());
    assert!(runtime.block_on(is_pending(&mut waiter)));
    drop(first);
    let second = runtime.block_on(async { tokio::time::timeout(GIVE_UP_AFTER, waiter).await });
    drop(second.expect("not served").unwrap());
    runtime.block_on(scene.nothing_left());
}

/// Its future is alive, and its owner is busy with something else.
#[tokio::test]
async fn a_release_that_is_not_polled_to_its_end_reaches_the_next() {
    let scene = Scene::new(4).await;
    prepare(&scene, 11).await;
    let lock = scene.keeper.advisory_lock(11).session();
    let first = lock.acquire().await.unwrap();
    let waiter = waiting(&scene, 11).await;
    let mut release = Box::pin(first.release());
    assert!(is_pending(&mut release).await);
    let second = served(waiter).await;
    second.release().await.unwrap();
    release.await.unwrap();
    scene.nothing_left().await;
}

/// The connection on which the lock was to be handed over has fallen silent, and the server has given it up: the next in line
/// tries the lock by itself.
#[tokio::test]
async fn a_hand_over_that_is_never_answered_does_not_hold_up_the_next() {
    let scene = Scene::new(1).await;
    let proxy = Proxy::before(scene.database.server());
    let pool = proxy.pool(&scene.database.config(), 2);
    let keeper = Keeper::builder(pool).application("test").build();
    let lock = keeper.advisory_lock(12).wait(GIVE_UP_AFTER).session();
    lock.clone()
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    let first = lock.clone().acquire().await.unwrap();
    let pid = first.backend_pid();
    let mut waiting = Box::pin(lock.acquire());
    assert!(is_pending(&mut waiting).await);
    let waiter = tokio::spawn(async move { waiting.await.unwrap() });
    // The holder's own name, which is put back if the next one does not get the lock.
    proxy.fault(", '')", Fault::Stall);
    drop(first);
    eventually("not handed over", async || proxy.faults_left() == 0).await;
    scene.terminate(pid.unwrap()).await;
    let soon = Duration::from_secs(5);
    let second = tokio::time::timeout(soon, waiter).await;
    drop(second.expect("not served").unwrap());
    scene.until_free(12).await;
}

/// The only place at the server is taken for another key.
#[tokio::test]
async fn a_section_that_ends_wakes_the_next_in_line() {
    let scene = Scene::with(4, |builder| builder.lock_wait(ENDLESS)).await;
    let _busy = scene.holder("elsewhere").await;
    let occupying = occupy(&scene, "elsewhere").await;
    for by_drop in [false, true] {
        let first = scene.keeper.advisory_lock(13).acquire().await.unwrap();
        let clock = StoppedClock::stop();
        let lock = scene.keeper.advisory_lock(13);
        let waiter = tokio::spawn(async move { lock.acquire().await.unwrap() });
        // It has tried the lock, and given its connection back.
        let started = Instant::now();
        while scene
            .count("pg_stat_activity WHERE query = 'ROLLBACK' AND state = 'idle'")
            .await
            == 0
        {
            assert!(
                started.elapsed() < GIVE_UP_AFTER,
                "it does not wait in line"
            );
        }
        if by_drop {
            drop(first);
        } else {
            first.commit().await.unwrap();
        }
        let second = clock.served(waiter).await;
        drop(clock);
        second.commit().await.unwrap();
    }
    occupying.abort();
    drop(occupying.await);
    scene.nothing_but(1).await;
}
