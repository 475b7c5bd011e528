//! Each cause that a report can name, from a live scene: what is told is what was done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::incident::{Cause, Completeness};
use lockkeeper::tokio_postgres::{Client, NoTls};
use lockkeeper::{Error, Incident, IncidentKind, TransactionOptions};
use lockkeeper_testkit::IncidentScene;
use tokio::sync::{Barrier, Notify};
use tokio::task::JoinHandle;

const ONE: &str = "UPDATE account SET balance = 1 WHERE id = 1";
const TWO: &str = "UPDATE account SET balance = 1 WHERE id = 2";
const THREE: &str = "UPDATE account SET balance = 1 WHERE id = 3";

/// A transaction's two statements: the second waits.
type Steps = [&'static str; 2];

/// Deadlocks a keeper's transaction with another session's, and gives the incident. Each has done its first step before
/// either does its second; the other one, which has no deadlock check, waits second. The closure's second attempt does
/// nothing.
async fn deadlock(reported: &IncidentScene, ours: Steps, theirs: Steps) -> Incident {
    let client = reported.stranger(&format!("BEGIN; {}", theirs[0])).await;
    let attempts = &AtomicU32::new(0);
    let ran = reported.keeper().transaction(async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute(ours[0]).await?;
            tx.batch_execute(ours[1]).await?;
        }
        Ok::<_, Error>(())
    });
    let (ran, ()) = tokio::join!(ran, async {
        reported.scene.until_lock_waiters(1).await;
        client.batch_execute(theirs[1]).await.unwrap();
        client.batch_execute("ROLLBACK").await.unwrap();
    });
    ran.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::Deadlock, "{incident}");
    assert_eq!(incident.sqlstate(), Some("40P01"));
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    assert_eq!(incident.cycle().len(), 2, "{incident}");
    incident
}

/// The same where each wants more of one thing. That the server sees at once, when the second one begins to wait: us.
async fn deadlock_at_once(reported: &IncidentScene, ours: Steps, theirs: Steps) -> Incident {
    let client = reported.stranger(&format!("BEGIN; {}", theirs[0])).await;
    let held = &Notify::new();
    let waits = &Notify::new();
    let attempts = &AtomicU32::new(0);
    let ran = reported.keeper().transaction(async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute(ours[0]).await?;
            held.notify_one();
            waits.notified().await;
            tx.batch_execute(ours[1]).await?;
        }
        Ok::<_, Error>(())
    });
    let waiting = async {
        reported.scene.until_lock_waiters(1).await;
        waits.notify_one();
    };
    let (ran, (), ()) = tokio::join!(ran, waiting, async {
        held.notified().await;
        client.batch_execute(theirs[1]).await.unwrap();
        client.batch_execute("ROLLBACK").await.unwrap();
    });
    ran.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.kind(), IncidentKind::Deadlock, "{incident}");
    assert_eq!(incident.cycle().len(), 2, "{incident}");
    incident
}

/// Lets a keeper's statement time out, and gives the report.
async fn time_out(reported: &IncidentScene, sql: &str) -> Incident {
    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_millis(900));
    let before = reported.incidents().len();
    let ran = reported.keeper().transaction_with(options, async |tx| {
        tx.batch_execute(sql).await.map_err(Error::from)
    });
    ran.await.unwrap_err();
    let incident = reported.after(before + 1).await.remove(before);
    assert_eq!(incident.kind(), IncidentKind::LockTimeout, "{incident}");
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    incident
}

/// A session whose statement runs by itself.
fn running(client: Client, sql: &'static str) -> JoinHandle<Client> {
    tokio::spawn(async move {
        let _ended = client.batch_execute(sql).await;
        client
    })
}

async fn scene(sql: &str) -> IncidentScene {
    let reported = IncidentScene::new(4).await;
    reported.scene.observer.batch_execute(sql).await.unwrap();
    reported
}

