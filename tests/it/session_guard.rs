//! Session guards: what happens to the lock, the connection and the caller when something goes wrong while it is held.

use std::time::{Duration, Instant};

use futures::future::join_all;
use lockkeeper::{AdvisoryMode, Error, ErrorKind, Keeper, LockKey, SessionGuard};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Proxy, Scene, Server, eventually_within, median,
};
use tokio::sync::oneshot;
use tokio_postgres::error::SqlState;
use tokio_postgres::{IsolationLevel, SimpleQueryMessage};

async fn take(keeper: &Keeper, key: impl Into<LockKey>) -> SessionGuard {
    keeper.advisory_lock(key).session().acquire().await.unwrap()
}

/// What a pool of one connection gives next: its pid, whether it is in a transaction, its name.
async fn next_borrower(scene: &Scene) -> (i32, bool, String) {
    let object = scene.pool.get().await.unwrap();
    // A transaction that was open before began before this message. (The messages of a prepared statement have several
    // times of their own.)
    let sql = "SELECT pg_backend_pid(), now() <> statement_timestamp(), current_setting('application_name')";
    let reply = object.simple_query(sql).await.unwrap();
    let row = reply.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let column = |n| row.unwrap().get(n).unwrap();
    (
        column(0).parse().unwrap(),
        column(1) == "t",
        column(2).to_owned(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_says_what_it_holds() {
    let scene = Scene::new(1).await;
    let guard = take(&scene.keeper, 700).await;
    assert_eq!(guard.held_keys(), [LockKey::from(700)]);
    assert_eq!(guard.mode(), AdvisoryMode::Exclusive);
    assert_eq!(scene.holders(700).await, [guard.backend_pid().unwrap()]);
    assert!(guard.held_for() < CLEANED_UP_WITHIN);
    assert!(!guard.is_lost());
    let looks = tokio::time::timeout(Duration::from_millis(150), guard.lost()).await;
    assert!(looks.is_err(), "said to be lost");
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_transaction_is_rolled_back_and_the_lock_stays() {
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 701).await;
    let pid = guard.backend_pid().unwrap();
    for _ in 0..2 {
        let transaction = guard.transaction(async |tx| {
            tx.batch_execute("CREATE TABLE note (id int)").await?;
            tx.batch_execute("SELECT 1/0").await?;
            Ok::<_, Error>(())
        });
        let error = transaction.await.unwrap_err();
        assert_eq!(
            error.sqlstate(),
            Some(&SqlState::DIVISION_BY_ZERO),
            "{error:?}"
        );
        assert_eq!(scene.holders(701).await, [pid]);
        // Usable, and outside of a transaction.
        guard
            .batch_execute("CREATE TABLE note (id int); DROP TABLE note")
            .await
            .unwrap();
    }
    guard.release().await.unwrap();
    assert_eq!(
        next_borrower(&scene).await.0,
        pid,
        "the connection was not kept"
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_callers_own_error_comes_back_as_it_was() {
    #[derive(Debug)]
    enum Mine {
        Number(i32),
        Lock(#[allow(dead_code, reason = "shown by a failing test")] Error),
    }
    impl From<Error> for Mine {
        fn from(error: Error) -> Self {
            Self::Lock(error)
        }
    }
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 702).await;
    let transaction = guard.transaction(async |tx| {
        tx.batch_execute("CREATE TABLE note (id int)")
            .await
            .map_err(Error::from)?;
        Err::<(), _>(Mine::Number(7))
    });
    assert!(matches!(transaction.await, Err(Mine::Number(7))));
    let sql = "SELECT to_regclass('note') IS NULL";
    let rolled_back: bool = guard.query_one(sql, &[]).await.unwrap().get(0);
    assert!(rolled_back);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// Whatever transaction was left open, and however the guard ends, the next borrower finds a clean connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_left_open_keeps_neither_the_lock_nor_the_connection() {
    let scene = Scene::new(1).await;
    let own = next_borrower(&scene).await.2;
    scene
        .observer
        .batch_execute("CREATE TABLE note (id int)")
        .await
        .unwrap();
    for keys in [vec![703], vec![703, 704]] {
        for through_client in [false, true] {
            for (failed, sql) in [
                (false, "BEGIN; INSERT INTO note VALUES (1)"),
                (true, "BEGIN; INSERT INTO note VALUES (1); SELECT 1/0"),
            ] {
                for release in [false, true] {
                    let what =
                        format!("{sql}, client {through_client}, release {release}, {keys:?}");
                    let locks = scene.keeper.advisory_locks(keys.clone()).session();
                    let guard = locks.acquire().await.unwrap();
                    let left_open = if through_client {
                        guard.client().batch_execute(sql).await
                    } else {
                        guard.batch_execute(sql).await
                    };
                    match left_open {
                        Ok(()) => assert!(!failed, "{what}"),
                        Err(error) => {
                            assert!(failed, "{what}");
                            assert_eq!(error.code(), Some(&SqlState::DIVISION_BY_ZERO), "{what}");
                        }
                    }
                    for &key in &keys {
                        assert!(scene.is_held(key).await, "{what}");
                    }
                    if release {
                        let released = guard.release().await;
                        assert!(released.is_ok(), "{what}: {released:?}");
                        assert_eq!(
                            scene.advisory_locks().await,
                            0,
                            "{what}: not released on return"
                        );
                    } else {
                        drop(guard);
                    }
                    scene.nothing_left().await;
                    let (_, in_transaction, name) = next_borrower(&scene).await;
                    assert!(
                        !in_transaction,
                        "{what}: the connection is in a transaction"
                    );
                    assert_eq!(name, own, "{what}");
                }
            }
        }
    }
    let sql = "SELECT count(*) FROM note";
    let notes: i64 = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(notes, 0, "committed by nobody");
}

/// The guard's own transaction after one that was left open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_after_one_that_failed_and_was_left_open_begins_anew() {
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 705).await;
    assert!(guard.batch_execute("BEGIN; SELECT 1/0").await.is_err());
    let transaction = guard.transaction(async |tx| {
        tx.batch_execute("CREATE TABLE note (id int)").await?;
        Ok::<_, Error>(())
    });
    transaction.await.unwrap();
    let sql = "SELECT to_regclass('note') IS NOT NULL";
    let committed: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert!(committed);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_commits_and_the_lock_stays() {
    let scene = Scene::new(1).await;
    let mut guard = take(&scene.keeper, 706).await;
    for n in 0..3 {
        let transaction = guard.transaction(async move |tx| {
            tx.batch_execute(&format!("CREATE TABLE note_{n} (id int)"))
                .await?;
            tx.advisory_lock(707).await?;
            Ok::<_, Error>(n)
        });
        assert_eq!(transaction.await.unwrap(), n);
        let sql = format!("SELECT to_regclass('note_{n}') IS NOT NULL");
        let committed: bool = scene.observer.query_one(&sql, &[]).await.unwrap().get(0);
        assert!(committed);
        assert!(scene.is_held(706).await);
        assert!(
            !scene.is_held(707).await,
            "the transaction's lock outlives it"
        );
    }
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// A swallowed error and a failing COMMIT are errors, and the lock stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_cannot_commit_says_so() {
    let scene = Scene::new(1).await;
    let create = "CREATE TABLE note (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)";
    scene.observer.batch_execute(create).await.unwrap();
    let mut guard = take(&scene.keeper, 708).await;
    let swallowed = guard.transaction(async |tx| {
        tx.batch_execute("INSERT INTO note VALUES (1)").await?;
        assert!(tx.batch_execute("SELECT 1/0").await.is_err());
        Ok::<_, Error>(())
    });
    let error = swallowed.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Database, "{error:?}");
    let swallowed = guard.transaction(async |tx| {
        assert!(tx.client().batch_execute("SELECT 1/0").await.is_err());
        Ok::<_, Error>(())
    });
    assert!(swallowed.await.is_err());
    let deferred = guard.transaction(async |tx| {
        tx.batch_execute("INSERT INTO note VALUES (1), (1)").await?;
        Ok::<_, Error>(())
    });
    let error = deferred.await.unwrap_err();
    assert_eq!(
        error.sqlstate(),
        Some(&SqlState::UNIQUE_VIOLATION),
        "{error:?}"
    );
    assert!(scene.is_held(708).await);
    let sql = "SELECT count(*) FROM note";
    let notes: i64 = guard.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(notes, 0);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_backend_is_noticed_without_being_used() {
    let scene = Scene::new(3).await;
    let (lost, other) = (
        take(&scene.keeper, 709).await,
        take(&scene.keeper, 710).await,
    );
    let watched = tokio::spawn(async move {
        let started = Instant::now();
        lost.lost().await;
        (lost, started.elapsed())
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!watched.is_finished());
    let pid = scene.holders(709).await[0];
    let terminated = Instant::now();
    scene.terminate(pid).await;
    let (mut lost, _) = tokio::time::timeout(CLEANED_UP_WITHIN, watched)
        .await
        .unwrap()
        .unwrap();
    let noticed = terminated.elapsed();
    assert!(
        noticed < Duration::from_secs(5),
        "noticed after {noticed:?}"
    );
    assert!(lost.is_lost());
    // At once now.
    tokio::time::timeout(Duration::from_millis(50), lost.lost())
        .await
        .unwrap();
    // The backend says that it ends before it lets its locks go.
    let free = async || !scene.is_held(709).await;
    eventually_within(CLEANED_UP_WITHIN, "still held", free).await;
    let again = take(&scene.keeper, 709).await;

    let ran = lost.transaction(async |_| panic!("run without the lock"));
    let ran: Result<(), Error> = ran.await;
    assert_eq!(ran.unwrap_err().kind(), ErrorKind::LockLost);
    let error = lost.batch_execute("SELECT 1").await.unwrap_err();
    assert!(error.is_closed(), "{error:?}");
    let error = lost.release().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockLost, "{error:?}");
    assert_eq!(error.key(), Some(&LockKey::from(709)));
    assert!(!error.is_retryable());

    assert!(!other.is_lost() && !again.is_lost());
    assert!(
        scene.is_held(709).await,
        "somebody else's lock was released"
    );
    other.release().await.unwrap();
    again.release().await.unwrap();
    scene.nothing_left().await;
}

/// All of the pool's idle connections were ended while nobody looked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_died_in_the_pool_are_replaced() {
    let scene = Scene::new(4).await;
    for session in [false, true] {
        scene.pool_is_whole().await;
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                   WHERE datname = current_database() AND pid <> pg_backend_pid() \
                   AND backend_type = 'client backend'";
        assert_eq!(scene.observer.query(sql, &[]).await.unwrap().len(), 4);
        if session {
            take(&scene.keeper, 726).await.release().await.unwrap();
        } else {
            let guard = scene.keeper.advisory_lock(726).acquire().await.unwrap();
            guard.commit().await.unwrap();
            let section = scene
                .keeper
                .with_advisory_lock(726, async |_| Ok::<_, Error>(7));
            assert_eq!(section.await.unwrap(), 7);
        }
        scene.nothing_left().await;
    }
}

/// A lost guard that is simply dropped, and one whose backend ends during its transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_guard_ends_quietly() {
    let scene = Scene::new(2).await;
    let guard = take(&scene.keeper, 711).await;
    scene.terminate(guard.backend_pid().unwrap()).await;
    let lost = async || guard.is_lost();
    eventually_within(CLEANED_UP_WITHIN, "not noticed", lost).await;
    drop(guard);

    let mut guard = take(&scene.keeper, 711).await;
    let pid = guard.backend_pid().unwrap();
    let (inside, is_inside) = oneshot::channel();
    let (go_on, goes_on) = oneshot::channel();
    let transaction = guard.transaction(async move |tx| {
        tx.batch_execute("CREATE TABLE note (id int)").await?;
        inside.send(()).unwrap();
        goes_on.await.unwrap();
        Ok::<_, Error>(())
    });
    let (outcome, ()) = tokio::join!(transaction, async {
        is_inside.await.unwrap();
        scene.terminate(pid).await;
        let gone = async || scene.holders(711).await.is_empty();
        eventually_within(CLEANED_UP_WITHIN, "not terminated", gone).await;
        go_on.send(()).unwrap();
    });
    let error = outcome.unwrap_err();
    // Before COMMIT was sent, or while it was: never reported as done.
    let kinds = [
        ErrorKind::LockLost,
        ErrorKind::CommitUnknown,
        ErrorKind::ConnectionLost,
    ];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    let lost = async || guard.is_lost();
    eventually_within(CLEANED_UP_WITHIN, "not noticed", lost).await;
    assert_eq!(
        guard.release().await.unwrap_err().kind(),
        ErrorKind::LockLost
    );
    let sql = "SELECT to_regclass('note') IS NULL";
    let rolled_back: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert!(rolled_back);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_takes_all_guards_with_it() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let pool = database.pool(4);
    let keeper = Keeper::new(pool.clone());
    let guards = [take(&keeper, 712).await, take(&keeper, 713).await];
    let xact = keeper.advisory_lock(714).acquire().await.unwrap();
    server.stop();
    let stopped = Instant::now();
    for guard in &guards {
        tokio::time::timeout(CLEANED_UP_WITHIN, guard.lost())
            .await
            .expect("not noticed");
    }
    let noticed = stopped.elapsed();
    assert!(
        noticed < Duration::from_secs(5),
        "noticed after {noticed:?}"
    );
    for guard in guards {
        assert_eq!(
            guard.release().await.unwrap_err().kind(),
            ErrorKind::LockLost
        );
    }
    // Where the end of its connection is not known yet, it is COMMIT that learns of it.
    let closed = async || xact.client().is_closed();
    eventually_within(CLEANED_UP_WITHIN, "not closed", closed).await;
    assert_eq!(
        xact.commit().await.unwrap_err().kind(),
        ErrorKind::ConnectionLost
    );
    let error = keeper.advisory_lock(712).acquire().await.unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Pool | ErrorKind::ConnectionLost),
        "{error:?}"
    );
    server.restart();
    // On new connections, and not from what was known of the server before.
    for guard in [take(&keeper, 712).await, take(&keeper, 713).await] {
        guard.release().await.unwrap();
    }
}

