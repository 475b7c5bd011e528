//! The graph as JSON documents. Their fields are documented at [`graph`](super).

use std::sync::Arc;
use std::time::Duration;

use serde::ser::SerializeStruct as _;
use serde::{Serialize, Serializer};

use crate::key::LockKey;
use crate::postgres::statement::redact;
use crate::postgres::timestamp::rfc3339;

use super::edge::Wait;
use super::{Backend, BackendId, Cycle, Edge, EdgeKind, LockObject, LockTree, Relation, Snapshot};

/// Incremented when a field changes its meaning or is removed. New fields do not count.
pub(crate) const VERSION: u32 = 1;

impl Serialize for Snapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        SnapshotJson::new(self, &self.cycles(), None).serialize(serializer)
    }
}

impl Serialize for LockTree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        SnapshotJson::new(self.snapshot(), self.cycles(), Some(self)).serialize(serializer)
    }
}

impl Serialize for Backend {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut document = serializer.serialize_struct("Backend", 21)?;
        document.serialize_field("pid", &self.pid())?;
        document.serialize_field("prepared", &self.prepared_transaction())?;
        document.serialize_field("hidden", &self.is_hidden())?;
        document.serialize_field("gone", &self.is_gone())?;
        document.serialize_field("backend_start", &self.backend_start().map(rfc3339))?;
        document.serialize_field("transaction_start", &self.transaction_start().map(rfc3339))?;
        document.serialize_field("application_name", &self.application_name())?;
        document.serialize_field("user", &self.user())?;
        document.serialize_field("database", &self.database())?;
        document.serialize_field("client", &self.client_address())?;
        document.serialize_field("backend_type", &self.backend_type())?;
        document.serialize_field("state", &self.state())?;
        document.serialize_field("in_state_ms", &self.state_age().map(millis))?;
        document.serialize_field("transaction_age_ms", &self.transaction_age().map(millis))?;
        document.serialize_field("statement_age_ms", &self.statement_age().map(millis))?;
        document.serialize_field("connection_age_ms", &self.connection_age().map(millis))?;
        document.serialize_field("wait_event_type", &self.wait_event_type())?;
        document.serialize_field("wait_event", &self.wait_event())?;
        document.serialize_field("statement", &self.shown_statement().map(redact))?;
        document.serialize_field("query_id", &self.query_id().map(|id| id.to_string()))?;
        document.serialize_field("leader_pid", &self.leader_pid())?;
        document.end()
    }
}

impl Serialize for Edge {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        EdgeJson {
            waiter: self.waiter().into(),
            blocker: self.blocker().into(),
            kind: kind_name(self.kind()),
            mode_held: self.mode_held().map(crate::mode::LockMode::as_pg_locks),
            mode_queued: self.mode_queued().map(crate::mode::LockMode::as_pg_locks),
            request: LockRequestJson::new(&self.wait),
        }
        .serialize(serializer)
    }
}

#[derive(Serialize)]
struct EdgeJson<'a> {
    waiter: BackendIdJson<'a>,
    blocker: BackendIdJson<'a>,
    kind: &'static str,
    mode_held: Option<&'static str>,
    mode_queued: Option<&'static str>,
    #[serde(flatten)]
    request: LockRequestJson<'a>,
}

/// The part of a wait that all its edges have in common.
#[derive(Serialize)]
struct LockRequestJson<'a> {
    worker: Option<i32>,
    mode_wanted: &'static str,
    since: Option<String>,
    wait_age_ms: Option<f64>,
    locktype: &'a str,
    object: String,
    relation: Option<RelationJson<'a>>,
    ctid: Option<String>,
    advisory_key: Option<LockKeyJson<'a>>,
}

#[derive(Serialize)]
pub(crate) struct BackendIdJson<'a> {
    pid: Option<i32>,
    prepared: Option<&'a str>,
}

#[derive(Serialize)]
struct SnapshotJson<'a> {
    version: u32,
    taken_at: String,
    took_ms: f64,
    backends: &'a [Backend],
    waits: Vec<WaitJson<'a>>,
    roots: Vec<usize>,
    cycles: Vec<CycleJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<Vec<NodeJson>>,
}

#[derive(Serialize)]
struct WaitJson<'a> {
    waiter: usize,
    #[serde(flatten)]
    request: LockRequestJson<'a>,
    blockers: Vec<BlockerJson>,
}

#[derive(Serialize)]
struct BlockerJson {
    backend: usize,
    kind: &'static str,
    mode: Option<&'static str>,
}

#[derive(Serialize)]
struct CycleJson {
    deadlock: bool,
    backends: Vec<usize>,
}

/// Nodes are listed, not nested: chains are longer than the nesting that JSON parsers allow.
#[derive(Serialize)]
struct NodeJson {
    backend: usize,
    depth: usize,
    below: Option<usize>,
    wait: Option<usize>,
    blocks: usize,
    in_cycle: bool,
    workers: Vec<i32>,
}

