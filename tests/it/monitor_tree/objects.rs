//! What is locked, and what it is called.

use std::time::Duration;

use lockkeeper::graph::LockObject;
use lockkeeper::{AdvisoryMode, Keeper, LockKey};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, Server, eventually};

use super::{Stage, expected};

#[tokio::test]
async fn objects_of_another_database_have_no_name_here() {
    let mut stage = Stage::with_table().await;
    let other = stage.scene.database.server().database().await;
    // All before the lock: a session that begins may read the locked catalog, and would wait for it.
    let [a, b, c] = stage.actors().await;
    // The other database has one with this number too.
    a.run("BEGIN; LOCK TABLE pg_language; SELECT pg_advisory_xact_lock(77)")
        .await;
    stage.waits(&b, "SELECT FROM pg_language").await;
    stage.waits(&c, "SELECT pg_advisory_lock(77)").await;
    let keeper = Keeper::new(other.pool(1));
    let snapshot = keeper.monitor().snapshot().await.unwrap();
    let relation = stage
        .edge(&snapshot, &b)
        .object()
        .relation()
        .unwrap()
        .clone();
    assert_eq!(
        (relation.name(), relation.schema(), relation.kind()),
        (None, None, None)
    );
    assert_eq!(relation.database(), Some(stage.scene.database.name()));
    let shown = format!(
        "relation {} in database {}",
        relation.oid(),
        stage.scene.database.name()
    );
    assert_eq!(stage.edge(&snapshot, &b).object().to_string(), shown);
    let shown = format!(
        "advisory lock 77 in database {}",
        stage.scene.database.name()
    );
    assert_eq!(stage.edge(&snapshot, &c).object().to_string(), shown);
    stage.done().await;
}

/// Waits on other things than tables, rows and transactions.
#[tokio::test]
async fn rarer_objects_are_named_too() {
    let mut stage = Stage::with_table().await;
    stage
        .scene
        .observer
        .batch_execute("CREATE SCHEMA s; CREATE TABLE \"T 2\" (id int)")
        .await
        .unwrap();
    let [a, b, c, d] = stage.actors().await;
    a.run("BEGIN; CREATE TABLE s.new (); INSERT INTO t VALUES (100, 'a'); LOCK TABLE \"T 2\" IN ROW EXCLUSIVE MODE").await;
    // The name of a schema in use is locked against its being dropped.
    stage.waits(&b, "DROP SCHEMA s").await;
    let edge = stage.monitor.snapshot().await.unwrap();
    let object = stage.edge(&edge, &b).object().clone();
    assert!(
        object.to_string().starts_with("object ")
            && object.to_string().ends_with(" of pg_catalog.pg_namespace"),
        "{object}"
    );
    // A unique key that another transaction is about to take: there is no row to queue for.
    stage.waits(&c, "INSERT INTO t VALUES (100, 'c')").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let edge = stage.edge(&snapshot, &c);
    assert!(
        matches!(edge.object(), LockObject::Transaction(_)) && edge.row().is_none(),
        "{edge}"
    );
    // An index build waits for transactions that may write.
    stage
        .waits(&d, "CREATE INDEX CONCURRENTLY ON \"T 2\" (id)")
        .await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let edge = stage.edge(&snapshot, &d);
    assert!(
        matches!(edge.object(), LockObject::VirtualTransaction(_)),
        "{edge}"
    );
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C held by A", "D held by A"])
    );
    stage.done().await;
}

#[tokio::test]
async fn types_notify_and_subscriptions_have_names() {
    // A commit that waits for a standby holds its locks.
    let server = Server::start(&[
        ("wal_level", "logical"),
        ("synchronous_standby_names", "nobody"),
        ("synchronous_commit", "local"),
    ])
    .unwrap();
    let mut stage = Stage::of(Scene::on(&server, 2).await);
    stage
        .scene
        .run(
            "CREATE TYPE \"Mood\" AS ENUM ('ok'); CREATE TABLE t (id int); CREATE TABLE u (id int)",
        )
        .await;
    // Before all transactions, for whose ends a new slot waits.
    let publisher = server.database().await;
    let other = publisher.connect().await;
    for sql in [
        "CREATE TABLE t (id int); CREATE PUBLICATION p FOR TABLE t",
        "SELECT pg_create_logical_replication_slot('slot', 'pgoutput')",
    ] {
        other.batch_execute(sql).await.unwrap();
    }
    let [a, b, c, d, e] = stage.actors().await;
    a.run("BEGIN; COMMENT ON TYPE \"Mood\" IS 'x'").await;
    stage.waits(&b, "DROP TYPE \"Mood\"").await;
    let waiting = c.start("SET synchronous_commit = on; INSERT INTO u VALUES (1); NOTIFY it");
    eventually("the commit does not wait", async || {
        stage
            .scene
            .is_true("EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')")
            .await
    })
    .await;
    stage.waits(&d, "NOTIFY it").await;
    // A worker of a subscription waits for a table.
    stage
        .scene
        .run(&format!(
            "CREATE SUBSCRIPTION orders CONNECTION 'host=127.0.0.1 port={} user=postgres dbname={}' PUBLICATION p \
             WITH (create_slot = false, slot_name = 'slot', copy_data = false)",
            server.port(),
            publisher.name()
        ))
        .await;
    e.run("BEGIN; LOCK TABLE t").await;
    other
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    let relation = "EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 't'::regclass)";
    eventually("the worker does not wait", async || {
        stage.scene.is_true(relation).await
    })
    .await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    assert_eq!(
        stage.edge(&snapshot, &b).object().to_string(),
        "type public.\"Mood\""
    );
    assert_eq!(
        stage.edge(&snapshot, &d).object().to_string(),
        "the lock of NOTIFY, under which one transaction at a time commits"
    );
    let worker = snapshot
        .edges()
        .iter()
        .find(|edge| edge.object().relation().is_some());
    let worker = snapshot.backend(worker.unwrap().waiter()).unwrap();
    assert_eq!(worker.application_name(), Some("subscription orders"));
    let tree = stage.monitor.lock_tree().await.unwrap().to_string();
    for name in [
        "type public.\"Mood\"",
        "lock of NOTIFY",
        "subscription orders",
    ] {
        assert!(tree.contains(name), "{name}: {tree}");
    }
    drop(waiting);
}

