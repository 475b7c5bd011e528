//! What a call costs its own process: instructions, misses of the first data cache and allocations, counted by valgrind.
//!
//! No clock is involved, so the figures hardly depend on what else the machine does. A child of this program makes the calls
//! under valgrind, once few and once many of them. The difference, divided by the number of calls in it, is the cost of one: what
//! start-up and the first calls cost is in both runs.

use std::env;
use std::process::{Command, Stdio};

use lockkeeper_testkit::Database;
use tokio_postgres::Config;

use crate::markdown::{Table, as_f64};
use crate::{Case, Effort, Failure, Peer, Pools};

/// Tells the child which calls to make: the server, the case, the peer and the number of calls.
const CHILD: &str = "LOCKKEEPER_BENCH_CHILD";
/// The calls that are counted.
const CASES: [Case; 4] = [
    Case::LockedSelect,
    Case::TransactionSelect,
    Case::AcquireCommit,
    Case::Session,
];
const PEERS: [Peer; 2] = [Peer::Lockkeeper, Peer::ByHand];

/// The most that a call may cost the client, as a ratio to the same call by hand.
///
/// Near what was measured when they were written down, so that a regression is noticed.
const LIMITS: [(Case, Limit); 2] = [
    (
        Case::LockedSelect,
        Limit {
            instructions: 2.0,
            allocations: 2.5,
        },
    ),
    (
        Case::TransactionSelect,
        Limit {
            instructions: 2.2,
            allocations: 2.5,
        },
    ),
];

#[derive(Clone, Copy, Debug)]
struct Limit {
    instructions: f64,
    allocations: f64,
}

/// What one call costs the client.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Instructions.
    pub instructions: f64,
    /// Misses of the first-level data cache, reads and writes, in valgrind's model of this machine's.
    pub misses: f64,
    /// Allocations.
    pub allocations: f64,
}

/// Whether valgrind is there.
#[must_use]
pub fn is_available() -> bool {
    let version = Command::new("valgrind")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    version.is_ok_and(|status| status.success())
}

/// The costs of all calls.
///
/// # Errors
/// Whatever goes wrong.
pub async fn measure(
    database: &Database,
    effort: Effort,
) -> Result<Vec<(Case, Peer, Cost)>, Failure> {
    let mut all = Vec::new();
    for case in CASES {
        for peer in PEERS {
            let (few, many) = (effort.of(100, 10), effort.of(400, 20));
            let (before, after) = (
                counted(database, case, peer, few)?,
                counted(database, case, peer, many)?,
            );
            let each = |count: fn(&Counts) -> u64| {
                let calls = f64::from(many - few);
                as_f64(usize::try_from(count(&after) - count(&before)).unwrap_or_default()) / calls
            };
            let cost = Cost {
                instructions: each(|counts| counts.instructions),
                misses: each(|counts| counts.misses),
                allocations: each(|counts| counts.allocations),
            };
            all.push((case, peer, cost));
        }
    }
    Ok(all)
}

/// The whole table.
#[must_use]
pub fn table(costs: &[(Case, Peer, Cost)]) -> Table {
    let mut table = Table::new([
        "call",
        "who",
        "instructions",
        "÷ by hand",
        "misses (L1 data)",
        "÷ by hand",
        "allocations",
        "÷ by hand",
    ]);
    for (case, peer, cost) in costs {
        let by_hand = find(costs, *case, Peer::ByHand).unwrap_or(*cost);
        let ratio = |ours: f64, theirs: f64| format!("{:.2}", ours / theirs);
        table.row([
            case.name().to_owned(),
            peer.name().to_owned(),
            format!("{:.0}", cost.instructions),
            ratio(cost.instructions, by_hand.instructions),
            format!("{:.0}", cost.misses),
            ratio(cost.misses, by_hand.misses),
            format!("{:.1}", cost.allocations),
            ratio(cost.allocations, by_hand.allocations),
        ]);
    }
    table
}

