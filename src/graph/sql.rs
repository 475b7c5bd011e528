//! The SQL of [`crate::graph`]: locks, waits and backends.
//!
//! One statement reads the lock table, calls `pg_blocking_pids` for each waiter, and returns each lock and each participating
//! backend in a row of its own. The client does the rest: a join of `pg_locks` with itself knows neither modes nor the
//! queue, and recursive queries for the tree do not end on cycles.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use super::backend::{RawStatement, Visibility};
use super::{Backend, BackendId, LockObject, LockRow, Relation, RowId, Snapshot, assemble};
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::postgres::sql::{int4_array, rows};

/// A timestamp as whole microseconds since 1970: exact, and independent of `DateStyle` and time zone.
macro_rules! micros {
    ($time:literal) => {
        concat!(
            "(EXTRACT(epoch FROM ",
            $time,
            ") OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8"
        )
    };
}

/// The server's clock, before anything is read. It is a statement of its own, because it is needed without rows too.
const TAKEN_AT: &str = concat!(
    "SELECT ",
    micros!("pg_catalog.clock_timestamp()"),
    " AS taken; "
);

/// The columns of `pg_locks`.
const LOCK_COLUMNS: &str = "l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid, \
     l.objid, l.objsubid, l.virtualtransaction, l.pid, l.mode, l.granted, l.waitstart";

/// `a`: the activity, read once. It does not change within a transaction, but each of our messages is a transaction.
const ACTIVITY_CTE: &str = "a AS MATERIALIZED (SELECT a.* FROM pg_catalog.pg_stat_activity AS a)";

/// The columns that describe a backend, from `a`.
pub(crate) const BACKEND_COLUMNS: &str = concat!(
    "a.pid AS who, CASE WHEN pg_catalog.texteq(a.application_name, '') \
     AND pg_catalog.starts_with(a.backend_type, 'logical replication') THEN COALESCE((SELECT \
     pg_catalog.concat('subscription ', s.subname) FROM pg_catalog.pg_stat_subscription AS s \
     WHERE s.pid OPERATOR(pg_catalog.=) a.pid LIMIT 1), '') ELSE a.application_name END AS application_name, a.usename, a.datname, pg_catalog.host(a.client_addr) AS client, a.backend_type, \
     a.state, a.wait_event_type, a.wait_event, a.query, a.query_id, a.leader_pid, ",
    micros!("a.backend_start"),
    " AS backend_start, ",
    micros!("a.xact_start"),
    " AS xact_start, ",
    micros!("a.query_start"),
    " AS query_start, ",
    micros!("a.state_change"),
    " AS state_change"
);

/// `p`: prepared transactions. Their locks have no pid. All locks of one prepared transaction share a virtual transaction,
/// and one of them is on its transaction id.
const PREPARED_CTE: &str = "p AS (SELECT i.virtualtransaction, p.gid, p.owner, p.database, p.prepared FROM l AS i \
     JOIN pg_catalog.pg_prepared_xacts AS p ON p.transaction OPERATOR(pg_catalog.=) i.transactionid \
     WHERE i.pid IS NULL)";

/// The locks `x` with names, and the backends of `t` with their activity, in separate rows: nothing joins the two, so one
/// side of each row is NULL. Names come from a join, because a cast to `regclass` would lock the relation.
const LOCKS_JOIN: &str = concat!(
    "SELECT x.*, who.* FROM (SELECT x.locktype, x.relation, x.page, x.tuple, x.virtualxid, x.transactionid, x.classid, \
     x.objid, x.objsubid, x.pid, x.mode, x.granted, x.blockers, ",
    micros!("x.waitstart"),
    " AS waitstart, n.nspname, c.relname, c.relkind, y.typname, yn.nspname AS typnspname, \
     CASE WHEN NOT pg_catalog.nameeq(d.datname, pg_catalog.current_database()) THEN d.datname END AS elsewhere, \
     p.gid, p.owner, p.database AS prepared_in, ",
    micros!("p.prepared"),
    " AS prepared FROM x \
     LEFT JOIN p ON x.pid IS NULL AND p.virtualtransaction OPERATOR(pg_catalog.=) x.virtualtransaction \
     LEFT JOIN pg_catalog.pg_database AS d ON d.oid OPERATOR(pg_catalog.=) x.database \
     LEFT JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) (CASE \
     WHEN pg_catalog.texteq(x.locktype, 'object') THEN x.classid \
     WHEN pg_catalog.oideq(x.database, '0'::pg_catalog.oid) \
     OR pg_catalog.nameeq(d.datname, pg_catalog.current_database()) THEN x.relation END) \
     LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
     LEFT JOIN pg_catalog.pg_type AS y ON y.oid OPERATOR(pg_catalog.=) (CASE \
     WHEN pg_catalog.texteq(x.locktype, 'object') AND pg_catalog.oideq(x.classid, '1247'::pg_catalog.oid) \
     AND pg_catalog.nameeq(d.datname, pg_catalog.current_database()) THEN x.objid END) \
     LEFT JOIN pg_catalog.pg_namespace AS yn ON yn.oid OPERATOR(pg_catalog.=) y.typnamespace) AS x \
     FULL JOIN (SELECT "
);

