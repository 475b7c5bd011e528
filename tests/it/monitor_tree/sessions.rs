//! Sessions that are not plain clients, and what a role may see of them.

use std::time::{Duration, Instant};

use lockkeeper::Keeper;
use lockkeeper::graph::BackendId;
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, Server, eventually, poll_times_and_drop};
use tokio_postgres::NoTls;

use super::{Stage, expected};

#[tokio::test]
async fn prepared_transactions_are_roots_without_a_pid() {
    let mut stage = Stage::with_table().await;
    let [a, b, c] = stage.actors().await;
    let gid = format!("monitor-{}", stage.scene.database.name());
    a.run(&format!(
        "BEGIN; UPDATE t SET v = 'a' WHERE id = 1; PREPARE TRANSACTION '{gid}'"
    ))
    .await;
    // It blocks no session.
    a.run(&format!(
        "BEGIN; SELECT FROM t; PREPARE TRANSACTION '{gid}-reads'"
    ))
    .await;
    stage.waits(&b, "UPDATE t SET v = 'b' WHERE id = 1").await;
    stage.waits(&c, "BEGIN; LOCK TABLE t IN SHARE MODE").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let held_by = |waiter: &str| format!("{waiter} held by prepared {gid}");
    let edges = [held_by("B"), held_by("C"), "C held by B".to_owned()];
    assert_eq!(stage.edges(&snapshot), edges.into());
    let id = BackendId::Prepared(Some(gid.as_str().into()));
    let prepared = snapshot.backend(&id).unwrap();
    assert_eq!(
        (prepared.pid(), prepared.prepared_transaction()),
        (None, Some(gid.as_str()))
    );
    assert_eq!(prepared.database(), Some(stage.scene.database.name()));
    assert_eq!(prepared.user(), stage.scene.database.config().get_user());
    assert!(prepared.transaction_age().unwrap() < GIVE_UP_AFTER);
    assert_eq!(
        (prepared.state(), prepared.application_name()),
        (None, None)
    );
    assert_eq!(snapshot.blocked_count(&id), 2);
    let text = snapshot.tree().to_string();
    assert!(
        text.contains(&format!("prepared transaction \"{gid}\" (user ")),
        "{text}"
    );
    assert!(!text.contains("-reads"), "{text}");
    for gid in [gid.clone(), format!("{gid}-reads")] {
        stage
            .scene
            .observer
            .batch_execute(&format!("ROLLBACK PREPARED '{gid}'"))
            .await
            .unwrap();
    }
    stage.done().await;
}

#[tokio::test]
async fn workers_of_a_parallel_query_count_as_their_leader() {
    let mut stage = Stage::with_table().await;
    let sql = "CREATE FUNCTION look() RETURNS bigint LANGUAGE plpgsql PARALLEL SAFE \
               AS 'BEGIN RETURN (SELECT count(*) FROM t); END'";
    stage.scene.observer.batch_execute(sql).await.unwrap();
    let [a, b] = stage.actors().await;
    let setting = if stage.scene.database.server().major() >= 16 {
        "debug_parallel_query"
    } else {
        "force_parallel_mode"
    };
    a.run("BEGIN; LOCK TABLE t").await;
    b.run(&format!("SET {setting} = on")).await;
    stage.waits.push(b.start("SELECT look()"));
    let mut snapshot = stage.monitor.snapshot().await.unwrap();
    eventually("no worker waits", async || {
        snapshot = stage.monitor.snapshot().await.unwrap();
        stage.edges(&snapshot) == expected(["B held by A"])
    })
    .await;
    let edge = stage.edge(&snapshot, &b);
    let worker = edge.worker().expect("a worker waits, not the leader");
    let worker = snapshot.backend(&worker.into()).unwrap();
    assert_eq!(worker.leader_pid(), Some(b.pid));
    assert_eq!(worker.backend_type(), Some("parallel worker"));
    let tree = snapshot.tree();
    assert_eq!(stage.shape(&tree), "A[B]");
    let node = tree
        .walk()
        .find(|(_, node)| node.backend().pid() == Some(b.pid))
        .unwrap()
        .1;
    assert_eq!(node.workers(), [worker.pid().unwrap()]);
    // Asked about the leader.
    let snapshot = stage.monitor.snapshot_of(&[b.pid]).await.unwrap();
    assert_eq!(stage.edges(&snapshot), expected(["B held by A"]));
    stage.done().await;
}

