//! How many of one keeper wait at the server, and who of them: a quarter of the pool, in turn.

use std::time::Duration;

use futures::future::join_all;
use lockkeeper::{Error, ErrorKind, Keeper, LockKey, TransactionOptions, Tx};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Scene, Session, assert_error, eventually, in_time, is_pending,
    lock_by_sql, poll_times_and_drop, unlock_by_sql,
};
use tokio::task::JoinHandle;
use tokio_postgres::{IsolationLevel, NoTls};

/// A waiter that keeps its place at the server: a conflict group's wait is a single one.
pub(super) async fn occupy(scene: &Scene, key: &'static str) -> JoinHandle<Result<(), Error>> {
    let keeper = scene.keeper.clone();
    let options = TransactionOptions::new().conflict_group(key);
    let waiting = tokio::spawn(async move {
        let nothing = async |_: &mut Tx| Ok::<_, Error>(());
        keeper.transaction_with(options, nothing).await
    });
    scene.until_awaited(key).await;
    waiting
}

/// One whose waiters are watched over the side connection, so that the pool is for them alone.
async fn endless(pool_size: usize) -> Scene {
    let mut scene = Scene::new(pool_size).await;
    let side = scene.database.config();
    let builder = scene.builder().lock_wait(ENDLESS);
    scene.keeper = builder.side_connection(side, NoTls).build();
    scene.pool_is_whole_within(CLEANED_UP_WITHIN).await;
    scene
}

/// A session without the library that holds the keys.
async fn holder_of(scene: &Scene, keys: impl IntoIterator<Item = i64>) -> Session {
    let session = scene.session().await;
    for key in keys {
        lock_by_sql(&session.client, key).await;
    }
    session
}

/// Takes a key, in another way for each, and lets it go.
async fn take(keeper: Keeper, key: i64, wait: Duration) -> Result<(), Error> {
    let lock = keeper.advisory_lock(key).wait(wait);
    match key % 4 {
        0 => lock.acquire().await?.commit().await,
        1 => lock.session().acquire().await?.release().await,
        2 => lock.shared().session().acquire().await?.release().await,
        _ => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await?.commit().await
        }
    }
}

fn spawn_take(scene: &Scene, key: i64) -> JoinHandle<Result<(), Error>> {
    tokio::spawn(take(scene.keeper.clone(), key, ENDLESS))
}

async fn done(task: JoinHandle<Result<(), Error>>) {
    in_time("not granted", task).await.unwrap().unwrap();
}

fn in_use(scene: &Scene) -> usize {
    let status = scene.pool.status();
    status.size - status.available
}

