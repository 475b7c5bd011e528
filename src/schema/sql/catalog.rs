//! Relations, columns and constraints by name, and the holders and waiters of their locks.
//!
//! These queries lock no relations except the catalogs themselves: names are found by joins, because a cast to
//! `regclass` in the output, `pg_relation_size`, `pg_partition_tree`, `pg_get_constraintdef` and the like open the
//! relation, and so wait for conflicting locks on it.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use crate::blocker::{self, Blocker};
use crate::connection::is_own_backend;
use crate::mode::{AdvisoryMode, LockMode};
use crate::postgres::sql::{is_true, literal, parsed, rows, seconds, text};
use crate::postgres::table_name::TableName;

/// The condition under which `c` of `pg_class` and `n` of `pg_namespace` are the relation of this name.
pub(super) fn is_named(name: &TableName) -> String {
    let by_schema = match name.schema() {
        Some(schema) => format!(
            "n.nspname OPERATOR(pg_catalog.=) {}::pg_catalog.name",
            literal(schema)
        ),
        None => "pg_catalog.pg_table_is_visible(c.oid)".to_owned(),
    };
    format!(
        "c.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name AND {by_schema}",
        literal(name.name())
    )
}

/// `t`: the relation of that name.
pub(super) fn with_t(name: &TableName) -> String {
    format!(
        "t AS MATERIALIZED (SELECT c.oid, c.relname, c.relnamespace, n.nspname, c.relkind, c.relispartition \
         FROM pg_catalog.pg_class AS c \
         JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE {})",
        is_named(name)
    )
}

/// The relationship of a relation to the one that was queried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relationship {
    Itself,
    /// A partition or inheritance child, at any depth; for an index, the index of a partition.
    Below,
    Parent,
    Default,
    Index,
    /// The table of an index.
    TableOfIndex,
    Referenced,
    Referencing,
    Sequence,
}

/// A relation from the catalogs, related to the one that was queried.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CatalogRelation {
    pub(crate) relationship: Relationship,
    pub(crate) oid: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    pub(crate) kind: char,
    pub(crate) is_partition: bool,
    /// The server's estimate; `None` without one.
    pub(crate) rows: Option<u64>,
}

impl CatalogRelation {
    pub(crate) fn table_name(&self) -> TableName {
        TableName::in_schema(&self.schema, &self.name)
    }
}

/// A relation and the relations that statements about it also lock.
pub(crate) fn related_relations(name: &TableName) -> String {
    let t = with_t(name);
    format!(
        "WITH RECURSIVE {t}, \
         below AS (SELECT i.inhrelid AS oid FROM pg_catalog.pg_inherits AS i \
         WHERE i.inhparent OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t) \
         UNION SELECT i.inhrelid FROM below AS b JOIN pg_catalog.pg_inherits AS i \
         ON i.inhparent OPERATOR(pg_catalog.=) b.oid), \
         up AS (SELECT i.inhparent AS oid FROM pg_catalog.pg_inherits AS i \
         WHERE i.inhrelid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t)), \
         f AS (SELECT 'itself' AS relationship, t.oid FROM t \
         UNION ALL SELECT 'below', b.oid FROM below AS b UNION ALL SELECT 'parent', up.oid FROM up \
         UNION ALL SELECT 'default', p.partdefid FROM pg_catalog.pg_partitioned_table AS p \
         WHERE p.partdefid OPERATOR(pg_catalog.<>) '0'::pg_catalog.oid \
         AND (p.partrelid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t) \
         OR p.partrelid OPERATOR(pg_catalog.=) ANY (SELECT up.oid FROM up)) \
         UNION ALL SELECT 'index', x.indexrelid FROM pg_catalog.pg_index AS x \
         WHERE x.indrelid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t) \
         UNION ALL SELECT 'table', x.indrelid FROM pg_catalog.pg_index AS x \
         WHERE x.indexrelid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t) \
         UNION ALL SELECT DISTINCT 'referenced', k.confrelid FROM pg_catalog.pg_constraint AS k \
         WHERE k.contype OPERATOR(pg_catalog.=) 'f' AND k.conrelid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t) \
         UNION ALL SELECT DISTINCT 'referencing', k.conrelid FROM pg_catalog.pg_constraint AS k \
         WHERE k.contype OPERATOR(pg_catalog.=) 'f' AND k.confrelid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t) \
         UNION ALL SELECT DISTINCT 'sequence', d.objid FROM pg_catalog.pg_depend AS d \
         WHERE d.deptype OPERATOR(pg_catalog.=) ANY (ARRAY['a', 'i']::pg_catalog.\"char\"[]) \
         AND d.classid OPERATOR(pg_catalog.=) '1259'::pg_catalog.oid AND d.refclassid OPERATOR(pg_catalog.=) '1259'::pg_catalog.oid \
         AND d.refobjid OPERATOR(pg_catalog.=) ANY (SELECT t.oid FROM t)) \
         SELECT f.relationship, c.oid, n.nspname, c.relname, c.relkind, c.relispartition, GREATEST(c.reltuples::pg_catalog.int8, \
         pg_catalog.pg_stat_get_live_tuples(c.oid)) AS tuples FROM f \
         JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) f.oid \
         JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
         WHERE f.relationship OPERATOR(pg_catalog.<>) 'sequence' OR c.relkind OPERATOR(pg_catalog.=) 'S' \
         ORDER BY c.oid USING OPERATOR(pg_catalog.<)"
    )
}

