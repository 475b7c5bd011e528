//! Finding out what became of a COMMIT whose answer was lost.

use std::sync::Arc;
use std::time::Duration;

use crate::connection::Connections;
use crate::deadline::Deadline;
use crate::error::is_insufficient_privilege;
use crate::transaction::Resolve;
use crate::transaction::sql::commit::{self, Mark, Status};

const PAUSE: Duration = Duration::from_millis(50);
/// How long to wait for a connection to ask on, the first time; each time that none was had, twice as long, since a busy
/// pool has a line of others before us.
const SPARE: Duration = Duration::from_secs(1);
/// How long a connection may be silent before another one is tried.
const ANSWER: Duration = Duration::from_secs(2);

const UNIDENTIFIED: &str = "the server has been started again since, or another one answers, and which of both is not known, for want of \
     GRANT EXECUTE ON FUNCTION pg_control_system()";

#[derive(Debug)]
pub(super) enum CommitOutcome {
    Committed,
    RolledBack,
    Unknown(&'static str),
}

/// Asks on other connections until the server knows.
///
/// Cancel safety: only asks.
pub(super) async fn look_up(
    connections: &Arc<Connections>,
    mark: &Mark,
    resolve: Resolve,
) -> CommitOutcome {
    let Mark::Written(transaction) = mark else {
        return CommitOutcome::RolledBack;
    };
    let mut question = commit::status(transaction, transaction.names_its_system());
    let most = resolve.0.unwrap_or(connections.longest_silence());
    let deadline = Deadline::after(most);
    let mut spare = SPARE;
    let mut last = "no other connection could ask for its outcome";
    while !deadline.has_passed() {
        let asking = Deadline::after(deadline.remaining().min(spare.saturating_add(ANSWER)));
        let answer = asking.bound(Duration::ZERO, connections.ask_within(spare, &question));
        match answer.await {
            Some(Ok(reply)) => match commit::status_of(transaction, &reply) {
                Status::Committed => return CommitOutcome::Committed,
                Status::RolledBack => return CommitOutcome::RolledBack,
                Status::Undecided => last = "the server did not decide in time",
                Status::Elsewhere => {
                    return CommitOutcome::Unknown(
                        "another server answers since a failover, and it may never have seen the transaction",
                    );
                }
                Status::Unidentified => return CommitOutcome::Unknown(UNIDENTIFIED),
                Status::Ambiguous => {
                    return CommitOutcome::Unknown(
                        "the server has been started again since, and another transaction may have got the same id",
                    );
                }
                Status::Forgotten => {
                    return CommitOutcome::Unknown("the server no longer knows the transaction");
                }
            },
            // The side connection's role may lack the right to this.
            Some(Err(error)) if is_insufficient_privilege(&error) => {
                tracing::debug!(%error, "outcome of a commit asked without the system's identifier");
                question = commit::status(transaction, false);
            }
            failed => {
                tracing::debug!(error = ?failed.map(|answer| answer.map(drop)), "outcome of a commit not asked");
                spare = spare.saturating_mul(2).min(most);
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    CommitOutcome::Unknown(last)
}