#[track_caller]
fn is(incident: &Incident, cause: Cause) {
    let diagnosis = incident.diagnosis();
    assert_eq!(diagnosis.cause(), cause, "{incident}");
    assert_ne!(diagnosis.fix(), None, "{incident}");
}

/// What the whole page has, wherever its lines end.
#[track_caller]
fn says(incident: &Incident, text: &str) {
    let page = incident.to_string();
    let page: Vec<_> = page.split_whitespace().collect();
    let page = page.join(" ");
    assert!(page.contains(text), "{text} is not in\n{incident}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_of_rows() {
    let reported = scene("").await;
    let incident = deadlock(&reported, [ONE, TWO], [TWO, ONE]).await;
    is(&incident, Cause::OrderInversion);
    assert!(incident.diagnosis().is_certain());
    says(
        &incident,
        "held row id = 1 of public.account and wanted row id = 2",
    );
    says(&incident, "ORDER BY id FOR NO KEY UPDATE");
    // Our own call too, and each process id once.
    says(&incident, "tx.lock_rows(\"public.account\", \"id\", ids)");
    says(&incident, "probably took");
    let page = incident.to_string();
    for (letter, participant) in ["A", "B"].into_iter().zip(incident.participants()) {
        let pid = participant.pid().unwrap().to_string();
        let is_pid = |word: &&str| *word == pid;
        let words = page.split(|c: char| !c.is_ascii_alphanumeric());
        assert_eq!(words.filter(is_pid).count(), 1, "{page}");
        assert_eq!(participant.letter(), letter);
        says(&incident, &format!("{letter}: PID {pid}"));
        says(&incident, &format!("blocked by process {letter}"));
    }
    assert!(!page.contains("took?"), "{page}");
}

/// The server finds a deadlock at once where each wants more of what both share: there is no sample, and its DETAIL has
/// numbers only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relations_that_only_the_detail_has_are_named() {
    let reported = scene("CREATE TABLE \"odd table\" (n int)").await;
    let share = "LOCK TABLE \"odd table\" IN SHARE MODE";
    let insert = "INSERT INTO \"odd table\" VALUES (1)";
    let incident = deadlock_at_once(&reported, [share, insert], [share, insert]).await;
    is(&incident, Cause::LockUpgrade);
    says(&incident, "public.\"odd table\"");
    for (name, shown) in [
        ("text", incident.diagnosis().text()),
        ("fix", incident.diagnosis().fix().unwrap()),
        ("headline", &incident.headline()),
    ] {
        assert!(shown.contains("public.\"odd table\""), "{name}: {shown}");
    }
    // So fast that nothing was sampled.
    let reported = scene("CREATE TABLE ledger (n int)").await;
    reported.scene.set("deadlock_timeout", "10ms").await;
    let ours = ["LOCK TABLE account IN SHARE MODE", "LOCK TABLE ledger"];
    let theirs = ["LOCK TABLE ledger", "LOCK TABLE account"];
    let client = reported.stranger(&format!("BEGIN; {}", theirs[0])).await;
    let (held, tried) = (&Notify::new(), &Notify::new());
    let ran = reported.keeper().transaction(async |tx| {
        if tx.attempt() == 1 {
            tx.batch_execute(ours[0]).await?;
            held.notify_one();
            tried.notified().await;
            tx.batch_execute(ours[1]).await?;
        }
        Ok::<_, Error>(())
    });
    let waiting = async {
        reported.scene.until_lock_waiters(1).await;
        tried.notify_one();
    };
    let (ran, (), ()) = tokio::join!(ran, waiting, async {
        held.notified().await;
        client.batch_execute(theirs[1]).await.unwrap();
        client.batch_execute("ROLLBACK").await.unwrap();
    });
    ran.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::DetailOnly,
        "{incident}"
    );
    says(&incident, "public.account before public.ledger");
    says(&incident, "waited for table public.ledger");
}

