//! The resolver: waits, then cancels, then terminates, and leaves alone whom it must.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockkeeper::graph::Backend;
use lockkeeper::resolver::{Action, RunEnd, Setting, Step, StepOutcome, Verdict};
use lockkeeper::{
    ErrorKind, LoadChange, Monitor, Protection, RecoveryCriterion, Resolver, ResolverPolicy,
    RunLog, SignalOutcome,
};
use lockkeeper_testkit::{
    CapturedLog, GIVE_UP_AFTER, MonitorScene, Server, Session, eventually, eventually_within,
    keeper_as, poll_times_and_drop, quoted, seen_by,
};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

const TICK: Duration = Duration::from_millis(20);

/// Quick, and of this database only: the server is shared with other tests.
fn policy(ground: &MonitorScene) -> ResolverPolicy {
    ResolverPolicy::new()
        .database(ground.database.name())
        // Who has waited and writes now is in the next one's way for a moment, which on a slow machine is a long one.
        .wait(GIVE_UP_AFTER)
        .idle_grace(10 * TICK)
        .settle(GIVE_UP_AFTER)
        .poll(TICK)
        .deadline(4 * GIVE_UP_AFTER)
        .recovered_when(RecoveryCriterion::no_waits().checks(2))
}

fn resolver(ground: &MonitorScene, policy: ResolverPolicy) -> Resolver {
    ground.monitor.resolver(policy)
}

/// Somebody who has the row 1, and two who wait for it.
struct PileUp {
    holder: Session,
    waits: Vec<JoinHandle<Result<(), tokio_postgres::Error>>>,
}

impl PileUp {
    async fn behind(ground: &MonitorScene, holder: Session) -> Self {
        let waiters = [ground.session().await, ground.session().await];
        Self::of(ground, holder, waiters).await
    }

    async fn of(ground: &MonitorScene, holder: Session, waiters: [Session; 2]) -> Self {
        holder.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
        let mut waits = Vec::new();
        for waiter in waiters {
            waits.push(waiter.start("UPDATE t SET v = 'w' WHERE id = 1"));
            ground.until_waiting(waiter.pid).await;
        }
        Self { holder, waits }
    }

    async fn new(ground: &MonitorScene) -> Self {
        let holder = ground.session().await;
        Self::behind(ground, holder).await
    }

    async fn all_go_on(self) {
        for wait in self.waits {
            wait.await.unwrap().unwrap();
        }
    }

    /// The holder is there still, and in its transaction.
    async fn is_untouched(&self) {
        assert!(self.holder.is_alive().await);
        let sql = "SELECT 1 FROM t WHERE id = 1 AND v = 'h'";
        let rows = self.holder.client.query(sql, &[]).await.unwrap();
        assert_eq!(rows.len(), 1);
        // The statement is closed by a message of its own, which is to be over by the time this is.
        self.holder.client.batch_execute("").await.unwrap();
    }
}

/// What was done to whom, without the baseline.
///
/// Nor with those who have waited: each is in the way of the next one for as long as its own statement takes, which on a
/// slow machine is seen.
fn actions(log: &RunLog) -> Vec<(Action, Option<i32>)> {
    let has_waited = |target: Option<&Backend>| {
        let statement = target.and_then(Backend::statement);
        statement.is_some_and(|sql| sql.contains("v = 'w'"))
    };
    log.rows()
        .iter()
        .filter(|row| row.action() != Action::Baseline && !has_waited(row.target()))
        .map(|row| {
            let pid = row.target().and_then(|target| target.pid());
            (row.action(), pid)
        })
        .collect()
}

fn left_alone(log: &RunLog, pid: i32) -> String {
    let rows = log.rows().iter();
    let mut rows = rows.filter(|row| row.target().and_then(|target| target.pid()) == Some(pid));
    let row = rows.next().unwrap_or_else(|| panic!("{log}"));
    assert_eq!(row.action(), Action::LeaveAlone, "{log}");
    row.outcome().to_string()
}

