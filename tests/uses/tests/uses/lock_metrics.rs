//! What this process does with locks, as metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use lockkeeper::{Error, ErrorKind};
use lockkeeper_testkit::{Scene, eventually, in_time, is_pending};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// A metric's name and labels, as Prometheus writes them.
type Series = String;

/// What was recorded so far.
struct Recorded {
    snapshotter: Snapshotter,
    /// A snapshot takes a gauge back to 0.
    gauges: Mutex<BTreeMap<Series, f64>>,
}

/// Counters and samples of histograms since the last time, and gauges as they are.
fn recorded(recorded: &Recorded) -> BTreeMap<Series, f64> {
    let metrics = recorded.snapshotter.snapshot().into_vec().into_iter();
    let series = metrics.map(|(key, unit, description, value)| {
        let key = key.key();
        let name = key.name();
        assert!(
            unit.is_some() && description.is_some(),
            "{name} is not described"
        );
        let labels: Vec<_> = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()))
            .collect();
        let value = match value {
            DebugValue::Counter(count) => {
                assert!(name.ends_with("_total"), "{name}");
                count as f64
            }
            DebugValue::Gauge(change) => {
                let mut gauges = recorded.gauges.lock().unwrap();
                let gauge = gauges
                    .entry(name.to_owned() + &labels.join(","))
                    .or_default();
                *gauge += change.into_inner();
                *gauge
            }
            DebugValue::Histogram(samples) => {
                assert!(name.ends_with("_seconds"), "{name}");
                for sample in &samples {
                    assert!((0.0..60.0).contains(&sample.into_inner()), "{name}");
                }
                samples.len() as f64
            }
        };
        (format!("{name}{{{}}}", labels.join(",")), value)
    });
    series.collect()
}

/// The names in the tables of the page `guide::numbers`.
fn documented() -> BTreeSet<String> {
    let page = include_str!("../../../../src/guide/numbers.md");
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| `lockkeeper_"));
    rows.map(|row| row.split('`').nth(1).unwrap().to_owned())
        .collect()
}

