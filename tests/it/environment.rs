//! Servers on which a lock would not be what it seems: standbys, engines without locks, planted functions.

use std::time::Duration;

use lockkeeper::{Error, ErrorKind, FencingToken, Keeper, LockKey, SessionGuard, XactGuard};
use lockkeeper_testkit::{
    Database, PoolMode, Scene, Server, assert_error, assert_error_in, connect, eventually,
    lock_by_sql, poll_times_and_drop, pool_of, unlock_by_sql, until_connected,
    until_pooler_is_known,
};
use tokio_postgres::{IsolationLevel, NoTls};

/// A scene on the standby of `database`'s server.
async fn scene_on_standby(database: Database, standby: &Server, pool_size: usize) -> Scene {
    let mut config = standby.config();
    config.dbname(database.name());
    // The database has to arrive first.
    let observer = until_connected(&config).await;
    let pool = pool_of(config, pool_size);
    Scene {
        keeper: Keeper::builder(pool.clone()).application("test").build(),
        database,
        pool,
        observer,
    }
}

/// Every way to ask for a lock, and what came of it; `None` stands for busy.
async fn every_way(keeper: &Keeper) -> Vec<(&'static str, Result<Option<()>, Error>)> {
    let lock = || keeper.advisory_lock("k");
    let several = || keeper.advisory_locks([LockKey::from("k"), 7.into(), (1, 2).into()]);
    let many = || keeper.advisory_locks((0..150).map(LockKey::from));
    let level = IsolationLevel::RepeatableRead;
    let in_transaction = async |tries: bool| {
        keeper
            .transaction(async |tx| {
                let taken = if tries {
                    tx.advisory_lock("k").try_acquire().await?.then_some(())
                } else {
                    Some(tx.advisory_lock("k").await?)
                };
                Ok::<_, Error>(taken)
            })
            .await
    };
    let ran = async |_: &mut lockkeeper::Tx| Ok::<_, Error>(());
    vec![
        ("acquire", xact(lock().acquire().await.map(Some)).await),
        (
            "shared",
            xact(lock().shared().acquire().await.map(Some)).await,
        ),
        ("try", xact(lock().try_acquire().await).await),
        ("several", xact(several().acquire().await.map(Some)).await),
        ("try several", xact(several().try_acquire().await).await),
        ("many", xact(many().acquire().await.map(Some)).await),
        (
            "snapshot",
            xact(lock().isolation(level).acquire().await.map(Some)).await,
        ),
        (
            "try snapshot",
            xact(lock().isolation(level).try_acquire().await).await,
        ),
        (
            "session",
            session(lock().session().acquire().await.map(Some)).await,
        ),
        (
            "shared session",
            session(lock().shared().session().acquire().await.map(Some)).await,
        ),
        (
            "try session",
            session(lock().session().try_acquire().await).await,
        ),
        (
            "several session",
            session(several().session().acquire().await.map(Some)).await,
        ),
        (
            "try several session",
            session(several().session().try_acquire().await).await,
        ),
        (
            "section",
            keeper.with_advisory_lock("k", ran).await.map(Some),
        ),
        ("try section", keeper.try_with_advisory_lock("k", ran).await),
        ("in a transaction", in_transaction(false).await),
        ("try in a transaction", in_transaction(true).await),
    ]
}

/// Ends a guard and waits for its end: the next way asks for the same key.
async fn xact(result: Result<Option<XactGuard>, Error>) -> Result<Option<()>, Error> {
    match result? {
        Some(guard) => {
            guard.rollback().await;
            Ok(Some(()))
        }
        None => Ok(None),
    }
}

async fn session(result: Result<Option<SessionGuard>, Error>) -> Result<Option<()>, Error> {
    match result? {
        Some(guard) => guard.release().await.map(Some),
        None => Ok(None),
    }
}

