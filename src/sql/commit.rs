//! What became of a COMMIT whose answer was lost.

use tokio_postgres::SimpleQueryMessage;

use super::{is_true, parsed, rows, text};

/// The transaction's id, if it has written anything, and where: asked before COMMIT.
pub(crate) const MARK: &str = "SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text AS xid, \
     pg_catalog.\"left\"(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8) AS timeline, \
     c.system_identifier AS system FROM pg_catalog.pg_control_system() AS c";

/// What the server knows of it (PostgreSQL's documentation, "Transaction ID and Snapshot Information Functions"), and
/// whether it is still the same one.
pub(crate) fn status(xid: u64) -> String {
    // A standby has no insert position, and CASE keeps it from being asked for one.
    format!(
        "SELECT pg_catalog.pg_xact_status('{xid}'::pg_catalog.xid8) AS status, \
         pg_catalog.pg_is_in_recovery() AS recovery, \
         CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN \
         pg_catalog.\"left\"(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8) END AS timeline, \
         c.system_identifier AS system FROM pg_catalog.pg_control_system() AS c"
    )
}

/// A server's history: the database cluster, and the timeline that it writes. A promoted standby begins a new one, with
/// the transaction ids that it has seen none of used anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct History {
    system: String,
    timeline: String,
}

pub(crate) fn history(reply: &[SimpleQueryMessage]) -> Option<History> {
    let row = rows(reply).next()?;
    Some(History {
        system: text(row, "system")?,
        timeline: text(row, "timeline")?,
    })
}

pub(crate) fn xid(reply: &[SimpleQueryMessage]) -> Option<u64> {
    parsed(rows(reply).next()?, "xid")
}

pub(crate) fn in_recovery(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "recovery"))
}

/// `committed`, `aborted` or `in progress`; `None` for a transaction too old to be known.
pub(crate) fn said(reply: &[SimpleQueryMessage]) -> Option<String> {
    text(rows(reply).next()?, "status")
}
