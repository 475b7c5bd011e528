//! [`Health`] and [`SettingsReport`] as JSON documents. Their fields are documented at the types.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::health::{Health, ObservedValue};
use super::settings::{Effect, SettingsFinding, SettingsReport, Severity};
use crate::graph::json::{BackendIdJson, RelationJson, millis};
use crate::graph::{Backend, BackendId};
use crate::postgres::timestamp::rfc3339;

/// Incremented when a field of either document changes its meaning or is removed. New fields do not count.
const VERSION: u32 = 1;

impl Serialize for Health {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let table = self.lock_table();
        let prepared = self.prepared_transactions();
        HealthDocument {
            version: VERSION,
            taken_at: rfc3339(self.snapshot().taken_at()),
            took_ms: millis(self.snapshot().duration()),
            database: self.database(),
            lock_waiters: self.lock_waiters(),
            longest_wait_ms: self.longest_wait().map(millis),
            root_blockers: self
                .root_blockers()
                .iter()
                .map(|(id, blocks)| RootDocument::new(id, *blocks))
                .collect(),
            cycles: self.cycles(),
            hidden_sessions: self.hidden_sessions(),
            oldest_transaction: ObservedDocument::new(self.oldest_transaction(), Option::as_ref),
            oldest_idle_in_transaction: ObservedDocument::new(
                self.oldest_idle_in_transaction(),
                Option::as_ref,
            ),
            deadlocks: self.deadlocks().map(|deadlocks| DeadlocksDocument {
                count: deadlocks.count(),
                since: deadlocks.since().map(rfc3339),
            }),
            lock_table: LockTableDocument {
                entries: table.entries(),
                capacity: table.capacity(),
            },
            prepared_transactions: PreparedDocument {
                count: prepared.count(),
                oldest_ms: prepared.oldest().map(millis),
            },
            invalid_indexes: ObservedDocument::new(self.invalid_indexes(), |indexes| {
                Some(IndexesDocument {
                    count: indexes.count(),
                    first: indexes.first().iter().map(RelationJson::new).collect(),
                })
            }),
            advisory_locks_held: self.advisory_locks_held(),
        }
        .serialize(serializer)
    }
}

#[derive(Serialize)]
struct HealthDocument<'a> {
    version: u32,
    taken_at: String,
    took_ms: f64,
    database: &'a str,
    lock_waiters: usize,
    longest_wait_ms: Option<f64>,
    root_blockers: Vec<RootDocument<'a>>,
    cycles: usize,
    hidden_sessions: usize,
    oldest_transaction: ObservedDocument<&'a Backend>,
    oldest_idle_in_transaction: ObservedDocument<&'a Backend>,
    deadlocks: Option<DeadlocksDocument>,
    lock_table: LockTableDocument,
    prepared_transactions: PreparedDocument,
    invalid_indexes: ObservedDocument<IndexesDocument<'a>>,
    advisory_locks_held: u64,
}

#[derive(Serialize)]
struct RootDocument<'a> {
    #[serde(flatten)]
    id: BackendIdJson<'a>,
    blocks: usize,
}

impl<'a> RootDocument<'a> {
    fn new(id: &'a BackendId, blocks: usize) -> Self {
        Self {
            id: id.into(),
            blocks,
        }
    }
}

/// A [`ObservedValue`] value.
#[derive(Serialize)]
struct ObservedDocument<T> {
    reading: &'static str,
    value: Option<T>,
}

impl<T> ObservedDocument<T> {
    fn new<'a, V>(observed: &'a ObservedValue<V>, value: impl FnOnce(&'a V) -> Option<T>) -> Self {
        Self {
            reading: match observed {
                ObservedValue::Known(_) => "known",
                ObservedValue::AtLeast(_) => "at_least",
                ObservedValue::Hidden => "hidden",
            },
            value: observed.seen().and_then(value),
        }
    }
}

#[derive(Serialize)]
struct DeadlocksDocument {
    count: u64,
    since: Option<String>,
}

#[derive(Serialize)]
struct LockTableDocument {
    entries: u64,
    capacity: u64,
}

#[derive(Serialize)]
struct PreparedDocument {
    count: u64,
    oldest_ms: Option<f64>,
}

#[derive(Serialize)]
struct IndexesDocument<'a> {
    count: usize,
    first: Vec<RelationJson<'a>>,
}

impl Serialize for SettingsReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        SettingsDocument {
            version: VERSION,
            role: self.role(),
            database: self.database(),
            values: self.values().collect(),
            findings: self.findings(),
        }
        .serialize(serializer)
    }
}

#[derive(Serialize)]
struct SettingsDocument<'a> {
    version: u32,
    role: &'a str,
    database: &'a str,
    values: BTreeMap<&'a str, &'a str>,
    findings: &'a [SettingsFinding],
}

impl Serialize for SettingsFinding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        SettingsFindingDocument {
            name: self.name(),
            severity: match self.severity() {
                Severity::Note => "note",
                Severity::Advice => "advice",
                Severity::Warning => "warning",
            },
            value: self.value(),
            why: self.why(),
            statement: self.statement(),
            effect: self.effect().map(|effect| match effect {
                Effect::Immediate => "immediate",
                Effect::NewConnections => "new_connections",
                Effect::Reload => "reload",
                Effect::Restart => "restart",
            }),
        }
        .serialize(serializer)
    }
}

#[derive(Serialize)]
struct SettingsFindingDocument<'a> {
    name: &'a str,
    severity: &'static str,
    value: &'a str,
    why: &'a str,
    statement: Option<&'a str>,
    effect: Option<&'static str>,
}