/// A session that waits for a row, and keeps others from it only by being the first in the row's queue, does not hold it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_in_a_rows_queue_is_no_holder() {
    let reported = scene("").await;
    let scene = &reported.scene;
    let second = reported.stranger(&format!("BEGIN; {TWO}")).await;
    let third = reported.stranger("BEGIN").await;
    let held = &Notify::new();
    let go = &Notify::new();
    let ran = reported.keeper().transaction(async |tx| {
        if tx.attempt() == 1 {
            tx.batch_execute(ONE).await?;
            held.notify_one();
            go.notified().await;
            tx.batch_execute(TWO).await?;
        }
        Ok::<_, Error>(())
    });
    let third = async {
        held.notified().await;
        third.batch_execute(ONE).await.unwrap();
        third.batch_execute("ROLLBACK").await.unwrap();
    };
    let second = async {
        scene.until_lock_waiters(1).await;
        second.batch_execute(ONE).await.unwrap();
        second.batch_execute("ROLLBACK").await.unwrap();
    };
    let last = async {
        scene.until_lock_waiters(2).await;
        go.notify_one();
    };
    let (ran, (), (), ()) = tokio::join!(ran, third, second, last);
    ran.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.cycle().len(), 3, "{incident}");
    is(&incident, Cause::OrderInversion);
    says(&incident, "C was queued for row id = 1 of public.account");
    says(&incident, "queued behind C");
    let page = incident.to_string();
    let (_, of_third) = page.split_once("C: PID").unwrap();
    let (of_third, _) = of_third.split_once("WHAT THE SERVER").unwrap();
    assert!(!of_third.contains("held"), "{of_third}");
}

/// Not a key, and not unique.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overlap_under_an_exclusion_constraint() {
    let sql = "CREATE TABLE booking (id int PRIMARY KEY, during int4range, EXCLUDE USING gist (during WITH &&))";
    let reported = scene(sql).await;
    let (one, two) = (
        "INSERT INTO booking VALUES (1, '[1,5)')",
        "INSERT INTO booking VALUES (2, '[11,15)')",
    );
    let (near_one, near_two) = (
        "INSERT INTO booking VALUES (3, '[4,6)')",
        "INSERT INTO booking VALUES (4, '[14,16)')",
    );
    let incident = deadlock(&reported, [one, near_two], [two, near_one]).await;
    is(&incident, Cause::ExclusionOverlap);
    says(&incident, "overlap under an exclusion constraint");
    assert!(!incident.to_string().contains("unique"), "{incident}");
    // A wait without a cycle.
    let holder = reported.stranger(&format!("BEGIN; {one}")).await;
    let running = running(holder, "SELECT pg_sleep(600)");
    let incident = {
        let before = reported.incidents().len();
        let options = TransactionOptions::new()
            .attempts(1)
            .lock_timeout(Duration::from_millis(900));
        let ran = reported.keeper().transaction_with(options, async |tx| {
            tx.batch_execute(near_one).await.map_err(Error::from)
        });
        ran.await.unwrap_err();
        reported.after(before + 1).await.remove(before)
    };
    is(&incident, Cause::ExclusionOverlap);
    running.abort();
}

