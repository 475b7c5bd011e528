//! Locks that are lost.

use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, Keeper, LockKey};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, Fault, Proxy, Scene, Server, assert_error, assert_error_in,
    eventually_within, in_time_of, until_closed,
};

use super::take;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_backend_is_noticed_without_being_used() {
    let scene = Scene::new(3).await;
    let (lost, other) = (
        take(&scene.keeper, 709).await,
        take(&scene.keeper, 710).await,
    );
    let watched = tokio::spawn(async move {
        let started = Instant::now();
        lost.loss().await;
        (lost, started.elapsed())
    });
    // Not before.
    scene.nothing_but(2).await;
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
    tokio::time::timeout(Duration::from_millis(50), lost.loss())
        .await
        .unwrap();
    // The backend says that it ends before it lets its locks go.
    scene.until_free(709).await;
    let again = take(&scene.keeper, 709).await;

    let ran = lost.transaction(async |_| panic!("run without the lock"));
    let ran: Result<(), Error> = ran.await;
    assert_error(
        &ran.unwrap_err(),
        ErrorKind::LockLost,
        "lock lost with its connection: 709",
    );
    let error = lost.batch_execute("SELECT 1").await.unwrap_err();
    assert!(error.is_closed(), "{error:?}");
    let error = lost.release().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockLost,
        "lock lost with its connection: 709",
    );
    assert_eq!(error.key(), Some(&LockKey::from(709)));
    assert!(!error.is_retryable());

    assert!(!other.is_lost() && !again.is_lost());
    assert!(
        scene.is_held(709).await,
        "the other session's lock was released"
    );
    other.release().await.unwrap();
    again.release().await.unwrap();
    scene.nothing_left().await;
}

/// All of the pool's idle connections were ended while they were not used.
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

/// A lost guard that is simply dropped, and one whose backend ends in its transaction, before COMMIT.
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
    let transaction = guard.transaction(async |tx| {
        tx.batch_execute("CREATE TABLE note (id int)").await?;
        scene.terminate(pid).await;
        // Before COMMIT is sent.
        until_closed(tx.client()).await;
        Ok::<_, Error>(())
    });
    let error = transaction.await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockLost,
        "lock lost with its connection: 711",
    );
    let lost = async || guard.is_lost();
    eventually_within(CLEANED_UP_WITHIN, "not noticed", lost).await;
    assert_error(
        &guard.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "lock lost with its connection: 711",
    );
    let sql = "SELECT to_regclass('note') IS NULL";
    let rolled_back: bool = scene.observer.query_one(sql, &[]).await.unwrap().get(0);
    assert!(rolled_back);
    scene.nothing_left().await;
}

/// The same while COMMIT is sent: it is never reported as done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_that_is_lost_during_commit_does_not_know_its_outcome() {
    let scene = Scene::new(2).await;
    let proxy = Proxy::before(scene.database.server());
    // Nothing but the test's own transactions is to end with COMMIT.
    let pool = proxy.pool(&scene.database.config(), 2);
    let keeper = Keeper::builder(pool).watch(false).build();
    scene.run("CREATE TABLE note (id int)").await;
    for (fault, applied) in [
        (Fault::CutBefore, 0),
        (Fault::CutDuring, 1),
        (Fault::CutAnswer, 1),
    ] {
        scene.run("DELETE FROM note").await;
        let mut guard = take(&keeper, 711).await;
        proxy.fault("COMMIT", fault);
        let transaction = guard.transaction(async |tx| {
            tx.batch_execute("INSERT INTO note VALUES (1)").await?;
            Ok::<_, Error>(())
        });
        let error = transaction.await.unwrap_err();
        assert_error_in(
            format_args!("{fault:?}"),
            &error,
            ErrorKind::CommitUnknown,
            "outcome unknown",
        );
        assert_eq!(proxy.faults_left(), 0);
        let lost = async || guard.is_lost();
        eventually_within(CLEANED_UP_WITHIN, "not noticed", lost).await;
        assert_error(
            &guard.release().await.unwrap_err(),
            ErrorKind::LockLost,
            "lock lost with its connection: 711",
        );
        scene.until_no_transaction().await;
        assert_eq!(scene.count("note").await, applied, "{fault:?}");
        scene.nothing_left().await;
    }
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
        in_time_of(CLEANED_UP_WITHIN, "not noticed", guard.loss()).await;
    }
    let noticed = stopped.elapsed();
    assert!(
        noticed < Duration::from_secs(5),
        "noticed after {noticed:?}"
    );
    for guard in guards {
        assert_error(
            &guard.release().await.unwrap_err(),
            ErrorKind::LockLost,
            "lock lost with its connection: 71",
        );
    }
    // Where the end of its connection is not known yet, it is COMMIT that learns of it.
    let closed = async || xact.client().is_closed();
    eventually_within(CLEANED_UP_WITHIN, "not closed", closed).await;
    assert_error(
        &xact.commit().await.unwrap_err(),
        ErrorKind::ConnectionLost,
        "nothing is applied: 714",
    );
    let error = keeper.advisory_lock(712).acquire().await.unwrap_err();
    assert_error(&error, ErrorKind::Pool, "no connection from the pool: 712");
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
    // A heartbeat would keep the session.
    let keeper = Keeper::builder(scene.pool.clone()).heartbeat(None).build();
    let session = take(&keeper, 715).await;
    let xact = scene.keeper.advisory_lock(716).acquire().await.unwrap();
    in_time_of(CLEANED_UP_WITHIN, "not noticed", session.loss()).await;
    let free = async || !scene.is_held(715).await && !scene.is_held(716).await;
    eventually_within(CLEANED_UP_WITHIN, "still held", free).await;
    assert_error(
        &session.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "lock lost with its connection: 715",
    );
    // Where the end of its connection is not known yet, it is COMMIT that learns of it.
    let closed = async || xact.client().is_closed();
    eventually_within(CLEANED_UP_WITHIN, "not closed", closed).await;
    assert_error(
        &xact.commit().await.unwrap_err(),
        ErrorKind::ConnectionLost,
        "nothing is applied: 716",
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_was_unlocked_by_hand_is_reported_as_lost() {
    let scene = Scene::new(2).await;
    for keys in [vec![717], vec![716, 717], vec![717, 718]] {
        for unlock in [
            "SELECT pg_advisory_unlock(717)",
            "SELECT pg_advisory_unlock_all()",
        ] {
            let locks = scene.keeper.advisory_locks(keys.clone()).session();
            let guard = locks.acquire().await.unwrap();
            guard.client().batch_execute(unlock).await.unwrap();
            // Another session may have it by now, and must not be disturbed.
            let other = take(&scene.keeper, 717).await;
            let error = guard.release().await.unwrap_err();
            assert_error_in(
                format_args!("{keys:?}, {unlock}"),
                &error,
                ErrorKind::LockLost,
                "lock lost with its connection: 71",
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
        let error = guard.release().await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::LockLost,
            "lock lost with its connection: 727",
        );
        scene.nothing_left().await;
    }
}
