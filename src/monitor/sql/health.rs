//! Numbers about the server's locks and transactions: the SQL of [`crate::Monitor::health`].
//!
//! It is one message and so one transaction, in which the activity is read once and does not change.

use std::time::{Duration, SystemTime};

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use crate::graph::sql::{self as graph, Columns, LockSample, age, columns_of};
use crate::graph::{Backend, Relation};
use crate::key::LockKey;
use crate::postgres::sql::rows;

/// How many INVALID indexes are named.
pub(crate) const MAX_INDEXES: usize = 20;

/// The OID of the current database.
const DATABASE_OID: &str = "(SELECT d.oid FROM pg_catalog.pg_database AS d \
     WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database()))";

/// `l`: the contents of the shared lock table. Locks taken by the fast path are not in it, and predicate locks have a
/// table of their own.
pub(super) const SHARED_LOCKS: &str = "l AS MATERIALIZED (SELECT l.* FROM pg_catalog.pg_locks AS l \
     WHERE NOT l.fastpath AND pg_catalog.textne(l.mode, 'SIReadLock'))";

/// The objects in the lock table, and how many it is sized for: `max_locks_per_transaction` for each server process and
/// prepared transaction (PostgreSQL's source, `NLOCKENTS` in `lock.c` and `InitializeMaxBackends`). The extra process
/// is the autovacuum launcher; since version 18 its workers are counted by `autovacuum_worker_slots`. An object has one
/// entry regardless of how many sessions hold it.
pub(super) const LOCK_TABLE_USAGE: &str = "(SELECT pg_catalog.count(*) FROM (SELECT DISTINCT l.locktype, l.database, l.relation, \
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
/// For sessions of other roles `backend_start` is hidden. Sessions whose own `track_activities` is off show no more.
/// Processes without a user belong to no role.
const COUNTERS: &str = "WITH {SHARED_LOCKS} SELECT pg_catalog.current_database() AS health, {LOCK_TABLE_USAGE}, \
     (SELECT pg_catalog.count(*) FROM l WHERE l.granted AND pg_catalog.texteq(l.locktype, 'advisory') \
     AND pg_catalog.oideq(l.database, {DATABASE_OID})) AS advisory, \
     p.prepared, p.oldest_prepared, \
     CASE WHEN pg_catalog.current_setting('track_counts')::pg_catalog.bool THEN d.deadlocks END AS deadlocks, \
     (EXTRACT(epoch FROM d.stats_reset) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS stats_reset, \
     (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity AS a WHERE a.usesysid IS NOT NULL \
     AND NOT pg_catalog.int4eq(a.pid, pg_catalog.pg_backend_pid()) \
     AND (a.backend_start IS NULL OR pg_catalog.texteq(a.state, 'disabled'))) AS hidden \
     FROM (SELECT pg_catalog.count(*) AS prepared, (EXTRACT(epoch FROM pg_catalog.min(p.prepared)) \
     OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8 AS oldest_prepared FROM pg_catalog.pg_prepared_xacts AS p) AS p \
     LEFT JOIN pg_catalog.pg_stat_database AS d ON pg_catalog.oideq(d.datid, {DATABASE_OID})";

/// The INVALID indexes of the current database that no session is building or dropping.
///
/// REINDEX and DROP INDEX CONCURRENTLY keep SHARE UPDATE EXCLUSIVE on the index itself over all their transactions
/// (PostgreSQL's source, `ReindexRelationConcurrently`, `index_drop`), and CREATE INDEX CONCURRENTLY reports the index
/// in its progress. If another role runs it, its progress is hidden, and only its lock on the table shows: such indexes
/// are `unsure`. So are all indexes on a standby, which knows of no work on the primary.
const INVALID_INDEXES: &str = "WITH l AS MATERIALIZED (SELECT l.pid, l.relation FROM pg_catalog.pg_locks AS l WHERE l.granted \
     AND pg_catalog.texteq(l.mode, 'ShareUpdateExclusiveLock') AND pg_catalog.texteq(l.locktype, 'relation') \
     AND pg_catalog.oideq(l.database, {DATABASE_OID})), \
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
     ORDER BY i.unsure, n.nspname, c.relname LIMIT {MAX_INDEXES}";

