//! What is reported of deadlocks, lock timeouts and long waits, and that reporting holds up nothing.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockkeeper::incident::{Cause, Completeness};
use lockkeeper::tokio_postgres::{self, Client, NoTls};
use lockkeeper::{Error, ErrorKind, IncidentKind, Keeper, TransactionOptions};
use lockkeeper_testkit::{GIVE_UP_AFTER, IncidentScene, Skip, assert_error, eventually, in_time};
use tokio::sync::{Barrier, Semaphore};

/// So that two transactions have their first lock before either wants its second, in their first attempts only.
struct Meeting {
    barrier: Barrier,
    arrivals: AtomicU32,
    finished: Semaphore,
}

impl Meeting {
    fn new() -> Self {
        Self {
            barrier: Barrier::new(2),
            arrivals: AtomicU32::new(0),
            finished: Semaphore::new(0),
        }
    }

    /// A row's lock is not handed over: who comes back at once may take it before the one who was woken for it, and close
    /// the cycle again.
    async fn let_the_other_finish(&self) {
        let finished = tokio::time::timeout(GIVE_UP_AFTER, self.finished.acquire());
        drop(finished.await);
    }

    async fn meet(&self) {
        if self.arrivals.fetch_add(1, Ordering::Relaxed) < 2 {
            self.barrier.wait().await;
        }
    }
}

/// Writes one row, meets, and writes another. The attempts it took.
async fn write_two(
    keeper: &Keeper,
    options: TransactionOptions,
    meeting: &Meeting,
    [first, second]: [&str; 2],
) -> Result<u32, Error> {
    let attempts = &AtomicU32::new(0);
    keeper
        .transaction_with(options, async |tx| {
            let attempt = attempts.fetch_add(1, Ordering::Relaxed) + 1;
            if attempt > 1 {
                meeting.let_the_other_finish().await;
            }
            tx.batch_execute(first).await?;
            meeting.meet().await;
            tx.batch_execute(second).await?;
            Ok(attempt)
        })
        .await
        .inspect(|_| meeting.finished.add_permits(1))
}

const ONE: &str = "UPDATE account SET balance = balance + 7711 WHERE id = 1";
const TWO: &str = "UPDATE account SET balance = balance - 7712 WHERE id = 2";