/// Rows are named by their keys also where no sample shows the row: both share it, and so neither queues for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgrades_and_foreign_keys_name_the_row_by_its_key() {
    for (what, sql) in [
        ("share", "SELECT FROM account WHERE id = 2 FOR SHARE"),
        (
            "key share",
            "SELECT FROM account WHERE id = 2 FOR KEY SHARE",
        ),
        ("foreign key", "INSERT INTO item VALUES (1, 2)"),
    ] {
        let reported = scene(CHILD).await;
        let change = "SELECT FROM account WHERE id = 2 FOR UPDATE";
        let incident = deadlock(&reported, [sql, change], [sql, change]).await;
        is(&incident, Cause::LockUpgrade);
        let text = incident.diagnosis().text();
        assert!(
            text.contains("row id = 2 of public.account"),
            "{what}: {incident}"
        );
        says(&incident, "tx.lock_rows");
        let edge = &incident.cycle()[0];
        let key = edge.row_key().map(ToString::to_string);
        assert_eq!(key.as_deref(), Some("id = 2"), "{what}");
    }
    let reported = scene(CHILD).await;
    let theirs = ["SELECT FROM account WHERE id = 1 FOR UPDATE", TWO];
    let ours = [TWO, "INSERT INTO item VALUES (1, 1)"];
    let incident = deadlock(&reported, ours, theirs).await;
    is(&incident, Cause::ForeignKeyParent);
    says(&incident, "row id = 1 of public.account");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_of_rows_and_tables() {
    let reported = scene("CREATE TABLE ledger (n int)").await;
    let ours = [ONE, "LOCK TABLE ledger IN EXCLUSIVE MODE"];
    let theirs = ["INSERT INTO ledger VALUES (1)", ONE];
    let incident = deadlock(&reported, ours, theirs).await;
    is(&incident, Cause::OrderInversion);
    says(&incident, "public.account before public.ledger");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_of_an_advisory_lock_and_a_row() {
    let reported = scene("").await;
    let ours = ["SELECT pg_advisory_xact_lock(7)", ONE];
    let theirs = [ONE, "SELECT pg_advisory_xact_lock(7)"];
    let incident = deadlock(&reported, ours, theirs).await;
    is(&incident, Cause::OrderInversion);
    says(&incident, "Take the advisory lock first");
}

/// The row's lock is taken and wanted by a function and by a trigger; the statements do not name the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_through_a_function_and_a_trigger() {
    let reported = scene(
        "CREATE FUNCTION bump(n int) RETURNS void LANGUAGE plpgsql AS \
         'BEGIN UPDATE account SET balance = 4711 WHERE id = n; END'; \
         CREATE TABLE audit (n int); \
         CREATE FUNCTION audited() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN PERFORM bump(NEW.n); RETURN NEW; END'; \
         CREATE TRIGGER audited AFTER INSERT ON audit FOR EACH ROW EXECUTE FUNCTION audited()",
    )
    .await;
    let ours = ["SELECT bump(1)", "INSERT INTO audit VALUES (2)"];
    let incident = deadlock(&reported, ours, ["SELECT bump(2)", "SELECT bump(1)"]).await;
    is(&incident, Cause::OrderInversion);
    says(
        &incident,
        "held row id = 1 of public.account and wanted row id = 2",
    );
    let victim = incident.victim().statement().unwrap();
    assert!(victim.starts_with("INSERT INTO audit"), "{incident}");
    let all = format!("{incident}{incident:?}");
    assert!(!all.contains("4711"), "{all}");
    assert!(incident.context().unwrap().contains("bump"), "{incident}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_of_rows_of_a_partition() {
    let reported = scene(
        "CREATE TABLE event (id int PRIMARY KEY, n int) PARTITION BY RANGE (id); \
         CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM (1) TO (10); \
         INSERT INTO event VALUES (1, 0), (2, 0)",
    )
    .await;
    let (one, two) = (
        "UPDATE event SET n = 1 WHERE id = 1",
        "UPDATE event SET n = 1 WHERE id = 2",
    );
    let incident = deadlock(&reported, [one, two], [two, one]).await;
    is(&incident, Cause::OrderInversion);
    says(&incident, "row id = 1 of public.event_1");
}

/// The savepoint cannot save it; the closure passes the error on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_in_a_savepoint() {
    let reported = scene("").await;
    let client = reported.stranger(&format!("BEGIN; {TWO}")).await;
    let attempts = &AtomicU32::new(0);
    let ran = reported.keeper().transaction(async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute(ONE).await?;
            tx.savepoint(async |tx| tx.batch_execute(TWO).await.map_err(Error::from))
                .await?;
        }
        Ok::<_, Error>(())
    });
    let (ran, ()) = tokio::join!(ran, async {
        reported.scene.until_lock_waiters(1).await;
        client
            .batch_execute(&format!("{ONE}; ROLLBACK"))
            .await
            .unwrap();
    });
    ran.unwrap();
    let incident = reported.after(1).await.remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    is(&incident, Cause::OrderInversion);
}

