//! A sample of the sessions that wait for the table, and of the replication lag.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{parsed, rows, seconds};

/// Queries the sessions that wait for a lock on these tables or their rows, and the replication lag of standbys: one
/// message of two statements.
///
/// A session that waits for a row waits for a transaction. It is recognized by the lock on the row's location (`tuple`)
/// that it holds or waits for meanwhile.
///
/// `pg_stat_replication` shows every role that a standby exists, but its other columns only to members of `pg_monitor`.
pub(crate) fn load_sample(oids: &[u32]) -> String {
    let oids: Vec<String> = oids.iter().map(u32::to_string).collect();
    let on_tables = format!(
        "l.relation OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.oid[]) \
         AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database AS d \
         WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())",
        oids.join(",")
    );
    format!(
        "WITH l AS MATERIALIZED (SELECT l.pid, l.locktype, l.relation, l.database, l.granted FROM pg_catalog.pg_locks AS l) \
         SELECT pg_catalog.count(*) FILTER (WHERE l.locktype OPERATOR(pg_catalog.=) 'relation' AND NOT l.granted) AS table_waiters, \
         pg_catalog.count(DISTINCT l.pid) FILTER (WHERE l.locktype OPERATOR(pg_catalog.=) 'tuple') AS row_waiters \
         FROM l WHERE {on_tables} AND EXISTS \
         (SELECT FROM l AS w WHERE w.pid OPERATOR(pg_catalog.=) l.pid AND NOT w.granted); \
         SELECT pg_catalog.count(*) AS standbys, pg_catalog.count(*) FILTER (WHERE s.state IS NULL) AS hidden, \
         pg_catalog.max(EXTRACT(epoch FROM s.replay_lag)) AS lag, \
         pg_catalog.max(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), s.replay_lsn)) AS bytes \
         FROM pg_catalog.pg_stat_replication AS s \
         WHERE s.state IS NULL OR s.state OPERATOR(pg_catalog.<>) ALL ('{{backup,stopping}}'::pg_catalog.text[])"
    )
}

/// The result of the sample.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoadSample {
    /// How many sessions wait for a lock on the table.
    pub(crate) table_waiters: u64,
    /// How many sessions wait for a row of the table.
    pub(crate) row_waiters: u64,
    pub(crate) standbys: Standbys,
}

/// The standbys and subscribers that follow this server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standbys {
    pub(crate) count: u64,
    /// How many of them are hidden from the role.
    pub(crate) hidden: u64,
    /// The lag of the slowest of the others; `None` if nothing has been written for a while.
    pub(crate) lag: Option<Duration>,
    pub(crate) bytes: Option<u64>,
}

pub(crate) fn read_load_sample(reply: &[SimpleQueryMessage]) -> Option<LoadSample> {
    let mut rows = rows(reply);
    let (waiting, standbys) = (rows.next()?, rows.next()?);
    let bytes: Option<i64> = parsed(standbys, "bytes");
    Some(LoadSample {
        table_waiters: parsed(waiting, "table_waiters")?,
        row_waiters: parsed(waiting, "row_waiters")?,
        standbys: Standbys {
            count: parsed(standbys, "standbys")?,
            hidden: parsed(standbys, "hidden")?,
            lag: seconds(standbys, "lag"),
            bytes: bytes.map(|bytes| bytes.max(0).unsigned_abs()),
        },
    })
}
