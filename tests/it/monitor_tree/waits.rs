//! Which session waits for which: chains, queues, cycles.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use lockkeeper::graph::{Edge, LockObject};
use lockkeeper::{LockKey, LockMode};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, Server, eventually};

use super::{Stage, expected};

#[tokio::test]
async fn a_chain_and_another_tree() {
    let mut stage = Stage::with_table().await;
    let [a, b, c] = stage.actors().await;
    a.run("BEGIN; UPDATE t SET v = 'secret-a' WHERE id = 1")
        .await;
    b.run("BEGIN; UPDATE t SET v = 'secret-b' WHERE id = 2")
        .await;
    stage
        .waits(&b, "UPDATE t SET v = 'secret-c' WHERE id = 1")
        .await;
    stage
        .waits(&c, "UPDATE t SET v = 'secret-d' WHERE id = 2")
        .await;
    let guard = stage
        .scene
        .keeper
        .advisory_lock("invoice:42")
        .acquire()
        .await
        .unwrap();
    let holder = guard.backend_pid().unwrap();
    stage.names.insert(holder, 'H');
    let d = stage.actor().await;
    stage.names.insert(d.pid, 'D');
    let key = LockKey::from("invoice:42").as_i64().unwrap();
    stage
        .waits(&d, &format!("SELECT pg_advisory_lock({key})"))
        .await;

    let (before, asked) = (SystemTime::now(), Instant::now());
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let took = snapshot.duration();
    assert!(took > Duration::ZERO && took <= asked.elapsed(), "{took:?}");
    let off = snapshot
        .taken_at()
        .duration_since(before)
        .unwrap_or_else(|error| error.duration());
    assert!(off < GIVE_UP_AFTER, "{off:?}");
    let tree = snapshot.tree();
    assert_eq!(stage.shape(&tree), "A[B[C]] H[D]");
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C held by B", "D held by H"])
    );
    assert_eq!(snapshot.blocked_count(&a.pid.into()), 2);

    let edge = stage.edge(&snapshot, &b);
    assert!(
        matches!(edge.object(), LockObject::Transaction(_)),
        "{edge}"
    );
    assert_eq!(edge.row().unwrap().to_string(), "row (0,1) of public.t");
    assert_eq!(edge.row().unwrap().relation().kind(), Some('r'));
    assert_eq!(
        (edge.mode_wanted(), edge.mode_held()),
        (LockMode::Share, Some(LockMode::Exclusive))
    );
    assert!(edge.wait_age().unwrap() < GIVE_UP_AFTER);
    assert_eq!(edge.worker(), None);
    let edge = stage.edge(&snapshot, &d);
    assert_eq!(edge.object().to_string(), "advisory lock \"invoice:42\"");
    assert_eq!(
        edge.object().advisory_key(),
        Some(&LockKey::from("invoice:42"))
    );

    let root = snapshot.backend(&a.pid.into()).unwrap();
    assert_eq!(root.application_name(), Some("actor A"));
    assert_eq!(root.state(), Some("idle in transaction"));
    assert_eq!(root.database(), Some(stage.scene.database.name()));
    assert_eq!(root.backend_type(), Some("client backend"));
    assert_eq!(root.wait_event(), Some("ClientRead"));
    assert!(root.statement().unwrap().contains("secret-a"));
    assert!(!root.is_hidden() && !root.is_gone());
    for age in [
        root.state_age(),
        root.transaction_age(),
        root.statement_age(),
        root.connection_age(),
    ] {
        assert!(age.unwrap() < GIVE_UP_AFTER, "{age:?}");
    }
    // To the microsecond: the server finds the session again by it.
    let sql = "SELECT extract(epoch FROM backend_start)::text, extract(epoch FROM xact_start)::text \
               FROM pg_stat_activity WHERE pid = $1";
    let row = stage
        .scene
        .observer
        .query_one(sql, &[&a.pid])
        .await
        .unwrap();
    for (at, time) in [root.backend_start(), root.transaction_start()]
        .into_iter()
        .enumerate()
    {
        let since = time
            .unwrap()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        assert_eq!(
            row.get::<_, String>(at),
            format!("{}.{:06}", since.as_secs(), since.subsec_micros())
        );
    }
    let text = tree.to_string();
    assert!(text.contains("tests/it/monitor_tree/waits.rs:"), "{text}");
    assert!(
        !text.contains("secret") && tree.verbatim().to_string().contains("secret-d"),
        "{text}"
    );
    assert!(!format!("{tree:?}").contains("secret"));

    // Of one session, only what it depends on.
    let snapshot = stage.monitor.snapshot_of(&[b.pid]).await.unwrap();
    assert_eq!(stage.edges(&snapshot), expected(["B held by A"]));
    assert_eq!(snapshot.edges().len(), 1);
    let snapshot = stage.monitor.snapshot_of(&[c.pid, d.pid]).await.unwrap();
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C held by B", "D held by H"])
    );
    assert!(
        stage
            .monitor
            .snapshot_of(&[a.pid])
            .await
            .unwrap()
            .is_empty()
    );
    assert!(stage.monitor.snapshot_of(&[]).await.unwrap().is_empty());

    let activity = stage.monitor.activity().await.unwrap();
    let pids: BTreeSet<_> = activity
        .iter()
        .filter_map(|backend| backend.pid())
        .collect();
    assert!(stage.names.keys().all(|pid| pids.contains(pid)));
    assert!(
        activity
            .iter()
            .any(|backend| backend.backend_type() == Some("checkpointer"))
    );
    guard.rollback().await;
    stage.done().await;
}