/// The sessions whose transactions' ages count: not this one, not autovacuum workers, and not parallel workers, whose
/// transactions are those of their leaders.
const COUNTED_SESSIONS: &str = "NOT pg_catalog.int4eq(a.pid, pg_catalog.pg_backend_pid()) \
     AND NOT pg_catalog.texteq(a.backend_type, 'autovacuum worker') \
     AND NOT pg_catalog.texteq(a.backend_type, 'parallel worker')";

/// The whole query, as one message.
pub(crate) fn query() -> String {
    let blocking = graph::wait_graph(None);
    let counters = COUNTERS
        .replace("{SHARED_LOCKS}", SHARED_LOCKS)
        .replace("{LOCK_TABLE_USAGE}", LOCK_TABLE_USAGE)
        .replace("{DATABASE_OID}", DATABASE_OID);
    let invalid = INVALID_INDEXES
        .replace("{DATABASE_OID}", DATABASE_OID)
        .replace("{MAX_INDEXES}", &MAX_INDEXES.to_string());
    let who = graph::BACKEND_COLUMNS;
    format!(
        "{blocking}; {counters}; {invalid}; \
         SELECT true AS oldest, {who} FROM pg_catalog.pg_stat_activity AS a \
         WHERE a.xact_start IS NOT NULL AND {COUNTED_SESSIONS} ORDER BY a.xact_start LIMIT 1; \
         SELECT true AS idle, {who} FROM pg_catalog.pg_stat_activity AS a \
         WHERE a.state OPERATOR(pg_catalog.=) ANY ('{{idle in transaction,idle in transaction (aborted)}}'::pg_catalog.text[]) \
         AND {COUNTED_SESSIONS} ORDER BY a.state_change LIMIT 1"
    )
}

/// The reply to [`query`].
#[derive(Debug)]
pub(crate) struct HealthReply {
    pub(crate) seen: LockSample,
    pub(crate) database: Box<str>,
    pub(crate) hidden_sessions: usize,
    pub(crate) oldest_transaction: Option<Backend>,
    pub(crate) idle_in_transaction: Option<Backend>,
    /// `None` if the server does not count them.
    pub(crate) deadlocks: Option<u64>,
    pub(crate) deadlocks_since: Option<SystemTime>,
    pub(crate) lock_entries: u64,
    pub(crate) lock_capacity: u64,
    pub(crate) prepared: u64,
    pub(crate) oldest_prepared: Option<Duration>,
    pub(crate) advisory: u64,
    /// Those that no session is building or dropping: the first ones, and their total.
    pub(crate) invalid: Vec<Relation>,
    pub(crate) invalid_total: usize,
    /// How many INVALID indexes another session may be building or dropping.
    pub(crate) invalid_unsure: usize,
}

/// Reads the reply; `None` if it is not of the expected form.
pub(crate) fn read(
    reply: &[SimpleQueryMessage],
    named: &dyn Fn(LockKey) -> LockKey,
) -> Option<HealthReply> {
    let begins = |message: &SimpleQueryMessage| match message {
        // Many rows may precede it.
        SimpleQueryMessage::Row(row) => {
            let first = row.columns().first().map(|column| column.name());
            first == Some("health")
        }
        _ => false,
    };
    let (graph, rest) = reply.split_at(reply.iter().position(begins)?);
    let mut rest = rows(rest);
    let mut health = first(rest.next()?, graph::read_sample(graph, named)?)?;
    for row in rest {
        let columns = columns_of(row);
        let row = Columns {
            row,
            columns: &columns,
        };
        if columns.contains_key("invalid") {
            health.index(&row)?;
            continue;
        }
        let backend = graph::backend(&row, row.parsed("who")?, health.seen.taken_at);
        if columns.contains_key("oldest") {
            health.oldest_transaction = Some(backend);
        } else {
            health.idle_in_transaction = Some(backend);
        }
    }
    Some(health)
}

fn first(row: &SimpleQueryRow, seen: LockSample) -> Option<HealthReply> {
    let columns = columns_of(row);
    let row = Columns {
        row,
        columns: &columns,
    };
    Some(HealthReply {
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

impl HealthReply {
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
