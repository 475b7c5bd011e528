//! A connection that is lost around COMMIT: what is reported agrees with what the server did, and nothing is ever done
//! twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use lockkeeper::{Error, ErrorKind, Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::{
    Database, Fault, GIVE_UP_AFTER, PoolMode, Proxy, Server, connect, eventually,
    poll_times_and_drop, terminate,
};
use tokio_postgres::{AsyncMessage, Client, IsolationLevel, NoTls};

/// The advisory lock that COMMIT waits for, where a test holds it up.
const HOLD: i64 = 4711;
/// How the messages end that are cut.
const COMMIT: &str = "COMMIT";
const MARK: &str = "AS c";

/// What a transaction has done.
#[derive(Default)]
struct Counts {
    runs: AtomicU32,
    hooks: Arc<AtomicU32>,
}

impl Counts {
    fn runs(&self) -> u32 {
        self.runs.load(Ordering::Relaxed)
    }

    fn hooks(&self) -> u32 {
        self.hooks.load(Ordering::Relaxed)
    }
}

/// Adds one row.
async fn add(keeper: &Keeper, options: TransactionOptions, counts: &Counts) -> Result<(), Error> {
    keeper
        .transaction_with(options, async |tx| insert(tx, counts).await)
        .await
}

async fn insert(tx: &mut Tx, counts: &Counts) -> Result<(), Error> {
    counts.runs.fetch_add(1, Ordering::Relaxed);
    tx.execute("INSERT INTO t VALUES (10)", &[]).await?;
    let hooks = Arc::clone(&counts.hooks);
    tx.after_commit(move || {
        hooks.fetch_add(1, Ordering::Relaxed);
    });
    Ok(())
}

fn resolving() -> TransactionOptions {
    TransactionOptions::new().resolve_commit()
}

/// A table `t (id)`, and a keeper behind a proxy.
struct Lab {
    database: Database,
    observer: Client,
    proxy: Proxy,
    pool: Pool,
    keeper: Keeper,
}

impl Lab {
    async fn new(pool_size: usize) -> Self {
        Self::on(Server::shared(), pool_size).await
    }

    async fn on(server: &Server, pool_size: usize) -> Self {
        let database = server.database().await;
        let observer = database.connect().await;
        observer
            .batch_execute("CREATE TABLE t (id int NOT NULL)")
            .await
            .unwrap();
        let proxy = Proxy::before(database.server());
        let pool = proxy.pool(&database.config(), pool_size);
        let keeper = Keeper::builder(pool.clone()).watch(false).build();
        Self {
            database,
            observer,
            proxy,
            pool,
            keeper,
        }
    }

    /// COMMIT of whoever inserts waits until the observer lets it.
    async fn hold_commits(&self) {
        self.observer
            .batch_execute(&format!(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM pg_advisory_xact_lock({HOLD}); RETURN NULL; END $$; \
                 CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
                 FOR EACH ROW EXECUTE FUNCTION hold(); SELECT pg_advisory_lock({HOLD})"
            ))
            .await
            .unwrap();
    }

    async fn let_commit(&self) {
        let unlock = format!("SELECT pg_advisory_unlock({HOLD})");
        self.observer.batch_execute(&unlock).await.unwrap();
    }

