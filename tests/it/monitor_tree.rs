//! The monitor's picture of who waits for whom, against scenes that are known.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lockkeeper::graph::{BackendId, Edge, EdgeKind, LockObject, LockTree, Snapshot, TreeNode};
use lockkeeper::{AdvisoryMode, Keeper, LockKey, LockMode, Monitor};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, Server, eventually, pid_of, poll_times_and_drop, until_waiting,
};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

/// A session of the play, by its name.
struct Actor {
    client: Arc<Client>,
    pid: i32,
}

impl Actor {
    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    /// Begins something that has to wait.
    fn start(&self, sql: impl Into<String>) -> JoinHandle<Result<(), tokio_postgres::Error>> {
        let (client, sql) = (Arc::clone(&self.client), sql.into());
        tokio::spawn(async move { client.batch_execute(&sql).await })
    }
}

/// A scene with named sessions, of which the shared server's other sessions are told apart.
struct Stage {
    scene: Scene,
    monitor: Monitor,
    names: BTreeMap<i32, char>,
    waits: Vec<JoinHandle<Result<(), tokio_postgres::Error>>>,
}

impl Stage {
    async fn new() -> Self {
        Self::of(Scene::new(2).await)
    }

    fn of(scene: Scene) -> Self {
        let keeper = Keeper::builder(scene.pool.clone())
            .side_connection(scene.database.config(), NoTls)
            .build();
        Self {
            scene,
            monitor: keeper.monitor(),
            names: BTreeMap::new(),
            waits: Vec::new(),
        }
    }

    /// With a table of some rows.
    async fn with_table() -> Self {
        let stage = Self::new().await;
        let sql = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n, 'x' FROM generate_series(1, 9) n";
        stage.scene.observer.batch_execute(sql).await.unwrap();
        stage
    }

    /// Named A, B, C, … in the order of their coming.
    async fn actor(&mut self) -> Actor {
        let client = self.scene.database.connect().await;
        let pid = pid_of(&client).await;
        let name = char::from(b'A' + u8::try_from(self.names.len()).unwrap());
        // A deadlock is to last until it is looked at.
        let sql = format!("SET deadlock_timeout = '30s'; SET application_name = 'actor {name}'");
        client.batch_execute(&sql).await.unwrap();
        self.names.insert(pid, name);
        Actor {
            client: Arc::new(client),
            pid,
        }
    }

    async fn actors<const N: usize>(&mut self) -> [Actor; N] {
        let mut actors = Vec::new();
        for _ in 0..N {
            actors.push(self.actor().await);
        }
        actors.try_into().ok().unwrap()
    }

    /// Starts something, and comes back when it waits for a lock.
    async fn waits(&mut self, actor: &Actor, sql: &str) {
        self.waits.push(actor.start(sql));
        self.waiting(actor.pid).await;
    }

    async fn waiting(&self, pid: i32) {
        until_waiting(&self.scene.observer, pid).await;
    }

    fn name(&self, id: &BackendId) -> String {
        match id.pid() {
            Some(pid) => self
                .names
                .get(&pid)
                .map_or_else(|| "?".into(), char::to_string),
            None => format!("prepared {}", id.prepared_transaction().unwrap()),
        }
    }

    fn is_ours(&self, id: &BackendId) -> bool {
        self.names.contains_key(&id.pid().unwrap_or(0))
    }

    /// `B waits for A`, each with its kind; of our own sessions only.
    fn edges(&self, snapshot: &Snapshot) -> BTreeSet<String> {
        let ours = snapshot.edges().iter();
        ours.filter(|edge| self.is_ours(edge.waiter()))
            .map(|edge| {
                let by = match edge.kind() {
                    EdgeKind::Hard => "held by",
                    EdgeKind::Soft => "behind",
                    _ => unreachable!(),
                };
                format!(
                    "{} {by} {}",
                    self.name(edge.waiter()),
                    self.name(edge.blocker())
                )
            })
            .collect()
    }

