//! Sessions that are left alone.

use std::time::Duration;

use lockkeeper::resolver::{Decision, RunEnd, StepOutcome};
use lockkeeper::{Monitor, Protection, SignalOutcome};
use lockkeeper_testkit::{GIVE_UP_AFTER, MonitorScene, Session, eventually, keeper_as, quoted};

use super::{PileUp, TICK, left_alone, policy, resolver};

#[tokio::test]
async fn migrations_index_builds_and_patterns_are_left_alone() {
    let scene = MonitorScene::new().await;
    let eager = policy(&scene)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    // By the statements it has run.
    let migration = scene.session().await;
    migration.run("BEGIN; ALTER TABLE t ADD w int").await;
    let reader = scene.session().await;
    let reading = reader.start("SELECT FROM t");
    scene.until_waiting(reader.pid).await;
    let log = resolver(&scene, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, migration.pid).contains("migration"));
    assert_eq!((log.end(), log.signals()), (&RunEnd::NothingLeftToDo, 0));
    migration.run("COMMIT").await;
    reading.await.unwrap().unwrap();

    // By the name of the lock it holds, though it writes rows by now.
    let guard_key = lockkeeper::LockKey::from("app-migrations");
    let migration = scene.session().await;
    let lock = format!("SELECT pg_advisory_lock({})", guard_key.as_i64().unwrap());
    migration.run(&lock).await;
    let pile = PileUp::behind(&scene, migration).await;
    let named = scene.monitor.clone().names([guard_key.clone()]);
    let log = named.resolver(eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("migration"));
    pile.is_untouched().await;
    // A monitor that does not know the name is told the key.
    let told = eager.clone().migration_key(guard_key.as_i64().unwrap());
    let log = resolver(&scene, told).run().await.unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("migration"));
    pile.is_untouched().await;
    pile.holder
        .run("COMMIT; SELECT pg_advisory_unlock_all()")
        .await;
    pile.all_finish().await;

    // By a name that the policy gives.
    let named = scene.session().await;
    named.run("SET application_name = 'Payroll \"07\"'").await;
    let pile = PileUp::behind(&scene, named).await;
    let log = resolver(&scene, eager.clone().protect("payroll *"))
        .run()
        .await
        .unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("payroll *"));
    pile.is_untouched().await;
    pile.holder
        .run("SET LOCAL application_name = 'pg_dump'; SELECT")
        .await;
    let log = resolver(&scene, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, pile.holder.pid).contains("backup"));
    pile.is_untouched().await;
    pile.holder.run("ROLLBACK").await;
    pile.all_finish().await;

    // An index build that waits for an old transaction is no root; one that others wait for is left alone.
    let function = "CREATE FUNCTION slow(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
                    $$ BEGIN PERFORM pg_sleep(600); RETURN $1; END $$";
    scene.observer.batch_execute(function).await.unwrap();
    let builder = scene.session().await;
    let building = builder.start("CREATE INDEX ON t (slow(id))");
    scene.until_in_state(builder.pid, "active").await;
    let writer = scene.session().await;
    // Only once the build has its lock.
    eventually("it builds nothing", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE pid = $1)";
        let row = scene
            .observer
            .query_one(sql, &[&builder.pid])
            .await
            .unwrap();
        row.get(0)
    })
    .await;
    let writing = writer.start("UPDATE t SET v = 'w' WHERE id = 5");
    scene.until_waiting(writer.pid).await;
    let log = resolver(&scene, eager.clone()).run().await.unwrap();
    assert!(left_alone(&log, builder.pid).contains("builds an index"));
    assert!(!building.is_finished());
    // With leave it is cancelled.
    let log = resolver(&scene, eager.allow_migrations(true).settle(GIVE_UP_AFTER))
        .run()
        .await
        .unwrap();
    assert!(log.is_recovered(), "{log}");
    assert!(building.await.unwrap().is_err());
    writing.await.unwrap().unwrap();
}