/// The end of that join: the backends of `t`, and their parallel workers.
const PARTICIPANTS: &str = " FROM a WHERE a.pid OPERATOR(pg_catalog.=) ANY (SELECT t.pid FROM t) \
     OR a.leader_pid OPERATOR(pg_catalog.=) ANY (SELECT t.pid FROM t)) AS who ON false";

/// All waiters and their blockers, with the modes that they hold and request. With `only`, just the waits that are reachable
/// from these sessions by following waiters to their blockers.
///
/// The parts in order: `l` is the lock table without predicate locks, which block nothing. `q` is the waiters with the
/// session that they belong to, `w` adds their blockers, `v` is those that still wait. `x` is their waits, the other locks
/// on the same objects, and the row locks that waiters for a transaction have queued for.
pub(crate) fn wait_graph(only: Option<&[i32]>) -> String {
    let mut sql = String::with_capacity(5000);
    // Infallible: writing to a String.
    let _ = write!(
        sql,
        "{TAKEN_AT}WITH RECURSIVE l AS MATERIALIZED (SELECT {LOCK_COLUMNS} FROM pg_catalog.pg_locks AS l \
         WHERE pg_catalog.textne(l.mode, 'SIReadLock')), {ACTIVITY_CTE}, \
         q AS MATERIALIZED (SELECT l.*, COALESCE(a.leader_pid, l.pid) AS session FROM l \
         LEFT JOIN a ON a.pid OPERATOR(pg_catalog.=) l.pid WHERE NOT l.granted), "
    );
    if let Some(only) = only {
        let pids = int4_array(only);
        // UNION, not UNION ALL: each session once, so that the recursion ends on cycles.
        let _ = write!(
            sql,
            "r AS (SELECT s.pid FROM pg_catalog.unnest({pids}) AS s (pid) \
             UNION SELECT b.pid FROM r JOIN q ON q.session OPERATOR(pg_catalog.=) r.pid \
             CROSS JOIN LATERAL pg_catalog.unnest(pg_catalog.pg_blocking_pids(q.pid)) AS b (pid)), ",
        );
    }
    sql.push_str(
        "w AS MATERIALIZED (SELECT q.*, pg_catalog.pg_blocking_pids(q.pid) AS blockers FROM q",
    );
    if only.is_some() {
        sql.push_str(" WHERE q.session OPERATOR(pg_catalog.=) ANY (SELECT r.pid FROM r)");
    }
    // `z` reads the lock table a second time. It refers to the count of `w`, so that it cannot be read before `w` is complete,
    // and is not read if there are no waiters. Only waits that were there both times are kept: waits that did not exist at the
    // same time can form a cycle that never existed (test `no_deadlock_is_seen_where_there_is_none`). Operators instead of
    // functions allow a hash join.
    let _ = write!(
        sql,
        "), n AS MATERIALIZED (SELECT pg_catalog.count(*) AS waits FROM w), \
         z AS MATERIALIZED (SELECT z.pid, z.waitstart FROM n CROSS JOIN LATERAL (SELECT l.pid, l.waitstart \
         FROM pg_catalog.pg_locks AS l WHERE NOT l.granted AND pg_catalog.int8gt(n.waits, 0) OFFSET 0) AS z), \
         v AS MATERIALIZED (SELECT w.* FROM w WHERE EXISTS (SELECT FROM z WHERE z.pid OPERATOR(pg_catalog.=) w.pid \
         AND pg_catalog.timestamptz_eq(z.waitstart, w.waitstart))), \
         x AS (SELECT {LOCK_COLUMNS}, l.blockers FROM v AS l \
         UNION ALL SELECT {LOCK_COLUMNS}, NULL FROM l WHERE EXISTS (SELECT FROM v AS w WHERE \
         COALESCE(w.relation, '0'::pg_catalog.oid) OPERATOR(pg_catalog.=) COALESCE(l.relation, '0'::pg_catalog.oid) \
         AND COALESCE(w.transactionid, '0'::pg_catalog.xid) OPERATOR(pg_catalog.=) \
         COALESCE(l.transactionid, '0'::pg_catalog.xid) \
         AND COALESCE(w.virtualxid, '') OPERATOR(pg_catalog.=) COALESCE(l.virtualxid, '') \
         AND COALESCE(w.classid, '0'::pg_catalog.oid) OPERATOR(pg_catalog.=) COALESCE(l.classid, '0'::pg_catalog.oid) \
         AND COALESCE(w.objid, '0'::pg_catalog.oid) OPERATOR(pg_catalog.=) COALESCE(l.objid, '0'::pg_catalog.oid) \
         AND pg_catalog.texteq(w.locktype, l.locktype)) \
         AND (l.granted OR NOT l.pid OPERATOR(pg_catalog.=) ANY (SELECT v.pid FROM v)) \
         UNION ALL SELECT {LOCK_COLUMNS}, NULL FROM l WHERE l.granted AND pg_catalog.texteq(l.locktype, 'tuple') \
         AND l.pid OPERATOR(pg_catalog.=) ANY (SELECT v.pid FROM v)), {PREPARED_CTE}, \
         t AS (SELECT v.session AS pid FROM v UNION SELECT v.pid FROM v UNION SELECT pg_catalog.unnest(v.blockers) FROM v) \
         {LOCKS_JOIN}{BACKEND_COLUMNS}{PARTICIPANTS}"
    );
    sql
}

