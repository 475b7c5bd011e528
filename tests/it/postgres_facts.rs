//! What the crate relies on in PostgreSQL and in the driver, shown without the crate: a server that changes one of
//! these fails here first. They hold on PostgreSQL 14 to 18; where the versions differ the test says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use lockkeeper_testkit::{
    Database, GIVE_UP_AFTER, Server, cancel, eventually, pid_of, until_waiting,
};
use tokio_postgres::{Client, Error, SimpleQueryMessage};

async fn database() -> Database {
    Server::shared().database().await
}

/// The SQLSTATE of a failed statement.
fn code<T>(answer: Result<T, Error>) -> String {
    match answer {
        Ok(_) => "00000".to_owned(),
        Err(error) => error
            .code()
            .map_or_else(|| format!("{error:?}"), |code| code.code().to_owned()),
    }
}

/// The first column of each row of a simple query.
async fn texts(client: &Client, sql: &str) -> Vec<String> {
    let reply = client.simple_query(sql).await.unwrap();
    let rows = reply.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    rows.collect()
}

/// How many advisory locks the backend holds, or awaits.
async fn advisory(observer: &Client, pid: i32, granted: bool) -> i64 {
    let row = observer
        .query_one(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = $1 AND granted = $2",
            &[&pid, &granted],
        )
        .await;
    row.unwrap().get(0)
}

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

