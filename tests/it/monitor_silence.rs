//! A server that falls silent: for how long the monitor, the resolver and the watchdog wait for it, at each message that
//! they send.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::{BoxFuture, join_all};
use lockkeeper::graph::Backend;
use lockkeeper::tokio_postgres::NoTls;
use lockkeeper::{Error, ErrorKind, Keeper, RecoveryCriterion, ResolverPolicy, Tx, WatchdogPolicy};
use lockkeeper_testkit::{Fault, Proxy, Scene, eventually, in_time_of, lock_by_sql, seen_by};

const SILENCE: Duration = Duration::from_millis(500);
/// What is documented for one question: on the side connection, for a connection of the pool, and on that.
const QUESTION: Duration = Duration::from_millis(500 + 1500 + 500);
/// What is documented for the settings: besides, for a connection of the pool, on that, and for a pooler to be found.
const SETTINGS: Duration = Duration::from_millis(2500 + 5500 + 500 + 500);
/// How long to try again.
const WITHIN: Duration = Duration::from_secs(1);
/// For a slow machine.
const SLACK: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(20);
const FAULTS: [Fault; 2] = [Fault::Stall, Fault::Swallow];

type Call = fn(Keeper, Backend) -> BoxFuture<'static, Result<(), Error>>;

/// Every public async function that asks the server by itself, and the longest that it may wait.
const FUNCTIONS: [(&str, Duration, Call); 15] = [
    ("activity", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().activity().await.map(drop) })
    }),
    ("snapshot", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().snapshot().await.map(drop) })
    }),
    ("snapshot_of", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().snapshot_of(&[1]).await.map(drop) })
    }),
    ("blocking", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().blocking().await.map(drop) })
    }),
    ("lock_tree", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().lock_tree().await.map(drop) })
    }),
    ("advisory_locks", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().advisory_locks().await.map(drop) })
    }),
    ("leaks", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().leaks(TICK).await.map(drop) })
    }),
    ("health", QUESTION, |keeper, _| {
        Box::pin(async move { keeper.monitor().health().await.map(drop) })
    }),
    ("settings", SETTINGS, |keeper, _| {
        Box::pin(async move { keeper.monitor().settings().await.map(drop) })
    }),
    ("cancel", QUESTION, |keeper, backend| {
        Box::pin(async move { keeper.monitor().cancel(&backend).await.map(drop) })
    }),
    ("terminate", QUESTION, |keeper, backend| {
        Box::pin(async move { keeper.monitor().terminate(&backend).await.map(drop) })
    }),
    ("Recovery::check", QUESTION, |keeper, _| {
        Box::pin(async move {
            let mut recovery = keeper.monitor().recovery(criterion())?;
            recovery.check().await.map(drop)
        })
    }),
    (
        "Recovery::wait",
        Duration::from_millis(1000 + 2500),
        |keeper, _| {
            Box::pin(async move {
                let mut recovery = keeper.monitor().recovery(criterion())?;
                recovery.wait(TICK, WITHIN).await.map(drop)
            })
        },
    ),
    ("watch", QUESTION, |keeper, _| {
        Box::pin(async move {
            let mut watch = keeper.monitor().watch(Duration::from_millis(100))?;
            watch.next().await.unwrap().map(drop)
        })
    }),
    ("Resolver::run", QUESTION, |keeper, _| {
        Box::pin(async move {
            let resolver = keeper.resolver(ResolverPolicy::new());
            resolver.run().await.map(drop)
        })
    }),
];

/// Met at once, whatever other tests do.
fn criterion() -> RecoveryCriterion {
    RecoveryCriterion::waits_shorter_than(Duration::from_secs(3600)).checks(1)
}

/// A scene whose pool leads through the proxy, like the keeper's side connection.
async fn behind_a_proxy(with_side: bool) -> (Scene, Proxy, Keeper) {
    let mut scene = Scene::new(2).await;
    let direct = scene.database.config();
    let proxy = Proxy::before(scene.database.server());
    scene.pool = proxy.pool(&direct, 2);
    let mut builder = scene.builder().longest_silence(SILENCE);
    if with_side {
        builder = builder.side_connection(proxy.config(&direct), NoTls);
    }
    (scene, proxy, builder.build())
}

