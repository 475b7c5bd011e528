//! The SQL of a connection: what is asked of its server once, what is prepared on it, and how its statement is cancelled.

pub(super) mod heartbeat;
mod probe;
pub(crate) mod server;

use crate::postgres::sql::literal;

pub(crate) use probe::{PreparedName, Probe, Refusal, hand_over_of, unlock_of};

/// A statement that fails with 2D000, to be sent in the place of one that would end something of this crate's.
pub(crate) fn refuse(what: &str, of: &str) -> String {
    let message = literal(&format!(
        "{what} is refused: it would end lockkeeper's {of}"
    ));
    format!(
        "DO $lockkeeper$BEGIN RAISE EXCEPTION USING ERRCODE = '2D000', MESSAGE = {message}; END$lockkeeper$"
    )
}