/// Takes row 2 and then waits for row 1, as a session that does not use the library; commits at once when it has both.
async fn stranger(client: Client, meeting: &Meeting) {
    // It has no deadlock check itself, so that the other one is the victim.
    client
        .batch_execute("SET deadlock_timeout = '1h'; BEGIN")
        .await
        .unwrap();
    client.batch_execute(TWO).await.unwrap();
    meeting.meet().await;
    // Second in the cycle, so that the other one finds it closed.
    eventually("the other one does not wait", async || {
        let sql = "SELECT count(*) FROM pg_locks \
                   WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    client
        .batch_execute(&format!("{ONE}; COMMIT"))
        .await
        .unwrap();
    meeting.finished.add_permits(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_names_both_statements_both_call_sites_the_relation_and_the_rows_key() {
    let reported = IncidentScene::new(4).await;
    let meeting = Meeting::new();
    let options = TransactionOptions::new;
    let (one, other) = tokio::join!(
        write_two(reported.keeper(), options(), &meeting, [ONE, TWO]),
        write_two(reported.keeper(), options(), &meeting, [TWO, ONE]),
    );
    let mut attempts = [one.unwrap(), other.unwrap()];
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 2], "exactly one is retried");

    let incidents = reported.after(1).await;
    assert_eq!(incidents.len(), 1);
    let incident = &incidents[0];
    assert_eq!(incident.kind(), IncidentKind::Deadlock);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    assert_eq!(incident.diagnosis().cause(), Cause::OrderInversion);
    assert_eq!(incident.participants().len(), 2);
    for participant in incident.participants() {
        assert!(participant.is_in_this_process());
        let site = participant.call_site().unwrap();
        assert!(site.contains("tests/it/incidents.rs:"), "{site}");
        let statement = participant.statement().unwrap();
        assert!(
            statement.starts_with("UPDATE account SET balance = balance"),
            "{statement}"
        );
        assert_eq!(participant.journal().len(), 2, "{incident}");
    }
    let statements: Vec<_> = incident
        .participants()
        .iter()
        .map(|p| p.statement())
        .collect();
    assert_ne!(statements[0], statements[1]);
    let mut keys: Vec<_> = incident
        .cycle()
        .iter()
        .map(|edge| {
            assert_eq!(edge.relation().unwrap().name(), Some("account"));
            edge.row_key().unwrap().to_string()
        })
        .collect();
    keys.sort();
    assert_eq!(keys, ["id = 1", "id = 2"]);
    let page = incident.to_string();
    for text in [
        "public.account",
        "id = 1",
        "id = 2",
        "UPDATE account",
        "incidents.rs",
    ] {
        assert!(page.contains(text), "{text} is not in\n{page}");
    }
    reported.scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_side_may_be_anybody() {
    let reported = IncidentScene::new(3).await;
    let meeting = Meeting::new();
    let mut config = reported.scene.database.config();
    config.application_name("stranger");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    let (attempts, ()) = tokio::join!(
        write_two(
            reported.keeper(),
            TransactionOptions::new(),
            &meeting,
            [ONE, TWO]
        ),
        stranger(client, &meeting),
    );
    assert_eq!(attempts.unwrap(), 2);
    connection.await.unwrap().unwrap();

    let incident = reported.after(1).await.remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    let other = incident
        .participants()
        .iter()
        .find(|p| !p.is_victim())
        .unwrap();
    assert!(!other.is_in_this_process());
    assert_eq!(other.application_name(), Some("stranger"));
    let statement = other.statement().unwrap();
    assert!(
        statement.contains("UPDATE account SET balance = balance + ? WHERE id = ?"),
        "{statement}"
    );
    let edge = incident
        .cycle()
        .iter()
        .find(|edge| edge.waiter() == other.id().unwrap());
    assert_eq!(edge.unwrap().row_key().unwrap().to_string(), "id = 1");
}

/// Without a side connection the watcher borrows one of the pool's, if one is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_side_connection_the_pool_is_asked() {
    let reported = IncidentScene::with(3, |builder, _| builder).await;
    let meeting = Meeting::new();
    let (attempts, ()) = tokio::join!(
        write_two(
            reported.keeper(),
            TransactionOptions::new(),
            &meeting,
            [ONE, TWO]
        ),
        stranger(reported.scene.database.connect().await, &meeting),
    );
    assert_eq!(attempts.unwrap(), 2);
    let incident = reported.after(1).await.remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    reported.scene.nothing_left().await;
}

/// All of the pool is in use, and no sample can be taken: both sides' own journals and the server's DETAIL are left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_sample_both_sides_are_known_by_their_journals() {
    for watch in [true, false] {
        let reported = IncidentScene::with(2, |builder, _| builder.watch(watch)).await;
        let meeting = Meeting::new();
        let options = TransactionOptions::new;
        let (one, other) = tokio::join!(
            write_two(reported.keeper(), options(), &meeting, [ONE, TWO]),
            write_two(reported.keeper(), options(), &meeting, [TWO, ONE]),
        );
        assert_eq!(one.unwrap() + other.unwrap(), 3);
        let incident = reported.after(1).await.remove(0);
        let statements = incident.participants().iter().filter_map(|p| p.statement());
        assert_eq!(statements.count(), 2, "{incident}");
        let sites = incident.participants().iter().filter_map(|p| p.call_site());
        assert_eq!(sites.count(), 2, "{incident}");
        assert_eq!(incident.cycle().len(), 2, "{incident}");
        assert!(incident.caveats().next().is_some(), "{incident}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_of_advisory_locks_names_them() {
    let reported = IncidentScene::new(4).await;
    let meeting = Meeting::new();
    let lock_two = async |first: &'static str, second: &'static str| {
        let meeting = &meeting;
        let locked = reported.keeper().transaction(async move |tx| {
            tx.advisory_lock(first).await?;
            meeting.meet().await;
            tx.advisory_lock(second).await?;
            Ok::<_, Error>(())
        });
        locked.await.unwrap();
    };
    tokio::join!(lock_two("acct:1", "acct:2"), lock_two("acct:2", "acct:1"));
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::Deadlock);
    let page = incident.to_string();
    for text in ["\"acct:1\"", "\"acct:2\"", "advisory_locks"] {
        assert!(page.contains(text), "{text} is not in\n{page}");
    }
    reported.scene.nothing_left().await;
}

/// A `lock_timeout` below `deadlock_timeout` ends the wait before the server's deadlock check.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_that_a_lock_timeout_hides_is_found() {
    let reported = IncidentScene::new(4).await;
    let meeting = Meeting::new();
    // One gives up well before the other, which then has what it waits for.
    let options = |time| TransactionOptions::new().lock_timeout(Duration::from_millis(time));
    let (one, other) = tokio::join!(
        write_two(reported.keeper(), options(1600), &meeting, [ONE, TWO]),
        write_two(reported.keeper(), options(2600), &meeting, [TWO, ONE]),
    );
    one.unwrap();
    other.unwrap();
    let incidents = reported.after(1).await;
    let hidden = incidents
        .iter()
        .find(|i| i.kind() == IncidentKind::HiddenDeadlock);
    let hidden = hidden.unwrap_or_else(|| panic!("{incidents:#?}"));
    assert_eq!(hidden.sqlstate(), Some("55P03"));
    assert_eq!(hidden.cycle().len(), 2, "{hidden}");
    assert_eq!(
        hidden.diagnosis().cause(),
        Cause::OrderInversion,
        "{hidden}"
    );
    reported.scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_timeout_names_the_holder_and_the_error_carries_the_report() {
    let reported = IncidentScene::new(3).await;
    // The server's deadlock check has run by then.
    reported.scene.set("deadlock_timeout", "1s").await;
    let holder = reported.scene.database.connect().await;
    holder
        .batch_execute(&format!("SET application_name = 'forgetful'; BEGIN; {ONE}"))
        .await
        .unwrap();
    let options = TransactionOptions::new()
        .attempts(2)
        .lock_timeout(Duration::from_secs(2));
    let error = reported
        .keeper()
        .transaction_with(options, async |tx| {
            tx.batch_execute(ONE).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::RetriesExhausted,
        "2 attempts (SQLSTATE 55P03)",
    );
    let incident = error.incident().expect("the last report");
    assert_eq!(incident.kind(), IncidentKind::LockTimeout);
    assert_eq!((incident.attempt(), incident.attempts()), (2, 2));
    assert_eq!(
        incident.diagnosis().cause(),
        Cause::IdleInTransaction,
        "{incident}"
    );
    let other = incident
        .participants()
        .iter()
        .find(|p| !p.is_victim())
        .unwrap();
    assert_eq!(other.application_name(), Some("forgetful"));
    assert_eq!(other.state(), Some("idle in transaction"));
    let incidents = reported.after(2).await;
    assert_eq!(incidents.len(), 2, "one for each attempt");
    assert_eq!(incidents[0].fingerprint(), incidents[1].fingerprint());
    assert_eq!(incidents[1].count(), 2);
    holder.batch_execute("ROLLBACK").await.unwrap();
    reported.scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_wait_is_reported_once_while_it_lasts() {
    let reported = IncidentScene::with(3, |builder, database| {
        builder
            .side_connection(database.config(), NoTls)
            .long_wait(Duration::from_millis(300))
    })
    .await;
    let holder = reported.scene.database.connect().await;
    holder
        .batch_execute(&format!("BEGIN; {ONE}"))
        .await
        .unwrap();
    let keeper = reported.keeper().clone();
    let waiter = tokio::spawn(async move {
        let written =
            keeper.transaction(async |tx| tx.batch_execute(ONE).await.map_err(Error::from));
        written.await
    });
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::LongWait);
    assert!(!waiter.is_finished());
    // Several samples later it is still one report.
    let backend = incident.victim().pid().unwrap();
    eventually("no later sample", async || {
        let sql =
            "SELECT clock_timestamp() - query_start > '2 s' FROM pg_stat_activity WHERE pid = $1";
        let row = reported
            .scene
            .observer
            .query_one(sql, &[&backend])
            .await
            .unwrap();
        row.get(0)
    })
    .await;
    assert_eq!(reported.incidents().len(), 1);
    holder.batch_execute("COMMIT").await.unwrap();
    waiter.await.unwrap().unwrap();
    assert_eq!(reported.incidents().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_wait_for_an_advisory_lock_is_one_wait() {
    let reported = IncidentScene::with(2, |builder, database| {
        builder
            .side_connection(database.config(), NoTls)
            .long_wait(Duration::from_secs(5))
    })
    .await;
    let holder = reported.scene.database.connect().await;
    let key = lockkeeper::LockKey::from("long");
    let sql = format!(
        "BEGIN; SELECT pg_advisory_xact_lock({})",
        key.as_i64().unwrap()
    );
    holder.batch_execute(&sql).await.unwrap();
    let keeper = reported.keeper().clone();
    let waiter = tokio::spawn(async move {
        let ran = keeper.transaction(async |tx| {
            let lock = tx.advisory_lock("long").wait(Duration::from_secs(60));
            lock.await
        });
        ran.await
    });
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::LongWait);
    assert_eq!(
        incident.victim().statement(),
        Some("advisory_lock(\"long\")")
    );
    assert!(!waiter.is_finished());
    holder.batch_execute("COMMIT").await.unwrap();
    waiter.await.unwrap().unwrap();
    assert_eq!(reported.incidents().len(), 1);
    reported.scene.nothing_left().await;
}

/// Item by item: statements of ours, of another session, in the page, in `Debug`, in errors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn literals_are_shown_only_when_asked_for() {
    for show in [false, true] {
        let reported = IncidentScene::with(3, |builder, database| {
            builder
                .side_connection(database.config(), NoTls)
                .show_literals(show)
        })
        .await;
        let meeting = Meeting::new();
        let (attempts, ()) = tokio::join!(
            write_two(
                reported.keeper(),
                TransactionOptions::new(),
                &meeting,
                [
                    "UPDATE account SET note = 'secret 4711' WHERE id = 1",
                    "UPDATE account SET note = $$secret 4712$$ WHERE id = 2 -- secret 4713",
                ]
            ),
            stranger(reported.scene.database.connect().await, &meeting),
        );
        assert_eq!(attempts.unwrap(), 2);
        let incident = reported.after(1).await.remove(0);
        let shown = format!("{incident}\n{incident:?}");
        assert_eq!(shown.contains("secret"), show, "{shown}");
        assert_eq!(shown.contains("7711"), show, "{shown}");
    }
}

/// A role that sees nothing of other roles' statements gets the same report, with the hidden parts marked as hidden.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_privileges_gets_the_same_report_with_what_is_hidden_marked() {
    let mut reported = IncidentScene::new(1).await;
    let database = &reported.scene.database;
    let role = format!("{}_plain", database.name());
    reported
        .scene
        .observer
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT SELECT, UPDATE ON account TO {role}"
        ))
        .await
        .unwrap();
    let mut config = database.config();
    config.user(&role);
    let manager = lockkeeper::deadpool_postgres::Manager::new(config.clone(), NoTls);
    let pool = lockkeeper::deadpool_postgres::Pool::builder(manager)
        .max_size(2)
        .build()
        .unwrap();
    let builder = Keeper::builder(pool)
        .application("plain")
        .side_connection(config, NoTls);
    reported.scene.keeper = reported.kept(builder).build();
    let meeting = Meeting::new();
    let (attempts, ()) = tokio::join!(
        write_two(
            reported.keeper(),
            TransactionOptions::new(),
            &meeting,
            [ONE, TWO]
        ),
        stranger(reported.scene.database.connect().await, &meeting),
    );
    assert_eq!(attempts.unwrap(), 2);
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::Deadlock);
    assert_eq!(incident.cycle().len(), 2, "{incident}");
    for edge in incident.cycle() {
        assert_eq!(edge.relation().unwrap().name(), Some("account"));
        assert!(edge.row_key().is_some(), "{incident}");
    }
    assert!(incident.victim().statement().is_some());
    let other = incident
        .participants()
        .iter()
        .find(|p| !p.is_victim())
        .unwrap();
    assert!(other.is_hidden(), "{incident}");
    assert_eq!(other.statement(), None);
    assert_eq!(other.state(), None);
    assert!(incident.to_string().contains("hidden"), "{incident}");
}

