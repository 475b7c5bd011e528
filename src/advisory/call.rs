//! One call for locks: its span, and what it counts as.

use std::sync::Arc;
use std::time::Instant;

use tracing::Instrument as _;

use super::LockRequest;
use crate::connection::Connections;
use crate::error::{Error, ErrorKind};
use crate::meter::{Namespace, SYSTEM, error_type, milliseconds};

/// What is known of a call before it is made.
pub(super) struct Call {
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
            connections: (!span.is_disabled()).then(|| Arc::clone(connections)),
            span,
            namespace: Namespace::of(&self.keys()[0]),
        }
    }
}

impl Call {
    /// Makes it: the locks, or an error.
    ///
    /// Cancel safety: as the work's own.
    pub(super) async fn acquire<T>(
        self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let began = Instant::now();
        let done = work.instrument(self.span.clone()).await;
        self.end(began, done.as_ref().map(|_| true));
        done
    }

    /// The same for a call that may find the locks busy.
    ///
    /// Cancel safety: as the work's own.
    pub(super) async fn try_acquire<T>(
        self,
        work: impl Future<Output = Result<Option<T>, Error>>,
    ) -> Result<Option<T>, Error> {
        let began = Instant::now();
        let done = work.instrument(self.span.clone()).await;
        self.end(began, done.as_ref().map(Option::is_some));
        done
    }

    fn end(self, began: Instant, done: Result<bool, &Error>) {
        let waited = began.elapsed();
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
