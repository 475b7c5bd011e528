//! Whose evidence an incident has, and what sampling costs the transactions that are sampled.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::incident::Completeness;
use lockkeeper::tokio_postgres::{self, NoTls};
use lockkeeper::{Error, ErrorKind, Incident, IncidentKind, Keeper, TransactionOptions};
use lockkeeper_testkit::{
    Fault, GIVE_UP_AFTER, IncidentScene, PoolMode, Proxy, eventually, until_blocking,
};
use tokio::sync::Notify;

const ONE: &str = "UPDATE account SET balance = balance + 1 WHERE id = 1";
const TWO: &str = "UPDATE account SET balance = balance + 1 WHERE id = 2";

/// A stranger who holds row 2, waits for row 1 once a session waits for row 2, and commits when it has both.
async fn survivor(reported: &IncidentScene) -> tokio::task::JoinHandle<()> {
    let client = reported.scene.database.connect().await;
    let sql = format!("SET deadlock_timeout = '1h'; BEGIN; {TWO}");
    client.batch_execute(&sql).await.unwrap();
    tokio::spawn(async move {
        until_blocking(&client).await;
        let sql = format!("{ONE}; COMMIT");
        client.batch_execute(&sql).await.unwrap();
    })
}

fn other(incident: &Incident) -> &lockkeeper::incident::Participant {
    let mut participants = incident.participants().iter();
    let found = participants.find(|participant| !participant.is_victim());
    found.unwrap_or_else(|| panic!("{incident}"))
}

/// The survivor's connection is back in the pool as soon as it has committed, while the victim's closure is still busy
/// with its error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_transaction_on_a_backend_is_not_taken_for_the_one_before() {
    let reported = IncidentScene::new(2).await;
    let keeper = reported.keeper();
    let (held, waits) = (&Notify::new(), &Notify::new());
    let (next_began, reported_it) = (&Notify::new(), &Notify::new());
    let attempts = &AtomicU32::new(0);
    let victim = keeper.transaction(async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) > 0 {
            reported_it.notify_one();
            return Ok::<_, Error>(());
        }
        tx.batch_execute(ONE).await?;
        waits.notified().await;
        let failed = tx.batch_execute(TWO).await;
        assert!(failed.is_err());
        next_began.notified().await;
        Ok(failed?)
    });
    let survivor = async {
        let line = line!() + 1;
        let done = keeper.transaction(async |tx| {
            tx.batch_execute("SET LOCAL deadlock_timeout = '1h'")
                .await?;
            tx.batch_execute(TWO).await?;
            waits.notify_one();
            held.notified().await;
            tx.batch_execute(ONE).await?;
            Ok::<_, Error>(())
        });
        done.await.unwrap();
        line
    };
    let closer = async {
        eventually("the first does not wait", async || {
            reported.scene.lock_waiters().await > 0
        })
        .await;
        held.notify_one();
    };
    let survived = async {
        let ((), line) = tokio::join!(closer, survivor);
        // It gets the survivor's connection: the pool has no other.
        let next = keeper.transaction(async |tx| {
            tx.batch_execute("SELECT 'the next one'").await?;
            next_began.notify_one();
            reported_it.notified().await;
            Ok::<_, Error>(())
        });
        next.await.unwrap();
        line
    };
    let (first, line) = tokio::join!(victim, survived);
    first.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::Deadlock, "{incident}");
    let other = other(&incident);
    assert_eq!(other.journal().len(), 3, "{incident}");
    let site = other.call_site().unwrap();
    assert!(site.ends_with(&format!("watching.rs:{line}")), "{incident}");
}

/// The transaction before on the session that a guard holds is over; the guard's lock is what is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_guard_is_not_taken_for_the_transaction_that_ran_on_it() {
    let reported = IncidentScene::new(3).await;
    let keeper = reported.keeper();
    let line = line!() + 1;
    let lock = keeper.advisory_lock("leader");
    let mut guard = lock.session().acquire().await.unwrap();
    let ran = guard.transaction(async |tx| {
        tx.batch_execute("SELECT count(*) FROM account").await?;
        Ok::<_, Error>(())
    });
    ran.await.unwrap();
    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_secs(2));
    let waited = keeper.transaction_with(options, async |tx| {
        let sql = format!(
            "SELECT pg_advisory_xact_lock({})",
            lockkeeper::LockKey::sql_expression("", "leader").unwrap()
        );
        tx.batch_execute(&sql).await.map_err(Error::from)
    });
    waited.await.unwrap_err();
    let incident = reported.after(1).await.remove(0);
    let site = other(&incident).call_site().unwrap().to_owned();
    assert!(site.ends_with(&format!("watching.rs:{line}")), "{incident}");
    assert!(!incident.to_string().contains("account"), "{incident}");
    drop(guard);
}

