//! Fencing tokens increase in the order of tenure, whatever becomes of the connection, the process and the server.

use std::time::Duration;

use lockkeeper::{Error, ErrorKind, FencingToken, Keeper, LockKey, TransactionOptions};
use lockkeeper_testkit::{
    ENDLESS, Scene, Server, assert_error, assert_error_in, eventually, in_time, is_pending,
    poll_times_and_drop, pool_of, quoted, until_connected,
};
use tokio_postgres::IsolationLevel;

use super::{process, take};

async fn scene() -> Scene {
    let scene = Scene::new(3).await;
    scene.keeper.fencing().set_up().await.unwrap();
    scene
}

/// Where all who issue and check tokens of a lock stand in line.
fn line(key: &str) -> LockKey {
    let number = LockKey::from(key).as_i64().unwrap();
    LockKey::from(("lockkeeper fencing", number.to_string()))
}

/// The token of one more tenure.
async fn token(keeper: &Keeper, key: &str) -> FencingToken {
    let mut guard = take(keeper, key).await;
    let token = guard.fencing_token().await.unwrap();
    guard.release().await.unwrap();
    token
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_increase_over_processes_lost_connections_and_hand_overs() {
    let scene = scene().await;
    let other = process(&scene);
    let mut tokens = vec![token(&scene.keeper, "k").await, token(&other, "k").await];

    // A guard keeps its own.
    let mut guard = take(&scene.keeper, "k").await;
    let own = guard.fencing_token().await.unwrap();
    assert_eq!(guard.fencing_token().await.unwrap(), own);
    tokens.push(own);
    // It is committed.
    assert!(
        scene
            .is_true(&format!(
                "(SELECT (epoch, counter) = ({}, {}) FROM public.lockkeeper_fencing)",
                own.epoch(),
                own.counter()
            ))
            .await
    );

    // Handed over within the process, once on the same connection, and once on another, since it was used.
    for _ in 0..2 {
        let mut waiting = Box::pin(token(&scene.keeper, "k"));
        assert!(is_pending(&mut waiting).await);
        drop(guard);
        tokens.push(in_time("the hand-over", waiting).await);
        guard = take(&scene.keeper, "k").await;
    }
    drop(guard);

    // Lost.
    let mut guard = take(&other, "k").await;
    tokens.push(guard.fencing_token().await.unwrap());
    scene.terminate(guard.backend_pid().unwrap()).await;
    eventually("the loss is not noticed", async || guard.is_lost()).await;
    let error = guard.fencing_token().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::LockLost,
        "lock lost with its connection: \"k\"",
    );
    drop(guard);
    tokens.push(token(&scene.keeper, "k").await);

    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    assert!(
        tokens
            .iter()
            .all(|token| token.key().same_lock(&LockKey::from("k")))
    );
    // Each lock has its own, of both key spaces.
    let mut guard = scene
        .keeper
        .advisory_lock((1, -2))
        .session()
        .acquire()
        .await
        .unwrap();
    assert_eq!(guard.fencing_token().await.unwrap().counter(), 1);
    drop(guard);
    scene.nothing_left().await;
}

/// A commit that was not flushed is lost in a crash, and its number would be issued again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_token_repeats_after_a_crash() {
    let server =
        Server::start(&[("synchronous_commit", "off"), ("wal_writer_delay", "10s")]).unwrap();
    let scene = Scene::on(&server, 2).await;
    scene.keeper.fencing().set_up().await.unwrap();
    token(&scene.keeper, "k").await;
    scene.run("CREATE TABLE unflushed (id int)").await;
    scene.run("CHECKPOINT").await;
    let mut guard = take(&scene.keeper, "k").await;
    let before = guard.fencing_token().await.unwrap();
    // What another transaction has committed shows that there was something to lose. It is small: a whole page of the log is
    // flushed at once.
    scene.run("INSERT INTO unflushed VALUES (1)").await;
    server.stop();
    server.restart();
    drop(guard);
    let observer = until_connected(&scene.database.config()).await;
    let kept = observer.query("SELECT FROM unflushed", &[]).await.unwrap();
    assert!(
        kept.is_empty(),
        "everything was flushed, so this shows nothing"
    );
    let after = token(&process(&scene), "k").await;
    assert!(before < after, "{before} and then {after}");
}