/// The other one's statements are run past the journal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_with_a_statement_through_the_bare_client() {
    let reported = scene("").await;
    let (meet, met) = (&Barrier::new(2), &AtomicU32::new(0));
    let waits = &Notify::new();
    let survivor = reported.keeper().transaction(async |tx| {
        tx.batch_execute("SET LOCAL deadlock_timeout = '1h'")
            .await?;
        tx.client().batch_execute(TWO).await?;
        meet.wait().await;
        waits.notified().await;
        tx.client().batch_execute(ONE).await?;
        Ok::<_, Error>(())
    });
    let victim = reported.keeper().transaction(async |tx| {
        if met.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute(ONE).await?;
            meet.wait().await;
            tx.batch_execute(TWO).await?;
        }
        Ok::<_, Error>(())
    });
    let waiting = async {
        reported.scene.until_lock_waiters(1).await;
        waits.notify_one();
    };
    let (survivor, victim, ()) = tokio::join!(survivor, victim, waiting);
    survivor.unwrap();
    victim.unwrap();
    let incident = reported.after(1).await.remove(0);
    is(&incident, Cause::OrderInversion);
    let other = &incident.participants()[1];
    assert!(other.is_in_this_process());
    assert!(
        other.statement().unwrap().ends_with("WHERE id = ?"),
        "{incident}"
    );
    // What is not known to have waited is not reported to have.
    let marks: Vec<_> = other.journal().iter().map(|line| line.mark()).collect();
    assert_eq!(marks, [None], "{incident}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_inversion_of_three() {
    let reported = scene("").await;
    let meet = Arc::new(Barrier::new(3));
    let all: Vec<_> = [[ONE, TWO], [TWO, THREE], [THREE, ONE]]
        .into_iter()
        .map(|[first, second]| {
            let (keeper, meet) = (reported.keeper().clone(), Arc::clone(&meet));
            tokio::spawn(async move {
                let attempts = &AtomicU32::new(0);
                let ran = keeper.transaction(async |tx| {
                    tx.batch_execute(first).await?;
                    if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
                        meet.wait().await;
                    }
                    tx.batch_execute(second).await?;
                    Ok::<_, Error>(())
                });
                ran.await
            })
        })
        .collect();
    for ran in all {
        ran.await.unwrap().unwrap();
    }
    let incident = reported.after(1).await.remove(0);
    assert_eq!(
        incident.completeness(),
        Completeness::Complete,
        "{incident}"
    );
    assert_eq!(incident.cycle().len(), 3, "{incident}");
    assert_eq!(incident.participants().len(), 3, "{incident}");
    is(&incident, Cause::OrderInversion);
    // One line of this file began all of them.
    let headline = incident.headline();
    let site = incident.victim().call_site().unwrap();
    let expected = format!(": three transactions of {site} waited for one another");
    assert!(headline.ends_with(&expected), "{headline}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_upgrade_of_a_row() {
    let reported = scene("").await;
    let share = "SELECT FROM account WHERE id = 1 FOR SHARE";
    let incident = deadlock(&reported, [share, ONE], [share, ONE]).await;
    is(&incident, Cause::LockUpgrade);
    says(&incident, "row id = 1 of public.account");
}

/// A writer's lock on the table does not conflict with another writer's, but with what both want then. The server finds
/// it at once, so there is no sample.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_upgrade_of_a_table() {
    let reported = scene("").await;
    let exclusive = "LOCK TABLE account IN EXCLUSIVE MODE";
    let incident = deadlock_at_once(&reported, [ONE, exclusive], [TWO, exclusive]).await;
    is(&incident, Cause::LockUpgrade);
    says(&incident, "LOCK TABLE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_upgrade_of_an_advisory_lock() {
    let reported = scene("").await;
    let shared = "SELECT pg_advisory_xact_lock_shared(7)";
    let exclusive = "SELECT pg_advisory_xact_lock(7)";
    let incident = deadlock_at_once(&reported, [shared, exclusive], [shared, exclusive]).await;
    is(&incident, Cause::LockUpgrade);
}