fn assert_all_are(
    ways: Vec<(&'static str, Result<Option<()>, Error>)>,
    kind: ErrorKind,
    text: &str,
) {
    for (way, result) in ways {
        let error = result.expect_err(way);
        assert_error_in(way, &error, kind, text);
        assert!(error.key().is_some(), "{way}: {error}");
    }
}

fn assert_all_granted(ways: Vec<(&'static str, Result<Option<()>, Error>)>) {
    for (way, result) in ways {
        match result {
            Ok(granted) => assert_eq!(granted, Some(()), "{way}"),
            Err(error) => panic!("{way}: {error:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_grants_nothing_until_it_is_promoted() {
    let primary = Server::start(&[]).unwrap();
    let database = primary.database().await;
    let standby = match primary.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report("a_standby_grants_nothing_until_it_is_promoted"),
    };
    let scene = scene_on_standby(database, &standby, 3).await;
    let row = scene
        .observer
        .query_one("SELECT pg_is_in_recovery()", &[])
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0));

    // Even while a session holds the key there: the answer is not that it is busy.
    for held in [false, true, false] {
        if held {
            lock_by_sql(&scene.observer, "k").await;
        }
        // Twice: what is known of a connection by then does not open the door.
        for _ in 0..2 {
            assert_all_are(
                every_way(&scene.keeper).await,
                ErrorKind::ReadOnlyServer,
                "nothing was locked",
            );
        }
        if held {
            unlock_by_sql(&scene.observer, "k").await;
        }
        scene.nothing_left().await;
    }
    // Other work is possible.
    let one = scene.keeper.transaction(async |tx| {
        let row = tx.query_one("SELECT 1", &[]).await?;
        Ok::<i32, Error>(row.get(0))
    });
    assert_eq!(one.await.unwrap(), 1);

    scene
        .observer
        .query_one("SELECT pg_promote(true, 60)", &[])
        .await
        .unwrap();
    eventually("not promoted", async || {
        let row = scene
            .observer
            .query_one("SELECT pg_is_in_recovery()", &[])
            .await
            .unwrap();
        !row.get::<_, bool>(0)
    })
    .await;
    assert_all_granted(every_way(&scene.keeper).await);
    scene.nothing_left().await;
}

/// A standby cannot begin a SERIALIZABLE transaction at all; that it is a standby is what the caller has to know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_named_as_such_under_serializable_too() {
    let primary = Server::start(&[]).unwrap();
    let database = primary.database().await;
    let standby = match primary.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report("a_standby_is_named_as_such_under_serializable_too"),
    };
    let scene = scene_on_standby(database, &standby, 2).await;
    let lock = || {
        scene
            .keeper
            .advisory_lock("k")
            .isolation(IsolationLevel::Serializable)
    };
    let error = lock().acquire().await.unwrap_err();
    assert_error_in(
        "asked for",
        &error,
        ErrorKind::ReadOnlyServer,
        "nothing was locked (SQLSTATE 0A000)",
    );
    let error = lock().try_acquire().await.unwrap_err();
    assert_error_in(
        "asked for",
        &error,
        ErrorKind::ReadOnlyServer,
        "nothing was locked (SQLSTATE 0A000)",
    );

    let primary = scene.database.connect().await;
    let sql = format!(
        "ALTER DATABASE {} SET default_transaction_isolation = 'serializable'",
        scene.database.name()
    );
    primary.batch_execute(&sql).await.unwrap();
    let mut config = standby.config();
    config.dbname(scene.database.name());
    eventually("the setting does not arrive", async || {
        connect(&config)
            .await
            .simple_query("SELECT 1")
            .await
            .is_err()
    })
    .await;
    let keeper = Keeper::new(pool_of(config, 2));
    let error = keeper.advisory_lock("k").acquire().await.unwrap_err();
    assert_error_in(
        "by default",
        &error,
        ErrorKind::ReadOnlyServer,
        "nothing was locked (SQLSTATE 0A000)",
    );
    let error = keeper
        .advisory_lock("k")
        .session()
        .acquire()
        .await
        .unwrap_err();
    assert_error_in(
        "by default",
        &error,
        ErrorKind::ReadOnlyServer,
        "nothing was locked (SQLSTATE 0A000)",
    );
    assert_eq!(scene.advisory_locks().await, 0);
}

