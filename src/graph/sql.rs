//! Who waits for whom, and who is there: the server's side of [`crate::graph`].
//!
//! One statement reads the lock table once, asks `pg_blocking_pids` about those who wait, and brings each lock and each
//! backend that takes part in one row of its own. The rest is done by the client: a join of `pg_locks` with itself
//! knows neither modes nor the queue, and recursive queries for the tree do not end on cycles.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use super::parts::{Sight, Verbatim};
use super::{Backend, BackendId, LockObject, LockRow, Relation, RowId, Snapshot, assemble};
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::postgres::sql::{int4_array, rows};

/// A point in time as whole microseconds since 1970: exact, and the same in every `DateStyle` and time zone.
macro_rules! micros {
    ($time:literal) => {
        concat!(
            "(EXTRACT(epoch FROM ",
            $time,
            ") OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8"
        )
    };
}

/// The server's clock, before anything is looked at: in a statement of its own, since it is wanted where there are no
/// rows too.
const TAKEN: &str = concat!(
    "SELECT ",
    micros!("pg_catalog.clock_timestamp()"),
    " AS taken; "
);

/// The columns of `pg_locks`.
const LOCK: &str = "l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid, \
     l.objid, l.objsubid, l.virtualtransaction, l.pid, l.mode, l.granted, l.waitstart";

/// `a`: the activity, read once. Within a transaction it does not change any more, but every message of ours is one.
const ACTIVITY: &str = "a AS MATERIALIZED (SELECT a.* FROM pg_catalog.pg_stat_activity AS a)";