/// Whether a look at the settings was the side connection's, which sets this one.
fn is_the_side_connections(setting: &Setting) -> bool {
    setting.name() == "lock_timeout" && setting.value() == "1000"
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let called = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::clone(&called);
    let policy = policy(&ground)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .shed_load(move |change| calls.lock().unwrap().push(change));
    let resolver = resolver(&ground, policy);
    let mut log = resolver.run().await.unwrap();
    // When the side connection does not answer in time, one of the pool's is asked.
    for _ in 0..20 {
        let settings = log.baseline().settings();
        if settings.iter().any(is_the_side_connections) {
            break;
        }
        log = resolver.run().await.unwrap();
    }
    assert_eq!(*log.end(), RunEnd::DryRun);
    assert_eq!(log.signals(), 0);
    let pid = Some(pile.holder.pid);
    assert_eq!(
        actions(&log),
        [(Action::Wait, pid), (Action::Terminate, pid)]
    );
    for row in &log.rows()[1..] {
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
    assert_eq!(baseline.snapshot().blocked_by(&pile.holder.pid.into()), 2);
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
    pile.all_go_on().await;
}

#[tokio::test]
async fn who_finishes_is_waited_for() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    // It works until the gate opens, which is when the run has begun.
    ground
        .observer
        .batch_execute("CREATE TABLE gate ()")
        .await
        .unwrap();
    let working = pile.holder.start(
        "DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.01); END LOOP; END $$; COMMIT",
    );
    ground.until_in_state(pile.holder.pid, "active").await;
    let (sender, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let patient = policy(&ground)
        .wait(4 * GIVE_UP_AFTER)
        .shed_load(move |change| sender.send(change).unwrap())
        .execute(true);
    let resolver = resolver(&ground, patient);
    let run = tokio::spawn(async move { resolver.run().await });
    assert_eq!(begun.recv().await, Some(LoadChange::Shed));
    ground
        .observer
        .batch_execute("INSERT INTO gate DEFAULT VALUES")
        .await
        .unwrap();
    let log = run.await.unwrap().unwrap();
    assert!(log.is_recovered() && log.signals() == 0, "{log}");
    for row in log.rows() {
        if row.action() == Action::Wait {
            assert_eq!(*row.outcome(), StepOutcome::Helped, "{log}");
        }
    }
    working.await.unwrap().unwrap();
    pile.all_go_on().await;
}

#[tokio::test]
async fn a_statement_is_cancelled_when_waiting_did_not_help() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let working = pile.holder.start("SELECT pg_sleep(600)");
    ground.until_in_state(pile.holder.pid, "active").await;
    let called = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::clone(&called);
    let policy = policy(&ground)
        .wait(50 * TICK)
        .shed_load(move |change| calls.lock().unwrap().push(change))
        .execute(true);
    let log = resolver(&ground, policy).run().await.unwrap();
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
    let cancel = &log.rows()[3];
    assert_eq!(*cancel.outcome(), StepOutcome::Helped);
    assert_eq!(cancel.waits_before().unwrap().sessions(), 2);
    assert_eq!(cancel.waits_fell(), Some(true), "{log}");
    let waited = &log.rows()[2];
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
    pile.all_go_on().await;
}

#[tokio::test]
async fn a_session_is_terminated_when_a_cancel_did_not_help() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let stubborn = "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(600); \
                    EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$";
    let working = pile.holder.start(stubborn);
    ground.until_in_state(pile.holder.pid, "active").await;
    let policy = policy(&ground).wait(50 * TICK).execute(true);
    let polite = policy.clone().may_terminate(false).settle(50 * TICK);
    let polite = resolver(&ground, polite);
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
    assert_eq!(*log.rows()[2].outcome(), StepOutcome::DidNotHelp);

    // The cancel does not help for all of that time, and the termination has to within it.
    let log = resolver(&ground, policy.settle(GIVE_UP_AFTER / 3))
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
    ground.until_gone(pile.holder.pid).await;
    pile.all_go_on().await;
}

#[tokio::test]
async fn one_that_idles_in_its_transaction_is_only_terminated_and_only_after_its_grace() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let patient = policy(&ground)
        .idle_grace(2 * GIVE_UP_AFTER)
        .deadline(20 * TICK)
        .execute(true);
    let log = resolver(&ground, patient).run().await.unwrap();
    assert_eq!(*log.end(), RunEnd::Deadline, "{log}");
    assert_eq!(log.signals(), 0);
    pile.is_untouched().await;
    // It has just done something: the grace begins anew.
    let log = resolver(&ground, policy(&ground).execute(true))
        .run()
        .await
        .unwrap();
    let pid = Some(pile.holder.pid);
    assert_eq!(
        actions(&log),
        [(Action::Wait, pid), (Action::Terminate, pid)],
        "{log}"
    );
    let target = log.rows()[2].target().unwrap();
    assert!(target.in_state().unwrap() >= 10 * TICK, "{log}");
    assert!(log.is_recovered(), "{log}");
    ground.until_gone(pile.holder.pid).await;
    pile.all_go_on().await;
}

#[tokio::test]
async fn one_root_blocker_after_another() {
    let ground = MonitorScene::new().await;
    let first = PileUp::new(&ground).await;
    let other = ground.session().await;
    other.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 2").await;
    let waiter = ground.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 2");
    ground.until_waiting(waiter.pid).await;
    let log = resolver(&ground, policy(&ground).execute(true))
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
    first.all_go_on().await;

    // As many signals as are allowed, and no more.
    let again = PileUp::new(&ground).await;
    let _other = other_pile(&ground).await;
    let policy = policy(&ground).most_signals(1).execute(true);
    let log = resolver(&ground, policy).run().await.unwrap();
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::MostSignals, 1),
        "{log}"
    );
    again.all_go_on().await;
}