    /// The backend whose COMMIT is held up.
    async fn held_up(&self) -> i32 {
        let mut found = None;
        eventually("no COMMIT is held up", async || {
            let sql = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
            let rows = self.observer.query(sql, &[]).await.unwrap();
            found = rows.first().map(|row| row.get(0));
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// Somebody has asked for the outcome, and it is not decided.
    async fn asked(&self) {
        let asked = async || {
            self.count(
                "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                        AND query LIKE '%pg_xact_status%'",
            )
            .await
                > 0
        };
        eventually("nobody asks for the outcome", asked).await;
    }

    async fn count(&self, from: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {from}");
        self.observer.query_one(&sql, &[]).await.unwrap().get(0)
    }

    async fn reset(&self) {
        self.observer.batch_execute("DELETE FROM t").await.unwrap();
    }

    /// No transaction is open, so that the table says what has become of all of them.
    async fn settled(&self) {
        eventually("a transaction is open still", async || {
            self.count(
                "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                 AND xact_start IS NOT NULL AND backend_type = 'client backend'",
            )
            .await
                == 0
        })
        .await;
    }

    /// What is reported is what happened, and at most once.
    async fn agrees(&self, answer: &Result<(), Error>, counts: &Counts, what: &str) -> i64 {
        self.settled().await;
        let rows = self.count("t").await;
        let hooks = counts.hooks();
        let right = match answer {
            Ok(()) => rows == 1 && hooks == 1,
            Err(error) if error.kind() == ErrorKind::CommitUnknown => rows <= 1 && hooks == 0,
            Err(_) => rows == 0 && hooks == 0,
        };
        let runs = counts.runs();
        assert!(
            right,
            "{what}: {answer:?}, but {rows} rows, {hooks} hooks and {runs} runs"
        );
        rows
    }

    /// All of the pool can be had, and answers.
    async fn pool_is_whole(&self) {
        let mut all = Vec::new();
        for _ in 0..self.pool.status().max_size {
            let object = tokio::time::timeout(GIVE_UP_AFTER, self.pool.get()).await;
            let object = object.expect("the pool gives no connection").unwrap();
            drop(object.batch_execute("SELECT 1").await);
            all.push(object);
        }
    }
}

// Cut around COMMIT.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_option_what_is_lost_in_commit_is_unknown_and_not_run_again() {
    let lab = Lab::new(2).await;
    for (cut, kind, applied) in [
        (Fault::CutBefore, Some(ErrorKind::CommitUnknown), 0),
        (Fault::CutDuring, Some(ErrorKind::CommitUnknown), 1),
        (Fault::CutAnswer, Some(ErrorKind::CommitUnknown), 1),
        (Fault::CutAfter, None, 1),
    ] {
        lab.reset().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, cut);
        let answer = add(&lab.keeper, TransactionOptions::new(), &counts).await;
        let what = format!("{cut:?}");
        let rows = lab.agrees(&answer, &counts, &what).await;
        assert_eq!(rows, applied, "{what}");
        assert_eq!(answer.as_ref().err().map(Error::kind), kind, "{what}");
        assert_eq!(counts.runs(), 1, "{what}");
        assert!(!answer.is_err_and(|error| error.is_retryable()), "{what}");
        assert_eq!(lab.proxy.faults_left(), 0, "{what}");
        lab.pool_is_whole().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_option_it_is_found_out() {
    let lab = Lab::new(1).await;
    let beside = Keeper::builder(lab.pool.clone())
        .side_connection(lab.database.config(), NoTls)
        .build();
    for keeper in [&lab.keeper, &beside] {
        for (cut, runs) in [
            (Fault::CutBefore, 2),
            (Fault::CutDuring, 1),
            (Fault::CutAnswer, 1),
            (Fault::CutAfter, 1),
        ] {
            lab.reset().await;
            let counts = Counts::default();
            lab.proxy.fault(COMMIT, cut);
            let answer = add(keeper, resolving(), &counts).await;
            let what = format!("{cut:?}");
            lab.agrees(&answer, &counts, &what).await;
            answer.expect(&what);
            assert_eq!(counts.runs(), runs, "{what}");
            assert_eq!(lab.proxy.faults_left(), 0, "{what}");
            lab.pool_is_whole().await;
        }
    }
}

/// Before COMMIT was sent nothing can have been committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_between_the_closure_and_commit_it_is_run_again() {
    let lab = Lab::new(2).await;
    for cut in [
        Fault::CutBefore,
        Fault::CutDuring,
        Fault::CutAnswer,
        Fault::CutAfter,
    ] {
        lab.reset().await;
        let counts = Counts::default();
        lab.proxy.fault(MARK, cut);
        let answer = add(&lab.keeper, resolving(), &counts).await;
        let what = format!("{cut:?}");
        lab.agrees(&answer, &counts, &what).await;
        // After the mark's answer the end of the connection may be seen before COMMIT is sent, or in its stead.
        answer.expect(&what);
        assert_eq!(counts.runs(), 2, "{what}");
        assert_eq!(lab.proxy.faults_left(), 0, "{what}");
    }

    // By the server, and noticed before anything is sent, or not.
    for noticed in [true, false] {
        for (options, runs) in [(TransactionOptions::new(), 1), (resolving(), 2)] {
            lab.reset().await;
            let counts = Counts::default();
            let answer = lab
                .keeper
                .transaction_with(options, async |tx| {
                    insert(tx, &counts).await?;
                    if counts.runs() == 1 {
                        terminate(&lab.observer, tx.backend_pid().unwrap()).await;
                        while noticed && !tx.client().is_closed() {
                            tokio::time::sleep(Duration::from_millis(1)).await;
                        }
                    }
                    Ok::<_, Error>(())
                })
                .await;
            let what = format!("terminated, {runs} runs, noticed: {noticed}");
            lab.agrees(&answer, &counts, &what).await;
            assert_eq!(counts.runs(), runs, "{what}");
            match answer {
                Ok(()) => assert_eq!(runs, 2, "{what}"),
                Err(error) if noticed => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{what}");
                }
                Err(error) => assert_eq!(runs, 1, "{what}: {error:?}"),
            }
        }
    }
}

/// A connection lost inside the closure is the closure's business.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_inside_the_closure_it_is_not_run_again() {
    let lab = Lab::new(2).await;
    let counts = Counts::default();
    lab.proxy.fault("SELECT 'cut'", Fault::CutBefore);
    let answer = lab
        .keeper
        .transaction_with(resolving(), async |tx| {
            insert(tx, &counts).await?;
            tx.batch_execute("SELECT 'cut'").await?;
            Ok::<_, Error>(())
        })
        .await;
    lab.agrees(&answer, &counts, "inside").await;
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionLost);
    assert_eq!(counts.runs(), 1);

    // Its error swallowed, there is nothing left to commit on.
    lab.proxy.fault("SELECT 'cut'", Fault::CutBefore);
    let counts = Counts::default();
    let answer = lab
        .keeper
        .transaction_with(resolving(), async |tx| {
            insert(tx, &counts).await?;
            if counts.runs() == 1 {
                drop(tx.batch_execute("SELECT 'cut'").await);
            }
            Ok::<_, Error>(())
        })
        .await;
    lab.agrees(&answer, &counts, "swallowed").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_at_every_attempt_it_runs_out_of_them() {
    let lab = Lab::new(2).await;
    for _ in 0..3 {
        lab.proxy.fault(COMMIT, Fault::CutBefore);
    }
    let counts = Counts::default();
    let answer = add(&lab.keeper, resolving().attempts(3), &counts).await;
    lab.agrees(&answer, &counts, "each time").await;
    let error = answer.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RetriesExhausted);
    assert_eq!(error.attempts(), 3);
    assert_eq!(counts.runs(), 3);
    let source = std::error::Error::source(&error).and_then(|error| error.downcast_ref::<Error>());
    assert_eq!(source.map(Error::kind), Some(ErrorKind::ConnectionLost));

    // With one attempt the error is itself, and what it says is known.
    lab.proxy.fault(COMMIT, Fault::CutBefore);
    let counts = Counts::default();
    let answer = add(&lab.keeper, resolving().attempts(1), &counts).await;
    lab.agrees(&answer, &counts, "once").await;
    let error = answer.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    assert!(error.is_retryable());
    let text = error.to_string();
    assert!(text.contains("rolled back"), "{text}");
}