/// The standby has not received the last tokens, so that its counter is behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_increase_over_a_failover_that_loses_commits() {
    let server = Server::start(&[]).unwrap();
    let scene = Scene::on(&server, 2).await;
    scene.keeper.fencing().set_up().await.unwrap();
    token(&scene.keeper, "k").await;
    let standby = match server.standby() {
        Ok(standby) => standby,
        Err(skip) => return skip.report("tokens_increase_over_a_failover_that_loses_commits"),
    };
    standby.stop();
    let mut newest = token(&scene.keeper, "k").await;
    for _ in 0..3 {
        newest = token(&scene.keeper, "k").await;
    }
    server.stop();
    standby.restart();
    let mut config = standby.config();
    config.dbname(scene.database.name());
    let observer = until_connected(&config).await;
    let promoted = Keeper::new(pool_of(config, 2));
    // Before that it is a standby.
    let error = promoted.fencing().floor(newest).set_up().await.unwrap_err();
    assert_error(&error, ErrorKind::ReadOnlyServer, "server is a standby");
    let once = promoted.once("k", Duration::from_secs(1));
    let error = once.run(async |_| Ok::<_, Error>(())).await.unwrap_err();
    assert_error(&error, ErrorKind::ReadOnlyServer, "server is a standby");
    let error = promoted.leader("l").campaign().await.unwrap_err();
    assert_error(&error, ErrorKind::ReadOnlyServer, "server is a standby");
    observer.batch_execute("SELECT pg_promote()").await.unwrap();
    let check = async |token| {
        let checked = promoted
            .transaction(async |tx| tx.check_fencing(token).await)
            .await;
        checked.map_err(|error: Error| error.kind())
    };
    let after = token(&promoted, "k").await;
    assert!(newest < after, "{newest} and then {after}");
    assert!(
        newest.counter() > after.counter(),
        "nothing was lost, so this shows nothing"
    );
    assert_eq!((newest.epoch(), after.epoch()), (1, 2));
    assert_eq!(check(newest).await, Err(ErrorKind::Fenced));
    assert_eq!(check(after).await, Ok(()));
}

/// A dump that is restored into the same cluster, and a copy of the database in its place: nothing but the table tells.
#[tokio::test]
async fn a_restored_table_issues_none_until_it_is_set_up_and_then_newer_ones() {
    let scene = scene().await;
    let tables = ["lockkeeper_fencing", "lockkeeper_fencing_server"];
    for has_tokens in [false, true] {
        if has_tokens {
            token(&scene.keeper, "k").await;
        }
        for table in tables {
            scene
                .run(&format!("CREATE TABLE {table}_dump (LIKE {table} INCLUDING ALL); INSERT INTO {table}_dump SELECT * FROM {table}"))
                .await;
        }
        let lost = token(&scene.keeper, "k").await;
        for table in tables {
            scene
                .run(&format!(
                    "DROP TABLE {table}; ALTER TABLE {table}_dump RENAME TO {table}"
                ))
                .await;
        }
        let mut guard = take(&scene.keeper, "k").await;
        let error = guard.fencing_token().await.unwrap_err();
        assert_error(&error, ErrorKind::FencingNotSetUp, "a restored dump");
        scene.keeper.fencing().set_up().await.unwrap();
        let next = guard.fencing_token().await.unwrap();
        assert!(lost < next, "{lost} and then {next}");
        guard.release().await.unwrap();
    }
    let newest = token(&scene.keeper, "k").await;
    scene
        .run("UPDATE public.lockkeeper_fencing_server SET database = 1")
        .await;
    let mut guard = take(&scene.keeper, "k").await;
    let error = guard.fencing_token().await.unwrap_err();
    assert_error(&error, ErrorKind::FencingNotSetUp, "a restored dump");
    scene.run(&scene.keeper.fencing().sql().unwrap()).await;
    assert!(guard.fencing_token().await.unwrap().epoch() > newest.epoch());
    drop(guard);
    scene.nothing_left().await;
}