/// Every advisory lock of this database, held or awaited, and the sessions that the locks belong to.
#[cfg(feature = "monitor")]
pub(crate) fn advisory_locks() -> String {
    format!(
        "{TAKEN_AT}WITH l AS MATERIALIZED (SELECT {LOCK_COLUMNS} FROM pg_catalog.pg_locks AS l), {ACTIVITY_CTE}, \
         x AS (SELECT {LOCK_COLUMNS}, NULL::pg_catalog.int4[] AS blockers FROM l \
         WHERE pg_catalog.texteq(l.locktype, 'advisory') AND pg_catalog.oideq(l.database, \
         (SELECT d.oid FROM pg_catalog.pg_database AS d \
         WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database())))), {PREPARED_CTE}, \
         t AS (SELECT x.pid FROM x) {LOCKS_JOIN}{BACKEND_COLUMNS}{PARTICIPANTS}"
    )
}

/// Every backend of the server.
#[cfg(feature = "monitor")]
pub(crate) fn activity() -> String {
    format!("{TAKEN_AT}SELECT {BACKEND_COLUMNS} FROM pg_catalog.pg_stat_activity AS a")
}

/// The reply to one of the messages above.
#[derive(Debug)]
pub(crate) struct LockSample {
    pub(crate) taken_at: SystemTime,
    pub(crate) locks: Vec<LockRow>,
    pub(crate) backends: Vec<Backend>,
}

impl LockSample {
    /// The wait graph, from a reply to [`wait_graph`] that took this long.
    pub(crate) fn snapshot(self, duration: Duration) -> Snapshot {
        assemble(&self.locks, self.backends, self.taken_at, duration)
    }
}

/// Reads a reply; `name_key` adds the name to a key. `None` if the reply has another form.
pub(crate) fn read_sample(
    reply: &[SimpleQueryMessage],
    name_key: &dyn Fn(LockKey) -> LockKey,
) -> Option<LockSample> {
    let mut rows = rows(reply);
    let taken_at = micros(rows.next()?.try_get("taken").ok()??)?;
    let mut sample = LockSample {
        taken_at,
        locks: Vec::new(),
        backends: Vec::new(),
    };
    let mut columns = None;
    let mut prepared = HashSet::new();
    for row in rows {
        let columns = columns.get_or_insert_with(|| columns_of(row));
        let row = Columns { row, columns };
        if let Some(pid) = row.parsed("who") {
            sample.backends.push(backend(&row, pid, taken_at));
        }
        if let Some(lock) = lock(&row, name_key) {
            if let BackendId::Prepared(_) = lock.owner
                && prepared.insert(lock.owner.clone())
            {
                sample
                    .backends
                    .push(prepared_transaction(&row, lock.owner.clone(), taken_at));
            }
            sample.locks.push(lock);
        }
    }
    Some(sample)
}