const CHILD: &str = "CREATE TABLE item (id int, account int REFERENCES account (id))";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_keys_parent_under_for_update() {
    let reported = scene(CHILD).await;
    let holder = reported
        .stranger("BEGIN; SELECT FROM account WHERE id = 1 FOR UPDATE")
        .await;
    let incident = time_out(&reported, "INSERT INTO item VALUES (1, 1)").await;
    drop(holder);
    // What to do about that is the same whatever it holds.
    is(&incident, Cause::IdleInTransaction);
    let theirs = ["SELECT FROM account WHERE id = 1 FOR UPDATE", TWO];
    let ours = [TWO, "INSERT INTO item VALUES (1, 1)"];
    let reported = scene(CHILD).await;
    let incident = deadlock(&reported, ours, theirs).await;
    is(&incident, Cause::ForeignKeyParent);
    says(&incident, "NO KEY UPDATE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unique_keys_inserted_in_another_order() {
    let reported = scene("").await;
    let (four, five) = (
        "INSERT INTO account VALUES (4, 0)",
        "INSERT INTO account VALUES (5, 0)",
    );
    let incident = deadlock(&reported, [four, five], [five, four]).await;
    is(&incident, Cause::UniqueInsert);
    says(&incident, "order of their unique key");
    assert!(incident.diagnosis().is_certain(), "{incident}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_build_against_a_writer() {
    let reported = scene("CREATE TABLE ledger (n int)").await;
    let theirs = [
        "UPDATE account SET balance = 1 WHERE id = 1",
        "INSERT INTO ledger VALUES (1)",
    ];
    let ours = [
        "CREATE INDEX ON ledger (n)",
        "CREATE INDEX ON account (balance)",
    ];
    let incident = deadlock(&reported, ours, theirs).await;
    is(&incident, Cause::IndexBuild);
    // A writer behind an index build that waits for another writer.
    let reported = scene("").await;
    let writer = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let build = reported.stranger("").await;
    let build = running(build, "CREATE INDEX ON account (balance)");
    reported.scene.until_lock_waiters(1).await;
    let incident = time_out(&reported, TWO).await;
    is(&incident, Cause::LockQueue);
    writer.batch_execute("ROLLBACK").await.unwrap();
    drop(build.await.unwrap());
    // A writer behind one that has its lock.
    let build = reported
        .stranger("BEGIN; CREATE INDEX ON account (balance)")
        .await;
    let build = running(build, "CREATE INDEX ON account (note); SELECT pg_sleep(0)");
    let build = build.await.unwrap();
    let cancel = build.cancel_token();
    let build = running(build, "REINDEX TABLE account; SELECT pg_sleep(600)");
    let incident = time_out(&reported, TWO).await;
    is(&incident, Cause::IndexBuild);
    cancel.cancel_query(NoTls).await.unwrap();
    drop(build.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_is_idle_in_its_transaction() {
    let reported = scene("").await;
    let holder = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let incident = time_out(&reported, ONE).await;
    is(&incident, Cause::IdleInTransaction);
    drop(holder);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_is_busy() {
    let reported = scene("").await;
    let holder = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let cancel = holder.cancel_token();
    let holder = running(holder, "SELECT pg_sleep(600)");
    let incident = time_out(&reported, ONE).await;
    is(&incident, Cause::RunningHolder);
    says(&incident, "pg_sleep");
    cancel.cancel_query(NoTls).await.unwrap();
    drop(holder.await.unwrap());
}

/// A reader who waits only because an ALTER TABLE does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_behind_a_strong_lock() {
    let reported = scene("").await;
    let reader = reported.stranger("BEGIN; SELECT FROM account").await;
    let alter = reported.stranger("").await;
    let alter = running(alter, "ALTER TABLE account ADD COLUMN more int");
    reported.scene.until_lock_waiters(1).await;
    let incident = time_out(&reported, "SELECT FROM account").await;
    is(&incident, Cause::LockQueue);
    says(&incident, "AccessExclusiveLock");
    reader.batch_execute("ROLLBACK").await.unwrap();
    drop(alter.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cycle_through_the_queue_is_no_deadlock() {
    let reported = scene("").await;
    // The reader holds the table, the ALTER waits for it, and we wait behind the ALTER with what the reader wants.
    let reader = reported.stranger("BEGIN; SELECT FROM account").await;
    let alter = reported.stranger("").await;
    let attempts = &AtomicU32::new(0);
    let ran = reported.keeper().transaction(async |tx| {
        if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
            tx.batch_execute("SELECT pg_advisory_xact_lock(7)").await?;
            tx.batch_execute("SELECT FROM account").await?;
        }
        Ok::<_, Error>(())
    });
    let alter = running(alter, "ALTER TABLE account ADD COLUMN more int");
    reported.scene.until_lock_waiters(1).await;
    let (ran, ()) = tokio::join!(ran, async {
        reported.scene.until_lock_waiters(2).await;
        reader
            .batch_execute("SELECT pg_advisory_xact_lock(7)")
            .await
            .unwrap();
        reader.batch_execute("ROLLBACK").await.unwrap();
    });
    ran.unwrap();
    drop(alter.await.unwrap());
    // The server has let us overtake the ALTER.
    assert!(reported.incidents().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_advisory_lock_that_is_held() {
    let reported = scene("").await;
    let holder = reported.stranger("SELECT pg_advisory_lock(7)").await;
    let incident = time_out(&reported, "SELECT pg_advisory_xact_lock(7)").await;
    is(&incident, Cause::AdvisoryLockHeld);
    drop(holder);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_that_was_left() {
    let reported = scene("").await;
    let gid = format!("{}_left", reported.scene.database.name());
    let sql = format!("BEGIN; {ONE}; PREPARE TRANSACTION '{gid}'");
    let holder = reported.stranger(&sql).await;
    let incident = time_out(&reported, ONE).await;
    let end = format!("ROLLBACK PREPARED '{gid}'");
    holder.batch_execute(&end).await.unwrap();
    is(&incident, Cause::PreparedTransaction);
    says(&incident, &gid);
}

/// Two others wait for one another, and we wait for one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_the_deadlock_of_others() {
    let reported = scene("").await;
    let one = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let two = reported.stranger(&format!("BEGIN; {TWO}; {THREE}")).await;
    let one = running(one, TWO);
    reported.scene.until_lock_waiters(1).await;
    let cancel = two.cancel_token();
    let two = running(two, ONE);
    reported.scene.until_lock_waiters(2).await;
    let incident = time_out(&reported, THREE).await;
    is(&incident, Cause::BehindDeadlock);
    cancel.cancel_query(NoTls).await.unwrap();
    drop(two.await.unwrap());
    drop(one.await.unwrap());
}

/// Nothing was seen and the server says little: no cause is made up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_seen_is_not_explained() {
    let reported = IncidentScene::with(2, |builder, _| builder.watch(false)).await;
    let holder = reported.stranger(&format!("BEGIN; {ONE}")).await;
    let options = TransactionOptions::new()
        .attempts(1)
        .lock_timeout(Duration::from_millis(50));
    let ran = reported.keeper().transaction_with(options, async |tx| {
        tx.batch_execute(ONE).await.map_err(Error::from)
    });
    ran.await.unwrap_err();
    drop(holder);
    let incident = reported.after(1).await.remove(0);
    assert_eq!(incident.diagnosis().cause(), Cause::Unknown, "{incident}");
    assert!(!incident.diagnosis().is_certain());
    assert_eq!(incident.diagnosis().fix(), None);
    assert!(incident.caveats().any(|why| why.contains("switched off")));
}
