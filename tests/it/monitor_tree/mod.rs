//! The monitor's picture of which session waits for which, against scenes that are known.

mod objects;
mod sessions;
mod waits;

use std::collections::{BTreeMap, BTreeSet};

use lockkeeper::Monitor;
use lockkeeper::graph::{BackendId, Edge, EdgeKind, LockTree, Snapshot, TreeNode};
use lockkeeper_testkit::{NINE_ROWS, Running, Scene, Session};

/// A scene with named sessions, of which the shared server's other sessions are told apart.
struct Stage {
    scene: Scene,
    monitor: Monitor,
    names: BTreeMap<i32, char>,
    waits: Vec<Running>,
}

impl Stage {
    async fn new() -> Self {
        Self::of(Scene::new(2).await)
    }

    fn of(scene: Scene) -> Self {
        Self {
            monitor: scene.monitor(),
            scene,
            names: BTreeMap::new(),
            waits: Vec::new(),
        }
    }

    /// With the table of [`NINE_ROWS`].
    async fn with_table() -> Self {
        let stage = Self::new().await;
        stage.scene.run(NINE_ROWS).await;
        stage
    }

    /// Named A, B, C, … in the order of their coming.
    async fn actor(&mut self) -> Session {
        let session = self.scene.session().await;
        let name = char::from(b'A' + u8::try_from(self.names.len()).unwrap());
        // A deadlock is to last until the monitor has seen it.
        let sql = format!("SET deadlock_timeout = '30s'; SET application_name = 'actor {name}'");
        session.run(&sql).await;
        self.names.insert(session.pid, name);
        session
    }

    async fn actors<const N: usize>(&mut self) -> [Session; N] {
        let mut actors = Vec::new();
        for _ in 0..N {
            actors.push(self.actor().await);
        }
        actors.try_into().ok().unwrap()
    }

    /// Starts something, and returns when it waits for a lock.
    async fn waits(&mut self, actor: &Session, sql: &str) {
        let waiting = actor.start_waiting(&self.scene.observer, sql).await;
        self.waits.push(waiting);
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

    fn edge<'a>(&self, snapshot: &'a Snapshot, waiter: &Session) -> &'a Edge {
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
