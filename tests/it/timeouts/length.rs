//! How long a wait is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use lockkeeper::{Error, ErrorKind, Keeper, LockKey, TransactionOptions};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Random, Scene, assert_error, eventually_within, in_time_of,
};

use super::{
    Guard, SCOPES, Scope, Took, assert_on_time, elapsed, ms, take, time, time_beside, timed_out,
    warm,
};

const DAYS: Duration = Duration::from_secs(30 * 24 * 3600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_end_at_the_time_asked_for_and_never_before() {
    let scene = &warm(12).await;
    // The long ones are longer than the server's deadlock_timeout of a second.
    let waits = [0, 400, 1_000, 7_000, 499_000, 501_000, 1_700_000, 2_300_000];
    let scopes = SCOPES.iter().zip(518..).map(|(&scope, key)| async move {
        let (key, free) = (LockKey::from(key), LockKey::from(key + 100));
        let holder = scene.holder(&key).await;
        let pid = holder.pid;
        let call = async |asked| {
            let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
            assert_eq!(error.blockers()[0].pid(), Some(pid), "{scope:?} {asked:?}");
        };
        for asked in waits.map(Duration::from_micros) {
            let what = format!("{scope:?}");
            if asked.is_zero() {
                time_beside(asked, &what, async |asked| {
                    let take = take(&scene.keeper, scope, free.clone(), ENDLESS);
                    let besides = elapsed(async { drop(take.await.unwrap()) }).await;
                    (elapsed(call(asked)).await, besides)
                })
                .await;
            } else {
                time(asked, &what, call).await;
            }
            assert_eq!(
                scene.waiters(key.clone()).await,
                [0; 0],
                "{scope:?} {asked:?}"
            );
            assert_eq!(
                scene.holders(key.clone()).await,
                [pid],
                "{scope:?} {asked:?}"
            );
        }
    });
    join_all(scopes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sections_time_out_by_the_keepers_wait() {
    let asked = ms(130);
    let scene = warm(3).await;
    let waiting = |wait| {
        let builder = Keeper::builder(scene.pool.clone());
        builder.application("test").lock_wait(wait).build()
    };
    let key = LockKey::from(502);
    let holder = scene.holder(&key).await;
    let pid = holder.pid;
    time(asked, "with_advisory_lock", async |asked| {
        let keeper = waiting(asked);
        let section = keeper.with_advisory_lock(key.clone(), async |_| {
            panic!("run without the lock");
            #[allow(unreachable_code, reason = "says the type")]
            Ok::<(), Error>(())
        });
        let error = section.await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "502 after");
        assert_eq!(error.key(), Some(&key));
        assert_eq!(error.blockers()[0].pid(), Some(pid));
    })
    .await;
    time(asked, "transaction", async |asked| {
        let options = TransactionOptions::new().attempts(1);
        let (keeper, key) = (waiting(asked), &key);
        let transaction = keeper.transaction_with(options, async |tx| tx.advisory_lock(key).await);
        let error: Error = transaction.await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "502 after");
        assert_eq!(error.blockers()[0].pid(), Some(pid));
    })
    .await;
    let tried = scene
        .keeper
        .try_with_advisory_lock(key, async |_| Ok::<_, Error>(()));
    assert!(tried.await.unwrap().is_none());
}

/// Several keys, each held by another session, and one of them released while the others are waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_keys_share_one_total_wait() {
    let scene = warm(3).await;
    let keys: Vec<LockKey> = (503..507).map(LockKey::from).collect();
    let asked = ms(1_500);
    for session in [false, true] {
        let wait = async |wait| {
            let locks = scene.keeper.advisory_locks(&keys).wait(wait);
            let started = Instant::now();
            let outcome = if session {
                locks.session().acquire().await.map(Guard::Session)
            } else {
                locks.acquire().await.map(Guard::Xact)
            };
            (outcome, started.elapsed())
        };
        let mut took = Vec::new();
        for _ in 0..12 {
            let mut holders = Vec::new();
            for key in &keys {
                holders.push(scene.holder(key).await);
            }
            let last = holders.last().unwrap().pid;
            let (outcome, besides) = wait(Duration::ZERO).await;
            timed_out(outcome);
            let started = Instant::now();
            let release = async {
                // The first three one after another, so that each next wait begins anew.
                for key in &keys[..3] {
                    scene.until_awaited(key).await;
                    let pid = holders.remove(0).pid;
                    let gone = async || !scene.holders(key.clone()).await.contains(&pid);
                    eventually_within(CLEANED_UP_WITHIN, "a holder is left", gone).await;
                }
                started.elapsed()
            };
            let ((outcome, all), released) = tokio::join!(wait(asked), release);
            let error = timed_out(outcome);
            for key in &keys[..3] {
                assert!(!scene.is_held(key.clone()).await, "{key} is still held");
            }
            drop(holders);
            scene.nothing_left().await;
            if released >= asked {
                // It ended while it waited for one of the first three.
                continue;
            }
            assert_eq!(error.blockers().len(), 1, "{error}");
            assert_eq!(error.blockers()[0].pid(), Some(last));
            took.push(Took { all, besides });
            if took.last().is_some_and(|took| took.is_on_time(asked)) {
                break;
            }
        }
        assert_on_time(asked, &took, &format!("session {session}"));
    }
}

