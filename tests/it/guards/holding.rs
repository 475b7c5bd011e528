//! Who gets the lock when, and what a drop leaves behind.

use std::time::{Duration, Instant};

use lockkeeper::LockKey;
use lockkeeper_testkit::{AppError, Scene, median};

use super::scene_with_notes;

#[tokio::test]
async fn a_held_key_is_busy_for_every_scope_and_another_key_is_free() {
    let scene = Scene::new(3).await;
    let keeper = &scene.keeper;
    for holder_in_session in [false, true] {
        // The holder, in either scope.
        let (xact, session) = if holder_in_session {
            (
                None,
                Some(keeper.advisory_lock("k").session().acquire().await.unwrap()),
            )
        } else {
            (
                Some(keeper.advisory_lock("k").acquire().await.unwrap()),
                None,
            )
        };
        let holder = xact
            .as_ref()
            .and_then(lockkeeper::XactGuard::backend_pid)
            .or(session
                .as_ref()
                .and_then(lockkeeper::SessionGuard::backend_pid))
            .unwrap();
        assert_eq!(scene.holders("k").await, [holder]);

        assert!(
            keeper
                .advisory_lock("k")
                .try_acquire()
                .await
                .unwrap()
                .is_none()
        );
        assert!(
            keeper
                .advisory_lock("k")
                .session()
                .try_acquire()
                .await
                .unwrap()
                .is_none()
        );
        // A refusal leaves nothing behind.
        assert_eq!(scene.advisory_locks().await, 1);

        let other = keeper.advisory_lock("another").try_acquire().await.unwrap();
        let other = other.expect("another key is free");
        let session_other = keeper
            .advisory_lock("a third")
            .session()
            .try_acquire()
            .await
            .unwrap()
            .expect("a third key is free");
        let pids = [
            Some(holder),
            other.backend_pid(),
            session_other.backend_pid(),
        ];
        assert!(
            pids.iter().all(Option::is_some)
                && pids[0] != pids[1]
                && pids[1] != pids[2]
                && pids[0] != pids[2],
            "{pids:?}"
        );
        // B still uses its connection, so that the one which gets the key next is another one than A's.
        drop(session_other);
        drop((xact, session));
        let waits = keeper.advisory_lock("k").wait(Duration::from_secs(5));
        let after = waits.acquire().await.unwrap();
        assert_eq!(scene.holders("k").await, [after.backend_pid().unwrap()]);
        after.rollback().await;
        other.rollback().await;
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_gets_the_key_when_its_holder_ends_in_any_way() {
    let scene = Scene::new(2).await;
    for end in ["drop", "commit", "rollback", "session drop", "release"] {
        let keeper = scene.keeper.clone();
        let (xact, session) = if matches!(end, "session drop" | "release") {
            let lock = keeper.advisory_lock("k").session();
            (None, Some(lock.acquire().await.unwrap()))
        } else {
            (
                Some(keeper.advisory_lock("k").acquire().await.unwrap()),
                None,
            )
        };
        let holder = scene.holders("k").await;
        let waiter = tokio::spawn(async move {
            let guard = keeper
                .advisory_lock("k")
                .wait(Duration::from_secs(20))
                .acquire()
                .await
                .unwrap();
            let pid = guard.backend_pid().unwrap();
            guard.commit().await.unwrap();
            pid
        });
        scene.until_awaited("k").await;
        assert!(!waiter.is_finished());
        match (xact, session) {
            (Some(guard), _) if end == "drop" => drop(guard),
            (Some(guard), _) if end == "commit" => guard.commit().await.unwrap(),
            (Some(guard), _) => guard.rollback().await,
            (_, Some(guard)) if end == "release" => guard.release().await.unwrap(),
            (_, guard) => drop(guard),
        }
        let pid = tokio::time::timeout(Duration::from_secs(5), waiter)
            .await
            .expect("it gets the key soon")
            .unwrap();
        assert_ne!([pid], *holder, "{end}: another backend");
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn the_next_holder_sees_what_the_last_one_committed() {
    let scene = scene_with_notes(2).await;
    let first = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    first
        .execute("INSERT INTO note VALUES (1)", &[])
        .await
        .unwrap();
    let next = tokio::spawn({
        let keeper = scene.keeper.clone();
        async move {
            keeper
                .with_advisory_lock("k", async |tx| {
                    let row = tx.query_one("SELECT count(*) FROM note", &[]).await?;
                    Ok::<i64, AppError>(row.get(0))
                })
                .await
                .unwrap()
        }
    });
    scene.until_awaited("k").await;
    first.commit().await.unwrap();
    assert_eq!(next.await.unwrap(), 1);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_guard_frees_its_key_at_once_and_its_connection_is_kept() {
    let scene = Scene::new(1).await;
    let client = scene.database.connect().await;
    for scope in ["transaction", "session", "several", "shared session"] {
        let (mut took, mut plain) = (Vec::new(), Vec::new());
        let mut pids = Vec::new();
        for _ in 0..15 {
            plain.push(scene.time_of_release_by_sql(&client).await);
            let lock = scene.keeper.advisory_locks(["k", "l"]);
            let session = |lock: lockkeeper::AdvisoryLock| async move {
                let guard = lock.session().acquire().await.unwrap();
                (guard.backend_pid(), Some(guard))
            };
            let (pid, xact, session) = match scope {
                "transaction" => {
                    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
                    (guard.backend_pid(), Some(guard), None)
                }
                "several" => {
                    let guard = lock.acquire().await.unwrap();
                    (guard.backend_pid(), Some(guard), None)
                }
                "session" => {
                    let (pid, guard) = session(scene.keeper.advisory_lock("k")).await;
                    (pid, None, guard)
                }
                _ => {
                    let (pid, guard) = session(lock.shared()).await;
                    (pid, None, guard)
                }
            };
            assert!(scene.is_held("k").await);
            pids.push(pid.unwrap());
            let dropped = Instant::now();
            drop((xact, session));
            // A machine that stands still for a while is no bug of ours: the median judges.
            took.push(scene.time_until_no_advisory_lock(dropped).await);
        }
        let (took, plain) = (median(took), median(plain));
        let most = Duration::from_millis(50) + plain;
        assert!(took < most, "{scope}: {took:?} and not {plain:?}");
        let same = scene.next_pid().await;
        assert!(pids.iter().all(|pid| *pid == same), "{scope}: {pids:?}");
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn a_guard_tells_what_it_holds() {
    let scene = Scene::new(2).await;
    let guard = scene
        .keeper
        .advisory_lock("k")
        .shared()
        .acquire()
        .await
        .unwrap();
    assert_eq!(guard.mode().to_string(), "ShareLock");
    assert_eq!(guard.held_keys().collect::<Vec<_>>(), [&LockKey::from("k")]);
    assert_eq!(
        guard.backend_pid().map(|pid| vec![pid]),
        Some(scene.holders("k").await)
    );
    drop(guard);
    let lock = scene.keeper.advisory_lock(7).session();
    let guard = lock.acquire().await.unwrap();
    assert_eq!(guard.mode().to_string(), "ExclusiveLock");
    assert_eq!(guard.held_keys(), [LockKey::from(7)]);
    assert!(!guard.is_lost());
    drop(guard);
    scene.nothing_left().await;
}
