//! [`Health`] as metrics.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

use super::health::{Health, ObservedValue};

/// The value of a metric that is hidden from the role.
const UNKNOWN: f64 = f64::NAN;

impl Health {
    /// Passes the numbers to the application's recorder of the [`metrics`](https://docs.rs/metrics) facade; without a
    /// recorder it does nothing. Call it after each [`Monitor::health`](crate::Monitor::health), for instance every 15
    /// seconds.
    ///
    /// Every metric has one label, `database`: the name of the [database](Self::database) that the query was sent to.
    /// So two keepers of one process do not overwrite each other's metrics. The server-wide metrics are the same from
    /// each database of a server: take the maximum, not the sum.
    ///
    /// | gauge | unit | what |
    /// |---|---|---|
    /// | `lockkeeper_lock_waiters` | sessions | waiting for a lock, server-wide |
    /// | `lockkeeper_lock_wait_longest_seconds` | seconds | the longest of these waits; 0 if no session waits |
    /// | `lockkeeper_root_blockers` | sessions | that block others and wait for no lock themselves |
    /// | `lockkeeper_root_blocker_blocks_most` | sessions | blocked by the worst of them |
    /// | `lockkeeper_lock_cycles` | cycles | of sessions that wait for one another |
    /// | `lockkeeper_hidden_sessions` | sessions | whose transaction age is hidden from the role |
    /// | `lockkeeper_transaction_oldest_seconds` | seconds | the age of the oldest open transaction, server-wide |
    /// | `lockkeeper_idle_in_transaction_oldest_seconds` | seconds | the longest time that a session has been idle in its transaction |
    /// | `lockkeeper_lock_table_entries`, `lockkeeper_lock_table_capacity` | objects | in the server's lock table, and those it is sized for |
    /// | `lockkeeper_prepared_transactions` | transactions | prepared, server-wide |
    /// | `lockkeeper_prepared_transaction_oldest_seconds` | seconds | the age of the oldest of these |
    /// | `lockkeeper_invalid_indexes` | indexes | INVALID in the database |
    /// | `lockkeeper_advisory_locks_held` | locks | held in the database |
    ///
    /// There is one counter, `lockkeeper_deadlocks_total`: the deadlocks of the database since its statistics were
    /// reset, set to the server's own count. It does not decrease when the server's count does. If the server does not
    /// count deadlocks, the counter is not updated.
    ///
    /// An observation that is [hidden](crate::ObservedValue::Hidden) is NaN, never 0. One that is
    /// [incomplete](crate::ObservedValue::AtLeast) is what was visible: if `lockkeeper_hidden_sessions` is above 0, the real
    /// ages may be higher.
    pub fn record(&self) {
        describe();
        let database = self.database();
        let set = |name: &'static str, value: f64| {
            gauge!(name, "database" => database.to_owned()).set(value);
        };
        let age = |age: Option<Duration>| age.unwrap_or_default().as_secs_f64();
        let oldest = |observed: &ObservedValue<_>,
                      of: fn(&crate::graph::Backend) -> Option<Duration>| {
            observed.seen().map_or(UNKNOWN, |backend: &Option<_>| {
                age(backend.as_ref().and_then(of))
            })
        };
        let roots = self.root_blockers();
        let most = roots.iter().map(|(_, blocks)| *blocks).max();
        set("lockkeeper_lock_waiters", self.lock_waiters() as f64);
        set(
            "lockkeeper_lock_wait_longest_seconds",
            age(self.longest_wait()),
        );
        set("lockkeeper_root_blockers", roots.len() as f64);
        set(
            "lockkeeper_root_blocker_blocks_most",
            most.unwrap_or(0) as f64,
        );
        set("lockkeeper_lock_cycles", self.cycles() as f64);
        set("lockkeeper_hidden_sessions", self.hidden_sessions() as f64);
        set(
            "lockkeeper_transaction_oldest_seconds",
            oldest(self.oldest_transaction(), |session| {
                session.transaction_age()
            }),
        );
        set(
            "lockkeeper_idle_in_transaction_oldest_seconds",
            oldest(self.oldest_idle_in_transaction(), |session| {
                session.state_age()
            }),
        );
        let table = self.lock_table();
        set("lockkeeper_lock_table_entries", table.entries() as f64);
        set("lockkeeper_lock_table_capacity", table.capacity() as f64);
        let prepared = self.prepared_transactions();
        set("lockkeeper_prepared_transactions", prepared.count() as f64);
        set(
            "lockkeeper_prepared_transaction_oldest_seconds",
            age(prepared.oldest()),
        );
        let invalid = self.invalid_indexes().seen();
        set(
            "lockkeeper_invalid_indexes",
            invalid.map_or(UNKNOWN, |indexes| indexes.count() as f64),
        );
        set(
            "lockkeeper_advisory_locks_held",
            self.advisory_locks_held() as f64,
        );
        if let Some(deadlocks) = self.deadlocks() {
            counter!("lockkeeper_deadlocks_total", "database" => database.to_owned())
                .absolute(deadlocks.count());
        }
    }
}

/// Called each time, because the recorder may have been replaced.
fn describe() {
    let seconds = [
        (
            "lockkeeper_lock_wait_longest_seconds",
            "The longest wait for a lock",
        ),
        (
            "lockkeeper_transaction_oldest_seconds",
            "The oldest open transaction",
        ),
        (
            "lockkeeper_idle_in_transaction_oldest_seconds",
            "The longest that a session has been idle in its transaction",
        ),
        (
            "lockkeeper_prepared_transaction_oldest_seconds",
            "The oldest prepared transaction",
        ),
    ];
    for (name, what) in seconds {
        describe_gauge!(name, Unit::Seconds, what);
    }
    let counts = [
        ("lockkeeper_lock_waiters", "Sessions that wait for a lock"),
        (
            "lockkeeper_root_blockers",
            "Sessions in the way of others that wait for no lock themselves",
        ),
        (
            "lockkeeper_root_blocker_blocks_most",
            "Sessions that the worst root blocker keeps waiting",
        ),
        (
            "lockkeeper_lock_cycles",
            "Cycles in which sessions wait for one another",
        ),
        (
            "lockkeeper_hidden_sessions",
            "Sessions whose state the role may not see",
        ),
        (
            "lockkeeper_lock_table_entries",
            "Objects in the server's lock table",
        ),
        (
            "lockkeeper_lock_table_capacity",
            "Objects that the server's lock table is made for",
        ),
        ("lockkeeper_prepared_transactions", "Prepared transactions"),
        (
            "lockkeeper_invalid_indexes",
            "INVALID indexes of the database that nobody is at work on",
        ),
        (
            "lockkeeper_advisory_locks_held",
            "Advisory locks held in the database",
        ),
    ];
    for (name, what) in counts {
        describe_gauge!(name, Unit::Count, what);
    }
    describe_counter!(
        "lockkeeper_deadlocks_total",
        Unit::Count,
        "Deadlocks of the database that the server has ended"
    );
}
