//! COMMIT and ROLLBACK, and what is left to be done when they fail.

use std::sync::Arc;

use tokio_postgres::error::DbError;

use super::commit_outcome::{CommitOutcome, look_up};
use super::sql::commit::Mark;
use super::tx::End;
use super::{Resolve, Tx, sql};
use crate::connection::{Connections, OnAbandon, Reply, Sent, Session};
use crate::error::{Error, ErrorKind, Failure, classify, classify_db, ends_session};
use crate::postgres::sql::Message;

/// What an error says when the transaction had failed before.
const FAILED_EARLIER: &str =
    "an earlier statement of the transaction failed, so it was rolled back";

/// What the server has answered.
pub(crate) type Carried = Result<Reply, tokio_postgres::Error>;

/// A session on which a transaction ends: the transaction's own, or one that is lent to it.
pub(crate) trait Carry: Sized + Send {
    fn session(&self) -> &Session;

    /// Sends a message; `None` where the connection is lost.
    fn carry(
        self,
        message: Message,
        undo: OnAbandon,
    ) -> impl Future<Output = Option<(Self, Carried)>> + Send;
}

/// Cancel safety: once polled, what was sent goes on in the background.
impl Carry for Session {
    fn session(&self) -> &Session {
        self
    }

    async fn carry(self, message: Message, undo: OnAbandon) -> Option<(Self, Carried)> {
        self.send(message, undo).answered().await
    }
}

/// COMMIT, behind a statement that fails where it must not be run, if there is one. Gives the session where the server
/// has answered that the transaction has ended.
///
/// `ConnectionLost` means that COMMIT was not run, or was found to be rolled back.
pub(crate) async fn commit<C: Carry>(
    mut carrier: C,
    resolve: Option<Resolve>,
    check: Option<&str>,
) -> (Option<C>, Result<(), Error>) {
    if carrier.session().is_closed() {
        let session = carrier.session();
        // Boxed, because it is rare.
        let ending = Box::pin(session.ending(session.idle())).await;
        let lost = Error::new(ErrorKind::ConnectionLost);
        let lost = match ending {
            Some(reason) => lost.with_source(reason),
            None => lost,
        };
        return (None, Err(lost));
    }
    let connections = carrier.session().connections().clone();
    let mut mark = None;
    if resolve.is_some() {
        match Box::pin(ask_mark(carrier)).await {
            Ok((asked, answer)) => {
                carrier = asked;
                mark = answer;
            }
            Err(lost) => return (None, Err(lost)),
        }
    }
    let mut message = carrier.session().commit_message();
    if let Some(check) = check {
        message = Message::from(format!("{check}; {}", message.text));
    }
    // It can wait for locks, and fail by a deadlock: deferred constraints are checked by it.
    let pending = carrier.session().begin_statement(Sent::Text(sql::COMMIT));
    let answered = carrier.carry(message, OnAbandon::Finish).await;
    if let Some(pending) = pending {
        let answer = answered.as_ref().map(|(_, answer)| answer.as_ref().err());
        pending.end(answer.map_or(Some(Failure::ConnectionLost), |error| error.map(classify)));
    }
    let Some((carrier, answer)) = answered else {
        let error = Error::new(ErrorKind::CommitUnknown).with_detail("no answer from the server");
        return (
            None,
            Box::pin(resolved(&connections, resolve, mark, error)).await,
        );
    };
    let error = match answer {
        Ok(reply) if carrier.session().has_ended_before(&reply) => {
            let ended = Error::new(ErrorKind::TransactionEnded)
                .with_detail("found at COMMIT; what it did before may be committed or not");
            return (None, Err(ended));
        }
        Ok(_) => return (Some(carrier), Ok(())),
        Err(error) => error,
    };
    match classify(&error) {
        // Said in the place of COMMIT's answer, so COMMIT was not run: once it runs, interrupts wait until it has finished
        // (PostgreSQL's `src/backend/access/transam/xact.c`, `CommitTransaction`, HOLD_INTERRUPTS).
        Failure::ConnectionLost if ends_session(&error) => (
            None,
            Err(Error::new(ErrorKind::ConnectionLost)
                .with_detail("the server ended the session before COMMIT")
                .with_source(error)),
        ),
        // No answer, or none that can be read: the server may have committed. Invariant: never retried.
        Failure::ConnectionLost | Failure::Driver => {
            // Given up before another connection is asked for: the pool may have no more than this one.
            drop(carrier);
            let unknown = Error::new(ErrorKind::CommitUnknown).with_source(error);
            (
                None,
                Box::pin(resolved(&connections, resolve, mark, unknown)).await,
            )
        }
        // Some earlier statement failed, and its error was not passed on.
        Failure::Aborted => {
            let error = swallowed(carrier.session().failure(), error);
            (Box::pin(roll_back_on(carrier)).await, Err(error))
        }
        // An ERROR from COMMIT itself (a deferred constraint, a serialization failure): rolled back.
        failure => {
            let error = Error::new(failure.kind())
                .with_detail("commit failed, the transaction was rolled back")
                .with_source(error);
            (Box::pin(end_failed(carrier)).await, Err(error))
        }
    }
}

