//! Schema changes: short waits and long pauses, refusals, what is known beforehand, and what other sessions notice.

mod attempts;
mod corpus;
mod kinds;
mod load;
mod preflight;
mod refusals;

use std::time::Duration;

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}