// COMMIT under way.

/// The connection is lost while COMMIT waits; then it goes on, or its backend ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_in_progress_is_asked_for_until_it_is_decided() {
    for commits in [true, false] {
        let lab = Lab::new(2).await;
        lab.hold_commits().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, Fault::CutDuring);
        let (answer, ()) = tokio::join!(add(&lab.keeper, resolving(), &counts), async {
            let pid = lab.held_up().await;
            lab.asked().await;
            assert_eq!(counts.runs(), 1);
            if commits {
                lab.let_commit().await;
            } else {
                terminate(&lab.observer, pid).await;
                lab.settled_but_one(pid).await;
                lab.let_commit().await;
            }
        });
        let what = format!("commits: {commits}");
        lab.agrees(&answer, &counts, &what).await;
        answer.expect(&what);
        assert_eq!(counts.runs(), if commits { 1 } else { 2 }, "{what}");
    }
}

impl Lab {
    /// This backend has ended.
    async fn settled_but_one(&self, pid: i32) {
        eventually("the backend does not end", async || {
            let sql = format!("pg_stat_activity WHERE pid = {pid}");
            self.count(&sql).await == 0
        })
        .await;
    }
}

/// COMMIT arrives when its client has been gone for a while: until then it is not decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_arrives_late_counts() {
    let lab = Lab::new(2).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::Orphan);
    let (answer, ()) = tokio::join!(add(&lab.keeper, resolving(), &counts), async {
        lab.asked().await;
        lab.proxy.deliver();
    });
    lab.agrees(&answer, &counts, "late").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 1);
}

