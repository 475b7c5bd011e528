//! A run as a whole: its hook, its log, its end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockkeeper::resolver::{Action, RunEnd, Step, StepOutcome};
use lockkeeper::{ErrorKind, LoadChange, RecoveryCriterion, ResolverPolicy};
use lockkeeper_testkit::{
    CapturedLog, GIVE_UP_AFTER, MonitorScene, Proxy, Server, assert_error, eventually, in_time,
    keeper_as, poll_times_and_drop, seen_by,
};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{PileUp, TICK, actions, policy, resolver};

async fn soon<T>(told: &mut UnboundedReceiver<T>) -> Option<T> {
    let told = tokio::time::timeout(GIVE_UP_AFTER, told.recv());
    told.await.expect("it is not told")
}

#[tokio::test]
async fn the_hook_can_panic_and_be_slow_and_is_told_of_the_end() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let policy = policy(&scene).hook_timeout(TICK).execute(true);
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (entered, mut entering) = tokio::sync::mpsc::unbounded_channel();
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let tell = sender.clone();
    let slow = policy
        .clone()
        .idle_grace(GIVE_UP_AFTER)
        .shed_load(move |change| {
            if change == LoadChange::Shed {
                entered.send(()).unwrap();
                gate.lock().unwrap().recv().ok();
            }
            tell.send(change).unwrap();
        });
    // Dropped on the way.
    let slow = resolver(&scene, slow);
    let mut run = Box::pin(slow.run());
    tokio::select! {
        _ = &mut run => panic!("it ended"),
        called = soon(&mut entering) => assert_eq!(called, Some(())),
    }
    // The run continues without the hook.
    let ended = tokio::time::timeout(10 * TICK, &mut run).await;
    assert!(ended.is_err(), "it ended");
    drop(run);
    go.send(()).unwrap();
    assert_eq!(soon(&mut told).await, Some(LoadChange::Shed));
    assert_eq!(soon(&mut told).await, Some(LoadChange::GaveUp));
    pile.is_untouched().await;

    let panics = policy.hook_timeout(GIVE_UP_AFTER).shed_load(move |change| {
        sender.send(change).unwrap();
        panic!("as it was told to");
    });
    let log = resolver(&scene, panics).run().await.unwrap();
    assert!(log.is_recovered(), "{log}");
    assert_eq!(*log.entries()[1].outcome(), StepOutcome::HookPanicked);
    assert_eq!(soon(&mut told).await, Some(LoadChange::Shed));
    assert_eq!(soon(&mut told).await, Some(LoadChange::Resume));
    pile.all_finish().await;
}

/// No session waits when the baseline is taken, and some do before the run has seen enough of the calm.
#[tokio::test]
async fn load_is_shed_before_a_pile_up_that_comes_later_is_dealt_with() {
    let scene = MonitorScene::new().await;
    let called = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::clone(&called);
    let policy = policy(&scene)
        .recovered_when(RecoveryCriterion::no_waits().checks(100))
        .shed_load(move |change| calls.lock().unwrap().push(change))
        .execute(true);
    // The pile-up is to come before the run has seen enough: there is little left to do for it then.
    let holder = scene.session().await;
    let waiters = [scene.session().await, scene.session().await];
    let (told, _logging) = CapturedLog::start();
    let calm = resolver(&scene, policy);
    let run = tokio::spawn(async move { calm.run().await });
    eventually("no baseline is kept", async || {
        told.text().contains("settings kept")
    })
    .await;
    let pile = PileUp::of(&scene, holder, waiters).await;
    let log = run.await.unwrap().unwrap();
    assert!(log.plan().waits().is_empty() && log.is_recovered(), "{log}");
    assert!(log.signals() > 0, "{log}");
    let shed = actions(&log)[0];
    assert_eq!(shed, (Action::ShedLoad, None), "{log}");
    assert_eq!(
        *called.lock().unwrap(),
        [LoadChange::Shed, LoadChange::Resume]
    );
    pile.all_finish().await;
}

/// Backends that stand still, as in a server that has no time for them, until they are continued.
struct Stopped<'a>(&'a MonitorScene, Vec<i32>);

impl<'a> Stopped<'a> {
    async fn all_but(scene: &'a MonitorScene, spared: &[i32]) -> Self {
        let sql = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
                   AND pid <> pg_backend_pid() AND pid <> ALL ($1)";
        let rows = scene.observer.query(sql, &[&spared]).await.unwrap();
        let pids = rows.iter().map(|row| row.get(0)).collect();
        let stopped = Self(scene, pids);
        stopped.signal("STOP").await;
        stopped
    }

