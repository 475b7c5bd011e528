//! `lock_timeout` and `statement_timeout`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper_testkit::{cancel, pid_of, until_waiting, until_waiting_for};
use tokio_postgres::Error;

use super::{advisory, code, database, texts};

/// What 16 clients with a `lock_timeout` of 1 to 3 ms made of one key.
struct Storm {
    timeouts: u32,
    grants: u32,
    leaks: u32,
}

/// Lets clients fight for one key. A leak: the statement failed with 55P03, what it was in was rolled back, and the
/// lock is held all the same. Ends with the first one if told so, else after a second, and when there have been enough
/// timeouts and grants to show something; in any case after half a minute.
async fn storm(locks: &'static str, releases: &'static str, until_leak: bool) -> Storm {
    let database = database().await;
    let (timeouts, grants, leaks) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicU32::new(0)),
    );
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for n in 0..16 {
        let client = database.connect().await;
        let (timeouts, grants, leaks, stop) = (
            Arc::clone(&timeouts),
            Arc::clone(&grants),
            Arc::clone(&leaks),
            Arc::clone(&stop),
        );
        tasks.push(tokio::spawn(async move {
            let setting = format!("SET lock_timeout = {}", 1 + n % 3);
            client.batch_execute(&setting).await.unwrap();
            while !stop.load(Ordering::Relaxed) {
                match client.batch_execute(locks).await {
                    Ok(()) => {
                        grants.fetch_add(1, Ordering::Relaxed);
                        client
                            .batch_execute("SELECT pg_sleep(0.002)")
                            .await
                            .unwrap();
                        client.batch_execute(releases).await.unwrap();
                    }
                    Err(error) => {
                        assert_eq!(error.code().map(|code| code.code()), Some("55P03"));
                        timeouts.fetch_add(1, Ordering::Relaxed);
                        // Without a transaction that is a NOTICE less than a WARNING: only where one may be open.
                        if locks.contains("BEGIN") {
                            client.batch_execute("ROLLBACK").await.unwrap();
                        }
                        let held = texts(
                            &client,
                            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted \
                             AND pid = pg_backend_pid()",
                        );
                        if held.await != ["0"] {
                            leaks.fetch_add(1, Ordering::Relaxed);
                            stop.store(until_leak, Ordering::Relaxed);
                            client
                                .batch_execute("SELECT pg_advisory_unlock_all()")
                                .await
                                .unwrap();
                        }
                    }
                }
            }
        }));
    }
    let started = Instant::now();
    let enough = || {
        !until_leak
            && started.elapsed() >= Duration::from_secs(1)
            && timeouts.load(Ordering::Relaxed) > 50
            && grants.load(Ordering::Relaxed) > 5
    };
    let most = Duration::from_secs(30);
    while started.elapsed() < most && !enough() && !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    Storm {
        timeouts: timeouts.load(Ordering::Relaxed),
        grants: grants.load(Ordering::Relaxed),
        leaks: leaks.load(Ordering::Relaxed),
    }
}

/// About one timeout in twenty leaves the lock behind, so the first leak shows within milliseconds; the bound is for a
/// server on which it would not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_lock_leaks_under_lock_timeout() {
    let storm = storm(
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_advisory_unlock(1)",
        true,
    )
    .await;
    assert!(
        storm.leaks > 0,
        "no leak in {} timeouts and {} grants: waiting for session locks directly has become safe",
        storm.timeouts,
        storm.grants
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn xact_lock_never_leaks_under_lock_timeout() {
    let storm = storm("BEGIN; SELECT pg_advisory_xact_lock(1)", "COMMIT", false).await;
    assert!(
        storm.timeouts > 50 && storm.grants > 5,
        "not much of a storm"
    );
    assert_eq!(storm.leaks, 0, "of {} timeouts", storm.timeouts);
}

/// Only the transaction lock waits, and a rollback undoes it; the session lock is then granted re-entrantly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_lock_under_an_xact_lock_never_leaks_under_lock_timeout() {
    let storm = storm(
        "BEGIN; SELECT pg_advisory_xact_lock(1); SELECT pg_advisory_lock(1); COMMIT",
        "SELECT pg_advisory_unlock(1)",
        false,
    )
    .await;
    assert!(
        storm.timeouts > 50 && storm.grants > 5,
        "not much of a storm"
    );
    assert_eq!(storm.leaks, 0, "of {} timeouts", storm.timeouts);
}

