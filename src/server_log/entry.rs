//! One message of the server's log, whatever its format.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use crate::error;
use crate::key::names;
use crate::mode::LockMode;
use crate::postgres::lock_object::LockObject;
use crate::postgres::message::{
    self, ContextKind, DetailWait, WaitNews, context, deadlock_detail, is_deadlock_message,
    is_lock_timeout, is_nowait, lock_queue, lock_wait,
};
use crate::postgres::text::beginning;

use super::event::{Event, LogEvent, LogEventKind, LogRow, LogWait, StatementText};

/// How many bytes of a deadlock's DETAIL are read. Any client can raise an error that looks like a deadlock.
const MAX_DETAIL_BYTES: usize = 256 << 10;

/// A message with everything the log has about it. Missing parts are empty or `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) origin: Origin,
    /// Whether the message is an error rather than a note of the server; `None` where the format tells this by the
    /// [`sqlstate`](Self::sqlstate).
    pub(super) is_error: Option<bool>,
    /// Whether the process id was guessed and may be some other number.
    pub(super) pid_is_guessed: bool,
    pub(super) sqlstate: Option<String>,
    pub(super) message: String,
    pub(super) detail: String,
    pub(super) context: String,
    pub(super) statement: String,
}

/// When the message was logged, and by which session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) time: Option<SystemTime>,
    pub(super) time_text: Option<String>,
    pub(super) pid: Option<i32>,
    pub(super) user: Option<String>,
    pub(super) database: Option<String>,
    pub(super) application: Option<String>,
    pub(super) query_id: Option<i64>,
}

impl Entry {
    /// What the message says about locks; `None` if it says nothing about them.
    pub(super) fn event(self) -> Option<LogEvent> {
        let found = match (&self.sqlstate, self.is_error) {
            (Some(sqlstate), _) if error::is_success(sqlstate) => self.lock_wait(),
            (Some(sqlstate), _) if error::is_deadlock(sqlstate) => Some(self.deadlock()),
            (Some(sqlstate), _) if error::is_lock_not_available(sqlstate) => {
                let kind = if is_lock_timeout(&self.message) {
                    LogEventKind::LockTimeout
                } else {
                    LogEventKind::NotAvailable
                };
                Some(Event::new(kind))
            }
            (Some(_), _) => None,
            // Without a SQLSTATE, an error is recognized by text that only this error has.
            (None, Some(true)) if is_lock_timeout(&self.message) => {
                Some(Event::new(LogEventKind::LockTimeout))
            }
            (None, Some(true)) if is_nowait(&self.message) => {
                Some(Event::new(LogEventKind::NotAvailable))
            }
            (None, Some(true)) => Some(self.deadlock()).filter(|event| {
                // `log_error_verbosity = terse` leaves out the DETAIL.
                let is_terse = self.detail.is_empty() && is_deadlock_message(&self.message);
                !event.waits.is_empty() || is_terse
            }),
            (None, Some(false)) => self.lock_wait(),
            (None, None) => None,
        };
        let mut event = found?;
        let Entry { mut origin, .. } = self;
        if self.pid_is_guessed {
            origin.pid = event.pid.or(origin.pid);
        }
        event.row = row(&self.context);
        event.statement = Some(self.statement)
            .filter(|statement| !statement.is_empty())
            .map(|statement| StatementText(statement.into()));
        Some(LogEvent::new(origin, event))
    }

    /// The bytes of its texts.
    pub(super) fn length(&self) -> usize {
        self.message.len() + self.detail.len() + self.context.len() + self.statement.len()
    }

    fn lock_wait(&self) -> Option<Event> {
        let detail = Some(self.detail.as_str()).filter(|detail| !detail.is_empty());
        let wait = lock_wait(&self.message, detail)?;
        // Each process logs its own waits only.
        if !self.pid_is_guessed && self.origin.pid.is_some_and(|pid| pid != wait.pid) {
            return None;
        }
        let queue = detail.and_then(lock_queue).unwrap_or_default();
        Some(Event {
            pid: Some(wait.pid),
            mode: Some(LockMode::from_pg_locks(&wait.mode)?),
            object: Some(with_known_name(&wait.object)),
            waited: wait.micros.map(Duration::from_micros),
            holders: queue.holders,
            queue: queue.waiters,
            ..Event::new(match wait.what {
                WaitNews::StillWaiting => LogEventKind::StillWaiting,
                WaitNews::Acquired => LogEventKind::Acquired,
                WaitNews::Failed => LogEventKind::NotAcquired,
                WaitNews::DeadlockAvoided => LogEventKind::DeadlockAvoided,
                WaitNews::DeadlockDetected => LogEventKind::DeadlockFound,
                WaitNews::NotAvailable => LogEventKind::NotAvailable,
            })
        })
    }

    fn deadlock(&self) -> Event {
        let detail = deadlock_detail(beginning(&self.detail, MAX_DETAIL_BYTES));
        let waits: Vec<LogWait> = if detail.is_cycle() {
            let statements: HashMap<i32, &str> = detail.statements().collect();
            let read = |wait: &DetailWait| {
                let statement = statements.get(&wait.waiter);
                LogWait::new(wait, statement.map(|text| StatementText((*text).into())))
            };
            detail.waits().map(read).collect()
        } else {
            Vec::new()
        };
        let first = waits.first();
        Event {
            pid: first.map(LogWait::waiter),
            mode: first.and_then(LogWait::mode),
            object: first.map(|wait| wait.object().clone()),
            waits,
            ..Event::new(LogEventKind::Deadlock)
        }
    }
}

/// Adds the name of an advisory lock's key, if this process has used it.
pub(super) fn with_known_name(object: &message::LockTag) -> LockObject {
    let mut object = LockObject::from_nameless_tag(object);
    if let LockObject::Advisory { key, .. } = &mut object
        && let Some(known) = names::lookup(key.id())
    {
        *key = known;
    }
    object
}

fn row(text: &str) -> Option<LogRow> {
    context(text).into_iter().find_map(|line| match line.kind {
        ContextKind::Row(row) => Some(LogRow::new(row)),
        _ => None,
    })
}