#[tokio::test]
async fn advisory_locks_with_their_names_and_owners() {
    let stage = Stage::new().await;
    let monitor = stage.monitor.clone().names(["given-name"]);
    let name = format!("own-{}", stage.scene.database.name());
    let guard = stage
        .scene
        .keeper
        .advisory_lock(&name)
        .session()
        .acquire()
        .await
        .unwrap();
    let other = stage.scene.database.connect().await;
    let key = LockKey::from("given-name").as_i64().unwrap();
    let sql = format!(
        "SET application_name = 'other'; SELECT pg_advisory_lock_shared({key}), pg_advisory_lock(1, 2), \
                       pg_advisory_lock({key} + 1)"
    );
    other.batch_execute(&sql).await.unwrap();
    let waiter = stage.scene.session().await;
    let pid = waiter.pid;
    let own_key = LockKey::from(&name).as_i64().unwrap();
    let sql = format!("SELECT pg_advisory_xact_lock_shared({own_key})");
    let wait = waiter.start_waiting(&stage.scene.observer, &sql).await;

    let entries = monitor.advisory_locks().await.unwrap();
    let of = |key: &LockKey| {
        entries
            .iter()
            .filter(|entry| entry.key() == key)
            .collect::<Vec<_>>()
    };
    let [held, wanted] = of(&LockKey::from(&name))[..] else {
        panic!("{entries:?}");
    };
    assert!(held.is_held() && held.is_guarded() && held.mode() == AdvisoryMode::Exclusive);
    assert_eq!(held.backend().pid(), guard.backend_pid());
    assert!(
        held.backend()
            .application_name()
            .unwrap()
            .contains("tests/it/monitor_tree/objects.rs:")
    );
    assert!(held.idle_for().unwrap() < GIVE_UP_AFTER && held.wait_age().is_none());
    assert!(!wanted.is_held() && !wanted.is_guarded() && wanted.mode() == AdvisoryMode::Shared);
    assert!(wanted.wait_age().unwrap() < GIVE_UP_AFTER);
    assert_eq!(
        (wanted.idle_for(), wanted.backend().pid()),
        (None, Some(pid))
    );
    let [given] = of(&"given-name".into())[..] else {
        panic!("{entries:?}");
    };
    assert!(given.is_held() && !given.is_guarded() && given.mode() == AdvisoryMode::Shared);
    assert!(
        given
            .to_string()
            .starts_with("\"given-name\" held in ShareLock by pid "),
        "{given}"
    );
    assert_eq!(of(&(1, 2).into()).len(), 1);
    assert_eq!(of(&(key + 1).into()).len(), 1);
    assert_eq!(entries.len(), 5, "of this database only: {entries:?}");

    // The guard's lock is no leak however old, and neither is what has not been idle for long.
    let leaks = monitor.leaks(Duration::ZERO).await.unwrap();
    assert_eq!(leaks.len(), 3, "{leaks:?}");
    assert!(
        leaks
            .iter()
            .all(|leak| leak.backend().application_name() == Some("other"))
    );
    assert!(
        monitor
            .leaks(Duration::from_secs(600))
            .await
            .unwrap()
            .is_empty()
    );
    // In a transaction it is not idle.
    other.batch_execute("BEGIN").await.unwrap();
    assert!(monitor.leaks(Duration::ZERO).await.unwrap().is_empty());
    // What a guard has given back it owns no more, and what somebody leaves on the pool's connection is a leak.
    wait.abort();
    drop(waiter);
    drop(guard);
    drop(other);
    stage.scene.nothing_left().await;
    let object = stage.scene.pool.get().await.unwrap();
    object
        .batch_execute("SELECT pg_advisory_lock(3)")
        .await
        .unwrap();
    drop(object);
    let leaks = monitor.leaks(Duration::ZERO).await.unwrap();
    assert_eq!(leaks.len(), 1, "{leaks:?}");
    assert_eq!(leaks[0].key(), &LockKey::from(3));
    let sql = format!(
        "SELECT pg_terminate_backend({})",
        leaks[0].backend().pid().unwrap()
    );
    stage.scene.observer.batch_execute(&sql).await.unwrap();
    eventually("the leak is still there", async || {
        monitor.leaks(Duration::ZERO).await.unwrap().is_empty()
    })
    .await;
}
