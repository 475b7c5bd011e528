//! Locks that are lost without a word of the server, and the heartbeat that finds that out.

use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, Keeper};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, Proxy, Scene, StoppedBackend, assert_error, eventually_within, in_time_of,
    is_pending, poll_times_and_drop,
};

use super::take;

const OFTEN: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_millis(400);

fn often(scene: &Scene) -> Keeper {
    let builder = Keeper::builder(scene.pool.clone()).heartbeat(OFTEN);
    builder.heartbeat_patience(PATIENCE).build()
}

/// The last query of a backend; `None` where it is gone.
async fn last_query(scene: &Scene, pid: i32) -> Option<String> {
    let sql = "SELECT query FROM pg_stat_activity WHERE pid = $1";
    let row = scene.observer.query_opt(sql, &[&pid]).await.unwrap();
    row.map(|row| row.get(0))
}

async fn until_heartbeat(scene: &Scene, pid: i32) {
    let beats = async || last_query(scene, pid).await.unwrap().contains("heartbeat");
    eventually_within(CLEANED_UP_WITHIN, "no heartbeat", beats).await;
}

/// With the defaults, and also where the last heartbeat has just been answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_a_loss_within_fifteen_seconds() {
    let scene = Scene::new(2).await;
    let proxy = Proxy::before(scene.database.server());
    let pool = proxy.pool(&scene.database.config(), 2);
    let keeper = Keeper::new(pool);
    let guard = take(&keeper, 731).await;
    until_heartbeat(&scene, guard.backend_pid().unwrap()).await;
    let mut loss = guard.loss();
    assert!(is_pending(&mut loss).await);
    proxy.stall(true);
    let stalled = Instant::now();
    let work = guard.run(std::future::pending::<()>());
    let ended = in_time_of(Duration::from_secs(15), "the loss is not noticed", work).await;
    assert!(stalled.elapsed() > Duration::from_secs(7), "too early");
    assert_error(
        &ended.unwrap_err(),
        ErrorKind::LockLost,
        "731: the server did not answer a heartbeat",
    );
    assert!(guard.is_lost() && loss.is_lost());
    loss.await;
    assert_error(
        &guard.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "731: the server did not answer a heartbeat",
    );
    drop(proxy);
    scene.nothing_left().await;
}

/// A backend that stands still, in a runtime of one thread. The server goes on, so others are not lost.
#[tokio::test]
async fn a_backend_that_stands_still_is_a_loss() {
    let scene = Scene::new(3).await;
    let keeper = often(&scene);
    let (guard, other) = (take(&keeper, 732).await, take(&keeper, 733).await);
    let stopped = StoppedBackend::new(&scene.observer, guard.backend_pid().unwrap()).await;
    in_time_of(CLEANED_UP_WITHIN, "the loss is not noticed", guard.loss()).await;
    assert!(guard.is_lost() && !other.is_lost());
    // What became of the lock is not known: it is held until the backend goes on, and learns that its client is gone.
    assert!(scene.is_held(732).await);
    assert_error(
        &guard.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "732",
    );
    drop(stopped);
    other.release().await.unwrap();
    scene.nothing_left().await;
}

/// The session does not idle for as long as the server allows, so it is not ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_guard_outlives_the_idle_session_timeout() {
    let scene = Scene::new(1).await;
    let name = scene.database.name();
    let set = format!("ALTER DATABASE {name} SET idle_session_timeout = '1s'");
    scene.run(&set).await;
    // With the default interval, which is longer.
    let guard = take(&scene.keeper, 734).await;
    let pid = guard.backend_pid().unwrap();
    let old = format!(
        "(SELECT clock_timestamp() - backend_start > '3 s' FROM pg_stat_activity WHERE pid = {pid})"
    );
    let is_old = async || guard.is_lost() || scene.is_true(&old).await;
    eventually_within(CLEANED_UP_WITHIN, "it does not age", is_old).await;
    assert!(!guard.is_lost());
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// A heartbeat would put off the server's own timeout of an idle transaction; of one that was begun by hand too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_heartbeat_in_a_transaction() {
    let scene = Scene::new(3).await;
    let name = scene.database.name();
    let set = format!("ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '1500ms'");
    scene.run(&set).await;
    let keeper = often(&scene);
    for by_hand in [false, true] {
        let mut guard = take(&keeper, 735).await;
        let pid = guard.backend_pid().unwrap();
        until_heartbeat(&scene, pid).await;
        let loss = guard.loss();
        // From its statement until the server ends it.
        let mut is_idle = false;
        let ends = async || match last_query(&scene, pid).await {
            Some(query) => {
                is_idle |= query.contains("SELECT 41");
                assert!(!is_idle || query.contains("SELECT 41"), "{query}");
                false
            }
            None => is_idle,
        };
        let ended = eventually_within(CLEANED_UP_WITHIN, "not timed out", ends);
        if by_hand {
            guard.batch_execute("BEGIN; SELECT 41").await.unwrap();
            ended.await;
        } else {
            let idle = guard.transaction(async |tx| {
                tx.batch_execute("SELECT 41").await?;
                std::future::pending::<Result<(), Error>>().await
            });
            tokio::select! {
                ended = idle => panic!("{ended:?}"),
                () = ended => {}
            }
        }
        in_time_of(CLEANED_UP_WITHIN, "not noticed", loss.clone()).await;
        assert!(loss.is_lost() && guard.is_lost());
        drop(guard);
        scene.nothing_left().await;
    }
}

