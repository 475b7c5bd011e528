//! Finding out what became of a COMMIT whose answer was lost.

use std::sync::Arc;
use std::time::Duration;

use crate::deadline::Deadline;
use crate::session::{Connections, Reply};
use crate::sql::commit;

/// How long to go on asking.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(50);

/// What a transaction is known by, asked before COMMIT.
#[derive(Debug)]
pub(super) struct Mark {
    /// `None` for a transaction that has written nothing.
    xid: Option<u64>,
    history: Option<commit::History>,
}

impl Mark {
    pub(super) fn of(reply: &Reply) -> Self {
        Self {
            xid: commit::xid(reply),
            history: commit::history(reply),
        }
    }
}

#[derive(Debug)]
pub(super) enum Resolved {
    Committed,
    RolledBack,
    Unknown(&'static str),
}

/// Asks on other connections until the server knows.
///
/// Cancel safety: only asks.
pub(super) async fn resolve(connections: &Arc<Connections>, mark: &Mark) -> Resolved {
    let Some(xid) = mark.xid else {
        // It has written nothing that COMMIT could have made last.
        return Resolved::RolledBack;
    };
    let question = commit::status(xid);
    let deadline = Deadline::after(PATIENCE);
    let mut last = "no other connection could ask for its status";
    while !deadline.has_passed() {
        match connections.ask(&question).await {
            Ok(reply) => match read(&reply, mark) {
                Some(resolved) => return resolved,
                None => last = "the server did not decide in time",
            },
            Err(error) => tracing::debug!(%error, xid, "status of a commit not asked"),
        }
        tokio::time::sleep(PAUSE).await;
    }
    Resolved::Unknown(last)
}

/// `None` where it is to be asked again.
fn read(reply: &Reply, mark: &Mark) -> Option<Resolved> {
    if commit::in_recovery(reply) {
        // A standby, perhaps soon to be promoted.
        return None;
    }
    if commit::history(reply) != mark.history {
        return Some(Resolved::Unknown(
            "another server answers since a failover, and it may never have seen the transaction",
        ));
    }
    match commit::said(reply).as_deref() {
        Some("committed") => Some(Resolved::Committed),
        Some("aborted") => Some(Resolved::RolledBack),
        Some(_) => None,
        None => Some(Resolved::Unknown(
            "the server no longer knows the transaction",
        )),
    }
}