/// What is told of a backend, from `a`.
pub(crate) const WHO: &str = concat!(
    "a.pid AS who, a.application_name, a.usename, a.datname, pg_catalog.host(a.client_addr) AS client, a.backend_type, \
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

/// `p`: prepared transactions. Their locks have no pid, but share a virtual transaction, and one of them is on its
/// transaction id.
const PREPARED: &str = "p AS (SELECT i.virtualtransaction, p.gid, p.owner, p.database, p.prepared FROM l AS i \
     JOIN pg_catalog.pg_prepared_xacts AS p ON p.transaction OPERATOR(pg_catalog.=) i.transactionid \
     WHERE i.pid IS NULL)";

/// The locks `x` with names, and those of `t` with their activity, each in rows of their own: nothing joins them, so
/// either side of a row is NULL. Names come by a join: a cast to `regclass` would lock what it names.
const TOLD: &str = concat!(
    "SELECT x.*, who.* FROM (SELECT x.locktype, x.relation, x.page, x.tuple, x.virtualxid, x.transactionid, x.classid, \
     x.objid, x.objsubid, x.pid, x.mode, x.granted, x.blockers, ",
    micros!("x.waitstart"),
    " AS waitstart, n.nspname, c.relname, c.relkind, \
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
     LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace) AS x \
     FULL JOIN (SELECT "
);

/// The rest of it: parallel workers come with their leaders.
const PARTAKERS: &str = " FROM a WHERE a.pid OPERATOR(pg_catalog.=) ANY (SELECT t.pid FROM t) \
     OR a.leader_pid OPERATOR(pg_catalog.=) ANY (SELECT t.pid FROM t)) AS who ON false";

/// Everybody who waits for a lock, whoever is in their way, and what they hold and want of it; with `only`, just those
/// waits that can be reached from these sessions by going from waiters to blockers.
///
/// Parts of it in order: `l` the lock table without predicate locks, which block nobody; `q` those who wait, with the
/// session they belong to; `w` with those in their way; `v` those who still wait; `x` their waits, other locks on the
/// same objects, and the row locks that those who wait for a transaction have lined up for.
pub(crate) fn blocking(only: Option<&[i32]>) -> String {
    let mut sql = String::with_capacity(5000);
    // Infallible: writing to a String.
    let _ = write!(
        sql,
        "{TAKEN}WITH RECURSIVE l AS MATERIALIZED (SELECT {LOCK} FROM pg_catalog.pg_locks AS l \
         WHERE pg_catalog.textne(l.mode, 'SIReadLock')), {ACTIVITY}, \
         q AS MATERIALIZED (SELECT l.*, COALESCE(a.leader_pid, l.pid) AS session FROM l \
         LEFT JOIN a ON a.pid OPERATOR(pg_catalog.=) l.pid WHERE NOT l.granted), "
    );
    if let Some(only) = only {
        let pids = int4_array(only);
        // UNION, not UNION ALL: each session once, so that it ends on cycles.
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
    // The lock table once more, in `z`: it refers to the count of `w`, so that it cannot be read before that is complete,
    // and is not read where nobody waits. Only waits that were there both times are kept: what is put together from
    // waits that were not there at one time can be a circle that never was (test
    // `no_deadlock_is_seen_where_there_is_none`). Operators, not functions, where it is to be a hash join.
    let _ = write!(
        sql,
        "), n AS MATERIALIZED (SELECT pg_catalog.count(*) AS waits FROM w), \
         z AS MATERIALIZED (SELECT z.pid, z.waitstart FROM n CROSS JOIN LATERAL (SELECT l.pid, l.waitstart \
         FROM pg_catalog.pg_locks AS l WHERE NOT l.granted AND pg_catalog.int8gt(n.waits, 0) OFFSET 0) AS z), \
         v AS MATERIALIZED (SELECT w.* FROM w WHERE EXISTS (SELECT FROM z WHERE z.pid OPERATOR(pg_catalog.=) w.pid \
         AND pg_catalog.timestamptz_eq(z.waitstart, w.waitstart))), \
         x AS (SELECT {LOCK}, l.blockers FROM v AS l \
         UNION ALL SELECT {LOCK}, NULL FROM l WHERE EXISTS (SELECT FROM v AS w WHERE \
         COALESCE(w.relation, '0'::pg_catalog.oid) OPERATOR(pg_catalog.=) COALESCE(l.relation, '0'::pg_catalog.oid) \
         AND COALESCE(w.transactionid, '0'::pg_catalog.xid) OPERATOR(pg_catalog.=) \
         COALESCE(l.transactionid, '0'::pg_catalog.xid) \
         AND COALESCE(w.virtualxid, '') OPERATOR(pg_catalog.=) COALESCE(l.virtualxid, '') \
         AND COALESCE(w.classid, '0'::pg_catalog.oid) OPERATOR(pg_catalog.=) COALESCE(l.classid, '0'::pg_catalog.oid) \
         AND COALESCE(w.objid, '0'::pg_catalog.oid) OPERATOR(pg_catalog.=) COALESCE(l.objid, '0'::pg_catalog.oid) \
         AND pg_catalog.texteq(w.locktype, l.locktype)) \
         AND (l.granted OR NOT l.pid OPERATOR(pg_catalog.=) ANY (SELECT v.pid FROM v)) \
         UNION ALL SELECT {LOCK}, NULL FROM l WHERE l.granted AND pg_catalog.texteq(l.locktype, 'tuple') \
         AND l.pid OPERATOR(pg_catalog.=) ANY (SELECT v.pid FROM v)), {PREPARED}, \
         t AS (SELECT v.session AS pid FROM v UNION SELECT v.pid FROM v UNION SELECT pg_catalog.unnest(v.blockers) FROM v) \
         {TOLD}{WHO}{PARTAKERS}"
    );
    sql
}

/// Every advisory lock of this database, held or awaited, and the sessions they belong to.
#[cfg(feature = "monitor")]
pub(crate) fn advisory_locks() -> String {
    format!(
        "{TAKEN}WITH l AS MATERIALIZED (SELECT {LOCK} FROM pg_catalog.pg_locks AS l), {ACTIVITY}, \
         x AS (SELECT {LOCK}, NULL::pg_catalog.int4[] AS blockers FROM l \
         WHERE pg_catalog.texteq(l.locktype, 'advisory') AND pg_catalog.oideq(l.database, \
         (SELECT d.oid FROM pg_catalog.pg_database AS d \
         WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database())))), {PREPARED}, \
         t AS (SELECT x.pid FROM x) {TOLD}{WHO}{PARTAKERS}"
    )
}

/// Every backend of the server.
#[cfg(feature = "monitor")]
pub(crate) fn activity() -> String {
    format!("{TAKEN}SELECT {WHO} FROM pg_catalog.pg_stat_activity AS a")
}

/// What one of the messages above brought.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) taken_at: SystemTime,
    pub(crate) locks: Vec<LockRow>,
    pub(crate) backends: Vec<Backend>,
}

impl Seen {
    /// Who waits for whom. Of a reply to [`blocking`] that took this long.
    pub(crate) fn snapshot(self, took: Duration) -> Snapshot {
        assemble(&self.locks, self.backends, self.taken_at, took)
    }
}

/// Reads a reply; `named` gives a key its name. `None` where the server answered something else.
pub(crate) fn seen(
    reply: &[SimpleQueryMessage],
    named: &dyn Fn(LockKey) -> LockKey,
) -> Option<Seen> {
    let mut rows = rows(reply);
    let taken_at = micros(rows.next()?.try_get("taken").ok()??)?;
    let mut seen = Seen {
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
            seen.backends.push(backend(&row, pid, taken_at));
        }
        if let Some(lock) = lock(&row, named) {
            if let BackendId::Prepared(_) = lock.who
                && prepared.insert(lock.who.clone())
            {
                seen.backends
                    .push(prepared_transaction(&row, lock.who.clone(), taken_at));
            }
            seen.locks.push(lock);
        }
    }
    Some(seen)
}

