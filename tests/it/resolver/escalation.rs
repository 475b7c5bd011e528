//! From waiting to a cancel to a termination.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockkeeper::LoadChange;
use lockkeeper::resolver::{Action, RunEnd, StepOutcome};
use lockkeeper_testkit::{GIVE_UP_AFTER, MonitorScene, Session, eventually};

use super::{PileUp, TICK, actions, left_alone, policy, resolver};

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let called = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::clone(&called);
    let policy = policy(&scene)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .shed_load(move |change| calls.lock().unwrap().push(change));
    let resolver = resolver(&scene, policy);
    // Where the side connection is not open in time, one of the pool's is asked.
    eventually("there is no side connection", async || {
        drop(scene.monitor.activity().await);
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() \
                   AND application_name = 'lockkeeper side connection' AND state = 'idle')";
        scene.observer.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    let log = resolver.run().await.unwrap();
    assert_eq!(*log.end(), RunEnd::DryRun);
    assert_eq!(log.signals(), 0);
    let pid = Some(pile.holder.pid);
    assert_eq!(
        actions(&log),
        [(Action::Wait, pid), (Action::Terminate, pid)]
    );
    for row in &log.entries()[1..] {
        assert_eq!(*row.outcome(), StepOutcome::DryRun);
    }
    let text = log.to_string();
    assert!(
        text.contains("dry run") && text.contains("keeps 2 sessions waiting"),
        "{text}"
    );
    pile.is_untouched().await;
    assert!(called.lock().unwrap().is_empty());
    // The baseline is of that time.
    let baseline = log.baseline();
    assert_eq!(
        baseline.snapshot().blocked_count(&pile.holder.pid.into()),
        2
    );
    assert!(baseline.activity().iter().any(|b| b.pid() == pid));
    let setting = |name: &str| {
        let mut settings = baseline.settings().iter();
        settings
            .find(|setting| setting.name() == name)
            .unwrap()
            .clone()
    };
    assert_eq!(
        setting("deadlock_timeout").to_string(),
        "deadlock_timeout = 1000 ms"
    );
    assert_eq!(
        setting("lock_timeout").value(),
        "1000",
        "the side connection's own"
    );
    pile.holder.run("COMMIT").await;
    pile.all_finish().await;
}

#[tokio::test]
async fn who_finishes_is_waited_for() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    // It works until the gate opens, which is when the run has begun.
    scene
        .observer
        .batch_execute("CREATE TABLE gate ()")
        .await
        .unwrap();
    let working = pile.holder.start(
        "DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.01); END LOOP; END $$; COMMIT",
    );
    scene.until_in_state(pile.holder.pid, "active").await;
    let (sender, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let patient = policy(&scene)
        .wait(4 * GIVE_UP_AFTER)
        .shed_load(move |change| sender.send(change).unwrap())
        .execute(true);
    let resolver = resolver(&scene, patient);
    let run = tokio::spawn(async move { resolver.run().await });
    assert_eq!(begun.recv().await, Some(LoadChange::Shed));
    scene
        .observer
        .batch_execute("INSERT INTO gate DEFAULT VALUES")
        .await
        .unwrap();
    let log = run.await.unwrap().unwrap();
    assert!(log.is_recovered() && log.signals() == 0, "{log}");
    for row in log.entries() {
        if row.action() == Action::Wait {
            assert_eq!(*row.outcome(), StepOutcome::Helped, "{log}");
        }
    }
    working.await.unwrap().unwrap();
    pile.all_finish().await;
}

#[tokio::test]
async fn a_statement_is_cancelled_when_waiting_did_not_help() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let working = pile.holder.start("SELECT pg_sleep(600)");
    scene.until_in_state(pile.holder.pid, "active").await;
    let called = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::clone(&called);
    let policy = policy(&scene)
        .wait(50 * TICK)
        .shed_load(move |change| calls.lock().unwrap().push(change))
        .execute(true);
    let log = resolver(&scene, policy).run().await.unwrap();
    let pid = Some(pile.holder.pid);
    assert_eq!(
        actions(&log),
        [
            (Action::ShedLoad, None),
            (Action::Wait, pid),
            (Action::Cancel, pid),
            (Action::ResumeLoad, None)
        ],
        "{log}"
    );
    assert!(log.is_recovered() && log.signals() == 1, "{log}");
    let cancel = &log.entries()[3];
    assert_eq!(*cancel.outcome(), StepOutcome::Helped);
    assert_eq!(cancel.waits_before().unwrap().sessions(), 2);
    assert_eq!(cancel.waits_fell(), Some(true), "{log}");
    let waited = &log.entries()[2];
    assert_eq!(*waited.outcome(), StepOutcome::DidNotHelp);
    assert!(waited.after() >= 50 * TICK);
    assert_eq!(
        *called.lock().unwrap(),
        [LoadChange::Shed, LoadChange::Resume]
    );
    let error = working.await.unwrap().unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");
    // Its session lives.
    pile.holder.run("ROLLBACK").await;
    pile.all_finish().await;
}

