//! Signals go to the session that was seen, or to none.

use lockkeeper::graph::BackendId;
use lockkeeper::{Protection, ResolverPolicy, SignalOutcome};
use lockkeeper_testkit::{
    MonitorScene, Server, Session, eventually, keeper_as, poll_times_and_drop, quoted, seen_by,
};

#[tokio::test]
async fn a_statement_is_cancelled_and_a_session_terminated() {
    let scene = MonitorScene::new().await;
    let session = scene.session().await;
    session
        .run("BEGIN; UPDATE t SET v = 'y' WHERE id = 1")
        .await;
    let idle = scene.seen(session.pid).await;
    assert_eq!(
        scene.monitor.cancel(&idle).await.unwrap(),
        SignalOutcome::NothingRuns
    );
    let sleeping = session.start("SELECT pg_sleep(600)");
    scene.until_in_state(session.pid, "active").await;
    // It was idle when it was seen, and works now: a cancel is for the transaction, a termination for what was idle.
    let outcome = scene.monitor.terminate(&idle).await.unwrap();
    assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    assert_eq!(
        scene.monitor.cancel(&idle).await.unwrap(),
        SignalOutcome::Signalled
    );
    let error = sleeping.await.unwrap().unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");

    scene
        .until_in_state(session.pid, "idle in transaction (aborted)")
        .await;
    let aborted = scene.seen(session.pid).await;
    assert_eq!(
        scene.monitor.terminate(&aborted).await.unwrap(),
        SignalOutcome::Signalled
    );
    scene.until_gone(session.pid).await;
    for outcome in [
        scene.monitor.terminate(&aborted).await.unwrap(),
        scene.monitor.cancel(&aborted).await.unwrap(),
    ] {
        assert_eq!(outcome, SignalOutcome::Gone);
    }
}

#[tokio::test]
async fn a_transaction_that_has_ended_is_not_avenged() {
    let scene = MonitorScene::new().await;
    let session = scene.session().await;
    session
        .run("BEGIN; UPDATE t SET v = 'y' WHERE id = 1")
        .await;
    let seen = scene.seen(session.pid).await;
    session.run("COMMIT; BEGIN; SELECT FROM t").await;
    for outcome in [
        scene.monitor.terminate(&seen).await.unwrap(),
        scene.monitor.cancel(&seen).await.unwrap(),
    ] {
        assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    }
    session.run("COMMIT").await;
    // Idle, and without a transaction, which it was not.
    let outcome = scene.monitor.terminate(&seen).await.unwrap();
    assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    // Seen idle, used since, idle again.
    let seen = scene.seen(session.pid).await;
    session.run("SELECT").await;
    scene.until_in_state(session.pid, "idle").await;
    let outcome = scene.monitor.terminate(&seen).await.unwrap();
    assert!(matches!(outcome, SignalOutcome::Changed(_)), "{outcome}");
    assert!(session.is_alive().await);
}

#[tokio::test]
async fn oneself_and_the_servers_own_are_left_alone() {
    let scene = MonitorScene::new().await;
    let activity = scene.monitor.activity().await.unwrap();
    let mut own = 0;
    for backend in &activity {
        let side = backend.application_name() == Some("lockkeeper side connection");
        if backend.backend_type() == Some("client backend") && !side {
            continue;
        }
        for outcome in [
            scene.monitor.cancel(backend).await.unwrap(),
            scene.monitor.terminate(backend).await.unwrap(),
        ] {
            match outcome {
                SignalOutcome::Protected(Protection::SignallingSession) => own += 1,
                SignalOutcome::Protected(_) | SignalOutcome::Gone => {}
                // An autovacuum worker may be cancelled, and other keepers' connections come and go.
                other => assert_eq!(backend.backend_type(), Some("autovacuum worker"), "{other}"),
            }
        }
    }
    assert_eq!(own, 2);
}

/// It would end with the session, and what was copied be worth nothing.
#[tokio::test]
async fn who_has_begun_a_backup_is_left_alone() {
    let server = Server::start(&[]).unwrap();
    let scene = MonitorScene::on(&server).await;
    let session = scene.session().await;
    let begin = match server.major() {
        14 => "SELECT pg_start_backup('nightly', true, false)",
        _ => "SELECT pg_backup_start('nightly', true)",
    };
    session.run(begin).await;
    let seen = scene.seen(session.pid).await;
    let outcome = scene.monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Protected(Protection::Backup));
    assert!(session.is_alive().await);
}