pub(crate) fn backend(row: &Columns<'_>, pid: i32, now: SystemTime) -> Backend {
    let started = row.time("backend_start");
    let statement = row.get("query");
    // A client may have sent that text, but then `backend_start` is not NULL.
    let hidden = started.is_none() && statement == Some("<insufficient privilege>");
    Backend {
        visibility: if hidden {
            Visibility::Hidden
        } else {
            Visibility::Full
        },
        backend_start: started,
        transaction_start: row.time("xact_start"),
        application_name: row.text("application_name"),
        user: row.text("usename"),
        database: row.text("datname"),
        client_address: row.text("client"),
        backend_type: row.text("backend_type"),
        state: row.text("state"),
        connection_age: age(now, started),
        transaction_age: age(now, row.time("xact_start")),
        statement_age: age(now, row.time("query_start")),
        state_age: age(now, row.time("state_change")),
        wait_event_type: row.text("wait_event_type"),
        wait_event: row.text("wait_event"),
        statement: statement
            .filter(|text| !hidden && !text.is_empty())
            .map(|text| RawStatement(text.into())),
        query_id: row.parsed("query_id"),
        leader_pid: row.parsed("leader_pid"),
        ..Backend::unknown(pid.into())
    }
}

fn prepared_transaction(row: &Columns<'_>, id: BackendId, now: SystemTime) -> Backend {
    let at = row.time("prepared");
    Backend {
        visibility: Visibility::Full,
        transaction_start: at,
        transaction_age: age(now, at),
        user: row.text("owner"),
        database: row.text("prepared_in"),
        ..Backend::unknown(id)
    }
}

fn lock(row: &Columns<'_>, name_key: &dyn Fn(LockKey) -> LockKey) -> Option<LockRow> {
    let object = locked_object(row, name_key)?;
    Some(LockRow {
        owner: match row.parsed("pid") {
            Some(pid) => BackendId::Pid(pid),
            None => BackendId::Prepared(row.get("gid").map(Arc::from)),
        },
        object,
        mode: LockMode::from_pg_locks(row.get("mode")?)?,
        granted: row.get("granted") == Some("t"),
        since: row.time("waitstart"),
        blockers: row.get("blockers").map(int4_array_elements),
    })
}

/// The locked object, from the columns that its `locktype` uses (PostgreSQL's source, `lockfuncs.c`).
fn locked_object(row: &Columns<'_>, name_key: &dyn Fn(LockKey) -> LockKey) -> Option<LockObject> {
    let locktype = row.get("locktype")?;
    let relation = || {
        Some(Relation {
            oid: row.parsed("relation")?,
            name: relation_name(row),
            kind: row.parsed("relkind"),
            database: row.text("elsewhere"),
        })
    };
    let known = || match locktype {
        "relation" => relation().map(LockObject::Relation),
        "extend" => relation().map(LockObject::Extend),
        "page" => Some(LockObject::Page {
            relation: relation()?,
            page: row.parsed("page")?,
        }),
        "tuple" => Some(LockObject::Tuple(RowId {
            relation: relation()?,
            page: row.parsed("page")?,
            offset: row.parsed("tuple")?,
        })),
        "transactionid" => row.parsed("transactionid").map(LockObject::Transaction),
        "virtualxid" => row.text("virtualxid").map(LockObject::VirtualTransaction),
        "spectoken" => Some(LockObject::SpeculativeToken {
            transaction: row.parsed("transactionid"),
            token: row.parsed("objid")?,
        }),
        "object" => Some(LockObject::Object {
            catalog: Relation {
                oid: row.parsed("classid")?,
                name: relation_name(row),
                kind: row.parsed("relkind"),
                database: None,
            },
            oid: row.parsed("objid")?,
            column: row.parsed("objsubid").unwrap_or(0),
            database: row.text("elsewhere"),
            name: row.text("typnspname").zip(row.text("typname")),
        }),
        "advisory" => {
            let (classid, objid) = (row.parsed("classid")?, row.parsed("objid")?);
            let key = LockKey::from_pg_locks(classid, objid, row.parsed("objsubid")?)?;
            Some(LockObject::Advisory {
                key: name_key(key),
                database: row.text("elsewhere"),
            })
        }
        "frozenid" => Some(LockObject::FrozenId(row.text("elsewhere"))),
        "userlock" => Some(LockObject::Userlock(
            row.parsed("classid")?,
            row.parsed("objid")?,
            row.parsed("objsubid")?,
        )),
        "applytransaction" => Some(LockObject::ApplyTransaction {
            subscription: row.parsed("objid")?,
            transaction: row.parsed("transactionid")?,
        }),
        _ => None,
    };
    known().or_else(|| Some(LockObject::Other(describe_unknown(row, locktype).into())))
}