/// The server ends sessions and transactions that idle for too long; so end the locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_that_idles_too_long_for_the_server_is_lost() {
    let scene = Scene::new(2).await;
    let name = scene.database.name();
    let set = format!(
        "ALTER DATABASE {name} SET idle_session_timeout = '700ms'; \
         ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '700ms'"
    );
    scene.observer.batch_execute(&set).await.unwrap();
    let session = take(&scene.keeper, 715).await;
    let xact = scene.keeper.advisory_lock(716).acquire().await.unwrap();
    tokio::time::timeout(CLEANED_UP_WITHIN, session.lost())
        .await
        .expect("not noticed");
    let free = async || !scene.is_held(715).await && !scene.is_held(716).await;
    eventually_within(CLEANED_UP_WITHIN, "still held", free).await;
    assert_eq!(
        session.release().await.unwrap_err().kind(),
        ErrorKind::LockLost
    );
    // Where the end of its connection is not known yet, it is COMMIT that learns of it.
    let closed = async || xact.client().is_closed();
    eventually_within(CLEANED_UP_WITHIN, "not closed", closed).await;
    assert_eq!(
        xact.commit().await.unwrap_err().kind(),
        ErrorKind::ConnectionLost
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_somebody_unlocked_by_hand_is_reported_as_lost() {
    let scene = Scene::new(2).await;
    for keys in [vec![717], vec![716, 717], vec![717, 718]] {
        for unlock in [
            "SELECT pg_advisory_unlock(717)",
            "SELECT pg_advisory_unlock_all()",
        ] {
            let locks = scene.keeper.advisory_locks(keys.clone()).session();
            let guard = locks.acquire().await.unwrap();
            guard.client().batch_execute(unlock).await.unwrap();
            // Somebody else may have it by now, who is not to be disturbed.
            let other = take(&scene.keeper, 717).await;
            let error = guard.release().await.unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::LockLost,
                "{keys:?}, {unlock}: {error:?}"
            );
            assert_eq!(scene.holders(717).await, [other.backend_pid().unwrap()]);
            let rest = async || scene.advisory_locks().await == 1;
            eventually_within(CLEANED_UP_WITHIN, "the other keys are left", rest).await;
            other.release().await.unwrap();
            scene.nothing_left().await;
        }
    }
}