/// The server's other languages make no difference: with samples, and with nothing but its DETAIL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_report_is_the_same_in_other_languages() {
    let mut expected = None;
    for locale in [
        "C",
        "de_DE.UTF-8",
        "ja_JP.UTF-8",
        "ru_RU.UTF-8",
        "zh_CN.UTF-8",
    ] {
        for watch in [true, false] {
            let reported = IncidentScene::with(4, |builder, database| {
                builder
                    .side_connection(database.config(), NoTls)
                    .watch(watch)
            })
            .await;
            let name = reported.scene.database.name();
            let spoken = format!("ALTER DATABASE {name} SET lc_messages = '{locale}'");
            if reported
                .scene
                .observer
                .batch_execute(&spoken)
                .await
                .is_err()
            {
                Skip::new("locales", format!("the system has no {locale}")).report("incidents");
                return;
            }
            let meeting = Meeting::new();
            let options = TransactionOptions::new;
            let (one, other) = tokio::join!(
                write_two(reported.keeper(), options(), &meeting, [ONE, TWO]),
                write_two(reported.keeper(), options(), &meeting, [TWO, ONE]),
            );
            assert_eq!(one.unwrap() + other.unwrap(), 3);
            let incident = reported.after(1).await.remove(0);
            let mut facts: Vec<String> = incident
                .participants()
                .iter()
                .map(|p| format!("{:?} {:?}", p.call_site(), p.statement()))
                .collect();
            facts.extend(
                incident
                    .cycle()
                    .iter()
                    .map(|edge| edge.mode_wanted().to_owned()),
            );
            facts.sort();
            facts.push(format!(
                "{:?} {:?}",
                incident.kind(),
                incident.diagnosis().cause()
            ));
            // The CONTEXT names the relation where no sample does.
            facts.push(incident.to_string().contains("account").to_string());
            let expected = expected.get_or_insert_with(|| facts.clone());
            assert_eq!(&facts, expected, "{locale}, watching: {watch}\n{incident}");
        }
    }
}

