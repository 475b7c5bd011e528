//! Servers that refuse connections, crash, restart and are replaced by their standby.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind};
use lockkeeper_testkit::{
    Fault, GIVE_UP_AFTER, Server, assert_error, assert_error_in, connect, eventually,
};
use tokio_postgres::{Client, NoTls};

use super::{COMMIT, Counts, Lab, add, insert, resolving};

/// Each connection is refused at once, so that it is asked for many times in the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outcome_is_found_out_once_the_server_takes_connections_again() {
    let lab = Lab::new(1).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::CutDuring);
    let refused = async {
        let cut = async || lab.proxy.faults_left() == 0;
        eventually("no COMMIT is sent", cut).await;
        let asked = async || lab.proxy.refused() > 100;
        eventually("not a hundred connections are refused", asked).await;
        lab.proxy.refuse(false);
    };
    let (answer, ()) = tokio::join!(
        lab.keeper.transaction_with(resolving(), async |tx| {
            insert(tx, &counts).await?;
            lab.proxy.refuse(true);
            Ok::<_, Error>(())
        }),
        refused
    );
    lab.agrees(&answer, &counts, "refused for a while").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 1);
}

/// A server of its own, that is stopped and started.
struct Restarted {
    server: Server,
    lab: Lab,
}

impl Restarted {
    async fn new() -> Self {
        // Nothing but the test uses transaction ids.
        let server = Server::start(&[("autovacuum", "off")]).unwrap();
        let lab = Lab::on(&server, 1).await;
        Self { server, lab }
    }

    fn does(&self, what: impl FnOnce(&Server)) {
        tokio::task::block_in_place(|| what(&self.server));
    }

    /// Kills the postmaster, and starts another one.
    async fn crash(&self) -> Client {
        self.does(|server| {
            server.kill();
            server.restart();
        });
        self.lab.database.connect().await
    }

    /// Kills one backend, after which the postmaster starts all over with the others.
    async fn crash_backend(&self, pid: i32) -> Client {
        let kill = format!("COPY (SELECT 1) TO PROGRAM 'kill -9 {pid}'");
        drop(self.lab.observer.batch_execute(&kill).await);
        let ended = async || self.lab.observer.is_closed();
        eventually("the server is still there", ended).await;
        let started = Instant::now();
        loop {
            // One that connects before the postmaster has noticed is thrown out again.
            if let Ok((client, connection)) = self.lab.database.config().connect(NoTls).await {
                tokio::spawn(connection);
                let sql = "SELECT pg_last_wal_replay_lsn() IS NOT NULL";
                let recovered = client.query_one(sql, &[]).await;
                if recovered.is_ok_and(|row| row.get(0)) {
                    return client;
                }
            }
            assert!(
                started.elapsed() < GIVE_UP_AFTER,
                "the server does not come back"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Uses up transaction ids, up to one that is ours.
async fn use_up(observer: &Client, xid: u64) {
    for _ in 0..100 {
        let row = observer.query_one("SELECT pg_current_xact_id()::text", &[]);
        let used: String = row.await.unwrap().get(0);
        if used.parse::<u64>().unwrap() >= xid {
            return;
        }
    }
    panic!("the server has not come near transaction {xid} again");
}

async fn status(observer: &Client, xid: u64) -> Option<String> {
    let sql = format!("SELECT pg_xact_status('{xid}'::xid8)");
    observer.query_one(&sql, &[]).await.unwrap().get(0)
}

/// A crash forgets transactions of which nothing has got to disk, and their ids are used again: one that the server calls
/// committed then is another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_used_again_after_a_crash_is_not_ours() {
    for (used_again, backend) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut restarted = Restarted::new().await;
        restarted.lab.hold_commits().await;
        let lab = &restarted.lab;
        let counts = Counts::default();
        let xid = AtomicU64::new(0);
        lab.proxy.fault(COMMIT, Fault::CutDuring);
        let (answer, observer) = tokio::join!(
            lab.keeper.transaction_with(resolving(), async |tx| {
                insert(tx, &counts).await?;
                if counts.runs() == 1 {
                    let row = tx
                        .query_one("SELECT pg_current_xact_id()::text", &[])
                        .await?;
                    let id: String = row.get(0);
                    xid.store(id.parse().unwrap(), Ordering::Relaxed);
                    lab.proxy.refuse(true);
                }
                Ok::<_, Error>(())
            }),
            async {
                let pid = lab.held_up().await;
                let observer = if backend {
                    restarted.crash_backend(pid).await
                } else {
                    restarted.crash().await
                };
                let xid = xid.load(Ordering::Relaxed);
                if used_again {
                    use_up(&observer, xid).await;
                    assert_eq!(status(&observer, xid).await.as_deref(), Some("committed"));
                }
                lab.proxy.refuse(false);
                observer
            }
        );
        restarted.lab.observer = observer;
        let lab = &restarted.lab;
        let what = format!("used again: {used_again}, backend: {backend}");
        lab.agrees(&answer, &counts, &what).await;
        if used_again {
            let error = answer.expect_err(&what);
            assert_error_in(
                &what,
                &error,
                ErrorKind::CommitUnknown,
                "the server has been started again since",
            );
            assert!(error.to_string().contains("started again"), "{error}");
            assert_eq!(counts.runs(), 1, "{what}");
        } else {
            answer.expect(&what);
            assert_eq!(counts.runs(), 2, "{what}");
        }
    }
}

/// Something of it has got to disk, but not its COMMIT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_has_undone_is_run_again() {
    let mut restarted = Restarted::new().await;
    restarted.lab.hold_commits().await;
    let lab = &restarted.lab;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::CutDuring);
    let (answer, observer) = tokio::join!(
        lab.keeper.transaction_with(resolving(), async |tx| {
            insert(tx, &counts).await?;
            lab.proxy.refuse(counts.runs() == 1);
            Ok::<_, Error>(())
        }),
        async {
            lab.held_up().await;
            // A checkpoint writes all there is.
            lab.observer.batch_execute("CHECKPOINT").await.unwrap();
            let observer = restarted.crash().await;
            observer
                .batch_execute("SELECT pg_current_xact_id()")
                .await
                .unwrap();
            lab.proxy.refuse(false);
            observer
        }
    );
    restarted.lab.observer = observer;
    restarted.lab.agrees(&answer, &counts, "undone").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 2);
}

