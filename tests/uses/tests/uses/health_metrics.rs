//! Health as metrics: what is recorded under which names.

use std::collections::{BTreeMap, BTreeSet};

use lockkeeper::Keeper;
use lockkeeper_testkit::{Scene, eventually_within as eventually};
use metrics_util::CompositeKey;
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use tokio_postgres::NoTls;

/// What recording one look gave: name to value, with all labels seen.
struct Recorded {
    values: BTreeMap<String, f64>,
    labels: BTreeSet<(String, String)>,
}

fn recorded(health: &lockkeeper::Health) -> Recorded {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    // Twice: a counter is set, not added to.
    metrics::with_local_recorder(&recorder, || {
        health.record();
        health.record();
    });
    let mut recorded = Recorded {
        values: BTreeMap::new(),
        labels: BTreeSet::new(),
    };
    for (key, unit, description, value) in snapshotter.snapshot().into_vec() {
        let key: CompositeKey = key;
        let name = key.key().name().to_owned();
        assert!(
            unit.is_some() && description.is_some(),
            "{name} is not described"
        );
        let value = match value {
            DebugValue::Gauge(value) => {
                assert!(!name.ends_with("_total"), "{name}");
                value.into_inner()
            }
            DebugValue::Counter(value) => {
                assert!(name.ends_with("_total"), "{name}");
                value as f64
            }
            other @ DebugValue::Histogram(_) => panic!("{name}: {other:?}"),
        };
        for label in key.key().labels() {
            let label = (label.key().to_owned(), label.value().to_owned());
            recorded.labels.insert(label);
        }
        assert!(
            recorded.values.insert(name, value).is_none(),
            "a name with two sets of labels"
        );
    }
    recorded
}

/// The names in the documentation of `Health::record`.
fn documented() -> BTreeSet<String> {
    let source = include_str!("../../../../src/monitor/metrics.rs");
    let docs = source
        .lines()
        .filter(|line| line.trim_start().starts_with("/// "));
    docs.flat_map(|line| line.split('`'))
        .filter(|word| word.starts_with("lockkeeper_"))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn health_is_recorded_under_the_documented_names() {
    let scene = Scene::new(2).await;
    let odd = "not \"a\" label, pid 1";
    let holder = scene.database.connect().await;
    let sql = format!("SET application_name = '{odd}'; BEGIN; SELECT pg_advisory_xact_lock(1)");
    holder.batch_execute(&sql).await.unwrap();
    let health = scene.keeper.monitor().health().await.unwrap();
    let recorded = recorded(&health);
    let names: BTreeSet<_> = recorded.values.keys().cloned().collect();
    assert_eq!(names, documented());
    let label = ("database".to_owned(), scene.database.name().to_owned());
    assert_eq!(recorded.labels, BTreeSet::from([label]));
    let value = |name: &str| recorded.values[&format!("lockkeeper_{name}")];
    let deadlocks = health.deadlocks().unwrap().count();
    assert_eq!(value("deadlocks_total"), deadlocks as f64);
    assert_eq!(value("advisory_locks_held"), 1.0);
    assert_eq!(value("invalid_indexes"), 0.0);
    assert_eq!(
        value("lock_table_entries"),
        health.lock_table().entries() as f64
    );
    assert_eq!(
        value("lock_table_capacity"),
        health.lock_table().capacity() as f64
    );
    assert_eq!(value("lock_waiters"), health.lock_waiters() as f64);
    let oldest = health
        .oldest_transaction()
        .seen()
        .unwrap()
        .as_ref()
        .unwrap();
    assert_eq!(
        value("transaction_oldest_seconds"),
        oldest.transaction_age().unwrap().as_secs_f64()
    );
    assert!(value("idle_in_transaction_oldest_seconds") > 0.0);
}

#[tokio::test]
async fn what_is_hidden_is_recorded_as_no_number() {
    let scene = Scene::new(2).await;
    let role = format!("blind_{}", scene.database.name());
    let create = format!("CREATE ROLE {role} LOGIN");
    scene.observer.batch_execute(&create).await.unwrap();
    let mut config = scene.database.config();
    config.user(&role);
    // A look that is not answered in time is taken on the pool's, which is of the same role.
    let keeper = Keeper::builder(scene.database.pool_as(&role, 2))
        .side_connection(config, NoTls)
        .build();
    let health = keeper.monitor().health().await.unwrap();
    let recorded = recorded(&health);
    let value = |name: &str| recorded.values[&format!("lockkeeper_{name}")];
    assert!(value("transaction_oldest_seconds").is_nan());
    assert!(value("idle_in_transaction_oldest_seconds").is_nan());
    assert!(value("hidden_sessions") >= 1.0);
    assert_eq!(value("advisory_locks_held"), 0.0);
    drop(keeper);
    let drop = format!("DROP ROLE {role}");
    eventually(std::time::Duration::from_secs(30), "in use", async || {
        scene.observer.batch_execute(&drop).await.is_ok()
    })
    .await;
}
