//! Numbers about the server's locks and transactions: the server's side of [`crate::Monitor::health`].
//!
//! One message, which is one transaction: the activity in it is read once, and stays as it was read.

use std::time::{Duration, SystemTime};

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use crate::graph::sql::{self as graph, Columns, LockSample, age, columns_of};
use crate::graph::{Backend, Relation};
use crate::key::LockKey;
use crate::postgres::sql::rows;

/// How many INVALID indexes are named.
pub(crate) const MOST_INDEXES: usize = 20;

/// The oid of this database.
const HERE: &str = "(SELECT d.oid FROM pg_catalog.pg_database AS d \
     WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database()))";

/// `l`: what is in the lock table. Locks taken by the fast path are in none that is shared, and predicate locks in one
/// of their own.
pub(super) const TABLE: &str = "l AS MATERIALIZED (SELECT l.* FROM pg_catalog.pg_locks AS l \
     WHERE NOT l.fastpath AND pg_catalog.textne(l.mode, 'SIReadLock'))";

/// The objects in it, and how many it is made for: `max_locks_per_transaction` for each server process and prepared
/// transaction (PostgreSQL's source, `NLOCKENTS` in `lock.c` and `InitializeMaxBackends`). The one more is the
/// autovacuum launcher; from version 18 on its workers are counted by `autovacuum_worker_slots`. An object has one
/// entry however many hold it.
pub(super) const FILL: &str = "(SELECT pg_catalog.count(*) FROM (SELECT DISTINCT l.locktype, l.database, l.relation, \
     l.page, l.tuple, l.virtualxid, l.transactionid, l.classid, l.objid, l.objsubid FROM l) AS o) AS entries, \
     (SELECT pg_catalog.sum(m.processes::pg_catalog.int8)::pg_catalog.int8 \
     FROM pg_catalog.unnest(ARRAY['1', pg_catalog.current_setting('max_connections'), \
     pg_catalog.current_setting('max_worker_processes'), pg_catalog.current_setting('max_wal_senders'), \
     pg_catalog.current_setting('max_prepared_transactions'), \
     COALESCE(pg_catalog.current_setting('autovacuum_worker_slots', true), \
     pg_catalog.current_setting('autovacuum_max_workers'))]) AS m (processes)) OPERATOR(pg_catalog.*) \
     pg_catalog.current_setting('max_locks_per_transaction')::pg_catalog.int8 AS capacity";

/// One row of numbers.
///
/// Of sessions of other roles `backend_start` is hidden; those whose own `track_activities` is off tell no more.
/// Processes without a user are none of anybody's.
const NUMBERS: &str = "WITH {TABLE} SELECT pg_catalog.current_database() AS health, {FILL}, \
     (SELECT pg_catalog.count(*) FROM l WHERE l.granted AND pg_catalog.texteq(l.locktype, 'advisory') \
     AND pg_catalog.oideq(l.database, {HERE})) AS advisory, \
     p.prepared, p.oldest_prepared, \
     CASE WHEN pg_catalog.current_setting('track_counts')::pg_catalog.bool THEN d.deadlocks END AS deadlocks, \
     (EXTRACT(epoch FROM d.stats_reset) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS stats_reset, \
     (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity AS a WHERE a.usesysid IS NOT NULL \
     AND NOT pg_catalog.int4eq(a.pid, pg_catalog.pg_backend_pid()) \
     AND (a.backend_start IS NULL OR pg_catalog.texteq(a.state, 'disabled'))) AS hidden \
     FROM (SELECT pg_catalog.count(*) AS prepared, (EXTRACT(epoch FROM pg_catalog.min(p.prepared)) \
     OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS oldest_prepared FROM pg_catalog.pg_prepared_xacts AS p) AS p \
     LEFT JOIN pg_catalog.pg_stat_database AS d ON pg_catalog.oideq(d.datid, {HERE})";

/// The INVALID indexes of this database.
///
/// Not those at work: REINDEX and DROP INDEX CONCURRENTLY keep SHARE UPDATE EXCLUSIVE on the index itself, over all
/// their transactions (PostgreSQL's source, `ReindexRelationConcurrently`, `index_drop`), and CREATE INDEX CONCURRENTLY
/// tells the index in its progress. Where it is another role's, its progress is hidden, and only the lock on the table
/// is left to go by: `unsure`. So are all on a standby, which knows of no work on the primary.
const INVALID: &str = "WITH l AS MATERIALIZED (SELECT l.pid, l.relation FROM pg_catalog.pg_locks AS l WHERE l.granted \
     AND pg_catalog.texteq(l.mode, 'ShareUpdateExclusiveLock') AND pg_catalog.texteq(l.locktype, 'relation') \
     AND pg_catalog.oideq(l.database, {HERE})), \
     g AS MATERIALIZED (SELECT g.pid, g.index_relid FROM pg_catalog.pg_stat_progress_create_index AS g \
     WHERE pg_catalog.nameeq(g.datname, pg_catalog.current_database())), \
     i AS (SELECT i.indexrelid, pg_catalog.pg_is_in_recovery() OR EXISTS (SELECT FROM g JOIN l \
     ON l.pid OPERATOR(pg_catalog.=) g.pid WHERE g.index_relid IS NULL AND pg_catalog.oideq(l.relation, i.indrelid)) \
     AS unsure FROM pg_catalog.pg_index AS i WHERE NOT i.indisvalid \
     AND NOT EXISTS (SELECT FROM l WHERE pg_catalog.oideq(l.relation, i.indexrelid)) \
     AND NOT EXISTS (SELECT FROM g WHERE pg_catalog.oideq(g.index_relid, i.indexrelid))) \
     SELECT i.indexrelid AS invalid, n.nspname, c.relname, c.relkind, i.unsure, \
     pg_catalog.count(*) FILTER (WHERE NOT i.unsure) OVER () AS sure_total, \
     pg_catalog.count(*) FILTER (WHERE i.unsure) OVER () AS unsure_total \
     FROM i JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid \
     JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
     ORDER BY i.unsure, n.nspname, c.relname LIMIT {MOST}";

