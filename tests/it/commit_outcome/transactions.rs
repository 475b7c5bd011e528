//! What else a transaction can be: of another role, only reading, behind a pooler.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lockkeeper::{Error, Keeper, TransactionOptions};
use lockkeeper_testkit::{Fault, PoolMode, eventually};
use tokio_postgres::{AsyncMessage, IsolationLevel, NoTls};

use super::{COMMIT, Counts, Lab, add, resolving};

/// A role that may connect may ask.
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
    let role = format!("nobody_{}", lab.database.name());
    lab.observer
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT ALL ON t TO {role}"
        ))
        .await
        .unwrap();
    let mut direct = lab.database.config();
    direct.user(&role);
    let keeper = Keeper::new(lab.proxy.pool(&direct, 1));
    let error = keeper
        .transaction_with(resolving(), async |tx| {
            tx.batch_execute("INSERT INTO t VALUES (2)").await?;
            // That the role may ask is known by now.
            let revoke = "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC";
            lab.observer.batch_execute(revoke).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().map(|state| state.code()), Some("42501"));
    drop(keeper);
    lab.settled().await;
    assert_eq!(lab.count("t").await, 1);
    let sql = format!("DROP OWNED BY {role}; DROP ROLE {role}");
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
