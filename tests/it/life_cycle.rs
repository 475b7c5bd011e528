//! What a connection goes through: a server that falls silent, a section that ends its own transaction, a handle that is
//! moved elsewhere.

use std::error::Error as _;
use std::time::Duration;

use lockkeeper::{Error, ErrorKind, Keeper, SessionGuard, TransactionOptions};
use lockkeeper_testkit::{Fault, Proxy, Scene, assert_error, assert_error_in, eventually, in_time};
use tokio::sync::Mutex;
use tokio_postgres::IsolationLevel;

const SILENCE: Duration = Duration::from_secs(2);

async fn guard(keeper: &Keeper, key: i64) -> SessionGuard {
    keeper.advisory_lock(key).session().acquire().await.unwrap()
}

/// A keeper behind a proxy, with a short silence.
/// A transaction of one statement.
async fn run_in(held: &mut SessionGuard, sql: &str) -> Result<(), Error> {
    let transaction = held.transaction(async |tx| {
        tx.batch_execute(sql).await?;
        Ok::<_, Error>(())
    });
    transaction.await
}

fn behind(proxy: &Proxy, scene: &Scene) -> Keeper {
    let pool = proxy.pool(&scene.database.config(), 2);
    Keeper::builder(pool)
        .watch(false)
        .longest_silence(SILENCE)
        .build()
}

/// A pooled connection that is silent when a transaction begins is replaced; one that is silent later is lost, and the
/// caller is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_falls_silent_is_given_up() {
    let scene = Scene::new(2).await;
    scene.run("CREATE TABLE note (id int)").await;
    let proxy = Proxy::before(scene.database.server());
    let keeper = behind(&proxy, &scene);
    let write = async || {
        keeper
            .transaction(async |tx| {
                tx.batch_execute("INSERT INTO note VALUES (1)").await?;
                Ok::<_, Error>(())
            })
            .await
    };
    in_time("a first transaction", write()).await.unwrap();

    proxy.fault_later(0, Fault::Stall);
    in_time("silent at BEGIN", write()).await.unwrap();
    assert_eq!(proxy.faults_left(), 0);

    proxy.fault("INSERT INTO note VALUES (1)", Fault::Stall);
    let error = in_time("silent at a statement", write()).await.unwrap_err();
    assert_error(&error, ErrorKind::ConnectionLost, "nothing is applied");
    assert_eq!(proxy.faults_left(), 0);

    proxy.fault("COMMIT", Fault::Stall);
    let error = in_time("silent at COMMIT", write()).await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::CommitUnknown,
        "no answer from the server",
    );
    assert_eq!(proxy.faults_left(), 0);

    in_time("afterwards", write()).await.unwrap();
    // The server learns of the connections that were given up.
    drop(proxy);
    scene.until_no_transaction().await;
    assert_eq!(scene.count("note").await, 3);
    scene.nothing_left().await;
}

/// A guard on a silent connection is lost, and so says its release.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_that_falls_silent_is_lost() {
    let scene = Scene::new(2).await;
    let proxy = Proxy::before(scene.database.server());
    let keeper = behind(&proxy, &scene);
    let mut held = guard(&keeper, 741).await;
    proxy.fault("SELECT 41", Fault::Stall);
    let transaction = run_in(&mut held, "SELECT 41");
    let error = in_time("silent at a statement", transaction)
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::ConnectionLost, "connection lost");
    assert!(held.is_lost());
    let released = in_time("release", held.release()).await;
    assert_error(&released.unwrap_err(), ErrorKind::LockLost, "741");
    let again = in_time("again", guard(&keeper, 742)).await;
    again.release().await.unwrap();
    // The server learns of the connection that was given up.
    drop(proxy);
    scene.nothing_left().await;
}

/// A guard's transaction that is dropped at its end, before COMMIT or in it, is over when the guard is used again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guards_transaction_that_is_dropped_at_its_end_is_over() {
    let scene = Scene::new(2).await;
    scene.run("CREATE TABLE note (id int)").await;
    let proxy = Proxy::before(scene.database.server());
    let keeper = behind(&proxy, &scene);
    for (message, written) in [("pg_control_system() AS c", 0), ("COMMIT", 1)] {
        let mut held = guard(&keeper, 750).await;
        let options = || TransactionOptions::new().resolve_commit();
        proxy.fault(message, Fault::Stall);
        let dropped = held.transaction_with(options(), async |tx| {
            tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
            Ok::<_, Error>(())
        });
        let met = async || proxy.faults_left() == 0;
        tokio::select! {
            ended = dropped => panic!("{message}: {ended:?}"),
            () = eventually("the message is on its way", met) => {}
        }
        proxy.resume();
        // The caller's own transactions are none of the guard's.
        held.batch_execute("BEGIN; SELECT 1; COMMIT").await.unwrap();
        let again = run_in(&mut held, "SELECT 1");
        again.await.unwrap();
        assert_eq!(scene.count("note").await, written, "{message}");
        held.release().await.unwrap();
    }
    scene.nothing_left().await;
}

