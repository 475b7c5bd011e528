//! Pools whose connections come back dirty or dead.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use lockkeeper::tokio_postgres::{IsolationLevel, NoTls};
use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Proxy, Scene, Server, assert_error, eventually, until_closed,
};

use super::ids;

/// Every way to begin something, each of which inserts row 20.
const CALLS: [&str; 10] = [
    "transaction",
    "serializable",
    "read write",
    "with lock",
    "try with lock",
    "guard",
    "repeatable read guard",
    "several",
    "session",
    "several session",
];

/// The backend on which it was done; `None` where a `try` found the lock busy.
async fn call(keeper: &Keeper, how: &str) -> Result<Option<i32>, Error> {
    const INSERT: &str = "INSERT INTO t VALUES (20, 0)";
    let body = async |tx: &mut Tx| {
        tx.execute(INSERT, &[]).await?;
        Ok::<_, Error>(tx.backend_pid())
    };
    let options = TransactionOptions::new();
    let one = || keeper.advisory_lock("dirty");
    let three = || keeper.advisory_locks(["dirty", "more", "most"]);
    let guard = match how {
        "transaction" => return keeper.transaction(body).await,
        "serializable" => {
            let options = options.isolation(IsolationLevel::Serializable);
            return keeper.transaction_with(options, body).await;
        }
        "read write" => {
            let options = options.read_only(false).deferrable(true);
            return keeper.transaction_with(options, body).await;
        }
        "with lock" => return keeper.with_advisory_lock("dirty", body).await,
        "try with lock" => {
            let ran = keeper.try_with_advisory_lock("dirty", body).await?;
            return Ok(ran.flatten());
        }
        "session" | "several session" => {
            let lock = if how == "session" { one() } else { three() };
            let guard = lock.session().acquire().await?;
            let pid = guard.backend_pid();
            guard.execute(INSERT, &[]).await?;
            guard.release().await?;
            return Ok(pid);
        }
        "guard" => one().acquire().await?,
        "several" => three().acquire().await?,
        _ => {
            let lock = one().isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await?
        }
    };
    let pid = guard.backend_pid();
    guard.execute(INSERT, &[]).await?;
    guard.commit().await?;
    Ok(pid)
}

