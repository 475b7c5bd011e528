//! What a look at who waits for whom costs: the server's part, and ours.

use std::time::Instant;

use lockkeeper::{Keeper, Monitor};
use lockkeeper_testkit::{Database, Server};
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls};

use crate::markdown::{Table, as_f64, median, quantile};
use crate::{Effort, Failure, Observer};

/// What is often used instead: everybody who has to do with the same object. It tells pairs only, and wrong ones (the
/// library's documentation of `graph` has how many).
const SELF_JOIN: &str = "SELECT DISTINCT w.pid, b.pid FROM pg_locks w JOIN pg_locks b ON w.locktype = b.locktype \
     AND w.database IS NOT DISTINCT FROM b.database AND w.relation IS NOT DISTINCT FROM b.relation \
     AND w.page IS NOT DISTINCT FROM b.page AND w.tuple IS NOT DISTINCT FROM b.tuple \
     AND w.virtualxid IS NOT DISTINCT FROM b.virtualxid AND w.transactionid IS NOT DISTINCT FROM b.transactionid \
     AND w.classid IS NOT DISTINCT FROM b.classid AND w.objid IS NOT DISTINCT FROM b.objid \
     AND w.objsubid IS NOT DISTINCT FROM b.objsubid AND w.pid <> b.pid WHERE NOT w.granted";

/// Sessions that hold, and sessions that wait behind them.
const SCENES: [(usize, usize); 4] = [(0, 0), (10, 50), (50, 500), (1, 500)];

/// What looking at one scene took.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Sessions that hold what others wait for.
    pub holders: usize,
    /// Sessions that wait.
    pub waiters: usize,
    /// Who waits for whom, each pair once.
    pub edges: usize,
    /// Milliseconds until the server's answer was there.
    pub server: Vec<f64>,
    /// Milliseconds from then until there was a tree.
    pub ours: Vec<f64>,
    /// Milliseconds for the self-join's answer.
    pub self_join: Vec<f64>,
}

/// All scenes, one after another, on a server with room for them.
///
/// # Errors
/// Whatever a server may say; a look that does not see everybody.
pub async fn measure(effort: Effort) -> Result<Vec<Outcome>, Failure> {
    let settings = [("max_connections", "700"), ("deadlock_timeout", "1h")];
    let server = Server::start(&settings)?;
    let mut outcomes = Vec::new();
    for (holders, waiters) in SCENES {
        let database = server.database().await;
        let observer = Observer::new(&database).await?;
        outcomes.push(of_scene(holders, waiters, &database, &observer, effort).await?);
        observer.nothing_is_left().await?;
    }
    Ok(outcomes)
}

async fn of_scene(
    holders: usize,
    waiters: usize,
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Outcome, Failure> {
    let mut holding = Vec::new();
    for key in 0..holders {
        let client = database.connect().await;
        let sql = format!("BEGIN; SELECT pg_advisory_xact_lock({key})");
        client.batch_execute(&sql).await?;
        holding.push(client);
    }
    let mut waiting = JoinSet::new();
    for waiter in 0..waiters {
        let client = database.connect().await;
        let key = waiter % holders;
        let wait = async move {
            let sql = format!("SELECT pg_advisory_xact_lock({key})");
            client.batch_execute(&sql).await
        };
        waiting.spawn(wait);
    }
    observer.waiting(waiters).await?;
    let keeper = Keeper::builder(database.pool(1))
        .side_connection(database.config(), NoTls)
        .build();
    let mut outcome = Outcome {
        holders,
        waiters,
        edges: 0,
        server: Vec::new(),
        ours: Vec::new(),
        self_join: Vec::new(),
    };
    let plain = database.connect().await;
    for round in 0..effort.of(31, 3) {
        look(&keeper.monitor(), &plain, &mut outcome).await?;
        if round == 0 {
            // The connection was opened, and the server's caches were filled.
            outcome.server.clear();
            outcome.ours.clear();
            outcome.self_join.clear();
        }
    }
    for client in holding {
        client.batch_execute("COMMIT").await?;
    }
    while let Some(waited) = waiting.join_next().await {
        waited??;
    }
    Ok(outcome)
}

async fn look(monitor: &Monitor, plain: &Client, outcome: &mut Outcome) -> Result<(), Failure> {
    let started = Instant::now();
    let tree = monitor.lock_tree().await?;
    let all = started.elapsed();
    let snapshot = tree.snapshot();
    if snapshot.waiters().len() != outcome.waiters {
        let seen = snapshot.waiters().len();
        return Err(format!("{} wait, {seen} were seen", outcome.waiters).into());
    }
    outcome.edges = snapshot.edges().len();
    let took = snapshot.duration();
    outcome.server.push(took.as_secs_f64() * 1e3);
    let ours = all.saturating_sub(took);
    outcome.ours.push(ours.as_secs_f64() * 1e3);
    let started = Instant::now();
    drop(plain.simple_query(SELF_JOIN).await?);
    outcome
        .self_join
        .push(started.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// Everything, a row for each scene.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new([
        "sessions that wait",
        "pairs",
        "answer of the server",
        "tree from it",
        "longest",
        "self-join of `pg_locks`",
        "all of it / self-join",
    ]);
    for outcome in outcomes {
        let millis = |values: &[f64]| format!("{:.1} ms", median(values));
        let all = outcome.server.iter().zip(&outcome.ours);
        let ratios: Vec<_> = all
            .zip(&outcome.self_join)
            .map(|((server, ours), join)| (server + ours) / join)
            .collect();
        let waiters = match outcome.holders {
            0 => "nobody".to_owned(),
            1 => format!("{} behind 1", outcome.waiters),
            more => format!("{} behind {more}", outcome.waiters),
        };
        table.row([
            waiters,
            format!("{:.0}", as_f64(outcome.edges)),
            millis(&outcome.server),
            millis(&outcome.ours),
            format!("{:.1} ms", quantile(&outcome.ours, 1.0)),
            millis(&outcome.self_join),
            format!("{:.2}", median(&ratios)),
        ]);
    }
    table
}
