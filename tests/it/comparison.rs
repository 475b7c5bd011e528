//! Our tree beside what people paste into psql in a lock incident, on one scene: what each shows, and what of it is wrong.
//!
//! The queries are of the two known kinds: `pg_locks` joined with itself, and a recursive query from root blockers down.

use std::collections::BTreeSet;

use lockkeeper::graph::Snapshot;
use lockkeeper_testkit::{NINE_ROWS, Running, Scene, Server, Session};

/// The waiter, and the session that is shown to block it.
type Edges = BTreeSet<(char, char)>;

/// On one object, whatever is locked.
const SAME_OBJECT: &str = "
    w.locktype = b.locktype
    AND w.database IS NOT DISTINCT FROM b.database AND w.relation IS NOT DISTINCT FROM b.relation
    AND w.page IS NOT DISTINCT FROM b.page AND w.tuple IS NOT DISTINCT FROM b.tuple
    AND w.virtualxid IS NOT DISTINCT FROM b.virtualxid AND w.transactionid IS NOT DISTINCT FROM b.transactionid
    AND w.classid IS NOT DISTINCT FROM b.classid AND w.objid IS NOT DISTINCT FROM b.objid
    AND w.objsubid IS NOT DISTINCT FROM b.objsubid AND w.pid <> b.pid";

/// All sessions that hold or want the object.
fn self_join() -> String {
    format!(
        "SELECT DISTINCT w.pid, b.pid FROM pg_locks w JOIN pg_locks b ON {SAME_OBJECT} WHERE NOT w.granted"
    )
}

/// The sessions that hold it.
fn self_join_of_holders() -> String {
    format!("{} AND b.granted", self_join())
}

/// From sessions that block and do not wait down to those that wait for them, over any list of edges.
fn recursive(edges: &str) -> String {
    format!(
        "WITH RECURSIVE edge (waiter, blocker) AS ({edges}),
         tree (waiter, blocker) AS (
             SELECT waiter, blocker FROM edge WHERE blocker NOT IN (SELECT waiter FROM edge)
             UNION ALL
             SELECT edge.waiter, edge.blocker FROM tree JOIN edge ON edge.blocker = tree.waiter
         )
         SELECT waiter, blocker FROM tree"
    )
}

fn recursive_of_blocking_pids() -> String {
    recursive(
        "SELECT a.pid, b.pid FROM pg_stat_activity a CROSS JOIN LATERAL unnest(pg_blocking_pids(a.pid)) AS b (pid)",
    )
}

struct Stage {
    scene: Scene,
    actors: Vec<(char, Session)>,
    waits: Vec<Running>,
}

impl Stage {
    async fn new(server: &Server) -> Self {
        let scene = Scene::on(server, 2).await;
        scene.run(NINE_ROWS).await;
        scene.run(&NINE_ROWS.replace(" t ", " u ")).await;
        Self {
            scene,
            actors: Vec::new(),
            waits: Vec::new(),
        }
    }

    async fn holds(&mut self, name: char, sql: &str) {
        let session = self.scene.session().await;
        session.run(sql).await;
        self.actors.push((name, session));
    }

    async fn waits(&mut self, name: char, sql: &str) {
        if !self.actors.iter().any(|(known, _)| *known == name) {
            self.holds(name, "").await;
        }
        let mut actors = self.actors.iter();
        let (_, session) = actors.find(|(known, _)| *known == name).unwrap();
        let waiting = session.start_waiting(&self.scene.observer, sql).await;
        self.waits.push(waiting);
    }

    fn name(&self, pid: i32) -> char {
        let mut actors = self.actors.iter();
        actors.find(|(_, session)| session.pid == pid).unwrap().0
    }

    /// What a query shows, and in how many rows.
    async fn shown(&self, sql: &str) -> (Edges, usize) {
        let rows = self.scene.observer.query(sql, &[]).await.unwrap();
        let edges = rows
            .iter()
            .map(|row| (self.name(row.get(0)), self.name(row.get(1))))
            .collect();
        (edges, rows.len())
    }

    async fn ours(&self) -> Snapshot {
        self.scene.monitor().snapshot().await.unwrap()
    }

    fn edges(&self, snapshot: &Snapshot) -> Edges {
        let edges = snapshot.edges().iter();
        edges
            .map(|edge| {
                let name = |id: &lockkeeper::graph::BackendId| self.name(id.pid().unwrap());
                (name(edge.waiter()), name(edge.blocker()))
            })
            .collect()
    }
}

fn edges<const N: usize>(edges: [&str; N]) -> Edges {
    let pair = |text: &str| (text.chars().next().unwrap(), text.chars().last().unwrap());
    edges.map(pair).into()
}

