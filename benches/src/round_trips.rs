//! How often a call waits for the network, counted by making the network slow.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lockkeeper_testkit::{Database, Proxy};

use crate::markdown::{Table, as_f64};
use crate::{Case, Effort, Failure, Peer, Pools};

/// In each direction. Longer than a call takes without it, so that the number of delays can be told from their sum.
const DELAY: Duration = Duration::from_millis(4);

/// What one call costs in round trips.
#[derive(Clone, Copy, Debug)]
pub struct Trips {
    /// Those that the caller waits for.
    pub waited: u32,
    /// The same before rounding: the shortest of the calls' times through the proxy, over that of one round trip. The
    /// shortest, because nothing but the machine's other work can make one longer, and nothing can make one shorter.
    pub measured: f64,
    /// Messages sent without an answer in between, those that nobody waits for included.
    pub flights: f64,
    /// Bytes to the server.
    pub up: f64,
    /// Bytes from the server.
    pub down: f64,
}

/// The figures of all calls of all peers.
pub type AllTrips = HashMap<(Case, Peer), Trips>;

/// Makes each of the calls a few times through the proxy.
///
/// # Errors
/// Whatever goes wrong.
pub async fn measure(
    database: &Database,
    cases: &[Case],
    effort: Effort,
) -> Result<AllTrips, Failure> {
    let proxy = Proxy::before(database.server());
    proxy.delay(DELAY);
    let pools = Pools::new(&proxy.config(&database.config()), 2)?;
    let times = effort.of(9, 1);

    let one = one_round_trip(&pools, effort).await?;
    let mut all = AllTrips::new();
    for &case in cases {
        for peer in case.peers() {
            // Statements are prepared, and the connection is known, after a few.
            for turn in 0..3 {
                pools.once(case, peer, turn).await?;
                quiet(&proxy).await;
            }
            let before = proxy.traffic();
            let mut measured = Vec::new();
            for turn in 0..times {
                let started = Instant::now();
                pools.once(case, peer, turn).await?;
                measured.push(started.elapsed().as_secs_f64() / one.as_secs_f64());
                // What goes on behind the caller's back ends before the next call could be held up by it.
                quiet(&proxy).await;
            }
            let after = proxy.traffic();
            let each = |after: u64, before: u64| {
                let count = usize::try_from(after - before).unwrap_or_default();
                as_f64(count) / f64::from(times)
            };
            let measured = measured.into_iter().fold(f64::INFINITY, f64::min);
            let trips = Trips {
                waited: rounded(measured),
                measured,
                flights: each(after.flights, before.flights),
                up: each(after.up, before.up),
                down: each(after.down, before.down),
            };
            all.insert((case, peer), trips);
        }
    }
    pools.close().await;
    Ok(all)
}

/// The whole table.
#[must_use]
pub fn table(trips: &AllTrips) -> Table {
    let mut table = Table::new([
        "call",
        "who",
        "round trips waited for",
        "measured",
        "flights in all",
        "bytes up",
        "bytes down",
    ]);
    for case in Case::ALL {
        for peer in case.peers() {
            let Some(trips) = trips.get(&(case, peer)) else {
                continue;
            };
            table.row([
                case.name().to_owned(),
                peer.name().to_owned(),
                trips.waited.to_string(),
                format!("{:.2}", trips.measured),
                format!("{:.1}", trips.flights),
                format!("{:.0}", trips.up),
                format!("{:.0}", trips.down),
            ]);
        }
    }
    table
}

/// What there is to divide by: the shortest of exchanges, by the same clock.
async fn one_round_trip(pools: &Pools, effort: Effort) -> Result<Duration, Failure> {
    let client = pools.by_hand.get().await?;
    client.batch_execute("").await?;
    let mut shortest = Duration::MAX;
    for _ in 0..effort.of(15, 3) {
        let started = Instant::now();
        client.batch_execute("").await?;
        shortest = shortest.min(started.elapsed());
    }
    Ok(shortest)
}

/// Until nothing has passed for longer than a round trip takes.
async fn quiet(proxy: &Proxy) {
    let mut before = proxy.traffic();
    loop {
        tokio::time::sleep(3 * DELAY).await;
        let now = proxy.traffic();
        if now == before {
            return;
        }
        before = now;
    }
}

/// Rather down than up: what is measured errs upwards.
fn rounded(trips: f64) -> u32 {
    (0..100)
        .find(|n| f64::from(*n) + 0.7 > trips)
        .unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn what_the_machine_adds_is_no_round_trip() {
        assert_eq!([0.97, 1.0, 1.25, 2.9, 3.28].map(rounded), [1, 1, 1, 3, 3]);
    }
}