/// However the side connection fails, transactions run as they would, and the report says what is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_connection_that_fails_holds_up_nothing() {
    // Nothing listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = closed.local_addr().unwrap().port();
    drop(closed);
    // The port is listened on, and never answered.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    for port in [refused, silent_port] {
        let reported = IncidentScene::with(3, |builder, database| {
            let mut config = tokio_postgres::Config::new();
            config
                .host("127.0.0.1")
                .port(port)
                .user("nobody")
                .dbname(database.name());
            builder.side_connection(config, NoTls)
        })
        .await;
        let meeting = Meeting::new();
        // Most of it is the server's deadlock_timeout.
        let (attempts, ()) = tokio::time::timeout(Duration::from_secs(12), async {
            tokio::join!(
                write_two(
                    reported.keeper(),
                    TransactionOptions::new(),
                    &meeting,
                    [ONE, TWO]
                ),
                stranger(reported.scene.database.connect().await, &meeting),
            )
        })
        .await
        .expect("held up");
        assert_eq!(attempts.unwrap(), 2);
        let incident = reported.after(1).await.remove(0);
        assert_eq!(incident.kind(), IncidentKind::Deadlock);
        assert!(incident.victim().statement().is_some());
        let missing: Vec<_> = incident.caveats().collect();
        assert!(
            missing
                .iter()
                .any(|text| text.contains("could not be looked at")),
            "{missing:?}"
        );
        reported.scene.nothing_left().await;
    }
}

