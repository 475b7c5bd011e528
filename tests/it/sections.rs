//! Sections run by a description, with every option that it has.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use lockkeeper::{Error, ErrorKind, TransactionOptions, Tx};
use lockkeeper_testkit::{ENDLESS, GIVE_UP_AFTER, Scene, assert_error, in_time, in_time_of, raise};
use tokio::sync::Barrier;
use tokio_postgres::IsolationLevel;

const KEY: i64 = 830;

/// The advisory locks of this transaction: mode and key.
async fn held(tx: &Tx) -> Result<Vec<(String, i64)>, Error> {
    let sql = "SELECT mode, objid::int8 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() \
               AND granted ORDER BY objid";
    let rows = tx.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn lock(mode: &str, key: i64) -> (String, i64) {
    (mode.to_owned(), key)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_section_holds_what_is_described() {
    let scene = Scene::new(4).await;
    let one = scene
        .keeper
        .advisory_lock(KEY)
        .run(async |tx| held(tx).await);
    assert_eq!(one.await.unwrap(), [lock("ExclusiveLock", KEY)]);
    let set = scene.keeper.advisory_locks([KEY + 1, KEY]).shared();
    let set = set.run(async |tx| held(tx).await).await.unwrap();
    assert_eq!(set, [lock("ShareLock", KEY), lock("ShareLock", KEY + 1)]);
    // Shared ones side by side, which an exclusive one waits for.
    let met = Arc::new(Barrier::new(3));
    let shared = |()| {
        let (lock, met) = (scene.keeper.advisory_lock(KEY).shared(), met.clone());
        tokio::spawn(lock.run(async move |_| {
            met.wait().await;
            met.wait().await;
            Ok::<_, Error>(())
        }))
    };
    let sections = [(), ()].map(shared);
    met.wait().await;
    let busy = scene.keeper.advisory_lock(KEY);
    let never = async |_: &mut Tx| -> Result<(), Error> { panic!("run without the lock") };
    assert!(busy.clone().try_run(never).await.unwrap().is_none());
    let error = busy.wait(Duration::from_millis(20)).run(never).await;
    assert_error(&error.unwrap_err(), ErrorKind::LockTimeout, "830 after");
    met.wait().await;
    for section in sections {
        in_time("the section", section).await.unwrap().unwrap();
    }
    let free = scene
        .keeper
        .advisory_lock(KEY)
        .try_run(async |_| Ok::<_, Error>(7));
    assert_eq!(free.await.unwrap(), Some(7));
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_section_runs_again_unless_once_is_said() {
    let scene = Scene::new(2).await;
    let attempts = Mutex::new(Vec::new());
    let failing = async |tx: &mut Tx| {
        attempts.lock().unwrap().push(tx.attempt());
        tx.batch_execute(&raise("40001")).await?;
        Ok::<_, Error>(())
    };
    let lock = || scene.keeper.advisory_lock(KEY);
    let error = lock().run(failing).await.unwrap_err();
    assert_error(&error, ErrorKind::RetriesExhausted, "5 attempts");
    assert_eq!(
        std::mem::take(&mut *attempts.lock().unwrap()),
        [1, 2, 3, 4, 5]
    );
    let two = TransactionOptions::new().attempts(2);
    let error = lock().options(two.clone()).run(failing).await.unwrap_err();
    assert_error(&error, ErrorKind::RetriesExhausted, "2 attempts");
    assert_eq!(std::mem::take(&mut *attempts.lock().unwrap()), [1, 2]);
    for once in [
        lock().once(),
        lock().options(two.once()),
        lock().once().options(TransactionOptions::new()),
    ] {
        let error = once.run(failing).await.unwrap_err();
        assert_error(&error, ErrorKind::Serialization, "40001");
        assert_eq!(std::mem::take(&mut *attempts.lock().unwrap()), [1]);
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_section_is_begun_with_the_options() {
    let scene = Scene::new(2).await;
    let show = async |tx: &mut Tx| {
        let sql = "SELECT current_setting('transaction_isolation'), current_setting('lock_timeout'), \
                   current_setting('application_name')";
        let row = tx.query_one(sql, &[]).await?;
        Ok::<[String; 3], Error>([row.get(0), row.get(1), row.get(2)])
    };
    let options = || TransactionOptions::new().lock_timeout(Duration::from_secs(3));
    let level = IsolationLevel::RepeatableRead;
    for lock in [
        scene
            .keeper
            .advisory_lock(KEY)
            .options(options().isolation(level)),
        scene
            .keeper
            .advisory_lock(KEY)
            .options(options())
            .isolation(level),
        scene
            .keeper
            .advisory_lock(KEY)
            .isolation(level)
            .options(options()),
    ] {
        let [isolation, lock_timeout, name] = lock.run(show).await.unwrap();
        assert_eq!([&*isolation, &*lock_timeout], ["repeatable read", "3s"]);
        assert!(name.starts_with("test tests/it/sections.rs:"), "{name}");
    }
    // What the caller asks to have repeated.
    let runs = AtomicU32::new(0);
    let odd = scene.keeper.advisory_lock(KEY).options(
        TransactionOptions::new().retry_if(|error: &Error| error.kind() == ErrorKind::Config),
    );
    let odd = odd.run(async |tx| match runs.fetch_add(1, Ordering::Relaxed) {
        0 => tx.advisory_lock(KEY).shared().await,
        _ => Ok(()),
    });
    odd.await.unwrap();
    assert_eq!(runs.into_inner(), 2);
    // Refused before anything is sent.
    let none = scene
        .keeper
        .advisory_lock(KEY)
        .options(TransactionOptions::new().attempts(0));
    let error = none.clone().run(show).await.unwrap_err();
    assert_error(&error, ErrorKind::Config, "attempts is 0");
    assert_error(
        &none.acquire().await.unwrap_err(),
        ErrorKind::Config,
        "attempts is 0",
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_section_joins_its_conflict_group() {
    let scene = Scene::with_two_rows(4).await;
    let group = KEY + 9;
    let options = || TransactionOptions::new().conflict_group(group);
    let lock = || scene.keeper.advisory_lock(KEY).options(options());
    let locks = lock().run(async |tx| held(tx).await).await.unwrap();
    assert_eq!(
        locks,
        [
            self::lock("ExclusiveLock", KEY),
            self::lock("ShareLock", group)
        ]
    );
    // Who has been a victim twice runs alone.
    let alone = Mutex::new(Vec::new());
    let victim = lock().run(async |tx| {
        let mode = held(tx).await?[1].0.clone();
        alone.lock().unwrap().push(mode);
        if tx.attempt() < 4 {
            tx.batch_execute(&raise("40P01")).await?;
        }
        Ok::<_, Error>(())
    });
    victim.await.unwrap();
    let alone = alone.into_inner().unwrap();
    assert_eq!(
        alone,
        ["ShareLock", "ShareLock", "ExclusiveLock", "ExclusiveLock"]
    );
    // A try does not wait for the group either, and gives its own lock back.
    let others = scene.holder(group).await;
    assert!(
        lock()
            .try_run(async |tx| held(tx).await)
            .await
            .unwrap()
            .is_none()
    );
    scene.until_free(KEY).await;
    drop(others);
    let snapshot = lock().isolation(IsolationLevel::Serializable);
    let error = snapshot.run(async |tx| held(tx).await).await.unwrap_err();
    assert_error(&error, ErrorKind::Config, "snapshot");
    scene.nothing_left().await;
}

/// A set in a deadlock with one who takes its keys one by one is tried again, as a transaction's statement is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_between_a_sections_locks_is_retried() {
    let scene = Scene::new(4).await;
    scene.set("deadlock_timeout", "6s").await;
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    let other = scene.session().await;
    // The one that finds it is the library's.
    other.run("SET deadlock_timeout = '1h'").await;
    other
        .run(&format!("BEGIN; SELECT pg_advisory_xact_lock({})", KEY + 1))
        .await;
    let set = scene.keeper.advisory_locks([KEY, KEY + 1]).wait(ENDLESS);
    let section = tokio::spawn(set.run(async |tx| Ok::<_, Error>(tx.attempt())));
    let _ = scene.until_awaited(KEY + 1).await;
    let closing = other.start(&format!("SELECT pg_advisory_xact_lock({KEY}); COMMIT"));
    in_time_of(GIVE_UP_AFTER, "the other", closing)
        .await
        .unwrap()
        .unwrap();
    let attempt = in_time_of(GIVE_UP_AFTER, "the section", section).await;
    assert_eq!(attempt.unwrap().unwrap(), 2);
    scene.nothing_left().await;
}

/// It would wait for itself until its wait is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_the_section_holds_is_refused_on_another_connection() {
    let scene = Scene::with(4, |builder| builder.lock_wait(ENDLESS)).await;
    let keeper = &scene.keeper;
    let nothing = async |_: &mut Tx| Ok::<_, Error>(());
    let section = keeper.advisory_lock(KEY).run(async |tx| {
        let inside = || keeper.advisory_lock(KEY);
        let line = line!() - 1;
        let in_use = keeper_in_use(&scene);
        // Each on the heap: together they are too much for a test's stack.
        let refused: [BoxFuture<'_, Result<(), Error>>; 10] = [
            Box::pin(async { inside().acquire().await.map(drop) }),
            Box::pin(async { inside().try_acquire().await.map(drop) }),
            Box::pin(inside().shared().run(nothing)),
            Box::pin(async { inside().session().acquire().await.map(drop) }),
            Box::pin(async { inside().session().try_acquire().await.map(drop) }),
            Box::pin(async {
                let set = keeper.advisory_locks([KEY - 1, KEY]);
                set.acquire().await.map(drop)
            }),
            Box::pin(keeper.with_advisory_lock(KEY, nothing)),
            Box::pin(async {
                let tried = keeper.try_with_advisory_lock(KEY, nothing);
                tried.await.map(drop)
            }),
            Box::pin(keeper.transaction(async |tx| tx.advisory_lock(KEY).await)),
            Box::pin(keeper.transaction(async |_| inside().run(nothing).await)),
        ];
        for refused in refused {
            let error = refused.await.unwrap_err();
            assert_error(
                &error,
                ErrorKind::AlreadyHeld,
                "the section holds this lock already: 830",
            );
            let text = error.to_string();
            assert_eq!(text.matches("tests/it/sections.rs:").count(), 2, "{text}");
            assert_eq!(error.key(), Some(&KEY.into()));
        }
        let first = inside().acquire().await.unwrap_err().to_string();
        assert!(first.contains(&format!("sections.rs:{line} on")), "{first}");
        assert_eq!(keeper_in_use(&scene), in_use);
        // Its own transaction has it, and takes it again.
        tx.advisory_lock(KEY).await?;
        assert!(tx.advisory_lock(KEY).try_acquire().await?);
        keeper.advisory_lock(KEY + 1).run(nothing).await
    });
    in_time("the section", section).await.unwrap();
    // Afterwards it is free.
    keeper.advisory_lock(KEY).run(nothing).await.unwrap();
    scene.nothing_left().await;
}

fn keeper_in_use(scene: &Scene) -> usize {
    let status = scene.pool.status();
    status.size - status.available
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_section_does_not_hold_is_not_refused() {
    let scene = Scene::new(4).await;
    let keeper = &scene.keeper;
    let nothing = async |_: &mut Tx| Ok::<_, Error>(());
    // Shared inside shared, but not exclusive.
    let shared = keeper.advisory_lock(KEY).shared().run(async |_| {
        keeper.advisory_lock(KEY).shared().run(nothing).await?;
        let exclusive = keeper.advisory_lock(KEY).run(nothing).await.unwrap_err();
        assert_error(&exclusive, ErrorKind::AlreadyHeld, "830");
        Ok::<_, Error>(())
    });
    in_time("shared", shared).await.unwrap();
    // What it has taken later, as long as it has it.
    let transaction = keeper.transaction(async |tx| {
        let rolled_back = tx.savepoint(async |tx| {
            tx.advisory_lock(KEY).await?;
            let held = keeper
                .advisory_lock(KEY)
                .try_run(nothing)
                .await
                .unwrap_err();
            assert_error(&held, ErrorKind::AlreadyHeld, "830");
            Err::<(), Error>(held)
        });
        assert!(rolled_back.await.is_err());
        assert_eq!(keeper.advisory_lock(KEY).try_run(nothing).await?, Some(()));
        Ok::<_, Error>(())
    });
    in_time("the transaction", transaction).await.unwrap();
    // Two of one task, neither inside the other, wait for one another.
    let met = AtomicU32::new(0);
    let one = || {
        keeper.advisory_lock(KEY).run(async |tx| {
            assert_eq!(met.fetch_add(1, Ordering::SeqCst), 0, "two holders");
            tx.query_one("SELECT pg_sleep(0.05)", &[]).await?;
            met.fetch_sub(1, Ordering::SeqCst);
            Ok::<_, Error>(())
        })
    };
    let (a, b) = in_time("both", async { tokio::join!(one(), one()) }).await;
    a.unwrap();
    b.unwrap();
    // A task of its own is not inside: it waits.
    let spawned = keeper.advisory_lock(KEY).run(async |_| {
        let lock = keeper.advisory_lock(KEY).wait(Duration::from_millis(20));
        let error = tokio::spawn(lock.run(nothing)).await.unwrap().unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "830 after");
        Ok::<_, Error>(())
    });
    in_time("the spawned one", spawned).await.unwrap();
    scene.nothing_left().await;
}