/// What is left out of the ages of transactions: those of this look, those that autovacuum begins, and workers, whose
/// transactions are their leaders'.
const OTHERS: &str = "NOT pg_catalog.int4eq(a.pid, pg_catalog.pg_backend_pid()) \
     AND NOT pg_catalog.texteq(a.backend_type, 'autovacuum worker') \
     AND NOT pg_catalog.texteq(a.backend_type, 'parallel worker')";

/// All of it, as one message.
pub(crate) fn health() -> String {
    let blocking = graph::wait_graph(None);
    let numbers = NUMBERS
        .replace("{TABLE}", TABLE)
        .replace("{FILL}", FILL)
        .replace("{HERE}", HERE);
    let invalid = INVALID
        .replace("{HERE}", HERE)
        .replace("{MOST}", &MOST_INDEXES.to_string());
    let who = graph::BACKEND_COLUMNS;
    format!(
        "{blocking}; {numbers}; {invalid}; \
         SELECT true AS oldest, {who} FROM pg_catalog.pg_stat_activity AS a \
         WHERE a.xact_start IS NOT NULL AND {OTHERS} ORDER BY a.xact_start LIMIT 1; \
         SELECT true AS idle, {who} FROM pg_catalog.pg_stat_activity AS a \
         WHERE a.state OPERATOR(pg_catalog.=) ANY ('{{idle in transaction,idle in transaction (aborted)}}'::pg_catalog.text[]) \
         AND {OTHERS} ORDER BY a.state_change LIMIT 1"
    )
}

/// What it brought.
#[derive(Debug)]
pub(crate) struct Numbers {
    pub(crate) seen: LockSample,
    pub(crate) database: Box<str>,
    pub(crate) hidden_sessions: usize,
    pub(crate) oldest_transaction: Option<Backend>,
    pub(crate) idle_in_transaction: Option<Backend>,
    /// `None` where the server does not count.
    pub(crate) deadlocks: Option<u64>,
    pub(crate) deadlocks_since: Option<SystemTime>,
    pub(crate) lock_entries: u64,
    pub(crate) lock_capacity: u64,
    pub(crate) prepared: u64,
    pub(crate) oldest_prepared: Option<Duration>,
    pub(crate) advisory: u64,
    /// Those that nobody builds or drops: the first of them, and how many there are.
    pub(crate) invalid: Vec<Relation>,
    pub(crate) invalid_total: usize,
    /// How many may be work of others.
    pub(crate) invalid_unsure: usize,
}

/// Reads a reply; `None` where the server answered something else.
pub(crate) fn numbers(
    reply: &[SimpleQueryMessage],
    named: &dyn Fn(LockKey) -> LockKey,
) -> Option<Numbers> {
    let begins = |message: &SimpleQueryMessage| match message {
        // There may be many rows before it.
        SimpleQueryMessage::Row(row) => {
            let first = row.columns().first().map(|column| column.name());
            first == Some("health")
        }
        _ => false,
    };
    let (graph, rest) = reply.split_at(reply.iter().position(begins)?);
    let mut rest = rows(rest);
    let mut numbers = first(rest.next()?, graph::read_sample(graph, named)?)?;
    for row in rest {
        let columns = columns_of(row);
        let row = Columns {
            row,
            columns: &columns,
        };
        if columns.contains_key("invalid") {
            numbers.index(&row)?;
            continue;
        }
        let backend = graph::backend(&row, row.parsed("who")?, numbers.seen.taken_at);
        if columns.contains_key("oldest") {
            numbers.oldest_transaction = Some(backend);
        } else {
            numbers.idle_in_transaction = Some(backend);
        }
    }
    Some(numbers)
}

fn first(row: &SimpleQueryRow, seen: LockSample) -> Option<Numbers> {
    let columns = columns_of(row);
    let row = Columns {
        row,
        columns: &columns,
    };
    Some(Numbers {
        database: row.text("health")?,
        hidden_sessions: row.parsed("hidden")?,
        oldest_transaction: None,
        idle_in_transaction: None,
        deadlocks: row.parsed("deadlocks"),
        deadlocks_since: row.time("stats_reset"),
        lock_entries: row.parsed("entries")?,
        lock_capacity: row.parsed("capacity")?,
        prepared: row.parsed("prepared")?,
        oldest_prepared: age(seen.taken_at, row.time("oldest_prepared")),
        advisory: row.parsed("advisory")?,
        invalid: Vec::new(),
        invalid_total: 0,
        invalid_unsure: 0,
        seen,
    })
}

impl Numbers {
    fn index(&mut self, row: &Columns<'_>) -> Option<()> {
        self.invalid_total = row.parsed("sure_total")?;
        self.invalid_unsure = row.parsed("unsure_total")?;
        if row.get("unsure") == Some("f") {
            self.invalid.push(Relation {
                oid: row.parsed("invalid")?,
                name: Some((row.text("nspname")?, row.text("relname")?)),
                kind: row.parsed("relkind"),
                database: None,
            });
        }
        Some(())
    }
}
