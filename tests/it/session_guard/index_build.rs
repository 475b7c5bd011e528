//! An index that is built under a session lock.

use std::time::Duration;

use lockkeeper::Keeper;
use lockkeeper_testkit::{CLEANED_UP_WITHIN, ENDLESS, Scene, Server, in_time_of};
use tokio_postgres::IsolationLevel;

use super::take;

/// The kinds of waiters that stand at the server while an index is built.
#[derive(Clone, Copy, Debug)]
enum Waiter {
    Xact,
    Session,
    Snapshot,
}

/// `CREATE INDEX CONCURRENTLY` waits for all older snapshots, a waiter's among them, and the waiter for the lock that
/// the index builder holds. A waiter that is watched steps back, and one that is not waits for too short a time.
async fn index_build(kinds: &[Waiter], are_watched: bool) {
    // For its log.
    let server = Server::start(&[("deadlock_timeout", "3s")]).unwrap();
    let scene = Scene::on(&server, 6).await;
    let fill = "CREATE TABLE note (id int); INSERT INTO note SELECT generate_series(1, 1000)";
    scene.run(fill).await;
    for round in 0..3 {
        let what = format!("round {round}, {kinds:?}");
        let guard = take(&scene.keeper, 730).await;
        let waiters: Vec<_> = kinds
            .iter()
            .map(|&kind| {
                // A keeper for each, so that all of them stand in the server's queue. In a pool of one there is no
                // connection to watch it with.
                let keeper = Keeper::new(scene.database.pool(if are_watched { 4 } else { 1 }));
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
        // So the builder's look for a deadlock is the one that would find it.
        scene.until_awaited_for(Duration::from_secs(4), 730).await;
        let waited = scene.waiters(730).await;
        let build = guard.batch_execute("CREATE INDEX CONCURRENTLY note_id ON note (id)");
        let built = in_time_of(Duration::from_secs(60), "the index build", build).await;
        assert!(built.is_ok(), "{what}: {built:?}");
        assert!(
            scene
                .is_true("(SELECT indisvalid FROM pg_index WHERE indexrelid = 'note_id'::regclass)")
                .await
        );
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "{what}");
        if are_watched {
            // They come back by themselves.
            scene.until_awaited_by(kinds.len(), 730).await;
            let came_back = scene.waiters(730).await;
            assert!(came_back.len() == waited.len(), "{what}");
        }
        scene.run("DROP INDEX note_id").await;
        guard.release().await.unwrap();
        for waiter in waiters {
            let granted = in_time_of(CLEANED_UP_WITHIN, "a waiter is stuck", waiter).await;
            assert!(granted.unwrap().is_ok(), "{what}");
        }
    }
    assert!(
        !server.log().contains("deadlock detected"),
        "{}",
        server.log()
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn index_build_under_a_session_lock_finishes() {
    let mixed = [
        Waiter::Session,
        Waiter::Xact,
        Waiter::Snapshot,
        Waiter::Xact,
    ];
    tokio::join!(
        index_build(&[Waiter::Xact; 3], true),
        index_build(&[Waiter::Session; 3], true),
        index_build(&mixed, true),
        index_build(&mixed, false),
    );
}
