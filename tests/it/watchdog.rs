//! The watchdog: reports, clears only if told to, and ends with its handle.

use std::time::Duration;

use lockkeeper::{
    ErrorKind, Finding, FindingKind, Keeper, LockKey, Protection, SignalOutcome, Watchdog,
    WatchdogPolicy,
};
use lockkeeper_testkit::{MonitorScene, Server, Session, assert_error, eventually, in_time};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::NoTls;

const OFTEN: Duration = Duration::from_millis(100);
const TICK: Duration = Duration::from_millis(20);

/// Checks for nothing, often, and only in this database: the server is shared with other tests.
fn policy(scene: &MonitorScene) -> WatchdogPolicy {
    WatchdogPolicy::new()
        .every(OFTEN)
        .leaked_locks(None)
        .idle_blockers(None)
        .zombie_waiters(None)
        .database(scene.database.name())
}

fn start(keeper: &Keeper, policy: WatchdogPolicy) -> (Watchdog, UnboundedReceiver<Finding>) {
    let (sender, findings) = unbounded_channel();
    let policy = policy.on_finding(move |finding| drop(sender.send(finding.clone())));
    (keeper.watchdog(policy).unwrap(), findings)
}

async fn next(findings: &mut UnboundedReceiver<Finding>) -> Finding {
    in_time("nothing is found", findings.recv()).await.unwrap()
}

/// Waits for so many more checks.
async fn checks(watchdog: &Watchdog, more: u64) {
    let before = watchdog.samples();
    eventually("it does not check", async || {
        watchdog.samples() >= before + more
    })
    .await;
}

#[tokio::test]
async fn a_leaked_lock_is_told_by_name_and_a_live_guard_is_none() {
    let scene = MonitorScene::new().await;
    let guard = scene
        .keeper
        .advisory_lock("kept")
        .session()
        .acquire()
        .await
        .unwrap();
    let key = LockKey::from("forgotten");
    let lock = format!("SELECT pg_advisory_lock({})", key.as_i64().unwrap());
    let leaker = scene.session().await;
    leaker.run(&lock).await;
    let named = scene.monitor.clone().names([key.clone()]);
    let (sender, mut findings) = unbounded_channel();
    let reports = policy(&scene)
        .leaked_locks(TICK)
        .on_finding(move |finding: &Finding| drop(sender.send(finding.clone())));
    let watchdog = named.watchdog(reports).unwrap();
    let found = next(&mut findings).await;
    assert_eq!(found.kind(), FindingKind::LeakedLock);
    assert_eq!(found.backend().pid(), Some(leaker.pid));
    assert_eq!(found.keys(), [key]);
    assert!(found.age() >= TICK && found.cleared().is_none());
    assert!(found.to_string().contains("\"forgotten\""), "{found}");
    // Told once, and the guard never.
    checks(&watchdog, 4).await;
    assert!(findings.try_recv().is_err());
    assert!(leaker.is_alive().await);
    watchdog.stop().await;

    let clears = policy(&scene)
        .leaked_locks(2 * TICK)
        .clear_leaked_locks(true);
    let (watchdog, mut findings) = start(&scene.keeper, clears);
    let found = next(&mut findings).await;
    assert_eq!(found.backend().pid(), Some(leaker.pid));
    assert_eq!(found.cleared(), Some(&SignalOutcome::Signalled), "{found}");
    scene.until_gone(leaker.pid).await;
    checks(&watchdog, 2).await;
    watchdog.stop().await;
    assert!(guard.release().await.is_ok());
}

#[tokio::test]
async fn an_idle_blocker_is_reported_and_cleared_if_told_to() {
    let scene = MonitorScene::new().await;
    let idle = scene.session().await;
    idle.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let harmless = scene.session().await;
    harmless
        .run("BEGIN; UPDATE t SET v = 'h' WHERE id = 2")
        .await;
    let (watchdog, mut findings) = start(&scene.keeper, policy(&scene).idle_blockers(TICK));
    checks(&watchdog, 2).await;
    assert!(findings.try_recv().is_err(), "it blocks no session");
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    let found = next(&mut findings).await;
    assert_eq!(found.kind(), FindingKind::IdleBlocker);
    assert_eq!((found.backend().pid(), found.blocks()), (Some(idle.pid), 1));
    assert_eq!(found.cleared(), None);
    checks(&watchdog, 3).await;
    assert!(findings.try_recv().is_err(), "it is told once");
    assert!(idle.is_alive().await);
    watchdog.stop().await;

    let clears = policy(&scene)
        .idle_blockers(2 * TICK)
        .clear_idle_blockers(true);
    let (watchdog, mut findings) = start(&scene.keeper, clears);
    let found = next(&mut findings).await;
    assert_eq!(found.cleared(), Some(&SignalOutcome::Signalled), "{found}");
    waiting.await.unwrap().unwrap();
    scene.until_gone(idle.pid).await;
    assert!(harmless.is_alive().await);
    drop(watchdog);
}