pub(crate) fn read_relations(reply: &[SimpleQueryMessage]) -> Vec<CatalogRelation> {
    let read = |row| {
        let relationship = match text(row, "relationship")?.as_str() {
            "itself" => Relationship::Itself,
            "below" => Relationship::Below,
            "parent" => Relationship::Parent,
            "default" => Relationship::Default,
            "index" => Relationship::Index,
            "table" => Relationship::TableOfIndex,
            "referenced" => Relationship::Referenced,
            "referencing" => Relationship::Referencing,
            "sequence" => Relationship::Sequence,
            _ => return None,
        };
        Some(CatalogRelation {
            relationship,
            oid: parsed(row, "oid")?,
            schema: text(row, "nspname")?,
            name: text(row, "relname")?,
            kind: parsed(row, "relkind")?,
            is_partition: is_true(row, "relispartition"),
            rows: parsed::<i64>(row, "tuples").and_then(|rows| u64::try_from(rows).ok()),
        })
    };
    rows(reply).filter_map(read).collect()
}

/// The size of the relations in bytes. It takes ACCESS SHARE on each, and fails after a wait of this many milliseconds.
pub(crate) fn size(oids: &[u32], lock_timeout: i32) -> String {
    format!(
        "SET LOCAL lock_timeout = {lock_timeout}; SELECT pg_catalog.sum(pg_catalog.pg_relation_size(c.oid)) AS size \
         FROM pg_catalog.pg_class AS c WHERE c.oid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.oid[]) \
         AND c.relkind OPERATOR(pg_catalog.=) ANY (ARRAY['r', 'm', 't']::pg_catalog.\"char\"[])",
        oid_list(oids)
    )
}

/// The oids in an array's text.
fn oid_list(oids: &[u32]) -> String {
    let oids: Vec<_> = oids.iter().map(u32::to_string).collect();
    oids.join(",")
}

pub(crate) fn read_size(reply: &[SimpleQueryMessage]) -> u64 {
    rows(reply).find_map(|row| parsed(row, "size")).unwrap_or(0)
}

/// Whether the activity `a` is that of an autovacuum worker. A role that may not see the kind of process sees that it has
/// a database and no user, which other processes with locks on tables have.
const IS_AUTOVACUUM: &str = "COALESCE(pg_catalog.texteq(a.backend_type, 'autovacuum worker'), \
     a.pid IS NOT NULL AND a.datid IS NOT NULL AND a.usesysid IS NULL)";

/// Cancels these autovacuum workers, if the role may and if they do not prevent wraparound, and queries how long a session
/// has to wait before the server does it (`deadlock_timeout`, in milliseconds).
///
/// A superuser may, and since 18 a member of `pg_signal_autovacuum_worker`.
pub(crate) fn cancel_autovacuum(pids: &[i32]) -> String {
    let pids: Vec<_> = pids.iter().map(i32::to_string).collect();
    format!(
        "SELECT (SELECT y.setting FROM pg_catalog.pg_settings AS y \
         WHERE pg_catalog.texteq(y.name, 'deadlock_timeout')) AS deadlock_timeout, \
         (SELECT pg_catalog.count(*) FROM (SELECT a.pid FROM pg_catalog.pg_stat_activity AS a \
         WHERE a.pid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.int4[]) \
         AND pg_catalog.texteq(a.backend_type, 'autovacuum worker') \
         AND NOT a.query OPERATOR(pg_catalog.~~) '%(to prevent wraparound)' OFFSET 0) AS w \
         WHERE CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles AS r \
         WHERE pg_catalog.nameeq(r.rolname, current_user) AND r.rolsuper) \
         OR EXISTS (SELECT FROM pg_catalog.pg_roles AS r \
         WHERE pg_catalog.nameeq(r.rolname, 'pg_signal_autovacuum_worker') \
         AND pg_catalog.pg_has_role(r.oid, 'USAGE')) THEN pg_catalog.pg_cancel_backend(w.pid) ELSE false END) AS cancelled",
        pids.join(",")
    )
}