/// An error that is inspected before it is passed on, and statements that are sent together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_after_the_one_that_failed_do_not_hide_its_evidence() {
    for together in [false, true] {
        let reported = IncidentScene::new(3).await;
        let survivor = survivor(&reported).await;
        let attempts = AtomicU32::new(0);
        let ran = reported.keeper().transaction(async |tx| {
            tx.batch_execute(ONE).await?;
            if attempts.fetch_add(1, Ordering::Relaxed) == 0 && together {
                let (failed, behind) =
                    tokio::join!(tx.batch_execute(TWO), tx.batch_execute("SELECT 1"));
                assert!(behind.is_err());
                failed?;
            } else {
                let failed = tx.batch_execute(TWO).await;
                if failed.is_err() {
                    tx.batch_execute("SELECT 2").await.unwrap_err();
                }
                failed?;
            }
            Ok::<_, Error>(())
        });
        ran.await.unwrap();
        survivor.await.unwrap();
        let incident = reported.after(1).await.remove(0);
        assert_eq!(
            incident.completeness(),
            Completeness::Complete,
            "{incident}"
        );
        let statement = incident.victim().statement().unwrap();
        assert!(statement.starts_with("UPDATE"), "{incident}");
        let mut lines = incident.victim().journal().iter();
        let waited =
            lines.find(|line| line.mark() == Some(lockkeeper::incident::JournalMark::Waited));
        assert!(
            waited.unwrap().text().unwrap().starts_with("UPDATE"),
            "{incident}"
        );
    }
}

/// An error of the driver's own says nothing of why the transaction failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_the_driver_refuses_does_not_hide_what_the_server_refused() {
    let reported = IncidentScene::new(2).await;
    let holder = reported.scene.database.connect().await;
    let sql = format!("BEGIN; {ONE}");
    holder.batch_execute(&sql).await.unwrap();
    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_secs(2));
    let ran = reported.keeper().transaction_with(options, async |tx| {
        let failed = tx.savepoint(async |tx| Ok::<_, Error>(tx.batch_execute(ONE).await?));
        let failed = failed.await.unwrap_err();
        let none = tx.query_one("SELECT 1 WHERE false", &[]).await;
        assert!(none.unwrap_err().as_db_error().is_none());
        Err::<(), _>(failed)
    });
    ran.await.unwrap_err();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::LockTimeout);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    let statement = incident.victim().statement().unwrap();
    assert!(statement.starts_with("UPDATE"), "{incident}");
    holder.batch_execute("ROLLBACK").await.unwrap();
    reported.scene.nothing_left().await;
}

/// Delivers what is held once the side connection has been used for it. A loop of its own: a transaction's closure calls
/// it.
async fn until_sampled(side: &Proxy, held: &Proxy) {
    let mut questions = 0;
    let started = Instant::now();
    while started.elapsed() < GIVE_UP_AFTER {
        let (heard, _) = side.heard();
        questions += heard.iter().filter(|sql| sql.contains("pg_locks")).count();
        // One sample of what failed may have been on its way, which is two such questions.
        if questions > 2 {
            return held.deliver();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it is not sampled");
}

/// The statement after the one that failed runs for so long that it is sampled itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn samples_of_the_next_statement_do_not_replace_those_of_the_one_that_failed() {
    let reported = IncidentScene::new(1).await;
    let direct = reported.scene.database.config();
    let proxy = Proxy::before(reported.scene.database.server());
    let side = Proxy::before(reported.scene.database.server());
    let incidents = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = std::sync::Arc::clone(&incidents);
    let keeper = Keeper::builder(proxy.pool(&direct, 2))
        .side_connection(side.config(&direct), NoTls)
        .on_incident(move |incident| kept.lock().unwrap().push(incident.clone()))
        .build();
    let survivor = survivor(&reported).await;
    let attempts = AtomicU32::new(0);
    let ran = keeper.transaction(async |tx| {
        tx.batch_execute(ONE).await?;
        let failed = tx.batch_execute(TWO).await;
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            proxy.fault("SELECT 2", Fault::Hold);
            drop(side.heard());
            let (refused, ()) =
                tokio::join!(tx.batch_execute("SELECT 2"), until_sampled(&side, &proxy));
            refused.unwrap_err();
        }
        Ok::<_, Error>(failed?)
    });
    ran.await.unwrap();
    survivor.await.unwrap();
    eventually("no report", async || !incidents.lock().unwrap().is_empty()).await;
    let incident = incidents.lock().unwrap().remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    let statement = incident.victim().statement().unwrap();
    assert!(statement.starts_with("UPDATE"), "{incident}");
}