/// Makes lock functions of one database do nothing, as on engines that only have their names.
async fn replace_lock_functions(scene: &Scene, scopes: &[&str], language: &str) {
    let result = |function: &str| {
        if function.contains("try") || function.contains("unlock") {
            "boolean"
        } else {
            "void"
        }
    };
    let mut sql = String::from("SET allow_system_table_mods = on;");
    for scope in scopes {
        let functions: &[&str] = match *scope {
            "transaction" => &["pg_advisory_xact_lock", "pg_try_advisory_xact_lock"],
            _ => &[
                "pg_advisory_lock",
                "pg_try_advisory_lock",
                "pg_advisory_unlock",
            ],
        };
        for function in functions {
            for suffix in ["", "_shared"] {
                for arguments in ["bigint", "integer, integer"] {
                    let name = format!("{function}{suffix}");
                    let result = result(&name);
                    let body = match (language, result) {
                        ("sql", "void") => "SELECT",
                        ("sql", _) => "SELECT true",
                        (_, "void") => "BEGIN END",
                        _ => "BEGIN RETURN true; END",
                    };
                    sql.push_str(&format!(
                        "ALTER FUNCTION pg_catalog.{name}({arguments}) RENAME TO real_{name};
                         CREATE FUNCTION pg_catalog.{name}({arguments}) RETURNS {result}
                         LANGUAGE {language} VOLATILE AS $body$ {body} $body$;"
                    ));
                }
            }
        }
    }
    scene.observer.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_whose_locks_do_nothing_is_refused() {
    for language in ["sql", "plpgsql"] {
        let scene = Scene::new(3).await;
        replace_lock_functions(&scene, &["transaction", "session"], language).await;
        for _ in 0..2 {
            let mut ways = every_way(&scene.keeper).await;
            // A lock inside a transaction that began without one: see below.
            ways.retain(|(way, _)| !way.ends_with("in a transaction"));
            assert_all_are(ways, ErrorKind::NoAdvisoryLocks, "to two sessions");
        }
        scene.nothing_left().await;
    }
}

/// Nor is it taken for one that does not show its locks to the role.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_whose_locks_do_nothing_is_refused_without_pg_locks() {
    let scene = Scene::new(3).await;
    replace_lock_functions(&scene, &["transaction", "session"], "sql").await;
    let role = format!("blind_{}", scene.database.name());
    let sql = format!("CREATE ROLE {role} LOGIN; REVOKE SELECT ON pg_locks FROM PUBLIC");
    scene.run(&sql).await;
    let keeper = Keeper::new(scene.database.pool_as(&role, 3));
    let ways = every_way(&keeper).await;
    assert_all_are(ways, ErrorKind::NoAdvisoryLocks, "to two sessions");
    drop(keeper);
    scene.nothing_left().await;
    scene.run(&format!("DROP ROLE {role}")).await;
}

/// Without a second session to compare with, a lock that does not show is not relied on.
#[tokio::test]
async fn an_engine_whose_locks_do_nothing_is_refused_on_a_pool_of_one() {
    let scene = Scene::new(1).await;
    replace_lock_functions(&scene, &["transaction", "session"], "sql").await;
    let lock = || scene.keeper.advisory_lock("k");
    let error = lock().acquire().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::NoAdvisoryLocks,
        "granted one exclusive lock to two sessions",
    );
    let error = lock().session().try_acquire().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::NoAdvisoryLocks,
        "granted one exclusive lock to two sessions",
    );
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_does_nothing_is_refused_inside_a_transaction_too() {
    let scene = Scene::new(3).await;
    replace_lock_functions(&scene, &["transaction", "session"], "sql").await;
    let mut ways = every_way(&scene.keeper).await;
    ways.retain(|(way, _)| way.ends_with("in a transaction"));
    assert_eq!(ways.len(), 2);
    assert_all_are(ways, ErrorKind::NoAdvisoryLocks, "to two sessions");
    scene.nothing_left().await;
}

