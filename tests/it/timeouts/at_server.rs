//! A wait at the server: one, of its full length, in the server's own queue.

use std::time::Duration;

use lockkeeper::{ErrorKind, Keeper, LockKey};
use lockkeeper_testkit::{
    CLEANED_UP_WITHIN, ENDLESS, Scene, Server, assert_error, eventually, in_time_of, until_waiting,
};

use super::{SCOPES, Scope, ms, take, timed_out};

/// What is seen of the one waiter for a key: when its wait began, and its name.
async fn seen(scene: &Scene, pid: i32) -> (Option<f64>, String) {
    let sql = "SELECT extract(epoch FROM l.waitstart)::float8, a.application_name FROM pg_stat_activity a \
               LEFT JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted WHERE a.pid = $1";
    let row = scene.observer.query_one(sql, &[&pid]).await.unwrap();
    (row.get(0), row.get(1))
}

/// The settings of the role do not end it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_keeps_its_place_and_writes_one_entry() {
    let server = Server::start(&[("deadlock_timeout", "5s")]).unwrap();
    let asked = ms(3_000);
    for scope in SCOPES {
        let scene = Scene::on(&server, 4).await;
        scene.set("statement_timeout", "900ms").await;
        scene.set("lock_timeout", "300ms").await;
        if server.major() >= 17 {
            scene.set("transaction_timeout", "1s").await;
        }
        scene.pool_is_whole_within(Duration::from_secs(30)).await;
        let key = LockKey::from(540);
        let holder = scene.holder(&key).await;
        let logged = server.log_len();
        let (keeper, waited_for) = (scene.keeper.clone(), key.clone());
        let call = tokio::spawn(async move { take(&keeper, scope, waited_for, asked).await });
        let waiter = scene.until_awaited(&key).await;
        let (began, name) = seen(&scene, waiter).await;
        let mut looks = 0;
        while !call.is_finished() {
            tokio::time::sleep(ms(20)).await;
            let (still, its_name) = seen(&scene, waiter).await;
            if still.is_some() {
                assert_eq!((still, &its_name), (began, &name), "{scope:?}");
                looks += 1;
            }
        }
        assert!(looks > 20, "{scope:?}: seen {looks} times only");
        let error = timed_out(call.await.unwrap());
        assert!(error.waited().unwrap() >= asked, "{scope:?}: {error}");
        assert_eq!(error.blockers()[0].pid(), Some(holder.pid), "{scope:?}");
        let log = server.log_since(logged);
        let entries = |of: &str| log.lines().filter(|line| line.contains(of)).count();
        assert_eq!(entries("ERROR:"), 1, "{scope:?}: {log}");
        assert_eq!(entries("lock timeout"), 1, "{scope:?}: {log}");
        assert_eq!(scene.show("lock_timeout").await, "300ms");
        assert_eq!(scene.show("statement_timeout").await, "900ms");
        drop(holder);
        scene.nothing_left().await;
    }
}

/// What a wait changes in its transaction is as it was when it has been granted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_are_put_back_after_a_wait() {
    let settings = [
        "lock_timeout",
        "statement_timeout",
        "client_connection_check_interval",
    ];
    for scope in [Scope::Xact, Scope::Later] {
        let scene = Scene::new(4).await;
        scene.set("statement_timeout", "70s").await;
        scene.set("client_connection_check_interval", "9s").await;
        scene.pool_is_whole_within(Duration::from_secs(30)).await;
        let key = LockKey::from(541);
        let holder = scene.holder(&key).await;
        let (keeper, waited_for) = (scene.keeper.clone(), key.clone());
        let call = tokio::spawn(async move { take(&keeper, scope, waited_for, ENDLESS).await });
        let _ = scene.until_awaited(&key).await;
        drop(holder);
        let super::Guard::Xact(guard) = call.await.unwrap().unwrap() else {
            panic!("{scope:?} takes a transaction's lock");
        };
        let mut now = Vec::new();
        for setting in settings {
            let row = guard
                .query_one(&format!("SHOW {setting}"), &[])
                .await
                .unwrap();
            now.push(row.get::<_, String>(0));
        }
        assert_eq!(now, ["0", "70s", "9s"], "{scope:?}");
        guard.rollback().await;
        scene.nothing_left().await;
    }
}

