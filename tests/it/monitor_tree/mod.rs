//! The monitor's picture of who waits for whom, against scenes that are known.

mod objects;
mod sessions;
mod waits;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockkeeper::graph::{BackendId, Edge, EdgeKind, LockTree, Snapshot, TreeNode};
use lockkeeper::{Keeper, Monitor};
use lockkeeper_testkit::{Scene, pid_of, until_waiting};
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