/// A statement that its backend is executing is not given up, however long it takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_statement_is_not_silence() {
    let scene = Scene::new(2).await;
    // Where it is the pool's only connection, too.
    for size in [1, 2] {
        let pool = scene.database.pool(size);
        let keeper = Keeper::builder(pool.clone())
            .longest_silence(Duration::from_secs(1))
            .build();
        keeper
            .transaction(async |tx| {
                tx.batch_execute("SELECT pg_sleep(4)").await?;
                tx.query("SELECT pg_sleep(3)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        assert_eq!(pool.status().max_size, size);
        assert!(pool.status().size <= size);
    }
    scene.nothing_left().await;
}

/// A section that ends its own transaction through the bare client is told so at its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_section_that_ends_its_transaction_is_told() {
    let scene = Scene::new(2).await;
    for sql in [
        "COMMIT",
        "ROLLBACK",
        "COMMIT AND CHAIN",
        "COMMIT; BEGIN",
        "ROLLBACK; BEGIN",
        "ROLLBACK AND CHAIN",
    ] {
        let section = scene.keeper.with_advisory_lock(743, async |tx| {
            tx.client().batch_execute(sql).await?;
            Ok::<_, Error>(())
        });
        let error = section.await.unwrap_err();
        assert_error_in(
            sql,
            &error,
            ErrorKind::TransactionEnded,
            "the section has ended its own transaction",
        );
        scene.nothing_left().await;
    }
}

/// The same of a transaction on a guard's connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guards_transaction_that_ends_itself_is_told() {
    let scene = Scene::new(2).await;
    for sql in ["COMMIT", "COMMIT AND CHAIN", "ROLLBACK; BEGIN"] {
        let mut held = guard(&scene.keeper, 751).await;
        let transaction = held.transaction(async |tx| {
            tx.client().batch_execute(sql).await?;
            Ok::<_, Error>(())
        });
        let error = transaction.await.unwrap_err();
        assert_error_in(
            sql,
            &error,
            ErrorKind::TransactionEnded,
            "the section has ended its own transaction",
        );
        held.release().await.unwrap();
        scene.nothing_left().await;
    }
}

/// The same where the locks were taken before the transaction's snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_with_a_snapshot_that_ends_its_transaction_is_told() {
    let scene = Scene::new(2).await;
    for sql in ["COMMIT AND CHAIN", "ROLLBACK; BEGIN"] {
        let lock = scene.keeper.advisory_lock(752);
        let lock = lock.isolation(IsolationLevel::RepeatableRead);
        let held = lock.acquire().await.unwrap();
        held.client().batch_execute(sql).await.unwrap();
        let error = held.commit().await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::TransactionEnded, "ended");
        scene.nothing_left().await;
    }
}

/// The same of a statement that was prepared before the transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_end_of_a_guards_transaction_is_told() {
    let scene = Scene::new(2).await;
    let mut held = guard(&scene.keeper, 753).await;
    let commit = held.prepare("COMMIT").await.unwrap();
    let transaction = held.transaction(async |tx| {
        tx.execute(&commit, &[]).await?;
        Ok::<_, Error>(())
    });
    let error = transaction.await.unwrap_err();
    assert_error(&error, ErrorKind::TransactionEnded, "ended");
    held.release().await.unwrap();
    scene.nothing_left().await;
}

/// The same where its text shows it: it is not sent, and nothing of the section is committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_would_end_the_transaction_is_refused() {
    let scene = Scene::new(2).await;
    scene.run("CREATE TABLE note (id int)").await;
    for (sql, named) in [
        ("COMMIT", "COMMIT is refused"),
        ("SELECT 1; COMMIT AND CHAIN", "COMMIT is refused"),
        ("COMMIT; BEGIN", "COMMIT is refused"),
        ("ROLLBACK; BEGIN", "ROLLBACK is refused"),
        ("end", "END is refused"),
        ("PREPARE TRANSACTION 'x'", "PREPARE TRANSACTION is refused"),
    ] {
        let section = scene.keeper.with_advisory_lock(743, async |tx| {
            tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
            tx.batch_execute(sql).await?;
            Ok::<_, Error>(())
        });
        let error = section.await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::TransactionEnded, "ended");
        let source = error.source().unwrap().to_string();
        let cause = format!("{source} {:?}", error.source().unwrap().source());
        assert!(cause.contains(named), "{sql}: {cause}");
        // Also where the section does not look at the error.
        let section = scene.keeper.with_advisory_lock(743, async |tx| {
            tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
            tx.prepare(sql).await.ok();
            Ok::<_, Error>(())
        });
        let error = section.await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::TransactionEnded, "ended");
        assert_eq!(scene.count("note").await, 0, "{sql}");
        scene.nothing_left().await;
    }
    let held = scene.keeper.advisory_lock(743).acquire().await.unwrap();
    assert!(held.batch_execute("COMMIT").await.is_err());
    let error = held.commit().await.unwrap_err();
    assert_error(&error, ErrorKind::TransactionEnded, "ended");
    // What only looks like it.
    let section = scene.keeper.with_advisory_lock(743, async |tx| {
        tx.batch_execute("SAVEPOINT s; SELECT 'COMMIT'; ROLLBACK TO s; SELECT '; COMMIT'")
            .await?;
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    scene.nothing_left().await;
}

/// A guard's locks are not returned behind its back where the text shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_would_return_a_guards_locks_is_refused() {
    let scene = Scene::new(2).await;
    for sql in ["DISCARD ALL", "SELECT pg_advisory_unlock_all()"] {
        let mut held = guard(&scene.keeper, 749).await;
        let error = held.batch_execute(sql).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "2D000", "{error:?}");
        let transaction = run_in(&mut held, sql);
        let error = transaction.await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::TransactionEnded, "ended");
        let holders = scene.holders(749).await;
        assert_eq!(holders, [held.backend_pid().unwrap()], "{sql}");
        held.release().await.unwrap();
    }
    // A guard's own connection is the caller's otherwise.
    let held = guard(&scene.keeper, 749).await;
    held.batch_execute("BEGIN; SELECT 1; COMMIT; DISCARD PLANS")
        .await
        .unwrap();
    held.release().await.unwrap();
    scene.nothing_left().await;
}

