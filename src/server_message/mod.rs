//! What PostgreSQL says about locks in the DETAIL and CONTEXT of its errors, in any of its languages.
//!
//! The wording follows `lc_messages`, the facts do not: this room goes by the shape of a message, and by a few words
//! where the shape is not enough. What cannot be read keeps its text, so that nothing the server said is lost.
#![allow(
    dead_code,
    unused_imports,
    reason = "for the incident report, under way"
)]

mod context;
mod deadlock;
mod lock_wait;
mod number;
mod object;

pub(crate) use context::{ContextKind, ContextLine, RowContext, context};
pub(crate) use deadlock::{DeadlockDetail, DetailLine, LineKind, Wait, deadlock_detail};
pub(crate) use lock_wait::{LockQueue, LockWait, WaitNews, is_lock_timeout, lock_queue, lock_wait};
pub(crate) use object::LockObject;

#[cfg(test)]
mod languages;