/// What is not decided in time stays unknown, and is not run again; it may still be committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_decided_in_time_stays_unknown() {
    let lab = Lab::new(2).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::Orphan);
    let started = Instant::now();
    let answer = add(&lab.keeper, resolving(), &counts).await;
    let waited = started.elapsed();
    assert!(
        (Duration::from_secs(14)..Duration::from_secs(60)).contains(&waited),
        "{waited:?}"
    );
    assert_eq!(
        answer.as_ref().unwrap_err().kind(),
        ErrorKind::CommitUnknown
    );
    assert_eq!(lab.count("t").await, 0);
    lab.proxy.deliver();
    let applied = lab.agrees(&answer, &counts, "too late").await;
    assert_eq!(applied, 1, "the test did not show what it should");
    assert_eq!(counts.runs(), 1);
}

/// The backend is terminated in the middle of COMMIT, which ends it with an error, or none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_terminated_in_commit_has_not_committed_and_is_run_again() {
    let lab = Lab::new(2).await;
    lab.hold_commits().await;
    let counts = Counts::default();
    let (answer, ()) = tokio::join!(add(&lab.keeper, resolving(), &counts), async {
        let pid = lab.held_up().await;
        terminate(&lab.observer, pid).await;
        lab.settled_but_one(pid).await;
        lab.let_commit().await;
    });
    lab.agrees(&answer, &counts, "terminated").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 2);
}

/// All connections of the pool are in other hands, and others stand in line for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outcome_is_asked_for_even_where_the_pool_is_busy() {
    let lab = Lab::new(1).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::CutAnswer);
    let begun = tokio::sync::Notify::new();
    let done = AtomicBool::new(false);
    let (answer, ()) = tokio::join!(
        async {
            let answer = lab
                .keeper
                .transaction_with(resolving(), async |tx| {
                    insert(tx, &counts).await?;
                    begun.notify_one();
                    // Until the others stand in line.
                    while lab.pool.status().waiting < 20 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    Ok::<_, Error>(())
                })
                .await;
            done.store(true, Ordering::Relaxed);
            answer
        },
        async {
            begun.notified().await;
            let others = (0..20).map(|_| async {
                // Whoever has had one stands in line again.
                while !done.load(Ordering::Relaxed) {
                    let object = lab.pool.get().await.unwrap();
                    object.batch_execute("SELECT pg_sleep(0.1)").await.unwrap();
                }
            });
            futures::future::join_all(others).await;
        }
    );
    lab.agrees(&answer, &counts, "busy").await;
    answer.unwrap();
    assert_eq!(counts.runs(), 1);
}

// What else a transaction can be.

/// Whoever may connect may ask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_privileges_finds_out_too() {
    let lab = Lab::new(2).await;
    let role = format!("plain_{}", lab.database.name());
    lab.observer
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN NOINHERIT; GRANT ALL ON t TO {role}"
        ))
        .await
        .unwrap();
    let mut direct = lab.database.config();
    direct.user(&role);
    let keeper = Keeper::new(lab.proxy.pool(&direct, 2));
    for (cut, runs) in [(Fault::CutBefore, 2), (Fault::CutAnswer, 1)] {
        lab.reset().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, cut);
        let answer = add(&keeper, resolving(), &counts).await;
        lab.agrees(&answer, &counts, &role).await;
        answer.unwrap();
        assert_eq!(counts.runs(), runs);
    }
    drop(keeper);
    let drop_role = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    lab.observer.batch_execute(&drop_role).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_only_reads_is_resolved_too() {
    let lab = Lab::new(2).await;
    for options in [
        resolving(),
        resolving().read_only(true),
        resolving().isolation(IsolationLevel::RepeatableRead),
        resolving()
            .isolation(IsolationLevel::Serializable)
            .read_only(true)
            .deferrable(true),
    ] {
        for cut in [Fault::CutBefore, Fault::CutAnswer, Fault::CutAfter] {
            lab.proxy.fault(COMMIT, cut);
            let answer = lab.keeper.transaction_with(options.clone(), async |tx| {
                let row = tx.query_one("SELECT count(*) FROM t", &[]).await?;
                Ok::<i64, Error>(row.get(0))
            });
            assert_eq!(answer.await.unwrap(), 0, "{cut:?}");
            assert_eq!(lab.proxy.faults_left(), 0);
        }
    }
}

