//! Bounded waits: they end when they should, say who was in the way, and leave nothing held.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use futures::future::join_all;
use lockkeeper::{
    AdvisoryMode, Error, ErrorKind, Keeper, LockKey, SessionGuard, TransactionOptions, XactGuard,
};
use lockkeeper_testkit::{CLEANED_UP_WITHIN, ENDLESS, Proxy, Random, Scene, eventually_within};
use tokio_postgres::IsolationLevel;

const DAYS: Duration = Duration::from_secs(30 * 24 * 3600);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Either guard.
#[allow(dead_code, reason = "held, and dropped")]
enum Guard {
    Xact(XactGuard),
    Session(SessionGuard),
}

impl Guard {
    fn pid(&self) -> Option<i32> {
        match self {
            Self::Xact(guard) => guard.backend_pid(),
            Self::Session(guard) => guard.backend_pid(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Xact,
    Session,
    /// A transaction lock before a REPEATABLE READ snapshot: waited for as a session lock.
    Snapshot,
    /// In a transaction that has begun.
    Later,
}

const SCOPES: [Scope; 4] = [Scope::Xact, Scope::Session, Scope::Snapshot, Scope::Later];

/// Takes a key in one of the ways there are.
async fn take(keeper: &Keeper, scope: Scope, key: LockKey, wait: Duration) -> Result<Guard, Error> {
    let lock = keeper.advisory_lock(key.clone()).wait(wait);
    match scope {
        Scope::Xact => lock.acquire().await.map(Guard::Xact),
        Scope::Session => lock.session().acquire().await.map(Guard::Session),
        Scope::Snapshot => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await.map(Guard::Xact)
        }
        Scope::Later => {
            let own = keeper.advisory_lock(("timeouts", "own")).shared();
            let mut guard = own.acquire().await?;
            guard.advisory_lock(key).wait(wait).await?;
            Ok(Guard::Xact(guard))
        }
    }
}

#[track_caller]
fn timed_out(outcome: Result<Guard, Error>) -> Error {
    let Err(error) = outcome else {
        panic!("granted what somebody else holds");
    };
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
    error
}

/// A wait that has ended.
struct Took {
    all: Duration,
    /// What the call takes besides the wait, on this machine at this moment.
    besides: Duration,
}

impl Took {
    fn is_on_time(&self, asked: Duration) -> bool {
        self.all <= asked + ms(50) + 2 * self.besides
    }
}

/// Waits that were to take `asked`: none is early, the best is on time, none is late beyond what a slow machine does.
#[track_caller]
fn assert_on_time(asked: Duration, took: &[Took], what: &str) {
    for Took { all, .. } in took {
        assert!(
            *all >= asked,
            "{what}: ended after {all:?}, before its {asked:?}"
        );
        assert!(
            *all < asked + CLEANED_UP_WITHIN,
            "{what}: ended after {all:?} instead of {asked:?}"
        );
    }
    assert!(
        took.iter().any(|took| took.is_on_time(asked)),
        "{what}: at best it ended after {:?} instead of {asked:?}",
        took.iter().map(|took| took.all).min()
    );
}

/// Runs `call` a few times, as long as none was on time; each time without a wait first.
async fn time(asked: Duration, what: &str, mut call: impl AsyncFnMut(Duration)) {
    let mut took = Vec::new();
    for _ in 0..12 {
        let mut besides = Duration::ZERO;
        if !asked.is_zero() {
            let started = Instant::now();
            call(Duration::ZERO).await;
            besides = started.elapsed();
        }
        let started = Instant::now();
        call(asked).await;
        let all = started.elapsed();
        took.push(Took { all, besides });
        if took.last().is_some_and(|took| took.is_on_time(asked)) {
            break;
        }
    }
    assert_on_time(asked, &took, what);
}

/// A scene with all of its connections open: a login may take longer than a short wait has for it.
async fn warm(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    scene
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_names_the_key_the_wait_and_the_holder() {
    let scene = warm(4).await;
    let key = LockKey::from(("timeouts", "invoice:42"));
    let asked = ms(120);
    for (held, state) in [
        (Scope::Xact, "idle in transaction"),
        (Scope::Session, "idle"),
        (Scope::Snapshot, "idle in transaction"),
        (Scope::Later, "idle in transaction"),
    ] {
        let guard = take(&scene.keeper, held, key.clone(), ENDLESS)
            .await
            .unwrap();
        let pid = guard.pid().unwrap();
        assert_eq!(scene.holders(key.clone()).await, [pid]);
        for scope in SCOPES {
            let what = format!("{scope:?} against {held:?}");
            time(asked, &what, async |asked| {
                let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
                assert_eq!(error.key(), Some(&key));
                let waited = error.waited().unwrap();
                assert!(waited >= asked, "{what}: {waited:?}");
                let [blocker] = error.blockers() else {
                    panic!("{what}: {:?}", error.blockers());
                };
                assert_eq!(blocker.pid(), Some(pid), "{what}");
                assert!(blocker.is_holder(), "{what}");
                assert_eq!(blocker.mode(), AdvisoryMode::Exclusive, "{what}");
                assert_eq!(blocker.state(), Some(state), "{what}");
                assert!(blocker.in_state().is_some(), "{what}");
                assert!(blocker.user().is_some(), "{what}");
                assert_eq!(blocker.prepared_transaction(), None, "{what}");
                let name = blocker.application_name().unwrap();
                assert!(name.starts_with("test "), "{what}: {name}");
                assert!(name.contains("tests/it/timeouts.rs:"), "{what}: {name}");
                let text = error.to_string();
                for part in [
                    "invoice:42",
                    "tests/it/timeouts.rs:",
                    &pid.to_string(),
                    state,
                ] {
                    assert!(text.contains(part), "{what}: {part} is not in {text}");
                }
                assert!(!text.contains('\n'), "{text}");
                assert!(error.is_retryable());
            })
            .await;
        }
        drop(guard);
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_holders_call_site_is_the_line_that_asked_for_the_lock() {
    let scene = warm(3).await;
    let (lock, line) = (scene.keeper.advisory_lock("timeouts: line"), line!());
    let guard = lock.acquire().await.unwrap();
    let error = scene
        .keeper
        .advisory_lock("timeouts: line")
        .wait(ms(5))
        .acquire()
        .await
        .unwrap_err();
    let name = error.blockers()[0].application_name().unwrap();
    assert_eq!(name, format!("test tests/it/timeouts.rs:{line}"));
    drop(guard);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_end_at_the_time_asked_for_and_never_before() {
    let scene = &warm(12).await;
    // The long ones are longer than a slice, and than the server's deadlock_timeout of a second.
    let waits = [0, 400, 1_000, 7_000, 499_000, 501_000, 1_700_000, 2_300_000];
    let scopes = SCOPES.iter().zip(518..).map(|(&scope, key)| async move {
        let key = LockKey::from(key);
        let holder = scene.holder(&key).await;
        let pid = holder.pid;
        for asked in waits.map(Duration::from_micros) {
            time(asked, &format!("{scope:?}"), async |asked| {
                let error = timed_out(take(&scene.keeper, scope, key.clone(), asked).await);
                assert_eq!(error.blockers()[0].pid(), Some(pid), "{scope:?} {asked:?}");
            })
            .await;
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
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
        assert_eq!(error.key(), Some(&key));
        assert_eq!(error.blockers()[0].pid(), Some(pid));
    })
    .await;
    time(asked, "transaction", async |asked| {
        let options = TransactionOptions::new().attempts(1);
        let (keeper, key) = (waiting(asked), &key);
        let transaction = keeper.transaction_with(options, async |tx| tx.advisory_lock(key).await);
        let error: Error = transaction.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
        assert_eq!(error.blockers()[0].pid(), Some(pid));
    })
    .await;
    let tried = scene
        .keeper
        .try_with_advisory_lock(key, async |_| Ok::<_, Error>(()));
    assert!(tried.await.unwrap().is_none());
}

/// Several keys, each held by somebody else, and one of them released while the others are waited for.
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
                    tokio::time::sleep(ms(250)).await;
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
                        tokio::time::sleep(dice.duration(ms(3))).await;
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(guard);
                        granted.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
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
            let gone = async || !scene.is_held(key.clone()).await;
            eventually_within(CLEANED_UP_WITHIN, "not released", gone).await;
            let holder = scene.holder(&key).await;
            let (keeper, theirs) = (scene.keeper.clone(), key.clone());
            let waiter = tokio::spawn(async move { take(&keeper, scope, theirs, wait).await });
            let waits = async || scene.waiters(key.clone()).await.len() == 1;
            eventually_within(CLEANED_UP_WITHIN, "nobody waits", waits).await;
            drop(holder);
            let guard = tokio::time::timeout(CLEANED_UP_WITHIN, waiter).await;
            let guard = guard.expect("not granted").unwrap().unwrap();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exhausted_pool_is_said_in_time() {
    let scene = Scene::new(2).await;
    let taken = [
        scene.pool.get().await.unwrap(),
        scene.pool.get().await.unwrap(),
    ];
    for asked in [ms(0), ms(150), ms(800)] {
        for scope in [Scope::Xact, Scope::Session, Scope::Snapshot] {
            time(asked, &format!("{scope:?} {asked:?}"), async |asked| {
                let Err(error) = take(&scene.keeper, scope, LockKey::from(510), asked).await else {
                    panic!("no connection could be had");
                };
                assert_eq!(error.kind(), ErrorKind::Pool, "{error:?}");
                assert_eq!(error.key(), Some(&LockKey::from(510)), "{error}");
            })
            .await;
        }
    }
    drop(taken);
    scene.nothing_left().await;
}

/// A transaction waits for a connection as long as the keeper waits for locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_on_an_exhausted_pool_says_so_in_time() {
    let asked = ms(150);
    let scene = Scene::new(1).await;
    let waiting = |wait| {
        let builder = Keeper::builder(scene.pool.clone());
        builder.application("test").lock_wait(wait).build()
    };
    let taken = scene.pool.get().await.unwrap();
    time(asked, "transaction", async |asked| {
        let keeper = waiting(asked);
        let transaction = keeper.transaction(async |_| Ok::<_, Error>(()));
        let error = transaction.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Pool, "{error:?}");
    })
    .await;
    time(asked, "try_acquire", async |asked| {
        let tried = waiting(asked).advisory_lock(511).try_acquire().await;
        assert_eq!(tried.unwrap_err().kind(), ErrorKind::Pool);
    })
    .await;
    drop(taken);
}

/// Two waiters of a keeper wait at the server, the others in line in the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_in_the_line_of_the_process_times_out_in_time_too() {
    let scene = warm(5).await;
    let key = LockKey::from(512);
    let holder = scene.holder(&key).await;
    let pid = holder.pid;
    let crowd: Vec<_> = (0..4)
        .map(|_| {
            let lock = scene.keeper.advisory_lock(512).wait(ENDLESS);
            tokio::spawn(async move { drop(lock.acquire().await.unwrap()) })
        })
        .collect();
    let two_wait = async || scene.waiters(key.clone()).await.len() == 2;
    eventually_within(CLEANED_UP_WITHIN, "the crowd does not wait", two_wait).await;
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
                assert!(name.contains("tests/it/timeouts.rs:"), "{name}");
            }
        })
        .await;
    }
    // With no connection left to look with it is in time all the same.
    let rest = join_all((0..3).map(|_| scene.pool.get())).await;
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
        let waiter = tokio::time::timeout(CLEANED_UP_WITHIN, waiter).await;
        waiter.expect("a waiter is stuck").unwrap();
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_in_the_line_of_the_process_are_served_in_their_order() {
    let scene = Arc::new(warm(4).await);
    let key = LockKey::from(513);
    let holder = scene.holder(&key).await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut crowd = Vec::new();
    for n in 0..12 {
        let lock = scene.keeper.advisory_lock(&key).wait(ENDLESS);
        let (order, seen, theirs) = (order.clone(), scene.clone(), key.clone());
        crowd.push(tokio::spawn(async move {
            let guard = lock.acquire().await.unwrap();
            let left = {
                let mut order = order.lock().unwrap();
                order.push(n);
                12 - order.len()
            };
            // Until the next ones have joined the server's queue.
            let granted = Instant::now();
            while seen.waiters(theirs.clone()).await.len() != left.min(2) {
                assert!(
                    granted.elapsed() < CLEANED_UP_WITHIN,
                    "the next ones do not wait"
                );
                tokio::time::sleep(ms(5)).await;
            }
            guard.commit().await.unwrap();
        }));
        let expected = (n + 1).min(2);
        let stand = async || scene.waiters(key.clone()).await.len() == expected;
        eventually_within(CLEANED_UP_WITHIN, "it does not wait", stand).await;
        // Those in the line of the process cannot be seen from outside.
        tokio::time::sleep(ms(40)).await;
    }
    drop(holder);
    for waiter in crowd {
        waiter.await.unwrap();
    }
    let order = order.lock().unwrap().clone();
    assert_eq!(order.len(), 12);
    // Two at a time stand at the server, where they may change places between two slices.
    for (place, n) in order.iter().enumerate() {
        assert!(place.abs_diff(*n) <= 2, "{order:?}");
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_in_the_way_is_named_without_a_pid() {
    let scene = warm(2).await;
    let key = LockKey::from(514);
    let client = scene.database.connect().await;
    let gid = format!("timeouts-{}", scene.database.name());
    client
        .batch_execute(&format!(
            "BEGIN; SELECT pg_advisory_xact_lock(514); PREPARE TRANSACTION '{gid}'"
        ))
        .await
        .unwrap();
    drop(client);
    for scope in SCOPES {
        let error = timed_out(take(&scene.keeper, scope, key.clone(), ms(20)).await);
        let [blocker] = error.blockers() else {
            panic!("{:?}", error.blockers());
        };
        assert_eq!(blocker.pid(), None);
        assert_eq!(blocker.prepared_transaction(), Some(gid.as_str()));
        assert_eq!((blocker.state(), blocker.application_name()), (None, None));
        assert!(blocker.is_holder());
        assert!(error.to_string().contains(&gid), "{error}");
    }
    let end = format!("ROLLBACK PREPARED '{gid}'");
    scene.observer.batch_execute(&end).await.unwrap();
    scene.nothing_left().await;
}

/// The waiter's own backend is stopped by somebody: the wait is over, and the next one's goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_whose_backend_is_stopped_says_so() {
    let scene = Scene::new(3).await;
    let key = LockKey::from(523);
    for (signal, kind) in [
        ("pg_cancel_backend", ErrorKind::Cancelled),
        ("pg_terminate_backend", ErrorKind::ConnectionLost),
    ] {
        for scope in SCOPES {
            let what = format!("{scope:?}, {signal}");
            let holder = scene.holder(&key).await;
            let (keeper, theirs) = (scene.keeper.clone(), key.clone());
            let waiter =
                tokio::spawn(async move { take(&keeper, scope, theirs, ENDLESS).await.map(drop) });
            // Between two slices there is nothing to cancel: once more.
            let stopped = async || {
                let sql = format!(
                    "SELECT {signal}(l.pid) FROM pg_locks l WHERE locktype = 'advisory' AND NOT granted \
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                );
                scene.observer.query(&sql, &[]).await.unwrap();
                waiter.is_finished()
            };
            eventually_within(CLEANED_UP_WITHIN, &format!("{what}: it waits on"), stopped).await;
            let error = waiter.await.unwrap().unwrap_err();
            assert_eq!(error.kind(), kind, "{what}: {error:?}");
            assert!(error.source().is_some(), "{what}: {error:?}");
            drop(holder);
            let next = take(&scene.keeper, scope, key.clone(), ENDLESS)
                .await
                .unwrap();
            drop(next);
            scene.nothing_left().await;
        }
    }
}

/// Deadlocks are found, though waits of other kinds are too short for the server to look for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_transactions_that_wait_for_each_other_are_told_of_the_deadlock() {
    let apart = [0, 300, 700, 1_200].into_iter().map(|apart| async move {
        let scene = Scene::new(2).await;
        let mut first = scene.keeper.advisory_lock(524).acquire().await.unwrap();
        let mut second = scene.keeper.advisory_lock(525).acquire().await.unwrap();
        assert_ne!(first.backend_pid(), second.backend_pid());
        let first = async move {
            let outcome = first.advisory_lock(525).wait(ENDLESS).await;
            first.rollback().await;
            outcome
        };
        let second = async move {
            tokio::time::sleep(ms(apart)).await;
            let outcome = second.advisory_lock(524).wait(ENDLESS).await;
            second.rollback().await;
            outcome
        };
        let both = async { tokio::join!(first, second) };
        let both = tokio::time::timeout(Duration::from_secs(8), both).await;
        let both = both.unwrap_or_else(|_| panic!("{apart} ms apart: not found"));
        let ((Err(error), Ok(())) | (Ok(()), Err(error))) = both else {
            panic!("{apart} ms apart: {both:?}");
        };
        assert_eq!(error.kind(), ErrorKind::Deadlock, "{error:?}");
        scene.nothing_left().await;
    });
    join_all(apart).await;
}

/// An answer that is late is an answer, as long as the wait is not over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_survives_a_network_slower_than_its_slices() {
    let scopes = SCOPES.into_iter().map(|scope| async move {
        let mut scene = Scene::new(1).await;
        let proxy = Proxy::before(scene.database.server());
        proxy.delay(ms(300));
        scene.pool = proxy.pool(&scene.database.config(), 1);
        let keeper = Keeper::new(scene.pool.clone());
        scene.pool_is_whole_within(2 * CLEANED_UP_WITHIN).await;
        let key = LockKey::from(526);
        let holder = scene.holder(&key).await;
        let theirs = key.clone();
        let waiter = tokio::spawn(async move { take(&keeper, scope, theirs, ENDLESS).await });
        let waits = async || !scene.waiters(key.clone()).await.is_empty();
        eventually_within(2 * CLEANED_UP_WITHIN, "it does not wait", waits).await;
        // Until an answer to one slice has come, and another one is under way.
        tokio::time::sleep(ms(1_800)).await;
        drop(holder);
        let guard = tokio::time::timeout(2 * CLEANED_UP_WITHIN, waiter).await;
        let guard = guard.expect("not granted").unwrap();
        let guard = guard.unwrap_or_else(|error| panic!("{scope:?}: {error:?}"));
        assert_eq!(scene.holders(key.clone()).await, [guard.pid().unwrap()]);
        drop(guard);
        scene.nothing_left_within(2 * CLEANED_UP_WITHIN).await;
    });
    join_all(scopes).await;
}

/// "Zero tries once", also where the connection to try on has to be opened first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_wait_on_an_empty_pool_tries_once_all_the_same() {
    let mut scene = Scene::new(1).await;
    let proxy = Proxy::before(scene.database.server());
    proxy.delay(ms(40));
    for wait in [ms(0), ms(5), ms(60)] {
        for scope in [Scope::Xact, Scope::Session, Scope::Snapshot] {
            let mut tries = 0;
            let guard = loop {
                tries += 1;
                // Each has a login of 80 ms at least before it.
                scene.pool = proxy.pool(&scene.database.config(), 1);
                let keeper = Keeper::new(scene.pool.clone());
                let started = Instant::now();
                match take(&keeper, scope, LockKey::from(528), wait).await {
                    Ok(guard) => break guard,
                    // A login that takes half a second is not waited for.
                    Err(error) => assert!(
                        error.kind() == ErrorKind::Pool
                            && started.elapsed() >= ms(500)
                            && tries < 20,
                        "{scope:?}, {wait:?}: {error:?}"
                    ),
                }
            };
            assert_eq!(scene.holders(528).await, [guard.pid().unwrap()]);
            drop(guard);
            scene.nothing_left().await;
        }
    }
}