/// COMMIT of a failed transaction rolls back and reports success; a statement before it in the same message tells.
#[tokio::test]
async fn commit_of_an_aborted_transaction() {
    let client = database().await.connect().await;
    client
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    assert_eq!(code(client.batch_execute("SELECT 1/0").await), "22012");
    assert_eq!(code(client.batch_execute("COMMIT").await), "00000");
    assert_eq!(texts(&client, "SELECT count(*) FROM t").await, ["0"]);

    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    assert_eq!(code(client.batch_execute("SELECT 1/0").await), "22012");
    assert_eq!(code(client.batch_execute("SELECT; COMMIT").await), "25P02");
    // The COMMIT was not run: the transaction is open still, and refuses everything.
    assert_eq!(code(client.batch_execute("SELECT 1").await), "25P02");
    assert_eq!(code(client.batch_execute("BEGIN").await), "25P02");
    client.batch_execute("ROLLBACK").await.unwrap();

    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    assert_eq!(code(client.batch_execute("SELECT; COMMIT").await), "00000");
    assert_eq!(texts(&client, "SELECT count(*) FROM t").await, ["1"]);
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
    until_waiting(&observer, pid).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
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

/// `set_config` in a target list holds for what stands right of it.
#[tokio::test]
async fn a_target_list_is_evaluated_from_left_to_right_for_each_row() {
    let client = database().await.connect().await;
    let rows = texts(
        &client,
        "SELECT concat(current_setting('app.n', true), set_config('app.n', n::text, false), current_setting('app.n')) \
         FROM unnest('{7,3,9}'::int8[]) AS t (n)",
    )
    .await;
    assert_eq!(rows, ["77", "733", "399"]);
}

/// A failed `AND` keeps the lock functions behind it from being called, and so does an earlier branch of a CASE.
#[tokio::test]
async fn lock_functions_behind_a_false_are_not_called() {
    let database = database().await;
    let (holder, client) = (database.connect().await, database.connect().await);
    holder
        .batch_execute("SELECT pg_advisory_lock(2)")
        .await
        .unwrap();
    let taken = texts(
        &client,
        "BEGIN; SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' WHEN pg_try_advisory_xact_lock(1) \
         AND pg_try_advisory_xact_lock(2) AND pg_try_advisory_xact_lock(3) THEN 'granted' ELSE 'busy' END; \
         SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid(); ROLLBACK",
    )
    .await;
    assert_eq!(taken, ["busy", "1"]);
    let none = texts(
        &client,
        "SELECT CASE WHEN NOT pg_is_in_recovery() THEN 'primary' WHEN pg_try_advisory_lock(1) THEN 'granted' END; \
         SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    )
    .await;
    assert_eq!(none, ["primary", "0"]);
}

#[tokio::test]
async fn unnest_returns_the_order_of_the_array() {
    let client = database().await.connect().await;
    let sql = "SELECT k FROM unnest(array(SELECT (n * 7919) % 10007 FROM generate_series(1, 5000) AS g (n))) AS t (k)";
    let rows = texts(&client, sql).await;
    let expected: Vec<String> = (1..=5000)
        .map(|n: u32| ((n * 7919) % 10007).to_string())
        .collect();
    assert_eq!(rows, expected);

    // Two arrays side by side, as for keys of two int4.
    let pairs = texts(
        &client,
        "SELECT concat(a, ':', b) FROM ROWS FROM (unnest('{3,1,2}'::int4[]), unnest('{30,10,20}'::int4[])) AS k (a, b)",
    )
    .await;
    assert_eq!(pairs, ["3:30", "1:10", "2:20"]);
}

#[tokio::test]
async fn session_locks_are_reentrant_and_show_as_one_row() {
    let database = database().await;
    let (client, observer) = (database.connect().await, database.connect().await);
    let pid = pid_of(&client).await;
    let thrice =
        "SELECT pg_advisory_lock(1); SELECT pg_advisory_lock(1); SELECT pg_try_advisory_lock(1)";
    client.batch_execute(thrice).await.unwrap();
    assert_eq!(advisory(&observer, pid, true).await, 1);

    let unlock = "SELECT pg_advisory_unlock(1)";
    let shared = "SELECT pg_advisory_unlock_shared(1)";
    assert_eq!(texts(&client, shared).await, ["f"], "the other mode's");
    assert_eq!(texts(&client, unlock).await, ["t"]);
    assert_eq!(texts(&client, unlock).await, ["t"]);
    assert_eq!(advisory(&observer, pid, true).await, 1);
    assert_eq!(texts(&client, unlock).await, ["t"]);
    assert_eq!(advisory(&observer, pid, true).await, 0);
    assert_eq!(texts(&client, unlock).await, ["f"]);
}

/// A transaction lock and a session lock of one backend on one key are one row; it stays until both have ended.
#[tokio::test]
async fn a_session_lock_outlives_the_transaction_lock_it_was_taken_under() {
    let database = database().await;
    let (client, other) = (database.connect().await, database.connect().await);
    client
        .batch_execute("BEGIN; SELECT pg_advisory_xact_lock(1); SELECT pg_advisory_lock(1); COMMIT")
        .await
        .unwrap();
    let try_it = "SELECT pg_try_advisory_xact_lock(1)";
    assert_eq!(texts(&other, try_it).await, ["f"]);
    // And the other way round: the transaction keeps what the session gives up.
    let moved = "BEGIN; SELECT pg_advisory_xact_lock(1); SELECT pg_advisory_unlock(1)";
    assert_eq!(texts(&client, moved).await, ["", "t"]);
    assert_eq!(texts(&other, try_it).await, ["f"]);
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(texts(&other, try_it).await, ["t"]);
}

#[tokio::test]
async fn unlock_in_an_aborted_transaction_is_25p02_and_rollback_keeps_session_locks() {
    let database = database().await;
    let (client, observer) = (database.connect().await, database.connect().await);
    let pid = pid_of(&client).await;
    client
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let fail = "BEGIN; SELECT 1/0";
    assert_eq!(code(client.batch_execute(fail).await), "22012");
    let unlock = client.batch_execute("SELECT pg_advisory_unlock(1)").await;
    assert_eq!(code(unlock), "25P02");
    client.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(advisory(&observer, pid, true).await, 1);

    assert_eq!(code(client.batch_execute(fail).await), "22012");
    let both = texts(&client, "ROLLBACK; SELECT pg_advisory_unlock(1)").await;
    assert_eq!(both, ["t"]);
    assert_eq!(advisory(&observer, pid, true).await, 0);
}

#[tokio::test]
async fn the_two_key_spaces_are_disjoint_and_pg_locks_shows_unsigned_halves() {
    let database = database().await;
    let (client, other) = (database.connect().await, database.connect().await);
    for (arguments, row) in [
        ("0", "0 0 1"),
        ("0, 0", "0 0 2"),
        ("1, 2", "1 2 2"),
        ("4294967298", "1 2 1"),
        ("-1", "4294967295 4294967295 1"),
        ("-1, -2147483648", "4294967295 2147483648 2"),
        ("9223372036854775807", "2147483647 4294967295 1"),
        ("'-9223372036854775808'", "2147483648 0 1"),
    ] {
        let rows = texts(
            &client,
            &format!(
                "BEGIN; SELECT pg_advisory_xact_lock({arguments}); \
                 SELECT concat_ws(' ', classid, objid, objsubid) FROM pg_locks \
                 WHERE locktype = 'advisory' AND pid = pg_backend_pid(); ROLLBACK"
            ),
        )
        .await;
        assert_eq!(rows, ["", row], "{arguments}");
    }
    client
        .batch_execute("SELECT pg_advisory_lock(0, 0), pg_advisory_lock(4294967298)")
        .await
        .unwrap();
    for (arguments, free) in [
        ("0", "t"),
        ("0, 0", "f"),
        ("1, 2", "t"),
        ("4294967298", "f"),
    ] {
        let sql = format!("SELECT pg_try_advisory_xact_lock({arguments})");
        assert_eq!(texts(&other, &sql).await, [free], "{arguments}");
    }
}

#[tokio::test]
async fn locks_are_of_one_database() {
    let (here, there) = (database().await, database().await);
    let (holder, other) = (here.connect().await, there.connect().await);
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let free = texts(&other, "SELECT pg_try_advisory_xact_lock(1)").await;
    assert_eq!(free, ["t"]);
}

/// A queued writer is in the way of new readers, though nobody holds the lock exclusively yet.
#[tokio::test]
async fn try_fails_while_a_conflicting_waiter_is_queued() {
    let database = database().await;
    let (reader, writer, late, observer) = (
        database.connect().await,
        database.connect().await,
        database.connect().await,
        database.connect().await,
    );
    reader
        .batch_execute("SELECT pg_advisory_lock_shared(1)")
        .await
        .unwrap();
    let try_it = "SELECT pg_try_advisory_xact_lock_shared(1)";
    assert_eq!(texts(&late, try_it).await, ["t"]);
    let pid = pid_of(&writer).await;
    let wait =
        tokio::spawn(async move { writer.batch_execute("SELECT pg_advisory_lock(1)").await });
    until_waiting(&observer, pid).await;
    assert_eq!(texts(&late, try_it).await, ["f"]);
    // The reader itself is let through: it holds a lock that already stands before the writer.
    assert_eq!(texts(&reader, try_it).await, ["t"]);
    cancel(&observer, pid).await;
    assert_eq!(code(wait.await.unwrap()), "57014");
    assert_eq!(texts(&late, try_it).await, ["t"]);
}

/// BEGIN inside a transaction only warns, and works in the transaction that was open; its start tells.
#[tokio::test]
async fn begin_inside_an_open_transaction_is_revealed_by_now() {
    let client = database().await.connect().await;
    let fresh = "SELECT now() = statement_timestamp()";
    let begun = texts(
        &client,
        &format!("BEGIN; SET LOCAL lock_timeout = 1; {fresh}"),
    )
    .await;
    assert_eq!(begun, ["t"]);
    let again = texts(
        &client,
        &format!("BEGIN; SET LOCAL lock_timeout = 1; {fresh}"),
    )
    .await;
    assert_eq!(again, ["f"]);
    client.batch_execute("ROLLBACK").await.unwrap();

    // With an isolation level of its own it is an error once the open transaction has run a query.
    client
        .batch_execute("BEGIN; CREATE TABLE t (n int)")
        .await
        .unwrap();
    let other = client
        .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT 1")
        .await;
    assert_eq!(code(other), "25001");
    client.batch_execute("ROLLBACK").await.unwrap();
}

/// The snapshot of REPEATABLE READ is older than the lock it waited for; READ COMMITTED sees what the holder left.
#[tokio::test]
async fn a_repeatable_read_snapshot_predates_the_lock_wait() {
    let database = database().await;
    let (holder, observer) = (database.connect().await, database.connect().await);
    holder
        .batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (0)")
        .await
        .unwrap();
    for (level, expected) in [("REPEATABLE READ", "stale"), ("READ COMMITTED", "new")] {
        holder
            .batch_execute(
                "BEGIN; SELECT pg_advisory_xact_lock(1); UPDATE t SET n = n + 1 RETURNING n",
            )
            .await
            .unwrap();
        let waiter = database.connect().await;
        let waiter_pid = pid_of(&waiter).await;
        let read = tokio::spawn(async move {
            let sql = format!(
                "BEGIN ISOLATION LEVEL {level}; SELECT pg_advisory_xact_lock(1); SELECT n FROM t; COMMIT"
            );
            texts(&waiter, &sql).await
        });
        until_waiting(&observer, waiter_pid).await;
        let committed = texts(&holder, "SELECT n FROM t; COMMIT").await[0].clone();
        let read = read.await.unwrap()[1].clone();
        let found = if read == committed { "new" } else { "stale" };
        assert_eq!(found, expected, "{level}: {read} of {committed}");
    }
}

/// One poll puts a simple query on its way, in order with what follows; a `query` has only asked for preparation then.
#[tokio::test]
async fn the_driver_sends_a_simple_query_at_the_first_poll() {
    let database = database().await;
    let (client, observer) = (database.connect().await, database.connect().await);
    let pid = pid_of(&client).await;
    assert!(
        client
            .batch_execute("SELECT pg_advisory_lock(1)")
            .now_or_never()
            .is_none()
    );
    eventually("batch_execute was not sent", async || {
        advisory(&observer, pid, true).await == 1
    })
    .await;
    assert!(
        client
            .simple_query("SELECT pg_advisory_lock(2)")
            .now_or_never()
            .is_none()
    );
    eventually("simple_query was not sent", async || {
        advisory(&observer, pid, true).await == 2
    })
    .await;
    // Two at once, in order: the second fails if it comes first.
    assert!(
        client
            .batch_execute("CREATE TABLE t (n int)")
            .now_or_never()
            .is_none()
    );
    client
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();

    assert!(
        client
            .execute("SELECT pg_advisory_lock(3)", &[])
            .now_or_never()
            .is_none()
    );
    // What is answered after it shows that it was never run.
    client.batch_execute("SELECT 1").await.unwrap();
    assert_eq!(advisory(&observer, pid, true).await, 2);
}

/// A statement whose client has gone away goes on waiting, and a cancel request ends it.
#[tokio::test]
async fn a_waiter_without_a_client_stays_queued_until_it_is_cancelled() {
    let database = database().await;
    let (holder, waiter, observer) = (
        database.connect().await,
        database.connect().await,
        database.connect().await,
    );
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let pid = pid_of(&waiter).await;
    let token = waiter.cancel_token();
    let wait =
        tokio::spawn(async move { waiter.batch_execute("SELECT pg_advisory_lock(1)").await });
    until_waiting(&observer, pid).await;
    wait.abort();
    assert!(wait.await.is_err());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(advisory(&observer, pid, false).await, 1);
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    eventually("the cancelled waiter is queued still", async || {
        advisory(&observer, pid, false).await == 0
    })
    .await;
}

/// The head of an `application_name` is kept. Until PostgreSQL 15 what is not printable ASCII becomes `?`, then an
/// escape of its bytes.
#[tokio::test]
async fn application_name_is_cut_at_63_bytes_and_keeps_its_head() {
    let database = database().await;
    let client = database.connect().await;
    let name: String = ('a'..='z').chain('0'..='9').cycle().take(100).collect();
    let shown = texts(
        &client,
        &format!("BEGIN; SET LOCAL application_name = '{name}'; SHOW application_name; ROLLBACK; SHOW application_name"),
    )
    .await;
    assert_eq!(shown, [&name[..63], ""]);
    let longest = &name[..63];
    let set = format!("SELECT set_config('application_name', '{longest}', false)");
    assert_eq!(texts(&client, &set).await, [longest]);

    let zoe = texts(
        &client,
        "SELECT set_config('application_name', 'zoë', false)",
    )
    .await;
    let expected = if database.server().major() < 16 {
        "zo??"
    } else {
        r"zo\xc3\xab"
    };
    assert_eq!(zoe, [expected]);
}

/// The locks of a transaction end with its first error, not with the ROLLBACK after it; only a savepoint keeps those
/// from before it.
#[tokio::test]
async fn a_failed_transaction_has_lost_its_locks_before_it_is_rolled_back() {
    let database = database().await;
    let (client, other) = (database.connect().await, database.connect().await);
    let try_it = "SELECT pg_try_advisory_xact_lock(1)";
    client
        .batch_execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
        .await
        .unwrap();
    assert_eq!(texts(&other, try_it).await, ["f"]);
    assert_eq!(code(client.batch_execute("SELECT 1/0").await), "22012");
    assert_eq!(code(client.batch_execute("SELECT 1").await), "25P02");
    assert_eq!(texts(&other, try_it).await, ["t"]);
    client.batch_execute("ROLLBACK").await.unwrap();

    client
        .batch_execute(
            "BEGIN; SELECT pg_advisory_xact_lock(1); SAVEPOINT s; SELECT pg_advisory_xact_lock(2)",
        )
        .await
        .unwrap();
    assert_eq!(code(client.batch_execute("SELECT 1/0").await), "22012");
    assert_eq!(code(client.batch_execute("SELECT 1").await), "25P02");
    assert_eq!(texts(&other, try_it).await, ["f"]);
    let second = "SELECT pg_try_advisory_xact_lock(2)";
    assert_eq!(texts(&other, second).await, ["t"]);
    client.batch_execute("ROLLBACK").await.unwrap();
}

/// Two sessions in a circle: what the victim's transaction held is gone without a ROLLBACK; its session locks are not.
#[tokio::test]
async fn a_victim_of_a_deadlock_has_lost_its_transaction_locks_and_kept_its_session_locks() {
    let database = database().await;
    let observer = database.connect().await;
    let mut tasks = Vec::new();
    let mut pids = Vec::new();
    for (first, second) in [(1, 2), (2, 1)] {
        let client = database.connect().await;
        pids.push(pid_of(&client).await);
        client
            .batch_execute(&format!(
                "SET deadlock_timeout = '100ms'; SELECT pg_advisory_lock(10 + {first}); \
                 BEGIN; SELECT pg_advisory_xact_lock({first})"
            ))
            .await
            .unwrap();
        tasks.push((client, second));
    }
    let mut answers = Vec::new();
    for (client, second) in tasks {
        answers.push(async move {
            let answer = client
                .batch_execute(&format!("SELECT pg_advisory_xact_lock({second})"))
                .await;
            (client, code(answer))
        });
    }
    let answers = futures::future::join_all(answers).await;
    let mut codes: Vec<&str> = answers.iter().map(|(_, code)| code.as_str()).collect();
    codes.sort_unstable();
    assert_eq!(codes, ["00000", "40P01"]);
    for (client, code_before) in &answers {
        if code_before == "40P01" {
            assert_eq!(code(client.batch_execute("SELECT 1").await), "25P02");
        }
    }

    // Both ten-keys, and the survivor's two; the victim's transaction has none, though it was not rolled back.
    let row = observer
        .query_one(
            "SELECT array_agg(objid::int8 ORDER BY objid) FROM pg_locks \
             WHERE locktype = 'advisory' AND granted AND pid = ANY($1)",
            &[&pids],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, Vec<i64>>(0), [1, 2, 11, 12]);
    let victims = observer
        .query(
            "SELECT pid, count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = ANY($1) GROUP BY pid ORDER BY 2",
            &[&pids],
        )
        .await
        .unwrap();
    assert_eq!(victims[0].get::<_, i64>(1), 1);
    let others: i64 = observer
        .query_one(
            "SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype <> 'advisory'",
            &[&victims[0].get::<_, i32>(0)],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(others, 0, "the victim holds locks still");
}

/// Its row of `pg_locks` has no pid. The `virtualtransaction` there is the one of the backend that prepared it, and
/// `-1/xid` after a restart, so only its `transactionid` lock leads to its name, at any time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_keeps_its_advisory_lock_without_a_pid() {
    const OWNER: &str = "SELECT l.pid, l.granted, p.gid, l.virtualtransaction = concat('-1/', p.transaction) \
         FROM pg_locks l \
         LEFT JOIN pg_locks t ON t.locktype = 'transactionid' AND t.pid IS NULL \
         AND t.virtualtransaction = l.virtualtransaction \
         LEFT JOIN pg_prepared_xacts p ON p.transaction = t.transactionid \
         WHERE l.locktype = 'advisory' AND l.objid = 1";
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let client = database.connect().await;
    for gid in ["other", "mine"] {
        let key = i32::from(gid == "mine");
        client
            .batch_execute(&format!(
                "BEGIN; SELECT pg_advisory_xact_lock({key}); PREPARE TRANSACTION '{gid}'"
            ))
            .await
            .unwrap();
    }
    for restarted in [false, true] {
        if restarted {
            tokio::task::block_in_place(|| server.restart());
        }
        let (client, other) = (database.connect().await, database.connect().await);
        let rows = other.query(OWNER, &[]).await.unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].get::<_, Option<i32>>(0), None);
        assert!(rows[0].get::<_, bool>(1));
        assert_eq!(rows[0].get::<_, &str>(2), "mine");
        assert_eq!(rows[0].get::<_, bool>(3), restarted);
        let free = texts(&client, "SELECT pg_try_advisory_xact_lock(1)").await;
        assert_eq!(free, ["f"]);
        // The waiter's blocker is 0, which is no backend.
        let pid = pid_of(&client).await;
        let wait = tokio::spawn(async move {
            client
                .batch_execute("SELECT pg_advisory_xact_lock(1)")
                .await
        });
        until_waiting(&other, pid).await;
        let blockers = texts(&other, &format!("SELECT pg_blocking_pids({pid})")).await;
        assert_eq!(blockers, ["{0}"]);
        if restarted {
            other
                .batch_execute("ROLLBACK PREPARED 'mine'")
                .await
                .unwrap();
            assert_eq!(code(wait.await.unwrap()), "00000");
        } else {
            cancel(&other, pid).await;
            assert_eq!(code(wait.await.unwrap()), "57014");
        }
    }
}