/// The side connection's backend is terminated between two incidents: the next one is seen all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_connection_that_died_is_opened_again() {
    let reported = IncidentScene::new(3).await;
    for round in 1..=2 {
        let meeting = Meeting::new();
        let (attempts, ()) = tokio::join!(
            write_two(
                reported.keeper(),
                TransactionOptions::new(),
                &meeting,
                [ONE, TWO]
            ),
            stranger(reported.scene.database.connect().await, &meeting),
        );
        assert_eq!(attempts.unwrap(), 2);
        let incident = reported.after(round).await.remove(round - 1);
        assert_eq!(
            incident.completeness(),
            Completeness::Complete,
            "{incident}"
        );
        let killed = reported
            .scene
            .observer
            .query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE datname = current_database() AND application_name = 'lockkeeper side connection'",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(killed.len(), 1, "one side connection");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_or_panicking_sink_holds_up_nothing() {
    let calls = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&calls);
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let reported = IncidentScene::with(3, |builder, _| {
        builder.watch(false).on_incident(move |_| {
            let call = counted.fetch_add(1, Ordering::Relaxed);
            assert!(call > 0, "the first call panics");
            if call == 1 {
                held.lock().unwrap().recv().ok();
            }
        })
    })
    .await;
    let holder = reported.scene.database.connect().await;
    holder
        .batch_execute(&format!("BEGIN; {ONE}"))
        .await
        .unwrap();
    let time_out = async || {
        let options = TransactionOptions::new()
            .attempts(1)
            .lock_timeout(Duration::from_millis(5));
        let waited = reported.keeper().transaction_with(options, async |tx| {
            tx.batch_execute(ONE).await.map_err(Error::from)
        });
        waited.await.unwrap_err()
    };
    // More than wait for a sink; the late ones are dropped.
    for _ in 0..80 {
        let error = in_time("held up", time_out()).await;
        assert_error(&error, ErrorKind::LockTimeout, "SQLSTATE 55P03");
    }
    eventually("the sink is not called again after a panic", async || {
        calls.load(Ordering::Relaxed) == 2
    })
    .await;
    release.send(()).unwrap();
    eventually("what waited is not handed out", async || {
        calls.load(Ordering::Relaxed) > 60
    })
    .await;
    assert!(calls.load(Ordering::Relaxed) < 80, "some are dropped");
    holder.batch_execute("ROLLBACK").await.unwrap();
}