/// The network goes silent: a bounded wait ends all the same, and when the network is back nothing is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_though_the_network_is_silent() {
    let scopes = [Scope::Xact, Scope::Session, Scope::Snapshot];
    let cases = scopes.map(|scope| [(scope, false), (scope, true)]).concat();
    join_all(
        cases
            .into_iter()
            .map(|(scope, busy)| wait_in_silence(scope, busy)),
    )
    .await;
}

async fn wait_in_silence(scope: Scope, busy: bool) {
    let what = format!("{scope:?}, busy {busy}");
    let mut scene = Scene::new(4).await;
    let proxy = Proxy::before(scene.database.server());
    scene.pool = proxy.pool(&scene.database.config(), 4);
    let keeper = Keeper::new(scene.pool.clone());
    let key = LockKey::from(527);
    scene.pool_is_whole().await;
    let client = if busy {
        Some(scene.holder(&key).await)
    } else {
        None
    };
    let (theirs, asked) = (key.clone(), ms(700));
    let waiter = tokio::spawn(async move { take(&keeper, scope, theirs, asked).await });
    if busy {
        let waits = async || !scene.waiters(key.clone()).await.is_empty();
        eventually_within(CLEANED_UP_WITHIN, "it does not wait", waits).await;
    }
    proxy.stall(true);
    let outcome = tokio::time::timeout(asked + CLEANED_UP_WITHIN, waiter).await;
    let outcome = outcome
        .unwrap_or_else(|_| panic!("{what}: it hangs"))
        .unwrap();
    match outcome {
        Err(error) => {
            let kinds = [
                ErrorKind::ConnectionLost,
                ErrorKind::LockTimeout,
                ErrorKind::Pool,
            ];
            assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
            assert_eq!(error.key(), Some(&key), "{what}: {error:?}");
        }
        // It was faster than the pause.
        Ok(guard) => {
            assert!(!busy, "{what}");
            drop(guard);
        }
    }
    proxy.stall(false);
    drop(client);
    scene.nothing_left().await;
}