#[tokio::test]
async fn whom_it_has_ended_it_has_told_of_when_it_stops() {
    let scene = MonitorScene::new().await;
    let mut leakers = Vec::new();
    for key in 0..20 {
        let leaker = scene.session().await;
        let lock = format!("SELECT pg_advisory_lock({key})");
        leaker.run(&lock).await;
        leakers.push(leaker);
    }
    let clears = policy(&scene).leaked_locks(TICK).clear_leaked_locks(true);
    let (watchdog, mut findings) = start(&scene.keeper, clears);
    // In the middle of its work, as soon as the first one is gone.
    let any_gone = async {
        while leakers.iter().all(|leaker| !leaker.client.is_closed()) {
            tokio::task::yield_now().await;
        }
    };
    in_time("no session is ended", any_gone).await;
    watchdog.stop().await;
    let mut told = Vec::new();
    while let Some(finding) = findings.recv().await {
        if finding.cleared() == Some(&SignalOutcome::Signalled) {
            told.extend(finding.backend().pid());
        }
    }
    for leaker in &leakers {
        if !told.contains(&leaker.pid) {
            assert!(leaker.is_alive().await, "ended, and not told: {told:?}");
        }
    }
}

#[tokio::test]
async fn those_whom_a_resolver_leaves_alone_are_only_told() {
    let scene = MonitorScene::new().await;
    let migration = scene.session().await;
    migration.run("BEGIN; ALTER TABLE t ADD w int").await;
    let waiter = scene.session().await;
    let waiting = waiter.start("SELECT FROM t");
    let clears = policy(&scene).idle_blockers(TICK).clear_idle_blockers(true);
    let (watchdog, mut findings) = start(&scene.keeper, clears);
    let found = next(&mut findings).await;
    assert_eq!(
        found.cleared(),
        Some(&SignalOutcome::Protected(Protection::Migration))
    );
    checks(&watchdog, 3).await;
    assert!(findings.try_recv().is_err(), "the same is not told again");
    migration.run("COMMIT").await;
    waiting.await.unwrap().unwrap();

    // A transaction of this process, which idles while the application computes.
    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    guard
        .execute("UPDATE t SET v = 'h' WHERE id = 1", &[])
        .await
        .unwrap();
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    let found = next(&mut findings).await;
    assert_eq!(
        found.cleared(),
        Some(&SignalOutcome::Protected(Protection::OwnSession))
    );
    guard.commit().await.unwrap();
    waiting.await.unwrap().unwrap();
    watchdog.stop().await;
}

#[tokio::test]
async fn a_wait_without_a_client_is_taken_from_the_queue() {
    let scene = MonitorScene::new().await;
    let holder = scene.session().await;
    holder.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let mut config = scene.database.config();
    config.application_name("test src/gone.rs:7");
    // Its client is gone: the socket is closed, and nothing cancels the wait.
    let gone = Session::connect(&config).await;
    let waiting = gone.start("UPDATE t SET v = 'w' WHERE id = 1");
    scene.until_waiting(gone.pid).await;
    waiting.abort();
    // Another program's session waits as long, and is none of this keeper's.
    let other = scene.session().await;
    let others = other.start("UPDATE t SET v = 'w' WHERE id = 1");
    scene.until_waiting(other.pid).await;
    // Nor is one that is alive in this process.
    let transaction = {
        let keeper = scene.keeper.clone();
        tokio::spawn(async move {
            keeper
                .transaction(async |tx| {
                    tx.execute("UPDATE t SET v = 'a' WHERE id = 1", &[]).await?;
                    Ok::<_, lockkeeper::Error>(())
                })
                .await
        })
    };
    let gone_pid = gone.pid;
    drop(gone);
    let clears = policy(&scene)
        .zombie_waiters(5 * TICK)
        .clear_zombie_waiters(true);
    let (watchdog, mut findings) = start(&scene.keeper, clears);
    let found = next(&mut findings).await;
    assert_eq!(found.kind(), FindingKind::ZombieWaiter);
    assert_eq!(found.backend().pid(), Some(gone_pid), "{found}");
    assert_eq!(found.cleared(), Some(&SignalOutcome::Signalled));
    scene.until_gone(gone_pid).await;
    checks(&watchdog, 3).await;
    assert!(findings.try_recv().is_err());
    watchdog.stop().await;
    holder.run("COMMIT").await;
    others.await.unwrap().unwrap();
    transaction.await.unwrap().unwrap();
}

