//! The graph and the list of advisory locks as JSON, of a real server.

use std::time::Duration;

use lockkeeper::{Keeper, LockKey};
use serde_json::Value;
use tokio_postgres::NoTls;

use crate::common::{Scene, eventually};
use crate::guards::pid_of;

const SOON: Duration = Duration::from_secs(30);

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
    eventually(SOON, "it does not wait", async || {
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
