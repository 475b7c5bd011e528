//! All figures of one run as one Markdown table. Fails when something of lockkeeper's is left in `pg_locks`.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program whose result is what it prints"
)]

use std::fmt::Display;
use std::thread;

use lockkeeper_benches::cancelled::{self, Caller};
use lockkeeper_benches::contended::{self, Outcomes};
use lockkeeper_benches::latency::{self, AllTimes};
use lockkeeper_benches::markdown::Table;
use lockkeeper_benches::round_trips::{self, AllTrips};
use lockkeeper_benches::{Case, Effort, Failure, Observer, Peer};
use lockkeeper_testkit::Server;
use tokio::runtime::{Builder, Runtime};

const NONE: &str = "–";

fn main() -> Result<(), Failure> {
    let effort = Effort::from_args();
    let runtime = Runtime::new()?;
    let database = runtime.block_on(Server::shared().database());
    let observer = runtime.block_on(Observer::new(&database))?;

    eprintln!("times …");
    let times = runtime.block_on(latency::measure(&database, &Case::ALL, effort))?;
    let one_thread = Builder::new_current_thread().enable_all().build()?;
    let times_of_one_thread =
        one_thread.block_on(latency::measure(&database, &Case::ALL, effort))?;
    drop(one_thread);
    eprintln!("round trips …");
    let trips = runtime.block_on(round_trips::measure(&database, &Case::ALL, effort))?;
    eprintln!("contention …");
    let contended = runtime.block_on(contended::measure(&database, &observer, effort))?;
    eprintln!("cancellation …");
    let cancelled = runtime.block_on(cancelled::measure(&database, &observer, effort))?;

    println!(
        "PostgreSQL {}, {} cores, tokio multi_thread; microseconds a call, medians\n",
        runtime.block_on(observer.version())?,
        thread::available_parallelism().map_or(0, usize::from),
    );
    let mut table = rows_of_calls(&times, &trips);
    table.append(rows_of_contention(&contended));
    table.append(rows_of_cancellation(&cancelled));
    println!("{table}");
    println!("The same calls on tokio current_thread:\n");
    println!("{}", rows_of_calls(&times_of_one_thread, &trips));
    println!(
        "32 tasks, one session lock:\n\n{}",
        contended::table(&contended)
    );
    println!("Cancelled:\n\n{}", cancelled::table(&cancelled));

    let ours = |caller| matches!(caller, Caller::Lockkeeper | Caller::LockkeeperSession);
    match cancelled
        .iter()
        .find(|outcome| ours(outcome.caller) && !outcome.is_clean())
    {
        Some(outcome) => Err(format!("{} is not clean: {outcome:?}", outcome.caller).into()),
        None => Ok(()),
    }
}

/// An empty table; all parts have its columns.
fn head() -> Table {
    Table::new([
        "",
        "lockkeeper",
        "by hand",
        "sqlx",
        "sqlx, no ping",
        "÷ by hand",
        "÷ sqlx",
        "÷ sqlx, no ping",
        "round trips",
    ])
}

fn rows_of_calls(times: &AllTimes, trips: &AllTrips) -> Table {
    let mut table = head();
    for case in Case::ALL {
        let Some(times) = times.get(&case) else {
            continue;
        };
        let mut row = vec![case.name().to_owned()];
        row.extend(Peer::ALL.map(|peer| or_none(times.median(peer), 0)));
        row.extend(Peer::ALL[1..].iter().map(|peer| {
            let ratio = times.ratio(Peer::Lockkeeper, *peer);
            or_none(ratio.map(|[_, median, _]| median), 2)
        }));
        let trips = Peer::ALL.map(|peer| match trips.get(&(case, peer)) {
            Some(trips) => trips.waited.to_string(),
            None => NONE.to_owned(),
        });
        row.push(trips.join(" / "));
        table.row(row);
    }
    table
}

fn rows_of_contention(outcomes: &Outcomes) -> Table {
    let mut table = head();
    let each = |name: &str, value: &dyn Fn(&contended::Outcome) -> f64, decimals| {
        let cell = |peer| or_none(outcomes.get(&peer).map(value), decimals);
        [vec![name.to_owned()], Peer::ALL.map(cell).to_vec()].concat()
    };
    let mut throughput = each(
        "32 tasks, one session lock: acquisitions a second",
        &contended::Outcome::throughput,
        0,
    );
    throughput.extend(Peer::ALL[1..].iter().map(|peer| {
        let ratio = outcomes
            .get(peer)
            .zip(outcomes.get(&Peer::Lockkeeper))
            .map(|(other, ours)| ours.throughput_against(other));
        or_none(ratio, 2)
    }));
    table.row(throughput);
    table.row(each(
        "… longest wait ÷ median wait",
        &|outcome| outcome.longest_wait() / outcome.median_wait(),
        1,
    ));
    table
}

fn rows_of_cancellation(outcomes: &[cancelled::Outcome]) -> Table {
    let mut table = head();
    for (name, ours, theirs) in [
        ("transaction", Caller::Lockkeeper, Caller::Sqlx),
        ("session", Caller::LockkeeperSession, Caller::SqlxSession),
    ] {
        let cell = |caller, value: &dyn Fn(&cancelled::Outcome) -> String| {
            outcomes
                .iter()
                .find(|outcome| outcome.caller == caller)
                .map_or(NONE.to_owned(), value)
        };
        let cells = |name: String, value: &dyn Fn(&cancelled::Outcome) -> String| {
            [
                name,
                cell(ours, value),
                NONE.to_owned(),
                cell(theirs, value),
            ]
        };
        let cancelled = outcomes
            .iter()
            .map(|outcome| outcome.cancelled)
            .min()
            .unwrap_or_default();
        table.row(cells(
            format!("{cancelled} cancelled acquisitions of a {name} lock: left after 1 s"),
            &|outcome| outcome.left.to_string(),
        ));
        table.row(cells(
            "… new backends for each 1000".to_owned(),
            &|outcome| format!("{:.1}", outcome.opened_per_thousand()),
        ));
        table.row(cells(
            "… 8 more behind a holder that stays: still waiting 1 s later".to_owned(),
            &|outcome| outcome.behind_a_holder.waiting.to_string(),
        ));
    }
    table
}

fn or_none<T: Display>(value: Option<T>, decimals: usize) -> String {
    value.map_or(NONE.to_owned(), |value| format!("{value:.decimals$}"))
}