#[tokio::test]
async fn lock_timeout_zero_means_for_ever_and_fractions_round() {
    let database = database().await;
    let (holder, waiter, observer) = (
        database.connect().await,
        database.connect().await,
        database.connect().await,
    );
    for (set, shown) in [
        ("0.4ms", "0"),
        ("400us", "0"),
        ("0.6ms", "1ms"),
        ("1.4ms", "1ms"),
        ("1.6ms", "2ms"),
        ("2147483647", "2147483647ms"),
        ("1500", "1500ms"),
        ("60000", "1min"),
    ] {
        waiter
            .batch_execute(&format!("SET lock_timeout = '{set}'"))
            .await
            .unwrap();
        assert_eq!(texts(&waiter, "SHOW lock_timeout").await, [shown], "{set}");
    }
    for refused in ["2147483648", "-1"] {
        let set = waiter
            .batch_execute(&format!("SET lock_timeout = '{refused}'"))
            .await;
        assert_eq!(code(set), "22023", "{refused}");
    }

    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let pid = pid_of(&waiter).await;
    waiter
        .batch_execute("SET lock_timeout = '0.4ms'")
        .await
        .unwrap();
    let wait = tokio::spawn(async move {
        waiter
            .batch_execute("SELECT pg_advisory_xact_lock(1)")
            .await
    });
    until_waiting_for(&observer, pid, Duration::from_millis(50)).await;
    assert_eq!(advisory(&observer, pid, false).await, 1);
    cancel(&observer, pid).await;
    assert_eq!(code(wait.await.unwrap()), "57014");
}

#[tokio::test]
async fn statement_timeout_not_longer_than_lock_timeout_gives_57014() {
    let database = database().await;
    let (holder, waiter) = (database.connect().await, database.connect().await);
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    for (statement, lock, expected) in [
        (50, 50, "57014"),
        (50, 60_000, "57014"),
        (60_000, 50, "55P03"),
        (0, 50, "55P03"),
    ] {
        let set = format!("SET statement_timeout = {statement}; SET lock_timeout = {lock}");
        waiter.batch_execute(&set).await.unwrap();
        let answer = waiter
            .batch_execute("SELECT pg_advisory_xact_lock(1)")
            .await;
        assert_eq!(
            code(answer),
            expected,
            "statement {statement} ms, lock {lock} ms"
        );
    }
}

/// Two lock timeouts of one transaction do not add up to one: each wait has all of it.
#[tokio::test]
async fn lock_timeout_counts_each_wait_by_itself() {
    let database = database().await;
    let (holder, waiter) = (database.connect().await, database.connect().await);
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let started = Instant::now();
    let both = "BEGIN; SET LOCAL lock_timeout = 150; SAVEPOINT s; SELECT pg_advisory_xact_lock(1)";
    assert_eq!(code(waiter.batch_execute(both).await), "55P03");
    let again = "ROLLBACK TO SAVEPOINT s; SELECT pg_advisory_xact_lock(1)";
    assert_eq!(code(waiter.batch_execute(again).await), "55P03");
    assert!(started.elapsed() >= Duration::from_millis(300));
}

/// Each statement of a message has all of `statement_timeout` (since PostgreSQL 13).
#[tokio::test]
async fn statement_timeout_applies_to_each_statement_of_a_message() {
    let client = database().await.connect().await;
    client
        .batch_execute("SET statement_timeout = 4000")
        .await
        .unwrap();
    let one = "SELECT pg_sleep(2.2)";
    let message = format!("{one}; {one}");
    client.batch_execute(&message).await.unwrap();
    client
        .batch_execute("SET statement_timeout = 50")
        .await
        .unwrap();
    assert_eq!(code(client.batch_execute(&message).await), "57014");
}

#[tokio::test]
async fn set_local_in_a_message_holds_from_the_next_statement_to_the_end_of_the_transaction() {
    let client = database().await.connect().await;
    let shown = texts(
        &client,
        "BEGIN; SET LOCAL application_name = 'inside'; SET LOCAL lock_timeout = 7; SHOW application_name; \
         SHOW lock_timeout; ROLLBACK; SHOW lock_timeout",
    )
    .await;
    assert_eq!(shown, ["inside", "7ms", "0"]);

    let started = Instant::now();
    let slow = client
        .batch_execute("BEGIN; SET LOCAL statement_timeout = 50; SELECT pg_sleep(60)")
        .await;
    assert_eq!(code(slow), "57014");
    assert!(started.elapsed() < Duration::from_secs(30));
    client.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(texts(&client, "SHOW statement_timeout").await, ["0"]);
}

/// The C function that raised a lock's 55P03.
fn routine(answer: Result<(), Error>) -> String {
    let error = answer.expect_err("the lock was granted");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!(error.code().code(), "55P03");
    error.routine().unwrap_or("none").to_owned()
}

