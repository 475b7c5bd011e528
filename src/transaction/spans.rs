//! The spans of a run and of its attempts.

use std::time::Instant;

use tracing::Span;

use super::Open;
use crate::connection::Session;
use crate::meter::{SYSTEM, milliseconds};

/// The span of one run, and that of its attempt. Where nobody listens this is nothing.
pub(super) struct Spans {
    run: Span,
    attempt: Span,
    attempts: u32,
    /// When the attempt has begun, and when its transaction.
    began: Instant,
    opened: Option<Instant>,
    error: Option<String>,
}

/// The span of a run, which its [`Spans`] fill.
pub(crate) fn run_span(operation: &'static str) -> Span {
    tracing::debug_span!(
        "transaction",
        "db.system.name" = SYSTEM,
        "db.namespace" = tracing::field::Empty,
        "db.operation.name" = operation,
        attempts = tracing::field::Empty,
        "error.type" = tracing::field::Empty,
    )
}

impl Spans {
    pub(super) fn begin(open: &dyn Open) -> Self {
        Self {
            run: run_span(open.operation()),
            attempt: Span::none(),
            attempts: 0,
            began: Instant::now(),
            opened: None,
            error: None,
        }
    }

    /// An attempt begins, by waiting for its locks.
    pub(super) fn begin_attempt(&mut self, attempt: u32) -> Span {
        self.attempt = tracing::debug_span!(
            parent: &self.run,
            "attempt",
            "db.system.name" = SYSTEM,
            "db.namespace" = tracing::field::Empty,
            attempt,
            waited_ms = tracing::field::Empty,
            held_ms = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
        );
        if !self.attempt.is_disabled() {
            (self.began, self.opened) = (Instant::now(), None);
        }
        self.attempt.clone()
    }

    pub(super) fn attempt(&self) -> Span {
        self.attempt.clone()
    }

    /// Its transaction has begun, and has its locks.
    pub(super) fn opened(&mut self, attempt: u32, session: &Session) {
        self.attempts = attempt;
        if self.attempt.is_disabled() {
            return;
        }
        let now = Instant::now();
        self.opened = Some(now);
        let waited = now.saturating_duration_since(self.began);
        self.attempt.record("attempt", attempt);
        self.attempt.record("waited_ms", milliseconds(waited));
        if let Some(database) = session.connections().cache().database() {
            self.attempt.record("db.namespace", database);
            self.run.record("db.namespace", database);
        }
    }

    /// Its transaction has ended, or was not to be had.
    pub(super) fn ended(&mut self, error: impl FnOnce() -> Option<String>) {
        if self.attempt.is_disabled() {
            return;
        }
        if let Some(opened) = self.opened {
            self.attempt
                .record("held_ms", milliseconds(opened.elapsed()));
        }
        self.error = error();
        if let Some(error) = &self.error {
            self.attempt.record("error.type", &**error);
        }
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        if self.run.is_disabled() {
            return;
        }
        self.run.record("attempts", self.attempts);
        if let Some(error) = &self.error {
            self.run.record("error.type", &**error);
        }
    }
}