fn is_queue(scene: &Scene, shown: &str) -> bool {
    let lock = scene.keeper.advisory_lock(0);
    format!("{lock:?}").contains(&format!("WaitQueue {{ {shown}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_for_many_keys_leave_most_of_the_pool_to_others() {
    let scene = endless(8).await;
    let others = holder_of(&scene, 0..40).await;
    let own = scene.keeper.advisory_lock("own").acquire().await.unwrap();
    let crowd: Vec<_> = (0..40).map(|key| spawn_take(&scene, key)).collect();
    // All have tried. What is in use is the guard's, the two at the server, those who change places with them, and a look's.
    let mut calm = 0;
    eventually("the waiters have the pool", async || {
        calm = if in_use(&scene) <= 3 { calm + 1 } else { 0 };
        calm == 20
    })
    .await;
    for _ in 0..200 {
        assert!(scene.lock_waiters().await <= 2);
        assert!(in_use(&scene) <= 6, "{:?}", scene.pool.status());
        assert_eq!(scene.pool.status().waiting, 0);
        // What a holder needs beside its own.
        let object = tokio::time::timeout(CLEANED_UP_WITHIN, scene.pool.get()).await;
        let object = object.expect("the pool is taken").unwrap();
        object.batch_execute("SELECT 1").await.unwrap();
    }
    own.commit().await.unwrap();
    drop(others);
    for waiter in crowd {
        done(waiter).await;
    }
    scene.nothing_left().await;
}

/// Its key is free while the places are taken for others, for as long as those wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_others_release_is_taken_without_a_place() {
    let scene = endless(8).await;
    let _a = scene.holder("a").await;
    let _b = scene.holder("b").await;
    let occupying = [occupy(&scene, "a").await, occupy(&scene, "b").await];
    for key in 0..4 {
        let holder = holder_of(&scene, [key]).await;
        let waiter = spawn_take(&scene, key);
        let behind = spawn_take(&scene, key);
        eventually("it has a connection", async || in_use(&scene) == 2).await;
        unlock_by_sql(&holder.client, key).await;
        done(waiter).await;
        done(behind).await;
        assert_eq!(scene.lock_waiters().await, 2);
    }
    // All keys of a set.
    let (first, second) = (holder_of(&scene, [4]).await, holder_of(&scene, [5]).await);
    let set = scene.keeper.advisory_locks([4_i64, 5]);
    let set = tokio::spawn(async move { set.acquire().await?.commit().await });
    unlock_by_sql(&first.client, 4).await;
    unlock_by_sql(&second.client, 5).await;
    done(set).await;
    for waiting in occupying {
        waiting.abort();
        drop(waiting.await);
    }
    drop((_a, _b));
    scene.nothing_left().await;
}

/// A key may never be free for long enough to be seen, so each is waited for at the server in its turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiters_of_different_keys_take_turns_at_the_server() {
    let scene = endless(4).await;
    let others = holder_of(&scene, 0..2).await;
    let first = spawn_take(&scene, 0);
    scene.until_awaited(0).await;
    let second = spawn_take(&scene, 1);
    // Not before the first has had its turn of ten seconds.
    scene.until_awaited_for(Duration::from_secs(5), 0).await;
    assert!(scene.waiters(1).await.is_empty(), "there is one place");
    for key in [1, 0] {
        scene.until_awaited(key).await;
    }
    drop(others);
    done(first).await;
    done(second).await;
    scene.nothing_left().await;
}

/// The waiter for what the section holds has the only place, and can get it only after the section has got another key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_does_not_starve_behind_its_own_waiters() {
    let scene = endless(4).await;
    let other = holder_of(&scene, [2]).await;
    let keeper = scene.keeper.clone();
    let (held, is_held) = tokio::sync::oneshot::channel();
    let section = tokio::spawn(async move {
        let first = keeper.advisory_lock(0).acquire().await?;
        held.send(()).unwrap();
        let second = keeper.advisory_lock(2).acquire().await?;
        second.commit().await?;
        first.commit().await
    });
    is_held.await.unwrap();
    let waiters = [spawn_take(&scene, 0), spawn_take(&scene, 0)];
    // The section's own wait may have come first: they take turns.
    scene.until_awaited(0).await;
    unlock_by_sql(&other.client, 2).await;
    done(section).await;
    for waiter in waiters {
        done(waiter).await;
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sections_that_wait_for_one_another_time_out() {
    let scene = endless(4).await;
    let [a, b] = [0, 4].map(|key| scene.keeper.advisory_lock(key));
    let (a, b) = (a.acquire().await.unwrap(), b.acquire().await.unwrap());
    let wait = Duration::from_millis(300);
    let for_b = take(scene.keeper.clone(), 4, wait);
    let for_a = take(scene.keeper.clone(), 0, wait);
    for outcome in join_all([for_b, for_a]).await {
        assert_error(&outcome.unwrap_err(), ErrorKind::LockTimeout, " after ");
    }
    drop((a, b));
    scene.nothing_left().await;
}

/// At the server, in line, and for a connection: to the waiter it is the lock that did not come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_ends_is_a_lock_timeout_wherever_it_ends() {
    let scene = endless(8).await;
    let others = holder_of(&scene, 0..40).await;
    let wait = Duration::from_millis(700);
    let crowd = (0..40).map(|key| take(scene.keeper.clone(), key, wait));
    for (key, outcome) in (0..).zip(join_all(crowd).await) {
        let error = outcome.unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "lock not granted in time");
        assert_eq!(error.key(), Some(&LockKey::from(key)));
        assert!(error.waited().unwrap() >= wait);
    }
    // Those who stand in line, and one of them that is told to try, find no connection.
    let _busy = scene.holder("a").await;
    let occupying = [occupy(&scene, "a").await, occupy(&scene, "a").await];
    scene.until_awaited_by(2, "a").await;
    let own = scene.keeper.advisory_lock(40).acquire().await.unwrap();
    let wait = Duration::from_secs(2);
    let waiters = [0, 2, 3, 40].map(|key| tokio::spawn(take(scene.keeper.clone(), key, wait)));
    eventually("they do not wait in line", async || {
        is_queue(&scene, "lines: 5, at_server: 2") && in_use(&scene) == 3
    })
    .await;
    let mut rest = join_all((3..8).map(|_| scene.pool.get())).await;
    let mut last = Box::pin(scene.pool.get());
    assert!(is_pending(&mut last).await);
    own.commit().await.unwrap();
    rest.push(last.await);
    drop(others);
    for waiter in waiters {
        let error = waiter.await.unwrap().unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "lock not granted in time");
    }
    drop(rest);
    for waiting in occupying {
        waiting.abort();
        drop(waiting.await);
    }
    drop(_busy);
    scene.nothing_left().await;
}

