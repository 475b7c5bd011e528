//! Transactions that begin with advisory locks, for the runner.

use tracing::Instrument as _;

use super::AdvisoryLock;
use crate::error::Error;
use crate::transaction::{BoxFuture, Open, Tx};

/// A transaction's deadlocks after which it runs alone in its conflict group.
const ALONE_AFTER_DEADLOCKS: u32 = 2;

/// Transactions that hold the locks of a description.
pub(crate) struct OpenLocked {
    pub(crate) lock: AdvisoryLock,
    pub(crate) how: LockedBy,
}

/// How a transaction takes its locks.
#[derive(Clone, Copy)]
pub(crate) enum LockedBy {
    /// It waits for them.
    Waiting,
    /// It has them at once or not at all.
    Trying,
    /// It waits for a shared lock, and after some deadlocks for an exclusive one.
    ConflictGroup,
}

impl Open for OpenLocked {
    fn open(&self, times_victim: u32) -> BoxFuture<'_, Result<Option<Tx>, Error>> {
        Box::pin(async move {
            let lock = self.lock.clone();
            match self.how {
                LockedBy::Waiting => {
                    let (advisory, request) = lock.request()?;
                    let span = request.span("with_advisory_lock");
                    advisory.acquire(request).instrument(span).await.map(Some)
                }
                LockedBy::Trying => {
                    let (advisory, request) = lock.request()?;
                    let span = request.span("try_with_advisory_lock");
                    advisory.try_acquire(request).instrument(span).await
                }
                LockedBy::ConflictGroup => {
                    let alone = times_victim >= ALONE_AFTER_DEADLOCKS;
                    let (advisory, request) = lock.conflict_group(alone)?;
                    let span = request.span("conflict_group");
                    advisory.acquire(request).instrument(span).await.map(Some)
                }
            }
        })
    }
}