    /// `A[B[C]] D[E]`, of our own sessions only.
    fn shape(&self, tree: &LockTree) -> String {
        let ours = tree.roots().filter(|root| {
            self.is_ours(root.backend().id())
                || root
                    .children()
                    .any(|child| self.is_ours(child.backend().id()))
        });
        self.shape_of(ours)
    }

    fn shape_of<'a>(&self, nodes: impl Iterator<Item = TreeNode<'a>>) -> String {
        let mut shown: Vec<_> = nodes
            .map(|node| {
                let name = self.name(node.backend().id());
                match self.shape_of(node.children()) {
                    below if below.is_empty() => name,
                    below => format!("{name}[{below}]"),
                }
            })
            .collect();
        shown.sort();
        shown.join(" ")
    }

    fn edge<'a>(&self, snapshot: &'a Snapshot, waiter: &Actor) -> &'a Edge {
        snapshot.edges_of(&waiter.pid.into()).next().unwrap()
    }

    async fn done(self) {
        for wait in &self.waits {
            wait.abort();
        }
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                   WHERE datname = current_database() AND application_name LIKE 'actor %'";
        self.scene.observer.batch_execute(sql).await.unwrap();
        self.scene.nothing_left().await;
    }
}

fn expected<const N: usize>(edges: [&str; N]) -> BTreeSet<String> {
    edges.map(str::to_owned).into()
}

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
    let took = snapshot.took();
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
    assert_eq!(snapshot.blocked_by(&a.pid.into()), 2);

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
        root.in_state(),
        root.in_transaction(),
        root.since_statement(),
        root.connected_for(),
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
    assert!(text.contains("tests/it/monitor_tree.rs:"), "{text}");
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
    // From outside the circle all of it is reached, and it ends.
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

#[tokio::test]
async fn prepared_transactions_are_roots_without_a_pid() {
    let mut stage = Stage::with_table().await;
    let [a, b, c] = stage.actors().await;
    let gid = format!("monitor-{}", stage.scene.database.name());
    a.run(&format!(
        "BEGIN; UPDATE t SET v = 'a' WHERE id = 1; PREPARE TRANSACTION '{gid}'"
    ))
    .await;
    // In nobody's way.
    a.run(&format!(
        "BEGIN; SELECT FROM t; PREPARE TRANSACTION '{gid}-reads'"
    ))
    .await;
    stage.waits(&b, "UPDATE t SET v = 'b' WHERE id = 1").await;
    stage.waits(&c, "BEGIN; LOCK TABLE t IN SHARE MODE").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let held_by = |waiter: &str| format!("{waiter} held by prepared {gid}");
    let edges = [held_by("B"), held_by("C"), "C held by B".to_owned()];
    assert_eq!(stage.edges(&snapshot), edges.into());
    let id = BackendId::Prepared(Some(gid.as_str().into()));
    let prepared = snapshot.backend(&id).unwrap();
    assert_eq!(
        (prepared.pid(), prepared.prepared_transaction()),
        (None, Some(gid.as_str()))
    );
    assert_eq!(prepared.database(), Some(stage.scene.database.name()));
    assert_eq!(prepared.user(), stage.scene.database.config().get_user());
    assert!(prepared.in_transaction().unwrap() < GIVE_UP_AFTER);
    assert_eq!(
        (prepared.state(), prepared.application_name()),
        (None, None)
    );
    assert_eq!(snapshot.blocked_by(&id), 2);
    let text = snapshot.tree().to_string();
    assert!(
        text.contains(&format!("prepared transaction \"{gid}\" (user ")),
        "{text}"
    );
    assert!(!text.contains("-reads"), "{text}");
    for gid in [gid.clone(), format!("{gid}-reads")] {
        stage
            .scene
            .observer
            .batch_execute(&format!("ROLLBACK PREPARED '{gid}'"))
            .await
            .unwrap();
    }
    stage.done().await;
}

