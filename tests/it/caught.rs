//! Failures that nobody retries are reported too: waits that `statement_timeout` ended, and what a savepoint caught.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::incident::Outcome;
use lockkeeper::{Error, ErrorKind, IncidentKind, Keeper, TransactionOptions};
use lockkeeper_testkit::{IncidentScene, assert_error, sqlstate};

const ONE: &str = "UPDATE account SET balance = 1 WHERE id = 1";
const TWO: &str = "UPDATE account SET balance = 1 WHERE id = 2";

/// By our option, or by a statement of the section.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_statement_timeout_ended_names_its_blockers() {
    let reported = IncidentScene::new(3).await;
    let holder = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let timeout = Duration::from_millis(700);
    for (at, by_option) in [true, false].into_iter().enumerate() {
        let mut options = TransactionOptions::new();
        if by_option {
            options = options.statement_timeout(timeout);
        }
        let error = reported
            .keeper()
            .transaction_with(options, async |tx| {
                if !by_option {
                    tx.batch_execute("SET LOCAL statement_timeout = 700")
                        .await?;
                }
                tx.batch_execute(ONE).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap_err();
        assert_error(&error, ErrorKind::Cancelled, "SQLSTATE 57014");
        let incident = reported.after(at + 1).await.remove(at);
        assert_eq!(incident.kind(), IncidentKind::LockTimeout, "{incident}");
        assert_eq!(incident.outcome(), Outcome::NotRetried);
        assert_eq!(incident.sqlstate(), Some("57014"));
        assert_eq!(incident.edges().len(), 1, "{incident}");
        let text = incident.to_string();
        assert!(text.starts_with("Cancelled lock wait"), "{text}");
        assert!(text.contains("row id = 1 of public.account"), "{text}");
    }
    holder.batch_execute("ROLLBACK").await.unwrap();
    // Swallowed, it is in the error too.
    let holder = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let options = TransactionOptions::new().statement_timeout(timeout);
    let error = reported
        .keeper()
        .transaction_with(options.clone(), async |tx| {
            tx.batch_execute(ONE).await.ok();
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(error.incident().is_some(), "{error:?}");
    holder.batch_execute("ROLLBACK").await.unwrap();
    // A statement that only took too long is no incident.
    let before = reported.after(3).await.len();
    let error = reported
        .keeper()
        .transaction_with(options, async |tx| {
            tx.batch_execute("SELECT pg_sleep(60)").await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&error), "57014");
    assert_eq!(reported.incidents().len(), before);
    reported.scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_timeout_that_a_savepoint_caught_is_reported() {
    let reported = IncidentScene::new(3).await;
    let holder = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let options = TransactionOptions::new().lock_timeout(Duration::from_millis(300));
    // Through two savepoints, and the outer one catches it.
    let attempts = reported
        .keeper()
        .transaction_with(options.clone(), async |tx| {
            let caught = tx
                .savepoint(async |tx| {
                    tx.savepoint(async |tx| {
                        tx.batch_execute(ONE).await?;
                        Ok::<_, Error>(())
                    })
                    .await
                })
                .await;
            assert_eq!(sqlstate(&caught.unwrap_err()), "55P03");
            tx.batch_execute(TWO).await?;
            Ok::<_, Error>(tx.attempt())
        })
        .await;
    assert_eq!(attempts.unwrap(), 1);
    let incidents = reported.after(1).await;
    assert_eq!(incidents.len(), 1);
    let incident = &incidents[0];
    assert_eq!(incident.kind(), IncidentKind::LockTimeout);
    assert_eq!(incident.outcome(), Outcome::CaughtBySavepoint);
    let text = incident.to_string();
    assert!(text.contains("caught by a savepoint"), "{text}");
    assert_eq!(incident.edges().len(), 1, "{incident}");
    // Passed on, it is the transaction's, and is reported once for each attempt.
    let passed = reported
        .keeper()
        .transaction_with(options.attempts(2), async |tx| {
            tx.savepoint(async |tx| {
                tx.batch_execute(ONE).await?;
                Ok::<_, Error>(())
            })
            .await
        });
    passed.await.unwrap_err();
    let outcomes: Vec<_> = reported.after(3).await;
    let outcomes = outcomes[1..].iter().map(|incident| incident.outcome());
    let outcomes: Vec<_> = outcomes.collect();
    assert!(
        matches!(outcomes[..], [Outcome::Retried { .. }, Outcome::GaveUp]),
        "{outcomes:?}"
    );
    // A guard's savepoint catches it too.
    let mut guard = reported
        .keeper()
        .advisory_lock("k")
        .acquire()
        .await
        .unwrap();
    guard
        .batch_execute("SET LOCAL lock_timeout = 100")
        .await
        .unwrap();
    let caught = guard
        .savepoint(async |tx| {
            tx.batch_execute(ONE).await?;
            Ok::<_, Error>(())
        })
        .await;
    assert!(caught.is_err());
    guard.commit().await.unwrap();
    let incidents = reported.after(4).await;
    assert_eq!(incidents[3].outcome(), Outcome::CaughtBySavepoint);
    holder.batch_execute("ROLLBACK").await.unwrap();
    reported.scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_that_a_savepoint_caught_is_reported() {
    let reported = IncidentScene::new(3).await;
    let other = reported.stranger(&format!("BEGIN; {TWO}")).await;
    let attempts = AtomicU32::new(0);
    let ran = reported.keeper().transaction(async |tx| {
        attempts.fetch_add(1, Ordering::Relaxed);
        tx.batch_execute(ONE).await?;
        let caught = tx
            .savepoint(async |tx| {
                tx.batch_execute(TWO).await?;
                Ok::<_, Error>(())
            })
            .await;
        assert_eq!(sqlstate(&caught.unwrap_err()), "40P01");
        Ok::<_, Error>(())
    });
    let (ran, ()) = tokio::join!(ran, async {
        reported.scene.until_lock_waiters(1).await;
        other.batch_execute(ONE).await.unwrap();
        other.batch_execute("ROLLBACK").await.unwrap();
    });
    ran.unwrap();
    assert_eq!(attempts.into_inner(), 1);
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::Deadlock, "{incident}");
    assert_eq!(incident.outcome(), Outcome::CaughtBySavepoint);
    assert_eq!(incident.cycle().len(), 2, "{incident}");
    reported.scene.nothing_left().await;
}

/// What this crate sends of its own accord is not what the application ran last: neither in a report nor in the lock tree.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_crates_own_statements_are_not_the_applications() {
    let reported = IncidentScene::new(3).await;
    let scene = &reported.scene;
    // The other process has no journal here.
    let other = Keeper::new(scene.database.pool(1));
    let mut seen = 0;
    // Whole texts at first, and prepared statements later.
    for _ in 0..3 {
        for in_savepoint in [false, true] {
            let mut guard = other.advisory_lock(743).acquire().await.unwrap();
            if in_savepoint {
                guard.savepoint(async |_| Ok::<_, Error>(())).await.unwrap();
            }
            let options = TransactionOptions::new().once();
            let waiting = reported.keeper().transaction_with(
                options.lock_timeout(Duration::from_millis(300)),
                async |tx| {
                    tx.batch_execute("SELECT pg_advisory_xact_lock(743)")
                        .await?;
                    Ok::<_, Error>(())
                },
            );
            let (waited, tree) = tokio::join!(waiting, async {
                scene.until_lock_waiters(1).await;
                scene.monitor().lock_tree().await.unwrap().to_string()
            });
            waited.unwrap_err();
            seen += 1;
            let incident = reported.after(seen).await.remove(seen - 1);
            assert_eq!(incident.participants().len(), 2, "{incident}");
            assert_eq!(incident.participants()[1].statement(), None, "{incident}");
            // The tree has the waits of all databases.
            let pid = incident.participants()[1].pid().unwrap();
            let start = format!("pid {pid} (");
            let lines = tree.lines().skip_while(|line| !line.starts_with(&start));
            let tree: Vec<_> = lines.take(2).collect();
            assert_eq!(tree.len(), 2, "{tree:?}");
            for text in [incident.to_string(), tree.join("\n")] {
                for own in ["EXECUTE", "SAVEPOINT", "pg_backend_pid", "last ran"] {
                    assert!(!text.contains(own), "{own}: {text}");
                }
            }
            drop(guard);
        }
    }
    scene.nothing_left().await;
}