#[tokio::test]
async fn it_survives_a_restart_and_ends_with_its_handle() {
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let (watchdog, mut findings) = start(&scene.keeper, policy(&scene).idle_blockers(TICK));
    checks(&watchdog, 1).await;
    server.stop();
    eventually("no check fails", async || watchdog.failures() > 0).await;
    server.restart();
    checks(&watchdog, 2).await;
    assert!(watchdog.is_running());
    let observer = scene.database.connect().await;
    let idle = scene.session().await;
    idle.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    let found = next(&mut findings).await;
    assert_eq!(found.backend().pid(), Some(idle.pid));
    // Stopped, it says nothing any more, and what it held is given back: the channel is closed.
    watchdog.stop().await;
    let rest = async { while findings.recv().await.is_some() {} };
    in_time("something is left of it", rest).await;
    idle.run("COMMIT").await;
    waiting.await.unwrap().unwrap();
    // With the keeper goes the last one who has a connection.
    drop(scene);
    eventually("a connection is left", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lockkeeper side connection'";
        observer.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

#[tokio::test]
async fn dropped_it_ends_too() {
    let scene = MonitorScene::new().await;
    for _ in 0..3 {
        let (watchdog, mut findings) = start(&scene.keeper, policy(&scene).idle_blockers(TICK));
        // At once, and after some checks.
        if watchdog.samples() == 0 {
            checks(&watchdog, 1).await;
        }
        drop(watchdog);
        let rest = async { while findings.recv().await.is_some() {} };
        in_time("something is left of it", rest).await;
    }
    // A stop that is not awaited.
    let (watchdog, mut findings) = start(&scene.keeper, policy(&scene).idle_blockers(TICK));
    let mut stop = Box::pin(watchdog.stop());
    assert!(futures::poll!(&mut stop).is_pending());
    drop(stop);
    let rest = async { while findings.recv().await.is_some() {} };
    in_time("something is left of it", rest).await;
}

#[tokio::test]
async fn a_callback_that_panics_is_given_the_next_one_too() {
    let scene = MonitorScene::new().await;
    let (sender, mut told) = unbounded_channel();
    let reports = policy(&scene)
        .leaked_locks(TICK)
        .on_finding(move |finding| {
            sender.send(finding.backend().pid()).unwrap();
            panic!("as it was told to");
        });
    let watchdog = scene.keeper.watchdog(reports).unwrap();
    for _ in 0..2 {
        let leaker = scene.session().await;
        leaker.run("SELECT pg_advisory_lock_shared(5)").await;
        let pid = in_time("nothing is told", told.recv()).await;
        assert_eq!(pid, Some(Some(leaker.pid)));
        drop(leaker);
    }
    watchdog.stop().await;
}

#[test]
fn bad_policies_and_a_missing_runtime_are_refused() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let keeper = runtime.block_on(async {
        let scene = MonitorScene::new().await;
        let database = &scene.database;
        Keeper::builder(database.pool(1))
            .side_connection(database.config(), NoTls)
            .build()
    });
    let contradiction = WatchdogPolicy::new()
        .leaked_locks(None)
        .clear_leaked_locks(true);
    for (policy, text) in [
        (WatchdogPolicy::new(), "outside a tokio runtime"),
        (
            WatchdogPolicy::new().every(Duration::ZERO),
            "at least 100ms",
        ),
        (contradiction, "leaked_locks(None)"),
    ] {
        let error = keeper.watchdog(policy).unwrap_err();
        assert_error(&error, ErrorKind::Config, text);
    }
}