/// Reads the reply of [`cancel_autovacuum`]: how many were cancelled, and `deadlock_timeout`.
pub(crate) fn read_cancelled(reply: &[SimpleQueryMessage]) -> Option<(u64, Duration)> {
    let row = rows(reply).next()?;
    let millis = parsed(row, "deadlock_timeout")?;
    Some((parsed(row, "cancelled")?, Duration::from_millis(millis)))
}

/// All other backends that hold or wait for a lock on one of the relations.
pub(crate) fn holders_and_waiters(oids: &[u32]) -> String {
    format!(
        "SELECT l.relation, l.pid, CASE WHEN l.pid IS NULL THEN (SELECT p.gid FROM pg_catalog.pg_locks AS x \
         JOIN pg_catalog.pg_prepared_xacts AS p ON x.transactionid OPERATOR(pg_catalog.=) p.transaction \
         WHERE x.pid IS NULL AND pg_catalog.texteq(x.virtualtransaction, l.virtualtransaction) LIMIT 1) END AS gid, \
         a.application_name, a.usename, a.state, l.mode, l.granted, a.query, {IS_AUTOVACUUM} AS is_autovacuum, \
         pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.state_change) AS state_age, \
         pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.xact_start) AS transaction_age \
         FROM pg_catalog.pg_locks AS l LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid OPERATOR(pg_catalog.=) l.pid \
         WHERE pg_catalog.texteq(l.locktype, 'relation') \
         AND l.relation OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.oid[]) \
         AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database AS d \
         WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database())) \
         AND (l.pid IS NULL OR l.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()) \
         ORDER BY l.granted USING OPERATOR(pg_catalog.>), l.pid USING OPERATOR(pg_catalog.<)",
        oid_list(oids)
    )
}

/// Reads the reply of [`holders_and_waiters`], each with the relation's oid. `named` returns the name of a relation.
pub(crate) fn read_holders_and_waiters(
    reply: &[SimpleQueryMessage],
    named: impl Fn(u32) -> String,
) -> Vec<(u32, Blocker)> {
    let read = |row| {
        let oid: u32 = parsed(row, "relation")?;
        let mode = LockMode::from_pg_locks(&text(row, "mode")?)?;
        let pid = parsed(row, "pid");
        let blocker = Blocker {
            pid,
            prepared: text(row, "gid"),
            application_name: text(row, "application_name"),
            user: text(row, "usename"),
            state: text(row, "state"),
            state_age: seconds(row, "state_age"),
            transaction_age: seconds(row, "transaction_age"),
            mode: AdvisoryMode::Exclusive,
            object: Some((format!("relation {}", named(oid)), mode)),
            granted: is_true(row, "granted"),
            autovacuum: is_true(row, "is_autovacuum"),
            wraparound: blocker::prevents_wraparound(text(row, "query").as_deref()),
            waits_for_us: None,
            is_own: pid.is_some_and(is_own_backend),
        };
        Some((oid, blocker))
    };
    rows(reply).filter_map(read).collect()
}

/// The locks that this backend holds on relations, except on catalogs. A relation that the transaction has dropped has
/// no name.
pub(crate) const OWN_LOCKS: &str = "SELECT l.relation, n.nspname, c.relname, l.mode FROM pg_catalog.pg_locks AS l \
     LEFT JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) l.relation \
     LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
     WHERE pg_catalog.texteq(l.locktype, 'relation') AND l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
     AND l.granted AND l.relation OPERATOR(pg_catalog.>=) '16384'::pg_catalog.oid";

/// A lock that the backend itself holds.
pub(crate) struct OwnLock {
    pub(crate) oid: u32,
    pub(crate) name: Option<TableName>,
    pub(crate) mode: LockMode,
}

pub(crate) fn read_own_locks(reply: &[SimpleQueryMessage]) -> Vec<OwnLock> {
    let read = |row| {
        let name = text(row, "nspname").zip(text(row, "relname"));
        Some(OwnLock {
            oid: parsed(row, "relation")?,
            name: name.map(|(schema, name)| TableName::in_schema(schema, name)),
            mode: LockMode::from_pg_locks(&text(row, "mode")?)?,
        })
    };
    rows(reply).filter_map(read).collect()
}

/// The names of relations.
pub(crate) fn names_of(oids: &[u32]) -> String {
    format!(
        "SELECT c.oid, n.nspname, c.relname FROM pg_catalog.pg_class AS c \
         JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
         WHERE c.oid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.oid[])",
        oid_list(oids)
    )
}