fn assert_is_of_silence(what: &str, error: &Error) {
    // A login that is not answered gives no connection.
    let kind = error.kind();
    let is_it = matches!(kind, ErrorKind::ConnectionLost | ErrorKind::Pool);
    assert!(is_it, "{what}: {error:?}");
}

async fn ends_in_time(name: &'static str, most: Duration, call: Call, with_side: bool) {
    let (scene, proxy, keeper) = behind_a_proxy(with_side).await;
    let session = scene.session().await;
    let backend = seen_by(&scene.monitor(), session.pid).await;
    let asked = async |what: &str| {
        let called = call(keeper.clone(), backend.clone());
        in_time_of(most + SLACK, &format!("{what} takes too long"), called).await
    };

    // All is silent: first the logins, then what is open.
    for what in ["login", "message"] {
        let what = format!("{name}, no {what} is answered");
        proxy.stall(true);
        assert_is_of_silence(&what, &asked(&what).await.unwrap_err());
        proxy.stall(false);
        scene.nothing_left().await;
        asked(&what).await.unwrap();
    }

    for fault in FAULTS {
        for n in 0.. {
            let what = format!("{name}, {fault:?} at message {n}, side connection: {with_side}");
            proxy.fault_later(n, fault);
            let ended = asked(&what).await;
            let silent = proxy.faults_left() == 0;
            proxy.clear_faults();
            match ended {
                Ok(()) => {}
                Err(error) => {
                    assert!(silent, "{what}: {error:?}");
                    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{what}: {error:?}");
                }
            }
            scene.nothing_left().await;
            if !silent {
                assert!(n > 0, "{what}: it sends nothing");
                break;
            }
        }
    }
}