#[tokio::test]
async fn workers_of_a_parallel_query_count_as_their_leader() {
    let mut stage = Stage::with_table().await;
    let sql = "CREATE FUNCTION look() RETURNS bigint LANGUAGE plpgsql PARALLEL SAFE \
               AS 'BEGIN RETURN (SELECT count(*) FROM t); END'";
    stage.scene.observer.batch_execute(sql).await.unwrap();
    let [a, b] = stage.actors().await;
    let setting = if stage.scene.database.server().major() >= 16 {
        "debug_parallel_query"
    } else {
        "force_parallel_mode"
    };
    a.run("BEGIN; LOCK TABLE t").await;
    b.run(&format!("SET {setting} = on")).await;
    stage.waits.push(b.start("SELECT look()"));
    let mut snapshot = stage.monitor.snapshot().await.unwrap();
    eventually("no worker waits", async || {
        snapshot = stage.monitor.snapshot().await.unwrap();
        stage.edges(&snapshot) == expected(["B held by A"])
    })
    .await;
    let edge = stage.edge(&snapshot, &b);
    let worker = edge.worker().expect("a worker waits, not the leader");
    let worker = snapshot.backend(&worker.into()).unwrap();
    assert_eq!(worker.leader_pid(), Some(b.pid));
    assert_eq!(worker.backend_type(), Some("parallel worker"));
    let tree = snapshot.tree();
    assert_eq!(stage.shape(&tree), "A[B]");
    let node = tree
        .walk()
        .find(|(_, node)| node.backend().pid() == Some(b.pid))
        .unwrap()
        .1;
    assert_eq!(node.workers(), [worker.pid().unwrap()]);
    // Asked about the leader.
    let snapshot = stage.monitor.snapshot_of(&[b.pid]).await.unwrap();
    assert_eq!(stage.edges(&snapshot), expected(["B held by A"]));
    stage.done().await;
}

#[tokio::test]
async fn a_role_without_privileges_sees_who_and_where_and_the_rest_as_hidden() {
    let mut stage = Stage::with_table().await;
    let role = format!("nobody_{}", stage.scene.database.name());
    let create = format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'");
    stage.scene.observer.batch_execute(&create).await.unwrap();
    let [a, b, c] = stage.actors().await;
    a.run("BEGIN; UPDATE t SET v = 'a' WHERE id = 1").await;
    stage
        .waits(&b, "UPDATE t SET v = 'secret' WHERE id = 1")
        .await;
    stage.waits(&c, "BEGIN; LOCK TABLE t").await;
    let whole = stage.monitor.snapshot().await.unwrap();

    let mut config = stage.scene.database.config();
    config.user(&role).password("secret");
    // A look that is not answered in time is taken on the pool's, which is of the same role.
    let keeper = Keeper::builder(stage.scene.database.pool_as(&role, 2))
        .side_connection(config, NoTls)
        .build();
    let snapshot = keeper.monitor().snapshot().await.unwrap();
    assert_eq!(stage.edges(&snapshot), stage.edges(&whole));
    assert_eq!(stage.shape(&snapshot.tree()), stage.shape(&whole.tree()));
    for waiter in [&b, &c] {
        let (seen, whole) = (stage.edge(&snapshot, waiter), stage.edge(&whole, waiter));
        assert_eq!(seen.object(), whole.object());
        assert_eq!(seen.row(), whole.row());
        assert_eq!(seen.waiting_since(), whole.waiting_since());
        assert_eq!(seen.mode_held(), whole.mode_held());
    }
    let hidden = snapshot.backend(&b.pid.into()).unwrap();
    assert!(hidden.is_hidden() && !hidden.is_gone());
    assert_eq!(hidden.application_name(), Some("actor B"));
    assert_eq!(hidden.user(), stage.scene.database.config().get_user());
    assert_eq!((hidden.state(), hidden.statement()), (None, None));
    assert_eq!((hidden.wait_event(), hidden.backend_start()), (None, None));
    let text = snapshot.tree().to_string();
    assert!(
        text.contains("state hidden") && text.contains("statement hidden"),
        "{text}"
    );
    assert!(
        !text.contains("idle") && !text.contains("insufficient"),
        "{text}"
    );
    // What is there is the role's own connection.
    let activity = keeper.monitor().activity().await.unwrap();
    let own = activity
        .iter()
        .find(|backend| backend.user() == Some(&role))
        .unwrap();
    assert!(!own.is_hidden() && own.state() == Some("active"));
    drop(keeper);
    let observer = stage.scene.database.connect().await;
    stage.done().await;
    eventually("the role is still in use", async || {
        observer
            .batch_execute(&format!("DROP ROLE {role}"))
            .await
            .is_ok()
    })
    .await;
}

