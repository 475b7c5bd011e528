//! lockkeeper beside hand-written tokio-postgres and sqlx: one server, one runtime, one process, one run.
//!
//! ```text
//! cargo bench -p lockkeeper-benches                      everything
//! cargo bench -p lockkeeper-benches --bench table        all figures as one Markdown table, in about two minutes
//! cargo bench -p lockkeeper-benches --bench latency      the same calls under criterion
//! cargo bench -p lockkeeper-benches --bench round_trips  through a proxy that makes the server a far one
//! cargo bench -p lockkeeper-benches --bench client       instructions, cache misses, allocations of a call (valgrind)
//! cargo bench -p lockkeeper-benches --bench contended    32 tasks, one key
//! cargo bench -p lockkeeper-benches --bench cancelled    calls that are given up at random moments
//! cargo bench -p lockkeeper-benches --bench transaction  transactions without locks: times, ratios, round trips
//! cargo bench -p lockkeeper-benches --bench storm        8 workers that deadlock over 6 rows
//! cargo bench -p lockkeeper-benches --bench rows         8 workers over 40 rows, locked in order first and not
//! cargo bench -p lockkeeper-benches --bench watcher      what looking costs while 50 wait
//! cargo bench -p lockkeeper-benches --bench graph        what a look at who waits for whom costs, with up to 500 waiting
//! cargo bench -p lockkeeper-benches --bench deadlocks    40 deadlocks, and what their reports tell
//! ```
//!
//! `-- --quick` behind it does a little of everything, to see that it works.
//!
//! The server is a private one, started for the run, or that of `DATABASE_URL`; see `lockkeeper-testkit`. Where
//! `DATABASE_URL` leads to a server that waits for its disk, COMMIT after an UPDATE is slower for all alike, and the
//! ratios of those rows come nearer to one.
//!
//! # How the figures come about
//!
//! - Times of one run are only ever compared with times of the same run. The peers take turns, a few dozen calls each,
//!   in another order each round; a ratio is the median of the rounds' ratios. What else goes on on the machine so hits
//!   all of them alike.
//! - What a round trip costs is a row of the table, because the ratios depend on it. Where client and server share a core
//!   it is little more than the work of both; where each wakes the other on a core of its own it is several times that;
//!   over a network more again. The fewer round trips of a call count for more the longer they are.
//!   `taskset -c 0 cargo bench …` (Linux) runs everything on one core, which is the least favourable case for whoever
//!   sends less often and asks more.
//! - Calls are made from a spawned task, as a server's are.
//! - A round trip is counted where it is paid: a proxy holds all bytes back for some milliseconds in each direction, so
//!   that a call takes as many of those delays as it waits for answers. What is sent without waiting is counted too, as
//!   *flights*.
//! - Everybody is used as the documentation says, over the pool that goes with it: prepared statements from the cache,
//!   sqlx with its defaults, and again without its `test_before_acquire`, since deadpool's pool does not ask the server
//!   before it gives a connection.

#![allow(
    clippy::exhaustive_enums,
    clippy::exhaustive_structs,
    reason = "a crate for the programs in benches/ only"
)]

mod alarm;
mod case;
mod effort;
mod left;
mod pools;
mod random;

pub mod cancelled;
pub mod client;
pub mod contended;
pub mod deadlocks;
pub mod graph;
pub mod latency;
pub mod markdown;
pub mod round_trips;
pub mod rows;
pub mod storm;
pub mod watcher;

pub use case::Case;
pub use effort::Effort;
pub use left::{Left, Observer, Unfinished};
pub use pools::{Peer, Pools};

/// Whatever went wrong: a benchmark ends with it.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
