//! How a guard ends, and what the next borrower of its connection finds.

use std::time::{Duration, Instant};

use futures::future::join_all;
use lockkeeper::{AdvisoryMode, Error, ErrorKind, LockKey};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Scene, assert_error, eventually_within, median,
};

use super::{next_borrower, take};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_says_what_it_holds() {
    let scene = Scene::new(1).await;
    let guard = take(&scene.keeper, 700).await;
    assert_eq!(guard.held_keys(), [LockKey::from(700)]);
    assert_eq!(guard.mode(), AdvisoryMode::Exclusive);
    assert_eq!(scene.holders(700).await, [guard.backend_pid().unwrap()]);
    assert!(guard.held_for() < CLEANED_UP_WITHIN);
    assert!(!guard.is_lost());
    let lost = tokio::time::timeout(Duration::from_millis(150), guard.loss()).await;
    assert!(lost.is_err(), "reported as lost");
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holders_name_carries_the_call_site_and_is_restored() {
    let scene = Scene::new(1).await;
    let name = scene.database.name();
    let set = format!("ALTER DATABASE {name} SET application_name = 'the pool''s own'");
    scene.observer.batch_execute(&set).await.unwrap();
    let shown = async |pid: i32| -> String {
        let sql = "SELECT application_name FROM pg_stat_activity WHERE pid = $1";
        scene.observer.query_one(sql, &[&pid]).await.unwrap().get(0)
    };
    assert_eq!(scene.show("application_name").await, "the pool's own");
    let blocker = scene.database.connect().await;
    for waits in [false, true] {
        for end in ["release", "drop", "transaction, then release"] {
            if waits {
                blocker
                    .batch_execute("SELECT pg_advisory_lock(719)")
                    .await
                    .unwrap();
            }
            let (lock, line) = (scene.keeper.advisory_lock(719).session(), line!());
            let (guard, ()) = tokio::join!(lock.wait(ENDLESS).acquire(), async {
                if waits {
                    let mut waiter = None;
                    eventually_within(CLEANED_UP_WITHIN, "it does not wait", async || {
                        waiter = scene.waiters(719).await.first().copied();
                        waiter.is_some()
                    })
                    .await;
                    let expected = format!("test tests/it/session_guard/release.rs:{line}");
                    assert_eq!(shown(waiter.unwrap()).await, expected, "while waiting");
                    blocker
                        .batch_execute("SELECT pg_advisory_unlock(719)")
                        .await
                        .unwrap();
                }
            });
            let mut guard = guard.unwrap();
            let pid = guard.backend_pid().unwrap();
            let expected = format!("test tests/it/session_guard/release.rs:{line}");
            assert_eq!(shown(pid).await, expected);
            match end {
                "release" => guard.release().await.unwrap(),
                "drop" => drop(guard),
                _ => {
                    let transaction = guard.transaction(async |_| Ok::<_, Error>(()));
                    transaction.await.unwrap();
                    assert_eq!(shown(pid).await, expected);
                    guard.release().await.unwrap();
                }
            }
            assert_eq!(
                next_borrower(&scene).await,
                (pid, false, "the pool's own".to_owned())
            );
            assert_eq!(shown(pid).await, "the pool's own");
        }
    }
    // A try that finds it busy, a wait that times out, and one that is given up.
    blocker
        .batch_execute("SELECT pg_advisory_lock(719)")
        .await
        .unwrap();
    let lock = scene.keeper.advisory_lock(719).session();
    assert!(lock.clone().try_acquire().await.unwrap().is_none());
    assert_eq!(scene.show("application_name").await, "the pool's own");
    let waited = lock.clone().wait(Duration::from_millis(20)).acquire().await;
    assert_error(
        &waited.unwrap_err(),
        ErrorKind::LockTimeout,
        "holds ExclusiveLock",
    );
    assert_eq!(scene.show("application_name").await, "the pool's own");
    let given_up = lock.wait(ENDLESS).acquire();
    drop(tokio::time::timeout(Duration::from_millis(20), given_up).await);
    assert_eq!(scene.show("application_name").await, "the pool's own");
    drop(blocker);
    scene.nothing_left().await;
}

/// Dropped, the lock leaves at once, the connection stays, and the server has nothing to complain of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_guard_unlocks_within_fifty_milliseconds_on_the_same_connection() {
    let scene = Scene::new(1).await;
    drop(take(&scene.keeper, 720).await);
    let pid = next_borrower(&scene).await.0;
    let log = scene.database.server().log_len();
    let client = scene.database.connect().await;
    let (mut took, mut plain) = (Vec::new(), Vec::new());
    for n in 0..20 {
        plain.push(scene.time_of_release_by_sql(&client).await);
        let locks = scene.keeper.advisory_locks(720..721 + n % 3).session();
        let guard = locks.acquire().await.unwrap();
        assert_eq!(guard.backend_pid(), Some(pid), "after {n} drops");
        let dropped = Instant::now();
        drop(guard);
        let free = async || scene.advisory_locks().await == 0;
        eventually_within(CLEANED_UP_WITHIN, "not unlocked", free).await;
        took.push(dropped.elapsed());
    }
    let (took, plain) = (median(took), median(plain));
    let most = Duration::from_millis(50) + plain;
    assert!(took < most, "{took:?} and not {plain:?}");
    assert_eq!(next_borrower(&scene).await.0, pid);
    let log = scene.database.server().log_since(log);
    let mine: Vec<_> = log
        .lines()
        .filter(|line| line.contains(&format!("[{pid}]")))
        .collect();
    assert!(mine.is_empty(), "{mine:#?}");
    scene.nothing_left().await;
}

