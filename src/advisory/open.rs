//! Transactions that begin with advisory locks, for the runner.

use tracing::Instrument as _;

use super::LockDescription;
use crate::error::Error;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::transaction::{BoxFuture, Open, Tx};

/// A transaction's deadlocks after which it runs alone in its conflict group.
const ALONE_AFTER_DEADLOCKS: u32 = 2;

/// Transactions that hold the locks of a description.
pub(crate) struct OpenLocked {
    pub(crate) lock: LockDescription,
    pub(crate) how: LockedBy,
    /// What is locked in addition, in the same transaction.
    pub(crate) group: Option<LockKey>,
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
            let is_alone = times_victim >= ALONE_AFTER_DEADLOCKS;
            if let Some(group) = &self.group {
                lock.check_not_held(group, group_mode(is_alone))?;
            }
            let opened = match self.how {
                LockedBy::Waiting => {
                    let (advisory, request) = lock.request()?;
                    let call = request.call("with_advisory_lock", &advisory.connections);
                    let acquired = advisory.acquire(request).instrument(call.span()).await;
                    call.acquired(acquired).map(Some)
                }
                LockedBy::Trying => {
                    let (advisory, request) = lock.request()?;
                    let call = request.call("try_with_advisory_lock", &advisory.connections);
                    let tried = advisory.try_acquire(request).instrument(call.span()).await;
                    call.tried(tried)
                }
                LockedBy::ConflictGroup => {
                    let (advisory, request) = lock.conflict_group(is_alone)?;
                    let call = request.call("conflict_group", &advisory.connections);
                    let acquired = advisory.acquire(request).instrument(call.span()).await;
                    call.acquired(acquired).map(Some)
                }
            };
            match (opened?, &self.group) {
                (Some(tx), Some(group)) => {
                    let waits = !matches!(self.how, LockedBy::Trying);
                    join_group(tx, group.clone(), group_mode(is_alone), waits).await
                }
                (opened, _) => Ok(opened),
            }
        })
    }

    fn operation(&self) -> &'static str {
        match self.how {
            LockedBy::Waiting => "with_advisory_lock",
            LockedBy::Trying => "try_with_advisory_lock",
            LockedBy::ConflictGroup => "transaction",
        }
    }
}

/// How a conflict group's lock is held.
fn group_mode(is_alone: bool) -> AdvisoryMode {
    match is_alone {
        true => AdvisoryMode::Exclusive,
        false => AdvisoryMode::Shared,
    }
}

/// Takes the lock of a conflict group in a transaction that has its own. `None` where it is busy and not to be waited for.
async fn join_group(
    mut tx: Tx,
    key: LockKey,
    mode: AdvisoryMode,
    waits: bool,
) -> Result<Option<Tx>, Error> {
    if let Some(observed) = tx.session().observed() {
        observed.is_in_group(&key);
    }
    let lock = tx.advisory_lock(key);
    let lock = match mode {
        AdvisoryMode::Exclusive => lock,
        AdvisoryMode::Shared => lock.shared(),
    };
    if waits {
        lock.await?;
    } else if !lock.try_acquire().await? {
        tx.rollback().await;
        return Ok(None);
    }
    Ok(Some(tx))
}
