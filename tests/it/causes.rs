//! Errors say why: what the server or the network gave as the reason is in `{:?}`, and where the driver lost it, it is found.

use std::error::Error as StdError;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool};
use lockkeeper::{Connector, Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    Scene, assert_error, assert_error_in, in_time, pool_of, server_error, sqlstate,
};
use tokio_postgres::{NoTls, SimpleQueryMessage};

const SECRET: &str = "sekret-4711";

/// As `main() -> Result<(), Box<dyn Error>>` shows it.
fn shown(error: Error) -> String {
    let error: Box<dyn StdError> = error.into();
    format!("{error:?}")
}

#[tokio::test]
async fn a_server_that_is_down_is_named_with_the_reason() {
    // A port that was free just now.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user("app");
    config.password(SECRET);
    let keeper = Keeper::new(pool_of(config, 2));
    let error = keeper
        .with_advisory_lock("k", async |_: &mut Tx| Ok::<_, Error>(()))
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Pool, "no connection from the pool");
    assert!(!error.to_string().contains("127.0.0.1"), "{error}");
    let shown = shown(error);
    for part in [&*format!("127.0.0.1:{port}"), "refused", "Pool"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(!shown.contains(SECRET), "{shown}");
}

/// A login that is refused is the server's word too.
#[tokio::test]
async fn a_login_that_is_refused_shows_the_servers_word() {
    let scene = Scene::new(1).await;
    let mut config = scene.database.config();
    config.dbname("no_such_database");
    let error = Keeper::new(pool_of(config, 1))
        .transaction(async |_: &mut Tx| Ok::<_, Error>(()))
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Pool, "SQLSTATE 3D000");
    let shown = shown(error);
    assert!(
        shown.contains("3D000: database \"no_such_database\" does not exist"),
        "{shown}"
    );
}

