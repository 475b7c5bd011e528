//! The proxy does what it is told to, and otherwise nothing.

use std::error::Error as _;
use std::io;
use std::time::{Duration, Instant};

use lockkeeper_testkit::{
    Database, Fault, GIVE_UP_AFTER, Proxy, Server, Session, eventually, in_time, until_gone,
    until_sleeping,
};
use tokio_postgres::{Client, NoTls};

/// A proxy, a client behind it, and one that goes around it.
struct Lab {
    database: Database,
    proxy: Proxy,
    behind: Session,
    beside: Client,
}

impl Lab {
    async fn new() -> Lab {
        let database = Server::shared().database().await;
        let proxy = Proxy::before(database.server());
        let behind = Session::connect(&proxy.config(&database.config())).await;
        let beside = database.connect().await;
        beside
            .batch_execute("CREATE TABLE t (id int)")
            .await
            .expect("a table");
        drop(proxy.heard());
        Lab {
            database,
            proxy,
            behind,
            beside,
        }
    }

    /// The rows that the server has got.
    async fn rows(&self) -> i64 {
        let row = self.beside.query_one("SELECT count(*) FROM t", &[]).await;
        row.expect("a count").get(0)
    }
}

const INSERT: &str = "INSERT INTO t VALUES (1)";

#[tokio::test]
async fn without_a_fault_everything_passes_and_is_heard() {
    let lab = Lab::new().await;
    let before = lab.proxy.traffic();
    lab.behind.run(INSERT).await;
    assert_eq!(lab.rows().await, 1);
    assert_eq!(lab.proxy.heard(), (vec![INSERT.to_owned()], 1));
    let prepared = lab.behind.client.query("SELECT id FROM t", &[]).await;
    assert_eq!(prepared.expect("rows").len(), 1);
    let (heard, flights) = lab.proxy.heard();
    assert_eq!(heard[0], "SELECT id FROM t");
    assert!(heard[1..].iter().any(|message| message == "S"), "{heard:?}");
    let traffic = lab.proxy.traffic();
    assert_eq!(traffic.flights - before.flights, 1 + flights);
    assert!(traffic.up > before.up && traffic.down > before.down);
    // Large ones come in pieces.
    let large = "x".repeat(1_000_000);
    let row = lab
        .behind
        .client
        .query_one("SELECT $1::text", &[&large])
        .await;
    assert_eq!(row.expect("a row").get::<_, String>(0), large);
}

#[tokio::test]
async fn a_cut_ends_the_connection_before_or_after_what_it_names() {
    for (fault, has_answer, rows) in [
        (Fault::CutBefore, false, 0),
        (Fault::Reset, false, 0),
        (Fault::CutDuring, false, 1),
        (Fault::CutAnswer, false, 1),
        (Fault::CutAfter, true, 1),
    ] {
        let lab = Lab::new().await;
        lab.proxy.fault("VALUES (1)", fault);
        lab.behind.run("SELECT 'nothing to do with it'").await;
        assert_eq!(lab.proxy.faults_left(), 1);
        let answer = in_time("no end", lab.behind.client.batch_execute(INSERT)).await;
        assert_eq!(answer.is_ok(), has_answer, "{fault:?}: {answer:?}");
        assert_eq!(lab.proxy.faults_left(), 0);
        until_gone(&lab.beside, lab.behind.pid).await;
        assert_eq!(lab.rows().await, rows, "{fault:?}");
    }
}

/// The client keeps the reason to its connection.
#[tokio::test]
async fn a_reset_is_told_from_a_cut() {
    let lab = Lab::new().await;
    let config = lab.proxy.config(&lab.database.config());
    for fault in [Fault::CutBefore, Fault::Reset] {
        let (client, connection) = config.connect(NoTls).await.expect("a connection");
        let connection = tokio::spawn(connection);
        lab.proxy.fault("VALUES (1)", fault);
        client.batch_execute(INSERT).await.expect_err("it is cut");
        let ended = in_time("no end", connection).await.expect("no panic");
        let reset = ended.err().and_then(|error| {
            let source = error.source()?.downcast_ref::<io::Error>()?;
            Some(source.kind())
        });
        let is_reset = reset == Some(io::ErrorKind::ConnectionReset);
        assert_eq!(is_reset, fault == Fault::Reset, "{fault:?}: {reset:?}");
    }
}

#[tokio::test]
async fn a_fault_can_be_placed_by_number_and_at_what_is_prepared() {
    let lab = Lab::new().await;
    lab.proxy.fault_later(2, Fault::CutBefore);
    lab.behind.run(INSERT).await;
    lab.behind.run(INSERT).await;
    assert!(lab.behind.client.batch_execute(INSERT).await.is_err());
    assert_eq!(lab.rows().await, 2);

    for (fault, rows) in [(Fault::CutAnswer, 2), (Fault::CutAfter, 2)] {
        let behind = Session::connect(&lab.proxy.config(&lab.database.config())).await;
        lab.proxy.fault("VALUES ($1)", fault);
        let prepared = behind.client.prepare("INSERT INTO t VALUES ($1)").await;
        assert_eq!(prepared.is_ok(), fault == Fault::CutAfter, "{fault:?}");
        until_gone(&lab.beside, behind.pid).await;
        assert_eq!(lab.rows().await, rows);
    }
    lab.proxy.fault("never", Fault::CutBefore);
    lab.proxy.clear_faults();
    assert_eq!(lab.proxy.faults_left(), 0);
}

