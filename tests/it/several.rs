//! Several keys at once: sorted, without repeats, all or none, under one total wait.

use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, Keeper, LockKey, SessionGuard, XactGuard};
use lockkeeper_testkit::{Scene, Server, eventually, lock_by_sql, pid_of, unlock_by_sql};
use tokio_postgres::{Client, IsolationLevel};

/// A set of locks held in either scope.
#[derive(Debug)]
enum Guard {
    Xact(XactGuard),
    Session(SessionGuard),
}

impl Guard {
    fn keys(&self) -> Vec<LockKey> {
        match self {
            Self::Xact(guard) => guard.held_keys().cloned().collect(),
            Self::Session(guard) => guard.held_keys().to_vec(),
        }
    }

    fn pid(&self) -> i32 {
        match self {
            Self::Xact(guard) => guard.backend_pid(),
            Self::Session(guard) => guard.backend_pid(),
        }
        .unwrap()
    }

    async fn end(self) {
        match self {
            Self::Xact(guard) => guard.commit().await.unwrap(),
            Self::Session(guard) => guard.release().await.unwrap(),
        }
    }
}

/// How a set is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Xact,
    Snapshot,
    Session,
}

const SCOPES: [Scope; 3] = [Scope::Xact, Scope::Snapshot, Scope::Session];

async fn acquire(
    keeper: &Keeper,
    keys: impl IntoIterator<Item = impl Into<LockKey>>,
    scope: Scope,
    wait: Duration,
) -> Result<Guard, Error> {
    let lock = keeper.advisory_locks(keys).wait(wait);
    match scope {
        Scope::Xact => lock.acquire().await.map(Guard::Xact),
        Scope::Snapshot => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await.map(Guard::Xact)
        }
        Scope::Session => lock.session().acquire().await.map(Guard::Session),
    }
}

async fn try_acquire(
    keeper: &Keeper,
    keys: impl IntoIterator<Item = impl Into<LockKey>>,
    scope: Scope,
) -> Result<Option<Guard>, Error> {
    let lock = keeper.advisory_locks(keys);
    Ok(match scope {
        Scope::Xact => lock.try_acquire().await?.map(Guard::Xact),
        Scope::Snapshot => {
            let lock = lock.isolation(IsolationLevel::Serializable);
            lock.try_acquire().await?.map(Guard::Xact)
        }
        Scope::Session => lock.session().try_acquire().await?.map(Guard::Session),
    })
}

const LONG: Duration = Duration::from_secs(20);

