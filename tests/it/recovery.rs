//! Watching waits come and go, and knowing when it is over.

use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use lockkeeper::{ErrorKind, RecoveryCriterion, SnapshotDiff, Trend};
use lockkeeper_testkit::{GIVE_UP_AFTER, MonitorScene, Server, assert_error, keeper_as};

const OFTEN: Duration = Duration::from_millis(100);

#[tokio::test]
async fn waits_that_begin_and_end_are_told() {
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let mut watch = scene.monitor.watch(OFTEN).unwrap();
    let first = watch.next().await.unwrap().unwrap();
    assert!(first.changes().is_empty() && first.snapshot().is_empty());

    let holder = scene.session().await;
    holder.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    let update = loop {
        let update = watch.next().await.unwrap().unwrap();
        if !update.changes().is_empty() {
            break update;
        }
    };
    let changes = update.changes();
    assert_eq!(changes.new_waits().len(), 1);
    assert_eq!(changes.new_waits()[0].waiter().pid(), Some(waiter.pid));
    assert_eq!(changes.new_roots()[0].pid(), Some(holder.pid));
    assert!(changes.ended_waits().is_empty() && changes.ended_roots().is_empty());
    // As long as it lasts it is not told again.
    for _ in 0..3 {
        let update = watch.next().await.unwrap().unwrap();
        assert!(update.changes().is_empty(), "{update}");
        assert_eq!(update.snapshot().edges().len(), 1);
    }
    let before = watch.next().await.unwrap().unwrap().snapshot().clone();
    holder.run("COMMIT").await;
    waiting.await.unwrap().unwrap();
    let update = watch.next().await.unwrap().unwrap();
    let changes = update.changes();
    assert_eq!(changes.ended_waits()[0].waiter().pid(), Some(waiter.pid));
    assert_eq!(changes.ended_roots()[0].pid(), Some(holder.pid));
    assert_eq!(*changes, SnapshotDiff::between(&before, update.snapshot()));
    let text = update.to_string();
    assert!(
        text.starts_with("nobody waits") && text.contains("waits no more"),
        "{text}"
    );
}

#[tokio::test]
async fn a_next_that_is_dropped_loses_nothing() {
    let scene = MonitorScene::new().await;
    let mut watch = scene.monitor.watch(OFTEN).unwrap();
    // Polled once and dropped, over and over: the sample continues where it was.
    let mut items = 0;
    while items < 2 {
        match watch.next().now_or_never() {
            Some(item) => {
                item.unwrap().unwrap();
                items += 1;
            }
            None => tokio::task::yield_now().await,
        }
    }
}

#[tokio::test]
async fn a_watch_and_a_recovery_survive_a_restart() {
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let mut watch = scene.monitor.watch(OFTEN).unwrap();
    let mut recovery = scene
        .monitor
        .recovery(RecoveryCriterion::no_waits().checks(2))
        .unwrap();
    let holder = scene.session().await;
    holder.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    scene.until_waiting(waiter.pid).await;
    assert_eq!(
        watch
            .next()
            .await
            .unwrap()
            .unwrap()
            .changes()
            .new_waits()
            .len(),
        1
    );
    assert!(!recovery.check().await.unwrap().is_recovered());

    server.stop();
    let error = loop {
        if let Err(error) = watch.next().await.unwrap() {
            break error;
        }
    };
    assert_error(&error, ErrorKind::Pool, "no connection from the pool");
    assert!(recovery.check().await.is_err());
    server.restart();
    // The waiters are gone, and are told so.
    let update = loop {
        if let Ok(update) = watch.next().await.unwrap() {
            break update;
        }
    };
    assert_eq!(update.changes().ended_waits().len(), 1);
    let check = recovery.wait(OFTEN, GIVE_UP_AFTER).await.unwrap();
    assert!(check.is_recovered(), "{check}");
    assert!(waiting.await.unwrap().is_err());
}

#[tokio::test]
async fn a_recovery_is_seen_coming() {
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let holder = scene.session().await;
    holder
        .run("BEGIN; UPDATE t SET v = 'h' WHERE id IN (1, 2)")
        .await;
    let mut waits = Vec::new();
    let mut waiters = Vec::new();
    for id in [1, 2] {
        let waiter = scene.session().await;
        waits.push(waiter.start(&format!("UPDATE t SET v = 'w' WHERE id = {id}")));
        scene.until_waiting(waiter.pid).await;
        waiters.push(waiter);
    }
    let criterion = RecoveryCriterion::no_waits().checks(2);
    let mut recovery = scene.monitor.recovery(criterion).unwrap();
    let mut short = scene
        .monitor
        .recovery(RecoveryCriterion::waits_shorter_than(10 * GIVE_UP_AFTER).checks(1))
        .unwrap();
    let check = recovery.check().await.unwrap();
    assert_eq!((check.waits().sessions(), check.trend()), (2, Trend::First));
    // None has waited for that long.
    assert!(short.check().await.unwrap().is_recovered());
    let check = recovery.check().await.unwrap();
    assert_eq!((check.trend(), check.met_for()), (Trend::Steady, 0));
    let seen = scene.seen(waiters[0].pid).await;
    assert!(scene.monitor.cancel(&seen).await.unwrap().is_signalled());
    assert!(waits.remove(0).await.unwrap().is_err());
    let check = recovery.check().await.unwrap();
    assert_eq!(
        (check.waits().sessions(), check.trend()),
        (1, Trend::Falling)
    );
    holder.run("COMMIT").await;
    waits.remove(0).await.unwrap().unwrap();
    let check = recovery.check().await.unwrap();
    assert_eq!(
        (check.falling_for(), check.met_for(), check.is_recovered()),
        (2, 1, false)
    );
    let snapshot = scene.monitor.snapshot().await.unwrap();
    assert!(recovery.observe(&snapshot).is_recovered());
}

#[tokio::test]
async fn what_cannot_work_is_refused() {
    let scene = MonitorScene::new().await;
    let monitor = keeper_as(&scene.database, scene.database.config()).monitor();
    for interval in [Duration::ZERO, Duration::from_millis(99)] {
        let error = monitor.watch(interval).unwrap_err();
        assert_error(&error, ErrorKind::Config, "at least 100ms");
    }
    let criterion = RecoveryCriterion::no_waits().checks(0);
    let error = monitor.recovery(criterion).unwrap_err();
    assert_error(&error, ErrorKind::Config, "0 checks");
    let mut recovery = monitor.recovery(RecoveryCriterion::no_waits()).unwrap();
    let error = recovery
        .wait(Duration::ZERO, GIVE_UP_AFTER)
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Config, "a check every 0ns");
    // The longest there is: it samples once.
    let mut watch = monitor.watch(Duration::MAX).unwrap();
    watch.next().await.unwrap().unwrap();
    assert!(watch.next().now_or_never().is_none());
}
