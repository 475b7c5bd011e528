//! What is no silence: a server that works, and one that has nothing to say.

use std::time::Duration;

use futures::future::join_all;
use futures::{SinkExt, TryStreamExt};
use lockkeeper::Keeper;
use lockkeeper_testkit::{AppError, Scene, until_waiting_for};
use tokio_postgres::NoTls;

/// How long the server may be silent.
const SILENCE: Duration = Duration::from_millis(300);

const SLEEP: &str = "SELECT pg_sleep(2)";

async fn scene(with_side: bool) -> Scene {
    let mut scene = Scene::with_two_rows(8).await;
    let builder = Keeper::builder(scene.pool.clone())
        .application("test")
        .longest_silence(SILENCE);
    scene.keeper = if with_side {
        builder
            .side_connection(scene.database.config(), NoTls)
            .build()
    } else {
        builder.build()
    };
    scene
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_works_may_take_as_long_as_it_likes() {
    let both = [false, true].map(async |with_side| {
        let scene = scene(with_side).await;
        let keeper = &scene.keeper;
        let transaction = async {
            let sleeping = keeper.transaction(async |tx| {
                tx.batch_execute(SLEEP).await?;
                Ok::<_, AppError>(())
            });
            sleeping.await
        };
        let prepared = async {
            let sleeping = keeper.transaction(async |tx| {
                tx.query(SLEEP, &[]).await?;
                Ok::<_, AppError>(())
            });
            sleeping.await
        };
        let raw = async {
            let guard = keeper.advisory_lock("raw").acquire().await?;
            let rows = guard.query_raw(SLEEP, [0_i32; 0]).await?;
            rows.try_collect::<Vec<_>>().await?;
            Ok(guard.commit().await?)
        };
        let session = async {
            let guard = keeper.advisory_lock("session").session().acquire().await?;
            guard.batch_execute(SLEEP).await?;
            guard.query_one(SLEEP, &[]).await?;
            Ok(guard.release().await?)
        };
        let (transaction, prepared, raw, session): (
            _,
            _,
            Result<(), AppError>,
            Result<(), AppError>,
        ) = tokio::join!(transaction, prepared, raw, session);
        transaction.unwrap();
        prepared.unwrap();
        raw.unwrap();
        session.unwrap();
        scene.nothing_left().await;
    });
    join_all(both).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_waits_for_a_lock_is_not_silent() {
    let both = [false, true].map(async |with_side| {
        let scene = scene(with_side).await;
        let holder = scene.session().await;
        let lock = "BEGIN; SELECT FROM t WHERE id = 1 FOR UPDATE";
        holder.client.batch_execute(lock).await.unwrap();
        let waiting = scene.keeper.transaction(async |tx| {
            let pid = tx.backend_pid().unwrap();
            let update = tx.execute("UPDATE t SET n = 1 WHERE id = 1", &[]);
            let release = async {
                until_waiting_for(&scene.observer, pid, 5 * SILENCE).await;
                holder.client.batch_execute("COMMIT").await
            };
            let (updated, released) = tokio::join!(update, release);
            released?;
            updated?;
            Ok::<_, AppError>(())
        });
        waiting.await.unwrap();
        scene.nothing_left().await;
    });
    join_all(both).await;
}

/// The server is silent because it has been asked nothing, or has been given no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_takes_its_time_loses_nothing() {
    let both = [false, true].map(async |with_side| {
        let scene = scene(with_side).await;
        let pause = || tokio::time::sleep(4 * SILENCE);
        let keeper = &scene.keeper;
        let idle = async {
            let idle = keeper.transaction(async |tx| {
                tx.batch_execute("SELECT 1").await?;
                pause().await;
                tx.batch_execute("SELECT 1").await?;
                Ok::<_, AppError>(())
            });
            idle.await
        };
        let copying = async {
            let copying = keeper.transaction(async |tx| {
                let sink = tx.copy_in("COPY t FROM STDIN").await?;
                let mut sink = std::pin::pin!(sink);
                sink.send(bytes::Bytes::from_static(b"3\t3\n")).await?;
                pause().await;
                sink.send(bytes::Bytes::from_static(b"4\t4\n")).await?;
                sink.finish().await?;
                Ok::<_, AppError>(())
            });
            copying.await
        };
        let reading = async {
            let reading = keeper.transaction(async |tx| {
                // More than the network holds.
                let sql = "SELECT repeat('x', 1000) FROM generate_series(1, 50000)";
                let mut rows = std::pin::pin!(tx.query_raw(sql, [0_i32; 0]).await?);
                rows.try_next().await?;
                pause().await;
                while rows.try_next().await?.is_some() {}
                Ok::<_, AppError>(())
            });
            reading.await
        };
        let holding = async {
            let guard = keeper.advisory_lock("held").session().acquire().await?;
            pause().await;
            guard.batch_execute("SELECT 1").await?;
            pause().await;
            Ok(guard.release().await?)
        };
        let (idle, copying, reading, holding): (_, _, _, Result<(), AppError>) =
            tokio::join!(idle, copying, reading, holding);
        idle.unwrap();
        copying.unwrap();
        reading.unwrap();
        holding.unwrap();
        assert_eq!(scene.count("t").await, 4);
        scene.nothing_left().await;
    });
    join_all(both).await;
}
