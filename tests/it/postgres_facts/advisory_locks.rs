//! Advisory locks and their functions.

use lockkeeper_testkit::{Server, cancel, pid_of, until_waiting};

use super::{advisory, code, database, texts};

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

/// An unlock says whether its session held the lock. Under a transaction lock on the same key nobody gets it between the
/// unlock and the lock after it, a waiter of its queue neither.
#[tokio::test]
async fn a_session_lock_is_looked_for_by_its_unlock() {
    const LOOK: &str =
        "SELECT pg_try_advisory_xact_lock(1), pg_advisory_unlock(1), pg_try_advisory_lock(1)";
    let database = database().await;
    let (holder, waiter) = (database.connect().await, database.connect().await);
    let observer = database.connect().await;
    let waiting_pid = pid_of(&waiter).await;
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let (waiting, ()) = tokio::join!(waiter.batch_execute("SELECT pg_advisory_lock(1)"), async {
        until_waiting(&observer, waiting_pid).await;
        for _ in 0..2 {
            assert_eq!(texts(&holder, "BEGIN").await, [""; 0]);
            let row = holder.query_one(LOOK, &[]).await.unwrap();
            assert_eq!([0, 1, 2].map(|n| row.get::<_, bool>(n)), [true; 3]);
            assert_eq!(texts(&holder, "ROLLBACK").await, [""; 0]);
        }
        // Held once, as before.
        let unlock = "SELECT concat(pg_advisory_unlock(1), pg_advisory_unlock(1))";
        assert_eq!(texts(&holder, unlock).await, ["tf"]);
    });
    waiting.unwrap();
    assert_eq!(
        texts(&holder, "SELECT pg_try_advisory_xact_lock(1)::text").await,
        ["false"]
    );
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

/// A queued writer blocks new readers, though no session holds the lock exclusively yet.
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