/// What was found out about one scope says nothing about the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_scope_is_examined_by_itself() {
    for broken in ["transaction", "session"] {
        let scene = Scene::new(3).await;
        replace_lock_functions(&scene, &[broken], "sql").await;
        for _ in 0..2 {
            let lock = || scene.keeper.advisory_lock("k");
            let xact = lock().acquire().await.map(drop);
            scene.nothing_left().await;
            let session = lock().session().acquire().await.map(drop);
            let (bad, good) = if broken == "transaction" {
                (xact, session)
            } else {
                (session, xact)
            };
            assert_error_in(
                broken,
                &bad.unwrap_err(),
                ErrorKind::NoAdvisoryLocks,
                "granted one exclusive lock to two sessions",
            );
            good.unwrap();
            scene.nothing_left().await;
        }
    }
}

/// In schema `evil` a trap for every function, operator, type and view of `pg_catalog` that can have one. Whatever runs
/// one of them leaves a number in the sequence `evil.ran`, which no rollback takes back, and fails.
const TRAPS: &str = r#"
CREATE SCHEMA evil;
CREATE SEQUENCE evil.ran;
CREATE FUNCTION evil.trap() RETURNS pg_catalog.bool LANGUAGE plpgsql VOLATILE AS $trap$
BEGIN
    PERFORM pg_catalog.nextval('evil.ran'::pg_catalog.regclass);
    RAISE EXCEPTION 'planted trap was run';
END $trap$;
SET check_function_bodies = off;
SET client_min_messages = error;
DO $do$
DECLARE
    f record;
    body text := 'BEGIN PERFORM pg_catalog.nextval(''evil.ran''::pg_catalog.regclass); RAISE EXCEPTION ''planted % was run'', %L; END';
BEGIN
    FOR f IN SELECT p.proname, pg_get_function_identity_arguments(p.oid) AS args, pg_get_function_result(p.oid) AS result
             FROM pg_proc p WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind IN ('f', 'w', 'a')
             AND proname <> 'count'
             AND NOT prorettype = ANY ('{trigger,event_trigger,internal,language_handler,fdw_handler,index_am_handler,table_am_handler,tsm_handler,cstring}'::regtype[])
             AND NOT proargtypes::oid[] && '{internal,cstring}'::regtype[]::oid[]
    LOOP
        BEGIN
            EXECUTE format('CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql VOLATILE AS %L',
                f.proname, f.args, f.result, replace(body, '%L', quote_literal(f.proname)));
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    CREATE FUNCTION evil.counted(int8) RETURNS int8 LANGUAGE plpgsql AS 'BEGIN PERFORM evil.trap(); RETURN 1; END';
    CREATE AGGREGATE evil.count(*) (SFUNC = evil.counted, STYPE = int8, INITCOND = 0);
    EXECUTE format('CREATE FUNCTION evil.concat(text, text) RETURNS text LANGUAGE plpgsql AS %L', replace(body, '%L', '''concat'''));
    FOR f IN SELECT o.oprname, p.proname, oprleft, oprright, format_type(oprleft, NULL) AS l, format_type(oprright, NULL) AS r
             FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode WHERE oprnamespace = 'pg_catalog'::regnamespace
    LOOP
        BEGIN
            EXECUTE format('CREATE OPERATOR evil.%s (FUNCTION = evil.%I %s, RIGHTARG = %s)',
                f.oprname, f.proname, CASE WHEN f.oprleft = 0 THEN '' ELSE ', LEFTARG = ' || f.l END, f.r);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR f IN SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype = 'b' AND typcategory <> 'A'
    LOOP
        BEGIN
            EXECUTE format('CREATE DOMAIN evil.%I AS pg_catalog.%I CHECK (evil.trap())', f.typname, f.typname);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR f IN SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v')
    LOOP
        BEGIN
            EXECUTE format('CREATE VIEW evil.%I AS SELECT * FROM pg_catalog.%I WHERE evil.trap()', f.relname, f.relname);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
