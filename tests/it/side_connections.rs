//! The side connection while one of its questions is not answered.

use std::time::{Duration, Instant};

use lockkeeper::tokio_postgres::NoTls;
use lockkeeper::{Error, Keeper, Monitor, SignalOutcome, Tx};
use lockkeeper_testkit::{BouncerScene, Fault, GIVE_UP_AFTER, PoolMode, Proxy, Scene, eventually};
use tokio::task::JoinHandle;

/// The question that is stuck is given up after a second.
const SOON: Duration = Duration::from_millis(800);

/// Has a question of the monitor kept from the server. Since when.
async fn stuck(side: &Proxy, monitor: &Monitor) -> (JoinHandle<()>, Instant) {
    drop(side.heard());
    monitor.activity().await.unwrap();
    let (heard, _) = side.heard();
    // The sampler asks beside it.
    let is_it = |sql: &&String| sql.contains("pg_stat_activity") && !sql.contains("pg_locks");
    side.fault(heard.iter().find(is_it).unwrap(), Fault::Hold);
    let monitor = monitor.clone();
    let asked = Instant::now();
    let asking = tokio::spawn(async move { drop(monitor.activity().await) });
    eventually("nothing is asked", async || side.faults_left() == 0).await;
    (asking, asked)
}

/// A keeper over a side connection through a proxy, which is open.
async fn opened(scene: &Scene, pool_size: usize) -> (Proxy, Keeper) {
    let direct = scene.database.config();
    let side = Proxy::before(scene.database.server());
    let keeper = Keeper::builder(scene.database.pool(pool_size))
        .side_connection(side.config(&direct), NoTls)
        .build();
    keeper.monitor().activity().await.unwrap();
    (side, keeper)
}

async fn side_connections(scene: &Scene) -> i64 {
    scene
        .count(
            "pg_stat_activity WHERE datname = current_database() \
             AND application_name = 'lockkeeper side connection'",
        )
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_does_not_wait_for_a_question_of_the_monitor() {
    let scene = Scene::new(1).await;
    let (side, keeper) = opened(&scene, 1).await;
    let monitor = keeper.monitor();
    // The pool has none to spare.
    let guard = keeper.advisory_lock("k").acquire().await.unwrap();
    let idle = scene.session().await;
    let seen = lockkeeper_testkit::seen_by(&monitor, idle.pid).await;
    let (asking, asked) = stuck(&side, &monitor).await;
    let outcome = monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    let elapsed = asked.elapsed();
    assert!(elapsed < SOON, "{elapsed:?}");
    side.deliver();
    asking.await.unwrap();
    guard.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sample_does_not_wait_for_a_question_of_the_monitor() {
    let scene = Scene::new(1).await;
    let (side, keeper) = opened(&scene, 1).await;
    let slow = keeper.clone();
    let ran = tokio::spawn(async move {
        let body =
            async |tx: &mut Tx| Ok::<_, Error>(tx.batch_execute("SELECT pg_sleep(3)").await?);
        slow.transaction(body).await
    });
    until_sampled(&side, Instant::now(), GIVE_UP_AFTER).await;
    let (asking, asked) = stuck(&side, &keeper.monitor()).await;
    drop(side.heard());
    until_sampled(&side, asked, SOON).await;
    side.deliver();
    asking.await.unwrap();
    ran.await.unwrap().unwrap();
}

async fn until_sampled(side: &Proxy, since: Instant, within: Duration) {
    loop {
        let (heard, _) = side.heard();
        if heard.iter().any(|sql| sql.contains("l.waitstart")) {
            break;
        }
        assert!(since.elapsed() < within, "no sample");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Behind a pooler a statement is cancelled by a question.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_does_not_wait_for_a_question_of_the_monitor() {
    let test = "a_cancel_does_not_wait_for_a_question_of_the_monitor";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 4, &[]).await else {
        return;
    };
    let side = Proxy::before(behind.scene.database.server());
    let config = side.config(&behind.scene.database.config());
    let keeper = behind.fresh_with(4, |builder| builder.side_connection(config, NoTls));
    keeper.monitor().activity().await.unwrap();
    let guard = behind.keeper.advisory_lock("k").acquire().await.unwrap();
    let waiting = keeper.clone();
    let wait = tokio::spawn(async move {
        let body = async |tx: &mut Tx| tx.advisory_lock("k").wait(GIVE_UP_AFTER).await;
        waiting.transaction(body).await
    });
    behind.scene.until_awaited("k").await;
    let (asking, asked) = stuck(&side, &keeper.monitor()).await;
    wait.abort();
    drop(wait.await);
    let gone = async || behind.scene.waiters("k").await.is_empty();
    eventually("the waiter is left", gone).await;
    let elapsed = asked.elapsed();
    assert!(elapsed < SOON, "{elapsed:?}");
    side.deliver();
    asking.await.unwrap();
    guard.commit().await.unwrap();
    behind.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_one_side_connection_again_when_none_is_busy() {
    let scene = Scene::new(1).await;
    let (side, keeper) = opened(&scene, 1).await;
    let monitor = keeper.monitor();
    assert_eq!(side_connections(&scene).await, 1);
    // One after another they use the same.
    for _ in 0..20 {
        monitor.snapshot().await.unwrap();
    }
    assert_eq!(side_connections(&scene).await, 1);
    let idle = scene.session().await;
    let seen = lockkeeper_testkit::seen_by(&monitor, idle.pid).await;
    let (asking, _) = stuck(&side, &monitor).await;
    // More questions of the same purpose wait for their turn.
    let more: Vec<_> = (0..8)
        .map(|_| {
            let monitor = monitor.clone();
            tokio::spawn(async move { monitor.activity().await.map(drop) })
        })
        .collect();
    monitor.terminate(&seen).await.unwrap();
    assert_eq!(side_connections(&scene).await, 2);
    side.deliver();
    asking.await.unwrap();
    for asked in more {
        asked.await.unwrap().unwrap();
    }
    eventually("more than one is left", async || {
        side_connections(&scene).await == 1
    })
    .await;
}
