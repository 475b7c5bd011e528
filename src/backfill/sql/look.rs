//! Whether now is a good time for another batch.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{parsed, rows, seconds};

/// Who waits for a lock on these tables or their rows, and how far standbys are behind: one message of two statements.
///
/// Who waits for a row waits for a transaction, and is known by the lock on the row's place (`tuple`) that it holds or
/// waits for meanwhile.
///
/// Of standbys `pg_stat_replication` shows all but that they are there to members of `pg_monitor` only.
pub(crate) fn look(oids: &[u32]) -> String {
    let oids: Vec<String> = oids.iter().map(u32::to_string).collect();
    let ours = format!(
        "l.relation OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.oid[]) \
         AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database AS d \
         WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())",
        oids.join(",")
    );
    format!(
        "WITH l AS MATERIALIZED (SELECT l.pid, l.locktype, l.relation, l.database, l.granted FROM pg_catalog.pg_locks AS l) \
         SELECT pg_catalog.count(*) FILTER (WHERE l.locktype OPERATOR(pg_catalog.=) 'relation' AND NOT l.granted) AS for_table, \
         pg_catalog.count(DISTINCT l.pid) FILTER (WHERE l.locktype OPERATOR(pg_catalog.=) 'tuple') AS for_rows \
         FROM l WHERE {ours} AND EXISTS \
         (SELECT FROM l AS w WHERE w.pid OPERATOR(pg_catalog.=) l.pid AND NOT w.granted); \
         SELECT pg_catalog.count(*) AS standbys, pg_catalog.count(*) FILTER (WHERE s.state IS NULL) AS hidden, \
         pg_catalog.max(EXTRACT(epoch FROM s.replay_lag)) AS lag, \
         pg_catalog.max(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), s.replay_lsn)) AS bytes \
         FROM pg_catalog.pg_stat_replication AS s \
         WHERE s.state IS NULL OR s.state OPERATOR(pg_catalog.<>) ALL ('{{backup,stopping}}'::pg_catalog.text[])"
    )
}

/// What was seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Look {
    /// How many wait for a lock on the table.
    pub(crate) for_table: u64,
    /// How many wait for a row of it.
    pub(crate) for_rows: u64,
    pub(crate) standbys: Standbys,
}

/// The standbys and subscribers that follow this server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standbys {
    pub(crate) count: u64,
    /// Of how many the role may see no more.
    pub(crate) hidden: u64,
    /// Of the slowest of the others: `None` where nothing has been written for a while.
    pub(crate) lag: Option<Duration>,
    pub(crate) bytes: Option<u64>,
}

pub(crate) fn looked(reply: &[SimpleQueryMessage]) -> Option<Look> {
    let mut rows = rows(reply);
    let (waiting, standbys) = (rows.next()?, rows.next()?);
    let bytes: Option<i64> = parsed(standbys, "bytes");
    Some(Look {
        for_table: parsed(waiting, "for_table")?,
        for_rows: parsed(waiting, "for_rows")?,
        standbys: Standbys {
            count: parsed(standbys, "standbys")?,
            hidden: parsed(standbys, "hidden")?,
            lag: seconds(standbys, "lag"),
            bytes: bytes.map(|bytes| bytes.max(0).unsigned_abs()),
        },
    })
}