/// One thread, whose recorder is its own.
#[tokio::test]
async fn locks_and_transactions_are_recorded_under_the_documented_names() {
    let recorder = DebuggingRecorder::new();
    let all = Recorded {
        snapshotter: recorder.snapshotter(),
        gauges: Mutex::default(),
    };
    let _recording = metrics::set_default_local_recorder(&recorder);
    let scene = Scene::new(4).await;
    let keeper = scene.builder().build();
    let mut names = BTreeSet::new();
    let mut take = || {
        let recorded = recorded(&all);
        let seen = recorded
            .keys()
            .map(|series| series.split('{').next().unwrap());
        names.extend(seen.map(str::to_owned));
        assert!(
            recorded.keys().all(|series| !series.contains("secret")),
            "{recorded:?}"
        );
        recorded
    };

    // A section, and what it holds while it runs.
    let inside = keeper.with_advisory_lock(("invoice", "secret 1"), async |_| {
        Ok::<_, Error>(recorded(&all))
    });
    let inside = inside.await.unwrap();
    assert_eq!(inside["lockkeeper_guards{scope=transaction}"], 1.0);
    assert_eq!(
        inside["lockkeeper_lock_acquisitions_total{namespace=invoice}"],
        1.0
    );
    assert_eq!(
        inside["lockkeeper_lock_wait_seconds{namespace=invoice}"],
        1.0
    );
    assert!(!inside.contains_key("lockkeeper_lock_hold_seconds{namespace=invoice}"));
    let after = take();
    assert_eq!(after["lockkeeper_guards{scope=transaction}"], 0.0);
    assert_eq!(
        after["lockkeeper_lock_hold_seconds{namespace=invoice}"],
        1.0
    );

    // A set of locks is one call; so is one more lock in the same transaction, unless it is held already.
    let set = ["secret 2", "secret 3"].map(|name| ("set", name));
    let several = keeper.advisory_locks(set).run(async |tx| {
        tx.advisory_lock(("set", "secret 2")).await?;
        tx.advisory_lock(("more", "secret")).await?;
        assert!(tx.advisory_lock(("more", "secret 2")).try_acquire().await?);
        Ok::<_, Error>(())
    });
    several.await.unwrap();
    let after = take();
    assert_eq!(after["lockkeeper_lock_hold_seconds{namespace=set}"], 1.0);
    assert_eq!(after["lockkeeper_lock_hold_seconds{namespace=more}"], 2.0);
    assert_eq!(
        after["lockkeeper_lock_acquisitions_total{namespace=more}"],
        2.0
    );
    assert_eq!(after["lockkeeper_guards{scope=transaction}"], 0.0);

    // A wait, and its end.
    let holder = scene.holder(("invoice", "secret 4")).await;
    let lock = keeper.advisory_lock(("invoice", "secret 4"));
    let busy = lock.clone().session().try_acquire().await.unwrap();
    assert!(busy.is_none());
    let mut waiting = Box::pin(lock.wait(Duration::from_millis(300)).acquire());
    while recorded(&all).get("lockkeeper_waiters{}") != Some(&1.0) {
        assert!(is_pending(&mut waiting).await);
        tokio::task::yield_now().await;
    }
    let error = in_time("the wait", waiting).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout);
    drop(holder);
    let after = take();
    assert_eq!(
        after["lockkeeper_lock_timeouts_total{namespace=invoice}"],
        1.0
    );
    assert_eq!(
        after["lockkeeper_lock_wait_seconds{namespace=invoice}"],
        1.0
    );
    assert_eq!(after["lockkeeper_waiters{}"], 0.0);
    let acquired = after.get("lockkeeper_lock_acquisitions_total{namespace=invoice}");
    assert_eq!(acquired.copied().unwrap_or_default(), 0.0);

    // Attempts that are followed by another one.
    for sqlstate in ["40001", "40P01"] {
        let raise = format!("DO $$BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END$$");
        let repeated = keeper.transaction(async |tx| {
            if tx.attempt() == 1 {
                tx.batch_execute(&raise).await?;
            }
            Ok::<_, Error>(())
        });
        repeated.await.unwrap();
        let after = take();
        let retries = format!("lockkeeper_transaction_retries_total{{sqlstate={sqlstate}}}");
        assert_eq!(after[&retries], 1.0);
        let deadlocks: Vec<_> = after
            .iter()
            .filter(|(series, count)| series.contains("_deadlocks_") && **count > 0.0)
            .collect();
        let is_deadlock = sqlstate == "40P01";
        assert_eq!(deadlocks.len(), usize::from(is_deadlock), "{after:?}");
        // 16 hexadecimal digits.
        let fingerprint = deadlocks
            .first()
            .map_or("", |(series, _)| series.split(['=', '}']).nth(1).unwrap());
        assert_eq!(fingerprint.len(), if is_deadlock { 16 } else { 0 });
    }

    // A guard whose connection ends.
    let guard = keeper.advisory_lock("secret 5").session().acquire().await;
    let guard = guard.unwrap();
    let after = take();
    assert_eq!(after["lockkeeper_guards{scope=session}"], 1.0);
    assert_eq!(after["lockkeeper_lock_acquisitions_total{namespace=}"], 1.0);
    scene.terminate(guard.backend_pid().unwrap()).await;
    in_time("the loss", guard.loss()).await;
    drop(guard);
    let mut discarded = 0.0;
    eventually("not discarded", async || {
        let after = take();
        let ended = "lockkeeper_connections_discarded_total{reason=ended}";
        discarded += after.get(ended).copied().unwrap_or_default();
        assert_eq!(after["lockkeeper_guards{scope=session}"], 0.0);
        discarded == 1.0
    })
    .await;
    scene.nothing_left().await;
    assert_eq!(names, documented());
}

/// What stands beside the crate for others names nothing that is not recorded.
#[test]
fn rules_and_dashboard_name_what_there_is() {
    let health = include_str!("../../../../src/monitor/metrics.rs");
    let documented = documented();
    for text in [
        include_str!("../../../../examples/metrics/lockkeeper.rules.yml"),
        include_str!("../../../../examples/metrics/lockkeeper.dashboard.json"),
    ] {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
        let mut found = 0;
        for word in words.filter(|word| word.starts_with("lockkeeper_")) {
            let name = word.strip_suffix("_bucket").unwrap_or(word);
            let is_known = documented.contains(name) || health.contains(&format!("`{name}`"));
            assert!(is_known, "{word}");
            found += 1;
        }
        assert!(found > 8);
    }
}
