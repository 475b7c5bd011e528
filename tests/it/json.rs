//! What the monitor sees as JSON, of a real server.

use lockkeeper::{Keeper, LockKey};
use lockkeeper_testkit::{Scene, Server, eventually, pid_of};
use serde_json::Value;
use tokio_postgres::NoTls;

#[tokio::test]
async fn a_tree_and_advisory_locks_of_a_server() {
    let scene = Scene::new(2).await;
    let keeper = Keeper::builder(scene.pool.clone())
        .side_connection(scene.database.config(), NoTls)
        .build();
    let guard = scene
        .keeper
        .advisory_lock(("billing", "invoice:42"))
        .session()
        .acquire()
        .await
        .unwrap();
    let holder = guard.backend_pid().unwrap();
    let key = LockKey::from(("billing", "invoice:42"));
    let waiter = scene.database.connect().await;
    let pid = pid_of(&waiter).await;
    let number = key.as_i64().unwrap();
    let sql = format!("SELECT pg_advisory_lock({number}), 'secret'");
    let wait = tokio::spawn(async move { waiter.batch_execute(&sql).await });
    eventually("it does not wait", async || {
        scene.waiters(key.clone()).await == [pid]
    })
    .await;

    let tree = keeper.monitor().lock_tree().await.unwrap();
    let text = serde_json::to_string(&tree).unwrap();
    assert!(!text.contains("secret"), "{text}");
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["version"], 1);
    let backends = document["backends"].as_array().unwrap();
    let place_of = |pid: i32| {
        backends
            .iter()
            .position(|backend| backend["pid"] == pid)
            .unwrap()
    };
    let place = place_of(pid);
    let waits = document["waits"].as_array().unwrap();
    let at = waits
        .iter()
        .position(|wait| wait["waiter"] == place)
        .unwrap();
    let wait_of_it = &waits[at];
    assert_eq!(wait_of_it["advisory_key"]["name"], "invoice:42");
    assert_eq!(wait_of_it["mode_wanted"], "ExclusiveLock");
    assert!(wait_of_it["since"].as_str().unwrap().ends_with('Z'));
    assert!(wait_of_it["wait_age_ms"].as_f64().unwrap() >= 0.0);
    assert_eq!(wait_of_it["blockers"][0]["backend"], place_of(holder));
    assert_eq!(wait_of_it["blockers"][0]["mode"], "ExclusiveLock");
    assert_eq!(backends[place]["state"], "active");
    assert_eq!(
        backends[place]["statement"],
        "SELECT pg_advisory_lock(?), ?"
    );
    let nodes = document["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|node| node["backend"] == place).unwrap();
    assert_eq!((&node["depth"], &node["wait"]), (&1.into(), &at.into()));
    assert_eq!(node["below"], place_of(holder));

    let locks = serde_json::to_value(keeper.monitor().advisory_locks().await.unwrap()).unwrap();
    let locks = locks.as_array().unwrap();
    assert_eq!(locks.len(), 2, "{locks:?}");
    let (held, wanted) = (&locks[0], &locks[1]);
    assert_eq!(
        (&held["held"], &wanted["held"]),
        (&true.into(), &false.into())
    );
    assert_eq!(
        (&held["guarded"], &held["version"]),
        (&true.into(), &1.into())
    );
    assert_eq!(held["backend"]["pid"], holder);
    assert_eq!(held["advisory_key"]["namespace"], "billing");
    assert_eq!(
        (&held["mode"], &held["wait_age_ms"]),
        (&"ExclusiveLock".into(), &Value::Null)
    );
    assert!(wanted["wait_age_ms"].is_f64() && wanted["idle_ms"].is_null());
    let table = include_str!("../../src/graph/mod.rs");
    for field in held.as_object().unwrap().keys() {
        assert!(
            table.contains(&format!("`{field}`")),
            "{field} is not documented"
        );
    }

    guard.release().await.unwrap();
    wait.await.unwrap().unwrap();
}

/// The names in the first column of a table in the documentation, or in its text.
fn is_documented(source: &str, field: &str) -> bool {
    let docs = source
        .lines()
        .filter(|line| line.trim_start().starts_with("///"));
    docs.flat_map(|line| line.split('`').skip(1).step_by(2))
        .any(|word| word == field)
}

