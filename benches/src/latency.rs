//! How long a call takes when nobody is in the way, the peers taking turns.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use lockkeeper_testkit::Database;

use crate::markdown::{median, quantile};
use crate::{Case, Effort, Failure, Peer, Pools};

/// Connections of each pool: one is in use, the others are there for what goes on behind it.
pub const POOL: usize = 4;
/// Calls of one turn.
const TURN: u32 = 25;

/// The times of one case, in microseconds a call: for each peer one for each round, the middle one of its calls.
///
/// The middle one, not the mean: a call that the scheduler puts aside for some milliseconds would outweigh all others of
/// its turn.
#[derive(Clone, Debug, Default)]
pub struct Times {
    rounds: HashMap<Peer, Vec<f64>>,
}

impl Times {
    /// The middle one of the rounds.
    #[must_use]
    pub fn median(&self, peer: Peer) -> Option<f64> {
        self.rounds.get(&peer).map(|rounds| median(rounds))
    }

    /// The first peer's time over the second's: the lower quartile, the median and the upper quartile of the rounds.
    #[must_use]
    pub fn ratio(&self, peer: Peer, other: Peer) -> Option<[f64; 3]> {
        let (ours, theirs) = (self.rounds.get(&peer)?, self.rounds.get(&other)?);
        let ratios: Vec<_> = ours
            .iter()
            .zip(theirs)
            .map(|(ours, theirs)| ours / theirs)
            .collect();
        Some([0.25, 0.5, 0.75].map(|share| quantile(&ratios, share)))
    }
}

/// The times of all cases.
pub type AllTimes = HashMap<Case, Times>;

/// Lets the peers take turns at each of the cases.
///
/// Each case has pools of its own: one in which a lock is dropped leaves more connections in its pool than the others,
/// and calls that go round over four backends are slower than calls that all go to one.
///
/// # Errors
/// The first call's that failed.
pub async fn measure(
    database: &Database,
    cases: &[Case],
    effort: Effort,
) -> Result<AllTimes, Failure> {
    let mut all = AllTimes::new();
    for &case in cases {
        let pools = Arc::new(Pools::new(&database.config(), POOL)?);
        let over = Arc::clone(&pools);
        // A task of the runtime, as a server's handlers are: the thread that runs `main` is a poor neighbour to the tasks
        // that drive the connections.
        let times = tokio::spawn(async move { of_case(&over, case, effort).await }).await??;
        pools.close().await;
        all.insert(case, times);
    }
    Ok(all)
}

async fn of_case(pools: &Pools, case: Case, effort: Effort) -> Result<Times, Failure> {
    let peers: Vec<_> = case.peers().collect();
    let turn = effort.of(TURN, 2);
    for _ in 0..effort.of(8, 1) {
        for peer in &peers {
            pools.repeat(case, *peer, turn).await?;
        }
    }
    let mut times = Times::default();
    for round in 0..effort.of(60, 2) {
        for n in 0..peers.len() {
            let peer = peers[(round + n) % peers.len()];
            let mut calls = Vec::new();
            for call in 0..turn {
                let started = Instant::now();
                pools.once(case, peer, call).await?;
                calls.push(started.elapsed().as_secs_f64() * 1e6);
            }
            times.rounds.entry(peer).or_default().push(median(&calls));
        }
    }
    Ok(times)
}
