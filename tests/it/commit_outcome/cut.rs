//! The connection is cut around COMMIT.

use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions};
use lockkeeper_testkit::{
    Fault, assert_error, assert_error_in, poll_times_and_drop, terminate, until_closed,
};
use tokio_postgres::NoTls;

use super::{COMMIT, Counts, Lab, MARK, add, insert, resolving};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_option_what_is_lost_in_commit_is_unknown_and_not_run_again() {
    let lab = Lab::new(2).await;
    for (cut, applied) in [
        (Fault::CutBefore, 0),
        (Fault::Reset, 0),
        (Fault::CutDuring, 1),
        (Fault::CutAnswer, 1),
        (Fault::CutAfter, 1),
    ] {
        lab.reset().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, cut);
        let answer = add(&lab.keeper, TransactionOptions::new(), &counts).await;
        let what = format!("{cut:?}");
        let rows = lab.agrees(&answer, &counts, &what).await;
        assert_eq!(rows, applied, "{what}");
        assert_eq!(counts.runs(), 1, "{what}");
        match answer {
            Ok(()) => assert_eq!(cut, Fault::CutAfter),
            Err(error) => {
                assert_ne!(cut, Fault::CutAfter);
                assert_error_in(&what, &error, ErrorKind::CommitUnknown, "outcome unknown");
                assert!(!error.is_retryable(), "{what}");
            }
        }
        assert_eq!(lab.proxy.faults_left(), 0, "{what}");
        lab.pool_is_whole().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_option_it_is_found_out() {
    let lab = Lab::new(1).await;
    let beside = Keeper::builder(lab.pool.clone())
        .side_connection(lab.database.config(), NoTls)
        .build();
    for keeper in [&lab.keeper, &beside] {
        for (cut, runs) in [
            (Fault::CutBefore, 2),
            (Fault::CutDuring, 1),
            (Fault::CutAnswer, 1),
            (Fault::CutAfter, 1),
        ] {
            lab.reset().await;
            let counts = Counts::default();
            lab.proxy.fault(COMMIT, cut);
            let answer = add(keeper, resolving(), &counts).await;
            let what = format!("{cut:?}");
            lab.agrees(&answer, &counts, &what).await;
            answer.expect(&what);
            assert_eq!(counts.runs(), runs, "{what}");
            assert_eq!(lab.proxy.faults_left(), 0, "{what}");
            lab.pool_is_whole().await;
        }
    }
}

/// Before COMMIT was sent nothing can have been committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_between_the_closure_and_commit_it_is_run_again() {
    let lab = Lab::new(2).await;
    for cut in [
        Fault::CutBefore,
        Fault::CutDuring,
        Fault::CutAnswer,
        Fault::CutAfter,
    ] {
        lab.reset().await;
        let counts = Counts::default();
        lab.proxy.fault(MARK, cut);
        let answer = add(&lab.keeper, resolving(), &counts).await;
        let what = format!("{cut:?}");
        lab.agrees(&answer, &counts, &what).await;
        // After the mark's answer the end of the connection may be seen before COMMIT is sent, or in its stead.
        answer.expect(&what);
        assert_eq!(counts.runs(), 2, "{what}");
        assert_eq!(lab.proxy.faults_left(), 0, "{what}");
    }

    // By the server, and noticed before anything is sent, or not.
    for noticed in [true, false] {
        for (options, runs) in [(TransactionOptions::new(), 1), (resolving(), 2)] {
            lab.reset().await;
            let counts = Counts::default();
            let answer = lab
                .keeper
                .transaction_with(options, async |tx| {
                    insert(tx, &counts).await?;
                    if counts.runs() == 1 {
                        terminate(&lab.observer, tx.backend_pid().unwrap()).await;
                        if noticed {
                            until_closed(tx.client()).await;
                        }
                    }
                    Ok::<_, Error>(())
                })
                .await;
            let what = format!("terminated, {runs} runs, noticed: {noticed}");
            lab.agrees(&answer, &counts, &what).await;
            assert_eq!(counts.runs(), runs, "{what}");
            match answer {
                Ok(()) => assert_eq!(runs, 2, "{what}"),
                Err(error) if noticed => {
                    assert_error_in(
                        &what,
                        &error,
                        ErrorKind::ConnectionLost,
                        "before commit, nothing is applied",
                    );
                }
                Err(error) => assert_eq!(runs, 1, "{what}: {error:?}"),
            }
        }
    }
}