/// Also where the server's answer is there before the drop is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_dropped_guards_keep_their_connection() {
    let scene = Scene::new(1).await;
    let mut pids = std::collections::BTreeSet::new();
    for n in 0..3000 {
        if n % 2 == 0 {
            let guard = take(&scene.keeper, 725).await;
            pids.extend(guard.backend_pid());
            drop(guard);
        } else {
            let guard = scene.keeper.advisory_lock(725).acquire().await.unwrap();
            pids.extend(guard.backend_pid());
            drop(guard);
        }
    }
    assert_eq!(pids.len(), 1, "connections were closed and opened anew");
    scene.nothing_left().await;
}

/// Counts up what two at once would count wrongly, over session guards of both modes and several keepers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_share_and_writers_are_alone() {
    let scene = Scene::new(8).await;
    let state = std::sync::Arc::new(std::sync::Mutex::new((0, 0, 0)));
    let tasks = (0..60).map(|n| {
        let (keeper, state) = (scene.keeper.clone(), state.clone());
        tokio::spawn(async move {
            let lock = keeper.advisory_lock(724).wait(ENDLESS).session();
            let writes = n % 4 == 0;
            let lock = if writes { lock } else { lock.shared() };
            let guard = lock.acquire().await.unwrap();
            {
                let mut state = state.lock().unwrap();
                let (readers, writers, most) = &mut *state;
                *(if writes { &mut *writers } else { &mut *readers }) += 1;
                assert!(
                    *writers == 0 || (*writers == 1 && *readers == 0),
                    "{state:?}"
                );
                *most = (*most).max(*readers);
            }
            // The time itself is what is tested: readers are to meet in it, and no writer.
            tokio::time::sleep(Duration::from_millis(4)).await;
            {
                let mut state = state.lock().unwrap();
                *(if writes { &mut state.1 } else { &mut state.0 }) -= 1;
            }
            drop(guard);
        })
    });
    for task in join_all(tasks.collect::<Vec<_>>()).await {
        task.unwrap();
    }
    let state = *state.lock().unwrap();
    assert!(state.2 > 1, "no two readers were ever there together");
    scene.nothing_left().await;
}
