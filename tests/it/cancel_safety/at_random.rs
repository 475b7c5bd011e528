//! Requests that are given up at random moments.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::{Error, Keeper, SessionGuard, XactGuard};
use lockkeeper_testkit::{CLEANED_UP_WITHIN, Random, Scene, Server};
use tokio_postgres::IsolationLevel;

use super::{AFTER, BEFORE, assert_no_trace};

/// Any guard.
enum Held {
    Xact(XactGuard),
    Session(SessionGuard),
}

/// Takes a key in one of several ways, some of which take one more.
async fn take_somehow(keeper: &Keeper, key: i64, way: u64) -> Result<Held, Error> {
    let lock = keeper.advisory_lock(key);
    match way {
        0 | 1 => lock.acquire().await.map(Held::Xact),
        2 | 3 => lock.session().acquire().await.map(Held::Session),
        4 => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await.map(Held::Xact)
        }
        5 => {
            let locks = keeper.advisory_locks([key, AFTER]);
            locks.acquire().await.map(Held::Xact)
        }
        6 => {
            let locks = keeper.advisory_locks([key, AFTER]).session();
            locks.acquire().await.map(Held::Session)
        }
        _ => {
            let mut guard = keeper.advisory_lock(BEFORE).shared().acquire().await?;
            guard.advisory_lock(key).await?;
            Ok(Held::Xact(guard))
        }
    }
}

/// Thousands of requests given up at random moments, of both scopes and many kinds, over few keys and connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_given_up_at_random_leave_nothing() {
    const TASKS: u64 = 16;
    const REQUESTS: usize = 10_000;
    const KEYS: u64 = 4;
    // On a server of its own: where others log in as well, a login outlasts most requests.
    let mut scene = Scene::on(&Server::start(&[]).unwrap(), 8).await;
    scene.keeper = Keeper::new(scene.pool.clone());
    let inside: Arc<Vec<AtomicUsize>> = Arc::new((0..KEYS).map(|_| AtomicUsize::new(0)).collect());
    let (granted, given_up) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let started = Instant::now();
    let tasks = (0..TASKS).map(|seed| {
        let (keeper, inside) = (scene.keeper.clone(), inside.clone());
        let (granted, given_up) = (granted.clone(), given_up.clone());
        tokio::spawn(async move {
            let mut dice = Random::new(seed);
            loop {
                let (granted_yet, given_up_yet) = (
                    granted.load(Ordering::Relaxed),
                    given_up.load(Ordering::Relaxed),
                );
                let enough = granted_yet > 100 && given_up_yet > 1000;
                let all = enough && granted_yet + given_up_yet >= REQUESTS;
                // However slow the machine is, there are enough of both kinds.
                let most = Duration::from_secs(if enough { 20 } else { 120 });
                if all || started.elapsed() > most {
                    break;
                }
                let key = dice.below(KEYS);
                let inside = &inside[usize::try_from(key).unwrap()];
                // Short ones do not outlast a login; with nothing else the pool would never have a connection.
                let most = match dice.below(100) {
                    0 => 5_000,
                    n => [2, 10, 50, 200][usize::try_from(n % 4).unwrap()],
                };
                let patience = dice.duration(Duration::from_millis(most));
                let hold = dice.duration(Duration::from_millis(2));
                let end = dice.below(3);
                let way = dice.below(8);
                let take = take_somehow(&keeper, i64::try_from(key).unwrap(), way);
                let Ok(held) = tokio::time::timeout(patience, take).await else {
                    given_up.fetch_add(1, Ordering::Relaxed);
                    continue;
                };
                let held = held.unwrap();
                assert_eq!(
                    inside.fetch_add(1, Ordering::SeqCst),
                    0,
                    "two holders of one lock"
                );
                // The time itself is what is tested: another holder would be seen in it.
                tokio::time::sleep(hold).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                match held {
                    Held::Xact(guard) if end == 0 => guard.commit().await.unwrap(),
                    Held::Session(guard) if end == 0 => guard.release().await.unwrap(),
                    Held::Xact(guard) if end == 1 => {
                        drop(tokio::time::timeout(hold, guard.commit()).await);
                    }
                    Held::Session(guard) if end == 1 => {
                        drop(tokio::time::timeout(hold, guard.release()).await);
                    }
                    held => drop(held),
                }
                granted.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let (granted, given_up) = (
        granted.load(Ordering::Relaxed),
        given_up.load(Ordering::Relaxed),
    );
    let what = format!("{granted} granted, {given_up} given up");
    assert!(
        granted > 100 && given_up > 1000,
        "{what}: too few to show anything"
    );
    assert_no_trace(&scene, None, CLEANED_UP_WITHIN, &what).await;
    // Nor is anything still under way that would show later.
    for look in 1..=20 {
        let what = format!("{what}, look {look}");
        assert_no_trace(&scene, None, CLEANED_UP_WITHIN, &what).await;
    }
}
