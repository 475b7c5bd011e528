//! A server that is reached through TLS only: cancelling, timeouts, loss and release, with and without a side connection.

use std::time::{Duration, Instant};

use futures::future::{BoxFuture, FutureExt, join_all};
use lockkeeper::{Error, ErrorKind, Keeper};
use lockkeeper_testkit::{
    ENDLESS, Scene, TlsServer, assert_error, assert_error_in, eventually_within, in_time_of,
    lock_by_sql, until_sleeping,
};
use tokio_postgres::NoTls;
use tokio_postgres::config::SslMode;

const KEY: i64 = 91;

/// Within which everything here happens.
const SOON: Duration = Duration::from_secs(1);

/// How the keeper reaches the server.
#[derive(Clone, Copy, Debug)]
struct Way {
    mode: SslMode,
    with_side: bool,
}

const WAYS: [Way; 4] = [
    // An unencrypted request to cancel is allowed, and the server takes it.
    Way {
        mode: SslMode::Prefer,
        with_side: false,
    },
    // It is not allowed: another connection of the pool is used.
    Way {
        mode: SslMode::Require,
        with_side: false,
    },
    Way {
        mode: SslMode::Prefer,
        with_side: true,
    },
    Way {
        mode: SslMode::Require,
        with_side: true,
    },
];

/// A pool and a keeper of encrypted connections. Observer and sessions go through the server's socket.
async fn scene(tls: &TlsServer, way: Way) -> Scene {
    let mut scene = Scene::on(tls.server(), 1).await;
    scene.pool = tls.pool(&scene.database, way.mode, 3);
    let builder = scene.builder();
    scene.keeper = if way.with_side {
        let side = tls.config(&scene.database, way.mode);
        builder.side_connection(side, tls.connector()).build()
    } else {
        builder.build()
    };
    scene
        .run("CREATE TABLE t (id int8 PRIMARY KEY, n int NOT NULL); INSERT INTO t VALUES (1, 0)")
        .await;
    scene
}