END $do$;
"#;

/// Sets the traps, on the path of all sessions that connect from now on; the observer does not see them.
async fn set_traps(scene: &Scene, for_whom: &str) {
    scene.observer.batch_execute(TRAPS).await.unwrap();
    let database = scene.database.name();
    let who = match for_whom {
        "database" => format!("DATABASE {database}"),
        _ => format!("ROLE CURRENT_USER IN DATABASE {database}"),
    };
    let sql = format!("ALTER {who} SET search_path = evil, pg_catalog, public");
    scene.observer.batch_execute(&sql).await.unwrap();

    // They work.
    let client = scene.database.connect().await;
    for bait in [
        "SELECT now()",
        "SELECT pg_try_advisory_xact_lock(1)",
        "SELECT pg_try_advisory_lock(1, 2)",
        "SELECT pg_advisory_unlock(1::bigint)",
        "SELECT pg_backend_pid()",
        "SELECT current_setting('lock_timeout')",
        "SELECT set_config('application_name', 'x', false)",
        "SELECT clock_timestamp()",
        "SELECT starts_with('a', 'a')",
        "SELECT concat('a', 'b')",
        "SELECT bool_and(true)",
        "SELECT 1 - 2",
        "SELECT -(1::pg_catalog.int4)",
        "SELECT 1 = 1",
        "SELECT 'a' || 'b'",
        "SELECT 1.5::float8 * 2",
        "SELECT '1'::pg_catalog.oid = '1'::pg_catalog.oid",
        "SELECT '1'::int8",
        "SELECT 'x'::text",
        "SELECT '1'::oid",
        "SELECT count(*)",
        "SELECT pid FROM pg_locks",
        "SELECT pid FROM pg_stat_activity",
        "SELECT datname FROM pg_database",
        "SELECT * FROM unnest('{1}'::pg_catalog.int4[])",
    ] {
        let before = traps_sprung(scene).await;
        let error = client.simple_query(bait).await.expect_err(bait);
        let message = error.as_db_error().map_or("", |error| error.message());
        assert!(message.starts_with("planted "), "{bait}: {error:?}");
        assert!(traps_sprung(scene).await > before, "{bait}");
    }
    scene
        .observer
        .batch_execute("SELECT setval('evil.ran', 1, false)")
        .await
        .unwrap();
}

async fn traps_sprung(scene: &Scene) -> i64 {
    let sql = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM evil.ran";
    scene.observer.query_one(sql, &[]).await.unwrap().get(0)
}