/// The answer is lost, and then the server goes down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_before_the_server_went_down_is_not_run_again() {
    for crashes in [true, false] {
        let mut restarted = Restarted::new().await;
        let lab = &restarted.lab;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, Fault::CutAnswer);
        let (answer, observer) = tokio::join!(
            lab.keeper.transaction_with(resolving(), async |tx| {
                insert(tx, &counts).await?;
                lab.proxy.refuse(true);
                Ok::<_, Error>(())
            }),
            async {
                let committed = async || lab.count("t").await == 1;
                eventually("no COMMIT", committed).await;
                let observer = if crashes {
                    restarted.crash().await
                } else {
                    restarted.does(Server::restart);
                    lab.database.connect().await
                };
                lab.proxy.refuse(false);
                observer
            }
        );
        restarted.lab.observer = observer;
        let what = format!("crashes: {crashes}");
        let rows = restarted.lab.agrees(&answer, &counts, &what).await;
        assert_eq!(rows, 1, "{what}");
        assert_eq!(counts.runs(), 1, "{what}");
        if crashes {
            // Its last replay went beyond all that the transaction has written: the id cannot have been used again.
            answer.expect(&what);
        } else {
            // It was shut down in order, or it crashed and was then shut down in order: that is not to be seen.
            let error = answer.expect_err(&what);
            assert_error_in(
                &what,
                &error,
                ErrorKind::CommitUnknown,
                "the server has been started again since",
            );
        }
    }
}

/// A standby takes over. Whether it has seen the transaction or not: that it says so is no proof.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_is_not_believed() {
    for cut in [Fault::CutAnswer, Fault::CutBefore] {
        let mut restarted = Restarted::new().await;
        let standby = tokio::task::block_in_place(|| restarted.server.standby()).unwrap();
        let mut config = standby.config();
        config.dbname(restarted.lab.database.name());
        let second = connect(&config).await;
        let lab = &restarted.lab;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, cut);
        let (answer, ()) = tokio::join!(
            lab.keeper.transaction_with(resolving(), async |tx| {
                insert(tx, &counts).await?;
                lab.proxy.refuse(true);
                Ok::<_, Error>(())
            }),
            async {
                let made = async || lab.proxy.faults_left() == 0;
                eventually("COMMIT is not cut", made).await;
                if cut == Fault::CutAnswer {
                    eventually("the standby lags behind", async || {
                        let row = second.query_one("SELECT count(*) FROM t", &[]).await;
                        row.is_ok_and(|row| row.get::<_, i64>(0) == 1)
                    })
                    .await;
                }
                restarted.does(Server::stop);
                lab.proxy.lead_to(&standby.host(), standby.port());
                lab.proxy.refuse(false);
                // While it is one it is asked, and cannot say.
                let asked = async || {
                    let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() \
                               AND query LIKE '%pg_xact_status%'";
                    second.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0
                };
                eventually("the standby is not asked", asked).await;
                let promoted = second.query_one("SELECT pg_promote()", &[]).await.unwrap();
                assert!(promoted.get::<_, bool>(0));
            }
        );
        restarted.lab.observer = second;
        let what = format!("{cut:?}");
        restarted.lab.agrees(&answer, &counts, &what).await;
        let error = answer.expect_err(&what);
        assert_error_in(&what, &error, ErrorKind::CommitUnknown, "a failover");
        assert!(error.to_string().contains("failover"), "{error}");
        assert_eq!(counts.runs(), 1, "{what}");
    }
}

/// On a standby there is nothing to find out, and nothing to refuse either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_on_a_standby_may_have_the_option() {
    let restarted = Restarted::new().await;
    let lab = &restarted.lab;
    let standby = tokio::task::block_in_place(|| restarted.server.standby()).unwrap();
    lab.proxy.lead_to(&standby.host(), standby.port());
    for (cut, runs) in [
        (None, 1),
        (Some(Fault::CutBefore), 2),
        (Some(Fault::CutAnswer), 2),
        (Some(Fault::CutAfter), 1),
    ] {
        if let Some(cut) = cut {
            lab.proxy.fault(COMMIT, cut);
        }
        let counts = Counts::default();
        let answer = lab
            .keeper
            .transaction_with(resolving(), async |tx| {
                counts.runs.fetch_add(1, Ordering::Relaxed);
                let row = tx.query_one("SELECT pg_is_in_recovery()", &[]).await?;
                assert!(row.get::<_, bool>(0));
                Ok::<_, Error>(())
            })
            .await;
        answer.unwrap();
        assert_eq!(counts.runs(), runs, "{cut:?}");
    }
    // A group's lock would be the standby's own.
    let answer = add(
        &lab.keeper,
        resolving().conflict_group(1),
        &Counts::default(),
    )
    .await;
    assert_error(
        &answer.unwrap_err(),
        ErrorKind::ReadOnlyServer,
        "nothing was locked",
    );
}
