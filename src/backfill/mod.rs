//! Changing all rows of a large table while other sessions use it.
//!
//! A description ([`Backfill`]) is checked against the catalogs ([`prepared::Prepared`]). It becomes a [`run::Run`]
//! once the session lock is acquired and the checkpoint is read. The steps of a run are batches and pauses; each step
//! returns a [`BackfillProgress`].

mod batch_sizer;
mod builder;
mod name;
mod prepared;
mod progress;
mod run;
mod sql;
mod stream;

pub use builder::{Backfill, BackfillKey};
pub use progress::{BackfillPause, BackfillProgress, ReplicationLag};
pub use stream::BackfillStream;
