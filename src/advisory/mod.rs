//! Advisory locks: what is asked for, how it is taken, and the guards that hold it.
//!
//! A call goes like this: a description ([`AdvisoryLock`]) becomes a [`LockRequest`] (checked, sorted, named); `acquire`
//! or `acquire_session` takes it with the texts of [`crate::advisory::sql`] on a [`crate::connection::Session`]; what
//! comes out is a [`Tx`](crate::Tx) in an [`XactGuard`], or a [`SessionGuard`].

mod acquire;
mod acquire_session;
mod build_watch;
mod call;
mod in_transaction;
mod lock;
mod lock_request;
mod open;
mod preconditions;
mod release;
mod session_guard;
mod sql;
mod wait_queue;
mod xact_guard;

#[cfg(test)]
mod found_out_again;

use std::sync::Arc;

pub use in_transaction::TxAdvisoryLock;
pub(crate) use lock::LockDescription;
pub use lock::{AdvisoryLock, SessionAdvisoryLock};
pub(crate) use lock_request::LockRequest;
pub(crate) use open::{LockedBy, OpenLocked};
pub use session_guard::SessionGuard;
pub use xact_guard::XactGuard;

use crate::connection::Connections;
use crate::transaction::Runner;

/// What all advisory locks of one keeper share.
#[derive(Debug)]
pub(crate) struct Advisory {
    pub(crate) connections: Arc<Connections>,
    pub(crate) runner: Runner,
    queue: Arc<wait_queue::WaitQueue>,
    watch: Arc<build_watch::BuildWatch>,
}

impl Advisory {
    pub(crate) fn new(connections: Arc<Connections>, runner: Runner) -> Arc<Self> {
        let queue = Arc::default();
        Arc::new(Self {
            watch: build_watch::BuildWatch::new(Arc::clone(&connections), Arc::clone(&queue)),
            connections,
            runner,
            queue,
        })
    }
}