impl<'a> SnapshotJson<'a> {
    fn new(snapshot: &'a Snapshot, cycles: &[Cycle], tree: Option<&LockTree>) -> Self {
        let position = |id: &BackendId| snapshot.position(id).unwrap_or_default();
        let mut waits: Vec<WaitJson<'_>> = Vec::new();
        let mut open: Option<&Arc<Wait>> = None;
        // The first wait of each waiter.
        let mut first_wait = vec![None; snapshot.backends().len()];
        for edge in snapshot.edges() {
            if !open.is_some_and(|open| Arc::ptr_eq(open, &edge.wait)) {
                open = Some(&edge.wait);
                let waiter = position(edge.waiter());
                first_wait[waiter].get_or_insert(waits.len());
                waits.push(WaitJson {
                    waiter,
                    request: LockRequestJson::new(&edge.wait),
                    blockers: Vec::new(),
                });
            }
            if let Some(wait) = waits.last_mut() {
                wait.blockers.push(BlockerJson {
                    backend: position(edge.blocker()),
                    kind: kind_name(edge.kind()),
                    mode: edge.blocker_mode.map(crate::mode::LockMode::as_pg_locks),
                });
            }
        }
        let nodes = tree.map(|tree| {
            let walk = tree.walk().map(|(depth, node)| NodeJson {
                backend: node.position(),
                depth,
                below: node.edge().map(|edge| position(edge.blocker())),
                wait: first_wait[node.position()],
                blocks: node.blocked_count(),
                in_cycle: node.is_in_cycle(),
                workers: node.workers(),
            });
            walk.collect()
        });
        let roots = snapshot.roots().into_iter();
        let cycles = cycles.iter().map(|cycle| CycleJson {
            deadlock: cycle.is_deadlock(),
            backends: cycle.members().map(position).collect(),
        });
        Self {
            version: VERSION,
            taken_at: rfc3339(snapshot.taken_at()),
            took_ms: millis(snapshot.duration()),
            backends: snapshot.backends(),
            waits,
            roots: roots.map(|root| position(root.id())).collect(),
            cycles: cycles.collect(),
            nodes,
        }
    }
}

impl<'a> LockRequestJson<'a> {
    fn new(wait: &'a Wait) -> Self {
        let row = wait.row.as_ref().or_else(|| wait.object.row());
        Self {
            worker: wait.worker,
            mode_wanted: wait.mode.as_pg_locks(),
            since: wait.since.map(rfc3339),
            wait_age_ms: wait.age.map(millis),
            locktype: wait.object.locktype(),
            object: wait.object.to_string(),
            relation: row
                .map(super::RowId::relation)
                .or_else(|| wait.object.relation())
                .map(RelationJson::new),
            ctid: row.map(super::RowId::ctid),
            advisory_key: LockObject::advisory_key(&wait.object).map(LockKeyJson::new),
        }
    }
}

impl<'a> From<&'a BackendId> for BackendIdJson<'a> {
    fn from(id: &'a BackendId) -> Self {
        Self {
            pid: id.pid(),
            prepared: id.prepared_transaction(),
        }
    }
}

pub(crate) fn kind_name(kind: EdgeKind) -> &'static str {
    match kind {
        EdgeKind::Hard => "hard",
        EdgeKind::Soft => "soft",
    }
}

/// A relation.
#[derive(Serialize)]
pub(crate) struct RelationJson<'a> {
    oid: u32,
    schema: Option<&'a str>,
    name: Option<&'a str>,
}

impl<'a> RelationJson<'a> {
    pub(crate) fn new(relation: &'a Relation) -> Self {
        Self {
            oid: relation.oid(),
            schema: relation.schema(),
            name: relation.name(),
        }
    }
}

/// The key of an advisory lock.
#[derive(Serialize)]
pub(crate) struct LockKeyJson<'a> {
    namespace: Option<&'a str>,
    name: Option<&'a str>,
    classid: u32,
    objid: u32,
    objsubid: u16,
}

impl<'a> LockKeyJson<'a> {
    pub(crate) fn new(key: &'a LockKey) -> Self {
        Self {
            namespace: key.namespace(),
            name: key.name(),
            classid: key.classid(),
            objid: key.objid(),
            objsubid: key.objsubid(),
        }
    }
}