/// Asks what the transaction is known by.
async fn ask_mark<C: Carry>(carrier: C) -> Result<(C, Option<Mark>), Error> {
    let with_system = !carrier.session().denied().pg_control_system;
    let mark = sql::commit::mark(with_system).into();
    let asked = carrier.carry(mark, OnAbandon::rollback());
    let Some((carrier, answer)) = asked.await else {
        return Err(Error::new(ErrorKind::ConnectionLost).with_detail("no answer from the server"));
    };
    let error = match answer {
        Ok(reply) => return Ok((carrier, sql::commit::marked(&reply))),
        Err(error) => error,
    };
    match classify(&error) {
        // Nothing was sent that could commit.
        Failure::ConnectionLost => return Err(Error::from(error)),
        // It has failed already, and COMMIT will say so.
        Failure::Aborted => carrier.session().mark_failed(),
        // It has failed with this.
        _ => {
            carrier.session().mark_failed();
            let failure = error.as_db_error().cloned().map(Box::new);
            carrier.session().remember_failure(failure);
        }
    }
    Ok((carrier, None))
}

/// Looks up a COMMIT whose outcome is unknown, where that is asked for and there is a mark to look for.
async fn resolved(
    connections: &Arc<Connections>,
    resolve: Option<Resolve>,
    mark: Option<Mark>,
    unknown: Error,
) -> Result<(), Error> {
    let (Some(resolve), Some(mark)) = (resolve, mark) else {
        return Err(unknown);
    };
    Err(match look_up(connections, &mark, resolve).await {
        CommitOutcome::Committed => return Ok(()),
        CommitOutcome::RolledBack => unknown
            .with_kind(ErrorKind::ConnectionLost)
            .with_detail("in the middle of COMMIT, and the server has rolled back"),
        CommitOutcome::Unknown(why) => unknown.with_detail(why),
    })
}

fn swallowed(cause: Option<Box<DbError>>, error: tokio_postgres::Error) -> Error {
    match cause {
        Some(cause) => Error::new(classify_db(&cause).kind())
            .with_detail(FAILED_EARLIER)
            .with_source(*cause),
        None => Error::new(ErrorKind::Database)
            .with_detail(FAILED_EARLIER)
            .with_source(error),
    }
}

/// Ends what a failed COMMIT has left. Usually that is nothing, and then a ROLLBACK would be warned of in the server's
/// log; but an error can have struck before COMMIT was run.
async fn end_failed<C: Carry>(carrier: C) -> Option<C> {
    let probe = Message::of(1, sql::PROBE);
    match carrier.carry(probe, OnAbandon::Finish).await? {
        (carrier, Ok(_)) => Some(carrier),
        (carrier, Err(error)) if classify(&error) == Failure::Aborted => {
            roll_back_on(carrier).await
        }
        _ => None,
    }
}

async fn roll_back_on<C: Carry>(carrier: C) -> Option<C> {
    let (carrier, answer) = carrier.carry(sql::rollback(), OnAbandon::Finish).await?;
    answer.ok().map(|_| carrier)
}

impl Tx {
    /// COMMIT, after which the connection is back in the pool, or closed.
    ///
    /// Cancel safety: once polled it goes on in the background, to whatever outcome.
    pub(crate) async fn commit(mut self) -> Result<(), Error> {
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        let (session, committed) = commit(session, self.resolve, None).await;
        if let Some(session) = session {
            session.mark_ended();
            session.return_to_pool();
        }
        self.finish(committed)
    }

    /// What follows from COMMIT.
    pub(crate) fn finish(&mut self, committed: Result<(), Error>) -> Result<(), Error> {
        match committed {
            Ok(()) => {
                self.trace_end(&End::Commit);
                self.hooks.run();
                Ok(())
            }
            Err(error) => {
                self.trace_end(&End::Rollback);
                Err(self.error_with_keys(error))
            }
        }
    }
}

/// Ends a transaction whose outcome is to be rollback.
pub(super) async fn roll_back(session: Session) {
    // Closed with its session, which rolls back too.
    if session.is_lost() {
        return;
    }
    session.forget_prepared_if_untracked();
    let request = session.send(sql::rollback(), OnAbandon::Finish);
    // Unanswered, the session closes its connection.
    if let Some((session, Ok(_))) = request.wait_or_detach().await {
        session.mark_ended();
        session.return_to_pool();
    }
}
