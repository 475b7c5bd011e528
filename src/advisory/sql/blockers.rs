//! Who holds an advisory lock, or queues for it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use super::Locks;
use crate::blocker::Blocker;
use crate::connection::is_own_backend;
use crate::connection::sql::server::Denied;
use crate::key::{KeyId, LockKey};
use crate::mode::AdvisoryMode;
use crate::postgres::sql::{is_true, parsed, rows, seconds, text};

/// Behind another statement: everybody but this backend who holds or awaits one of the locks. One pass over `pg_locks` and
/// the activity of those it names. Nothing where the role may not read that: the message would fail.
pub(crate) fn push(sql: &mut String, locks: Locks<'_>, denied: Denied) {
    if denied.pg_locks {
        return;
    }
    sql.push_str(
        "; SELECT l.pid, CASE WHEN l.pid IS NULL THEN (SELECT p.gid FROM pg_catalog.pg_locks AS x \
         JOIN pg_catalog.pg_prepared_xacts AS p ON x.transactionid OPERATOR(pg_catalog.=) p.transaction \
         WHERE x.pid IS NULL AND pg_catalog.texteq(x.virtualtransaction, l.virtualtransaction) LIMIT 1) END AS gid, \
         a.application_name, a.usename, a.state, l.mode, l.granted, \
         pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.state_change) AS state_age, \
         pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.xact_start) AS transaction_age, \
         pg_catalog.pg_backend_pid() AS self \
         FROM ",
    );
    rows_of(sql, locks.keys);
    // A prepared transaction's locks have no pid, but they share a virtual transaction, and one of them is on its xid.
    sql.push_str(
        " LEFT JOIN pg_catalog.pg_stat_activity AS a ON pg_catalog.int4eq(a.pid, l.pid) \
         ORDER BY l.granted USING OPERATOR(pg_catalog.>), l.pid USING OPERATOR(pg_catalog.<)",
    );
}

/// `pg_locks AS l`, only the rows of these advisory keys in this database.
pub(crate) fn rows_of<'a>(sql: &mut String, keys: impl IntoIterator<Item = &'a LockKey>) {
    sql.push_str("pg_catalog.pg_locks AS l JOIN (VALUES ");
    for (n, key) in keys.into_iter().enumerate() {
        let comma = if n > 0 { ", " } else { "" };
        let _ = write!(
            sql,
            "{comma}('{}'::pg_catalog.oid, '{}'::pg_catalog.oid, '{}'::pg_catalog.int2)",
            key.classid(),
            key.objid(),
            key.objsubid()
        );
    }
    sql.push_str(
        ") AS k (classid, objid, objsubid) ON pg_catalog.texteq(l.locktype, 'advisory') \
         AND l.classid OPERATOR(pg_catalog.=) k.classid AND l.objid OPERATOR(pg_catalog.=) k.objid \
         AND l.objsubid OPERATOR(pg_catalog.=) k.objsubid \
         AND pg_catalog.oideq(l.database, (SELECT d.oid FROM pg_catalog.pg_database AS d \
         WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database())))",
    );
}

/// Which of the keys anybody holds or awaits.
pub(crate) fn held<'a>(keys: impl IntoIterator<Item = &'a LockKey>) -> String {
    let mut sql = String::from("SELECT DISTINCT l.classid, l.objid, l.objsubid, l.mode FROM ");
    rows_of(&mut sql, keys);
    sql
}

/// Reads the reply of [`held`]: the strongest mode of each.
pub(crate) fn held_keys(reply: &[SimpleQueryMessage]) -> BTreeMap<KeyId, AdvisoryMode> {
    let mut held = BTreeMap::new();
    for row in rows(reply) {
        let mode = text(row, "mode").and_then(|mode| AdvisoryMode::from_pg_locks(&mode));
        let (classid, objid) = (parsed(row, "classid"), parsed(row, "objid"));
        if let (Some(classid), Some(objid), Some(objsubid), Some(mode)) =
            (classid, objid, parsed(row, "objsubid"), mode)
            && let Some(key) = LockKey::from_pg_locks(classid, objid, objsubid)
        {
            let strongest = held.entry(key.id()).or_insert(mode);
            *strongest = mode.max(*strongest);
        }
    }
    held
}

/// Reads the reply of [`push`]: those whose hold, or earlier place in the queue, conflicts with `mode`.
pub(crate) fn blockers(reply: &[SimpleQueryMessage], mode: AdvisoryMode) -> Vec<Blocker> {
    rows(reply)
        .filter(|row| {
            row.columns()
                .iter()
                .any(|column| column.name() == "granted")
        })
        .filter_map(|row| {
            let pid: Option<i32> = parsed(row, "pid");
            if pid.is_some() && pid == parsed(row, "self") {
                return None;
            }
            let held = AdvisoryMode::from_pg_locks(row.try_get("mode").ok().flatten()?)?;
            held.conflicts_with(mode).then(|| Blocker {
                pid,
                prepared: text(row, "gid"),
                application_name: text(row, "application_name"),
                user: text(row, "usename"),
                state: text(row, "state"),
                state_age: seconds(row, "state_age"),
                transaction_age: seconds(row, "transaction_age"),
                mode: held,
                object: None,
                granted: is_true(row, "granted"),
                autovacuum: false,
                wraparound: None,
                waits_for_us: None,
                is_own: pid.is_some_and(is_own_backend),
            })
        })
        .collect()
}