/// NOTIFY gives a transaction its id in COMMIT only: one that has no id before can have an effect all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notification_is_not_sent_twice() {
    let lab = Lab::new(2).await;
    let (listener, mut connection) = lab.database.config().connect(NoTls).await.unwrap();
    let heard = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&heard);
    let listening = tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(_) = message {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    listener.batch_execute("LISTEN news").await.unwrap();
    for (cut, runs) in [
        (Fault::CutBefore, 2),
        (Fault::CutAnswer, 1),
        (Fault::CutDuring, 1),
    ] {
        for read_only in [false, true] {
            let counts = Counts::default();
            heard.store(0, Ordering::Relaxed);
            lab.proxy.fault(COMMIT, cut);
            let answer = lab
                .keeper
                .transaction_with(resolving().read_only(read_only), async |tx| {
                    counts.runs.fetch_add(1, Ordering::Relaxed);
                    tx.batch_execute("NOTIFY news").await?;
                    Ok::<_, Error>(())
                })
                .await;
            answer.unwrap();
            // Those sent before have come when an answer has come after them.
            listener.batch_execute("SELECT 1").await.unwrap();
            eventually("no notification", async || {
                heard.load(Ordering::Relaxed) > 0
            })
            .await;
            listener.batch_execute("SELECT 1").await.unwrap();
            assert_eq!(heard.load(Ordering::Relaxed), 1, "{cut:?}");
            assert_eq!(counts.runs(), runs, "{cut:?}");
        }
    }
    drop(listener);
    listening.await.unwrap();
}