pub(crate) fn read_names(reply: &[SimpleQueryMessage]) -> Vec<(u32, TableName)> {
    let read = |row| {
        let name = TableName::in_schema(text(row, "nspname")?, text(row, "relname")?);
        Some((parsed(row, "oid")?, name))
    };
    rows(reply).filter_map(read).collect()
}

/// The server's major version.
pub(crate) const VERSION: &str =
    "SELECT pg_catalog.current_setting('server_version_num') AS version";

pub(crate) fn read_major_version(reply: &[SimpleQueryMessage]) -> Option<u32> {
    let number: u32 = parsed(rows(reply).next()?, "version")?;
    Some(number / 10_000)
}

/// Whether one of these functions is volatile, and whether the type is a domain with constraints.
pub(crate) fn new_column(ty: &str, calls: &[String]) -> String {
    let names: Vec<_> = calls.iter().map(|call| literal(call)).collect();
    let names = names.join(", ");
    format!(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc AS p \
         WHERE p.proname OPERATOR(pg_catalog.=) ANY (ARRAY[{names}]::pg_catalog.name[]) \
         AND p.provolatile OPERATOR(pg_catalog.=) 'v') AS volatile, \
         EXISTS (SELECT FROM pg_catalog.pg_type AS y \
         WHERE y.oid OPERATOR(pg_catalog.=) pg_catalog.to_regtype({})::pg_catalog.oid \
         AND y.typtype OPERATOR(pg_catalog.=) 'd' AND (y.typnotnull OR EXISTS (SELECT \
         FROM pg_catalog.pg_constraint AS k WHERE k.contypid OPERATOR(pg_catalog.=) y.oid))) AS domain",
        literal(ty)
    )
}

/// Whether one of these functions is volatile.
pub(crate) fn volatile(calls: &[String]) -> String {
    new_column("pg_catalog.int4", calls)
}

/// Reads two boolean columns.
pub(crate) fn read_two(reply: &[SimpleQueryMessage], first: &str, second: &str) -> (bool, bool) {
    let row = rows(reply).next();
    (
        row.is_some_and(|row| is_true(row, first)),
        row.is_some_and(|row| is_true(row, second)),
    )
}

/// Whether a DETACH PARTITION CONCURRENTLY of the partition is pending.
pub(crate) fn is_detach_pending(partition: &TableName) -> String {
    format!(
        "WITH {} SELECT EXISTS (SELECT FROM t JOIN pg_catalog.pg_inherits AS i ON i.inhrelid OPERATOR(pg_catalog.=) t.oid \
         WHERE i.inhdetachpending) AS yes",
        with_t(partition)
    )
}

pub(crate) fn finalize(parent: &TableName, partition: &TableName) -> String {
    format!("ALTER TABLE {parent} DETACH PARTITION {partition} FINALIZE")
}

pub(crate) fn is_yes(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "yes"))
}

/// Whether a row `k` of `pg_constraint` is a CHECK that its column is not NULL, and nothing else. It tests the stored
/// expression tree, because the functions that deparse it open the table.
pub(super) fn proves_not_null(k: &str) -> String {
    format!(
        "COALESCE({k}.contype OPERATOR(pg_catalog.=) 'c' \
         AND pg_catalog.starts_with({k}.conbin::pg_catalog.text, '{{NULLTEST :arg {{VAR ') \
         AND pg_catalog.strpos({k}.conbin::pg_catalog.text, ':nulltesttype 1 ') OPERATOR(pg_catalog.>) 0, false)"
    )
}

/// Whether a column of the index is nullable.
pub(crate) fn index_nullable(table: &TableName, index: &str) -> String {
    format!(
        "WITH {} SELECT EXISTS (SELECT FROM pg_catalog.pg_class AS i \
         JOIN pg_catalog.pg_index AS x ON x.indexrelid OPERATOR(pg_catalog.=) i.oid \
         JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) x.indrelid \
         AND a.attnum OPERATOR(pg_catalog.=) ANY (x.indkey) WHERE x.indrelid OPERATOR(pg_catalog.=) t.oid \
         AND i.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name AND NOT a.attnotnull) AS nullable, false AS other \
         FROM t",
        with_t(table),
        literal(index)
    )
}

/// The direct partitions of a table.
pub(crate) fn partitions(oid: u32) -> String {
    format!(
        "SELECT 'below' AS relationship, c.oid, n.nspname, c.relname, c.relkind, c.relispartition, NULL AS tuples \
         FROM pg_catalog.pg_inherits AS i JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) i.inhrelid \
         JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
         WHERE i.inhparent OPERATOR(pg_catalog.=) '{oid}'::pg_catalog.oid AND c.relispartition \
         ORDER BY c.oid USING OPERATOR(pg_catalog.<)"
    )
}