/// Whether no call costs more than it may.
///
/// # Errors
/// Names the call that does.
pub fn check(costs: &[(Case, Peer, Cost)]) -> Result<(), Failure> {
    for (case, limit) in LIMITS {
        let ours = find(costs, case, Peer::Lockkeeper).ok_or("not measured")?;
        let by_hand = find(costs, case, Peer::ByHand).ok_or("not measured")?;
        for (what, ratio, limit) in [
            (
                "instructions",
                ours.instructions / by_hand.instructions,
                limit.instructions,
            ),
            (
                "allocations",
                ours.allocations / by_hand.allocations,
                limit.allocations,
            ),
        ] {
            if ratio > limit {
                return Err(format!(
                    "{case}: {ratio:.2} times the {what} of the call by hand, the limit is {limit}"
                )
                .into());
            }
        }
    }
    Ok(())
}

fn find(costs: &[(Case, Peer, Cost)], case: Case, peer: Peer) -> Option<Cost> {
    let found = costs.iter().find(|cost| (cost.0, cost.1) == (case, peer));
    found.map(|(_, _, cost)| *cost)
}

#[derive(Clone, Copy, Debug)]
struct Counts {
    instructions: u64,
    misses: u64,
    allocations: u64,
}

/// Runs the child twice: one tool of valgrind counts instructions, the other allocations.
fn counted(database: &Database, case: Case, peer: Peer, calls: u32) -> Result<Counts, Failure> {
    let run = |options: &[&str]| -> Result<String, Failure> {
        let output = Command::new("valgrind")
            .args(options)
            .arg(env::current_exe()?)
            .env(
                CHILD,
                format!("{}|{}|{}|{calls}", database.url(), case.id(), peer.name()),
            )
            .stdin(Stdio::null())
            .output()?;
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(printed)
        } else {
            Err(format!("{case}, {peer}, under valgrind: {printed}").into())
        }
    };
    let cache = run(&[
        "--tool=cachegrind",
        "--cache-sim=yes",
        "--cachegrind-out-file=/dev/null",
    ])?;
    let heap = run(&[
        "--tool=memcheck",
        "--undef-value-errors=no",
        "--leak-check=no",
    ])?;
    Ok(Counts {
        instructions: number_after(&cache, "I refs:")?,
        misses: number_after(&cache, "D1 misses:")?,
        allocations: number_after(&heap, "total heap usage:")?,
    })
}

/// The number behind a label in what valgrind prints.
fn number_after(printed: &str, label: &str) -> Result<u64, Failure> {
    let words: Vec<_> = printed.split_whitespace().collect();
    let printed = words.join(" ");
    let (_, rest) = printed
        .split_once(label)
        .ok_or_else(|| format!("valgrind prints no {label:?}: {printed}"))?;
    let digits: String = rest
        .trim_start()
        .chars()
        .take_while(|char| char.is_ascii_digit() || *char == ',')
        .filter(char::is_ascii_digit)
        .collect();
    Ok(digits.parse()?)
}

/// What the child does: `None` in the parent.
///
/// # Errors
/// Whatever goes wrong.
pub fn child() -> Option<Result<(), Failure>> {
    let what = env::var(CHILD).ok()?;
    Some(run_child(&what))
}

fn run_child(what: &str) -> Result<(), Failure> {
    let mut parts = what.split('|');
    let mut next = || parts.next().ok_or("a part is missing");
    let (url, case, peer, calls) = (next()?, next()?, next()?, next()?);
    let case = CASES
        .into_iter()
        .find(|of| of.id() == case)
        .ok_or("no such case")?;
    let peer = PEERS
        .into_iter()
        .find(|of| of.name() == peer)
        .ok_or("no such peer")?;
    let (config, calls): (Config, u32) = (url.parse()?, calls.parse()?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let pools = Pools::new(&config, 2)?;
        pools.repeat(case, peer, calls).await?;
        pools.close().await;
        Ok(())
    })
}