#[tokio::test]
async fn a_refusal_shows_the_code_and_the_message_without_values() {
    let scene = Scene::new(2).await;
    scene
        .run(&format!(
            "CREATE TABLE s (name text CONSTRAINT one_name UNIQUE, n int CHECK (n > 0)); INSERT INTO s VALUES ('{SECRET}', 1)"
        ))
        .await;
    for (sql, parts, in_source) in [
        (
            format!("INSERT INTO s VALUES ('{SECRET}', 1)"),
            vec![
                "23505: duplicate key value",
                "constraint one_name",
                "table s",
            ],
            true,
        ),
        (
            format!("SELECT '{SECRET}'::int"),
            vec!["22P02: invalid input syntax for type integer: \"…\""],
            true,
        ),
        (
            format!("SELECT 1 nonsense '{SECRET}'"),
            vec!["42601: syntax error at or near \"…\""],
            true,
        ),
        (
            "SELECT * FROM nowhere".to_owned(),
            vec!["42P01: relation \"nowhere\" does not exist"],
            false,
        ),
        (
            format!("DO $$ BEGIN RAISE EXCEPTION '{SECRET}'; END $$"),
            vec!["P0001: (a message of a function"],
            true,
        ),
    ] {
        let error = scene
            .keeper
            .transaction(async |tx| {
                tx.batch_execute(&sql).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap_err();
        let code = error.sqlstate().unwrap().code().to_owned();
        let source = server_error(&error).unwrap();
        let whole = format!("{} {:?}", source.message(), source.detail());
        assert_eq!(whole.contains(SECRET), in_source, "{whole}");
        let line = error.to_string();
        assert!(
            line.contains(&code) && !line.contains('\n') && !line.contains("duplicate"),
            "{line}"
        );
        let shown = shown(error);
        for part in parts {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(!shown.contains(SECRET), "{shown}");
        assert!(
            !shown.contains("DETAIL") && !shown.contains("Key ("),
            "{shown}"
        );
    }
}

/// Waits until the section's backend is gone.
async fn until_ended(scene: &Scene, pid: i32) {
    let backend = format!("pg_stat_activity WHERE pid = {pid}");
    let ended = async {
        while scene.count(&backend).await > 0 {
            tokio::task::yield_now().await;
        }
    };
    in_time("the backend is still there", ended).await;
}

/// The driver learns of it a moment after the server has forgotten the backend.
async fn until_closed(tx: &mut Tx) {
    while !tx.client().is_closed() {
        tokio::task::yield_now().await;
    }
}

async fn pid(tx: &mut Tx) -> i32 {
    // One message: nothing is on its way to the server when it ends the session, so that its word arrives.
    let reply = tx.simple_query("SELECT pg_backend_pid()").await.unwrap();
    let rows = reply.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    rows.unwrap().parse().unwrap()
}

/// However the timeout came to be: by our option, by a statement of the section, or by the database.
#[tokio::test]
async fn a_section_that_was_idle_for_too_long_says_so() {
    // Also where the pool has no other connection.
    for size in [1, 3] {
        let scene = Scene::new(size).await;
        for how in ["option", "statement", "database"] {
            for commits in [false, true] {
                let timeout = Duration::from_millis(100);
                let mut options = TransactionOptions::new();
                match how {
                    "option" => options = options.idle_timeout(timeout),
                    "database" => {
                        scene
                            .set("idle_in_transaction_session_timeout", "100ms")
                            .await;
                        scene.pool.retain(|_, _| false);
                    }
                    _ => {}
                }
                let error = scene
                    .keeper
                    .transaction_with(options, async |tx| {
                        if how == "statement" {
                            tx.batch_execute(
                                "SET LOCAL idle_in_transaction_session_timeout = '100ms'",
                            )
                            .await?;
                        }
                        let pid = pid(tx).await;
                        until_ended(&scene, pid).await;
                        if !commits {
                            tx.execute("SELECT 1", &[]).await?;
                        }
                        Ok::<_, Error>(())
                    })
                    .await
                    .unwrap_err();
                let what = format!("{how}, {commits}, {size}");
                assert_error_in(
                    &what,
                    &error,
                    ErrorKind::ConnectionLost,
                    "idle_in_transaction_session_timeout",
                );
                assert_eq!(sqlstate(&error), "25P03", "{what}");
                let shown = shown(error);
                assert!(
                    shown.contains("25P03: connection closed by the server, probably"),
                    "{shown}"
                );
            }
        }
    }
}

/// What ended for another reason is not said to have been idle.
#[tokio::test]
async fn a_section_that_was_terminated_is_not_said_to_have_been_idle() {
    let scene = Scene::new(3).await;
    let options = TransactionOptions::new().idle_timeout(Duration::from_secs(60));
    let error = scene
        .keeper
        .transaction_with(options, async |tx| {
            let pid = pid(tx).await;
            scene.terminate(pid).await;
            until_ended(&scene, pid).await;
            tx.execute("SELECT 1", &[]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert_eq!(sqlstate(&error), "none", "{error:?}");
}

/// With a connector in the pool, the server's own word is known.
#[tokio::test]
async fn with_a_connector_the_servers_word_is_known() {
    let scene = Scene::new(1).await;
    let manager = Manager::from_connect(
        scene.database.config(),
        Connector::new(NoTls),
        ManagerConfig::default(),
    );
    let pool = Pool::builder(manager).max_size(2).build().unwrap();
    let keeper = Keeper::new(pool);
    for commits in [false, true] {
        let error = keeper
            .transaction(async |tx| {
                let pid = pid(tx).await;
                scene.terminate(pid).await;
                until_ended(&scene, pid).await;
                until_closed(tx).await;
                if !commits {
                    tx.execute("SELECT 1", &[]).await?;
                }
                Ok::<_, Error>(())
            })
            .await
            .unwrap_err();
        assert_error(
            &error,
            ErrorKind::ConnectionLost,
            "(SQLSTATE 57P01), terminated",
        );
        let shown = shown(error);
        assert!(
            shown.contains("terminating connection due to administrator command"),
            "{shown}"
        );
    }
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    guard
        .batch_execute("SET idle_session_timeout = '50ms'")
        .await
        .unwrap();
    guard.loss().await;
    let error = Error::from(guard.execute("SELECT 1", &[]).await.unwrap_err());
    assert_error(&error, ErrorKind::ConnectionLost, "SQLSTATE 57P05");
}

/// A reason that reached a statement is not forgotten when the driver reports only a closed connection later.
#[tokio::test]
async fn a_reason_that_was_swallowed_comes_back_at_commit() {
    let scene = Scene::new(2).await;
    let error = scene
        .keeper
        .transaction(async |tx| {
            let own = "SELECT pg_terminate_backend(pg_backend_pid())";
            assert!(tx.batch_execute(own).await.is_err());
            until_closed(tx).await;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::ConnectionLost,
        "(SQLSTATE 57P01), terminated",
    );
    scene.nothing_left().await;
}

const STATEMENT: &str = "SELECT * FROM v";

async fn scene_with_view() -> Scene {
    let scene = Scene::new(1).await;
    scene
        .run("CREATE TABLE v (a int); INSERT INTO v VALUES (1)")
        .await;
    scene
}

/// Adds a column, which changes the type of what was prepared.
async fn change(scene: &Scene) {
    let columns = scene
        .count("pg_attribute WHERE attrelid = 'v'::regclass AND attnum > 0")
        .await;
    scene
        .run(&format!("ALTER TABLE v ADD COLUMN c{columns} int"))
        .await;
}

async fn read(tx: &mut Tx) -> Result<usize, Error> {
    let statement = tx.prepare_cached(STATEMENT).await?;
    let rows = tx.query(&statement, &[]).await?;
    Ok(rows[0].len())
}

/// After a schema change, what was prepared for the pool's one connection is prepared again.
#[tokio::test]
async fn a_statement_whose_result_has_changed_is_prepared_again() {
    let scene = scene_with_view().await;
    let keeper = &scene.keeper;
    for expected in 1..4 {
        let read = keeper.transaction(async |tx| Ok::<_, Error>((tx.attempt(), read(tx).await?)));
        let attempts = if expected == 1 { 1 } else { 2 };
        assert_eq!(read.await.unwrap(), (attempts, expected));
        change(&scene).await;
    }
    let section = keeper.with_advisory_lock("k", async |tx| read(tx).await);
    assert_eq!(section.await.unwrap(), 4);
    change(&scene).await;
    // What went unseen, and what was swallowed.
    let swallowed = keeper.transaction(async |tx| {
        let attempt = tx.attempt();
        let read = read(tx).await;
        Ok::<_, Error>((attempt, read.ok()))
    });
    assert_eq!(swallowed.await.unwrap(), (2, Some(5)));
    scene.nothing_left().await;
}

/// Nothing runs twice where that is not wanted, and the next one does not fail.
#[tokio::test]
async fn one_attempt_stays_one() {
    let scene = scene_with_view().await;
    let keeper = &scene.keeper;
    keeper.transaction(async |tx| read(tx).await).await.unwrap();
    change(&scene).await;
    let once = keeper
        .advisory_lock("k")
        .once()
        .run(async |tx| read(tx).await);
    let error = once.await.unwrap_err();
    assert_eq!(sqlstate(&error), "0A000", "{error:?}");
    assert!(error.is_retryable() && lockkeeper::is_retryable(&error));
    let again = keeper
        .advisory_lock("k")
        .once()
        .run(async |tx| read(tx).await);
    assert_eq!(again.await.unwrap(), 2);
    // A statement that the closure has prepared elsewhere is its own: it fails twice, and not five times.
    let outside = scene.pool.get().await.unwrap();
    let statement = outside.prepare(STATEMENT).await.unwrap();
    drop(outside);
    change(&scene).await;
    let attempts = std::sync::atomic::AtomicU32::new(0);
    let error = keeper
        .transaction(async |tx| {
            attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tx.query(&statement, &[]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&error), "0A000", "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Database);
    assert_eq!(attempts.into_inner(), 2);
    scene.nothing_left().await;
}

/// Guards run nothing again, but the connection does not keep failing.
#[tokio::test]
async fn a_guards_connection_does_not_keep_failing() {
    let scene = scene_with_view().await;
    let keeper = &scene.keeper;
    for failing in [true, false] {
        let guard = keeper.advisory_lock("k").acquire().await.unwrap();
        if failing {
            let statement = guard.prepare_cached(STATEMENT).await.unwrap();
            guard.query(&statement, &[]).await.unwrap();
            guard.rollback().await;
            change(&scene).await;
            continue;
        }
        let statement = guard.prepare_cached(STATEMENT).await.unwrap();
        assert!(guard.query(&statement, &[]).await.is_err());
        guard.rollback().await;
    }
    let mut guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    for changed in [false, true] {
        if changed {
            change(&scene).await;
            let error = guard
                .transaction(async |tx| read(tx).await)
                .await
                .unwrap_err();
            assert_eq!(sqlstate(&error), "0A000", "{error:?}");
        }
        assert!(guard.transaction(async |tx| read(tx).await).await.is_ok());
    }
    // Outside of a transaction too.
    change(&scene).await;
    let statement = guard.prepare_cached(STATEMENT).await.unwrap();
    assert!(guard.query(&statement, &[]).await.is_err());
    let statement = guard.prepare_cached(STATEMENT).await.unwrap();
    assert!(guard.query(&statement, &[]).await.is_ok());
    guard.release().await.unwrap();
    // Through the bare client, whose statements are not seen.
    change(&scene).await;
    for fails in [true, false] {
        let bare = keeper.transaction(async |tx| {
            let client = tx.client();
            let statement = client.prepare_cached(STATEMENT).await?;
            client.query(&statement, &[]).await?;
            Ok::<_, Error>(())
        });
        assert_eq!(bare.await.is_err(), fails);
    }
    scene.nothing_left().await;
}

/// A savepoint can catch it, and the same transaction prepares it again.
#[tokio::test]
async fn a_savepoint_can_catch_it() {
    let scene = scene_with_view().await;
    let keeper = &scene.keeper;
    keeper.transaction(async |tx| read(tx).await).await.unwrap();
    change(&scene).await;
    let caught = keeper.transaction(async |tx| {
        let inner = tx.savepoint(async |tx| read(tx).await).await;
        assert!(inner.is_err());
        assert_eq!(tx.attempt(), 1);
        read(tx).await
    });
    assert_eq!(caught.await.unwrap(), 2);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_full_lock_table_is_told_from_exhausted_memory() {
    let scene = Scene::new(1).await;
    for (message, hint, kind) in [
        (
            "out of shared memory",
            ", HINT = 'You might need to increase \"max_locks_per_transaction\".'",
            ErrorKind::OutOfLocks,
        ),
        (
            "kein Shared Memory mehr",
            ", HINT = 'Vielleicht sollten Sie max_pred_locks_per_transaction erhöhen.'",
            ErrorKind::OutOfLocks,
        ),
        ("raised", "", ErrorKind::OutOfLocks),
        ("out of memory", "", ErrorKind::OutOfMemory),
        ("raised", ", HINT = 'Buy more.'", ErrorKind::OutOfMemory),
    ] {
        let sql = format!(
            "DO $$ BEGIN RAISE EXCEPTION '{message}' USING ERRCODE = '53200'{hint}; END $$"
        );
        let error = scene
            .keeper
            .transaction(async |tx| {
                tx.batch_execute(&sql).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap_err();
        assert_error(&error, kind, "SQLSTATE 53200");
        assert!(!error.is_retryable());
    }
}
