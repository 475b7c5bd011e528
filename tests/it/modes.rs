//! Shared and exclusive: which mode excludes which, and that a mode is never changed silently.

use std::time::Duration;

use lockkeeper::{AdvisoryMode, Error, ErrorKind, LockKey};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, Scene, assert_error, eventually, eventually_within, lock_by_sql, pid_of,
    sql_key,
};

async fn modes_of(scene: &Scene) -> Vec<(i32, String, bool)> {
    let rows = scene
        .observer
        .query(
            "SELECT pid, mode, granted FROM pg_locks WHERE locktype = 'advisory' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1, 2",
            &[],
        )
        .await
        .unwrap();
    rows.iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect()
}

/// A lock held through the keeper in any scope and mode.
#[derive(Debug)]
enum Guard {
    Xact(lockkeeper::XactGuard),
    Session(lockkeeper::SessionGuard),
}

impl Guard {
    fn pid(&self) -> i32 {
        match self {
            Self::Xact(guard) => guard.backend_pid(),
            Self::Session(guard) => guard.backend_pid(),
        }
        .unwrap()
    }

    fn mode(&self) -> AdvisoryMode {
        match self {
            Self::Xact(guard) => guard.mode(),
            Self::Session(guard) => guard.mode(),
        }
    }
}

async fn try_lock(
    scene: &Scene,
    key: &LockKey,
    session: bool,
    mode: AdvisoryMode,
) -> Option<Guard> {
    let mut lock = scene.keeper.advisory_lock(key);
    if mode == AdvisoryMode::Shared {
        lock = lock.shared();
    }
    if session {
        let lock = lock.session();
        lock.try_acquire().await.unwrap().map(Guard::Session)
    } else {
        lock.try_acquire().await.unwrap().map(Guard::Xact)
    }
}