/// A slow network is no reason to be told less.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_over_a_slow_network_tells_a_lost_lock_from_a_held_one() {
    let mut scene = Scene::new(1).await;
    let latency = Duration::from_millis(40);
    let proxy = Proxy::before(scene.database.server());
    proxy.delay(latency);
    scene.pool = proxy.pool(&scene.database.config(), 1);
    let keeper = Keeper::new(scene.pool.clone());
    for through_client in [false, true] {
        let guard = take(&keeper, 727).await;
        if through_client {
            guard.client().batch_execute("SELECT 1").await.unwrap();
        }
        guard.release().await.unwrap();
        scene.nothing_left().await;
        let guard = take(&keeper, 727).await;
        let unlock = "SELECT pg_advisory_unlock(727)";
        if through_client {
            guard.client().batch_execute(unlock).await.unwrap();
        } else {
            guard.batch_execute(unlock).await.unwrap();
        }
        let released = guard.release().await;
        let kind = released.map_err(|error| error.kind());
        assert_eq!(kind, Err(ErrorKind::LockLost), "client {through_client}");
        scene.nothing_left().await;
    }
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
                    // Between two slices it is not there.
                    let mut waiter = None;
                    eventually_within(CLEANED_UP_WITHIN, "it does not wait", async || {
                        waiter = scene.waiters(719).await.first().copied();
                        waiter.is_some()
                    })
                    .await;
                    let expected = format!("test tests/it/session_guard.rs:{line}");
                    assert_eq!(shown(waiter.unwrap()).await, expected, "while waiting");
                    blocker
                        .batch_execute("SELECT pg_advisory_unlock(719)")
                        .await
                        .unwrap();
                }
            });
            let mut guard = guard.unwrap();
            let pid = guard.backend_pid().unwrap();
            let expected = format!("test tests/it/session_guard.rs:{line}");
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
    assert_eq!(waited.unwrap_err().kind(), ErrorKind::LockTimeout);
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