/// A token that is being issued knows the base as it was, so that a floor waits for it.
#[tokio::test]
async fn a_floor_waits_for_tokens_that_are_being_issued() {
    let scene = scene().await;
    let issuing = scene.session().await;
    issuing
        .client
        .batch_execute(
            "BEGIN; INSERT INTO lockkeeper_fencing (key, epoch, counter) VALUES ('1', 1, 1)",
        )
        .await
        .unwrap();
    let hasty = Keeper::builder(scene.database.pool(2))
        .lock_wait(Duration::from_millis(100))
        .build();
    let error = hasty.fencing().floor((9, 0)).set_up().await.unwrap_err();
    let text = "\"lockkeeper_fencing\" is in use by a transaction that has not ended";
    assert_error(&error, ErrorKind::LockTimeout, text);
    let patient = Keeper::builder(scene.database.pool(2))
        .lock_wait(ENDLESS)
        .build();
    let setting_up = tokio::spawn(async move { patient.fencing().floor((9, 0)).set_up().await });
    scene.until_lock_waiters(1).await;
    issuing.client.batch_execute("COMMIT").await.unwrap();
    in_time("set_up", setting_up).await.unwrap().unwrap();
    assert_eq!(token(&scene.keeper, "k").await.epoch(), 10);
    scene.nothing_left().await;
}