/// Somebody idle in a transaction with one waiter, on another row, for as long as they are kept.
async fn other_pile(ground: &MonitorScene) -> (Session, Session) {
    let other = ground.session().await;
    other.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 3").await;
    let waiter = ground.session().await;
    drop(waiter.start("UPDATE t SET v = 'w' WHERE id = 3"));
    ground.until_waiting(waiter.pid).await;
    (other, waiter)
}

#[tokio::test]
async fn migrations_index_builds_and_patterns_are_left_alone() {
    let ground = MonitorScene::new().await;
    let eager = policy(&ground)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    // By what it has said.
    let migration = ground.session().await;
    migration.run("BEGIN; ALTER TABLE t ADD w int").await;
    let reader = ground.session().await;
    let reading = reader.start("SELECT FROM t");
    ground.until_waiting(reader.pid).await;
    let log = resolver(&ground, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, migration.pid).contains("migration"));
    assert_eq!((log.end(), log.signals()), (&RunEnd::NothingLeftToDo, 0));
    migration.run("COMMIT").await;
    reading.await.unwrap().unwrap();

    // By the name of the lock it holds, though it writes rows by now.
    let guard_key = lockkeeper::LockKey::from("app-migrations");
    let migration = ground.session().await;
    let lock = format!("SELECT pg_advisory_lock({})", guard_key.as_i64().unwrap());
    migration.run(&lock).await;
    let pile = PileUp::behind(&ground, migration).await;
    let named = ground.monitor.clone().names([guard_key.clone()]);
    let log = named.resolver(eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("migration"));
    pile.is_untouched().await;
    // A monitor that does not know the name is told the key.
    let told = eager.clone().migration_key(guard_key.as_i64().unwrap());
    let log = resolver(&ground, told).run().await.unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("migration"));
    pile.is_untouched().await;
    pile.holder
        .run("COMMIT; SELECT pg_advisory_unlock_all()")
        .await;
    pile.all_go_on().await;

    // By a name that the policy gives.
    let named = ground.session().await;
    named.run("SET application_name = 'Payroll \"07\"'").await;
    let pile = PileUp::behind(&ground, named).await;
    let log = resolver(&ground, eager.clone().protect("payroll *"))
        .run()
        .await
        .unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("payroll *"));
    pile.is_untouched().await;
    pile.holder
        .run("SET LOCAL application_name = 'pg_dump'; SELECT")
        .await;
    let log = resolver(&ground, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("backup"));
    pile.is_untouched().await;
    pile.holder.run("ROLLBACK").await;
    pile.all_go_on().await;

    // An index build that waits for an old transaction is no root; one that others wait for is left alone.
    let function = "CREATE FUNCTION slow(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
                    $$ BEGIN PERFORM pg_sleep(600); RETURN $1; END $$";
    ground.observer.batch_execute(function).await.unwrap();
    let builder = ground.session().await;
    let building = builder.start("CREATE INDEX ON t (slow(id))");
    ground.until_in_state(builder.pid, "active").await;
    let writer = ground.session().await;
    // Only once the build has its lock.
    eventually("it builds nothing", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE pid = $1)";
        let row = ground
            .observer
            .query_one(sql, &[&builder.pid])
            .await
            .unwrap();
        row.get(0)
    })
    .await;
    let writing = writer.start("UPDATE t SET v = 'w' WHERE id = 5");
    ground.until_waiting(writer.pid).await;
    let log = resolver(&ground, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, builder.pid).contains("builds an index"));
    assert!(!building.is_finished());
    // With leave it is cancelled.
    let log = resolver(&ground, eager.touch_migrations(true).settle(GIVE_UP_AFTER))
        .run()
        .await
        .unwrap();
    assert!(log.is_recovered(), "{log}");
    assert!(building.await.unwrap().is_err());
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn oneself_is_left_alone() {
    let ground = MonitorScene::new().await;
    let guard = ground.keeper.advisory_lock("k").acquire().await.unwrap();
    guard
        .execute("UPDATE t SET v = 'h' WHERE id = 1", &[])
        .await
        .unwrap();
    let waiter = ground.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    ground.until_waiting(waiter.pid).await;
    let eager = policy(&ground)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    let log = resolver(&ground, eager.clone()).run().await.unwrap();
    let pid = guard.backend_pid().unwrap();
    assert!(left_alone(&log, pid).contains("this process"), "{log}");
    guard.execute("SELECT 1", &[]).await.unwrap();
    // The pure plan knows as much.
    let tree = ground.monitor.lock_tree().await.unwrap();
    let plan = resolver(&ground, eager.clone()).plan(&tree);
    let mut roots = plan.roots().iter();
    let root = roots
        .find(|root| root.backend().pid() == Some(pid))
        .unwrap();
    assert_eq!(*root.verdict(), Verdict::LeaveAlone(Protection::OwnSession));
    let allowed = eager.touch_own_sessions(true).settle(GIVE_UP_AFTER);
    let log = resolver(&ground, allowed).run().await.unwrap();
    assert!(log.is_recovered() && log.signals() == 1, "{log}");
    waiting.await.unwrap().unwrap();
    drop(guard);
}

