//! One waiter and one blocker, completed by the server's error and the row's key.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use crate::graph::{self, BackendId, EdgeKind, LockObject, Relation, RowId};
use crate::postgres::message::RowContext;

use super::RowKey;

/// A lock mode as the server spells it, in `pg_locks` or in an error's DETAIL. The latter may be unknown here.
type Mode = Cow<'static, str>;

/// A session that waited for a lock, and a session that blocked it.
#[derive(Clone, Debug, PartialEq)]
pub struct IncidentEdge {
    pub(super) waiter: BackendId,
    pub(super) blocker: BackendId,
    pub(super) object: LockObject,
    pub(super) row: Option<RowId>,
    pub(super) row_key: Option<RowKey>,
    pub(super) mode_wanted: Mode,
    pub(super) blocker_mode: Option<Mode>,
    pub(super) kind: Option<EdgeKind>,
    pub(super) wait_age: Option<Duration>,
    pub(super) in_cycle: bool,
    /// The row according to the error's CONTEXT, if no sample shows it.
    pub(super) context: Option<Arc<RowContext>>,
    /// The relation of that row, if it could be found.
    pub(super) context_relation: Option<Relation>,
}

impl IncidentEdge {
    pub(super) fn from_sample(edge: &graph::Edge) -> Self {
        let mode = edge.mode_held().or_else(|| edge.mode_queued());
        Self {
            waiter: edge.waiter().clone(),
            blocker: edge.blocker().clone(),
            object: edge.object().clone(),
            row: edge.row().cloned(),
            row_key: None,
            mode_wanted: edge.mode_wanted().as_pg_locks().into(),
            blocker_mode: mode.map(|mode| mode.as_pg_locks().into()),
            kind: Some(edge.kind()),
            wait_age: edge.wait_age(),
            in_cycle: false,
            context: None,
            context_relation: None,
        }
    }

    pub(super) fn from_detail(
        waiter: BackendId,
        blocker: BackendId,
        object: LockObject,
        mode: &str,
    ) -> Self {
        Self {
            waiter,
            blocker,
            row: object.row().cloned(),
            object,
            row_key: None,
            mode_wanted: mode.to_owned().into(),
            blocker_mode: None,
            kind: None,
            wait_age: None,
            in_cycle: false,
            context: None,
            context_relation: None,
        }
    }

    getters! {
        /// The session that waited. See [`Incident::participant`](super::Incident::participant).
        waiter: &BackendId;

        /// The session, or the prepared transaction, that blocked it.
        blocker: &BackendId;

        /// The object that was locked.
        object: &LockObject;

        /// The row version that was locked, also if the wait was for its transaction.
        row: Option<&RowId>;

        /// The key of that row, if it could be read.
        row_key: Option<&RowKey>;
    }

    /// The relation that was locked, or that the row is in.
    #[must_use]
    pub fn relation(&self) -> Option<&Relation> {
        let of_row = self.row.as_ref().map(RowId::relation);
        of_row.or_else(|| self.object.relation())
    }

    /// The requested mode, as `pg_locks.mode` spells it. For a row it is `ShareLock` on the transaction that locked the
    /// row, whatever the requested row lock.
    #[must_use]
    pub fn mode_wanted(&self) -> &str {
        &self.mode_wanted
    }

    /// The mode that the blocker held. `None` for a soft edge, and if it was not observed.
    #[must_use]
    pub fn mode_held(&self) -> Option<&str> {
        let mode = self.blocker_mode.as_deref();
        mode.filter(|_| self.kind != Some(EdgeKind::Soft))
    }

    /// The mode that the blocker itself waited for, ahead in the queue; only for a soft edge.
    #[must_use]
    pub fn mode_queued(&self) -> Option<&str> {
        let mode = self.blocker_mode.as_deref();
        mode.filter(|_| self.kind == Some(EdgeKind::Soft))
    }

    /// Whether the blocker held the lock or was only ahead in its queue. `None` if the edge is known from the server's
    /// DETAIL only, which does not tell.
    #[must_use]
    pub fn kind(&self) -> Option<EdgeKind> {
        self.kind
    }

    /// Whether the blocker was only ahead in the lock's queue.
    #[must_use]
    pub fn is_soft(&self) -> bool {
        self.kind == Some(EdgeKind::Soft)
    }

    getters! {
        /// How long the waiter had waited when it was sampled. `None` if the edge is known from the DETAIL only.
        wait_age: Option<Duration>;

        /// Whether it is an edge of the cycle.
        is_in_cycle: bool = in_cycle;
    }

    /// Whether a sample contains the edge; otherwise it is known from the server's DETAIL.
    #[must_use]
    pub fn was_seen(&self) -> bool {
        self.kind.is_some()
    }

    /// Whether the other edge is about the same object: one row, one relation, one advisory lock.
    pub(super) fn same_object(&self, other: &Self) -> bool {
        match (&self.row, &other.row) {
            (Some(a), Some(b)) => same_row(a, b),
            (None, None) => match (self.object.advisory_key(), other.object.advisory_key()) {
                (Some(a), Some(b)) => a.same_lock(b),
                _ => same_relation_lock(&self.object, &other.object),
            },
            _ => false,
        }
    }
}

/// Compares by oid, because either may lack the name.
pub(super) fn same_row(a: &RowId, b: &RowId) -> bool {
    (a.relation.oid, a.page, a.offset) == (b.relation.oid, b.page, b.offset)
}

fn same_relation_lock(a: &LockObject, b: &LockObject) -> bool {
    a.locktype() == b.locktype()
        && match (a.relation(), b.relation()) {
            (Some(a), Some(b)) => a.oid == b.oid,
            _ => a == b,
        }
}
