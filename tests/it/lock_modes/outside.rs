//! Statements that begin and end transactions themselves: each of their commits is held up, so that the locks can be
//! read which it is about to give back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lockkeeper::{LockMode, StatementLock};
use lockkeeper_testkit::{
    Database, GIVE_UP_AFTER, Server, Session, cancel, eventually, until_gone,
};

use super::cases::Case;
use super::compare;
use super::observe::{Seen, Watcher, scene};

/// A server on which a session with `synchronous_commit = on` waits in each commit for a standby that does not exist.
/// It has written its commit by then and holds its locks still; a cancel ends the wait, and the statement continues
/// (`SyncRepWaitForLSN` in `src/backend/replication/syncrep.c`).
fn server_that_holds_up_commits() -> Server {
    Server::start(&[
        ("synchronous_standby_names", "nobody"),
        ("synchronous_commit", "local"),
    ])
    .unwrap()
}

/// Executes a statement commit by commit and collects the locks it held at each.
async fn step_through(database: &Database, watcher: &Watcher, sql: &str) -> (Seen, usize) {
    let session = Session::connect(&database.config()).await;
    session.run("SET synchronous_commit = on").await;
    let (pid, task) = (session.pid, session.start(sql));
    // It ends with its statement.
    drop(session);
    let (mut seen, mut commits) = (Seen::default(), 0);
    // The transaction that is committed is still shown, and tells one commit from the next.
    let mut last = String::new();
    let started = Instant::now();
    while !task.is_finished() {
        assert!(started.elapsed() < GIVE_UP_AFTER * 3, "{sql} does not end");
        let row = watcher
            .observer
            .query_opt(
                "SELECT backend_xid::text FROM pg_stat_activity \
                 WHERE pid = $1 AND wait_event = 'SyncRep' AND backend_xid IS NOT NULL",
                &[&pid],
            )
            .await
            .unwrap();
        match row.map(|row| row.get::<_, String>(0)) {
            Some(xid) if xid != last => {
                watcher.see_locks(pid, &mut seen).await;
                cancel(&watcher.observer, pid).await;
                commits += 1;
                last = xid;
            }
            _ => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
    if let Err(error) = task.await.unwrap() {
        panic!("{sql}: {:?}", error.as_db_error());
    }
    // What it has read it may report when it ends only.
    until_gone(&watcher.observer, pid).await;
    (seen, commits)
}

/// The mode that a statement asks for when another lock of that relation blocks it.
async fn asks_for(
    database: &Database,
    watcher: &Watcher,
    sql: &str,
    relation: &str,
    held: LockMode,
) -> LockMode {
    let holder = database.connect().await;
    let lock = format!("BEGIN; LOCK TABLE {relation} IN {} MODE", held.as_sql());
    holder.batch_execute(&lock).await.unwrap();
    let session = Session::connect(&database.config()).await;
    let (pid, task) = (session.pid, session.start(sql));
    let mut mode = None;
    eventually("the statement waits for the relation", async || {
        let row = watcher
            .observer
            .query_opt(
                "SELECT l.mode FROM pg_locks l JOIN watch.relation r ON r.oid = l.relation \
                 WHERE l.pid = $1 AND l.locktype = 'relation' AND NOT l.granted AND r.name = $2",
                &[&pid, &relation],
            )
            .await
            .unwrap();
        mode = row.map(|row| LockMode::from_pg_locks(row.get(0)).unwrap());
        assert!(
            !task.is_finished(),
            "{sql} did not wait for {held} on {relation}"
        );
        mode.is_some()
    })
    .await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    task.await.unwrap().unwrap();
    mode.unwrap()
}

/// Every statement that may not stand in a transaction block.
#[tokio::test]
async fn statements_outside_transactions_take_what_the_table_says() {
    let server = server_that_holds_up_commits();
    let major = server.major();
    let database = server.database().await;
    scene(&database).await;
    let client = database.connect().await;
    let sql = "CREATE TABLE watch.marker AS SELECT 1";
    client.batch_execute(sql).await.unwrap();
    let mut wrong = Vec::new();
    let cases = Case::all();
    for case in cases.iter().filter(|case| !case.in_block) {
        if case.locks(major).next().is_none() {
            client.batch_execute(&case.sql).await.unwrap_err();
            continue;
        }
        client.batch_execute("BEGIN").await.unwrap();
        let refused = client.batch_execute(&case.sql).await.unwrap_err();
        let refused = refused.code().map(|code| code.code());
        assert_eq!(refused, Some("25001"), "{}", case.sql);
        client.batch_execute("ROLLBACK").await.unwrap();

        let watcher = Watcher::anew(&database).await;
        let before = reported(&database, &watcher).await;
        let (mut seen, commits) = step_through(&database, &watcher, &case.sql).await;
        watcher.see_files(&client, &mut seen).await;
        let after = reported(&database, &watcher).await;
        watcher.see_work(&before, &after, &mut seen);
        client.batch_execute(&case.undo).await.unwrap();

        // A commit without a transaction id is not held up: there the statement is made to wait for the lock itself.
        for (on, relation) in &case.roles {
            let says = case.lock(*on, major).map(StatementLock::mode);
            if watcher.kind(relation) == "i" || seen.mode(relation) >= says {
                continue;
            }
            let mode = says
                .map(LockMode::conflicting)
                .and_then(|mut all| all.next());
            let mode = asks_for(&database, &watcher, &case.sql, relation, mode.unwrap()).await;
            seen.see(relation, mode);
            client.batch_execute(&case.undo).await.unwrap();
        }
        let vacuum = case.statement.starts_with("VACUUM");
        assert!(commits > 0 || vacuum, "{} was not held up", case.sql);
        compare(case, major, &seen, &watcher, &mut wrong);
    }
    assert!(wrong.is_empty(), "on {major}:\n{}", wrong.join("\n"));
}

/// The counters of pages, with all that has been done by now in them: a backend reports them at the latest when it ends.
async fn reported(database: &Database, watcher: &Watcher) -> HashMap<String, i64> {
    let sql = "SELECT pg_stat_get_blocks_fetched('watch.marker'::regclass)";
    let row = watcher.observer.query_one(sql, &[]).await.unwrap();
    let marked: i64 = row.get(0);
    let client = database.connect().await;
    client
        .batch_execute("SELECT FROM watch.marker")
        .await
        .unwrap();
    drop(client);
    eventually("the counters are reported", async || {
        let row = watcher.observer.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) > marked
    })
    .await;
    watcher.fetched().await
}

/// What completes beside a lock takes nothing that conflicts with it, not for a moment. (The others among these
/// statements wait for the end of the transaction that has the lock.)
#[tokio::test]
async fn vacuum_goes_on_beside_writers() {
    let database = Server::shared().database().await;
    let (writer, client) = (database.connect().await, database.connect().await);
    client.batch_execute("CREATE TABLE t ()").await.unwrap();
    let sql = "BEGIN; LOCK TABLE t IN ROW EXCLUSIVE MODE";
    writer.batch_execute(sql).await.unwrap();
    let sql = format!("SET lock_timeout = {}", GIVE_UP_AFTER.as_millis());
    client.batch_execute(&sql).await.unwrap();
    for sql in ["VACUUM t", "VACUUM (ANALYZE) t"] {
        client.batch_execute(sql).await.unwrap();
    }
}

/// Leaves `leaving_1` half-way out of `leaving`, for FINALIZE: a cancelled DETACH PARTITION CONCURRENTLY.
pub(super) async fn leave_half_way(database: &Database) {
    let (reader, observer) = (database.connect().await, database.connect().await);
    let sql = "BEGIN; LOCK TABLE leaving_1 IN ACCESS SHARE MODE";
    reader.batch_execute(sql).await.unwrap();
    let session = Session::connect(&database.config()).await;
    let task = session.start("ALTER TABLE leaving DETACH PARTITION leaving_1 CONCURRENTLY");
    let pid = session.pid;
    eventually("the second transaction waits for the reader", async || {
        let sql =
            "SELECT FROM pg_locks WHERE pid = $1 AND NOT granted AND mode = 'AccessExclusiveLock'";
        observer.query_opt(sql, &[&pid]).await.unwrap().is_some()
    })
    .await;
    cancel(&observer, pid).await;
    task.await.unwrap().unwrap_err();
    reader.batch_execute("ROLLBACK").await.unwrap();
}

/// VACUUM does not wait for the lock it cuts empty pages off under: that it needs ACCESS EXCLUSIVE shows in that the
/// weakest of locks keeps it from doing so.
#[tokio::test]
async fn vacuum_cuts_off_empty_pages_only_where_no_lock_is() {
    let database = Server::shared().database().await;
    let (reader, client) = (database.connect().await, database.connect().await);
    client
        .batch_execute(
            "CREATE TABLE t (id int, pad text DEFAULT repeat('x', 1900)) WITH (autovacuum_enabled = off); \
             INSERT INTO t SELECT generate_series(1, 240); DELETE FROM t WHERE id > 10",
        )
        .await
        .unwrap();
    let pages = async || {
        let sql = "SELECT pg_relation_size('t') / current_setting('block_size')::int";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0)
    };
    let full = pages().await;
    client
        .batch_execute("VACUUM (TRUNCATE off) t")
        .await
        .unwrap();
    assert_eq!(pages().await, full);
    let lock = "BEGIN; LOCK TABLE t IN ACCESS SHARE MODE";
    reader.batch_execute(lock).await.unwrap();
    // It tries for five seconds, and does not queue: others get their locks meanwhile.
    client.batch_execute("VACUUM t").await.unwrap();
    assert_eq!(pages().await, full);
    reader.batch_execute("ROLLBACK").await.unwrap();
    client.batch_execute("VACUUM t").await.unwrap();
    assert!(pages().await < full / 2);
}