/// NOWAIT and `lock_timeout` have one SQLSTATE; the function that raised it tells them apart, in every language.
#[tokio::test]
async fn nowait_is_told_from_a_lock_timeout_by_the_routine() {
    let database = database().await;
    let (holder, queued, client, observer) = (
        database.connect().await,
        database.connect().await,
        database.connect().await,
        database.connect().await,
    );
    holder
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0); \
             CREATE VIEW v AS SELECT * FROM t; CREATE VIEW w AS SELECT * FROM v; \
             CREATE TABLE p (id int, n int) PARTITION BY RANGE (id); \
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id); \
             CREATE TABLE p11 PARTITION OF p1 FOR VALUES FROM (0) TO (10); INSERT INTO p VALUES (1, 0); \
             CREATE TABLE parent (id int); CREATE TABLE child () INHERITS (parent)",
        )
        .await
        .unwrap();
    let mut nowait = std::collections::BTreeSet::new();
    for (held, asked) in [
        ("UPDATE t SET n = 1", "SELECT FROM t FOR UPDATE NOWAIT"),
        ("DELETE FROM t", "SELECT FROM t FOR KEY SHARE NOWAIT"),
        (
            "SELECT FROM t FOR KEY SHARE",
            "SELECT FROM t FOR UPDATE NOWAIT",
        ),
        ("UPDATE t SET n = 1", "SELECT FROM w FOR UPDATE NOWAIT"),
        ("UPDATE p SET n = 1", "SELECT FROM p FOR UPDATE NOWAIT"),
        ("LOCK TABLE t", "LOCK TABLE t NOWAIT"),
        (
            "SELECT FROM t",
            "LOCK TABLE t IN ACCESS EXCLUSIVE MODE NOWAIT",
        ),
        ("LOCK TABLE t", "LOCK TABLE v NOWAIT"),
        ("LOCK TABLE t", "LOCK TABLE w NOWAIT"),
        ("LOCK TABLE p11", "LOCK TABLE p NOWAIT"),
        ("LOCK TABLE child", "LOCK TABLE parent NOWAIT"),
    ] {
        let begin = format!("BEGIN; {held}");
        holder.batch_execute(&begin).await.unwrap();
        let sql = format!("BEGIN; {asked}");
        nowait.insert(routine(client.batch_execute(&sql).await));
        client.batch_execute("ROLLBACK").await.unwrap();
        // The same wait, ended by lock_timeout.
        let waiting = asked.replace(" NOWAIT", "");
        let sql = format!("BEGIN; SET LOCAL lock_timeout = 10; {waiting}");
        assert_eq!(
            routine(client.batch_execute(&sql).await),
            "ProcessInterrupts",
            "{waiting}"
        );
        client.batch_execute("ROLLBACK").await.unwrap();
        holder.batch_execute("ROLLBACK").await.unwrap();
    }
    // Another session waits for the row already, and holds the right to be the next.
    holder
        .batch_execute("BEGIN; UPDATE t SET n = 1")
        .await
        .unwrap();
    let pid = pid_of(&queued).await;
    let (first, raised) = tokio::join!(queued.batch_execute("UPDATE t SET n = 2"), async {
        until_waiting(&observer, pid).await;
        let raised = client
            .batch_execute("SELECT FROM t FOR UPDATE NOWAIT")
            .await;
        holder.batch_execute("ROLLBACK").await.unwrap();
        raised
    });
    first.unwrap();
    nowait.insert(routine(raised));
    // The row has been changed since the statement began, and is being changed again.
    let pid = pid_of(&client).await;
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let (raised, ()) = tokio::join!(
        client.batch_execute(
            "WITH w AS MATERIALIZED (SELECT pg_advisory_xact_lock(1)) SELECT FROM w, t FOR UPDATE OF t NOWAIT"
        ),
        async {
            until_waiting(&observer, pid).await;
            for sql in [
                "UPDATE t SET n = 3",
                "BEGIN; UPDATE t SET n = 4; SELECT pg_advisory_unlock(1)",
            ] {
                holder.batch_execute(sql).await.unwrap();
            }
        }
    );
    nowait.insert(routine(raised));
    holder.batch_execute("ROLLBACK").await.unwrap();
    let expected = [
        "LockTableRecurse",
        "LockViewRecurse_walker",
        "RangeVarGetRelidExtended",
        "heap_acquire_tuplock",
        "heap_lock_tuple",
        "heapam_tuple_lock",
    ];
    assert_eq!(nowait, expected.map(str::to_owned).into());
    // Advisory locks have no NOWAIT.
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let sql = "BEGIN; SET LOCAL lock_timeout = 10; SELECT pg_advisory_xact_lock(1)";
    let raised = routine(client.batch_execute(sql).await);
    assert_eq!(raised, "ProcessInterrupts");
}