/// What fails by itself fails as it does without the option.
#[tokio::test]
async fn failures_of_the_transaction_itself_are_the_same_with_the_option() {
    let lab = Lab::new(1).await;
    lab.observer
        .batch_execute(
            "ALTER TABLE t ADD CONSTRAINT once UNIQUE (id) DEFERRABLE INITIALLY DEFERRED; \
             INSERT INTO t VALUES (1)",
        )
        .await
        .unwrap();
    for sql in [
        // COMMIT's own.
        "INSERT INTO t VALUES (1)",
        // Swallowed by the closure.
        "SELECT 1/0",
        "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '53200'; END $$",
    ] {
        let mut seen = Vec::new();
        for options in [TransactionOptions::new(), resolving()] {
            let answer = lab
                .keeper
                .transaction_with(options, async |tx| {
                    drop(tx.batch_execute(sql).await);
                    Ok::<_, Error>(())
                })
                .await;
            let error = answer.unwrap_err();
            seen.push((error.kind(), error.sqlstate().cloned(), error.to_string()));
        }
        assert_eq!(seen[0], seen[1], "{sql}");
    }
    // The question itself fails: the server's word for it is the source.
    let nobody = format!("nobody_{}", lab.database.name());
    lab.observer
        .batch_execute(&format!(
            "CREATE ROLE {nobody} LOGIN; GRANT ALL ON t TO {nobody}; \
             REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
        ))
        .await
        .unwrap();
    let mut direct = lab.database.config();
    direct.user(&nobody);
    let keeper = Keeper::new(lab.proxy.pool(&direct, 1));
    let error = keeper
        .transaction_with(resolving(), async |tx| {
            tx.batch_execute("INSERT INTO t VALUES (2)").await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("42501"));
    drop(keeper);
    lab.settled().await;
    assert_eq!(lab.count("t").await, 1);
    let sql = format!("DROP OWNED BY {nobody}; DROP ROLE {nobody}");
    lab.observer.batch_execute(&sql).await.unwrap();
    lab.pool_is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_a_transaction_pooler_it_is_found_out_too() {
    let lab = Lab::new(1).await;
    let server = lab.database.server();
    let bouncer = match server.pgbouncer(PoolMode::Transaction, lab.database.name()) {
        Ok(bouncer) => bouncer,
        Err(skip) => {
            return skip.report("commit_outcome::through_a_transaction_pooler_it_is_found_out_too");
        }
    };
    lab.proxy.lead_to("127.0.0.1", bouncer.port());
    let keeper = Keeper::new(lab.proxy.pool(&bouncer.config(), 2));
    for (cut, runs) in [
        (Fault::CutBefore, 2),
        (Fault::CutDuring, 1),
        (Fault::CutAnswer, 1),
        (Fault::CutAfter, 1),
    ] {
        lab.reset().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, cut);
        let answer = add(&keeper, resolving(), &counts).await;
        let what = format!("{cut:?}");
        lab.agrees(&answer, &counts, &what).await;
        answer.expect(&what);
        // A pooler that sees its client go while COMMIT is under way closes the server's connection too, early or late.
        if cut != Fault::CutDuring {
            assert_eq!(counts.runs(), runs, "{what}");
        }
    }
}

/// However often it is polled before it is dropped, with COMMIT's answer lost or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_it_is_done_once_or_not_at_all() {
    for cut in [None, Some(Fault::CutBefore), Some(Fault::CutAnswer)] {
        let lab = Lab::new(2).await;
        let mut polls = 0;
        loop {
            lab.reset().await;
            let counts = Counts::default();
            if let Some(cut) = cut {
                lab.proxy.fault(COMMIT, cut);
            }
            let done = poll_times_and_drop(add(&lab.keeper, resolving(), &counts), polls).await;
            lab.settled().await;
            let what = format!("{cut:?} after {polls} polls");
            // What was not cut now may be cut later, in the background.
            lab.pool_is_whole().await;
            lab.settled().await;
            assert!(lab.count("t").await <= 1, "{what}");
            assert!(counts.hooks() <= 1, "{what}");
            if let Some(answer) = done {
                lab.agrees(&answer, &counts, &what).await;
                answer.expect(&what);
                break;
            }
            assert_eq!(counts.hooks(), 0, "{what}");
            lab.proxy.clear_faults();
            polls += 1;
            assert!(polls < 300);
        }
        // One for each of the messages, at least: on a busy machine an answer is there when the next one is waited for.
        assert!(polls > 2, "{polls} polls are too few to show anything");
    }
}

// Servers that come and go.

/// Each connection is refused at once, so that it is asked for many times in the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outcome_is_found_out_once_the_server_takes_connections_again() {
    let lab = Lab::new(1).await;
    let counts = Counts::default();
    lab.proxy.fault(COMMIT, Fault::CutDuring);
    let refused = async {
        let cut = async || lab.proxy.faults_left() == 0;
        eventually("no COMMIT is sent", cut).await;
        // More than a hundred questions.
        tokio::time::sleep(Duration::from_secs(8)).await;
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
        eventually("the server goes on", ended).await;
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
            assert_eq!(error.kind(), ErrorKind::CommitUnknown, "{what}");
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
            assert_eq!(error.kind(), ErrorKind::CommitUnknown, "{what}");
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
        assert_eq!(error.kind(), ErrorKind::CommitUnknown, "{what}");
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
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::ReadOnlyServer);
}

/// Connections that have gone silent, as after a failover that nobody has told their sockets of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_stays_silent_is_not_waited_for() {
    let lab = Lab::new(2).await;
    for (silent, kind) in [(1, None), (30, Some(ErrorKind::CommitUnknown))] {
        lab.reset().await;
        lab.pool_is_whole().await;
        let counts = Counts::default();
        lab.proxy.fault(COMMIT, Fault::CutAnswer);
        for _ in 0..silent {
            lab.proxy.fault(MARK, Fault::Stall);
        }
        let started = Instant::now();
        let answer = add(&lab.keeper, resolving(), &counts).await;
        assert!(started.elapsed() < Duration::from_secs(60));
        lab.agrees(&answer, &counts, "silent").await;
        assert_eq!(answer.err().map(|error| error.kind()), kind);
        assert_eq!(counts.runs(), 1);
        lab.proxy.clear_faults();
    }
}
