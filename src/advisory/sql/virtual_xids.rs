//! Who waits for whose virtual transaction.

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{is_true, parsed, rows, text};

/// A session that waits until a transaction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VirtualXidWait {
    /// The backend of that transaction.
    pub(crate) holder: i32,
    pub(crate) waiter: i32,
}

/// Asks for all of them, in one reading of the lock table: on a server where nobody builds an index there are none.
pub(crate) const AWAITED: &str = "SELECT l.pid, l.granted, l.virtualxid FROM (SELECT v.pid, v.granted, v.virtualxid, \
     pg_catalog.bool_and(v.granted) OVER (PARTITION BY v.virtualxid) AS is_free \
     FROM pg_catalog.pg_locks AS v WHERE pg_catalog.texteq(v.locktype, 'virtualxid')) AS l WHERE NOT l.is_free";

/// Reads the reply. A prepared transaction has no pid, and is not among them.
pub(crate) fn virtual_xid_waits(reply: &[SimpleQueryMessage]) -> Vec<VirtualXidWait> {
    let lock = |row| {
        Some((
            parsed(row, "pid")?,
            is_true(row, "granted"),
            text(row, "virtualxid")?,
        ))
    };
    let locks: Vec<(i32, bool, String)> = rows(reply).filter_map(lock).collect();
    let waiters = locks.iter().filter(|(_, granted, _)| !granted);
    let of = |(waiter, _, id): &(i32, bool, String)| {
        let waiter = *waiter;
        let holder = locks
            .iter()
            .find(|(_, granted, held)| *granted && held == id)?
            .0;
        Some(VirtualXidWait { holder, waiter })
    };
    waiters.filter_map(of).collect()
}