/// The lock type with all columns that are set, so that two objects of an unknown type stay distinct.
fn describe_unknown(row: &Columns<'_>, locktype: &str) -> String {
    let mut text = locktype.to_owned();
    for column in [
        "elsewhere",
        "relation",
        "page",
        "tuple",
        "virtualxid",
        "transactionid",
        "classid",
        "objid",
        "objsubid",
    ] {
        if let Some(value) = row.get(column) {
            let _ = write!(text, " {column} {value}");
        }
    }
    text
}

fn relation_name(row: &Columns<'_>) -> Option<(Box<str>, Box<str>)> {
    Some((row.text("nspname")?, row.text("relname")?))
}

/// A row with an index of its columns, which the driver would otherwise search by name each time.
pub(crate) struct Columns<'a> {
    pub(crate) row: &'a SimpleQueryRow,
    pub(crate) columns: &'a HashMap<String, usize>,
}

pub(crate) fn columns_of(row: &SimpleQueryRow) -> HashMap<String, usize> {
    let names = row.columns().iter().enumerate();
    names
        .map(|(at, column)| (column.name().to_owned(), at))
        .collect()
}

impl Columns<'_> {
    pub(crate) fn get(&self, column: &str) -> Option<&str> {
        self.row.try_get(*self.columns.get(column)?).ok().flatten()
    }

    pub(crate) fn parsed<T: FromStr>(&self, column: &str) -> Option<T> {
        self.get(column)?.parse().ok()
    }

    pub(crate) fn text(&self, column: &str) -> Option<Box<str>> {
        self.get(column).map(Box::from)
    }

    pub(crate) fn time(&self, column: &str) -> Option<SystemTime> {
        micros(self.get(column)?)
    }
}

fn micros(text: &str) -> Option<SystemTime> {
    let micros: i64 = text.parse().ok()?;
    let distance = Duration::from_micros(micros.unsigned_abs());
    if micros < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    }
}

/// Negative ages are zero: clocks step, and the clock is read first.
pub(crate) fn age(now: SystemTime, start: Option<SystemTime>) -> Option<Duration> {
    start.map(|start| now.duration_since(start).unwrap_or_default())
}

/// The elements of an array in the server's text format: `{1,2}`.
fn int4_array_elements(array: &str) -> Vec<i32> {
    let inside = array.trim_start_matches('{').trim_end_matches('}');
    let mut numbers = Vec::with_capacity(inside.bytes().filter(|byte| *byte == b',').count() + 1);
    numbers.extend(
        inside
            .split(',')
            .filter_map(|number| number.parse::<i32>().ok()),
    );
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_exact_to_the_microsecond() {
        let time = micros("1700000000123457").expect("a number");
        let since = time.duration_since(SystemTime::UNIX_EPOCH);
        assert_eq!(
            since.ok(),
            Some(Duration::from_micros(1_700_000_000_123_457))
        );
        assert!(micros("-1").is_some_and(|time| time < SystemTime::UNIX_EPOCH));
        assert_eq!(micros("soon"), None);
        assert_eq!(
            age(SystemTime::UNIX_EPOCH, Some(time)),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn arrays_are_read() {
        assert_eq!(int4_array_elements("{}"), [0; 0]);
        assert_eq!(int4_array_elements("{7}"), [7]);
        assert_eq!(int4_array_elements("{12,0,4711}"), [12, 0, 4711]);
    }
}