/// A connection lost inside the closure is the closure's business.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_inside_the_closure_it_is_not_run_again() {
    let lab = Lab::new(2).await;
    let counts = Counts::default();
    lab.proxy.fault("SELECT 'cut'", Fault::CutBefore);
    let answer = lab
        .keeper
        .transaction_with(resolving(), async |tx| {
            insert(tx, &counts).await?;
            tx.batch_execute("SELECT 'cut'").await?;
            Ok::<_, Error>(())
        })
        .await;
    lab.agrees(&answer, &counts, "inside").await;
    assert_error(
        &answer.unwrap_err(),
        ErrorKind::ConnectionLost,
        "before commit, nothing is applied",
    );
    assert_eq!(counts.runs(), 1);

    // Its error swallowed, there is nothing left to commit on.
    lab.proxy.fault("SELECT 'cut'", Fault::CutBefore);
    let counts = Counts::default();
    let answer = lab
        .keeper
        .transaction_with(resolving(), async |tx| {
            insert(tx, &counts).await?;
            if counts.runs() == 1 {
                drop(tx.batch_execute("SELECT 'cut'").await);
            }
            Ok::<_, Error>(())
        })
        .await;
    lab.agrees(&answer, &counts, "swallowed").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_at_every_attempt_it_runs_out_of_them() {
    let lab = Lab::new(2).await;
    for _ in 0..3 {
        lab.proxy.fault(COMMIT, Fault::CutBefore);
    }
    let counts = Counts::default();
    let answer = add(&lab.keeper, resolving().attempts(3), &counts).await;
    lab.agrees(&answer, &counts, "each time").await;
    let error = answer.unwrap_err();
    assert_error(&error, ErrorKind::RetriesExhausted, "3 attempts");
    assert_eq!(error.attempts(), 3);
    assert_eq!(counts.runs(), 3);
    let source = std::error::Error::source(&error).and_then(|error| error.downcast_ref::<Error>());
    assert_eq!(source.map(Error::kind), Some(ErrorKind::ConnectionLost));

    // With one attempt the error is itself, and what it says is known.
    lab.proxy.fault(COMMIT, Fault::CutBefore);
    let counts = Counts::default();
    let answer = add(&lab.keeper, resolving().attempts(1), &counts).await;
    lab.agrees(&answer, &counts, "once").await;
    let error = answer.unwrap_err();
    assert_error(
        &error,
        ErrorKind::ConnectionLost,
        "the server has rolled back",
    );
    assert!(error.is_retryable());
    let text = error.to_string();
    assert!(text.contains("rolled back"), "{text}");
}

/// However often it is polled before it is dropped, with COMMIT's answer lost or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_it_is_done_once_or_not_at_all() {
    for cut in [None, Some(Fault::CutBefore), Some(Fault::CutAnswer)] {
        let lab = Lab::new(2).await;
        let mut polls = 0;
        loop {
            lab.reset().await;
            let counts = Counts::default();
            if let Some(cut) = cut {
                lab.proxy.fault(COMMIT, cut);
            }
            let done = poll_times_and_drop(add(&lab.keeper, resolving(), &counts), polls).await;
            lab.settled().await;
            let what = format!("{cut:?} after {polls} polls");
            // What was not cut now may be cut later, in the background.
            lab.pool_is_whole().await;
            lab.settled().await;
            assert!(lab.count("t").await <= 1, "{what}");
            assert!(counts.hooks() <= 1, "{what}");
            if let Some(answer) = done {
                lab.agrees(&answer, &counts, &what).await;
                answer.expect(&what);
                break;
            }
            assert_eq!(counts.hooks(), 0, "{what}");
            lab.proxy.clear_faults();
            polls += 1;
            assert!(polls < 300);
        }
        // One for each of the messages, at least: on a busy machine an answer is there when the next one is waited for.
        assert!(polls > 2, "{polls} polls are too few to show anything");
    }
}
