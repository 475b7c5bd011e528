//! Many tasks, one key: how fast it goes round, and whether everybody gets it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lockkeeper_testkit::Database;

use crate::markdown::{Table, as_f64, median, quantile};
use crate::{Effort, Failure, Observer, Peer, Pools};

/// Tasks that want the key, and connections of each pool.
pub const TASKS: usize = 32;

/// What one peer achieved in one turn.
#[derive(Clone, Debug)]
struct Turn {
    lasted: Duration,
    /// For each task, how long it waited each time, in milliseconds.
    waits: Vec<Vec<f64>>,
}

/// What one peer achieved.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    turns: Vec<Turn>,
}

impl Outcome {
    /// Acquisitions a second: the middle one of the turns.
    #[must_use]
    pub fn throughput(&self) -> f64 {
        median(&self.throughputs().collect::<Vec<_>>())
    }

    fn throughputs(&self) -> impl Iterator<Item = f64> {
        self.turns.iter().map(|turn| {
            let acquired: usize = turn.waits.iter().map(Vec::len).sum();
            as_f64(acquired) / turn.lasted.as_secs_f64()
        })
    }

    /// The middle one of the turns' ratios.
    #[must_use]
    pub fn throughput_against(&self, other: &Self) -> f64 {
        let ratios = self
            .throughputs()
            .zip(other.throughputs())
            .map(|(ours, theirs)| ours / theirs);
        median(&ratios.collect::<Vec<_>>())
    }

    fn waits(&self) -> Vec<f64> {
        self.turns
            .iter()
            .flat_map(|turn| turn.waits.iter().flatten().copied())
            .collect()
    }

    /// The middle wait, in milliseconds.
    #[must_use]
    pub fn median_wait(&self) -> f64 {
        median(&self.waits())
    }

    /// A wait's quantile, in milliseconds.
    #[must_use]
    pub fn wait_quantile(&self, share: f64) -> f64 {
        quantile(&self.waits(), share)
    }

    /// The longest wait, in milliseconds.
    #[must_use]
    pub fn longest_wait(&self) -> f64 {
        self.waits().into_iter().fold(0.0, f64::max)
    }

    /// What the task that got least got in a turn, and what the one that got most got.
    #[must_use]
    pub fn shares(&self) -> (usize, usize) {
        let counts = || {
            self.turns
                .iter()
                .flat_map(|turn| turn.waits.iter().map(Vec::len))
        };
        (
            counts().min().unwrap_or_default(),
            counts().max().unwrap_or_default(),
        )
    }
}

/// What all peers achieved that the server had room for.
pub type Outcomes = HashMap<Peer, Outcome>;

/// Lets the peers take turns of a second or so.
///
/// # Errors
/// The first call's that failed.
pub async fn measure(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Outcomes, Failure> {
    let pools = Arc::new(Pools::new(&database.config(), TASKS)?);
    let room = observer.free_connections().await? / TASKS;
    let peers: Vec<_> = [
        Peer::Lockkeeper,
        Peer::Sqlx,
        Peer::ByHand,
        Peer::SqlxUntested,
    ]
    .into_iter()
    .take(room)
    .collect();
    for peer in &peers {
        pools.all_answer(*peer).await?;
        turn(&pools, *peer, effort.of(200, 20)).await?;
    }
    let mut outcomes = Outcomes::new();
    for round in 0..effort.of(3, 1) {
        for n in 0..peers.len() {
            let peer = peers[(round + n) % peers.len()];
            let turn = turn(&pools, peer, effort.of(1200, 100)).await?;
            outcomes.entry(peer).or_default().turns.push(turn);
        }
    }
    pools.close().await;
    Ok(outcomes)
}

/// All tasks go round for as long as told; each finishes the round that it is in.
async fn turn(pools: &Arc<Pools>, peer: Peer, millis: u64) -> Result<Turn, Failure> {
    let over = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (pools, over) = (Arc::clone(pools), Arc::clone(&over));
            tokio::spawn(async move {
                let mut waits = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let wait = pools.acquire_and_release(peer).await?;
                    waits.push(wait.as_secs_f64() * 1e3);
                }
                Ok::<_, Failure>(waits)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(millis)).await;
    over.store(true, Ordering::Relaxed);
    let mut waits = Vec::new();
    for task in tasks {
        waits.push(task.await??);
    }
    Ok(Turn {
        lasted: started.elapsed(),
        waits,
    })
}

impl Pools {
    /// Takes the one key and returns it at once; how long it took to get.
    async fn acquire_and_release(&self, peer: Peer) -> Result<Duration, Failure> {
        let started = Instant::now();
        match peer {
            Peer::Lockkeeper => {
                let lock = self.keeper.advisory_lock(self.name(0)).session();
                let guard = lock.acquire().await?;
                let waited = started.elapsed();
                guard.release().await?;
                Ok(waited)
            }
            Peer::ByHand => {
                let client = self.by_hand.get().await?;
                let lock = client.prepare_cached("SELECT pg_advisory_lock($1)").await?;
                client.execute(&lock, &[&1_i64]).await?;
                let waited = started.elapsed();
                let unlock = client
                    .prepare_cached("SELECT pg_advisory_unlock($1)")
                    .await?;
                client.execute(&unlock, &[&1_i64]).await?;
                Ok(waited)
            }
            Peer::Sqlx | Peer::SqlxUntested => {
                let connection = self.sqlx(peer).acquire().await?;
                let guard = self.sqlx_locks[0].acquire(connection).await?;
                let waited = started.elapsed();
                guard.release_now().await?;
                Ok(waited)
            }
        }
    }
}

/// Everything, a row for each peer.
#[must_use]
pub fn table(outcomes: &Outcomes) -> Table {
    let mut table = Table::new([
        "who",
        "acquisitions/s",
        "lockkeeper against it",
        "median wait",
        "99 %",
        "longest",
        "longest / median",
        "least and most of a task in a turn",
    ]);
    for peer in Peer::ALL {
        let Some(outcome) = outcomes.get(&peer) else {
            continue;
        };
        let against = outcomes[&Peer::Lockkeeper].throughput_against(outcome);
        let (least, most) = outcome.shares();
        table.row([
            peer.name().to_owned(),
            format!("{:.0}", outcome.throughput()),
            format!("{against:.2}"),
            format!("{:.2} ms", outcome.median_wait()),
            format!("{:.2} ms", outcome.wait_quantile(0.99)),
            format!("{:.2} ms", outcome.longest_wait()),
            format!("{:.2}", outcome.longest_wait() / outcome.median_wait()),
            format!("{least} – {most}"),
        ]);
    }
    table
}