#[tokio::test]
async fn prepared_transactions_and_circles_are_for_others() {
    let ground = MonitorScene::new().await;
    let gid = format!("order {}", ground.database.name());
    let session = ground.session().await;
    session
        .run(&format!(
            "BEGIN; UPDATE t SET v = 'p' WHERE id = 1; PREPARE TRANSACTION '{gid}'"
        ))
        .await;
    let waiter = ground.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    ground.until_waiting(waiter.pid).await;
    let eager = policy(&ground)
        .wait(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    let log = resolver(&ground, eager.clone()).run().await.unwrap();
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );
    let statement = format!("ROLLBACK PREPARED '{gid}'");
    assert!(log.to_string().contains(&statement), "{log}");
    let root = &log.plan().roots()[0];
    let by_hand = Verdict::ByHand {
        statement: Some(statement.as_str().into()),
    };
    assert!(format!("{:?}", root.verdict()) == format!("{by_hand:?}"));
    ground.observer.batch_execute(&statement).await.unwrap();
    waiting.await.unwrap().unwrap();

    let (a, b) = (ground.session().await, ground.session().await);
    for (session, id) in [(&a, 1), (&b, 2)] {
        let sql =
            format!("SET deadlock_timeout = '30s'; BEGIN; UPDATE t SET v = 'd' WHERE id = {id}");
        session.run(&sql).await;
    }
    let one = a.start("UPDATE t SET v = 'd' WHERE id = 2");
    ground.until_waiting(a.pid).await;
    let two = b.start("UPDATE t SET v = 'd' WHERE id = 1");
    ground.until_waiting(b.pid).await;
    let log = resolver(&ground, eager).run().await.unwrap();
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );
    assert!(log.to_string().contains("deadlock_timeout"), "{log}");
    assert!(!one.is_finished() && !two.is_finished());
    drop((a, b));
    one.abort();
    two.abort();
}

#[tokio::test]
async fn an_idle_sessions_lock_is_only_cleared_if_told_to() {
    let ground = MonitorScene::new().await;
    let holder = ground.session().await;
    holder.run("SELECT pg_advisory_lock(77)").await;
    let waiter = ground.session().await;
    let waiting = waiter.start("SELECT pg_advisory_lock(77)");
    ground.until_waiting(waiter.pid).await;
    let eager = policy(&ground).settle(TICK).execute(true);
    let log = resolver(&ground, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, holder.pid).contains("idle_session_grace"));
    assert!(holder.is_alive().await);
    let told = eager.idle_session_grace(TICK).settle(GIVE_UP_AFTER);
    let log = resolver(&ground, told).run().await.unwrap();
    assert!(log.is_recovered() && log.signals() == 1, "{log}");
    waiting.await.unwrap().unwrap();
    ground.until_gone(holder.pid).await;
}

#[tokio::test]
async fn roles() {
    let ground = MonitorScene::new().await;
    let eager = policy(&ground).idle_grace(Duration::ZERO).execute(true);
    let quick = eager.clone().settle(TICK);
    let app = ground.role("app", "").await;
    let boss = ground.role("boss", "SUPERUSER").await;
    let plain = ground.role("plain \"ops\"", "").await;
    let signals = ground
        .role("signaller", "IN ROLE pg_signal_backend, pg_read_all_stats")
        .await;
    let monitor_of = |config: &tokio_postgres::Config| -> Monitor {
        keeper_as(&ground.database, config.clone()).monitor()
    };

    // A plain role sees that there is something, not what, and says what would show it.
    let pile = PileUp::behind(&ground, Session::connect(&app).await).await;
    let monitor = monitor_of(&plain);
    let log = monitor.resolver(quick.clone()).run().await.unwrap();
    let needs = left_alone(&log, pile.holder.pid);
    let grant = format!(
        "GRANT pg_read_all_stats TO {}",
        quoted(plain.get_user().unwrap())
    );
    assert!(needs.contains(&grant), "{needs}");
    ground.observer.batch_execute(&grant).await.unwrap();
    // Now it sees, and may not signal.
    let log = monitor.resolver(quick.clone()).run().await.unwrap();
    let refused = log.rows().iter().find_map(|row| match row.outcome() {
        StepOutcome::NotSignalled(SignalOutcome::NotPermitted { needs, .. }) => Some(needs.clone()),
        _ => None,
    });
    let refused = refused.unwrap_or_else(|| panic!("{log}"));
    assert_eq!(log.signals(), 0);
    pile.is_untouched().await;
    ground.observer.batch_execute(&refused).await.unwrap();
    let log = monitor.resolver(eager.clone()).run().await.unwrap();
    assert!(log.is_recovered(), "{log}");
    ground.until_gone(pile.holder.pid).await;
    pile.all_go_on().await;

    // Who may signal reaches no superuser, and does not try.
    let pile = PileUp::behind(&ground, Session::connect(&boss).await).await;
    let monitor = monitor_of(&signals);
    let log = monitor.resolver(quick.clone()).run().await.unwrap();
    assert!(
        left_alone(&log, pile.holder.pid).contains("superuser"),
        "{log}"
    );
    // Nor does another superuser, unless told to.
    let log = resolver(&ground, quick.clone()).run().await.unwrap();
    assert!(
        left_alone(&log, pile.holder.pid).contains("superuser"),
        "{log}"
    );
    pile.is_untouched().await;
    let told = monitor.resolver(quick.touch_superusers(true));
    let log = told.run().await.unwrap();
    assert!(log.to_string().contains("only a superuser"), "{log}");
    pile.is_untouched().await;
    let log = resolver(&ground, eager.touch_superusers(true))
        .run()
        .await
        .unwrap();
    assert!(log.is_recovered(), "{log}");
    pile.all_go_on().await;
    ground.drop_roles().await;
}