async fn all_end_in_time(with_side: bool) {
    let calls = FUNCTIONS
        .into_iter()
        .map(|(name, most, call)| ends_in_time(name, most, call, with_side));
    join_all(calls).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_function_ends_in_time_without_a_side_connection() {
    all_end_in_time(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_function_ends_in_time_with_a_side_connection() {
    all_end_in_time(true).await;
}

/// One who holds a row, one who waits for it, and a resolver that ends the first.
async fn a_resolver_ends_in_time(fault: Fault, with_side: bool) {
    const DEADLINE: Duration = Duration::from_secs(3);
    let (scene, proxy, keeper) = behind_a_proxy(with_side).await;
    scene.table("t", 1).await;
    let update = "UPDATE t SET a = 1 WHERE id = 1";
    for n in 0.. {
        let what = format!("{fault:?} at message {n}, side connection: {with_side}");
        let (holder, waiter) = (scene.session().await, scene.session().await);
        holder.run(&format!("BEGIN; {update}")).await;
        let waiting = waiter.start_waiting(&scene.observer, update).await;
        let policy = ResolverPolicy::new()
            .execute(true)
            .database(scene.database.name())
            .wait(Duration::ZERO)
            .idle_grace(Duration::ZERO)
            .poll(TICK)
            .deadline(DEADLINE)
            .recovered_when(RecoveryCriterion::no_waits().checks(1));
        proxy.fault_later(n, fault);
        let resolver = keeper.resolver(policy);
        let most = DEADLINE + QUESTION + SLACK;
        let ended = in_time_of(most, &what, resolver.run()).await;
        let silent = proxy.faults_left() == 0;
        proxy.clear_faults();
        match ended {
            Ok(log) => assert!(silent || log.is_recovered(), "{what}: {log}"),
            Err(error) => {
                assert!(silent, "{what}: {error:?}");
                assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{what}: {error:?}");
            }
        }
        drop(holder);
        waiting.await.unwrap().unwrap();
        scene.nothing_left().await;
        if !silent {
            assert!(n > 6, "{what}: it sends nothing");
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolver_that_acts_ends_in_time() {
    let sides = [false, true].into_iter();
    let all = sides.flat_map(|side| FAULTS.map(|fault| a_resolver_ends_in_time(fault, side)));
    join_all(all).await;
}

/// From some message on the server is silent for good: a resolver does not go beyond its deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolver_ends_at_its_deadline_when_all_is_silent() {
    let (scene, proxy, keeper) = behind_a_proxy(true).await;
    scene.table("t", 1).await;
    let update = "UPDATE t SET a = 1 WHERE id = 1";
    let (holder, waiter) = (scene.session().await, scene.session().await);
    holder.run(&format!("BEGIN; {update}")).await;
    let waiting = waiter.start_waiting(&scene.observer, update).await;
    let deadline = Duration::from_secs(2);
    let policy = ResolverPolicy::new()
        .execute(true)
        .database(scene.database.name())
        .idle_grace(Duration::from_secs(60))
        .poll(TICK)
        .deadline(deadline);
    let resolver = keeper.resolver(policy);
    let started = Instant::now();
    let run = tokio::spawn(async move { resolver.run().await });
    // Behind the baseline it samples again and again.
    let mut asked = 0;
    eventually("it does not sample", async || {
        asked += proxy.heard().0.len();
        asked > 10
    })
    .await;
    proxy.stall(true);
    let log = run.await.unwrap().unwrap();
    let elapsed = started.elapsed();
    assert!(elapsed < deadline + SLACK, "{elapsed:?}: {log}");
    assert_eq!(*log.end(), lockkeeper::resolver::RunEnd::Deadline, "{log}");
    proxy.stall(false);
    drop(holder);
    waiting.await.unwrap().unwrap();
    scene.nothing_left().await;
}

/// A watchdog that is stopped while the server is silent, also about the signal to one who has forgotten a lock.
async fn a_watchdog_stops_in_time(fault: Fault, with_side: bool) {
    let (scene, proxy, keeper) = behind_a_proxy(with_side).await;
    for n in 0..7 {
        let what = format!("{fault:?} at message {n}, side connection: {with_side}");
        let leaker = scene.session().await;
        lock_by_sql(&leaker.client, 5_i64).await;
        proxy.fault_later(n, fault);
        let policy = WatchdogPolicy::new()
            .every(Duration::from_millis(100))
            .leaked_locks(TICK)
            .clear_leaked_locks(true)
            .idle_blockers(None)
            .zombie_waiters(None)
            .database(scene.database.name());
        let watchdog = keeper.watchdog(policy).unwrap();
        eventually(&what, async || proxy.faults_left() == 0).await;
        in_time_of(QUESTION + SLACK, &what, watchdog.stop()).await;
        drop(leaker);
        scene.nothing_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watchdog_is_stopped_in_time() {
    let sides = [false, true].into_iter();
    let all = sides.flat_map(|side| FAULTS.map(|fault| a_watchdog_stops_in_time(fault, side)));
    join_all(all).await;
}

/// The sampler without a side connection: a connection of the pool that does not answer is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sample_on_a_connection_of_the_pool_is_given_up() {
    let (scene, proxy, keeper) = behind_a_proxy(false).await;
    let slow = keeper.clone();
    let ran = tokio::spawn(async move {
        let body =
            async |tx: &mut Tx| Ok::<_, Error>(tx.batch_execute("SELECT pg_sleep(4)").await?);
        slow.transaction(body).await
    });
    let mut heard = Vec::new();
    let mut is_heard = async |what: &str| {
        eventually(&format!("{what} is not sent"), async || {
            heard.extend(proxy.heard().0);
            heard.iter().any(|sql: &String| sql.contains(what))
        })
        .await;
        heard.clear();
    };
    // It is sent before the first sample.
    is_heard("pg_sleep").await;
    proxy.fault_later(0, Fault::Swallow);
    is_heard("pg_locks").await;
    assert_eq!(proxy.faults_left(), 0);
    is_heard("pg_locks").await;
    ran.await.unwrap().unwrap();
    scene.nothing_left().await;
}