/// The text of a time setting is an interval, whatever its unit: seconds can be had from it.
#[tokio::test]
async fn a_time_setting_as_shown_is_an_interval() {
    let client = database().await.connect().await;
    for (set, seconds) in [
        ("0", "0"),
        ("1500", "1.5"),
        ("60000", "60"),
        ("7200000", "7200"),
        ("86400000", "86400"),
    ] {
        let shown = texts(
            &client,
            &format!(
                "BEGIN; SET LOCAL statement_timeout = {set}; \
                 SELECT date_part('epoch', current_setting('statement_timeout')::interval); ROLLBACK"
            ),
        )
        .await;
        assert_eq!(shown, [seconds], "{set}");
    }
}

/// The outcome of a transaction whose COMMIT was not answered can be asked for on another connection.
#[tokio::test]
async fn pg_xact_status_tells_what_became_of_a_transaction() {
    let database = database().await;
    let (client, other) = (database.connect().await, database.connect().await);
    client
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();
    for (end, status) in [("COMMIT", "committed"), ("ROLLBACK", "aborted")] {
        let unassigned = texts(&client, "BEGIN; SELECT pg_current_xact_id_if_assigned()").await;
        assert_eq!(unassigned, ["NULL"]);
        let xid = texts(
            &client,
            "INSERT INTO t VALUES (1); SELECT pg_current_xact_id_if_assigned()",
        )
        .await[0]
            .clone();
        let ask = format!("SELECT pg_xact_status('{xid}')");
        assert_eq!(texts(&other, &ask).await, ["in progress"]);
        client.batch_execute(end).await.unwrap();
        assert_eq!(texts(&other, &ask).await, [status]);
    }
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
    // Somebody waits for the row already, and holds the right to be the next.
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

/// What tells one run of a server from another, besides its start: where recovery after a crash has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_shows_in_the_position_replayed_last() {
    let server = Server::start(&[]).unwrap();
    let database = server.database().await;
    let ask = async || {
        let (client, connection) = database.config().connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        let row = client
            .query_one(
                "SELECT EXTRACT(epoch FROM pg_postmaster_start_time())::text, \
                 (pg_last_wal_replay_lsn() - '0/0'::pg_lsn)::text, \
                 (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::text",
                &[],
            )
            .await?;
        let number = |text: String| text.parse::<u64>().unwrap();
        let replayed = row.get::<_, Option<String>>(1).map(number);
        let started: String = row.get(0);
        Ok::<_, Error>((client, started, replayed, number(row.get(2))))
    };
    let run = async || {
        let started = Instant::now();
        loop {
            match ask().await {
                Ok(answer) => return answer,
                // A server that has lost a backend is away for a moment.
                Err(error) => assert!(started.elapsed() < GIVE_UP_AFTER, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let (client, first, replayed, _) = run().await;
    assert_eq!(
        replayed, None,
        "the first start of a cluster is a clean one"
    );
    client
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .unwrap();

    // The postmaster is killed.
    tokio::task::block_in_place(|| {
        server.kill();
        server.restart();
    });
    let (client, second, replayed, written) = run().await;
    let replayed = replayed.expect("nothing was replayed");
    assert_ne!(first, second);
    assert!(replayed < written);

    // One of its backends is.
    let pid = pid_of(&client).await;
    let kill = format!("COPY (SELECT 1) TO PROGRAM 'kill -9 {pid}'");
    drop(client.batch_execute(&kill).await);
    eventually("the backend lives on", async || client.is_closed()).await;
    let started = Instant::now();
    let (client, third, again, _) = loop {
        let (client, third, again, written) = run().await;
        // The postmaster may not have noticed yet.
        if again != Some(replayed) || started.elapsed() > GIVE_UP_AFTER {
            break (client, third, again, written);
        }
    };
    assert_eq!(second, third);
    assert!(again.expect("nothing was replayed") > replayed);
    drop(client);

    // It is shut down in order.
    tokio::task::block_in_place(|| server.restart());
    let (_client, fourth, replayed, _) = run().await;
    assert_ne!(third, fourth);
    assert_eq!(replayed, None);
}
