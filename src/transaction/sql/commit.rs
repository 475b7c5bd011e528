//! What became of a COMMIT whose answer was lost.

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{is_true, literal, parsed, rows, text};

/// Where the answer comes from, as the last columns: see [`History`].
fn history_columns(with_system: bool) -> String {
    let system = if with_system {
        ", c.system_identifier AS system FROM pg_catalog.pg_control_system() AS c"
    } else {
        ""
    };
    format!("{HISTORY}{system}")
}

const HISTORY: &str = "pg_catalog.pg_is_in_recovery() AS recovery, \
     CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN \
     pg_catalog.\"left\"(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8) END AS timeline, \
     EXTRACT(epoch FROM pg_catalog.pg_postmaster_start_time())::pg_catalog.text AS started, \
     pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text AS replayed";

/// Asks for the transaction's [`Mark`], before COMMIT.
///
/// The transaction gets an id if it has none yet: NOTIFY gets one in COMMIT only (PostgreSQL's
/// `src/backend/commands/async.c`, `PreCommit_Notify`), so without an id it could not be told whether COMMIT has had an
/// effect. A standby has neither ids nor a place to write at, and CASE keeps it from being asked for them.
pub(crate) fn mark(with_system: bool) -> String {
    let history = history_columns(with_system);
    format!(
        "SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN \
         pg_catalog.pg_current_xact_id()::pg_catalog.text END AS xid, \
         CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN \
         pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text END AS written, {history}"
    )
}

/// What a transaction is known by.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// It is a standby's, where nothing can be written.
    Standby,
    Written(Transaction),
}

#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    xid: u64,
    /// Behind everything that it has written to the write-ahead log.
    written: String,
    history: History,
}

impl Transaction {
    /// Whether it is known which database cluster it was in.
    pub(crate) fn names_its_system(&self) -> bool {
        self.history.system.is_some()
    }
}

/// A server's history: the database cluster, the timeline that it writes, and what tells one run of it from another.
///
/// A promoted standby begins a new timeline, and uses anew the transaction ids that it has not seen. So does a server
/// after a crash, with those of which nothing had got to disk: the last position that it has then replayed is another
/// one, or there was none before (`pg_last_wal_replay_lsn`; test `a_crash_shows_in_the_position_replayed_last`).
#[derive(Clone, Debug)]
struct History {
    /// `None` where the role may not know.
    system: Option<String>,
    timeline: String,
    started: String,
    replayed: Option<String>,
}

pub(crate) fn marked(reply: &[SimpleQueryMessage]) -> Option<Mark> {
    let row = rows(reply).next()?;
    if is_true(row, "recovery") {
        return Some(Mark::Standby);
    }
    Some(Mark::Written(Transaction {
        xid: parsed(row, "xid")?,
        written: text(row, "written")?,
        history: history(reply)?,
    }))
}

fn history(reply: &[SimpleQueryMessage]) -> Option<History> {
    let row = rows(reply).next()?;
    Some(History {
        system: text(row, "system"),
        timeline: text(row, "timeline")?,
        started: text(row, "started")?,
        replayed: text(row, "replayed"),
    })
}

/// Asks what the server knows of the transaction (PostgreSQL's documentation, "Transaction ID and Snapshot Information
/// Functions"), and whether it is the same server.
pub(crate) fn status(transaction: &Transaction, with_system: bool) -> String {
    let Transaction { xid, written, .. } = transaction;
    let history = history_columns(with_system);
    // pg_xact_status raises an error for an id that is yet to be assigned. age() counts back from the next one to be.
    let short = xid & u64::from(u32::MAX);
    format!(
        "SELECT CASE WHEN pg_catalog.int4gt(pg_catalog.age('{short}'::pg_catalog.xid), 0) THEN \
         pg_catalog.pg_xact_status('{xid}'::pg_catalog.xid8) ELSE 'unassigned' END AS status, \
         pg_catalog.pg_lsn_ge(pg_catalog.pg_last_wal_replay_lsn(), {}::pg_catalog.pg_lsn) AS survived, {history}",
        literal(written)
    )
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Committed,
    RolledBack,
    /// Not decided, or not to be learned here: to be asked again.
    Undecided,
    /// Another server answers, which may never have seen it.
    Elsewhere,
    /// Perhaps another server answers: the role may not know.
    Unidentified,
    /// The server has been started again, and a later transaction may have the same id.
    Ambiguous,
    /// It is too long ago.
    Forgotten,
}

pub(crate) fn status_of(transaction: &Transaction, reply: &[SimpleQueryMessage]) -> Status {
    let before = &transaction.history;
    let Some(row) = rows(reply).next() else {
        return Status::Undecided;
    };
    if is_true(row, "recovery") {
        // A standby, perhaps soon to be promoted.
        return Status::Undecided;
    }
    let Some(now) = history(reply) else {
        return Status::Undecided;
    };
    match (&before.system, &now.system) {
        (Some(before), Some(now)) if before != now => return Status::Elsewhere,
        (Some(_), Some(_)) => {}
        // No two servers were started in the same microsecond.
        _ if now.started != before.started => return Status::Unidentified,
        _ => {}
    }
    if now.timeline != before.timeline {
        return Status::Elsewhere;
    }
    let same_run = now.started == before.started && now.replayed == before.replayed;
    match text(row, "status").as_deref() {
        Some("committed") if same_run || is_true(row, "survived") => Status::Committed,
        Some("committed") => Status::Ambiguous,
        Some("in progress") if same_run => Status::Undecided,
        // Whoever has the id now, ours did not get into the log as committed.
        Some(_) => Status::RolledBack,
        None => Status::Forgotten,
    }
}