/// Another cluster (after `pg_upgrade`, or from a dump) has a timeline that begins anew.
#[tokio::test]
async fn another_cluster_issues_none_until_it_is_set_up_and_then_newer_ones() {
    let scene = scene().await;
    let old = FencingToken::new("k", (7, 100));
    let sql = "UPDATE public.lockkeeper_fencing_server SET system_identifier = 1, base = 6";
    token(&scene.keeper, "k").await;
    scene.run(sql).await;
    scene
        .run("UPDATE public.lockkeeper_fencing SET epoch = 7, counter = 100")
        .await;
    let mut guard = take(&scene.keeper, "k").await;
    let error = guard.fencing_token().await.unwrap_err();
    assert_error(&error, ErrorKind::FencingNotSetUp, "is of another server");
    scene.keeper.fencing().set_up().await.unwrap();
    let token_of = guard.fencing_token().await.unwrap();
    assert_eq!(<(i64, i64)>::from(token_of), (8, 101));
    assert!(old < token_of);
    // The same cluster, from an old copy of its files.
    let floor = FencingToken::new("k", (8, 2000));
    scene.keeper.fencing().floor(floor).set_up().await.unwrap();
    scene.keeper.fencing().floor(floor).set_up().await.unwrap();
    drop(guard);
    assert_eq!(token(&scene.keeper, "k").await.epoch(), 9);
    // A later epoch than this server's is none that it can follow.
    scene
        .run("UPDATE public.lockkeeper_fencing SET epoch = 50")
        .await;
    let mut guard = take(&scene.keeper, "k").await;
    let error = guard.fencing_token().await.unwrap_err();
    assert_error(&error, ErrorKind::FencingNotSetUp, "later epoch");
    scene.keeper.fencing().set_up().await.unwrap();
    assert!(guard.fencing_token().await.unwrap().epoch() >= 50);
    drop(guard);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_checked_token_orders_what_is_written() {
    let scene = scene().await;
    let other = process(&scene);
    scene
        .run("CREATE TABLE t (n int); INSERT INTO t VALUES (0)")
        .await;
    let mut guard = take(&other, "k").await;
    let old = guard.fencing_token().await.unwrap();
    scene.terminate(guard.backend_pid().unwrap()).await;
    drop(guard);
    let write = async |keeper: &Keeper, token: FencingToken| {
        keeper
            .transaction(async |tx| {
                tx.check_fencing(token).await?;
                tx.execute("UPDATE t SET n = n + 1", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
    };
    // Nobody has had the lock since.
    write(&scene.keeper, old).await.unwrap();

    // Who has checked has until COMMIT.
    let (checked, check) = tokio::sync::oneshot::channel();
    let (go_on, end) = tokio::sync::oneshot::channel();
    let (checked, end) = (
        std::sync::Arc::new(std::sync::Mutex::new(Some(checked))),
        std::sync::Arc::new(tokio::sync::Mutex::new(Some(end))),
    );
    let writing = tokio::spawn({
        let keeper = scene.keeper.clone();
        async move {
            keeper
                .transaction(async |tx| {
                    tx.check_fencing(old).await?;
                    checked
                        .lock()
                        .unwrap()
                        .take()
                        .unwrap()
                        .send(tx.backend_pid())
                        .unwrap();
                    end.lock().await.take().unwrap().await.unwrap();
                    tx.execute("UPDATE t SET n = n + 1", &[]).await?;
                    Ok::<_, Error>(())
                })
                .await
        }
    });
    check.await.unwrap();
    let successor = tokio::spawn({
        let other = other.clone();
        async move { token(&other, "k").await }
    });
    scene.until_awaited_by(1, line("k")).await;
    go_on.send(()).unwrap();
    writing.await.unwrap().unwrap();
    let new = successor.await.unwrap();
    assert!(old < new);

    let error = write(&scene.keeper, old).await.unwrap_err();
    let text =
        format!("a newer fencing token was issued: \"k\": {old} is not the newest, which is {new}");
    assert_error(&error, ErrorKind::Fenced, &text);
    assert!(!error.is_retryable());
    write(&scene.keeper, new).await.unwrap();
    assert_eq!(scene.column("SELECT n FROM t").await, [3]);

    // A snapshot from before the newest token does not hide it.
    let options = TransactionOptions::new().isolation(IsolationLevel::RepeatableRead);
    let attempts = std::sync::atomic::AtomicU32::new(0);
    let checked = scene.keeper.transaction_with(options, async |tx| {
        tx.query("SELECT n FROM t", &[]).await?;
        if attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 {
            token(&other, "k").await;
        }
        tx.check_fencing(new).await
    });
    assert_eq!(checked.await.unwrap_err().kind(), ErrorKind::Fenced);
    assert_eq!(attempts.into_inner(), 2);

    // From another server: noted with the commit, and not without.
    let foreign = |counter| FencingToken::new("foreign", (3, counter));
    write(&scene.keeper, foreign(5)).await.unwrap();
    let rolled_back = scene.keeper.transaction(async |tx| {
        tx.check_fencing(foreign(9)).await?;
        Err::<(), _>(Error::from(
            tx.batch_execute("SELECT 1/0").await.unwrap_err(),
        ))
    });
    rolled_back.await.unwrap_err();
    assert_eq!(
        write(&scene.keeper, foreign(4)).await.unwrap_err().kind(),
        ErrorKind::Fenced
    );
    write(&scene.keeper, foreign(6)).await.unwrap();
    assert_eq!(
        write(&scene.keeper, foreign(5)).await.unwrap_err().kind(),
        ErrorKind::Fenced
    );
    scene.nothing_left().await;
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let scene = Scene::new(3).await;
    let role = format!("fenced_{}", scene.database.name());
    scene
        .run(&format!(
            "CREATE ROLE {role} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        ))
        .await;
    let restricted = Keeper::new(scene.database.pool_as(&role, 2));
    let mut guard = take(&restricted, "k").await;
    let error = guard.fencing_token().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::FencingNotSetUp,
        "fencing tokens are not set up: \"k\": there is no \"public\".\"lockkeeper_fencing\"; call keeper.fencing().set_up()",
    );
    let check = async || {
        let token = FencingToken::new("k", (1, 1));
        let checked = restricted.transaction(async |tx| tx.check_fencing(token).await);
        checked.await.map_err(|error: Error| error.kind())
    };
    assert_eq!(check().await, Err(ErrorKind::FencingNotSetUp));
    let error = restricted.fencing().set_up().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Database,
        "GRANT CREATE, USAGE ON SCHEMA \"public\"",
    );
    assert_error(&error, ErrorKind::Database, "the SQL of Fencing::sql");

    // As documented, by a role that may; twice.
    let sql = restricted.fencing().sql().unwrap();
    scene.run(&sql).await;
    scene.run(&sql).await;
    let error = guard.fencing_token().await.unwrap_err();
    let text = "GRANT SELECT, INSERT, UPDATE ON \"public\".\"lockkeeper_fencing\"";
    assert_error(&error, ErrorKind::Database, text);
    assert_eq!(check().await, Err(ErrorKind::Database));
    let error = restricted.fencing().set_up().await.unwrap_err();
    let text = "GRANT SELECT ON \"public\".\"lockkeeper_fencing\"";
    assert_error(&error, ErrorKind::Database, text);
    scene
        .run(&format!(
            "GRANT SELECT, INSERT, UPDATE ON lockkeeper_fencing TO {role}; \
             GRANT SELECT ON lockkeeper_fencing_server TO {role}"
        ))
        .await;
    // Nothing is missing, so that nothing is written.
    restricted.fencing().set_up().await.unwrap();
    let floor = restricted.fencing().floor((9, 0));
    let text = "GRANT SELECT, INSERT, UPDATE ON \"public\".\"lockkeeper_fencing\", \"public\".\"lockkeeper_fencing_server\"";
    assert_error(
        &floor.set_up().await.unwrap_err(),
        ErrorKind::Database,
        text,
    );
    assert_eq!(guard.fencing_token().await.unwrap().counter(), 1);
    assert_eq!(check().await, Ok(()));

    let role_of = scene.database.pool_as(&role, 1);
    scene
        .run("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
        .await;
    let mut other = take(&Keeper::new(role_of), "l").await;
    let error = other.fencing_token().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Database,
        "GRANT EXECUTE ON FUNCTION pg_control_system()",
    );
    drop((guard, other));
    scene.nothing_left().await;

    let elsewhere = scene.builder().coordination_schema("elsewhere").build();
    let error = elsewhere.fencing().set_up().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Database,
        "there is no schema \"elsewhere\"",
    );
    scene.run("CREATE SCHEMA elsewhere").await;
    elsewhere.fencing().set_up().await.unwrap();
    assert_eq!(token(&elsewhere, "k").await.counter(), 1);
    scene.nothing_left().await;
    scene
        .run(&format!("DROP OWNED BY {0}; DROP ROLE {0}", quoted(&role)))
        .await;
}

#[tokio::test]
async fn what_has_no_order_of_tenure_has_no_token() {
    let scene = scene().await;
    let lock = || scene.keeper.advisory_lock("k").session();
    let mut shared = lock().shared().acquire().await.unwrap();
    let error = shared.fencing_token().await.unwrap_err();
    assert_error(&error, ErrorKind::Config, "several holders at a time");
    shared.release().await.unwrap();
    let mut several = scene
        .keeper
        .advisory_locks(["k", "l"])
        .session()
        .acquire()
        .await
        .unwrap();
    let error = several.fencing_token().await.unwrap_err();
    assert_error(&error, ErrorKind::Config, "the guard holds several");
    several.release().await.unwrap();
    // What the caller has begun is not committed by the way.
    let mut guard = lock().acquire().await.unwrap();
    guard
        .batch_execute("BEGIN; CREATE TABLE t (id int)")
        .await
        .unwrap();
    let error = guard.fencing_token().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Config,
        "a transaction was left open on the guard",
    );
    guard.batch_execute("COMMIT").await.unwrap();
    assert_eq!(scene.count("t").await, 0);
    guard.fencing_token().await.unwrap();
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// Sessions with other defaults, and one that is read-only.
#[tokio::test]
async fn the_sessions_defaults_change_nothing() {
    let scene = scene().await;
    scene
        .set("default_transaction_isolation", "serializable")
        .await;
    scene.set("default_transaction_read_only", "on").await;
    scene.set("synchronous_commit", "off").await;
    let keeper = process(&scene);
    keeper.fencing().set_up().await.unwrap();
    let mut last = token(&keeper, "k").await;
    for _ in 0..3 {
        let next = token(&keeper, "k").await;
        assert!(last < next);
        last = next;
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_start_together_set_it_up_together() {
    let scene = Scene::new(2).await;
    let processes = (0..4).map(|_| {
        let keeper = process(&scene);
        tokio::spawn(async move { keeper.fencing().set_up().await })
    });
    for done in processes.collect::<Vec<_>>() {
        in_time("set_up", done).await.unwrap().unwrap();
    }
    assert_eq!(scene.count("public.lockkeeper_fencing_server").await, 1);
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_a_token_leaves_the_lock_and_nothing_else() {
    let scene = scene().await;
    let mut last = token(&scene.keeper, "k").await;
    for polls in 0.. {
        let mut guard = take(&scene.keeper, "k").await;
        let completed = poll_times_and_drop(guard.fencing_token(), polls)
            .await
            .is_some();
        assert!(!guard.is_lost(), "after {polls} polls");
        let next = guard.fencing_token().await.unwrap();
        assert!(last < next, "after {polls} polls: {last} and then {next}");
        last = next;
        guard.release().await.unwrap();
        scene.nothing_left().await;
        if completed {
            break;
        }
    }
    let set_up = || async { scene.keeper.fencing().floor(last).set_up().await };
    for polls in 0.. {
        scene
            .run("DROP TABLE lockkeeper_fencing, lockkeeper_fencing_server")
            .await;
        let completed = poll_times_and_drop(set_up(), polls).await.is_some();
        scene.nothing_left().await;
        set_up().await.unwrap();
        let error = scene.keeper.fencing().set_up().await;
        assert!(error.is_ok(), "after {polls} polls: {error:?}");
        if completed {
            break;
        }
    }
    assert!(token(&scene.keeper, "k").await > last);
}

/// A successor's token waits for who has checked the one before, as long as the keeper waits for locks.
#[tokio::test]
async fn a_token_is_not_waited_for_without_end() {
    let scene = scene().await;
    let old = token(&scene.keeper, "k").await;
    let hasty = Keeper::builder(scene.database.pool(2))
        .lock_wait(Duration::from_millis(200))
        .build();
    let checked = scene.keeper.transaction(async |tx| {
        tx.check_fencing(old).await?;
        let mut guard = take(&hasty, "k").await;
        let error = guard.fencing_token().await.unwrap_err();
        let text = "a transaction that has checked an older fencing token has not ended";
        assert_error_in("token", &error, ErrorKind::LockTimeout, text);
        assert!(!guard.is_lost());
        guard.release().await
    });
    checked.await.unwrap();
    assert!(token(&hasty, "k").await > old);
    scene.nothing_left().await;
}

/// Those who check with the token of a former holder do not overtake its successor, however many they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_not_starved_by_those_who_check_the_one_before() {
    let scene = scene().await;
    let old = token(&scene.keeper, "k").await;
    let writers = Keeper::new(scene.database.pool(3));
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let writer = |begun: tokio::sync::mpsc::UnboundedSender<tokio::sync::oneshot::Sender<()>>| {
        let keeper = writers.clone();
        tokio::spawn(async move {
            let checked = keeper.transaction(async |tx| {
                tx.check_fencing(old).await?;
                let (end, ends) = tokio::sync::oneshot::channel();
                begun.send(end).unwrap();
                ends.await.unwrap();
                Ok::<_, Error>(())
            });
            checked.await
        })
    };
    let first = writer(begun.clone());
    let end = begins.recv().await.unwrap();
    let successor = tokio::spawn({
        let keeper = process(&scene);
        async move { token(&keeper, "k").await }
    });
    scene.until_awaited_by(1, line("k")).await;
    // It stands behind the token.
    let second = writer(begun);
    scene.until_awaited_by(2, line("k")).await;
    end.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert!(in_time("the token", successor).await.unwrap() > old);
    let error = in_time("the second check", second).await.unwrap();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Fenced);
    scene.nothing_left().await;
}

/// Two who both bring a newer token of another server do not lock the older row for one another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_note_the_same_token_are_no_deadlock() {
    let scene = scene().await;
    token(&scene.keeper, "k").await;
    // One more who has locked the row, so that both are under way at the same time.
    let locked = scene.session().await;
    locked
        .client
        .batch_execute("BEGIN; SELECT FROM lockkeeper_fencing FOR SHARE")
        .await
        .unwrap();
    let foreign = FencingToken::new("k", (3, 1));
    let attempts = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let writers: Vec<_> = (0..2)
        .map(|_| {
            let (keeper, attempts) = (scene.keeper.clone(), attempts.clone());
            tokio::spawn(async move {
                let checked = keeper.transaction(async |tx| {
                    attempts.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    tx.check_fencing(foreign).await
                });
                checked.await
            })
        })
        .collect();
    scene.until_lock_waiters(2).await;
    locked.client.batch_execute("COMMIT").await.unwrap();
    for writer in writers {
        in_time("a check", writer).await.unwrap().unwrap();
    }
    assert_eq!(attempts.load(std::sync::atomic::Ordering::Relaxed), 2);
    scene.nothing_left().await;
}
