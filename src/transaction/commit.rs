//! COMMIT and ROLLBACK, and what is left to be done when they fail.

use super::commit_outcome::{CommitOutcome, look_up};
use super::tx::End;
use super::{Tx, sql};
use crate::connection::{OnAbandon, Sent, Session};
use crate::error::{Error, ErrorKind, Failure, classify, classify_db};

/// What an error says when the transaction had failed before.
const FAILED_EARLIER: &str =
    "an earlier statement of the transaction failed, so it was rolled back";

impl Tx {
    /// COMMIT, after which the connection is back in the pool.
    ///
    /// `ConnectionLost` means that COMMIT was not run.
    ///
    /// Cancel safety: once polled it goes on in the background, to whatever outcome.
    pub(crate) async fn commit(mut self) -> Result<(), Error> {
        let Some(mut session) = self.session.take() else {
            return Ok(());
        };
        if session.is_closed() {
            return Err(self.error_with_keys(Error::new(ErrorKind::ConnectionLost)));
        }
        let mut mark = None;
        if self.resolves {
            let asked = session.send(sql::commit::mark(), OnAbandon::rollback());
            let (answered, answer) = asked.await;
            session = answered;
            match answer {
                Ok(reply) => mark = sql::commit::marked(&reply),
                Err(error) => match classify(&error) {
                    // Nothing was sent that could commit.
                    Failure::ConnectionLost => return Err(self.error_with_keys(Error::from(error))),
                    // It has failed already, and COMMIT will say so.
                    Failure::Aborted => session.mark_failed(),
                    // It has failed with this.
                    _ => {
                        session.mark_failed();
                        let failure = error.as_db_error().cloned().map(Box::new);
                        session.remember_failure(failure);
                    }
                },
            }
        }
        let connections = session.connections().clone();
        let message = session.commit_message();
        // It can wait for locks, and fail by a deadlock: deferred constraints are checked by it.
        let pending = session.begin_statement(Sent::Text(sql::COMMIT));
        let (session, answer) = session.send(message, OnAbandon::Finish).await;
        if let Some(pending) = pending {
            pending.end(answer.as_ref().err().map(classify));
        }
        let error = match answer {
            Ok(_) => {
                self.trace_end(&End::Commit);
                session.return_to_pool();
                self.hooks.run();
                return Ok(());
            }
            Err(error) => error,
        };
        match classify(&error) {
            // No answer, or none that can be read: the server may have committed. Invariant: never retried.
            Failure::ConnectionLost | Failure::Driver => {
                drop(session);
                let lost = match mark {
                    None => Error::new(ErrorKind::CommitUnknown),
                    Some(mark) => match look_up(&connections, &mark).await {
                        CommitOutcome::Committed => {
                            self.trace_end(&End::Commit);
                            self.hooks.run();
                            return Ok(());
                        }
                        CommitOutcome::RolledBack => Error::new(ErrorKind::ConnectionLost)
                            .with_detail("in the middle of COMMIT, and the server has rolled back"),
                        CommitOutcome::Unknown(why) => {
                            Error::new(ErrorKind::CommitUnknown).with_detail(why)
                        }
                    },
                };
                Err(self.error_with_keys(lost.with_source(error)))
            }
            // Some earlier statement failed, and its error was not passed on.
            Failure::Aborted => {
                let cause = session.failure();
                self.trace_end(&End::Rollback);
                roll_back(session).await;
                Err(self.error_with_keys(match cause {
                    Some(cause) => Error::new(classify_db(&cause).kind())
                        .with_detail(FAILED_EARLIER)
                        .with_source(*cause),
                    None => Error::new(ErrorKind::Database)
                        .with_detail(FAILED_EARLIER)
                        .with_source(error),
                }))
            }
            // An ERROR from COMMIT itself (a deferred constraint, a serialization failure): rolled back.
            failure => {
                self.trace_end(&End::Rollback);
                end_failed(session).await;
                Err(self.error_with_keys(
                    Error::new(failure.kind())
                        .with_detail("commit failed, the transaction was rolled back")
                        .with_source(error),
                ))
            }
        }
    }
}

/// Ends a transaction whose outcome is rollback already, or shall be.
pub(super) async fn roll_back(session: Session) {
    let request = session.send(sql::rollback(), OnAbandon::Finish);
    // Unanswered, the session closes its connection, which rolls back too.
    if let Some((session, Ok(_))) = request.wait_or_detach().await {
        session.return_to_pool();
    }
}

/// Ends what a failed COMMIT has left. Usually that is nothing, and then a ROLLBACK would be warned of in the server's
/// log; but an error can have struck before COMMIT was run.
async fn end_failed(session: Session) {
    match session
        .send(sql::Message::of(1, sql::PROBE), OnAbandon::Finish)
        .await
    {
        (session, Ok(_)) => session.return_to_pool(),
        (session, Err(error)) if classify(&error) == Failure::Aborted => roll_back(session).await,
        // Dropped, the session closes its connection.
        _ => {}
    }
}