#[tokio::test]
async fn only_shared_goes_with_shared_in_every_scope() {
    const MODES: [AdvisoryMode; 2] = [AdvisoryMode::Shared, AdvisoryMode::Exclusive];
    let scene = Scene::new(3).await;
    for key in [LockKey::from("k"), LockKey::from((-1, 2))] {
        for (first_session, second_session) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            for first_mode in MODES {
                for second_mode in MODES {
                    let first = try_lock(&scene, &key, first_session, first_mode).await;
                    let first = first.expect("it is free");
                    assert_eq!(first.mode(), first_mode);
                    let second = try_lock(&scene, &key, second_session, second_mode).await;
                    let both_shared = (first_mode, second_mode) == (MODES[0], MODES[0]);
                    assert_eq!(
                        second.is_some(),
                        both_shared,
                        "{first_mode} {first_session}, {second_mode} {second_session}"
                    );
                    let mut expected = vec![(first.pid(), first_mode.to_string(), true)];
                    if let Some(second) = &second {
                        assert_ne!(first.pid(), second.pid());
                        expected.push((second.pid(), second_mode.to_string(), true));
                    }
                    expected.sort();
                    assert_eq!(modes_of(&scene).await, expected);
                    drop((first, second));
                    scene.nothing_left().await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_waits_for_the_last_reader_and_readers_for_the_writer() {
    let scene = Scene::new(8).await;
    let keeper = &scene.keeper;
    for session in [false, true] {
        let first = try_lock(&scene, &"k".into(), session, AdvisoryMode::Shared).await;
        let second = try_lock(&scene, &"k".into(), !session, AdvisoryMode::Shared).await;
        let (first, second) = (first.unwrap(), second.unwrap());
        let writer = tokio::spawn({
            let lock = keeper.advisory_lock("k").wait(Duration::from_secs(20));
            async move {
                if session {
                    Guard::Session(lock.session().acquire().await.unwrap())
                } else {
                    Guard::Xact(lock.acquire().await.unwrap())
                }
            }
        });
        scene.until_awaited("k").await;
        let reader = first.pid();
        drop(first);
        eventually_within(CLEANED_UP_WITHIN, "the reader holds on", async || {
            !scene.holders("k").await.contains(&reader)
        })
        .await;
        assert!(!writer.is_finished(), "one reader is still there");
        drop(second);
        let writer = tokio::time::timeout(Duration::from_secs(5), writer)
            .await
            .expect("the last reader is gone")
            .unwrap();
        assert_eq!(
            modes_of(&scene).await,
            [(writer.pid(), "ExclusiveLock".to_owned(), true)]
        );

        let readers: Vec<_> = (0..2)
            .map(|_| {
                let lock = keeper
                    .advisory_lock("k")
                    .shared()
                    .wait(Duration::from_secs(20));
                tokio::spawn(async move { lock.acquire().await.unwrap() })
            })
            .collect();
        scene.until_awaited_by(2, "k").await;
        drop(writer);
        let mut guards = Vec::new();
        for reader in readers {
            guards.push(
                tokio::time::timeout(Duration::from_secs(5), reader)
                    .await
                    .unwrap()
                    .unwrap(),
            );
        }
        assert_eq!(scene.holders("k").await.len(), 2, "both at once");
        drop(guards);
        scene.nothing_left().await;
    }
}

/// Readers that waited for a writer hold the lock at the same time, however many they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_waiting_readers_are_let_in_together() {
    const READERS: usize = 7;
    let scene = Scene::new(READERS + 1).await;
    for session in [false, true] {
        let writer = scene.keeper.advisory_lock("k").acquire().await.unwrap();
        let all_in = std::sync::Arc::new(tokio::sync::Barrier::new(READERS));
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                let lock = scene.keeper.advisory_lock("k").shared();
                let lock = lock.wait(Duration::from_secs(20));
                let all_in = std::sync::Arc::clone(&all_in);
                tokio::spawn(async move {
                    let guard = if session {
                        Guard::Session(lock.session().acquire().await.unwrap())
                    } else {
                        Guard::Xact(lock.acquire().await.unwrap())
                    };
                    all_in.wait().await;
                    guard.pid()
                })
            })
            .collect();
        scene.until_awaited("k").await;
        writer.commit().await.unwrap();
        let mut pids = Vec::new();
        for reader in readers {
            let pid = tokio::time::timeout(Duration::from_secs(10), reader).await;
            pids.push(pid.expect("a reader is kept out").unwrap());
        }
        pids.sort_unstable();
        pids.dedup();
        assert_eq!(pids.len(), READERS);
        scene.nothing_left().await;
    }
}

/// The server's queue is fair: who comes after a waiting writer does not pass it, not even by a `try`.
#[tokio::test]
async fn a_queued_writer_makes_a_new_readers_try_fail() {
    let scene = Scene::new(3).await;
    // A login may take longer than a short wait has for it.
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    let reader = try_lock(&scene, &"k".into(), false, AdvisoryMode::Shared)
        .await
        .unwrap();
    // Queued plainly, so that it can be cancelled plainly.
    let writer = scene.database.connect().await;
    let pid = pid_of(&writer).await;
    let cancel = writer.cancel_token();
    let waiting = tokio::spawn(async move {
        let sql = format!("SELECT pg_advisory_lock({})", sql_key(&"k".into()));
        let result = writer.batch_execute(&sql).await;
        (writer, result)
    });
    eventually("no waiter", async || scene.waiters("k").await == [pid]).await;
    for session in [false, true] {
        let second = try_lock(&scene, &"k".into(), session, AdvisoryMode::Shared).await;
        assert!(second.is_none(), "it passed the writer");
    }
    // A bounded wait names the blocker: the session that queues, not the reader that would share.
    let lock = scene
        .keeper
        .advisory_lock("k")
        .shared()
        .wait(Duration::ZERO);
    let error = lock.acquire().await.unwrap_err();
    assert_error(&error, ErrorKind::LockTimeout, "waits for ExclusiveLock");
    let blockers: Vec<_> = error
        .blockers()
        .iter()
        .map(|blocker| (blocker.pid(), blocker.mode(), blocker.is_holder()))
        .collect();
    assert_eq!(blockers, [(Some(pid), AdvisoryMode::Exclusive, false)]);

    cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let (writer, result) = waiting.await.unwrap();
    result.unwrap_err();
    let second = try_lock(&scene, &"k".into(), true, AdvisoryMode::Shared).await;
    assert!(second.is_some(), "the writer is gone");
    drop((reader, second, writer));
    scene.nothing_left().await;
}

fn assert_says_the_mode(error: &Error, key: &LockKey) {
    assert_error(error, ErrorKind::Config, "held on this connection as");
    assert!(error.key().is_some_and(|named| named.same_lock(key)));
    let text = error.to_string();
    assert!(
        text.contains("ShareLock") && text.contains("ExclusiveLock"),
        "it does not say which mode is held and which was asked for: {text}"
    );
}

#[tokio::test]
async fn asking_a_guard_for_the_other_mode_is_an_error_and_the_transaction_continues() {
    let scene = Scene::new(2).await;
    let keeper = &scene.keeper;
    let key = LockKey::from("k");
    for shared in [true, false] {
        let lock = keeper.advisory_lock(&key);
        let lock = if shared { lock.shared() } else { lock };
        let mut guard = lock.acquire().await.unwrap();
        let before = modes_of(&scene).await;
        macro_rules! other {
            ($keys:expr) => {{
                let lock = guard.advisory_locks($keys);
                if shared { lock } else { lock.shared() }
            }};
        }
        assert_says_the_mode(&other!([&key]).await.unwrap_err(), &key);
        assert_says_the_mode(&other!([&key]).try_acquire().await.unwrap_err(), &key);
        let set = [LockKey::from("a new one"), key.clone()];
        assert_says_the_mode(&other!(&set).await.unwrap_err(), &key);
        // By its number it is the same lock.
        let number = LockKey::from(key.as_i64().unwrap());
        assert_says_the_mode(&other!([&number]).await.unwrap_err(), &key);
        assert_eq!(
            modes_of(&scene).await,
            before,
            "nothing was taken or changed"
        );

        guard.query_one("SELECT 1", &[]).await.unwrap();
        // The same mode again is fine, and changes nothing.
        let again = guard.advisory_lock(&key);
        let again = if shared { again.shared() } else { again };
        again.await.unwrap();
        assert_eq!(modes_of(&scene).await, before);
        assert_eq!(guard.held_keys().count(), 1);
        guard.commit().await.unwrap();
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn a_mode_is_not_changed_in_a_section_or_across_savepoints() {
    let scene = Scene::new(2).await;
    let key = LockKey::from("k");
    scene
        .keeper
        .with_advisory_lock(&key, async |tx| {
            assert_says_the_mode(&tx.advisory_lock(&key).shared().await.unwrap_err(), &key);
            tx.advisory_lock("second").shared().await?;
            let second = LockKey::from("second");
            let error = tx
                .savepoint(async |tx| tx.advisory_lock("second").await)
                .await;
            assert_says_the_mode(&error.unwrap_err(), &second);
            // What a savepoint took in one mode and returned can be taken in the other.
            let failed = tx.savepoint(async |tx| {
                tx.advisory_lock("third").shared().await?;
                tx.query("SELECT 1/0", &[]).await?;
                Ok::<_, Error>(())
            });
            failed.await.unwrap_err();
            tx.advisory_lock("third").await?;
            // What it took and kept cannot.
            tx.savepoint(async |tx| tx.advisory_lock("fourth").await)
                .await?;
            let fourth = LockKey::from("fourth");
            let error = tx.advisory_lock("fourth").shared().await.unwrap_err();
            assert_says_the_mode(&error, &fourth);
            let modes: Vec<_> = modes_of(&scene)
                .await
                .into_iter()
                .map(|(_, mode, _)| mode)
                .collect();
            assert_eq!(
                modes,
                [
                    "ExclusiveLock",
                    "ExclusiveLock",
                    "ExclusiveLock",
                    "ShareLock"
                ]
            );
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    scene.nothing_left().await;
}

/// Two sessions that each turn a shared lock into an exclusive one wait for each other for ever.
#[tokio::test]
async fn a_session_guards_lock_is_not_upgraded_by_a_transaction_on_it() {
    let scene = Scene::new(2).await;
    let key = LockKey::from("k");
    for shared in [true, false] {
        let lock = scene.keeper.advisory_lock(&key).session();
        let lock = if shared { lock.shared() } else { lock };
        let mut guard = lock.acquire().await.unwrap();
        let before = modes_of(&scene).await;
        guard
            .transaction(async |tx| {
                let other = tx.advisory_lock(&key);
                let other = if shared { other } else { other.shared() };
                let error = other.await.expect_err("the mode was changed silently");
                assert_says_the_mode(&error, &key);
                // The same mode again is fine.
                let again = tx.advisory_lock(&key);
                if shared { again.shared() } else { again }.await?;
                assert_eq!(modes_of(&scene).await, before);
                tx.query_one("SELECT 1", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        assert_eq!(modes_of(&scene).await, before, "held on");
        guard.release().await.unwrap();
        scene.nothing_left().await;
    }
}

#[tokio::test]
async fn the_description_takes_its_parts_in_any_order() {
    let scene = Scene::new(2).await;
    // A login may take longer than a short wait has for it.
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    let keeper = &scene.keeper;
    let holder = scene.database.connect().await;
    lock_by_sql(&holder, "k").await;
    let wait = Duration::from_millis(50);
    let lock = || keeper.advisory_lock("k");
    for lock in [
        lock().session().shared().wait(wait),
        lock().session().wait(wait).shared(),
        lock().shared().session().wait(wait),
        lock().wait(wait).session().shared(),
        lock().shared().wait(wait).session(),
        lock().wait(wait).shared().session(),
    ] {
        let error = lock.acquire().await.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, r#""k" after"#);
        assert!(error.waited().unwrap() < Duration::from_secs(5));
    }
    drop(holder);
    eventually_within(CLEANED_UP_WITHIN, "still held", async || {
        !scene.is_held("k").await
    })
    .await;
    let guard = lock()
        .wait(wait)
        .shared()
        .session()
        .acquire()
        .await
        .unwrap();
    assert_eq!(guard.mode(), AdvisoryMode::Shared);
    let other = lock().session().shared().try_acquire().await.unwrap();
    assert!(other.is_some());
    drop((guard, other));
    scene.nothing_left().await;
}