/// What a role may not see is unknown, not something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_privileges_is_told_what_it_may_see_and_nothing_wrong() {
    let scene = Scene::new(2).await;
    let key = LockKey::from(515);
    let role = format!("nobody_{}", scene.database.name());
    let create = format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'");
    scene.observer.batch_execute(&create).await.unwrap();
    let mut config = scene.database.config();
    config.user(&role).password("secret");
    let manager = deadpool_postgres::Manager::new(config, tokio_postgres::NoTls);
    let pool = deadpool_postgres::Pool::builder(manager)
        .max_size(2)
        .build()
        .unwrap();
    let keeper = Keeper::new(pool.clone());
    // A login may take longer than a short wait has for it.
    drop((pool.get().await.unwrap(), pool.get().await.unwrap()));

    let guard = scene.keeper.advisory_lock(&key).acquire().await.unwrap();
    let pid = guard.backend_pid();
    for scope in SCOPES {
        let error = timed_out(take(&keeper, scope, key.clone(), ms(20)).await);
        let [blocker] = error.blockers() else {
            panic!("{:?}", error.blockers());
        };
        assert_eq!(blocker.pid(), pid);
        let name = blocker.application_name().unwrap();
        assert!(name.contains("tests/it/timeouts.rs:"), "{name}");
        assert_eq!(blocker.state(), None);
        assert_eq!(blocker.in_state(), None);
        assert_eq!(blocker.in_transaction(), None);
        if let Some(user) = blocker.user() {
            let own = scene.database.config();
            assert_eq!(Some(user), own.get_user());
        }
        let text = error.to_string();
        assert!(
            text.contains("state hidden") && !text.contains("idle"),
            "{text}"
        );
    }
    // Its own backends it sees whole.
    let own = keeper.advisory_lock(516).acquire().await.unwrap();
    let error = timed_out(take(&keeper, Scope::Xact, LockKey::from(516), ms(20)).await);
    assert_eq!(error.blockers()[0].state(), Some("idle in transaction"));
    drop((own, guard));
    scene.nothing_left().await;
    pool.close();
    let gone = format!("DROP ROLE {role}");
    let dropped = async || scene.observer.batch_execute(&gone).await.is_ok();
    eventually_within(CLEANED_UP_WITHIN, "the role cannot be dropped", dropped).await;
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

/// What somebody else's work on a pool takes.
async fn other_work(pool: &Pool) -> Duration {
    let asked = Instant::now();
    let object = pool.get().await.unwrap();
    object.batch_execute("SELECT 1").await.unwrap();
    drop(object);
    asked.elapsed()
}

/// One hundred tasks under one key on a pool of eight, and somebody else's work on the same pool meanwhile.
async fn a_hundred_tasks(scope: Scope) {
    let scene = warm(8).await;
    let key = LockKey::from(518);
    // What the same work takes while nobody is under the key.
    let mut calm = Vec::new();
    for _ in 0..20 {
        calm.push(other_work(&scene.pool).await);
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