/// Deferred constraints are checked by COMMIT, which waits then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_waits_is_seen() {
    let reported = IncidentScene::new(3).await;
    let sql = "CREATE TABLE place (k int UNIQUE DEFERRABLE INITIALLY DEFERRED)";
    reported.scene.observer.batch_execute(sql).await.unwrap();
    let client = reported.scene.database.connect().await;
    let sql = "SET deadlock_timeout = '1h'; BEGIN; INSERT INTO place VALUES (1)";
    client.batch_execute(sql).await.unwrap();
    let inserted = &Notify::new();
    let attempts = &AtomicU32::new(0);
    let ran = reported.keeper().transaction(async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute("INSERT INTO place VALUES (2)").await?;
            tx.batch_execute("INSERT INTO place VALUES (1)").await?;
            inserted.notify_one();
        }
        Ok::<_, Error>(())
    });
    let survivor = async {
        inserted.notified().await;
        client
            .batch_execute("INSERT INTO place VALUES (2)")
            .await
            .unwrap();
        until_blocking(&client).await;
        client.batch_execute("COMMIT").await.unwrap();
    };
    let (ran, ()) = tokio::join!(ran, survivor);
    ran.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    assert_eq!(incident.victim().statement(), Some("COMMIT"), "{incident}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debug_of_transactions_and_guards_shows_no_statement() {
    let reported = IncidentScene::new(2).await;
    let mut guard = reported
        .keeper()
        .advisory_lock("leader")
        .session()
        .acquire()
        .await
        .unwrap();
    guard.batch_execute("SELECT 'secret'").await.unwrap();
    let shown = guard.transaction(async |tx| {
        tx.batch_execute("SELECT 'secret'").await?;
        Ok::<_, Error>(format!("{tx:?}"))
    });
    let shown = shown.await.unwrap();
    assert!(!shown.contains("secret"), "{shown}");
    let shown = format!("{guard:?}");
    assert!(!shown.contains("secret"), "{shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_wait_says_which_attempt_it_is() {
    let reported = IncidentScene::with(3, |builder, database| {
        builder
            .side_connection(database.config(), NoTls)
            // Longer than the deadlock lasts.
            .long_wait(Duration::from_secs(6))
    })
    .await;
    let survivor = survivor(&reported).await;
    let holder = reported.scene.database.connect().await;
    let attempts = &AtomicU32::new(0);
    let options = TransactionOptions::new().attempts(3);
    let ran = reported.keeper().transaction_with(options, async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute(ONE).await?;
            tx.batch_execute(TWO).await?;
        }
        tx.batch_execute("UPDATE account SET balance = 0 WHERE id = 3")
            .await?;
        Ok::<_, Error>(())
    });
    let sql = "BEGIN; UPDATE account SET balance = 1 WHERE id = 3";
    holder.batch_execute(sql).await.unwrap();
    let watching = async {
        reported.after(1).await;
        reported.after(2).await;
        holder.batch_execute("ROLLBACK").await.unwrap();
    };
    let (ran, ()) = tokio::join!(ran, watching);
    ran.unwrap();
    survivor.await.unwrap();
    let long = reported.incidents().remove(1);
    assert_eq!(long.kind(), IncidentKind::LongWait);
    assert_eq!((long.attempt(), long.attempts()), (2, 3));
}