/// Everything that makes the crate send something: grants, refusals, waits, cancellations, savepoints, reports.
async fn use_everything(scene: &Scene, keeper: &Keeper) {
    assert_all_granted(every_way(keeper).await);
    scene.nothing_left().await;

    lock_by_sql(&scene.observer, "k").await;
    let wait = Duration::from_millis(600);
    let lock = || keeper.advisory_lock("k").wait(wait);
    let several = || {
        keeper
            .advisory_locks([LockKey::from("k"), 7.into(), (1, 2).into(), (1, 3).into()])
            .wait(wait)
    };
    let timed_out = |error: Option<Error>| {
        let error = error.expect("it is held");
        assert_error(&error, ErrorKind::LockTimeout, "holds ExclusiveLock");
        assert_eq!(error.blockers().len(), 1, "{error}");
    };
    timed_out(lock().acquire().await.err());
    timed_out(
        lock()
            .isolation(IsolationLevel::Serializable)
            .acquire()
            .await
            .err(),
    );
    timed_out(several().acquire().await.err());
    timed_out(lock().session().acquire().await.err());
    timed_out(several().session().acquire().await.err());
    let section = keeper.transaction(async |tx| {
        assert!(!tx.advisory_lock("k").try_acquire().await?);
        let error = tx
            .advisory_lock("k")
            .wait(Duration::from_millis(30))
            .await
            .unwrap_err();
        assert_eq!(error.blockers().len(), 1, "{error}");
        let error = tx
            .advisory_lock("k")
            .wait(Duration::ZERO)
            .await
            .unwrap_err();
        assert_eq!(error.blockers().len(), 1, "{error}");
        let error = tx
            .advisory_locks(["k", "l"])
            .wait(Duration::from_millis(30))
            .await
            .unwrap_err();
        assert_error(&error, ErrorKind::LockTimeout, "holds ExclusiveLock");
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    for polls in 1..6 {
        let limit = Duration::from_millis(100);
        drop(tokio::time::timeout(limit, poll_times_and_drop(lock().acquire(), polls)).await);
        drop(
            tokio::time::timeout(
                limit,
                poll_times_and_drop(lock().session().acquire(), polls),
            )
            .await,
        );
        drop(
            tokio::time::timeout(
                limit,
                poll_times_and_drop(several().session().acquire(), polls),
            )
            .await,
        );
        drop(
            tokio::time::timeout(
                limit,
                poll_times_and_drop(keeper.advisory_lock("l").session().acquire(), polls),
            )
            .await,
        );
    }
    unlock_by_sql(&scene.observer, "k").await;
    scene.nothing_left().await;

    // Waits that end well, and guards that end badly.
    for session in [false, true] {
        lock_by_sql(&scene.observer, "k").await;
        let lock = several().wait(Duration::from_secs(20));
        let waiting = async {
            if session {
                drop(lock.session().acquire().await.unwrap());
            } else {
                drop(lock.acquire().await.unwrap());
            }
        };
        let release = async {
            scene.until_awaited("k").await;
            unlock_by_sql(&scene.observer, "k").await;
        };
        tokio::join!(waiting, release);
        scene.nothing_left().await;
    }
    let mut guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    let failed = guard.transaction(async |tx| {
        tx.savepoint(async |tx| tx.advisory_lock("inside").await)
            .await?;
        tx.query("SELECT no_such_column", &[]).await?;
        Ok::<_, Error>(())
    });
    failed.await.unwrap_err();
    guard.batch_execute("BEGIN").await.unwrap();
    guard.query("SELECT no_such_column", &[]).await.unwrap_err();
    guard.release().await.unwrap();
    let guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    guard.batch_execute("BEGIN; SAVEPOINT s").await.unwrap();
    drop(guard);
    let swallowed = keeper.with_advisory_lock("k", async |tx| {
        drop(tx.query("SELECT no_such_column", &[]).await);
        Ok::<_, Error>(())
    });
    swallowed.await.unwrap_err();
    scene.nothing_left().await;
    // In a future of its own, or this one would be too large for the stack.
    Box::pin(use_coordination(scene, keeper)).await;
}

async fn use_coordination(scene: &Scene, keeper: &Keeper) {
    let fencing = keeper.fencing();
    fencing.set_up().await.unwrap();
    let mut guard = keeper.advisory_lock("k").session().acquire().await.unwrap();
    let token = guard.fencing_token().await.unwrap();
    guard.release().await.unwrap();
    for token in [
        token,
        FencingToken::new("k", (token.epoch(), token.counter() + 1)),
    ] {
        let checked = keeper.transaction(async |tx| tx.check_fencing(token).await);
        checked.await.unwrap();
    }
    fencing.floor(token).set_up().await.unwrap();
    for since_last_run in [false, true] {
        let day = Duration::from_secs(86_400);
        let mut once = keeper.once(format!("{since_last_run}"), day);
        if since_last_run {
            once = once.since_last_run();
        }
        once.set_up().await.unwrap();
        once.run(async |_| Ok::<_, Error>(())).await.unwrap();
    }
    let permits = keeper.semaphore("s", 1);
    let permit = permits.clone().acquire().await.unwrap();
    assert!(permits.clone().try_acquire().await.unwrap().is_none());
    let wait = Duration::from_millis(100);
    permits.wait(wait).acquire().await.unwrap_err();
    permit.release().await.unwrap();
    let leader = keeper.leader("l");
    let led = leader.run(async |_| Ok::<_, Error>(()));
    led.await.unwrap();
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_planted_on_the_search_path_is_ever_run() {
    for for_whom in ["database", "role"] {
        let scene = Scene::new(3).await;
        set_traps(&scene, for_whom).await;
        use_everything(&scene, &scene.keeper).await;
        let keeper = Keeper::builder(scene.pool.clone())
            .application("test")
            .call_sites(false)
            .side_connection(scene.database.config(), NoTls)
            .build();
        use_everything(&scene, &keeper).await;
        assert_eq!(traps_sprung(&scene).await, 0, "something planted was run");
    }
}

/// The texts that are sent only through a pooler.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_planted_on_the_search_path_is_run_through_a_pooler() {
    let scene = Scene::new(3).await;
    let bouncer = match Server::shared().pgbouncer(PoolMode::Session, scene.database.name()) {
        Ok(bouncer) => bouncer,
        Err(skip) => {
            return skip.report("nothing_planted_on_the_search_path_is_run_through_a_pooler");
        }
    };
    set_traps(&scene, "database").await;
    let pool = bouncer.pool(3);
    let keeper = Keeper::builder(pool).application("test").build();
    until_pooler_is_known(&keeper).await;
    use_everything(&scene, &keeper).await;
    assert_eq!(traps_sprung(&scene).await, 0, "something planted was run");
}

#[tokio::test]
async fn a_lock_key_is_computed_the_same_among_traps() {
    let scene = Scene::new(1).await;
    set_traps(&scene, "database").await;
    let client = scene.database.connect().await;
    let row = client
        .query_one(
            &format!("SELECT {}", LockKey::SQL_EXPRESSION),
            &[&"a", &"it's \\"],
        )
        .await
        .unwrap();
    let key = LockKey::from(("a", "it's \\")).as_i64();
    assert_eq!(Some(row.get::<_, i64>(0)), key);
    let sql = LockKey::sql_expression("a", "it's \\").unwrap();
    let row = client
        .query_one(&format!("SELECT {sql}"), &[])
        .await
        .unwrap();
    assert_eq!(Some(row.get::<_, i64>(0)), key);
    assert_eq!(traps_sprung(&scene).await, 0);
}

/// Whatever the crate keeps on a connection, the application may throw away between two borrowers.
#[tokio::test]
async fn a_connection_that_was_reset_by_the_application_still_takes_locks() {
    for reset in [
        "DEALLOCATE ALL",
        "DISCARD ALL",
        "DISCARD PLANS",
        "RESET ALL",
    ] {
        let scene = Scene::new(1).await;
        for _ in 0..4 {
            for key in [LockKey::from("k"), (1, 2).into()] {
                let lock = || scene.keeper.advisory_lock(&key);
                let guard = lock().acquire().await.unwrap();
                assert_eq!(scene.holders(&key).await.len(), 1);
                guard.commit().await.unwrap();
                let guard = lock().session().acquire().await.unwrap();
                assert_eq!(scene.holders(&key).await.len(), 1);
                guard.release().await.unwrap();
            }
            let object = scene.pool.get().await.unwrap();
            object.batch_execute(reset).await.unwrap();
        }
        let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
        guard.batch_execute("DEALLOCATE ALL").await.unwrap();
        guard.commit().await.unwrap();
        assert_all_granted(every_way(&scene.keeper).await);
        scene.nothing_left().await;
    }
}
