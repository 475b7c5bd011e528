//! Parses the server's messages about locks (DETAIL, CONTEXT and log messages) in all its languages.
//!
//! `lc_messages` changes the wording, but not the facts: the parsers use the form of a message, and a few words if the
//! form is ambiguous. A text that cannot be parsed is kept, so that nothing is lost.

mod context;
mod deadlock;
#[cfg(feature = "server-log")]
mod lock_failure;
mod lock_tag;
#[cfg(feature = "server-log")]
mod lock_wait;
mod number;

#[cfg(feature = "incidents")]
pub(crate) use context::ContextLine;
pub(crate) use context::{ContextKind, RowContext, context};
#[cfg(feature = "server-log")]
pub(crate) use deadlock::DetailWait;
pub(crate) use deadlock::deadlock_detail;
#[cfg(feature = "incidents")]
pub(crate) use deadlock::{DeadlockDetail, LineKind};
#[cfg(feature = "server-log")]
pub(crate) use lock_failure::{is_deadlock_message, is_nowait};
pub(crate) use lock_tag::LockTag;
#[cfg(feature = "server-log")]
pub(crate) use lock_wait::{WaitNews, is_lock_timeout, lock_queue, lock_wait};

#[cfg(all(test, feature = "incidents", feature = "server-log"))]
mod every_language;
#[cfg(test)]
mod languages;
