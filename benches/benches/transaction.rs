//! Transactions without locks, beside the driver's own: times, ratios, round trips.

#![allow(
    clippy::print_stdout,
    reason = "a program whose result is what it prints"
)]

use lockkeeper_benches::latency::{self, AllTimes};
use lockkeeper_benches::markdown::Table;
use lockkeeper_benches::round_trips::{self, AllTrips};
use lockkeeper_benches::{Case, Effort, Failure, Observer, Peer};
use lockkeeper_testkit::Server;
use tokio::runtime::{Builder, Runtime};

const CASES: &[Case] = &Case::TRANSACTIONS;

fn main() -> Result<(), Failure> {
    let effort = Effort::from_args();
    let runtime = Runtime::new()?;
    let database = runtime.block_on(Server::shared().database());
    let observer = runtime.block_on(Observer::new(&database))?;

    let trips = runtime.block_on(round_trips::measure(&database, CASES, effort))?;
    let times = runtime.block_on(latency::measure(&database, CASES, effort))?;
    let one_thread = Builder::new_current_thread().enable_all().build()?;
    let times_of_one_thread = one_thread.block_on(latency::measure(&database, CASES, effort))?;

    println!(
        "PostgreSQL {}, microseconds a call, medians; ratios: median of the rounds (quartiles)\n",
        runtime.block_on(observer.version())?
    );
    println!("tokio multi_thread:\n\n{}", table(&times, &trips));
    println!(
        "tokio current_thread:\n\n{}",
        table(&times_of_one_thread, &trips)
    );
    runtime.block_on(observer.nothing_is_left())?;
    // A trial has one call of each, which the machine's other work may have delayed.
    match effort {
        Effort::Full => no_more_trips(&trips),
        Effort::Trial => Ok(()),
    }
}

fn table(times: &AllTimes, trips: &AllTrips) -> Table {
    let mut head = vec![String::new()];
    head.extend(Peer::ALL.map(|peer| peer.name().to_owned()));
    head.extend(Peer::ALL[1..].iter().map(|peer| format!("÷ {peer}")));
    head.push("round trips".to_owned());
    let mut table = Table::new(head);
    for case in CASES {
        let Some(times) = times.get(case) else {
            continue;
        };
        let mut row = vec![case.name().to_owned()];
        row.extend(Peer::ALL.map(|peer| {
            times
                .median(peer)
                .map_or(String::new(), |micros| format!("{micros:.0}"))
        }));
        row.extend(Peer::ALL[1..].iter().map(|peer| {
            let ratio = times.ratio(Peer::Lockkeeper, *peer);
            ratio.map_or(String::new(), |[lower, median, upper]| {
                format!("{median:.2} ({lower:.2} – {upper:.2})")
            })
        }));
        let trips: Vec<_> = case
            .peers()
            .filter_map(|peer| trips.get(&(*case, peer)))
            .map(|trips| trips.waited.to_string())
            .collect();
        row.push(trips.join(" / "));
        table.row(row);
    }
    table
}

/// The wrapper waits for the server no oftener than the driver's own transaction.
fn no_more_trips(trips: &AllTrips) -> Result<(), Failure> {
    for case in CASES {
        let waited = |peer| trips.get(&(*case, peer)).map(|trips| trips.waited);
        if let (Some(ours), Some(by_hand)) = (waited(Peer::Lockkeeper), waited(Peer::ByHand))
            && ours > by_hand
        {
            return Err(format!("{case}: {ours} round trips, by hand {by_hand}").into());
        }
    }
    Ok(())
}