async fn soon<T>(told: &mut UnboundedReceiver<T>) -> Option<T> {
    let told = tokio::time::timeout(GIVE_UP_AFTER, told.recv());
    told.await.expect("it is not told")
}

#[tokio::test]
async fn the_hook_can_panic_and_be_slow_and_is_told_of_the_end() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let policy = policy(&ground).hook_timeout(TICK).execute(true);
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
    let slow = resolver(&ground, slow);
    let mut run = Box::pin(slow.run());
    tokio::select! {
        _ = &mut run => panic!("it ended"),
        called = soon(&mut entering) => assert_eq!(called, Some(())),
    }
    // It goes on without the hook.
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
    let log = resolver(&ground, panics).run().await.unwrap();
    assert!(log.is_recovered(), "{log}");
    assert_eq!(*log.rows()[1].outcome(), StepOutcome::HookPanicked);
    assert_eq!(soon(&mut told).await, Some(LoadChange::Shed));
    assert_eq!(soon(&mut told).await, Some(LoadChange::Resume));
    pile.all_go_on().await;
}

/// Nobody waits when the baseline is taken, and somebody does before the run has seen enough of the calm.
#[tokio::test]
async fn load_is_shed_before_a_pile_up_that_comes_later_is_dealt_with() {
    let ground = MonitorScene::new().await;
    let called = Arc::new(Mutex::new(Vec::new()));
    let calls = Arc::clone(&called);
    let policy = policy(&ground)
        .recovered_when(RecoveryCriterion::no_waits().checks(100))
        .shed_load(move |change| calls.lock().unwrap().push(change))
        .execute(true);
    // The pile-up is to come before the run has seen enough: there is little left to do for it then.
    let holder = ground.session().await;
    let waiters = [ground.session().await, ground.session().await];
    let (told, _logging) = CapturedLog::start();
    let calm = resolver(&ground, policy);
    let run = tokio::spawn(async move { calm.run().await });
    eventually("no baseline is kept", async || {
        told.text().contains("settings kept")
    })
    .await;
    let pile = PileUp::of(&ground, holder, waiters).await;
    let log = run.await.unwrap().unwrap();
    assert!(log.plan().waits().is_empty() && log.is_recovered(), "{log}");
    assert!(log.signals() > 0, "{log}");
    let shed = actions(&log)[0];
    assert_eq!(shed, (Action::ShedLoad, None), "{log}");
    assert_eq!(
        *called.lock().unwrap(),
        [LoadChange::Shed, LoadChange::Resume]
    );
    pile.all_go_on().await;
}

/// Backends that stand still, as in a server that has no time for them; until told to go on.
struct Stopped<'a>(&'a MonitorScene, Vec<i32>);

impl<'a> Stopped<'a> {
    async fn all_but(ground: &'a MonitorScene, spared: &[i32]) -> Self {
        let sql = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
                   AND pid <> pg_backend_pid() AND pid <> ALL ($1)";
        let rows = ground.observer.query(sql, &[&spared]).await.unwrap();
        let pids = rows.iter().map(|row| row.get(0)).collect();
        let stopped = Self(ground, pids);
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
    let ground = MonitorScene::on(&server).await;
    let pile = PileUp::new(&ground).await;
    // A connection of the pool, which is asked where the other one does not answer.
    drop(ground.keeper.advisory_lock("k").acquire().await.unwrap());
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let patient = policy(&ground)
        .idle_grace(4 * GIVE_UP_AFTER)
        .deadline(50 * TICK)
        .shed_load(move |change| sender.send(change).unwrap())
        .execute(true);
    let patient = resolver(&ground, patient);
    let run = tokio::spawn(async move { patient.run().await });
    assert_eq!(told.recv().await, Some(LoadChange::Shed));
    let stopped = Stopped::all_but(&ground, &[pile.holder.pid]).await;
    let ended = tokio::time::timeout(GIVE_UP_AFTER, run).await;
    let looked = tokio::time::timeout(GIVE_UP_AFTER, ground.monitor.activity()).await;
    stopped.signal("CONT").await;
    let log = ended.expect("it does not end").unwrap().unwrap();
    assert_eq!((log.end(), log.signals()), (&RunEnd::Deadline, 0), "{log}");
    assert!(looked.is_ok(), "a look does not end");
    pile.is_untouched().await;
    pile.holder.run("COMMIT").await;
    pile.all_go_on().await;
}

#[tokio::test]
async fn dropped_at_any_point_a_run_leaves_no_transaction() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let dry = resolver(&ground, policy(&ground));
    let mut polls = 0;
    while poll_times_and_drop(dry.run(), polls).await.is_none() {
        polls += 1;
    }
    assert!(polls > 4, "{polls}");
    pile.is_untouched().await;
    pile.holder.run("COMMIT").await;
    pile.all_go_on().await;
}

