//! Schema changes and the autovacuum worker that is at the table.

use std::time::Duration;

use lockkeeper::{ChangeFailed, ErrorKind, Keeper};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, Server, assert_error, eventually_within};

/// A server whose autovacuum comes at once and stays, and ends for a waiter after 300 ms.
async fn scene(server: &Server) -> Scene {
    let scene = Scene::on(server, 4).await;
    scene
        .run(
            "CREATE TABLE t (id int, pad text); INSERT INTO t SELECT n, repeat('x', 1000) FROM generate_series(1, 3000) n; \
             ALTER TABLE t SET (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, \
             autovacuum_vacuum_threshold = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_analyze_threshold = 1000000)",
        )
        .await;
    scene
}

/// Something for autovacuum to do.
async fn dead_rows(scene: &Scene) {
    scene.run("UPDATE t SET id = id").await;
    // Otherwise the counts are reported after a while.
    if scene.database.server().major() >= 15 {
        scene.run("SELECT pg_stat_force_next_flush()").await;
    }
}

/// Waits until a worker is at the table.
async fn worker_at_table(scene: &Scene, kind: &str) {
    let sql = format!(
        "EXISTS (SELECT FROM pg_stat_activity a JOIN pg_locks l USING (pid) WHERE a.backend_type = 'autovacuum worker' \
         AND l.relation = 't'::regclass AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted AND a.query LIKE '{kind}')"
    );
    eventually_within(4 * GIVE_UP_AFTER, "no autovacuum comes", async || {
        scene.is_true(&sql).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_gets_past_autovacuum_and_names_it() {
    let server =
        Server::start(&[("autovacuum_naptime", "1s"), ("deadlock_timeout", "300ms")]).unwrap();
    let scene = scene(&server).await;
    let role = format!("owner_{}", scene.database.name());
    scene
        .run(&format!(
            "CREATE ROLE {role} LOGIN; GRANT CREATE, USAGE ON SCHEMA public TO {role}; ALTER TABLE t OWNER TO {role}"
        ))
        .await;
    // A superuser cancels it.
    dead_rows(&scene).await;
    worker_at_table(&scene, "%").await;
    let report = scene
        .keeper
        .schema()
        .change("ALTER TABLE t ADD a int")
        .await
        .unwrap();
    let mut blockers = report.attempts().iter().flat_map(|one| one.blockers());
    assert!(blockers.any(|one| one.is_autovacuum()), "{report}");
    assert!(report.to_string().contains("autovacuum worker"), "{report}");
    assert!(!report.to_string().contains("hidden"), "{report}");
    // Another role may not, and waits once until the server does.
    let keeper = Keeper::builder(scene.database.pool_as(&role, 3))
        .application("test")
        .build();
    dead_rows(&scene).await;
    worker_at_table(&scene, "%").await;
    let report = keeper
        .schema()
        .change("ALTER TABLE t ADD b int")
        .await
        .unwrap();
    let waits: Vec<_> = report
        .attempts()
        .iter()
        .map(|one| one.lock_timeout())
        .collect();
    assert_eq!(waits, [100, 800].map(Duration::from_millis), "{report}");
    assert!(
        report.to_string().contains("(autovacuum worker)"),
        "{report}"
    );
    assert!(!report.to_string().contains("user hidden"), "{report}");
    // Not if it is told how long it may wait.
    dead_rows(&scene).await;
    worker_at_table(&scene, "%").await;
    let change = keeper.schema().change("ALTER TABLE t ADD c int");
    let limited = change
        .lock_timeout(Duration::from_millis(50))
        .deadline(Duration::from_secs(2));
    let error = limited.await.unwrap_err();
    assert_error(&error, ErrorKind::LockTimeout, "autovacuum worker");
    assert!(
        error.to_string().contains("lock_timeout() forbids"),
        "{error}"
    );
    let source = std::error::Error::source(&error).unwrap();
    let failed = source.downcast_ref::<ChangeFailed>().unwrap().report();
    let wait = Duration::from_millis(50);
    assert!(
        failed
            .attempts()
            .iter()
            .all(|one| one.lock_timeout() == wait),
        "{failed}"
    );
    drop(keeper);
    scene
        .run(&format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}"))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_autovacuum_against_wraparound_is_waited_for_and_named() {
    let server = Server::start(&[
        ("autovacuum_naptime", "1s"),
        ("autovacuum_freeze_max_age", "100000"),
        ("deadlock_timeout", "100ms"),
    ])
    .unwrap();
    let scene = scene(&server).await;
    scene
        .run("ALTER TABLE t SET (autovacuum_freeze_max_age = 100000, autovacuum_enabled = false)")
        .await;
    scene
        .run("DO $$ BEGIN FOR n IN 1..110000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
        .await;
    worker_at_table(&scene, "%(to prevent wraparound)").await;
    let change = scene.keeper.schema().change("ALTER TABLE t ADD a int");
    let error = change.deadline(Duration::from_secs(3)).await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockTimeout,
        "autovacuum worker that prevents wraparound",
    );
    assert!(
        error
            .blockers()
            .iter()
            .any(|one| one.prevents_wraparound() == Some(true))
    );
    assert!(error.attempts() > 1, "{error}");
    // It was left alone.
    worker_at_table(&scene, "%(to prevent wraparound)").await;
}
