//! Sessions and waits for tests, without a server.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::graph::{Backend, Edge, EdgeKind, LockObject, Snapshot, Visibility, Wait};
use crate::mode::LockMode;

/// A client's session, all of whose fields are visible.
pub(crate) fn backend(pid: i32) -> Backend {
    Backend {
        visibility: Visibility::Full,
        backend_start: Some(SystemTime::UNIX_EPOCH),
        transaction_start: Some(SystemTime::UNIX_EPOCH),
        backend_type: Some("client backend".into()),
        application_name: Some("app".into()),
        user: Some("app".into()),
        state: Some("active".into()),
        state_age: Some(Duration::from_secs(1)),
        ..Backend::unknown(pid.into())
    }
}

/// `waiter` has waited for `blocker` for `age`.
pub(crate) fn edge(waiter: i32, blocker: i32, age: Duration) -> Edge {
    Edge {
        wait: Arc::new(Wait {
            waiter: waiter.into(),
            worker: None,
            object: LockObject::Transaction(blocker.unsigned_abs()),
            row: None,
            mode: LockMode::Share,
            since: SystemTime::UNIX_EPOCH.checked_add(age),
            age: Some(age),
        }),
        blocker: blocker.into(),
        kind: EdgeKind::Hard,
        blocker_mode: Some(LockMode::Exclusive),
    }
}

pub(crate) fn snapshot(backends: Vec<Backend>, edges: Vec<Edge>) -> Snapshot {
    Snapshot::new(backends, edges, SystemTime::UNIX_EPOCH, Duration::ZERO)
}