/// How many of those shown are not there, and how many that are there are not shown.
fn mistakes(shown: &Edges, truth: &Edges) -> (usize, usize) {
    (
        shown.difference(truth).count(),
        truth.difference(shown).count(),
    )
}

/// A reader keeps an ALTER waiting, and that one three more readers; a chain of row locks; a deadlock.
#[tokio::test]
async fn what_queries_that_people_paste_show_of_a_scene() {
    let server = Server::start(&[("deadlock_timeout", "10min")]).unwrap();
    let mut stage = Stage::new(&server).await;
    stage.holds('A', "BEGIN; SELECT FROM t").await;
    stage.waits('B', "ALTER TABLE t ADD COLUMN w int").await;
    for name in ['C', 'D', 'E'] {
        stage.waits(name, "SELECT FROM t").await;
    }
    stage
        .holds('F', "BEGIN; UPDATE u SET v = 'f' WHERE id = 1")
        .await;
    stage
        .holds('G', "BEGIN; UPDATE u SET v = 'g' WHERE id = 2")
        .await;
    stage.waits('G', "UPDATE u SET v = 'g' WHERE id = 1").await;
    stage.waits('H', "DELETE FROM u WHERE id = 2").await;
    stage
        .holds('I', "BEGIN; SELECT pg_advisory_xact_lock(1)")
        .await;
    stage
        .holds('J', "BEGIN; SELECT pg_advisory_xact_lock(2)")
        .await;
    stage.waits('I', "SELECT pg_advisory_xact_lock(2)").await;
    stage.waits('J', "SELECT pg_advisory_xact_lock(1)").await;

    let truth = edges([
        "B behind A",
        "C behind B",
        "D behind B",
        "E behind B",
        "G behind F",
        "H behind G",
        "I behind J",
        "J behind I",
    ]);
    let snapshot = stage.ours().await;
    assert_eq!(stage.edges(&snapshot), truth);
    let tree = snapshot.tree();
    let soft = snapshot
        .edges()
        .iter()
        .filter(|edge| edge.is_soft())
        .count();
    let roots: Vec<_> = tree
        .roots()
        .filter(|root| !root.is_in_cycle())
        .map(|root| {
            (
                stage.name(root.backend().pid().unwrap()),
                root.blocked_count(),
            )
        })
        .collect();
    assert_eq!((soft, roots), (3, vec![('A', 4), ('F', 2)]));
    assert!(tree.cycles().len() == 1 && tree.cycles()[0].is_deadlock());
    assert_eq!(tree.walk().count(), 10);

    let join = stage.shown(&self_join()).await.0;
    assert_eq!(mistakes(&join, &truth), (12, 0));
    let holders = stage.shown(&self_join_of_holders()).await.0;
    // Readers do not wait for a reader: it is the ALTER between them that they are behind.
    let wrong: Vec<_> = holders.difference(&truth).collect();
    assert_eq!(wrong, [&('C', 'A'), &('D', 'A'), &('E', 'A')]);
    assert_eq!(mistakes(&holders, &truth), (3, 3));
    let of_holders = stage.shown(&recursive(&self_join_of_holders())).await.0;
    assert_eq!(mistakes(&of_holders, &truth), (3, 5));
    let of_pids = stage.shown(&recursive_of_blocking_pids()).await.0;
    let missing: Vec<_> = truth.difference(&of_pids).collect();
    assert_eq!(
        missing,
        [&('I', 'J'), &('J', 'I')],
        "no root leads into a cycle"
    );
    assert_eq!(mistakes(&of_pids, &truth), (0, 2));
}

/// Each session that queues for a lock waits for all before it, so that there are very many ways down.
#[tokio::test]
async fn a_recursive_query_over_a_queue_shows_every_way_through_it() {
    let server = Server::start(&[("deadlock_timeout", "10min")]).unwrap();
    let mut stage = Stage::new(&server).await;
    stage
        .holds('A', "BEGIN; SELECT pg_advisory_xact_lock(1)")
        .await;
    for name in 'B'..='K' {
        stage.waits(name, "SELECT pg_advisory_xact_lock(1)").await;
    }
    let snapshot = stage.ours().await;
    assert_eq!(snapshot.edges().len(), 10 * 11 / 2);
    assert_eq!(snapshot.tree().walk().count(), 11);
    let (shown, rows) = stage.shown(&recursive_of_blocking_pids()).await;
    assert_eq!(shown, stage.edges(&snapshot));
    // Each way that ends in B..=K: 1 + 2 + 4 + … of them, each as a row for its last step.
    assert_eq!(rows, 2_usize.pow(10) - 1);
}