#[tokio::test]
async fn a_prepared_transaction_is_to_be_ended_by_hand() {
    let scene = MonitorScene::new().await;
    let gid = format!("it's {}", scene.database.name());
    let session = scene.session().await;
    let sql = format!(
        "BEGIN; UPDATE t SET v = 'y' WHERE id = 1; PREPARE TRANSACTION '{}'",
        gid.replace('\'', "''")
    );
    session.run(&sql).await;
    let waiter = scene.session().await;
    let waiting = waiter.start("UPDATE t SET v = 'z' WHERE id = 1");
    scene.until_waiting(waiter.pid).await;
    let snapshot = scene.monitor.snapshot().await.unwrap();
    let id = BackendId::Prepared(Some(gid.as_str().into()));
    let prepared = snapshot.backend(&id).unwrap();
    let outcome = scene.monitor.terminate(prepared).await.unwrap();
    let SignalOutcome::Prepared {
        by_hand: Some(by_hand),
        ..
    } = outcome
    else {
        panic!("{outcome}");
    };
    scene.observer.batch_execute(&by_hand).await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_a_role_lacks_is_said() {
    let scene = MonitorScene::new().await;
    let victim = scene.role("victim", "").await;
    let victim = Session::connect(&victim).await;
    let root = scene.session().await;
    for session in [&victim, &root] {
        session.run("BEGIN; UPDATE t SET v = v WHERE id = -1").await;
    }
    let plain = scene.role("plain \"ops", "").await;
    let plain_name = plain.get_user().unwrap().to_owned();
    let monitor = keeper_as(&scene.database, plain.clone()).monitor();
    let quoted = quoted(&plain_name);

    let needs = async |pid: i32| {
        let seen = seen_by(&monitor, pid).await;
        match monitor.terminate(&seen).await.unwrap() {
            SignalOutcome::NotPermitted { needs, .. } => needs,
            other => panic!("{other}"),
        }
    };
    // The text is followed statement by statement, as a reader would.
    assert_eq!(
        *needs(victim.pid).await,
        *format!("GRANT pg_read_all_stats, pg_signal_backend TO {quoted}")
    );
    let run = async |sql: &str| scene.observer.batch_execute(sql).await.unwrap();
    run(&format!("GRANT pg_signal_backend TO {quoted}")).await;
    let needed = needs(victim.pid).await;
    assert_eq!(*needed, *format!("GRANT pg_read_all_stats TO {quoted}"));
    run(&format!(
        "REVOKE pg_signal_backend FROM {quoted}; GRANT pg_read_all_stats TO {quoted}"
    ))
    .await;
    let needed = needs(victim.pid).await;
    assert_eq!(*needed, *format!("GRANT pg_signal_backend TO {quoted}"));
    // A member that does not inherit has no privilege by it, and another GRANT would give it none.
    run(&format!(
        "GRANT pg_signal_backend TO {quoted}; ALTER ROLE {quoted} NOINHERIT"
    ))
    .await;
    if scene.database.server().major() < 16 {
        let needed = needs(victim.pid).await;
        assert_eq!(*needed, *format!("ALTER ROLE {quoted} INHERIT"));
        run(&needed).await;
    }
    assert!(needs(root.pid).await.contains("only a superuser"));
    let seen = seen_by(&monitor, victim.pid).await;
    let outcome = monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    scene.until_gone(victim.pid).await;
    assert!(root.is_alive().await);
    // Its own sessions it may always end.
    let own = Session::connect(&plain).await;
    let seen = seen_by(&monitor, own.pid).await;
    let outcome = monitor.terminate(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    scene.until_gone(own.pid).await;
    scene.drop_roles().await;
}

#[tokio::test]
async fn functions_planted_on_the_search_path_are_not_run() {
    let scene = MonitorScene::new().await;
    let plant = "CREATE SCHEMA evil; \
        CREATE FUNCTION evil.no(anyelement, anyelement) RETURNS bool LANGUAGE sql AS 'SELECT 1/0 = 0'; \
        CREATE OPERATOR evil.= (LEFTARG = anyelement, RIGHTARG = anyelement, FUNCTION = evil.no); \
        CREATE FUNCTION evil.strpos(text, text) RETURNS int LANGUAGE sql AS 'SELECT 1/0'; \
        CREATE FUNCTION evil.pg_cancel_backend(int) RETURNS bool LANGUAGE sql AS 'SELECT (1/0)::bool'; \
        CREATE VIEW evil.pg_stat_activity AS SELECT 1/0 AS pid";
    scene.observer.batch_execute(plant).await.unwrap();
    let mut config = scene.database.config();
    config.options("-c search_path=evil,pg_catalog");
    let monitor = keeper_as(&scene.database, config).monitor();
    let session = scene.session().await;
    let sleeping = session.start("SELECT pg_sleep(600)");
    scene.until_in_state(session.pid, "active").await;
    let seen = seen_by(&monitor, session.pid).await;
    let outcome = monitor.cancel(&seen).await.unwrap();
    assert_eq!(outcome, SignalOutcome::Signalled);
    assert!(sleeping.await.unwrap().is_err());
    let dry = monitor.resolver(ResolverPolicy::new());
    let log = dry.run().await.unwrap();
    assert!(!log.baseline().settings().is_empty());
}

#[tokio::test]
async fn dropped_at_any_point_no_transaction_is_left() {
    let scene = MonitorScene::new().await;
    let session = scene.session().await;
    session.run("BEGIN").await;
    let seen = scene.seen(session.pid).await;
    let mut polls = 0;
    while poll_times_and_drop(scene.monitor.cancel(&seen), polls)
        .await
        .is_none()
    {
        polls += 1;
    }
    assert!(polls > 1);
    eventually("a transaction is left open", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND xact_start IS NOT NULL AND pid NOT IN (pg_backend_pid(), $1)";
        let row = scene
            .observer
            .query_one(sql, &[&session.pid])
            .await
            .unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    assert!(session.is_alive().await);
}