#[tokio::test]
async fn objects_of_another_database_have_no_name_here() {
    let mut stage = Stage::with_table().await;
    let other = stage.scene.database.server().database().await;
    let [a, b] = stage.actors().await;
    // The other database has one with this number too.
    a.run("BEGIN; LOCK TABLE pg_language; SELECT pg_advisory_xact_lock(77)")
        .await;
    stage.waits(&b, "SELECT FROM pg_language").await;
    let c = stage.actor().await;
    stage.waits(&c, "SELECT pg_advisory_lock(77)").await;
    let keeper = Keeper::new(other.pool(1));
    let snapshot = keeper.monitor().snapshot().await.unwrap();
    let relation = stage
        .edge(&snapshot, &b)
        .object()
        .relation()
        .unwrap()
        .clone();
    assert_eq!(
        (relation.name(), relation.schema(), relation.kind()),
        (None, None, None)
    );
    assert_eq!(relation.database(), Some(stage.scene.database.name()));
    let shown = format!(
        "relation {} in database {}",
        relation.oid(),
        stage.scene.database.name()
    );
    assert_eq!(stage.edge(&snapshot, &b).object().to_string(), shown);
    let shown = format!(
        "advisory lock 77 in database {}",
        stage.scene.database.name()
    );
    assert_eq!(stage.edge(&snapshot, &c).object().to_string(), shown);
    stage.done().await;
}

