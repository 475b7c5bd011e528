//! The resolver: waits, then cancels, then terminates, and leaves alone what it must.

mod escalation;
mod protected;
mod replication;
mod runs;

use std::time::Duration;

use lockkeeper::graph::Backend;
use lockkeeper::resolver::Action;
use lockkeeper::{RecoveryCriterion, Resolver, ResolverPolicy, RunLog};
use lockkeeper_testkit::{GIVE_UP_AFTER, MonitorScene, Session};
use tokio::task::JoinHandle;

const TICK: Duration = Duration::from_millis(20);

/// Quick, and of this database only: the server is shared with other tests.
fn policy(scene: &MonitorScene) -> ResolverPolicy {
    ResolverPolicy::new()
        .database(scene.database.name())
        // A session that has waited, and writes now, blocks the next one for a moment, which on a slow machine is a long one.
        .wait(GIVE_UP_AFTER)
        .idle_grace(10 * TICK)
        .settle(GIVE_UP_AFTER)
        .poll(TICK)
        .deadline(4 * GIVE_UP_AFTER)
        .recovered_when(RecoveryCriterion::no_waits().checks(2))
}

fn resolver(scene: &MonitorScene, policy: ResolverPolicy) -> Resolver {
    scene.monitor.resolver(policy)
}

/// A session that holds row 1, and two that wait for it.
struct PileUp {
    holder: Session,
    waits: Vec<JoinHandle<Result<(), tokio_postgres::Error>>>,
}

impl PileUp {
    async fn behind(scene: &MonitorScene, holder: Session) -> Self {
        let waiters = [scene.session().await, scene.session().await];
        Self::of(scene, holder, waiters).await
    }

    async fn of(scene: &MonitorScene, holder: Session, waiters: [Session; 2]) -> Self {
        holder.run("BEGIN; UPDATE t SET v = 'h' WHERE id = 1").await;
        let mut waits = Vec::new();
        for waiter in waiters {
            waits.push(waiter.start("UPDATE t SET v = 'w' WHERE id = 1"));
            scene.until_waiting(waiter.pid).await;
        }
        Self { holder, waits }
    }

    async fn new(scene: &MonitorScene) -> Self {
        let holder = scene.session().await;
        Self::behind(scene, holder).await
    }

    async fn all_finish(self) {
        for wait in self.waits {
            wait.await.unwrap().unwrap();
        }
    }

    /// The holder is there still, and in its transaction.
    async fn is_untouched(&self) {
        assert!(self.holder.is_alive().await);
        let sql = "SELECT 1 FROM t WHERE id = 1 AND v = 'h'";
        let rows = self.holder.client.query(sql, &[]).await.unwrap();
        assert_eq!(rows.len(), 1);
        // The statement is closed by a message of its own, which is to be over by the time this is.
        self.holder.client.batch_execute("").await.unwrap();
    }
}

/// What was done to which session, without the baseline.
///
/// Nor with sessions that have waited: each blocks the next one for as long as its own statement takes, which shows on a
/// slow machine.
fn actions(log: &RunLog) -> Vec<(Action, Option<i32>)> {
    let has_waited = |target: Option<&Backend>| {
        let statement = target.and_then(Backend::statement);
        statement.is_some_and(|sql| sql.contains("v = 'w'"))
    };
    log.entries()
        .iter()
        .filter(|row| row.action() != Action::Baseline && !has_waited(row.target()))
        .map(|row| {
            let pid = row.target().and_then(|target| target.pid());
            (row.action(), pid)
        })
        .collect()
}

fn left_alone(log: &RunLog, pid: i32) -> String {
    let rows = log.entries().iter();
    let mut rows = rows.filter(|row| row.target().and_then(|target| target.pid()) == Some(pid));
    let row = rows.next().unwrap_or_else(|| panic!("{log}"));
    assert_eq!(row.action(), Action::LeaveAlone, "{log}");
    row.outcome().to_string()
}