/// Runs a test in each way.
async fn in_each_way(test: &str, run: impl AsyncFn(Scene, Way)) {
    let tls = match TlsServer::shared() {
        Ok(tls) => tls,
        Err(skip) => return skip.report(test),
    };
    join_all(WAYS.map(async |way| run(scene(tls, way).await, way).await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_but_encrypted_connections_is_taken() {
    let test = "nothing_but_encrypted_connections_is_taken";
    in_each_way(test, async |scene, way| {
        let tls = TlsServer::shared().unwrap();
        let plain = tls.config(&scene.database, SslMode::Disable);
        let refused = plain.connect(NoTls).await.map(drop).unwrap_err();
        assert_eq!(refused.code().map(|code| code.code()), Some("28000"), "{refused:?}");
        let guard = scene.keeper.advisory_lock(KEY).acquire().await.unwrap();
        let wait = Duration::from_millis(10);
        // It makes the keeper look, on the side connection if there is one.
        let busy = scene.keeper.advisory_lock(KEY).wait(wait).acquire().await;
        assert_error_in(format_args!("{way:?}"), &busy.unwrap_err(), ErrorKind::LockTimeout, "91");
        let encrypted = "pg_stat_ssl s JOIN pg_stat_activity a USING (pid) \
                         WHERE a.client_addr IS NOT NULL AND a.datname = current_database() AND s.ssl";
        let all = encrypted.replace(" AND s.ssl", "");
        assert_eq!(scene.count(encrypted).await, scene.count(&all).await, "{way:?}");
        assert!(scene.count(encrypted).await >= 2, "{way:?}");
        guard.commit().await.unwrap();
        scene.nothing_left().await;
    })
    .await;
}

type Wait = fn(Keeper) -> BoxFuture<'static, Result<(), Error>>;

/// What waits for [`KEY`], or for row 1 of `t`.
const WAITS: &[(&str, Wait)] = &[
    ("acquire", |keeper| {
        async move {
            keeper
                .advisory_lock(KEY)
                .wait(ENDLESS)
                .acquire()
                .await
                .map(drop)
        }
        .boxed()
    }),
    ("several acquire", |keeper| {
        async move {
            let locks = keeper.advisory_locks([KEY, KEY + 1]).wait(ENDLESS);
            locks.acquire().await.map(drop)
        }
        .boxed()
    }),
    ("session acquire", |keeper| {
        async move {
            let lock = keeper.advisory_lock(KEY).session().wait(ENDLESS);
            lock.acquire().await.map(drop)
        }
        .boxed()
    }),
    ("transaction", |keeper| {
        async move {
            let waiting = keeper.transaction(async |tx| tx.advisory_lock(KEY).wait(ENDLESS).await);
            waiting.await
        }
        .boxed()
    }),
    ("statement", |keeper| {
        async move {
            let waiting = keeper.transaction(async |tx| {
                tx.execute("UPDATE t SET n = 1 WHERE id = 1", &[]).await?;
                Ok::<_, Error>(())
            });
            waiting.await
        }
        .boxed()
    }),
    ("statement of a session guard", |keeper| {
        async move {
            let guard = keeper.advisory_lock(KEY + 2).session().acquire().await?;
            guard
                .execute("UPDATE t SET n = 1 WHERE id = 1", &[])
                .await?;
            guard.release().await
        }
        .boxed()
    }),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_that_are_dropped_leave_the_queue() {
    in_each_way(
        "waits_that_are_dropped_leave_the_queue",
        async |scene, way| {
            let holder = scene.holder(KEY).await;
            let lock = "BEGIN; SELECT FROM t WHERE id = 1 FOR UPDATE";
            holder.client.batch_execute(lock).await.unwrap();
            for (name, wait) in WAITS {
                let waiting = tokio::spawn(wait(scene.keeper.clone()));
                scene.until_lock_waiters(1).await;
                waiting.abort();
                let what = format!("{way:?}: {name} is still in the queue");
                eventually_within(SOON, &what, async || {
                    scene.lock_waiters().await == 0 && scene.advisory_locks().await == 1
                })
                .await;
            }
            drop(holder);
            scene.nothing_left().await;
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_that_are_busy_time_out_and_name_their_holder() {
    let test = "locks_that_are_busy_time_out_and_name_their_holder";
    in_each_way(test, async |scene, way| {
        let holder = scene.holder(KEY).await;
        let wait = Duration::from_millis(300);
        let keeper = &scene.keeper;
        let acquire = async {
            let lock = keeper.advisory_lock(KEY).wait(wait);
            lock.acquire().await.map(drop)
        };
        let session = async {
            let lock = keeper.advisory_lock(KEY).session().wait(wait);
            lock.acquire().await.map(drop)
        };
        let transaction = async {
            let waiting = keeper.transaction_with(
                lockkeeper::TransactionOptions::new().attempts(1),
                async |tx| tx.advisory_lock(KEY).wait(wait).await,
            );
            waiting.await
        };
        let started = Instant::now();
        let outcomes = [acquire.await, session.await, transaction.await];
        let took = started.elapsed();
        assert!(
            took > 3 * wait && took < 3 * (wait + SOON),
            "{way:?}: {took:?}"
        );
        for outcome in outcomes {
            let error = outcome.unwrap_err();
            assert_error_in(
                format_args!("{way:?}"),
                &error,
                ErrorKind::LockTimeout,
                "91",
            );
            let blockers: Vec<_> = error
                .blockers()
                .iter()
                .map(|blocker| blocker.pid())
                .collect();
            assert_eq!(blockers, [Some(holder.pid)], "{way:?}");
        }
        assert!(
            keeper
                .advisory_lock(KEY)
                .try_acquire()
                .await
                .unwrap()
                .is_none()
        );
        drop(holder);
        scene.nothing_left().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_backend_is_noticed() {
    in_each_way("a_terminated_backend_is_noticed", async |scene, way| {
        let keeper = &scene.keeper;
        let guard = keeper.advisory_lock(KEY).session().acquire().await.unwrap();
        scene.terminate(guard.backend_pid().unwrap()).await;
        in_time_of(SOON, "the loss is not noticed", guard.loss()).await;
        let error = guard.release().await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::LockLost,
            "lock lost with its connection: 91",
        );

        let guard = keeper.advisory_lock(KEY).acquire().await.unwrap();
        scene.terminate(guard.backend_pid().unwrap()).await;
        let closed = async || guard.client().is_closed();
        eventually_within(SOON, "the connection is not closed", closed).await;
        let error = guard.commit().await.unwrap_err();
        assert_error(&error, ErrorKind::ConnectionLost, "nothing is applied: 91");

        let transaction = keeper.transaction(async |tx| {
            let statement = tx.batch_execute("SELECT pg_sleep(60)");
            let terminate = async {
                let pid = tx.backend_pid().unwrap();
                until_sleeping(&scene.observer, pid).await;
                scene.terminate(pid).await;
                Instant::now()
            };
            let (ended, terminated) = tokio::join!(statement, terminate);
            assert!(terminated.elapsed() < SOON, "{way:?}");
            ended?;
            Ok::<_, Error>(())
        });
        let error = transaction.await.unwrap_err();
        assert_error_in(
            format_args!("{way:?}"),
            &error,
            ErrorKind::ConnectionLost,
            "nothing is applied",
        );
        scene.nothing_left().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_released_is_free() {
    in_each_way("what_is_released_is_free", async |scene, way| {
        let keeper = &scene.keeper;
        let what = format!("{way:?}: the lock is still held");
        let free = async || !scene.is_held(KEY).await;
        let session = || keeper.advisory_lock(KEY).session();

        session().acquire().await.unwrap().release().await.unwrap();
        assert!(free().await, "{what}");
        drop(session().acquire().await.unwrap());
        eventually_within(SOON, &what, free).await;
        drop(keeper.advisory_lock(KEY).acquire().await.unwrap());
        eventually_within(SOON, &what, free).await;
        let guard = keeper.advisory_lock(KEY).acquire().await.unwrap();
        guard.commit().await.unwrap();
        assert!(free().await, "{what}");

        // A statement that is dropped and a guard with it: both end on the server.
        let guard = session().acquire().await.unwrap();
        let pid = guard.backend_pid().unwrap();
        let running = tokio::spawn(async move {
            guard.batch_execute("SELECT pg_sleep(60)").await.unwrap();
        });
        until_sleeping(&scene.observer, pid).await;
        running.abort();
        eventually_within(SOON, &what, free).await;

        // And the next one gets it, who waits for it.
        let guard = session().acquire().await.unwrap();
        let other = scene.session().await;
        let waiting = async {
            lock_by_sql(&other.client, KEY).await;
        };
        let release = async {
            assert_eq!(scene.until_awaited(KEY).await, other.pid);
            guard.release().await.unwrap();
        };
        tokio::join!(waiting, release);
        drop(other);
        scene.nothing_left().await;
    })
    .await;
}