/// Waits on other things than tables, rows and transactions.
#[tokio::test]
async fn rarer_objects_are_named_too() {
    let mut stage = Stage::with_table().await;
    stage
        .scene
        .observer
        .batch_execute("CREATE SCHEMA s; CREATE TABLE \"T 2\" (id int)")
        .await
        .unwrap();
    let [a, b, c, d] = stage.actors().await;
    a.run("BEGIN; CREATE TABLE s.new (); INSERT INTO t VALUES (100, 'a'); LOCK TABLE \"T 2\" IN ROW EXCLUSIVE MODE").await;
    // The name of a schema in use is locked against its being dropped.
    stage.waits(&b, "DROP SCHEMA s").await;
    let edge = stage.monitor.snapshot().await.unwrap();
    let object = stage.edge(&edge, &b).object().clone();
    assert!(
        object.to_string().starts_with("object ")
            && object.to_string().ends_with(" of pg_catalog.pg_namespace"),
        "{object}"
    );
    // A unique key that somebody is about to take: no row to line up for.
    stage.waits(&c, "INSERT INTO t VALUES (100, 'c')").await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let edge = stage.edge(&snapshot, &c);
    assert!(
        matches!(edge.object(), LockObject::Transaction(_)) && edge.row().is_none(),
        "{edge}"
    );
    // An index build waits for those who may write.
    stage
        .waits(&d, "CREATE INDEX CONCURRENTLY ON \"T 2\" (id)")
        .await;
    let snapshot = stage.monitor.snapshot().await.unwrap();
    let edge = stage.edge(&snapshot, &d);
    assert!(
        matches!(edge.object(), LockObject::VirtualTransaction(_)),
        "{edge}"
    );
    assert_eq!(
        stage.edges(&snapshot),
        expected(["B held by A", "C held by A", "D held by A"])
    );
    stage.done().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_sessions_are_seen_at_once() {
    let settings = [("max_connections", "600"), ("deadlock_timeout", "10min")];
    let server = Server::start(&settings).unwrap();
    let mut stage = Stage::of(Scene::on(&server, 2).await);
    let a = stage.actor().await;
    a.run("BEGIN; SELECT pg_advisory_xact_lock(1)").await;
    let mut waits = Vec::new();
    for _ in 0..500 {
        let client = stage.scene.database.connect().await;
        waits.push(tokio::spawn(async move {
            client
                .batch_execute("SELECT pg_advisory_xact_lock(1)")
                .await
        }));
    }
    eventually("not all of them wait", async || {
        stage.scene.lock_waiters().await == 500
    })
    .await;
    let (mut best, mut bare) = (Duration::MAX, Duration::MAX);
    for _ in 0..5 {
        // What the server needs to say who is in whose way.
        let started = Instant::now();
        let sql = "SELECT sum(cardinality(pg_blocking_pids(pid))) FROM pg_locks WHERE NOT granted";
        let row = stage.scene.observer.query_one(sql, &[]).await.unwrap();
        bare = bare.min(started.elapsed());
        assert_eq!(row.get::<_, i64>(0), 500 * 501 / 2);
        let started = Instant::now();
        let tree = stage.monitor.lock_tree().await.unwrap();
        let all = started.elapsed();
        let snapshot = tree.snapshot();
        best = best.min(all);
        assert_eq!(snapshot.waiters().len(), 500);
        // Everybody is behind everybody who came before.
        assert_eq!(snapshot.edges().len(), 500 * 501 / 2);
        let [root] = tree.roots().collect::<Vec<_>>()[..] else {
            panic!("{tree}");
        };
        assert_eq!(root.backend().pid(), Some(a.pid));
        assert_eq!((root.blocks(), root.children().count()), (500, 500));
        assert!(
            root.children()
                .all(|child| child.edge().is_some_and(|edge| !edge.is_soft()))
        );
    }
    // Built without optimization it takes 10 times as long, 14 times on a busy machine.
    assert!(best < 60 * bare, "{best:?}, the server alone {bare:?}");
    for wait in waits {
        wait.abort();
    }
}

#[tokio::test]
async fn advisory_locks_with_their_names_and_owners() {
    let stage = Stage::new().await;
    let monitor = stage.monitor.clone().names(["given-name"]);
    let name = format!("own-{}", stage.scene.database.name());
    let guard = stage
        .scene
        .keeper
        .advisory_lock(&name)
        .session()
        .acquire()
        .await
        .unwrap();
    let other = stage.scene.database.connect().await;
    let key = LockKey::from("given-name").as_i64().unwrap();
    let sql = format!(
        "SET application_name = 'other'; SELECT pg_advisory_lock_shared({key}), pg_advisory_lock(1, 2), \
                       pg_advisory_lock({key} + 1)"
    );
    other.batch_execute(&sql).await.unwrap();
    let waiter = Actor {
        pid: 0,
        client: Arc::new(stage.scene.database.connect().await),
    };
    let pid = pid_of(&waiter.client).await;
    let own_key = LockKey::from(&name).as_i64().unwrap();
    let wait = waiter.start(format!("SELECT pg_advisory_xact_lock_shared({own_key})"));
    stage.waiting(pid).await;

    let entries = monitor.advisory_locks().await.unwrap();
    let of = |key: &LockKey| {
        entries
            .iter()
            .filter(|entry| entry.key() == key)
            .collect::<Vec<_>>()
    };
    let [held, wanted] = of(&LockKey::from(&name))[..] else {
        panic!("{entries:?}");
    };
    assert!(held.is_held() && held.is_guarded() && held.mode() == AdvisoryMode::Exclusive);
    assert_eq!(held.backend().pid(), guard.backend_pid());
    assert!(
        held.backend()
            .application_name()
            .unwrap()
            .contains("tests/it/monitor_tree.rs:")
    );
    assert!(held.idle_for().unwrap() < GIVE_UP_AFTER && held.wait_age().is_none());
    assert!(!wanted.is_held() && !wanted.is_guarded() && wanted.mode() == AdvisoryMode::Shared);
    assert!(wanted.wait_age().unwrap() < GIVE_UP_AFTER);
    assert_eq!(
        (wanted.idle_for(), wanted.backend().pid()),
        (None, Some(pid))
    );
    let [given] = of(&"given-name".into())[..] else {
        panic!("{entries:?}");
    };
    assert!(given.is_held() && !given.is_guarded() && given.mode() == AdvisoryMode::Shared);
    assert!(
        given
            .to_string()
            .starts_with("\"given-name\" held in ShareLock by pid "),
        "{given}"
    );
    assert_eq!(of(&(1, 2).into()).len(), 1);
    assert_eq!(of(&(key + 1).into()).len(), 1);
    assert_eq!(entries.len(), 5, "of this database only: {entries:?}");

    // The guard's lock is no leak however old, and neither is what has not been idle for long.
    let leaks = monitor.leaks(Duration::ZERO).await.unwrap();
    assert_eq!(leaks.len(), 3, "{leaks:?}");
    assert!(
        leaks
            .iter()
            .all(|leak| leak.backend().application_name() == Some("other"))
    );
    assert!(
        monitor
            .leaks(Duration::from_secs(600))
            .await
            .unwrap()
            .is_empty()
    );
    // In a transaction it is not idle.
    other.batch_execute("BEGIN").await.unwrap();
    assert!(monitor.leaks(Duration::ZERO).await.unwrap().is_empty());
    // What a guard has given back it owns no more, and what somebody leaves on the pool's connection is a leak.
    wait.abort();
    drop(waiter);
    drop(guard);
    drop(other);
    stage.scene.nothing_left().await;
    let object = stage.scene.pool.get().await.unwrap();
    object
        .batch_execute("SELECT pg_advisory_lock(3)")
        .await
        .unwrap();
    drop(object);
    let leaks = monitor.leaks(Duration::ZERO).await.unwrap();
    assert_eq!(leaks.len(), 1, "{leaks:?}");
    assert_eq!(leaks[0].key(), &LockKey::from(3));
    let sql = format!(
        "SELECT pg_terminate_backend({})",
        leaks[0].backend().pid().unwrap()
    );
    stage.scene.observer.batch_execute(&sql).await.unwrap();
    eventually("the leak is still there", async || {
        monitor.leaks(Duration::ZERO).await.unwrap().is_empty()
    })
    .await;
}

/// Wherever a question is dropped, nothing is left of it and the next one is answered.
#[tokio::test]
async fn looks_may_be_dropped_anywhere() {
    for side in [false, true] {
        let scene = Scene::new(1).await;
        let builder = Keeper::builder(scene.pool.clone());
        let keeper = if side {
            builder
                .side_connection(scene.database.config(), NoTls)
                .build()
        } else {
            builder.build()
        };
        let monitor = keeper.monitor();
        for polls in 0.. {
            assert!(polls < 100, "a look has no end");
            let tree = poll_times_and_drop(monitor.lock_tree(), polls).await;
            let locks = poll_times_and_drop(monitor.advisory_locks(), polls).await;
            let activity = poll_times_and_drop(monitor.activity(), polls).await;
            // What was dropped gives the pool's only connection back in the background.
            scene.pool_is_whole_within(GIVE_UP_AFTER).await;
            monitor.lock_tree().await.unwrap();
            if let (Some(tree), Some(locks), Some(activity)) = (tree, locks, activity) {
                tree.unwrap();
                locks.unwrap();
                activity.unwrap();
                break;
            }
        }
        scene.nothing_left().await;
    }
}

/// Every transaction takes its rows in the same order, so that nobody can ever be in a deadlock. But their waits are
/// short, and others are so many that asking who blocks whom takes a while, in which these begin and end.
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