#[tokio::test]
async fn rows_that_several_want_have_a_queue() {
    let mut stage = Stage::with_table().await;
    let [a, b, c, d] = stage.actors().await;
    a.run("BEGIN; UPDATE t SET v = 'a' WHERE id = 1").await;
    for waiter in [&b, &c, &d] {
        stage
            .waits(waiter, "UPDATE t SET v = 'b' WHERE id = 1")
            .await;
    }
    let snapshot = stage.monitor.snapshot().await.unwrap();
    // The first in line holds the row's lock, the others queue for that.
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C held by B", "D held by B", "D behind C"])
    );
    assert_eq!(stage.shape(&snapshot.tree()), "A[B[C D]]");
    for waiter in [&b, &c, &d] {
        let edge = stage.edge(&snapshot, waiter);
        assert_eq!(edge.row().unwrap().ctid(), "(0,1)", "{edge}");
        assert_eq!(edge.row().unwrap().relation().name(), Some("t"));
    }
    stage.done().await;
}

#[tokio::test]
async fn a_deadlock_before_the_server_ends_it() {
    let mut stage = Stage::with_table().await;
    let [a, b, c] = stage.actors().await;
    a.run("BEGIN; UPDATE t SET v = 'a' WHERE id = 1").await;
    b.run("BEGIN; UPDATE t SET v = 'b' WHERE id = 2").await;
    stage.waits(&a, "UPDATE t SET v = 'a' WHERE id = 2").await;
    stage.waits(&b, "UPDATE t SET v = 'b' WHERE id = 1").await;
    stage.waits(&c, "BEGIN; LOCK TABLE t").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let cycles: Vec<_> = snapshot
        .cycles()
        .into_iter()
        .filter(|cycle| cycle.members().any(|id| stage.is_ours(id)))
        .collect();
    assert_eq!(cycles.len(), 1);
    assert!(cycles[0].is_deadlock());
    let members: Vec<_> = cycles[0].members().map(|id| stage.name(id)).collect();
    assert_eq!(members, ["A", "B"], "who has waited longest comes first");
    let tree = snapshot.tree();
    let shape = stage.shape(&tree);
    assert!(shape == "A[B C]" || shape == "A[B[C]]", "{shape}");
    let text = tree.to_string();
    let line = format!("deadlock: pid {} → pid {} → pid {}\n", a.pid, b.pid, a.pid);
    assert!(text.contains(&line), "{text}");
    // From outside the cycle all of it is reached, and it ends.
    let snapshot = stage.monitor.snapshot_of(&[c.pid]).await.unwrap();
    assert_eq!(
        stage.edges(&snapshot),
        expected(["A held by B", "B held by A", "C held by A", "C held by B"])
    );
    stage.done().await;
}

