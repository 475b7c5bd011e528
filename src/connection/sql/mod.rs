//! The SQL of a connection: what is asked of its server once, what is prepared on it, and how its statement is cancelled.

mod probe;
pub(crate) mod server;

pub(crate) use probe::{PreparedName, Probe, Refusal, hand_over_of, unlock_of};