    async fn signal(&self, name: &str) {
        for pid in &self.1 {
            let kill = format!("COPY (SELECT 1) TO PROGRAM 'cat > /dev/null; kill -{name} {pid}'");
            self.0.observer.batch_execute(&kill).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_not_waited_for_beyond_the_deadline() {
    // Of its own: a backend may be stopped while it holds what all others need.
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let pile = PileUp::new(&scene).await;
    // A connection of the pool, which is asked where the other one does not answer.
    drop(scene.keeper.advisory_lock("k").acquire().await.unwrap());
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let patient = policy(&scene)
        .idle_grace(4 * GIVE_UP_AFTER)
        .deadline(50 * TICK)
        .shed_load(move |change| sender.send(change).unwrap())
        .execute(true);
    let patient = resolver(&scene, patient);
    let run = tokio::spawn(async move { patient.run().await });
    assert_eq!(told.recv().await, Some(LoadChange::Shed));
    let stopped = Stopped::all_but(&scene, &[pile.holder.pid]).await;
    let ended = tokio::time::timeout(GIVE_UP_AFTER, run).await;
    let activity = tokio::time::timeout(GIVE_UP_AFTER, scene.monitor.activity()).await;
    stopped.signal("CONT").await;
    let log = ended.expect("it does not end").unwrap().unwrap();
    assert_eq!((log.end(), log.signals()), (&RunEnd::Deadline, 0), "{log}");
    assert!(activity.is_ok(), "a sample does not end");
    pile.is_untouched().await;
    pile.holder.run("COMMIT").await;
    pile.all_finish().await;
}

#[tokio::test]
async fn dropped_at_any_point_a_run_leaves_no_transaction() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let dry = resolver(&scene, policy(&scene));
    let mut polls = 0;
    while poll_times_and_drop(dry.run(), polls).await.is_none() {
        polls += 1;
    }
    assert!(polls > 4, "{polls}");
    pile.is_untouched().await;
    pile.holder.run("COMMIT").await;
    pile.all_finish().await;
}

#[tokio::test]
async fn dropped_at_any_point_a_run_that_acts_tells_the_hook_of_its_end() {
    let scene = MonitorScene::new().await;
    let harmless = scene.session().await;
    harmless
        .run("BEGIN; UPDATE t SET v = 'h' WHERE id = 2")
        .await;
    let mut pile = PileUp::new(&scene).await;
    let mut polls = 0;
    loop {
        if pile.holder.client.is_closed() {
            pile.all_finish().await;
            pile = PileUp::new(&scene).await;
        }
        let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
        let eager = policy(&scene)
            .idle_grace(Duration::ZERO)
            .shed_load(move |change| sender.send(change).unwrap())
            .execute(true);
        let resolver = resolver(&scene, eager);
        let log = poll_times_and_drop(resolver.run(), polls).await;
        drop(resolver);
        // Until the hook is dropped.
        let mut changes = Vec::new();
        let all = async {
            while let Some(change) = told.recv().await {
                changes.push(change);
            }
        };
        in_time("something is left of the run", all).await;
        let end = match &log {
            Some(_) => LoadChange::Resume,
            None => *changes.last().unwrap_or(&LoadChange::GaveUp),
        };
        assert!(
            changes.is_empty() || changes == [LoadChange::Shed, end],
            "after {polls} polls: {changes:?}"
        );
        assert_ne!(end, LoadChange::Shed, "after {polls} polls");
        if let Some(log) = log {
            let log = log.unwrap();
            assert!(log.is_recovered() && log.signals() <= 1, "{log}");
            break;
        }
        polls += 1;
    }
    assert!(polls > 10, "{polls}");
    eventually("a transaction is left open", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND application_name = 'lockkeeper side connection' AND xact_start IS NOT NULL";
        let row = scene.observer.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    assert!(harmless.is_alive().await);
}

#[tokio::test]
async fn every_step_is_an_event_and_shows_no_literal() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let (told, logging) = CapturedLog::start();
    let log = {
        let resolver = resolver(&scene, policy(&scene).execute(true));
        resolver.run().await.unwrap()
    };
    assert!(log.is_recovered(), "{log}");
    drop(logging);
    let told = told.text();
    let events: Vec<_> = told
        .lines()
        .filter(|line| line.contains("lockkeeper::resolver"))
        .collect();
    assert_eq!(events.len(), log.entries().len() + 1, "{told}");
    for (event, row) in events.iter().zip(log.entries()) {
        assert!(event.contains(" INFO "), "{event}");
        assert!(event.contains(&row.to_string()), "{event}");
    }
    assert!(events.last().unwrap().contains("recovered"));
    // What the holder wrote is in the baseline, and in no text.
    let holder = log.baseline().snapshot().backend(&pile.holder.pid.into());
    assert!(holder.unwrap().statement().unwrap().contains("'h'"));
    for text in [told, log.to_string(), format!("{log:?}")] {
        assert!(!text.contains("'h'"), "{text}");
    }
    pile.all_finish().await;
}

#[tokio::test]
async fn without_a_waiter_there_is_nothing_to_do() {
    let scene = MonitorScene::new().await;
    let idle = scene.session().await;
    idle.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let policy = policy(&scene)
        .idle_grace(Duration::ZERO)
        .shed_load(|_| panic!("it is called"))
        .execute(true);
    let log = resolver(&scene, policy).run().await.unwrap();
    assert!(log.is_recovered() && log.signals() == 0, "{log}");
    assert_eq!(log.entries().len(), 1, "{log}");
    assert!(idle.is_alive().await);
}

#[tokio::test]
async fn bad_policies_are_refused_before_anything_is_sent() {
    let scene = MonitorScene::new().await;
    let no_checks = RecoveryCriterion::no_waits().checks(0);
    for (policy, text) in [
        (ResolverPolicy::new().poll(Duration::ZERO), "at least 10ms"),
        (
            ResolverPolicy::new().deadline(Duration::ZERO),
            "a deadline of 0",
        ),
        (ResolverPolicy::new().recovered_when(no_checks), "0 checks"),
    ] {
        let error = scene.monitor.resolver(policy).run().await.unwrap_err();
        assert_error(&error, ErrorKind::Config, text);
    }
}

#[tokio::test]
async fn a_plan_needs_no_server() {
    let scene = MonitorScene::new().await;
    let pile = PileUp::new(&scene).await;
    let working = pile.holder.start("SELECT pg_sleep(600)");
    scene.until_in_state(pile.holder.pid, "active").await;
    let tree = scene.monitor.lock_tree().await.unwrap();
    let policy = policy(&scene).wait(10 * TICK);
    let plan = resolver(&scene, policy).plan(&tree);
    let mut roots = plan.roots().iter();
    let root = roots
        .find(|root| root.backend().pid() == Some(pile.holder.pid))
        .unwrap();
    assert_eq!(
        root.steps(),
        [Step::Wait(10 * TICK), Step::Cancel, Step::Terminate]
    );
    assert_eq!(root.blocks(), 2);
    assert!(plan.is_from_tree_only() && plan.to_string().contains("before any step"));
    let seen = seen_by(&scene.monitor, pile.holder.pid).await;
    scene.monitor.cancel(&seen).await.unwrap();
    assert!(working.await.unwrap().is_err());
    pile.all_finish().await;
}

#[tokio::test]
async fn a_run_continues_after_a_restart_of_the_server() {
    let server = Server::start(&[]).unwrap();
    let mut scene = MonitorScene::on(&server).await;
    let proxy = Proxy::before(&server);
    let side = proxy.config(&scene.database.config());
    scene.monitor = keeper_as(&scene.database, side).monitor();
    let pile = PileUp::new(&scene).await;
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let patient = policy(&scene)
        .idle_grace(4 * GIVE_UP_AFTER)
        .shed_load(move |change| sender.send(change).unwrap())
        .execute(true);
    let resolver = resolver(&scene, patient);
    let run = tokio::spawn(async move { resolver.run().await });
    assert_eq!(told.recv().await, Some(LoadChange::Shed));
    proxy.refuse(true);
    server.stop();
    // Until the run has asked in vain.
    eventually("no question fails", async || proxy.refused() > 2).await;
    proxy.refuse(false);
    server.restart();
    let log = run.await.unwrap().unwrap();
    assert!(log.is_recovered() && log.signals() == 0, "{log}");
    assert_eq!(told.recv().await, Some(LoadChange::Resume));
    for wait in pile.waits {
        assert!(wait.await.unwrap().is_err());
    }
}
