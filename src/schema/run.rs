//! Attempts at a change: short waits, long pauses, an end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::preflight::Preflight;
use super::report::{ChangeAttempt, ChangeFailed, ChangeReport};
use super::watch::{OnProgress, Watch};
use crate::advisory::Advisory;
use crate::backoff::Jitter;
use crate::blocker::Blocker;
use crate::call_site::CallSite;
use crate::connection::{Connections, OnAbandon, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify};
use crate::schema::sql::run;
use crate::transaction;
use crate::transaction::sql::Begin;

/// How often it is looked at a statement that may take long.
const LOOK: Duration = Duration::from_millis(200);

/// What all changes of one keeper share.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) advisory: Arc<Advisory>,
    pub(crate) application_name: String,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) lock_wait: Duration,
    pub(crate) jitter: Arc<Jitter>,
}

/// Where a text is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// In one transaction.
    Transaction,
    /// Alone, outside.
    Outside,
    /// The same, by a statement whose wait keeps neither readers nor writers waiting, and which can leave something half
    /// done: it waits up to the deadline, and is not repeated here.
    Concurrently,
    /// Alone, outside, with a short wait, and not repeated: what it leaves half done makes it another statement.
    Once,
}

impl Context {
    pub(super) fn connections(&self) -> &Arc<Connections> {
        &self.advisory.connections
    }

