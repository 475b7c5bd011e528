//! One call for locks: its span, and what it counts as.

use std::sync::Arc;
use std::time::Instant;

use super::LockRequest;
use crate::connection::Connections;
use crate::error::{Error, ErrorKind};
use crate::meter::{Namespace, SYSTEM, error_type, milliseconds};

/// A call that has begun.
pub(super) struct Call {
    began: Instant,
    span: tracing::Span,
    namespace: Namespace,
    /// Where anybody wants to know of it.
    connections: Option<Arc<Connections>>,
}

impl LockRequest {
    /// The call that makes this request.
    pub(super) fn call(&self, operation: &'static str, connections: &Arc<Connections>) -> Call {
        let span = tracing::debug_span!(
            "advisory_lock",
            "db.system.name" = SYSTEM,
            "db.namespace" = tracing::field::Empty,
            "db.operation.name" = operation,
            key = %self.keys()[0],
            keys = self.keys().len(),
            mode = %self.mode(),
            waited_ms = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
        );
        Call {
            began: Instant::now(),
            connections: (!span.is_disabled()).then(|| Arc::clone(connections)),
            span,
            namespace: Namespace::of(&self.keys()[0]),
        }
    }
}

// It does not wrap the call's future: each layer would have its size twice.
impl Call {
    pub(super) fn span(&self) -> tracing::Span {
        self.span.clone()
    }

    /// What it gave: the locks, or an error.
    pub(super) fn acquired<T>(self, done: Result<T, Error>) -> Result<T, Error> {
        self.end(done.as_ref().map(|_| true));
        done
    }

    /// The same of a call that may find the locks busy.
    pub(super) fn tried<T>(self, done: Result<Option<T>, Error>) -> Result<Option<T>, Error> {
        self.end(done.as_ref().map(Option::is_some));
        done
    }

    fn end(self, done: Result<bool, &Error>) {
        let waited = self.began.elapsed();
        match done {
            Ok(true) => self.namespace.acquired(waited),
            Ok(false) => {}
            Err(error) if error.kind() == ErrorKind::LockTimeout => {
                self.namespace.timed_out(waited);
            }
            Err(_) => {}
        }
        let Some(connections) = &self.connections else {
            return;
        };
        self.span.record("waited_ms", milliseconds(waited));
        if let Some(database) = connections.cache().database() {
            self.span.record("db.namespace", database);
        }
        if let Err(error) = done {
            self.span.record("error.type", &*error_type(error));
        }
    }
}