/// A guard whose locks were returned behind its back does not commit, and no transaction joins one that was left open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guards_transaction_is_under_its_lock() {
    let scene = Scene::new(2).await;
    scene.run("CREATE TABLE note (id int)").await;
    let write = async |guard: &mut SessionGuard| {
        guard
            .transaction(async |tx| {
                tx.batch_execute("INSERT INTO note VALUES (1)").await?;
                Ok::<_, Error>(())
            })
            .await
    };
    let mut held = guard(&scene.keeper, 744).await;
    write(&mut held).await.unwrap();
    held.batch_execute("BEGIN; INSERT INTO note VALUES (2)")
        .await
        .unwrap();
    let error = write(&mut held).await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Config,
        "a transaction was left open on the guard",
    );
    // An isolation level is refused by the server once the open transaction has run a statement.
    let isolation = TransactionOptions::new().isolation(IsolationLevel::Serializable);
    let serializable = held.transaction_with(isolation, async |_| Ok::<_, Error>(()));
    assert_error(
        &serializable.await.unwrap_err(),
        ErrorKind::Config,
        "a transaction was left open on the guard",
    );
    held.batch_execute("ROLLBACK").await.unwrap();
    write(&mut held).await.unwrap();
    held.client()
        .batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .unwrap();
    let error = write(&mut held).await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockLost,
        "no longer holds it; nothing is committed",
    );
    assert_error(
        &held.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "744",
    );
    assert_eq!(scene.count("note").await, 2);
    scene.nothing_left().await;
}

/// The same where only the second of two keys was returned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guards_transaction_is_under_all_of_its_locks() {
    let scene = Scene::new(2).await;
    let locks = scene.keeper.advisory_locks([747, 748]);
    let mut held = locks.session().acquire().await.unwrap();
    held.client()
        .batch_execute("SELECT pg_advisory_unlock(748)")
        .await
        .unwrap();
    let transaction = run_in(&mut held, "SELECT 1");
    let error = transaction.await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockLost,
        "no longer holds it; nothing is committed",
    );
    assert_error(
        &held.release().await.unwrap_err(),
        ErrorKind::LockLost,
        "747",
    );
    scene.nothing_left().await;
}

/// Two transactions that are exchanged for one another: neither commits, and no connection with a lock on it goes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchanged_transaction_takes_no_lock_into_the_pool() {
    let scene = Scene::new(2).await;
    let held = Mutex::new(guard(&scene.keeper, 745).await);
    let section = scene.keeper.transaction(async |tx| {
        let mut held = held.lock().await;
        held.transaction(async |inner| {
            std::mem::swap(tx, inner);
            Ok::<_, Error>(())
        })
        .await
    });
    let error = in_time("a section", section).await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::TransactionEnded,
        "exchanged for another transaction",
    );
    let held = held.into_inner();
    assert!(held.is_lost());
    drop(held);
    scene.nothing_left().await;
}

/// A statement whose future was dropped has ended once a later one is answered: the connection is as good as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_statement_that_has_ended_costs_no_connection() {
    let scene = Scene::new(1).await;
    let held = guard(&scene.keeper, 746).await;
    let pid = held.backend_pid();
    let dropped = held.batch_execute("SELECT pg_sleep(0.3)");
    assert!(
        tokio::time::timeout(Duration::from_millis(50), dropped)
            .await
            .is_err()
    );
    held.batch_execute("SELECT 1").await.unwrap();
    held.release().await.unwrap();
    let again = guard(&scene.keeper, 746).await;
    assert_eq!(again.backend_pid(), pid, "the connection was replaced");
    again.release().await.unwrap();
    scene.nothing_left().await;
}