pub(crate) fn backend(row: &Columns<'_>, pid: i32, now: SystemTime) -> Backend {
    let started = row.time("backend_start");
    let statement = row.get("query");
    // Somebody may have sent that text, but then the start is there.
    let hidden = started.is_none() && statement == Some("<insufficient privilege>");
    Backend {
        sight: if hidden { Sight::Hidden } else { Sight::Whole },
        backend_start: started,
        transaction_start: row.time("xact_start"),
        application_name: row.text("application_name"),
        user: row.text("usename"),
        database: row.text("datname"),
        client_address: row.text("client"),
        backend_type: row.text("backend_type"),
        state: row.text("state"),
        connected_for: age(now, started),
        in_transaction: age(now, row.time("xact_start")),
        since_statement: age(now, row.time("query_start")),
        in_state: age(now, row.time("state_change")),
        wait_event_type: row.text("wait_event_type"),
        wait_event: row.text("wait_event"),
        statement: statement
            .filter(|text| !hidden && !text.is_empty())
            .map(|text| Verbatim(text.into())),
        query_id: row.parsed("query_id"),
        leader_pid: row.parsed("leader_pid"),
        ..Backend::unknown(pid.into())
    }
}

fn prepared_transaction(row: &Columns<'_>, id: BackendId, now: SystemTime) -> Backend {
    let at = row.time("prepared");
    Backend {
        sight: Sight::Whole,
        transaction_start: at,
        in_transaction: age(now, at),
        user: row.text("owner"),
        database: row.text("prepared_in"),
        ..Backend::unknown(id)
    }
}

fn lock(row: &Columns<'_>, named: &dyn Fn(LockKey) -> LockKey) -> Option<LockRow> {
    let object = object(row, named)?;
    Some(LockRow {
        who: match row.parsed("pid") {
            Some(pid) => BackendId::Pid(pid),
            None => BackendId::Prepared(row.get("gid").map(Arc::from)),
        },
        object,
        mode: LockMode::from_pg_locks(row.get("mode")?)?,
        granted: row.get("granted") == Some("t"),
        since: row.time("waitstart"),
        blockers: row.get("blockers").map(numbers),
    })
}

/// What a lock is on, by the columns that `locktype` says are in use (PostgreSQL's source, `lockfuncs.c`).
fn object(row: &Columns<'_>, named: &dyn Fn(LockKey) -> LockKey) -> Option<LockObject> {
    let locktype = row.get("locktype")?;
    let relation = || {
        Some(Relation {
            oid: row.parsed("relation")?,
            name: name(row),
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
                name: name(row),
                kind: row.parsed("relkind"),
                database: None,
            },
            oid: row.parsed("objid")?,
            column: row.parsed("objsubid").unwrap_or(0),
            database: row.text("elsewhere"),
        }),
        "advisory" => {
            let (classid, objid) = (row.parsed("classid")?, row.parsed("objid")?);
            let key = LockKey::from_pg_locks(classid, objid, row.parsed("objsubid")?)?;
            Some(LockObject::Advisory {
                key: named(key),
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
    known().or_else(|| Some(LockObject::Other(unknown(row, locktype).into())))
}

/// The kind with all that is said of the lock, so that two locks of a kind are not taken for one.
fn unknown(row: &Columns<'_>, locktype: &str) -> String {
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

fn name(row: &Columns<'_>) -> Option<(Box<str>, Box<str>)> {
    Some((row.text("nspname")?, row.text("relname")?))
}

/// A row with the places of its columns, which the driver would look for by name each time.
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

/// Negative ages (clocks step, and the clock is read first) are zero.
pub(crate) fn age(now: SystemTime, start: Option<SystemTime>) -> Option<Duration> {
    start.map(|start| now.duration_since(start).unwrap_or_default())
}

/// An array of numbers as the server writes it: `{1,2}`.
fn numbers(array: &str) -> Vec<i32> {
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
        assert_eq!(numbers("{}"), [0; 0]);
        assert_eq!(numbers("{7}"), [7]);
        assert_eq!(numbers("{12,0,4711}"), [12, 0, 4711]);
    }
}
