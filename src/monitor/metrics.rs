//! [`Health`] as metrics.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

use super::health::{Health, ObservedValue};
use crate::graph::Backend;

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
        let database = self.database();
        let gauge = |name: &'static str, unit: Unit, what: &'static str, value: f64| {
            // Each time, because the recorder may have been replaced.
            describe_gauge!(name, unit, what);
            gauge!(name, "database" => database.to_owned()).set(value);
        };
        let count = |name, what, value: f64| gauge(name, Unit::Count, what, value);
        let seconds = |name, what, value: f64| gauge(name, Unit::Seconds, what, value);
        let age = |age: Option<Duration>| age.unwrap_or_default().as_secs_f64();
        let oldest = |observed: &ObservedValue<Option<Backend>>,
                      of: fn(&Backend) -> Option<Duration>| {
            let seen = observed.seen();
            seen.map_or(UNKNOWN, |backend| age(backend.as_ref().and_then(of)))
        };
        let roots = self.root_blockers();
        let most = roots.iter().map(|(_, blocks)| *blocks).max();
        let (table, prepared) = (self.lock_table(), self.prepared_transactions());
        let invalid = self.invalid_indexes().seen();

        count(
            "lockkeeper_lock_waiters",
            "Sessions that wait for a lock",
            self.lock_waiters() as f64,
        );
        seconds(
            "lockkeeper_lock_wait_longest_seconds",
            "The longest wait for a lock",
            age(self.longest_wait()),
        );
        count(
            "lockkeeper_root_blockers",
            "Sessions in the way of others that wait for no lock themselves",
            roots.len() as f64,
        );
        count(
            "lockkeeper_root_blocker_blocks_most",
            "Sessions that the worst root blocker keeps waiting",
            most.unwrap_or(0) as f64,
        );
        count(
            "lockkeeper_lock_cycles",
            "Cycles in which sessions wait for one another",
            self.cycles() as f64,
        );
        count(
            "lockkeeper_hidden_sessions",
            "Sessions whose state the role may not see",
            self.hidden_sessions() as f64,
        );
        seconds(
            "lockkeeper_transaction_oldest_seconds",
            "The oldest open transaction",
            oldest(self.oldest_transaction(), Backend::transaction_age),
        );
        seconds(
            "lockkeeper_idle_in_transaction_oldest_seconds",
            "The longest that a session has been idle in its transaction",
            oldest(self.oldest_idle_in_transaction(), Backend::state_age),
        );
        count(
            "lockkeeper_lock_table_entries",
            "Objects in the server's lock table",
            table.entries() as f64,
        );
        count(
            "lockkeeper_lock_table_capacity",
            "Objects that the server's lock table is made for",
            table.capacity() as f64,
        );
        count(
            "lockkeeper_prepared_transactions",
            "Prepared transactions",
            prepared.count() as f64,
        );
        seconds(
            "lockkeeper_prepared_transaction_oldest_seconds",
            "The oldest prepared transaction",
            age(prepared.oldest()),
        );
        count(
            "lockkeeper_invalid_indexes",
            "INVALID indexes of the database that nobody is at work on",
            invalid.map_or(UNKNOWN, |indexes| indexes.count() as f64),
        );
        count(
            "lockkeeper_advisory_locks_held",
            "Advisory locks held in the database",
            self.advisory_locks_held() as f64,
        );
        describe_counter!(
            "lockkeeper_deadlocks_total",
            Unit::Count,
            "Deadlocks of the database that the server has ended"
        );
        if let Some(deadlocks) = self.deadlocks() {
            counter!("lockkeeper_deadlocks_total", "database" => database.to_owned())
                .absolute(deadlocks.count());
        }
    }
}
