//! [`Health`] and [`SettingsReport`] as JSON documents. Their fields are documented at the types.

use std::collections::BTreeMap;

use serde::ser::SerializeStruct as _;
use serde::{Serialize, Serializer};

use super::health::{Health, ObservedValue};
use super::settings::{Effect, SettingsFinding, SettingsReport, Severity};
use crate::graph::json::{BackendIdJson, RelationJson, millis};
use crate::postgres::timestamp::rfc3339;

/// Incremented when a field of either document changes its meaning or is removed. New fields do not count.
const VERSION: u32 = 1;

impl Serialize for Health {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let snapshot = self.snapshot();
        let roots = self.root_blockers().iter();
        let roots = roots.map(|(id, blocks)| RootDocument {
            id: id.into(),
            blocks: *blocks,
        });
        let transaction = ObservedDocument::new(self.oldest_transaction(), Option::as_ref);
        let idle = ObservedDocument::new(self.oldest_idle_in_transaction(), Option::as_ref);
        let deadlocks = self.deadlocks().map(|deadlocks| DeadlocksDocument {
            count: deadlocks.count(),
            since: deadlocks.since().map(rfc3339),
        });
        let table = LockTableDocument {
            entries: self.lock_table().entries(),
            capacity: self.lock_table().capacity(),
        };
        let prepared = PreparedDocument {
            count: self.prepared_transactions().count(),
            oldest_ms: self.prepared_transactions().oldest().map(millis),
        };
        let invalid = ObservedDocument::new(self.invalid_indexes(), |indexes| {
            Some(IndexesDocument {
                count: indexes.count(),
                first: indexes.first().iter().map(RelationJson::new).collect(),
            })
        });
        let mut document = serializer.serialize_struct("Health", 16)?;
        document.serialize_field("version", &VERSION)?;
        document.serialize_field("taken_at", &rfc3339(snapshot.taken_at()))?;
        document.serialize_field("took_ms", &millis(snapshot.duration()))?;
        document.serialize_field("database", self.database())?;
        document.serialize_field("lock_waiters", &self.lock_waiters())?;
        document.serialize_field("longest_wait_ms", &self.longest_wait().map(millis))?;
        document.serialize_field("root_blockers", &roots.collect::<Vec<_>>())?;
        document.serialize_field("cycles", &self.cycles())?;
        document.serialize_field("hidden_sessions", &self.hidden_sessions())?;
        document.serialize_field("oldest_transaction", &transaction)?;
        document.serialize_field("oldest_idle_in_transaction", &idle)?;
        document.serialize_field("deadlocks", &deadlocks)?;
        document.serialize_field("lock_table", &table)?;
        document.serialize_field("prepared_transactions", &prepared)?;
        document.serialize_field("invalid_indexes", &invalid)?;
        document.serialize_field("advisory_locks_held", &self.advisory_locks_held())?;
        document.end()
    }
}

#[derive(Serialize)]
struct RootDocument<'a> {
    #[serde(flatten)]
    id: BackendIdJson<'a>,
    blocks: usize,
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
        let mut document = serializer.serialize_struct("SettingsReport", 5)?;
        document.serialize_field("version", &VERSION)?;
        document.serialize_field("role", self.role())?;
        document.serialize_field("database", self.database())?;
        document.serialize_field("values", &self.values().collect::<BTreeMap<_, _>>())?;
        document.serialize_field("findings", self.findings())?;
        document.end()
    }
}

impl Serialize for SettingsFinding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let severity = match self.severity() {
            Severity::Note => "note",
            Severity::Advice => "advice",
            Severity::Warning => "warning",
        };
        let effect = self.effect().map(|effect| match effect {
            Effect::Immediate => "immediate",
            Effect::NewConnections => "new_connections",
            Effect::Reload => "reload",
            Effect::Restart => "restart",
        });
        let mut document = serializer.serialize_struct("SettingsFinding", 6)?;
        document.serialize_field("name", self.name())?;
        document.serialize_field("severity", severity)?;
        document.serialize_field("value", self.value())?;
        document.serialize_field("why", self.why())?;
        document.serialize_field("statement", &self.statement())?;
        document.serialize_field("effect", &effect)?;
        document.end()
    }
}