#[tokio::test]
async fn a_message_can_be_swallowed_held_and_orphaned() {
    let lab = Lab::new().await;
    lab.proxy.fault("VALUES (1)", Fault::Swallow);
    let swallowed = lab.behind.start(INSERT);
    eventually("it is not swallowed", async || lab.proxy.faults_left() == 0).await;
    // The answer to this one is taken for the answer to the first.
    lab.behind.start("INSERT INTO t VALUES (2)");
    in_time("no answer", swallowed)
        .await
        .expect("no panic")
        .expect("an answer");
    assert_eq!(lab.rows().await, 1);

    let lab = Lab::new().await;
    lab.proxy.fault("VALUES (1)", Fault::Hold);
    let held = lab.behind.start(INSERT);
    eventually("it is not held", async || lab.proxy.faults_left() == 0).await;
    assert_eq!(lab.rows().await, 0);
    assert!(!held.is_finished());
    lab.proxy.deliver();
    in_time("no answer", held)
        .await
        .expect("no panic")
        .expect("an answer");
    assert_eq!(lab.rows().await, 1);

    lab.proxy.fault("VALUES (1)", Fault::Orphan);
    let orphaned = lab.behind.start(INSERT);
    let orphaned = in_time("no end", orphaned).await.expect("no panic");
    orphaned.expect_err("the client's side is closed");
    assert_eq!(lab.rows().await, 1);
    lab.proxy.deliver();
    eventually("it is not delivered", async || lab.rows().await == 2).await;
}

#[tokio::test]
async fn one_connection_can_stall_and_all_of_them_can() {
    let lab = Lab::new().await;
    let other = Session::connect(&lab.proxy.config(&lab.database.config())).await;
    lab.proxy.fault("VALUES (1)", Fault::Stall);
    let stalled = lab.behind.start(INSERT);
    eventually("it does not stall", async || lab.proxy.faults_left() == 0).await;
    // The end of the backend does not get through either.
    let sql = "SELECT pg_terminate_backend($1)";
    let ended = lab.beside.execute(sql, &[&lab.behind.pid]).await;
    ended.expect("a signal");
    until_gone(&lab.beside, lab.behind.pid).await;
    other.run("INSERT INTO t VALUES (2)").await;
    assert!(!stalled.is_finished() && !lab.behind.client.is_closed());
    let site = lab.proxy.met().expect("a fault");
    assert_eq!((site.text.as_str(), site.backend), (INSERT, lab.behind.pid));
    lab.proxy.resume();
    let ended = in_time("no end", stalled).await.expect("no panic");
    ended.expect_err("its backend has ended");

    lab.proxy.stall(true);
    let all = other.start("INSERT INTO t VALUES (3)");
    let config = lab.proxy.config(&lab.database.config());
    let login = tokio::spawn(async move { Session::connect(&config).await });
    eventually("it is not heard", async || {
        lab.proxy.heard().0.iter().any(|sql| sql.ends_with("(3)"))
    })
    .await;
    assert_eq!(lab.rows().await, 1);
    lab.proxy.stall(false);
    in_time("no answer", all)
        .await
        .expect("no panic")
        .expect("an answer");
    in_time("no login", login).await.expect("no panic");
    assert_eq!(lab.rows().await, 2);
}

#[tokio::test]
async fn everything_can_be_delayed_and_cancels_more() {
    let lab = Lab::new().await;
    let delay = Duration::from_millis(60);
    lab.proxy.delay(delay);
    let started = Instant::now();
    lab.behind.run("SELECT 1").await;
    assert!(started.elapsed() >= 2 * delay);
    lab.proxy.delay(Duration::ZERO);
    lab.proxy.delay_cancels(delay);
    let sleeping = lab.behind.start("SELECT pg_sleep(600)");
    until_sleeping(&lab.beside, lab.behind.pid).await;
    let started = Instant::now();
    let token = lab.behind.client.cancel_token();
    let sent = token.cancel_query(NoTls).await;
    sent.expect("a request to cancel");
    let cancelled = in_time("no end", sleeping).await.expect("no panic");
    cancelled.expect_err("it is cancelled");
    assert!(started.elapsed() >= delay && started.elapsed() < GIVE_UP_AFTER);
}

#[tokio::test]
async fn connections_can_be_refused_led_elsewhere_and_forgotten() {
    let lab = Lab::new().await;
    let config = lab.proxy.config(&lab.database.config());
    lab.proxy.refuse(true);
    assert!(config.connect(NoTls).await.is_err());
    assert_eq!(lab.proxy.refused(), 1);
    lab.behind.run(INSERT).await;
    lab.proxy.refuse(false);
    lab.proxy.forget_connections();
    let fresh = Session::connect(&config).await;
    assert!(!lab.behind.client.is_closed(), "it is not told");
    assert!(lab.behind.client.batch_execute(INSERT).await.is_err());
    fresh.run(INSERT).await;
    assert_eq!(lab.rows().await, 2);
    // Nobody listens there.
    lab.proxy.lead_to("127.0.0.1", 1);
    assert!(config.connect(NoTls).await.is_err());
    fresh.run(INSERT).await;

    let (server, pid) = (lab.proxy, fresh.pid);
    drop(server);
    until_gone(&lab.beside, pid).await;
}