#[tokio::test]
async fn a_role_without_privileges_sees_who_and_where_and_the_rest_as_hidden() {
    let mut stage = Stage::with_table().await;
    let role = format!("nobody_{}", stage.scene.database.name());
    let create = format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'");
    stage.scene.observer.batch_execute(&create).await.unwrap();
    let [a, b, c] = stage.actors().await;
    a.run("BEGIN; UPDATE t SET v = 'a' WHERE id = 1").await;
    stage
        .waits(&b, "UPDATE t SET v = 'secret' WHERE id = 1")
        .await;
    stage.waits(&c, "BEGIN; LOCK TABLE t").await;
    let whole = stage.monitor.snapshot().await.unwrap();

    let mut config = stage.scene.database.config();
    config.user(&role).password("secret");
    // A question that is not answered in time is asked on the pool's connection, which is of the same role.
    let keeper = Keeper::builder(stage.scene.database.pool_as(&role, 2))
        .side_connection(config, NoTls)
        .build();
    let snapshot = keeper.monitor().snapshot().await.unwrap();
    assert_eq!(stage.edges(&snapshot), stage.edges(&whole));
    assert_eq!(stage.shape(&snapshot.tree()), stage.shape(&whole.tree()));
    for waiter in [&b, &c] {
        let (seen, whole) = (stage.edge(&snapshot, waiter), stage.edge(&whole, waiter));
        assert_eq!(seen.object(), whole.object());
        assert_eq!(seen.row(), whole.row());
        assert_eq!(seen.waiting_since(), whole.waiting_since());
        assert_eq!(seen.mode_held(), whole.mode_held());
    }
    let hidden = snapshot.backend(&b.pid.into()).unwrap();
    assert!(hidden.is_hidden() && !hidden.is_gone());
    assert_eq!(hidden.application_name(), Some("actor B"));
    assert_eq!(hidden.user(), stage.scene.database.config().get_user());
    assert_eq!((hidden.state(), hidden.statement()), (None, None));
    assert_eq!((hidden.wait_event(), hidden.backend_start()), (None, None));
    let text = snapshot.tree().to_string();
    assert!(
        text.contains("state hidden") && text.contains("statement hidden"),
        "{text}"
    );
    assert!(
        !text.contains("idle") && !text.contains("insufficient"),
        "{text}"
    );
    // What is there is the role's own connection.
    let activity = keeper.monitor().activity().await.unwrap();
    let own = activity
        .iter()
        .find(|backend| backend.user() == Some(&role))
        .unwrap();
    assert!(!own.is_hidden() && own.state() == Some("active"));
    drop(keeper);
    let observer = stage.scene.database.connect().await;
    stage.done().await;
    eventually("the role is still in use", async || {
        observer
            .batch_execute(&format!("DROP ROLE {role}"))
            .await
            .is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_sessions_are_seen_at_once() {
    let settings = [("max_connections", "600"), ("deadlock_timeout", "10min")];
    let server = Server::start(&settings).unwrap();
    let mut stage = Stage::of(Scene::on(&server, 2).await);
    let a = stage.actor().await;
    a.run("BEGIN; SELECT pg_advisory_xact_lock(1)").await;
    let mut waits = Vec::new();
    for _ in 0..500 {
        let client = stage.scene.database.connect().await;
        waits.push(tokio::spawn(async move {
            client
                .batch_execute("SELECT pg_advisory_xact_lock(1)")
                .await
        }));
    }
    eventually("not all of them wait", async || {
        stage.scene.lock_waiters().await == 500
    })
    .await;
    let (mut best, mut bare) = (Duration::MAX, Duration::MAX);
    for _ in 0..5 {
        // What the server needs to say who is in whose way.
        let started = Instant::now();
        let sql = "SELECT sum(cardinality(pg_blocking_pids(pid))) FROM pg_locks WHERE NOT granted";
        let row = stage.scene.observer.query_one(sql, &[]).await.unwrap();
        bare = bare.min(started.elapsed());
        assert_eq!(row.get::<_, i64>(0), 500 * 501 / 2);
        let started = Instant::now();
        let tree = stage.monitor.lock_tree().await.unwrap();
        let all = started.elapsed();
        let snapshot = tree.snapshot();
        best = best.min(all);
        assert_eq!(snapshot.waiters().len(), 500);
        // Each is behind all that came before.
        assert_eq!(snapshot.edges().len(), 500 * 501 / 2);
        let [root] = tree.roots().collect::<Vec<_>>()[..] else {
            panic!("{tree}");
        };
        assert_eq!(root.backend().pid(), Some(a.pid));
        assert_eq!((root.blocked_count(), root.children().count()), (500, 500));
        assert!(
            root.children()
                .all(|child| child.edge().is_some_and(|edge| !edge.is_soft()))
        );
    }
    // Built without optimization it takes 10 times as long, 14 times on a busy machine.
    assert!(best < 60 * bare, "{best:?}, the server alone {bare:?}");
    for wait in waits {
        wait.abort();
    }
}

/// Wherever a question is dropped, nothing is left of it and the next one is answered.
#[tokio::test]
async fn samples_may_be_dropped_anywhere() {
    for side in [false, true] {
        let scene = Scene::new(1).await;
        let builder = Keeper::builder(scene.pool.clone());
        let keeper = if side {
            builder
                .side_connection(scene.database.config(), NoTls)
                .build()
        } else {
            builder.build()
        };
        let monitor = keeper.monitor();
        for polls in 0.. {
            assert!(polls < 100, "a sample has no end");
            let tree = poll_times_and_drop(monitor.lock_tree(), polls).await;
            let locks = poll_times_and_drop(monitor.advisory_locks(), polls).await;
            let activity = poll_times_and_drop(monitor.activity(), polls).await;
            // What was dropped gives the pool's only connection back in the background.
            scene.pool_is_whole_within(GIVE_UP_AFTER).await;
            monitor.lock_tree().await.unwrap();
            if let (Some(tree), Some(locks), Some(activity)) = (tree, locks, activity) {
                tree.unwrap();
                locks.unwrap();
                activity.unwrap();
                break;
            }
        }
        scene.nothing_left().await;
    }
}