/// Waits so short that the timeout meets the grant, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_waits_from_sixteen_tasks_never_leave_a_lock_behind() {
    // More connections than tasks: a dropped guard's is back a moment later.
    let scene = warm(24).await;
    let key = LockKey::from(508);
    let inside = Arc::new(AtomicUsize::new(0));
    let granted = Arc::new(AtomicUsize::new(0));
    let refused = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let tasks = (0..16).map(|seed| {
        let keeper = scene.keeper.clone();
        let key = key.clone();
        let (inside, granted, refused) = (inside.clone(), granted.clone(), refused.clone());
        tokio::spawn(async move {
            let mut dice = Random::new(seed);
            let scopes = [Scope::Xact, Scope::Session, Scope::Session, Scope::Snapshot];
            loop {
                let enough =
                    granted.load(Ordering::Relaxed) > 100 && refused.load(Ordering::Relaxed) > 100;
                if started.elapsed() > Duration::from_secs(if enough { 10 } else { 120 }) {
                    break;
                }
                let scope = scopes[usize::try_from(dice.below(4)).unwrap()];
                let wait = ms(1) + dice.duration(ms(2));
                match take(&keeper, scope, key.clone(), wait).await {
                    Ok(guard) => {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                        // The time itself is what is tested: another holder would be seen in it.
                        tokio::time::sleep(dice.duration(ms(3))).await;
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(guard);
                        granted.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => {
                        assert_error(&error, ErrorKind::LockTimeout, "508 after");
                        assert!(error.waited().unwrap() >= wait, "{error}");
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let (granted, refused) = (
        granted.load(Ordering::Relaxed),
        refused.load(Ordering::Relaxed),
    );
    assert!(
        granted > 100 && refused > 100,
        "{granted} granted, {refused} refused"
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_without_an_end_are_granted_when_the_holder_goes() {
    let scene = Scene::new(3).await;
    let key = LockKey::from((5, 9));
    for wait in [DAYS, Duration::from_millis(u64::MAX), Duration::MAX] {
        for scope in SCOPES {
            let free = take(&scene.keeper, scope, key.clone(), wait).await.unwrap();
            assert_eq!(scene.holders(key.clone()).await, [free.pid().unwrap()]);
            drop(free);
            scene.until_free(&key).await;
            let holder = scene.holder(&key).await;
            let (keeper, theirs) = (scene.keeper.clone(), key.clone());
            let waiter = tokio::spawn(async move { take(&keeper, scope, theirs, wait).await });
            scene.until_awaited_by(1, &key).await;
            drop(holder);
            let guard = in_time_of(CLEANED_UP_WITHIN, "not granted", waiter)
                .await
                .unwrap()
                .unwrap();
            assert_eq!(scene.holders(key.clone()).await, [guard.pid().unwrap()]);
            drop(guard);
            scene.nothing_left().await;
        }
    }
    let forever = Scene::with(1, |builder| builder.lock_wait(Duration::MAX)).await;
    let section = forever
        .keeper
        .with_advisory_lock(key, async |_| Ok::<_, Error>(7));
    assert_eq!(section.await.unwrap(), 7);
}

/// The server's own limits are shorter than the wait asked for: the wait counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_is_as_long_as_asked_for_whatever_the_sessions_timeouts_are() {
    let scene = &Scene::new(8).await;
    let name = scene.database.name();
    // Long enough for the other statements of a slow machine.
    let set = format!(
        "ALTER DATABASE {name} SET lock_timeout = '300ms'; \
         ALTER DATABASE {name} SET statement_timeout = '900ms'"
    );
    scene.observer.batch_execute(&set).await.unwrap();
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    let asked = ms(2_000);
    let scopes = SCOPES.iter().zip(529..).map(|(&scope, key)| async move {
        let key = LockKey::from(key);
        let holder = scene.holder(&key).await;
        let pid = holder.pid;
        time(asked, &format!("{scope:?}"), async |asked| {
            let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
            assert_eq!(error.blockers()[0].pid(), Some(pid));
        })
        .await;
    });
    join_all(scopes).await;
    assert_eq!(scene.show("lock_timeout").await, "300ms");
    assert_eq!(scene.show("statement_timeout").await, "900ms");
}