/// Milliseconds with at most three decimal digits.
pub(crate) fn millis(duration: Duration) -> f64 {
    // Exact for centuries; a sum of floats would show spurious digits.
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::backend::{RawStatement, Visibility};
    use super::super::testing::{described, hard, snapshot, soft};
    use super::*;

    #[test]
    fn a_whole_document() {
        let mut worker = hard(3, 2);
        Arc::make_mut(&mut worker.wait).worker = Some(31);
        let mut first = hard(2, 1);
        let wait = Arc::make_mut(&mut first.wait);
        wait.since = Some(SystemTime::UNIX_EPOCH);
        wait.object = LockObject::Advisory {
            key: ("billing", "invoice:42").into(),
            database: None,
        };
        let holder = Backend {
            visibility: Visibility::Full,
            application_name: Some("billing src/pay.rs:42".into()),
            state: Some("idle in transaction".into()),
            state_age: Some(Duration::from_micros(1500)),
            statement: Some(RawStatement("UPDATE t SET a = 'secret'".into())),
            query_id: Some(i64::MAX),
            ..Backend::unknown(1.into())
        };
        let tree = described(vec![holder], vec![first, worker, soft(4, 3)]).tree();
        let document = serde_json::to_value(&tree).expect("a document");
        let expected = serde_json::json!({
            "version": 1,
            "taken_at": "1970-01-01T00:00:00.000000Z",
            "took_ms": 0.0,
            "backends": document["backends"],
            "waits": document["waits"],
            "roots": [0],
            "cycles": [],
            "nodes": [
                {"backend": 0, "depth": 0, "below": null, "wait": null, "blocks": 3, "in_cycle": false, "workers": []},
                {"backend": 1, "depth": 1, "below": 0, "wait": 0, "blocks": 2, "in_cycle": false, "workers": []},
                {"backend": 2, "depth": 2, "below": 1, "wait": 1, "blocks": 1, "in_cycle": false, "workers": [31]},
                {"backend": 3, "depth": 3, "below": 2, "wait": 2, "blocks": 0, "in_cycle": false, "workers": []},
            ],
        });
        assert_eq!(document, expected);
        assert_eq!(
            document["backends"][0],
            serde_json::json!({
                "pid": 1, "prepared": null, "hidden": false, "gone": false, "backend_start": null,
                "transaction_start": null, "application_name": "billing src/pay.rs:42", "user": null, "database": null,
                "client": null, "backend_type": null, "state": "idle in transaction", "in_state_ms": 1.5,
                "transaction_age_ms": null, "statement_age_ms": null, "connection_age_ms": null,
                "wait_event_type": null, "wait_event": null, "statement": "UPDATE t SET a = ?",
                "query_id": "9223372036854775807", "leader_pid": null,
            })
        );
        assert_eq!(document["backends"][3]["gone"], true);
        assert_eq!(
            document["waits"][0],
            serde_json::json!({
                "waiter": 1, "worker": null, "mode_wanted": "ShareLock", "since": "1970-01-01T00:00:00.000000Z",
                "wait_age_ms": 58000.0, "locktype": "advisory", "object": "advisory lock \"billing\"/\"invoice:42\"",
                "relation": null, "ctid": null,
                "advisory_key": {
                    "namespace": "billing", "name": "invoice:42", "classid": 2_024_214_390, "objid": 3_757_428_506_u32, "objsubid": 1,
                },
                "blockers": [{"backend": 0, "kind": "hard", "mode": "ExclusiveLock"}],
            })
        );
        assert_eq!(document["waits"][1]["worker"], 31);
        assert_eq!(document["waits"][2]["blockers"][0]["kind"], "soft");
        // A snapshot has the same document without the nodes.
        let mut plain = serde_json::to_value(tree.snapshot()).expect("a document");
        plain["nodes"] = document["nodes"].clone();
        assert_eq!(plain, document);
    }

    #[test]
    fn an_edge_by_itself() {
        let mut edge = soft(2, 1);
        edge.blocker = BackendId::Prepared(Some("order-7".into()));
        let document = serde_json::to_value(&edge).expect("a document");
        assert_eq!(
            document,
            serde_json::json!({
                "waiter": {"pid": 2, "prepared": null}, "blocker": {"pid": null, "prepared": "order-7"},
                "kind": "soft", "mode_held": null, "mode_queued": "ExclusiveLock", "worker": null,
                "mode_wanted": "ShareLock", "since": null, "wait_age_ms": 58000.0, "locktype": "transactionid",
                "object": "transaction 1", "relation": null, "ctid": null, "advisory_key": null,
            })
        );
    }

    #[test]
    fn cycles_and_long_chains() {
        let tree = snapshot(vec![hard(2, 1), hard(1, 2)]).tree();
        let document = serde_json::to_value(&tree).expect("a document");
        assert_eq!(
            document["cycles"],
            serde_json::json!([{"deadlock": true, "backends": [0, 1]}])
        );
        assert_eq!(document["roots"], serde_json::json!([]));
        let chain = snapshot((1..2000).map(|at| hard(at + 1, at)).collect()).tree();
        let text = serde_json::to_string(&chain).expect("a document");
        let back: serde_json::Value = serde_json::from_str(&text).expect("not nested too deeply");
        assert_eq!(back["nodes"][1999]["depth"], 1999);
    }

    /// Each field of the documents is in the tables of the documentation.
    #[test]
    fn every_field_is_documented() {
        let table = include_str!("mod.rs");
        let tree = snapshot(vec![hard(2, 1), hard(1, 2)]).tree();
        let document = serde_json::to_value(&tree).expect("a document");
        let edge = serde_json::to_value(hard(2, 1)).expect("a document");
        for object in [
            &document,
            &document["backends"][0],
            &document["waits"][0],
            &document["waits"][0]["blockers"][0],
            &document["cycles"][0],
            &document["nodes"][0],
            &edge,
            &edge["waiter"],
        ] {
            for field in object.as_object().expect("an object").keys() {
                assert!(table.contains(&format!("`{field}`")), "{field}");
            }
        }
    }
}