#[tokio::test]
async fn dropped_at_any_point_a_run_that_acts_tells_the_hook_of_its_end() {
    let ground = MonitorScene::new().await;
    let harmless = ground.session().await;
    harmless
        .run("BEGIN; UPDATE t SET v = 'h' WHERE id = 2")
        .await;
    let mut pile = PileUp::new(&ground).await;
    let mut polls = 0;
    loop {
        if pile.holder.client.is_closed() {
            pile.all_go_on().await;
            pile = PileUp::new(&ground).await;
        }
        let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
        let eager = policy(&ground)
            .idle_grace(Duration::ZERO)
            .shed_load(move |change| sender.send(change).unwrap())
            .execute(true);
        let resolver = resolver(&ground, eager);
        let log = poll_times_and_drop(resolver.run(), polls).await;
        drop(resolver);
        // Until nobody has the hook any more.
        let mut changes = Vec::new();
        let all = async {
            while let Some(change) = told.recv().await {
                changes.push(change);
            }
        };
        tokio::time::timeout(GIVE_UP_AFTER, all)
            .await
            .expect("something is left of the run");
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
        let row = ground.observer.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    assert!(harmless.is_alive().await);
}

#[tokio::test]
async fn every_step_is_an_event_and_shows_no_literal() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let (told, logging) = CapturedLog::start();
    let log = {
        let resolver = resolver(&ground, policy(&ground).execute(true));
        resolver.run().await.unwrap()
    };
    assert!(log.is_recovered(), "{log}");
    drop(logging);
    let told = told.text();
    let events: Vec<_> = told
        .lines()
        .filter(|line| line.contains("lockkeeper::resolver"))
        .collect();
    assert_eq!(events.len(), log.rows().len() + 1, "{told}");
    for (event, row) in events.iter().zip(log.rows()) {
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
    pile.all_go_on().await;
}

#[tokio::test]
async fn with_nobody_waiting_there_is_nothing_to_do() {
    let ground = MonitorScene::new().await;
    let idle = ground.session().await;
    idle.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
    let policy = policy(&ground)
        .idle_grace(Duration::ZERO)
        .shed_load(|_| panic!("it is called"))
        .execute(true);
    let log = resolver(&ground, policy).run().await.unwrap();
    assert!(log.is_recovered() && log.signals() == 0, "{log}");
    assert_eq!(log.rows().len(), 1, "{log}");
    assert!(idle.is_alive().await);
}

#[tokio::test]
async fn bad_policies_are_refused_before_anything_is_sent() {
    let ground = MonitorScene::new().await;
    for policy in [
        ResolverPolicy::new().poll(Duration::ZERO),
        ResolverPolicy::new().deadline(Duration::ZERO),
        ResolverPolicy::new().recovered_when(RecoveryCriterion::no_waits().checks(0)),
    ] {
        let error = ground.monitor.resolver(policy).run().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
}

#[tokio::test]
async fn a_plan_needs_no_server() {
    let ground = MonitorScene::new().await;
    let pile = PileUp::new(&ground).await;
    let working = pile.holder.start("SELECT pg_sleep(600)");
    ground.until_in_state(pile.holder.pid, "active").await;
    let tree = ground.monitor.lock_tree().await.unwrap();
    let policy = policy(&ground).wait(10 * TICK);
    let plan = resolver(&ground, policy).plan(&tree);
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
    let seen = seen_by(&ground.monitor, pile.holder.pid).await;
    ground.monitor.cancel(&seen).await.unwrap();
    assert!(working.await.unwrap().is_err());
    pile.all_go_on().await;
}

/// A standby that streams, a base backup that runs, and a walsender that stands in the way of others.
#[tokio::test]
async fn replication_and_a_running_backup_are_left_alone() {
    let name = "replication_and_a_running_backup_are_left_alone";
    let server = Server::start(&[]).unwrap();
    let ground = MonitorScene::on(&server).await;
    let standby = match server.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report(name),
    };
    let backup = BaseBackup::start(&ground).await;
    let eager = policy(&ground)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .touch_migrations(true)
        .touch_superusers(true)
        .settle(TICK)
        .execute(true);

    // A walsender with a database runs statements like any session, and holds their locks.
    let mut sender = WalSender::connect(&server, ground.database.name());
    sender.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1");
    let waiter = ground.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    ground.until_waiting(waiter.pid).await;
    let snapshot = ground.monitor.snapshot().await.unwrap();
    let root = snapshot.roots()[0].clone();
    assert_eq!(root.backend_type(), Some("walsender"));
    let log = resolver(&ground, eager).run().await.unwrap();
    assert!(
        left_alone(&log, root.pid().unwrap()).contains("replication"),
        "{log}"
    );
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );

    // The standby may have been at its beginning still, or lost its connection and have another one now.
    eventually("the standby does not stream", async || {
        let sql = "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'";
        ground.observer.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    let mut senders = Vec::new();
    for backend in ground.monitor.activity().await.unwrap() {
        let backup = backup
            .as_ref()
            .is_some_and(|backup| backend.pid() == Some(backup.pid));
        if !backup && backend.backend_type() != Some("walsender") {
            continue;
        }
        for outcome in [
            ground.monitor.cancel(&backend).await.unwrap(),
            ground.monitor.terminate(&backend).await.unwrap(),
        ] {
            let expected = match backup {
                true => Protection::Backup,
                false => Protection::Replication,
            };
            assert_eq!(outcome, SignalOutcome::Protected(expected));
        }
        senders.push((backend.pid(), backend.backend_start()));
    }
    assert_eq!(senders.len(), 2 + usize::from(backup.is_some()));
    // All are there still, and go on.
    sender.run("COMMIT");
    waiting.await.unwrap().unwrap();
    let after = ground.monitor.activity().await.unwrap();
    for (pid, start) in senders {
        let mut same = after
            .iter()
            .filter(|b| (b.pid(), b.backend_start()) == (pid, start));
        assert!(same.next().is_some(), "{pid:?} is gone");
    }
    if let Some(mut backup) = backup {
        assert!(
            backup.child.try_wait().unwrap().is_none(),
            "the backup has ended"
        );
    }
    drop(standby);
}

/// What it holds it holds until the standby has its commit, which it has made already.
#[tokio::test]
async fn a_commit_that_waits_for_a_standby_is_left_alone() {
    let server = Server::start(&[
        ("synchronous_standby_names", "nobody"),
        ("synchronous_commit", "local"),
    ])
    .unwrap();
    let ground = MonitorScene::on(&server).await;
    let pile = PileUp::new(&ground).await;
    let committing = pile
        .holder
        .start("SET LOCAL synchronous_commit = on; COMMIT");
    eventually("it does not wait for the standby", async || {
        ground.seen(pile.holder.pid).await.wait_event() == Some("SyncRep")
    })
    .await;
    let eager = policy(&ground)
        .wait(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    let log = resolver(&ground, eager).run().await.unwrap();
    assert!(
        left_alone(&log, pile.holder.pid).contains("synchronous standby"),
        "{log}"
    );
    let seen = ground.seen(pile.holder.pid).await;
    for outcome in [
        ground.monitor.cancel(&seen).await.unwrap(),
        ground.monitor.terminate(&seen).await.unwrap(),
    ] {
        assert_eq!(outcome, SignalOutcome::Protected(Protection::Committing));
    }
    assert!(!committing.is_finished());
    // It is told when there is none to wait for any more.
    let release = "ALTER SYSTEM SET synchronous_standby_names = ''";
    ground.observer.batch_execute(release).await.unwrap();
    ground
        .observer
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    committing.await.unwrap().unwrap();
    pile.all_go_on().await;
}

#[tokio::test]
async fn a_run_goes_on_after_a_restart_of_the_server() {
    let server = Server::start(&[]).unwrap();
    let ground = MonitorScene::on(&server).await;
    let pile = PileUp::new(&ground).await;
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let patient = policy(&ground)
        .idle_grace(4 * GIVE_UP_AFTER)
        .shed_load(move |change| sender.send(change).unwrap())
        .execute(true);
    let resolver = resolver(&ground, patient);
    let run = tokio::spawn(async move { resolver.run().await });
    assert_eq!(told.recv().await, Some(LoadChange::Shed));
    server.stop();
    // Whatever the run sees of it, it ends well; most often looks fail in this time.
    eventually("the server is there still", async || {
        ground.observer.is_closed()
    })
    .await;
    tokio::time::sleep(10 * TICK).await;
    server.restart();
    let log = run.await.unwrap().unwrap();
    assert!(log.is_recovered() && log.signals() == 0, "{log}");
    assert_eq!(told.recv().await, Some(LoadChange::Resume));
    for wait in pile.waits {
        assert!(wait.await.unwrap().is_err());
    }
}

/// A real one: the server ends other autovacuums itself when somebody waits for them, and never this.
#[tokio::test]
async fn an_autovacuum_to_prevent_wraparound_is_left_alone() {
    let server = Server::start(&[
        ("autovacuum_freeze_max_age", "100000"),
        ("autovacuum_naptime", "1s"),
    ])
    .unwrap();
    let ground = MonitorScene::on(&server).await;
    // One to prevent wraparound comes all the same where others are switched off, which would be in its place.
    let slowly = "INSERT INTO t SELECT n, repeat('x', 1000) FROM generate_series(10, 5000) n; \
        ALTER TABLE t SET (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, \
        autovacuum_freeze_max_age = 100000, autovacuum_enabled = false)";
    ground.observer.batch_execute(slowly).await.unwrap();
    let age = "DO $$ BEGIN FOR n IN 1..110000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";
    ground.observer.batch_execute(age).await.unwrap();
    let mut worker = 0;
    eventually_within(4 * GIVE_UP_AFTER, "no autovacuum comes", async || {
        let sql = "SELECT a.pid FROM pg_stat_activity a JOIN pg_locks l USING (pid) \
                   WHERE a.backend_type = 'autovacuum worker' AND l.relation = 't'::regclass \
                   AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted \
                   AND a.query LIKE '%(to prevent wraparound)'";
        let row = ground.observer.query_opt(sql, &[]).await.unwrap();
        worker = row.map_or(0, |row| row.get(0));
        worker != 0
    })
    .await;
    let waiter = ground.session().await;
    let waiting = waiter.start("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE");
    ground.until_waiting(waiter.pid).await;
    let eager = policy(&ground)
        .wait(Duration::ZERO)
        .touch_migrations(true)
        .touch_superusers(true)
        .settle(TICK)
        .execute(true);
    let log = resolver(&ground, eager).run().await.unwrap();
    assert!(left_alone(&log, worker).contains("wraparound"), "{log}");
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );
    let seen = ground.seen(worker).await;
    for outcome in [
        ground.monitor.cancel(&seen).await.unwrap(),
        ground.monitor.terminate(&seen).await.unwrap(),
    ] {
        assert_eq!(
            outcome,
            SignalOutcome::Protected(Protection::WraparoundVacuum)
        );
    }
    waiting.abort();
}

/// The program itself, slowed down; `None` where it is not installed.
struct BaseBackup {
    child: std::process::Child,
    pid: i32,
    folder: std::path::PathBuf,
}

impl BaseBackup {
    async fn start(ground: &MonitorScene) -> Option<Self> {
        let sql = "SELECT setting FROM pg_config WHERE name = 'BINDIR'";
        let row = ground.observer.query_one(sql, &[]).await.unwrap();
        let program = std::path::Path::new(&row.get::<_, String>(0)).join("pg_basebackup");
        if !program.is_file() {
            return None;
        }
        let folder = std::env::temp_dir().join(format!("{}-backup", ground.database.name()));
        let server = ground.database.server();
        let child = std::process::Command::new(program)
            .args([
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "-X",
                "none",
                "--no-sync",
            ])
            .args(["--max-rate=32k", "--checkpoint=fast"])
            .args(["-p", &server.port().to_string(), "-D"])
            .arg(&folder)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut pid = None;
        eventually("no backup runs", async || {
            let sql = "SELECT pid FROM pg_stat_progress_basebackup WHERE backup_streamed > 0";
            let row = ground.observer.query_opt(sql, &[]).await.unwrap();
            pid = row.map(|row| row.get(0));
            pid.is_some()
        })
        .await;
        Some(Self {
            child,
            pid: pid.unwrap(),
            folder,
        })
    }
}

impl Drop for BaseBackup {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

/// A connection with `replication=database`, which the driver does not offer: the first messages by hand.
struct WalSender(std::net::TcpStream);

impl WalSender {
    fn connect(server: &Server, database: &str) -> Self {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        let mut body = 196_608_i32.to_be_bytes().to_vec();
        for text in [
            "user",
            "postgres",
            "database",
            database,
            "replication",
            "database",
            "",
        ] {
            body.extend(text.as_bytes());
            body.push(0);
        }
        Self::send(&mut stream, &body);
        let mut sender = Self(stream);
        sender.until_ready();
        sender
    }

    fn run(&mut self, sql: &str) {
        use std::io::Write as _;
        self.0.write_all(b"Q").unwrap();
        let mut body = sql.as_bytes().to_vec();
        body.push(0);
        Self::send(&mut self.0, &body);
        self.until_ready();
    }

    fn send(stream: &mut std::net::TcpStream, body: &[u8]) {
        use std::io::Write as _;
        let length = i32::try_from(body.len() + 4).unwrap();
        stream.write_all(&length.to_be_bytes()).unwrap();
        stream.write_all(body).unwrap();
    }

    fn until_ready(&mut self) {
        use std::io::Read as _;
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head).unwrap();
            let length = i32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; usize::try_from(length).unwrap() - 4];
            self.0.read_exact(&mut body).unwrap();
            assert_ne!(head[0], b'E', "{}", String::from_utf8_lossy(&body));
            if head[0] == b'Z' {
                return;
            }
        }
    }
}