/// Where there is no side connection, a question that fails costs no connection of the pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sample_that_fails_closes_no_connection_of_the_pool() {
    let mut reported = IncidentScene::with(1, |builder, _| builder).await;
    let database = &reported.scene.database;
    let role = format!("{}_blind", database.name());
    let sql = format!(
        "CREATE ROLE {role} LOGIN; CREATE FUNCTION bump() RETURNS void SECURITY DEFINER LANGUAGE sql AS '{ONE}'"
    );
    reported.scene.observer.batch_execute(&sql).await.unwrap();
    let pool = database.pool_as(&role, 2);
    // Both are open by then: a login that takes too long would be begun once more.
    drop((pool.get().await.unwrap(), pool.get().await.unwrap()));
    reported.scene.keeper = Keeper::builder(pool).build();
    let holder = reported.scene.database.connect().await;
    holder
        .batch_execute(&format!("BEGIN; {ONE}"))
        .await
        .unwrap();
    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_millis(1200));
    // Of sessions that have asked something.
    let pids = async || {
        let sql = "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE usename = $1 AND query <> ''";
        let row = reported
            .scene
            .observer
            .query_one(sql, &[&role])
            .await
            .unwrap();
        row.get::<_, Option<Vec<i32>>>(0).unwrap_or_default()
    };
    let seen = std::sync::Mutex::new(std::collections::BTreeSet::new());
    let waited = reported.keeper().transaction_with(options, async |tx| {
        tx.batch_execute("SELECT bump()").await.map_err(Error::from)
    });
    let mut waited = std::pin::pin!(waited);
    let error = loop {
        tokio::select! {
            result = &mut waited => break result.unwrap_err(),
            pids = pids() => seen.lock().unwrap().extend(pids),
        }
    };
    drop(error);
    let seen = seen.into_inner().unwrap();
    assert_eq!(
        seen.len(),
        2,
        "the transaction's, and the sampler's: {seen:?}"
    );
}

/// However many slow statements there are, one sample is taken of all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_statements_are_sampled_together() {
    const SLOW: u8 = 16;
    let reported = IncidentScene::new(1).await;
    let proxy = Proxy::before(reported.scene.database.server());
    let direct = reported.scene.database.config();
    let pool = reported.scene.database.pool(usize::from(SLOW));
    let mut all = Vec::new();
    for _ in 0..SLOW {
        all.push(pool.get().await.unwrap());
    }
    drop(all);
    let keeper = Keeper::builder(pool)
        .side_connection(proxy.config(&direct), NoTls)
        .build();
    let began = Instant::now();
    let mut slow = tokio::task::JoinSet::new();
    for n in 0..SLOW {
        let keeper = keeper.clone();
        slow.spawn(async move {
            let ran = keeper.transaction(async |tx| {
                // One after another, as statements come: what is tested is that they are asked about together.
                tokio::time::sleep(Duration::from_millis(u64::from(n) * 7)).await;
                tx.batch_execute("SELECT pg_sleep(2)")
                    .await
                    .map_err(Error::from)
            });
            ran.await.unwrap();
        });
    }
    while let Some(done) = slow.join_next().await {
        done.unwrap();
    }
    let (heard, _) = proxy.heard();
    let samples = heard.iter().filter(|sql| sql.contains("pg_locks")).count();
    assert!(samples >= 5, "{samples}");
    let took = began.elapsed();
    assert!(
        samples as f64 <= 15.0 * took.as_secs_f64(),
        "{samples} samples in {took:?}"
    );
}

/// A server that refuses logins has trouble enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_connection_that_is_refused_is_not_asked_for_ten_times_a_second() {
    let logins = std::sync::Arc::new(AtomicU32::new(0));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let counted = std::sync::Arc::clone(&logins);
    let accepting = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            drop(stream);
        }
    });
    let reported = IncidentScene::with(2, |builder, database| {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(port)
            .user("nobody")
            .dbname(database.name());
        builder.side_connection(config, NoTls)
    })
    .await;
    let ran = reported.keeper().transaction(async |tx| {
        tx.batch_execute("SELECT pg_sleep(3)")
            .await
            .map_err(Error::from)
    });
    ran.await.unwrap();
    accepting.abort();
    let logins = logins.load(Ordering::Relaxed);
    assert!((2..=8).contains(&logins), "{logins} logins in 3 s");
}

/// A side connection that is led through a transaction pooler all the same must not leave its settings to others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_connection_through_a_pooler_leaves_no_settings() {
    let reported = IncidentScene::new(1).await;
    let server = reported.scene.database.server();
    let settings = [("default_pool_size", "1")];
    let bouncer = match server.pgbouncer_with(
        PoolMode::Transaction,
        reported.scene.database.name(),
        &settings,
    ) {
        Ok(bouncer) => bouncer,
        Err(skip) => return skip.report("watching::a_side_connection_through_a_pooler"),
    };
    let keeper = Keeper::builder(bouncer.pool(2))
        .side_connection(bouncer.config(), NoTls)
        .build();
    drop(keeper.monitor().snapshot().await.unwrap());
    let pool = bouncer.pool(1);
    let client = pool.get().await.unwrap();
    for (setting, expected) in [("statement_timeout", "0"), ("lock_timeout", "0")] {
        let said = client
            .simple_query(&format!("SHOW {setting}"))
            .await
            .unwrap();
        let row = said.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        assert_eq!(row, Some(expected), "{setting}");
    }
    drop(keeper);
}

