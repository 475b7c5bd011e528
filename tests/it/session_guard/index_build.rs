//! An index that is built under a session lock.

use std::time::{Duration, Instant};

use lockkeeper::Keeper;
use lockkeeper_testkit::{CLEANED_UP_WITHIN, ENDLESS, Scene, in_time_of};
use tokio_postgres::IsolationLevel;
use tokio_postgres::error::SqlState;

use super::take;

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
        scene.until_awaited_by(kinds.len(), 730).await;
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
            let granted = in_time_of(CLEANED_UP_WITHIN, "a waiter is stuck", waiter)
                .await
                .unwrap();
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
