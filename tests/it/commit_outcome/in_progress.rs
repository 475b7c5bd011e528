//! COMMIT is under way when the connection is lost, or never answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind};
use lockkeeper_testkit::{Fault, assert_error, terminate};

use super::{COMMIT, Counts, Lab, MARK, add, insert, resolving};

/// The connection is lost while COMMIT waits; then it continues, or its backend ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_in_progress_is_asked_for_until_it_is_decided() {
    for commits in [true, false] {
        let lab = Lab::new(2).await;
        lab.hold_commits().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, Fault::CutDuring);
        let (answer, ()) = tokio::join!(add(&lab.keeper, resolving(), &counts), async {
            let pid = lab.held_up().await;
            lab.asked().await;
            assert_eq!(counts.runs(), 1);
            if commits {
                lab.let_commit().await;
            } else {
                terminate(&lab.observer, pid).await;
                lab.settled_but_one(pid).await;
                lab.let_commit().await;
            }
        });
        let what = format!("commits: {commits}");
        lab.agrees(&answer, &counts, &what).await;
        answer.expect(&what);
        assert_eq!(counts.runs(), if commits { 1 } else { 2 }, "{what}");
    }
}

/// COMMIT arrives when its client has been gone for a while: until then it is not decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_arrives_late_counts() {
    let lab = Lab::new(2).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::Orphan);
    let (answer, ()) = tokio::join!(add(&lab.keeper, resolving(), &counts), async {
        lab.asked().await;
        lab.proxy.deliver();
    });
    lab.agrees(&answer, &counts, "late").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 1);
}

/// What is not decided in time stays unknown, and is not run again; it may still be committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_decided_in_time_stays_unknown() {
    let lab = Lab::new(2).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::Orphan);
    let started = Instant::now();
    let answer = add(&lab.keeper, resolving(), &counts).await;
    let waited = started.elapsed();
    assert!(
        (Duration::from_secs(14)..Duration::from_secs(60)).contains(&waited),
        "{waited:?}"
    );
    assert_error(
        answer.as_ref().unwrap_err(),
        ErrorKind::CommitUnknown,
        "the server did not decide in time",
    );
    assert_eq!(lab.count("t").await, 0);
    lab.proxy.deliver();
    let applied = lab.agrees(&answer, &counts, "too late").await;
    assert_eq!(applied, 1, "the test did not show what it should");
    assert_eq!(counts.runs(), 1);
}

/// The backend is terminated in the middle of COMMIT, which ends it with an error, or none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_terminated_in_commit_has_not_committed_and_is_run_again() {
    let lab = Lab::new(2).await;
    lab.hold_commits().await;
    let counts = Counts::default();
    let (answer, ()) = tokio::join!(add(&lab.keeper, resolving(), &counts), async {
        let pid = lab.held_up().await;
        terminate(&lab.observer, pid).await;
        lab.settled_but_one(pid).await;
        lab.let_commit().await;
    });
    lab.agrees(&answer, &counts, "terminated").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 2);
}

/// All connections of the pool are in other hands, and others stand in line for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outcome_is_asked_for_even_where_the_pool_is_busy() {
    let lab = Lab::new(1).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::CutAnswer);
    let begun = tokio::sync::Notify::new();
    let done = AtomicBool::new(false);
    let (answer, ()) = tokio::join!(
        async {
            let answer = lab
                .keeper
                .transaction_with(resolving(), async |tx| {
                    insert(tx, &counts).await?;
                    begun.notify_one();
                    // Until the others stand in line.
                    while lab.pool.status().waiting < 20 {
                        tokio::task::yield_now().await;
                    }
                    Ok::<_, Error>(())
                })
                .await;
            done.store(true, Ordering::Relaxed);
            answer
        },
        async {
            begun.notified().await;
            let others = (0..20).map(|_| async {
                // A task that has had one queues again.
                while !done.load(Ordering::Relaxed) {
                    let object = lab.pool.get().await.unwrap();
                    object.batch_execute("SELECT pg_sleep(0.1)").await.unwrap();
                }
            });
            futures::future::join_all(others).await;
        }
    );
    lab.agrees(&answer, &counts, "busy").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 1);
}

/// Connections that have gone silent, as after a failover that their sockets were not told of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_stays_silent_is_not_waited_for() {
    let lab = Lab::new(2).await;
    for (silent, is_unknown) in [(1, false), (30, true)] {
        lab.reset().await;
        lab.pool_is_whole().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, Fault::CutAnswer);
        for _ in 0..silent {
            lab.proxy.fault(MARK, Fault::Stall);
        }
        let started = Instant::now();
        let answer = add(&lab.keeper, resolving(), &counts).await;
        assert!(started.elapsed() < Duration::from_secs(60));
        lab.agrees(&answer, &counts, "silent").await;
        assert_eq!(answer.is_err(), is_unknown, "{answer:?}");
        if let Err(error) = answer {
            assert_error(&error, ErrorKind::CommitUnknown, "outcome unknown");
        }
        assert_eq!(counts.runs(), 1);
        lab.proxy.clear_faults();
    }
}
