//! Graphs for tests, without a server.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use crate::mode::LockMode;

use super::edge::Wait;
use super::{Backend, BackendId, Edge, EdgeKind, LockObject, Snapshot};

/// `waiter` waits for `blocker`; a waiter with a greater number has waited less long.
pub(super) fn edge(waiter: i32, blocker: i32, kind: EdgeKind) -> Edge {
    Edge {
        wait: Arc::new(Wait {
            waiter: BackendId::Pid(waiter),
            worker: None,
            object: LockObject::Transaction(blocker.unsigned_abs()),
            row: None,
            mode: LockMode::Share,
            since: None,
            age: Some(
                Duration::from_secs(60)
                    .saturating_sub(Duration::from_secs(waiter.unsigned_abs().into())),
            ),
        }),
        blocker: BackendId::Pid(blocker),
        kind,
        blocker_mode: Some(LockMode::Exclusive),
    }
}

pub(super) fn hard(waiter: i32, blocker: i32) -> Edge {
    edge(waiter, blocker, EdgeKind::Hard)
}

pub(super) fn soft(waiter: i32, blocker: i32) -> Edge {
    edge(waiter, blocker, EdgeKind::Soft)
}

pub(super) fn snapshot(edges: Vec<Edge>) -> Snapshot {
    described(Vec::new(), edges)
}

pub(super) fn described(backends: Vec<Backend>, edges: Vec<Edge>) -> Snapshot {
    Snapshot::new(backends, edges, SystemTime::UNIX_EPOCH, Duration::ZERO)
}

/// Any edges among a few sessions, also from a session to itself.
pub(super) fn any_edges() -> impl Strategy<Value = Vec<Edge>> {
    let any_edge = (1..9, 1..9, any::<bool>()).prop_map(|(waiter, blocker, is_soft)| {
        let kind = if is_soft {
            EdgeKind::Soft
        } else {
            EdgeKind::Hard
        };
        edge(waiter, blocker, kind)
    });
    prop::collection::vec(any_edge, 0..24)
}

pub(super) fn pids<'a>(backends: impl IntoIterator<Item = &'a Backend>) -> Vec<i32> {
    backends.into_iter().filter_map(Backend::pid).collect()
}