#[tokio::test]
async fn readers_behind_a_waiting_alter_are_behind_it_only() {
    let mut stage = Stage::with_table().await;
    let [a, b, c, d] = stage.actors().await;
    a.run("BEGIN; SELECT FROM t").await;
    stage.waits(&b, "ALTER TABLE t ADD COLUMN w int").await;
    stage.waits(&c, "SELECT FROM t").await;
    stage.waits(&d, "SELECT FROM t").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C behind B", "D behind B"])
    );
    let edge = stage.edge(&snapshot, &b);
    assert_eq!(edge.object().to_string(), "relation public.t");
    assert_eq!(
        (edge.mode_wanted(), edge.mode_held()),
        (LockMode::AccessExclusive, Some(LockMode::AccessShare))
    );
    let edge = stage.edge(&snapshot, &c);
    assert_eq!(
        (edge.mode_held(), edge.mode_queued()),
        (None, Some(LockMode::AccessExclusive))
    );
    let tree = snapshot.tree();
    assert_eq!(stage.shape(&tree), "A[B[C D]]");
    assert!(tree.to_string().contains("waits"), "{tree}");
    stage.done().await;
}

#[tokio::test]
async fn a_session_that_holds_one_lock_and_queues_for_a_stronger_one() {
    let mut stage = Stage::with_table().await;
    let [a, b, c] = stage.actors().await;
    a.run("BEGIN; LOCK TABLE t IN ROW SHARE MODE").await;
    b.run("BEGIN; LOCK TABLE t IN ROW EXCLUSIVE MODE").await;
    stage.waits(&b, "LOCK TABLE t IN EXCLUSIVE MODE").await;
    // In conflict with what B holds, not only with what B wants.
    stage.waits(&c, "BEGIN; LOCK TABLE t IN SHARE MODE").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C held by B"])
    );
    assert_eq!(
        stage.edge(&snapshot, &c).mode_held(),
        Some(LockMode::RowExclusive)
    );
    assert_eq!(
        stage.edge(&snapshot, &b).mode_held(),
        Some(LockMode::RowShare)
    );
    stage.done().await;
}

/// Every transaction takes its rows in the same order, so that no deadlock is possible. But their waits are
/// short, and others are so many that asking which session blocks which takes a while, in which these begin and end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_deadlock_is_seen_where_there_is_none() {
    let settings = [("max_connections", "300"), ("deadlock_timeout", "10min")];
    let server = Server::start(&settings).unwrap();
    let stage = Stage::of(Scene::on(&server, 2).await);
    let sql = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(0, 4); \
               SELECT pg_advisory_lock(1)";
    stage.scene.observer.batch_execute(sql).await.unwrap();
    let mut tasks = Vec::new();
    for _ in 0..200 {
        let client = stage.scene.database.connect().await;
        tasks.push(tokio::spawn(async move {
            client
                .batch_execute("SELECT pg_advisory_lock(1)")
                .await
                .unwrap();
        }));
    }
    for n in 0..20 {
        let client = stage.scene.database.connect().await;
        tasks.push(tokio::spawn(async move {
            let mut rows = [n % 5, (n + 1) % 5, (n + 2) % 5];
            rows.sort_unstable();
            loop {
                client.batch_execute("BEGIN").await.unwrap();
                for row in rows {
                    let sql = format!("UPDATE t SET id = id WHERE id = {row}");
                    client.batch_execute(&sql).await.unwrap();
                }
                client.batch_execute("COMMIT").await.unwrap();
            }
        }));
    }
    eventually("not all of them wait", async || {
        stage.monitor.snapshot().await.unwrap().waiters().len() >= 200
    })
    .await;
    let mut short = 0;
    for _ in 0..200 {
        let snapshot = stage.monitor.snapshot().await.unwrap();
        let of_rows = |edge: &&Edge| edge.object().advisory_key().is_none();
        short += snapshot.edges().iter().filter(of_rows).count();
        let cycles = snapshot.cycles();
        assert!(cycles.is_empty(), "{cycles:?}");
    }
    assert!(short > 0, "nothing happened beside the long waits");
    for task in tasks {
        task.abort();
    }
}