/// Nor behind a statement of the caller, where it would not be answered in time. Between statements there is one, also after
/// a transaction was begun by hand and ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_heartbeat_behind_a_statement() {
    let scene = Scene::new(3).await;
    let keeper = often(&scene);
    let mut guard = take(&keeper, 736).await;
    let pid = guard.backend_pid().unwrap();
    until_heartbeat(&scene, pid).await;
    guard.batch_execute("SELECT pg_sleep(1.5)").await.unwrap();
    let asleep = guard.transaction(async |tx| {
        tx.batch_execute("SELECT pg_sleep(1.5)").await?;
        Ok::<_, Error>(())
    });
    asleep.await.unwrap();
    until_heartbeat(&scene, pid).await;
    guard
        .batch_execute("BEGIN; SELECT pg_sleep(0.1)")
        .await
        .unwrap();
    guard.batch_execute("COMMIT").await.unwrap();
    until_heartbeat(&scene, pid).await;
    assert!(!guard.is_lost());
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// The connection lives, but the lock is not there any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_searches_for_the_locks() {
    let scene = Scene::new(3).await;
    let keeper = often(&scene);
    for shared in [false, true] {
        let mut lock = keeper.advisory_locks([737, 738]).session();
        if shared {
            lock = lock.shared();
        }
        let mut guard = lock.acquire().await.unwrap();
        let pid = guard.backend_pid().unwrap();
        until_heartbeat(&scene, pid).await;
        assert!(!guard.is_lost());
        let function = if shared {
            "pg_advisory_unlock_shared"
        } else {
            "pg_advisory_unlock"
        };
        let unlock = format!("SELECT {function}(738)");
        guard.client().batch_execute(&unlock).await.unwrap();
        in_time_of(CLEANED_UP_WITHIN, "not noticed", guard.loss()).await;
        let ran = guard.transaction(async |_| Ok::<_, Error>(())).await;
        let error = ran.unwrap_err();
        assert_error(&error, ErrorKind::LockLost, "pg_locks does not show it");
        let error = guard.release().await.unwrap_err();
        assert_error(&error, ErrorKind::LockLost, "pg_locks does not show it");
        scene.nothing_left().await;
    }
}

/// The owner of a loss learns of the release too, and which of the two it was. Work that is dropped leaves the lock held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_ends_the_work_of_others() {
    let scene = Scene::new(2).await;
    for by_drop in [false, true] {
        let guard = take(&scene.keeper, 739).await;
        let loss = guard.loss();
        let working = tokio::spawn(loss.clone());
        assert_eq!(guard.run(async { 7 }).await.unwrap(), 7);
        for polls in 0..4 {
            let work = guard.run(async { guard.query("SELECT 1", &[]).await });
            drop(poll_times_and_drop(work, polls).await);
            assert!(scene.is_held(739).await && !guard.is_lost());
        }
        assert!(!working.is_finished());
        if by_drop {
            drop(guard);
        } else {
            guard.release().await.unwrap();
        }
        in_time_of(CLEANED_UP_WITHIN, "not told", working)
            .await
            .unwrap();
        assert!(!loss.is_lost());
        scene.nothing_left().await;
    }
}

/// Who waits for a loss in one runtime learns of the end of another, which has watched the connection.
#[test]
fn a_guard_whose_runtime_ends_is_lost() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let (first, second, observing) = (runtime(), runtime(), runtime());
    let scene = observing.block_on(Scene::new(2));
    // Each its own connection, which ends with its runtime.
    let keepers = [0, 1].map(|_| Keeper::new(scene.database.pool(2)));
    let take = |runtime: &tokio::runtime::Runtime, keeper: usize, key: i64| {
        runtime.block_on(take(&keepers[keeper], key))
    };
    let ends = take(&first, 0, 770);
    let lives = take(&second, 1, 771);
    let (loss, other) = (ends.loss(), lives.loss());
    first.shutdown_background();
    observing.block_on(in_time_of(CLEANED_UP_WITHIN, "not told", loss));
    assert!(ends.is_lost());
    assert!(!other.is_lost() && !lives.is_lost());
    second.block_on(async {
        lives.release().await.unwrap();
        drop(ends);
    });
    observing.block_on(scene.nothing_left());
}