/// A set that waits for one key while it holds another: the server sees the cycle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_of_a_set_is_found_at_once() {
    for session in [false, true] {
        let scene = Scene::new(4).await;
        // Each looks once, so long after its wait began. The one that finds it is the library's.
        scene.set("deadlock_timeout", "3s").await;
        scene.pool_is_whole_within(Duration::from_secs(30)).await;
        let other = scene.holder(543).await;
        other.run("SET deadlock_timeout = '1h'").await;
        let locks = scene.keeper.advisory_locks([542, 543]).wait(ENDLESS);
        let call = tokio::spawn(async move {
            match session {
                true => locks.session().acquire().await.map(drop),
                false => locks.acquire().await.map(drop),
            }
        });
        let _ = scene.until_awaited(543).await;
        let closing = other.start("SELECT pg_advisory_lock(542)");
        let error = in_time_of(CLEANED_UP_WITHIN, "the deadlock is not found", call);
        assert_error(
            &error.await.unwrap().unwrap_err(),
            ErrorKind::Deadlock,
            "542",
        );
        drop(closing);
        drop(other);
        scene.nothing_left().await;
    }
}

/// One question for all, at a stated pace; none once nobody waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_waiters_ask_one_question() {
    let server = Server::start(&[("log_statement", "all"), ("deadlock_timeout", "1s")]).unwrap();
    let scene = Scene::on(&server, 16).await;
    let key = LockKey::from(546);
    let holder = scene.holder(&key).await;
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let lock = scene.keeper.advisory_lock(&key).wait(ENDLESS);
            tokio::spawn(async move { drop(lock.acquire().await) })
        })
        .collect();
    scene.until_awaited_by(2, &key).await;
    scene.until_awaited_for(Duration::from_secs(2), &key).await;
    let questions = |since: usize| {
        let log = server.log_since(since);
        log.lines()
            .filter(|line| line.contains("AS is_free"))
            .count()
    };
    // By the server's own clock, which starts and ends with a question, so that a slow machine asks less.
    let started = server.log_len();
    scene.until_awaited_for(Duration::from_secs(8), &key).await;
    let asked = questions(started);
    assert!((1..=13).contains(&asked), "asked {asked} times in 6 s");
    drop(holder);
    for call in calls {
        call.await.unwrap();
    }
    scene.nothing_left().await;
    let ended = server.log_len();
    let later = scene.session().await;
    later.run("SELECT pg_sleep(2)").await;
    assert!(questions(ended) <= 1, "asked though nobody waits");
}

/// A waiter that holds up nobody's build stays where it is, though others stand behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_merely_queues_behind_a_waiter_moves_nobody() {
    let scene = Scene::new(4).await;
    let key = LockKey::from(547);
    let holder = scene.holder(&key).await;
    let lock = scene.keeper.advisory_lock(&key).wait(ENDLESS);
    let call = tokio::spawn(async move { lock.acquire().await.map(drop) });
    let waiter = scene.until_awaited(&key).await;
    let behind = scene.session().await;
    let queued = behind.start("SELECT pg_advisory_lock(547)");
    until_waiting(&scene.observer, behind.pid).await;
    let (began, _) = seen(&scene, waiter).await;
    eventually("not watched for long enough", async || {
        let (still, _) = seen(&scene, waiter).await;
        assert_eq!(still, began);
        let sql = "SELECT extract(epoch FROM clock_timestamp())::float8 - $1 > 2.5";
        let row = scene
            .observer
            .query_one(sql, &[&began.unwrap()])
            .await
            .unwrap();
        row.get(0)
    })
    .await;
    drop(holder);
    call.await.unwrap().unwrap();
    drop(queued);
    drop(behind);
    scene.nothing_left().await;
}

/// Several keepers are several processes to the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keepers_are_served_in_the_order_in_which_they_asked() {
    let scene = Scene::new(2).await;
    scene.set("deadlock_timeout", "5s").await;
    let key = LockKey::from(548);
    let holder = scene.holder(&key).await;
    let order = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut calls = Vec::new();
    for n in 0..8 {
        let keeper = Keeper::builder(scene.database.pool(2))
            .application("test")
            .build();
        let lock = keeper.advisory_lock(&key).wait(ENDLESS);
        let order = order.clone();
        calls.push(tokio::spawn(async move {
            let guard = lock.acquire().await.unwrap();
            order.lock().unwrap().push(n);
            guard.commit().await.unwrap();
        }));
        scene.until_awaited_by(n + 1, &key).await;
    }
    // Longer than any slice was.
    scene.until_awaited_for(Duration::from_secs(2), &key).await;
    drop(holder);
    for call in calls {
        in_time_of(CLEANED_UP_WITHIN, "a waiter is stuck", call)
            .await
            .unwrap();
    }
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
    scene.nothing_left().await;
}
