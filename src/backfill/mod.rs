//! Changing all rows of a large table while others go on using it.
//!
//! A call goes like this: a description ([`Backfill`]) is checked and becomes a [`job::Job`] (the catalogs are asked, the
//! session lock is taken, the checkpoint is read); its steps are batches and pauses; what each step comes to is a
//! [`BackfillProgress`].

mod describe;
mod job;
mod name;
mod pace;
mod progress;
mod sql;
mod stream;

pub(crate) use describe::Means;
pub use describe::{Backfill, BackfillKey};
pub use progress::{BackfillPause, BackfillProgress, ReplicationLag};
pub use stream::BackfillStream;