#[tokio::test]
async fn a_session_is_terminated_when_a_cancel_did_not_help() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let stubborn = "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(600); \
                    EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$";
    let working = pile.holder.start(stubborn);
    scene.until_in_state(pile.holder.pid, "active").await;
    let policy = policy(&scene).wait(50 * TICK).execute(true);
    let polite = policy.clone().allow_terminate(false).settle(50 * TICK);
    let polite = resolver(&scene, polite);
    let log = polite.run().await.unwrap();
    let pid = Some(pile.holder.pid);
    assert_eq!(
        actions(&log),
        [
            (Action::Wait, pid),
            (Action::Cancel, pid),
            (Action::LeaveAlone, pid)
        ],
        "{log}"
    );
    assert_eq!(*log.end(), RunEnd::NothingLeftToDo);
    assert_eq!(*log.entries()[2].outcome(), StepOutcome::DidNotHelp);

    // The cancel does not help for all of that time, and the termination has to within it.
    let log = resolver(&scene, policy.settle(GIVE_UP_AFTER / 3))
        .run()
        .await
        .unwrap();
    assert_eq!(
        actions(&log),
        [
            (Action::Wait, pid),
            (Action::Cancel, pid),
            (Action::Terminate, pid)
        ],
        "{log}"
    );
    assert!(log.is_recovered() && log.signals() == 2, "{log}");
    assert!(working.await.unwrap().is_err());
    scene.until_gone(pile.holder.pid).await;
    pile.all_finish().await;
}

#[tokio::test]
async fn one_that_idles_in_its_transaction_is_only_terminated_and_only_after_its_grace() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let patient = policy(&scene)
        .idle_grace(2 * GIVE_UP_AFTER)
        .deadline(20 * TICK)
        .execute(true);
    let log = resolver(&scene, patient).run().await.unwrap();
    assert_eq!(*log.end(), RunEnd::Deadline, "{log}");
    assert_eq!(log.signals(), 0);
    pile.is_untouched().await;
    // It has just done something: the grace begins anew.
    let log = resolver(&scene, policy(&scene).execute(true))
        .run()
        .await
        .unwrap();
    let pid = Some(pile.holder.pid);
    assert_eq!(
        actions(&log),
        [(Action::Wait, pid), (Action::Terminate, pid)],
        "{log}"
    );
    let target = log.entries()[2].target().unwrap();
    assert!(target.state_age().unwrap() >= 10 * TICK, "{log}");
    assert!(log.is_recovered(), "{log}");
    scene.until_gone(pile.holder.pid).await;
    pile.all_finish().await;
}

#[tokio::test]
async fn one_root_blocker_after_another() {
    let scene = MonitorScene::new().await;
    let first = PileUp::new(&scene).await;
    let other = scene.session().await;
    other.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 2").await;
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 2");
    scene.until_waiting(waiter.pid).await;
    let log = resolver(&scene, policy(&scene).execute(true))
        .run()
        .await
        .unwrap();
    let (one, two) = (Some(first.holder.pid), Some(other.pid));
    assert_eq!(
        actions(&log),
        [
            (Action::Wait, one),
            (Action::Terminate, one),
            (Action::Wait, two),
            (Action::Terminate, two)
        ],
        "{log}"
    );
    assert!(log.is_recovered());
    waiting.await.unwrap().unwrap();
    first.all_finish().await;

    // As many signals as are allowed, and no more.
    let again = PileUp::new(&scene).await;
    let _other = other_pile(&scene).await;
    let policy = policy(&scene).max_signals(1).execute(true);
    let log = resolver(&scene, policy).run().await.unwrap();
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::MaxSignals, 1),
        "{log}"
    );
    again.all_finish().await;
}

/// A session that is idle in a transaction with one waiter, on another row, for as long as they are kept.
async fn other_pile(scene: &MonitorScene) -> (Session, Session) {
    let other = scene.session().await;
    other.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 3").await;
    let waiter = scene.session().await;
    drop(waiter.start("UPDATE t SET v = 'w' WHERE id = 3"));
    scene.until_waiting(waiter.pid).await;
    (other, waiter)
}

#[tokio::test]
async fn an_idle_sessions_lock_is_only_cleared_if_told_to() {
    let scene = MonitorScene::new().await;
    let holder = scene.session().await;
    holder.run("SELECT pg_advisory_lock(77)").await;
    let waiter = scene.session().await;
    let waiting = waiter.start("SELECT pg_advisory_lock(77)");
    scene.until_waiting(waiter.pid).await;
    let eager = policy(&scene).settle(TICK).execute(true);
    let log = resolver(&scene, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, holder.pid).contains("idle_session_grace"));
    assert!(holder.is_alive().await);
    let told = eager.idle_session_grace(TICK).settle(GIVE_UP_AFTER);
    let log = resolver(&scene, told).run().await.unwrap();
    assert!(log.is_recovered() && log.signals() == 1, "{log}");
    waiting.await.unwrap().unwrap();
    scene.until_gone(holder.pid).await;
}