/// Without a side connection they are watched over one of the pool, where that has enough; it goes back after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_watch_takes_one_connection_of_a_pool_that_has_enough() {
    for (pool_size, watched) in [(3, 1), (8, 2)] {
        let scene = Scene::with(pool_size, |builder| builder.lock_wait(ENDLESS)).await;
        let other = scene.holder(0).await;
        let waiter = spawn_take(&scene, 0);
        scene.until_awaited_for(Duration::from_secs(2), 0).await;
        // In a pool of three it is borrowed for each question.
        let is_kept = watched == 2;
        eventually("not that many are in use", async || {
            in_use(&scene) == watched
        })
        .await;
        for _ in 0..20 {
            assert!(!is_kept || in_use(&scene) == watched);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(other);
        done(waiter).await;
        eventually("it is not given back", async || in_use(&scene) == 0).await;
        scene.nothing_left().await;
    }
}

/// Whatever ends a wait, the place at the server is the next one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_place_is_lost() {
    let scene = endless(4).await;
    let others = holder_of(&scene, 0..8).await;
    let keeper = || scene.keeper.clone();
    for batch in 0..250 {
        let short = |n: i64| take(keeper(), n, Duration::from_millis(1 + n.unsigned_abs() % 3));
        for outcome in join_all((0..4).map(short)).await {
            let kind = outcome.unwrap_err().kind();
            assert_eq!(kind, ErrorKind::LockTimeout, "in batch {batch}");
        }
    }
    for polls in 0..12 {
        let dropped = (0..4).map(|key| poll_times_and_drop(take(keeper(), key, ENDLESS), polls));
        assert!(join_all(dropped).await.iter().all(Option::is_none));
    }
    // One that waits at the server, and one whose section panics.
    let at_server = spawn_take(&scene, 0);
    scene.until_awaited(0).await;
    at_server.abort();
    assert!(at_server.await.unwrap_err().is_cancelled());
    let keeper_of_panic = keeper();
    let panicking = tokio::spawn(async move {
        let panic = async |_: &mut Tx| -> Result<(), Error> { panic!("in a section") };
        keeper_of_panic.with_advisory_lock(9, panic).await
    });
    assert!(panicking.await.unwrap_err().is_panic());
    // The only place is to be had, and the lines are empty: a waiter for each key comes to stand at the server.
    for key in 0..4 {
        let waiter = spawn_take(&scene, key);
        scene.until_awaited(key).await;
        unlock_by_sql(&others.client, key).await;
        done(waiter).await;
    }
    assert!(is_queue(&scene, "lines: 0, at_server: 0"));
    drop(others);
    scene.nothing_left().await;
}
