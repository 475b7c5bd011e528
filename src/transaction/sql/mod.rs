//! The SQL of a transaction: how it begins and commits, its savepoints, and how its rows are locked.

mod begin;
pub(crate) mod commit;
pub(crate) mod rows;

pub(crate) use crate::postgres::sql::{COMMIT, PROBE, rollback};
pub(crate) use begin::{Begin, PID, PID_VALUE, begin_transaction, begun};

/// A savepoint by its name, which is ours and needs no quotes.
pub(crate) fn savepoint(name: &str) -> String {
    format!("SAVEPOINT {name}")
}

pub(crate) fn release_savepoint(name: &str) -> String {
    format!("RELEASE SAVEPOINT {name}")
}

/// Undoes what was done since the savepoint, and forgets it.
pub(crate) fn undo_savepoint(name: &str) -> String {
    format!("ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
}