#[tokio::test]
async fn oneself_is_left_alone() {
    let scene = MonitorScene::new().await;
    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    guard
        .execute("UPDATE t SET v = 'h' WHERE id = 1", &[])
        .await
        .unwrap();
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    scene.until_waiting(waiter.pid).await;
    let eager = policy(&scene)
        .wait(Duration::ZERO)
        .idle_grace(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    let log = resolver(&scene, eager.clone()).run().await.unwrap();
    let pid = guard.backend_pid().unwrap();
    assert!(left_alone(&log, pid).contains("this process"), "{log}");
    guard.execute("SELECT 1", &[]).await.unwrap();
    // The pure plan knows as much.
    let tree = scene.monitor.lock_tree().await.unwrap();
    let plan = resolver(&scene, eager.clone()).plan(&tree);
    let mut roots = plan.roots().iter();
    let root = roots
        .find(|root| root.backend().pid() == Some(pid))
        .unwrap();
    assert_eq!(
        *root.decision(),
        Decision::LeaveAlone(Protection::OwnSession)
    );
    let allowed = eager.allow_own_sessions(true).settle(GIVE_UP_AFTER);
    let log = resolver(&scene, allowed).run().await.unwrap();
    assert!(log.is_recovered() && log.signals() == 1, "{log}");
    waiting.await.unwrap().unwrap();
    drop(guard);
}

#[tokio::test]
async fn prepared_transactions_and_cycles_are_for_others() {
    let scene = MonitorScene::new().await;
    let gid = format!("order {}", scene.database.name());
    let session = scene.session().await;
    session
        .run(&format!(
            "BEGIN; UPDATE t SET v = 'p' WHERE id = 1; PREPARE TRANSACTION '{gid}'"
        ))
        .await;
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'w' WHERE id = 1");
    scene.until_waiting(waiter.pid).await;
    let eager = policy(&scene)
        .wait(Duration::ZERO)
        .settle(TICK)
        .execute(true);
    let log = resolver(&scene, eager.clone()).run().await.unwrap();
    assert_eq!(
        (log.end(), log.signals()),
        (&RunEnd::NothingLeftToDo, 0),
        "{log}"
    );
    let statement = format!("ROLLBACK PREPARED '{gid}'");
    assert!(log.to_string().contains(&statement), "{log}");
    let root = &log.plan().roots()[0];
    let by_hand = Decision::ByHand {
        statement: Some(statement.as_str().into()),
    };
    assert!(format!("{:?}", root.decision()) == format!("{by_hand:?}"));
    scene.observer.batch_execute(&statement).await.unwrap();
    waiting.await.unwrap().unwrap();

    let (a, b) = (scene.session().await, scene.session().await);
    for (session, id) in [(&a, 1), (&b, 2)] {
        let sql =
            format!("SET deadlock_timeout = '30s'; BEGIN; UPDATE t SET v = 'd' WHERE id = {id}");
        session.run(&sql).await;
    }
    let one = a.start("UPDATE t SET v = 'd' WHERE id = 2");
    scene.until_waiting(a.pid).await;
    let two = b.start("UPDATE t SET v = 'd' WHERE id = 1");
    scene.until_waiting(b.pid).await;
    let log = resolver(&scene, eager).run().await.unwrap();
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
async fn roles() {
    let scene = MonitorScene::new().await;
    let eager = policy(&scene).idle_grace(Duration::ZERO).execute(true);
    let quick = eager.clone().settle(TICK);
    let app = scene.role("app", "").await;
    let boss = scene.role("boss", "SUPERUSER").await;
    let plain = scene.role("plain \"ops\"", "").await;
    let signals = scene
        .role("signaller", "IN ROLE pg_signal_backend, pg_read_all_stats")
        .await;
    let monitor_of = |config: &tokio_postgres::Config| -> Monitor {
        keeper_as(&scene.database, config.clone()).monitor()
    };

    // A plain role sees that there is something, not what, and says what would show it.
    let pile = PileUp::behind(&scene, Session::connect(&app).await).await;
    let monitor = monitor_of(&plain);
    let log = monitor.resolver(quick.clone()).run().await.unwrap();
    let needs = left_alone(&log, pile.holder.pid);
    let grant = format!(
        "GRANT pg_read_all_stats TO {}",
        quoted(plain.get_user().unwrap())
    );
    assert!(needs.contains(&grant), "{needs}");
    scene.observer.batch_execute(&grant).await.unwrap();
    // Now it sees, and may not signal.
    let log = monitor.resolver(quick.clone()).run().await.unwrap();
    let refused = log.entries().iter().find_map(|row| match row.outcome() {
        StepOutcome::NotSignalled(SignalOutcome::NotPermitted { needs, .. }) => Some(needs.clone()),
        _ => None,
    });
    let refused = refused.unwrap_or_else(|| panic!("{log}"));
    assert_eq!(log.signals(), 0);
    pile.is_untouched().await;
    scene.observer.batch_execute(&refused).await.unwrap();
    let log = monitor.resolver(eager.clone()).run().await.unwrap();
    assert!(log.is_recovered(), "{log}");
    scene.until_gone(pile.holder.pid).await;
    pile.all_finish().await;

    // Who may signal reaches no superuser, and does not try.
    let pile = PileUp::behind(&scene, Session::connect(&boss).await).await;
    let monitor = monitor_of(&signals);
    let log = monitor.resolver(quick.clone()).run().await.unwrap();
    assert!(
        left_alone(&log, pile.holder.pid).contains("superuser"),
        "{log}"
    );
    // Nor does another superuser, unless told to.
    let log = resolver(&scene, quick.clone()).run().await.unwrap();
    assert!(
        left_alone(&log, pile.holder.pid).contains("superuser"),
        "{log}"
    );
    pile.is_untouched().await;
    let told = monitor.resolver(quick.allow_superusers(true));
    let log = told.run().await.unwrap();
    assert!(log.to_string().contains("only a superuser"), "{log}");
    pile.is_untouched().await;
    let log = resolver(&scene, eager.allow_superusers(true))
        .run()
        .await
        .unwrap();
    assert!(log.is_recovered(), "{log}");
    pile.all_finish().await;
    scene.drop_roles().await;
}
