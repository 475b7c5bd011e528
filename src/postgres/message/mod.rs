//! What PostgreSQL says about locks in the DETAIL and CONTEXT of its errors, in any of its languages.
//!
//! The wording follows `lc_messages`, the facts do not: this room goes by the shape of a message, and by a few words
//! where the shape is not enough. What cannot be read keeps its text, so that nothing the server said is lost.

mod context;
mod deadlock;
#[cfg(feature = "server-log")]
mod lock_wait;
mod number;
mod object;

#[cfg(feature = "incidents")]
pub(crate) use context::ContextLine;
pub(crate) use context::{ContextKind, RowContext, context};
#[cfg(feature = "server-log")]
pub(crate) use deadlock::Wait;
pub(crate) use deadlock::deadlock_detail;
#[cfg(feature = "incidents")]
pub(crate) use deadlock::{DeadlockDetail, LineKind};
#[cfg(feature = "server-log")]
pub(crate) use lock_wait::{WaitNews, is_lock_timeout, lock_queue, lock_wait};
pub(crate) use object::LockObject;

#[cfg(all(test, feature = "incidents", feature = "server-log"))]
mod every_language;
#[cfg(test)]
mod languages;