/// The kinds of waiters that stand at the server while an index is built.
#[derive(Clone, Copy, Debug)]
enum Waiter {
    Xact,
    Session,
    Snapshot,
}

/// Does something, and tells how long the longest wait for an advisory lock was that could be seen meanwhile.
async fn with_longest_wait<F: Future>(scene: &Scene, doing: F) -> (F::Output, Duration) {
    let sql = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float8 \
               FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let mut longest = 0.0_f64;
    let mut doing = std::pin::pin!(doing);
    loop {
        let done = tokio::time::timeout(Duration::from_millis(20), doing.as_mut()).await;
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        longest = longest.max(row.get(0));
        if let Ok(done) = done {
            return (done, Duration::from_secs_f64(longest.max(0.0)));
        }
    }
}

/// `CREATE INDEX CONCURRENTLY` waits for all older snapshots, a waiter's among them, and the waiter for the lock that
/// the index builder holds. Waits shorter than `deadlock_timeout` let it go on.
async fn index_build(kinds: &[Waiter]) {
    let scene = Scene::new(6).await;
    let fill = "CREATE TABLE note (id int); INSERT INTO note SELECT generate_series(1, 1000)";
    scene.observer.batch_execute(fill).await.unwrap();
    let started = Instant::now();
    let (mut rounds, mut repeated) = (0, 0);
    while rounds < 4 || (rounds < 24 && started.elapsed() < Duration::from_secs(10)) {
        let guard = take(&scene.keeper, 730).await;
        let waiters: Vec<_> = kinds
            .iter()
            .map(|&kind| {
                // A keeper for each, so that all of them stand in the server's queue.
                let keeper = Keeper::new(scene.pool.clone());
                tokio::spawn(async move {
                    let lock = keeper.advisory_lock(730).wait(ENDLESS);
                    match kind {
                        Waiter::Xact => lock.acquire().await.map(drop),
                        Waiter::Session => lock.session().acquire().await.map(drop),
                        Waiter::Snapshot => {
                            let lock = lock.isolation(IsolationLevel::RepeatableRead);
                            lock.acquire().await.map(drop)
                        }
                    }
                })
            })
            .collect();
        let wait = async || scene.waiters(730).await.len() == kinds.len();
        eventually_within(CLEANED_UP_WITHIN, "they do not wait", wait).await;
        let build = guard.batch_execute("CREATE INDEX CONCURRENTLY note_id ON note (id)");
        let build = tokio::time::timeout(Duration::from_secs(20), build);
        let (built, longest) = with_longest_wait(&scene, build).await;
        let built = built.expect("the index build does not end");
        let deadlock = Some(&SqlState::T_R_DEADLOCK_DETECTED);
        let in_deadlock = match &built {
            Ok(()) => false,
            Err(error) => error.code() == deadlock,
        };
        if !in_deadlock {
            assert!(built.is_ok(), "round {rounds}, {kinds:?}: {built:?}");
            let sql = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'note_id'::regclass";
            let valid: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
            assert!(valid, "round {rounds}, {kinds:?}");
        }
        scene
            .observer
            .batch_execute("DROP INDEX IF EXISTS note_id")
            .await
            .unwrap();
        let still = waiters.iter().all(|waiter| !waiter.is_finished());
        guard.release().await.unwrap();
        let mut refused = None;
        for waiter in waiters {
            let waiter = tokio::time::timeout(CLEANED_UP_WITHIN, waiter).await;
            let granted = waiter.expect("a waiter is stuck").unwrap();
            refused = refused.or(granted.err());
        }
        if in_deadlock || refused.as_ref().is_some_and(|e| e.sqlstate() == deadlock) {
            // Where the server itself is so slow that a wait is not over in time, it is a deadlock.
            repeated += 1;
            let what = format!("round {rounds}, {kinds:?}: {built:?}, {refused:?}");
            assert!(longest > Duration::from_millis(900), "{what}: {longest:?}");
            assert!(repeated < 20, "{what}");
            continue;
        }
        assert!(refused.is_none(), "round {rounds}, {kinds:?}: {refused:?}");
        assert!(
            still,
            "round {rounds}, {kinds:?}: granted while it was held"
        );
        rounds += 1;
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn index_build_under_a_session_lock_finishes() {
    tokio::join!(
        index_build(&[Waiter::Xact; 3]),
        index_build(&[Waiter::Session; 3]),
        index_build(&[
            Waiter::Session,
            Waiter::Xact,
            Waiter::Snapshot,
            Waiter::Xact
        ]),
    );
}
