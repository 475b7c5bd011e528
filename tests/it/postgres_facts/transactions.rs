//! Transactions: how they fail, and what is left of their locks.

use std::time::{Duration, Instant};

use lockkeeper_testkit::{GIVE_UP_AFTER, Server, eventually, pid_of, until_waiting};
use tokio_postgres::Error;

use super::{code, database, texts};

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

/// Two sessions in a cycle: what the victim's transaction held is gone without a ROLLBACK; its session locks are not.
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