/// The name of a key's column is remembered; it may change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_is_named_by_its_key_after_the_key_was_renamed() {
    let reported = IncidentScene::new(3).await;
    let mut keys = Vec::new();
    for column in ["id", "number", "number"] {
        if keys.len() == 1 {
            let sql = "ALTER TABLE account RENAME COLUMN id TO number";
            reported.scene.observer.batch_execute(sql).await.unwrap();
        }
        let sql = format!("UPDATE account SET balance = 1 WHERE {column} = 1");
        let holder = reported.scene.database.connect().await;
        holder
            .batch_execute(&format!("BEGIN; {sql}"))
            .await
            .unwrap();
        let options = TransactionOptions::new()
            .attempts(1)
            .lock_timeout(Duration::from_secs(2));
        let waited = reported.keeper().transaction_with(options, async |tx| {
            tx.batch_execute(&sql).await.map_err(Error::from)
        });
        waited.await.unwrap_err();
        let incident = reported.after(keys.len() + 1).await.pop().unwrap();
        keys.push(incident.edges()[0].row_key().map(ToString::to_string));
        holder.batch_execute("ROLLBACK").await.unwrap();
    }
    assert_eq!(keys[0].as_deref(), Some("id = 1"));
    assert_eq!(keys[2].as_deref(), Some("number = 1"));
}

/// Preparing a statement takes locks too. The wait that ends it is sampled, and the report has the samples.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepare_that_fails_is_the_statement_that_waited() {
    let reported = IncidentScene::new(3).await;
    let holder = reported.scene.database.connect().await;
    holder
        .batch_execute("BEGIN; LOCK TABLE account")
        .await
        .unwrap();
    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_secs(1));
    let failed = reported.keeper().transaction_with(options, async |tx| {
        tx.prepare("SELECT balance FROM account").await?;
        Ok::<_, Error>(())
    });
    let error = failed.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    holder.batch_execute("ROLLBACK").await.unwrap();

    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.edges().len(), 1, "{incident}");
    let journal = incident.victim().journal();
    assert_eq!(journal.len(), 1, "{incident}");
    assert!(journal[0].failed(), "{incident}");
    assert_eq!(journal[0].text(), Some("SELECT balance FROM account"));
    reported.scene.nothing_left().await;
}

/// Everything that could begin a transaction, but is not polled.
fn describe_and_drop(keeper: &Keeper) {
    drop(keeper.transaction(async |_| Ok::<_, Error>(())));
    let options = TransactionOptions::new().conflict_group("g");
    drop(keeper.transaction_with(options, async |_| Ok::<_, Error>(())));
    drop(keeper.with_advisory_lock("k", async |_| Ok::<_, Error>(())));
    drop(keeper.try_with_advisory_lock("k", async |_| Ok::<_, Error>(())));
    let backfill = || keeper.backfill("account", "id").set("balance = 0");
    drop(backfill().run());
    drop(backfill().try_run());
    drop(backfill().stream());
    drop(keeper.backfill("account", "id"));
}

#[tokio::test]
async fn nothing_is_started_before_a_future_is_awaited() {
    let reported = IncidentScene::new(2).await;
    let side = Proxy::before(reported.scene.database.server());
    let keeper = reported
        .scene
        .builder()
        .side_connection(side.config(&reported.scene.database.config()), NoTls)
        .build();
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    describe_and_drop(&keeper);
    assert_eq!(tasks(), before);
    // Refused before it begins.
    let refused = TransactionOptions::new().attempts(0);
    let refused = keeper.transaction_with(refused, async |_| Ok::<_, Error>(()));
    assert_eq!(refused.await.unwrap_err().kind(), ErrorKind::Config);
    assert_eq!(tasks(), before);
    tokio::task::yield_now().await;
    assert_eq!(side.traffic(), lockkeeper_testkit::Traffic::default());
    let ran = keeper.transaction(async |_| Ok::<_, Error>(()));
    ran.await.unwrap();
    eventually("the side connection is not opened", async || {
        side.traffic().down > 0
    })
    .await;
}

#[test]
fn futures_are_created_without_a_runtime() {
    let config = tokio_postgres::Config::new();
    let manager = lockkeeper::deadpool_postgres::Manager::new(config.clone(), NoTls);
    let pool = lockkeeper::deadpool_postgres::Pool::builder(manager);
    let keeper = Keeper::builder(pool.build().unwrap()).side_connection(config, NoTls);
    describe_and_drop(&keeper.build());
}