/// All names of fields in a document but those of backends, which are documented elsewhere.
fn fields(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) if object.contains_key("backend_type") => {}
        Value::Object(object) => {
            for (name, value) in object {
                found.push(name.clone());
                if name != "values" {
                    fields(value, found);
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| fields(value, found)),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_of_a_server() {
    // Of its own, where all numbers are known.
    let settings = [("autovacuum", "off"), ("max_prepared_transactions", "2")];
    let server = tokio::task::block_in_place(|| Server::start(&settings).unwrap());
    let scene = Scene::on(&server, 2).await;
    let monitor = Keeper::builder(scene.pool.clone())
        .side_connection(scene.database.config(), NoTls)
        .build()
        .monitor();
    let document = serde_json::to_value(monitor.health().await.unwrap()).unwrap();
    let nothing = serde_json::json!({ "reading": "known", "value": null });
    assert_eq!(document["oldest_transaction"], nothing);
    assert_eq!(document["oldest_idle_in_transaction"], nothing);
    assert_eq!(document["longest_wait_ms"], Value::Null);
    assert_eq!(document["root_blockers"], serde_json::json!([]));

    let sql = "CREATE TABLE t (id int); INSERT INTO t VALUES (1), (1)";
    scene.observer.batch_execute(sql).await.unwrap();
    let sql = "CREATE UNIQUE INDEX CONCURRENTLY broken ON t (id)";
    scene.observer.batch_execute(sql).await.unwrap_err();
    let holder = scene.database.connect().await;
    let holder_pid = pid_of(&holder).await;
    holder
        .batch_execute("BEGIN; SELECT pg_advisory_xact_lock(7), 'secret'")
        .await
        .unwrap();
    let prepared = scene.database.connect().await;
    prepared
        .batch_execute("BEGIN; LOCK TABLE t IN SHARE MODE; PREPARE TRANSACTION 'two phases'")
        .await
        .unwrap();
    let mut waiting = Vec::new();
    for sql in ["SELECT pg_advisory_xact_lock(7)", "LOCK TABLE t"] {
        let client = scene.database.connect().await;
        let sql = format!("BEGIN; {sql}");
        waiting.push(tokio::spawn(
            async move { client.batch_execute(&sql).await },
        ));
    }
    eventually("they do not wait", async || scene.lock_waiters().await == 2).await;
    let health = monitor.health().await.unwrap();
    let text = serde_json::to_string(&health).unwrap();
    assert!(!text.contains("secret"), "{text}");
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["version"], 1);
    assert_eq!(document["database"], scene.database.name());
    assert_eq!(document["lock_waiters"], 2);
    assert!(document["longest_wait_ms"].as_f64().unwrap() > 0.0);
    let mut roots = document["root_blockers"].as_array().unwrap().clone();
    roots.sort_by_key(|root| root["pid"].is_null());
    assert_eq!(
        roots,
        [
            serde_json::json!({ "pid": holder_pid, "prepared": null, "blocks": 1 }),
            serde_json::json!({ "pid": null, "prepared": "two phases", "blocks": 1 }),
        ]
    );
    let idle = &document["oldest_idle_in_transaction"];
    assert_eq!(
        (&idle["reading"], &idle["value"]["pid"]),
        (&"known".into(), &holder_pid.into())
    );
    assert_eq!(document["deadlocks"]["count"], 0);
    assert_eq!(
        document["lock_table"]["capacity"],
        health.lock_table().capacity()
    );
    assert_eq!(document["prepared_transactions"]["count"], 1);
    let indexes = &document["invalid_indexes"];
    assert_eq!(
        (&indexes["reading"], &indexes["value"]["count"]),
        (&"known".into(), &1.into())
    );
    assert_eq!(indexes["value"]["first"][0]["name"], "broken");
    assert_eq!(document["advisory_locks_held"], 1);
    let mut names = Vec::new();
    fields(&document, &mut names);
    let (health, graph) = (
        include_str!("../../src/monitor/health.rs"),
        include_str!("../../src/graph/mod.rs").replace("//!", "///"),
    );
    for name in names {
        assert!(
            is_documented(health, &name) || is_documented(&graph, &name),
            "{name} is not documented"
        );
    }

    holder.batch_execute("COMMIT").await.unwrap();
    let sql = "ROLLBACK PREPARED 'two phases'";
    scene.observer.batch_execute(sql).await.unwrap();
    for waiting in waiting {
        waiting.await.unwrap().unwrap();
    }
    scene.nothing_left().await;
}

#[tokio::test]
async fn settings_of_a_server() {
    let scene = Scene::new(2).await;
    let settings = scene.keeper.monitor().settings().await.unwrap();
    let document = serde_json::to_value(&settings).unwrap();
    assert_eq!(document["version"], 1);
    assert_eq!(document["role"], settings.role());
    assert_eq!(document["database"], scene.database.name());
    assert_eq!(
        document["values"]["deadlock_timeout"],
        settings.value("deadlock_timeout").unwrap()
    );
    let findings = document["findings"].as_array().unwrap();
    assert_eq!(findings.len(), settings.findings().len());
    let of_idle = findings
        .iter()
        .find(|finding| finding["name"] == "idle_in_transaction_session_timeout")
        .unwrap();
    assert_eq!(
        (&of_idle["severity"], &of_idle["effect"]),
        (&"warning".into(), &"new_connections".into()),
        "{of_idle}"
    );
    let statement = of_idle["statement"].as_str().unwrap();
    assert!(statement.starts_with("ALTER "), "{statement}");
    let mut names = Vec::new();
    fields(&document, &mut names);
    let source = include_str!("../../src/monitor/settings.rs");
    for name in names {
        assert!(is_documented(source, &name), "{name} is not documented");
    }
}