/// What other code may leave on a connection. None of it may be committed, and nothing of ours may be inside it.
const DIRT: [&str; 5] = [
    "BEGIN; INSERT INTO t VALUES (10, 0)",
    "BEGIN; INSERT INTO t VALUES (10, 0); SELECT 1/0",
    "BEGIN",
    "BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO t VALUES (10, 0)",
    "BEGIN READ ONLY; SELECT count(*) FROM t",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_ours_runs_in_a_transaction_that_others_left_open() {
    let scene = Scene::with_two_rows(2).await;
    let clean = ManagerConfig {
        recycling_method: RecyclingMethod::Clean,
    };
    let clean = Manager::from_config(scene.database.config(), NoTls, clean);
    let clean = Pool::builder(clean).max_size(2).build().unwrap();
    let pools = [(&scene.pool, &DIRT[..]), (&clean, &DIRT[..1])];
    let mut wrong = Vec::new();
    for (pool, dirts) in pools {
        let keeper = Keeper::new(pool.clone());
        for (how, dirt) in CALLS
            .iter()
            .flat_map(|how| dirts.iter().map(move |dirt| (*how, *dirt)))
        {
            scene
                .observer
                .batch_execute("DELETE FROM t WHERE id > 2")
                .await
                .unwrap();
            let mut dirty = Vec::new();
            let objects = [pool.get().await.unwrap(), pool.get().await.unwrap()];
            for (n, object) in objects.iter().enumerate() {
                let row = object.query_one("SELECT pg_backend_pid()", &[]).await;
                dirty.push(row.unwrap().get::<_, i32>(0));
                // The second one would wait for the row of the first: it has one of its own.
                drop(
                    object
                        .batch_execute(&dirt.replace("10", &format!("1{n}")))
                        .await,
                );
            }
            drop(objects);
            match call(&keeper, how).await {
                Ok(Some(pid)) => assert!(!dirty.contains(&pid), "{how} after {dirt}"),
                Ok(None) => wrong.push(format!("{how} after {dirt}: a free lock is busy")),
                Err(error) => wrong.push(format!("{how} after {dirt}: {error:?}")),
            }
            // The pool may have kept a dirty one, whose leak is not ours to end; it must not be committed.
            drop(pool.retain(|_, _| false));
            scene.nothing_left().await;
            let mut left = ids(&scene).await;
            left.retain(|id| *id != 20);
            if left != [1, 2] {
                wrong.push(format!(
                    "{how} after {dirt}: committed what others left open: {left:?}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What a try gets inside a transaction that was left open does not block the next try.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dirty_connection_does_not_make_a_free_lock_busy() {
    let scene = Scene::new(4).await;
    let mut busy = Vec::new();
    for round in 0..30 {
        let mut all = Vec::new();
        for _ in 0..4 {
            let object = scene.pool.get().await.unwrap();
            // A large transaction takes its time to end when its connection is closed.
            object
                .batch_execute("BEGIN; CREATE TEMP TABLE leak AS SELECT generate_series(1, 20000)")
                .await
                .unwrap();
            all.push(object);
        }
        drop(all);
        let lock = scene.keeper.advisory_lock("k");
        let taken = match round % 3 {
            0 => lock.try_acquire().await.unwrap().map(drop),
            1 => lock.session().try_acquire().await.unwrap().map(drop),
            _ => lock.wait(Duration::ZERO).acquire().await.ok().map(drop),
        };
        if taken.is_none() {
            busy.push(round);
        }
        drop(scene.pool.retain(|_, _| false));
        scene.nothing_left().await;
    }
    assert!(busy.is_empty(), "busy in rounds {busy:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_died_in_the_pool_are_not_an_error() {
    let scene = Scene::with_two_rows(12).await;
    for how in CALLS {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        scene.pool_is_whole_within(GIVE_UP_AFTER).await;
        assert_eq!(scene.pool.status().size, 12);
        scene
            .observer
            .batch_execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            .await
            .unwrap();
        // At once, before the driver can have noticed all of them.
        if let Err(error) = call(&scene.keeper, how).await {
            panic!("{how}: {error:?}");
        }
        assert_eq!(ids(&scene).await, [1, 2, 20], "{how}");
        // Those that were not needed are dead still.
        drop(scene.pool.retain(|_, _| false));
        scene.nothing_left().await;
    }
}

/// As a firewall leaves them that has forgotten them: whether a connection is dead shows only when it is used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_died_without_a_word_are_not_an_error() {
    let scene = Scene::with_two_rows(1).await;
    let proxy = Proxy::before(scene.database.server());
    let pool = proxy.pool(&scene.database.config(), 12);
    let keeper = Keeper::new(pool.clone());
    let mut wrong = Vec::new();
    for how in CALLS {
        scene
            .observer
            .batch_execute("DELETE FROM t WHERE id > 2")
            .await
            .unwrap();
        let mut all = Vec::new();
        for _ in 0..12 {
            all.push(pool.get().await.unwrap());
        }
        drop(all);
        assert_eq!(pool.status().size, 12);
        proxy.forget_connections();
        match call(&keeper, how).await {
            Ok(pid) => {
                assert!(pid.is_some(), "{how}: a free lock is busy");
                assert_eq!(ids(&scene).await, [1, 2, 20], "{how}");
            }
            Err(error) => wrong.push(format!("{how}: {error:?}")),
        }
        scene.nothing_left().await;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_the_server_the_next_call_simply_works() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let observer = database.connect().await;
    observer
        .batch_execute("CREATE TABLE t (id int, n int)")
        .await
        .unwrap();
    let pool = database.pool(4);
    let keeper = Keeper::new(pool.clone());
    for how in [
        "transaction",
        "with lock",
        "session",
        "repeatable read guard",
    ] {
        let mut all = Vec::new();
        for _ in 0..4 {
            all.push(pool.get().await.unwrap());
        }
        drop(all);
        tokio::task::block_in_place(|| server.restart());
        if let Err(error) = call(&keeper, how).await {
            panic!("{how}: {error:?}");
        }
    }
    let observer = database.connect().await;
    let row = observer
        .query_one(
            "SELECT count(*), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') FROM t WHERE id = 20",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, i64>(0), 4);
    eventually("an advisory lock is left", async || {
        let row = observer
            .query_one(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
                &[],
            )
            .await;
        row.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// A server that is not there is an error soon, and not for longer than it is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_down_is_an_error_of_the_pool() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let pool = database.pool(2);
    let keeper = Keeper::new(pool.clone());
    keeper
        .transaction(async |_| Ok::<_, Error>(()))
        .await
        .unwrap();
    // Its connection, once the driver knows that it is closed.
    let object = pool.get().await.unwrap();
    tokio::task::block_in_place(|| server.stop());
    until_closed(&object).await;
    drop(object);
    let runs = AtomicU32::new(0);
    let answer = keeper
        .transaction(async |_| {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Error>(())
        })
        .await;
    let error = answer.unwrap_err();
    assert_error(&error, ErrorKind::Pool, "no connection from the pool");
    assert_eq!(runs.load(Ordering::Relaxed), 0);
    tokio::task::block_in_place(|| server.restart());
    keeper
        .transaction(async |_| Ok::<_, Error>(()))
        .await
        .unwrap();
}