/// Numbers of both key spaces.
fn many_keys(count: i32) -> Vec<LockKey> {
    (0..count)
        .map(|n| match n % 3 {
            0 => LockKey::from(i64::from(n) * 4_294_967_311 - 7),
            1 => LockKey::from((n, -n)),
            _ => LockKey::from(format!("several {n}")),
        })
        .collect()
}

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
        let guard = acquire(&scene.keeper, &given, scope, LONG).await.unwrap();
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
        let error = acquire(&scene.keeper, none(), scope, LONG)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let error = try_acquire(&scene.keeper, none(), scope).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
    }
    drop(taken);
    let section = scene.keeper.transaction(async |tx| {
        let error = tx.advisory_locks(none()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let error = tx.advisory_locks(none()).try_acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
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
                assert_eq!(error.kind(), ErrorKind::LockTimeout);
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

/// The same inside a transaction that goes on afterwards, and so would keep what it got.
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
            assert_eq!(error.kind(), ErrorKind::LockTimeout);
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

/// The wait is for all of the keys together, however the holders make room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wait_covers_all_of_the_keys() {
    const WAIT: Duration = Duration::from_secs(3);
    /// One for the key that is let go after 2.5 s, and another for the one that is not.
    const TWO_WAITS: Duration = Duration::from_millis(5500);
    let scene = Scene::new(2).await;
    let (second, third) = (
        scene.database.connect().await,
        scene.database.connect().await,
    );
    lock_by_sql(&third, 3).await;
    for scope in SCOPES {
        lock_by_sql(&second, 2).await;
        let began = Instant::now();
        let release = async {
            eventually("no waiter", async || !scene.waiters(2).await.is_empty()).await;
            tokio::time::sleep(Duration::from_millis(2500)).await;
            unlock_by_sql(&second, 2).await;
        };
        let (result, ()) = tokio::join!(acquire(&scene.keeper, [1, 2, 3], scope, WAIT), release);
        let took = began.elapsed();
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{scope:?}: {error:?}");
        assert!(took >= WAIT, "{scope:?}: {took:?} is too early");
        assert!(
            took < TWO_WAITS,
            "{scope:?}: {took:?} is more than one wait"
        );
        scene.nothing_but(1).await;
    }
    let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
    lock_by_sql(&second, 2).await;
    let began = Instant::now();
    let release = async {
        eventually("no waiter", async || !scene.waiters(2).await.is_empty()).await;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        unlock_by_sql(&second, 2).await;
    };
    let waiting = async { guard.advisory_locks([1, 2, 3]).wait(WAIT).await };
    let (result, ()) = tokio::join!(waiting, release);
    let took = began.elapsed();
    assert_eq!(result.unwrap_err().kind(), ErrorKind::LockTimeout);
    assert!(took >= WAIT && took < TWO_WAITS, "{took:?}");
    drop((guard, second, third));
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_become_free_one_after_another_are_all_granted() {
    let scene = Scene::new(2).await;
    let holders = [
        scene.database.connect().await,
        scene.database.connect().await,
    ];
    for scope in SCOPES {
        lock_by_sql(&holders[0], 2).await;
        lock_by_sql(&holders[1], 3).await;
        let release = async {
            for (holder, key) in holders.iter().zip([2, 3]) {
                eventually("no waiter", async || !scene.waiters(key).await.is_empty()).await;
                assert_eq!(scene.holders(key).await, [pid_of(holder).await]);
                unlock_by_sql(holder, key).await;
            }
        };
        let (guard, ()) = tokio::join!(acquire(&scene.keeper, [3, 2, 1], scope, LONG), release);
        let guard = guard.unwrap();
        for key in [1, 2, 3] {
            assert_eq!(scene.holders(key).await, [guard.pid()], "{scope:?}");
        }
        guard.end().await;
        scene.nothing_left().await;
    }
}

/// Sets that wait for one of their keys do not keep others from another one, which nobody holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_free_key_is_granted_while_sets_with_it_wait_for_another() {
    let scene = Scene::new(6).await;
    lock_by_sql(&scene.observer, 1).await;
    let mut sets = Vec::new();
    for scope in [Scope::Xact, Scope::Session, Scope::Xact] {
        let keeper = scene.keeper.clone();
        sets.push(tokio::spawn(async move {
            acquire(&keeper, [1, 2], scope, LONG)
                .await
                .unwrap()
                .end()
                .await;
        }));
    }
    eventually("no waiters", async || scene.waiters(1).await.len() >= 2).await;
    for scope in SCOPES {
        assert!(!scene.is_held(2).await);
        let began = Instant::now();
        let guard = acquire(&scene.keeper, [2], scope, Duration::from_secs(20))
            .await
            .unwrap();
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(4),
            "{scope:?}: {took:?} for a free key"
        );
        guard.end().await;
    }
    // And one that is busy for a moment is waited for where its holder releases it.
    let holder = scene.database.connect().await;
    for scope in SCOPES {
        lock_by_sql(&holder, 2).await;
        let release = async {
            eventually("nobody waits at the server", async || {
                !scene.waiters(2).await.is_empty()
            })
            .await;
            unlock_by_sql(&holder, 2).await;
        };
        let (guard, ()) = tokio::join!(acquire(&scene.keeper, [2], scope, LONG), release);
        guard.unwrap().end().await;
    }
    unlock_by_sql(&scene.observer, 1).await;
    for set in sets {
        set.await.unwrap();
    }
    scene.nothing_left().await;
}

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
    // A circle of waiters would end only with the slices of their waits, half a second each.
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_thousand_keys_of_both_spaces_are_one_set() {
    let scene = Scene::new(2).await;
    let keys = many_keys(3000);
    let holder = scene.database.connect().await;
    for scope in SCOPES {
        let guard = acquire(&scene.keeper, &keys, scope, LONG).await;
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
        // Fewer in vain: who is in the way of how many is asked after the end, which has to be told in two seconds.
        let some = &keys[..1000];
        let error = acquire(&scene.keeper, some, scope, Duration::from_millis(600))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{scope:?}: {error:?}");
        assert_eq!(error.blockers().len(), 1, "{error}");
        scene.nothing_but(1).await;
        let release = async {
            eventually("no waiter", async || {
                !scene.waiters(&keys[1]).await.is_empty()
            })
            .await;
            unlock_by_sql(&holder, &keys[1]).await;
        };
        let (guard, ()) = tokio::join!(acquire(&scene.keeper, &keys, scope, LONG), release);
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

/// A large set needs to know the room in the lock table, and a connection to ask on. It waits for that one too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_set_waits_for_a_connection_as_long_as_a_small_one() {
    let scene = Scene::new(1).await;
    for keys in [many_keys(2), many_keys(200)] {
        for scope in SCOPES {
            let taken = scene.pool.get().await.unwrap();
            let later = async {
                tokio::time::sleep(Duration::from_millis(1500)).await;
                drop(taken);
            };
            let (guard, ()) = tokio::join!(acquire(&scene.keeper, &keys, scope, LONG), later);
            let guard =
                guard.unwrap_or_else(|error| panic!("{} keys, {scope:?}: {error}", keys.len()));
            guard.end().await;
        }
    }
    scene.nothing_left().await;
}

/// The connection that the pool gives is in somebody's transaction: that one is not committed on the way.
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
                    acquire(&scene.keeper, keys.clone(), scope, LONG)
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

fn assert_refused_unsent(error: &Error, what: &str) {
    assert_eq!(error.kind(), ErrorKind::OutOfLocks, "{what}: {error:?}");
    assert_eq!(
        error.sqlstate(),
        None,
        "{what}: it was sent, and took the room of others until it failed"
    );
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_set_that_cannot_fit_is_refused_before_it_takes_the_room_of_others() {
    let scene = Scene::new(2).await;
    let row = scene
        .observer
        .query_one(
            "SELECT current_setting('max_locks_per_transaction')::int4 * (current_setting('max_connections')::int4 \
             + current_setting('max_prepared_transactions')::int4)",
            &[],
        )
        .await
        .unwrap();
    let keys: Vec<LockKey> = (0..=i64::from(row.get::<_, i32>(0)))
        .map(LockKey::from)
        .collect();
    for scope in SCOPES {
        let error = acquire(&scene.keeper, &keys, scope, LONG)
            .await
            .unwrap_err();
        assert_refused_unsent(&error, "acquire");
        let error = try_acquire(&scene.keeper, &keys, scope).await.unwrap_err();
        assert_refused_unsent(&error, "try");
    }
    assert_eq!(scene.advisory_locks().await, 0);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_set_that_cannot_fit_is_refused_inside_a_transaction_too() {
    // Its own server: if it is not refused, it takes the room of others.
    let server = small_server();
    let scene = Scene::on(&server, 2).await;
    let keys: Vec<LockKey> = (0..20_000).map(LockKey::from).collect();
    let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
    let error = guard.advisory_locks(&keys).try_acquire().await.unwrap_err();
    assert_refused_unsent(&error, "try");
    let error = guard.advisory_locks(&keys).await.unwrap_err();
    assert_refused_unsent(&error, "wait");
    guard.query_one("SELECT 1", &[]).await.unwrap();
    assert_eq!(scene.advisory_locks().await, 1);
    guard.commit().await.unwrap();
    scene.nothing_left().await;
}

/// A server with a lock table that a test can fill.
fn small_server() -> Server {
    Server::start(&[
        ("max_locks_per_transaction", "10"),
        ("max_connections", "20"),
        ("max_prepared_transactions", "0"),
    ])
    .unwrap()
}

/// Fills the lock table but for about `room` locks.
async fn fill_but_for(client: &Client, room: i64) {
    let mut first = 1_000_000;
    let mut chunk = 512_i64;
    while chunk > 0 {
        let sql = format!(
            "SELECT pg_advisory_lock(n) FROM generate_series({first}, {first} + {chunk} - 1) n"
        );
        match client.batch_execute(&sql).await {
            Ok(()) => first += chunk,
            Err(error) => {
                assert_eq!(error.code().map(|code| code.code()), Some("53200"));
                // What it got before it failed is held on.
                client
                    .batch_execute(&format!(
                        "SELECT pg_advisory_unlock(objid::int8) FROM pg_locks WHERE locktype = 'advisory' \
                         AND pid = pg_backend_pid() AND objid >= {first}"
                    ))
                    .await
                    .unwrap();
                chunk /= 2;
            }
        }
    }
    let sql = format!(
        "SELECT pg_advisory_unlock(n) FROM generate_series({first} - {room}, {first} - 1) n"
    );
    client.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_table_that_is_full_after_all_leaves_nothing_held_and_others_unharmed() {
    let server = small_server();
    let scene = Scene::on(&server, 4).await;
    let keys: Vec<LockKey> = (0..100)
        .map(|n| {
            if n % 2 == 0 {
                LockKey::from(n)
            } else {
                LockKey::from((1, i32::try_from(n).unwrap()))
            }
        })
        .collect();
    let others = scene
        .keeper
        .advisory_lock("others")
        .session()
        .acquire()
        .await
        .unwrap();
    let holder = scene.database.connect().await;
    // Busy, so that there is waiting too.
    lock_by_sql(&holder, &keys[0]).await;
    // All connections exist, with the locks of their logins.
    scene.open_connections_but(1).await;
    fill_but_for(&holder, 40).await;
    let taken = scene.advisory_locks().await;
    assert!(taken > 200, "{taken}");

    for round in 0..3 {
        for scope in SCOPES {
            let error = try_acquire(&scene.keeper, &keys[1..], scope)
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfLocks, "{scope:?}: {error:?}");
            assert_eq!(error.sqlstate().map(|code| code.code()), Some("53200"));
            assert!(error.key().is_some() && !error.is_retryable());
            scene.nothing_but(taken).await;

            let error = acquire(&scene.keeper, &keys[1..], scope, LONG)
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfLocks, "{scope:?}: {error:?}");
            scene.nothing_but(taken).await;

            // In the middle of a wait: the table is full when the busy key is free.
            let release = async {
                eventually("no waiter", async || {
                    !scene.waiters(&keys[0]).await.is_empty()
                })
                .await;
                unlock_by_sql(&holder, &keys[0]).await;
            };
            let (result, ()) = tokio::join!(acquire(&scene.keeper, &keys, scope, LONG), release);
            assert_eq!(
                result.unwrap_err().kind(),
                ErrorKind::OutOfLocks,
                "{scope:?}"
            );
            scene.nothing_but(taken - 1).await;
            lock_by_sql(&holder, &keys[0]).await;
        }
        let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
        let error = guard.advisory_locks(&keys[1..]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfLocks, "{error:?}");
        let error = guard.commit().await.unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::OutOfLocks,
            "round {round}: {error:?}"
        );
        scene.nothing_but(taken).await;
    }
    // The others hold what they held, and there is room for small sets.
    assert!(!others.is_lost());
    assert!(scene.is_held("others").await);
    for scope in SCOPES {
        acquire(&scene.keeper, &keys[1..6], scope, LONG)
            .await
            .unwrap()
            .end()
            .await;
    }
    others.release().await.unwrap();
    drop(holder);
    scene.nothing_left().await;
}

/// Locks taken one by one in opposite orders are a deadlock. The server finds it, however long it takes to look.
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
                    let result = guard.advisory_lock(second).wait(LONG).await;
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