    /// Asks something of one message on a connection like those that changes run on, whose `search_path` they have.
    ///
    /// Cancel safety: unanswered, its connection is closed.
    pub(super) async fn ask(&self, sql: &str) -> Result<crate::connection::Reply, Error> {
        let deadline = Deadline::after(self.lock_wait);
        let mut stale = 0;
        loop {
            let session = self.connections().check_out(&deadline).await?;
            let (session, answer) = session
                .send(sql.to_owned(), OnAbandon::CancelAndClose)
                .await;
            match answer {
                Ok(reply) => {
                    session.return_to_pool();
                    return Ok(reply);
                }
                Err(error)
                    if classify(&error) == Failure::ConnectionLost
                        && stale < self.connections().most() =>
                {
                    stale += 1;
                }
                // Dropped, the session closes its connection.
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Runs a text until it succeeds, fails for a reason that waiting does not mend, or the time is over.
    ///
    /// Cancel safety: dropped in an attempt, its statement is cancelled on the server and rolled back, and the
    /// connection closed; between two nothing is held.
    pub(super) async fn run(
        &self,
        pace: &Pace,
        sql: &str,
        how: How,
    ) -> Result<ChangeReport, Error> {
        self.run_with(pace, sql, how, None).await
    }

    /// The same, and tells how far an index build is.
    ///
    /// Cancel safety: as [`run`](Self::run).
    pub(super) async fn run_with(
        &self,
        pace: &Pace,
        sql: &str,
        how: How,
        progress: Option<&OnProgress>,
    ) -> Result<ChangeReport, Error> {
        pace.check()?;
        let deadline = pace.deadline();
        let started = Instant::now();
        let mut attempts = Vec::new();
        let mut number = 1;
        loop {
            let began = Instant::now();
            let (result, blockers) = match how {
                How::Transaction => self.in_transaction(pace, sql).await,
                How::Outside | How::Once => self.outside(pace, sql, pace.lock_timeout, None).await,
                How::Concurrently => {
                    let wait = deadline.remaining().max(pace.lock_timeout);
                    self.outside(pace, sql, wait, progress).await
                }
            };
            let took = began.elapsed();
            let blockers = match &result {
                Err(error) if error.kind() == ErrorKind::LockTimeout && blockers.is_empty() => {
                    self.still_there(sql).await
                }
                _ => blockers,
            };
            let mut attempt = ChangeAttempt {
                number,
                took,
                failure: result.as_ref().err().map(Error::kind),
                sqlstate: (result.as_ref().err())
                    .and_then(|error| Some(error.sqlstate()?.code().to_owned())),
                blockers,
                pause: None,
            };
            let Err(error) = result else {
                tracing::debug!(number, took = ?attempt.took, "schema change done");
                pace.tell(&attempt);
                attempts.push(attempt);
                return Ok(ChangeReport {
                    attempts,
                    took: started.elapsed(),
                });
            };
            let pause = pace.pause(number, self.jitter.next());
            // Never with more time than the others had: after the last attempt there is none.
            let again = !matches!(how, How::Concurrently | How::Once)
                && is_worth_repeating(&error)
                && deadline.remaining() > pause;
            attempt.pause = again.then_some(pause);
            tracing::debug!(
                number,
                took = ?attempt.took,
                %error,
                blockers = %Listed(&attempt.blockers),
                pause = ?attempt.pause,
                "schema change attempt failed"
            );
            pace.tell(&attempt);
            let blockers = attempt.blockers.clone();
            attempts.push(attempt);
            if !again {
                let report = ChangeReport {
                    attempts,
                    took: started.elapsed(),
                };
                return Err(given_up(error, blockers, report));
            }
            // Cancel safety: nothing is held between two attempts.
            tokio::time::sleep(pause).await;
            number += 1;
        }
    }

    /// Who is in the way after an attempt during which nobody could be seen: it was too short, or nobody could look.
    async fn still_there(&self, sql: &str) -> Vec<Blocker> {
        match Preflight::of(self, sql.into()).await {
            Ok(preflight) => preflight.blockers().cloned().collect(),
            Err(error) => {
                tracing::debug!(%error, "nobody can look at who is in the way");
                Vec::new()
            }
        }
    }

    async fn in_transaction(&self, pace: &Pace, sql: &str) -> (Result<(), Error>, Vec<Blocker>) {
        let begin = Begin {
            application_name: Some(self.application_name.clone()),
            lock_timeout: Some(pace.lock_timeout),
            statement_timeout: pace.statement_timeout,
            ..Begin::default()
        };
        let wait = Deadline::after(self.lock_wait);
        let opening = transaction::open(
            self.connections(),
            &wait,
            &begin,
            self.call_site,
            self.lock_wait,
        );
        let tx = match opening.await {
            Ok(tx) => tx,
            Err(error) => return (Err(error), Vec::new()),
        };
        let pid = tx.backend_pid().unwrap_or_default();
        let watch = Watch::new(pid, pace.lock_timeout, Some(pace.lock_timeout));
        let work = async {
            let _ended = scopeguard::guard((), |()| watch.end());
            let mut cancelled = false;
            let done = {
                let mut running = std::pin::pin!(tx.batch_execute(sql));
                // Cancel safety: dropped here, the transaction cancels the statement.
                tokio::select! {
                    biased;
                    done = &mut running => done,
                    () = watch.enough.notified() => {
                        cancelled = true;
                        tx.session().cancel_in_background();
                        running.await
                    }
                }
            };
            let result = match done {
                Ok(()) => tx.commit().await,
                Err(error) => {
                    tx.rollback().await;
                    Err(Error::from(error))
                }
            };
            match result {
                Err(error) if cancelled && error.kind() == ErrorKind::Cancelled => {
                    Err(Error::new(ErrorKind::LockTimeout)
                        .with_detail("it waited for one lock after another")
                        .with_source(error))
                }
                result => result,
            }
        };
        let (result, ()) = tokio::join!(work, watch.look(self.connections()));
        (result, watch.found())
    }

    async fn outside(
        &self,
        pace: &Pace,
        sql: &str,
        wait: Duration,
        progress: Option<&OnProgress>,
    ) -> (Result<(), Error>, Vec<Blocker>) {
        let (session, before) = match self.set_up(wait, pace.statement_timeout).await {
            Ok(ready) => ready,
            Err(error) => return (Err(error), Vec::new()),
        };
        let watch = Watch::new(before.pid, wait.min(LOOK * 4), None).telling(progress);
        let work = async {
            let _ended = scopeguard::guard((), |()| watch.end());
            // Cancel safety: dropped, the statement is cancelled on the server, and the connection closed.
            let (session, answer) = session
                .send(sql.to_owned(), OnAbandon::CancelAndClose)
                .await;
            let lost = (answer.as_ref().err())
                .is_some_and(|error| classify(error) == Failure::ConnectionLost);
            if !lost
                && let (session, Ok(_)) = session
                    .send(before.restore(), OnAbandon::CancelAndClose)
                    .await
            {
                session.return_to_pool();
            }
            answer.map(drop).map_err(Error::from)
        };
        let (result, ()) = tokio::join!(work, watch.look(self.connections()));
        (result, watch.found())
    }

    /// A session with settings of ours.
    async fn set_up(
        &self,
        wait: Duration,
        statement_timeout: Option<Duration>,
    ) -> Result<(Session, run::Before), Error> {
        let deadline = Deadline::after(self.lock_wait);
        let mut stale = 0;
        loop {
            let session = self.connections().check_out(&deadline).await?;
            let text = run::set(
                session.login_pid(),
                Some(wait),
                statement_timeout,
                &self.application_name,
            );
            // Cancel safety: unanswered, its connection is closed.
            let (mut session, answer) = session.send(text, OnAbandon::CancelAndClose).await;
            let error = match answer {
                Ok(reply) => {
                    let before = run::before(&reply).ok_or_else(|| {
                        Error::new(ErrorKind::Database)
                            .with_detail("the server's answer about its settings cannot be read")
                    })?;
                    session.identify(before.pid, Some(&self.application_name));
                    if session.login_pid().is_some_and(|pid| pid != before.pid) {
                        // And nothing was set.
                        return Err(Error::new(ErrorKind::TransactionPooler).with_detail(
                            "what cannot run in a transaction needs a connection to the server itself",
                        ));
                    }
                    return Ok((session, before));
                }
                Err(error) => error,
            };
            stale += 1;
            if classify(&error) != Failure::ConnectionLost || stale > self.connections().most() {
                return Err(error.into());
            }
        }
    }
}

fn is_worth_repeating(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::LockTimeout | ErrorKind::Deadlock | ErrorKind::Serialization
    )
}

fn given_up(error: Error, blockers: Vec<Blocker>, report: ChangeReport) -> Error {
    if !is_worth_repeating(&error) {
        return error;
    }
    let attempts = u32::try_from(report.attempts.len()).unwrap_or(u32::MAX);
    Error::new(error.kind())
        .with_detail("the change was given up")
        .with_waited(report.took)
        .with_attempts(attempts)
        .with_blockers(blockers)
        .with_source(ChangeFailed {
            report,
            last: error,
        })
}

/// Blockers with commas between.
struct Listed<'a>(&'a [Blocker]);

impl std::fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, blocker) in self.0.iter().enumerate() {
            write!(f, "{}{blocker}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