/// While nothing has been in flight for longer than 100 ms the server is not asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_watcher_asks_nothing() {
    let reported = IncidentScene::new(3).await;
    let asked = async || {
        let row = reported
            .scene
            .observer
            .query_opt(
                "SELECT query_start::text, query FROM pg_stat_activity WHERE datname = current_database() \
                 AND application_name = 'lockkeeper side connection' AND state = 'idle' AND query <> ''",
                &[],
            )
            .await
            .unwrap();
        row.map(|row| (row.get::<_, String>(0), row.get::<_, String>(1)))
    };
    // How long the longest of many quick transactions took.
    let quick_ones = async || {
        let mut longest = Duration::ZERO;
        for _ in 0..200 {
            let began = Instant::now();
            let quick = reported
                .keeper()
                .transaction(async |tx| tx.batch_execute("SELECT 1").await.map_err(Error::from));
            quick.await.unwrap();
            longest = longest.max(began.elapsed());
        }
        longest
    };
    quick_ones().await;
    eventually("not opened beforehand", async || asked().await.is_some()).await;
    // On a busy machine a quick statement may be a slow one, which is sampled: such a round shows nothing.
    let mut idle = None;
    for _ in 0..30 {
        // Until nothing is asked any more about the round before.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let before = asked().await;
        let longest = quick_ones().await;
        // Between its statements a transaction waits for nothing.
        let began = Instant::now();
        let thought = Duration::from_millis(400);
        let thinking = reported.keeper().transaction(async |tx| {
            tx.batch_execute("SELECT 1").await?;
            tokio::time::sleep(thought).await;
            Ok::<_, Error>(())
        });
        thinking.await.unwrap();
        let longest = longest.max(began.elapsed() - thought);
        if before.is_some() && longest < Duration::from_millis(80) {
            assert_eq!(asked().await, before);
            idle = before;
            break;
        }
    }
    let idle = idle.expect("a round without a stall");
    let slow = reported.keeper().transaction(async |tx| {
        tx.batch_execute("SELECT pg_sleep(0.4)")
            .await
            .map_err(Error::from)
    });
    slow.await.unwrap();
    eventually("a slow statement is not sampled", async || {
        asked().await.is_some_and(|asked| asked != idle)
    })
    .await;
}
