//! Runs the statements of a change: attempts with short lock waits and long pauses, up to a deadline.

use std::time::{Duration, Instant};

use tracing::Instrument as _;

use super::Env;
use super::options::ChangeOptions;
use super::preflight::Preflight;
use super::report::{ChangeAttempt, ChangeFailed, ChangeReport};
use super::statement_poll::{OnProgress, POLLS_PER_WAIT, StatementPoll};
use crate::backoff::Retry;
use crate::blocker::Blocker;
use crate::connection::{OnAbandon, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify};
use crate::meter::{SYSTEM, error_type, milliseconds};
use crate::postgres::text::Joined;
use crate::schema::sql::session_settings::{self, PreviousSettings};
use crate::transaction::sql::Begin;

/// The longest interval at which a statement outside of a transaction is polled.
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// How much longer than `deadlock_timeout` an attempt waits for an autovacuum worker: the server cancels the worker then,
/// which takes a moment.
const AUTOVACUUM_MARGIN: Duration = Duration::from_millis(500);
/// The default of `deadlock_timeout`.
const DEADLOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// With a longer `deadlock_timeout`, no attempt waits for an autovacuum worker.
const LONGEST_AUTOVACUUM_WAIT: Duration = Duration::from_secs(10);

/// How statements are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// In one transaction.
    InTransaction,
    /// One statement outside of a transaction.
    OutsideTransaction,
    /// One statement outside of a transaction that blocks neither readers nor writers while it waits, and that can
    /// leave partial work behind: it waits up to the deadline, and is not repeated here.
    Concurrently,
    /// One statement outside of a transaction, with a short wait and without repetition: after the partial work that it
    /// leaves behind, another statement has to follow.
    OutsideTransactionOnce,
}

impl Env {
    /// Runs SQL until it succeeds, fails for a reason that repetition does not fix, or reaches the deadline.
    ///
    /// Cancel safety: dropped during an attempt, its statement is cancelled on the server and rolled back, and the
    /// connection closed. Between two attempts no connection is held.
    pub(super) async fn run(
        &self,
        options: &ChangeOptions,
        sql: &str,
        method: Method,
    ) -> Result<ChangeReport, Error> {
        self.run_with_progress(options, sql, method, None).await
    }

    /// As [`run`](Self::run), and reports the progress of an index build.
    ///
    /// Cancel safety: as [`run`](Self::run).
    pub(super) async fn run_with_progress(
        &self,
        options: &ChangeOptions,
        sql: &str,
        method: Method,
        progress: Option<&OnProgress>,
    ) -> Result<ChangeReport, Error> {
        let span = tracing::debug_span!(
            "schema_step",
            "db.system.name" = SYSTEM,
            "db.operation.name" = sql.split_whitespace().next(),
            attempts = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
        );
        // Boxed, so that the compiler need not look through it in each caller's future.
        let run = Box::pin(self.repeat(options, sql, method, progress));
        let ran = run.instrument(span.clone()).await;
        match &ran {
            Ok(report) => span.record("attempts", report.attempts.len()),
            Err(error) => span.record("error.type", &*error_type(error)),
        };
        ran
    }

    async fn repeat(
        &self,
        options: &ChangeOptions,
        sql: &str,
        method: Method,
        progress: Option<&OnProgress>,
    ) -> Result<ChangeReport, Error> {
        options.check()?;
        let deadline = options.deadline();
        let started = Instant::now();
        let mut attempts = Vec::new();
        let mut retry = options.retry(deadline, u32::MAX);
        let mut autovacuum = AutovacuumWait::default();
        loop {
            let number = retry.begin();
            let began = Instant::now();
            let options = &ChangeOptions {
                lock_timeout: autovacuum.next.take().unwrap_or(options.lock_timeout),
                ..options.clone()
            };
            let wait = match method {
                Method::Concurrently => deadline.remaining().max(options.lock_timeout),
                _ => options.lock_timeout,
            };
            let (result, blockers, deadlock_timeout) = match method {
                Method::InTransaction => self.in_transaction(options, sql).await,
                Method::OutsideTransaction | Method::OutsideTransactionOnce => {
                    self.outside_transaction(options, sql, wait, None).await
                }
                Method::Concurrently => {
                    self.outside_transaction(options, sql, wait, progress).await
                }
            };
            let elapsed = began.elapsed();
            let blockers = match &result {
                Err(error) if error.kind() == ErrorKind::LockTimeout && blockers.is_empty() => {
                    self.current_blockers(sql).await
                }
                _ => blockers,
            };
            let mut attempt = ChangeAttempt {
                number,
                elapsed,
                lock_timeout: wait,
                failure: result.as_ref().err().map(Error::kind),
                sqlstate: (result.as_ref().err())
                    .and_then(|error| Some(error.sqlstate()?.code().to_owned())),
                blockers,
                pause: None,
            };
            let Err(error) = result else {
                let took_ms = milliseconds(attempt.elapsed);
                tracing::debug!(number, took_ms, "schema change done");
                options.report(&attempt);
                attempts.push(attempt);
                return Ok(ChangeReport {
                    attempts,
                    elapsed: started.elapsed(),
                });
            };
            let may_repeat = is_worth_repeating(&error)
                && !matches!(
                    method,
                    Method::Concurrently | Method::OutsideTransactionOnce
                );
            if may_repeat {
                attempt.pause = self.pause_before_retry(&retry);
            }
            if attempt.pause.is_some() {
                autovacuum.plan(options, &attempt.blockers, deadlock_timeout, &deadline);
            }
            tracing::debug!(
                number,
                took_ms = milliseconds(attempt.elapsed),
                %error,
                blockers = %Joined(&attempt.blockers, ", "),
                pause = ?attempt.pause,
                "schema change attempt failed"
            );
            options.report(&attempt);
            let (pause, blockers) = (attempt.pause, attempt.blockers.clone());
            attempts.push(attempt);
            let Some(pause) = pause else {
                let report = ChangeReport {
                    attempts,
                    elapsed: started.elapsed(),
                };
                return Err(given_up(error, blockers, report));
            };
            // Cancel safety: no connection is held between two attempts.
            tokio::time::sleep(pause).await;
        }
    }

    /// The pause before another attempt; `None` if there is none.
    pub(super) fn pause_before_retry(&self, retry: &Retry) -> Option<Duration> {
        let pause = retry.pause(self.jitter.next());
        retry.is_out_of(pause).is_none().then_some(pause)
    }

    /// The blockers after an attempt during which none could be sampled, because it was too short or no connection was
    /// free.
    async fn current_blockers(&self, sql: &str) -> Vec<Blocker> {
        match Preflight::of(self, sql.into()).await {
            Ok(preflight) => preflight.blockers().cloned().collect(),
            Err(error) => {
                tracing::debug!(%error, "nobody can look at who is in the way");
                Vec::new()
            }
        }
    }

    async fn in_transaction(
        &self,
        options: &ChangeOptions,
        sql: &str,
    ) -> (Result<(), Error>, Vec<Blocker>, Option<Duration>) {
        let begin = Begin {
            lock_timeout: Some(options.lock_timeout),
            statement_timeout: options.statement_timeout,
            ..self.begin()
        };
        let tx = match self.open(&begin).await {
            Ok(tx) => tx,
            Err(error) => return (Err(error), Vec::new(), None),
        };
        let pid = tx.backend_pid().unwrap_or_default();
        let poll = StatementPoll::new(pid, options.lock_timeout, Some(options.lock_timeout));
        let work = async {
            let _ended = scopeguard::guard((), |()| poll.end());
            let mut cancelled = false;
            let done = {
                let mut running = std::pin::pin!(tx.batch_execute(sql));
                // Cancel safety: dropped here, the transaction cancels the statement.
                tokio::select! {
                    biased;
                    done = &mut running => done,
                    () = poll.has_waited_too_long() => {
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
        let (result, ()) = tokio::join!(work, poll.run(self.connections()));
        (result, poll.blockers(), poll.deadlock_timeout())
    }

    async fn outside_transaction(
        &self,
        options: &ChangeOptions,
        sql: &str,
        wait: Duration,
        progress: Option<&OnProgress>,
    ) -> (Result<(), Error>, Vec<Blocker>, Option<Duration>) {
        let (session, previous) = match self.prepare_session(wait, options.statement_timeout).await
        {
            Ok(prepared) => prepared,
            Err(error) => return (Err(error), Vec::new(), None),
        };
        let poll = StatementPoll::new(
            previous.pid,
            wait.min(MAX_POLL_INTERVAL * POLLS_PER_WAIT),
            None,
        )
        .with_progress(progress);
        let work = async {
            let _ended = scopeguard::guard((), |()| poll.end());
            // Cancel safety: dropped, the statement is cancelled on the server, and the connection closed.
            let sent = session.send(sql.to_owned(), OnAbandon::CancelAndClose);
            let Some((session, answer)) = sent.while_executing().await else {
                return Err(Error::new(ErrorKind::ConnectionLost).with_detail(
                    "a statement was silent, and its backend is not known to be executing it",
                ));
            };
            let lost = (answer.as_ref().err())
                .is_some_and(|error| classify(error) == Failure::ConnectionLost);
            if !lost {
                let restored = session.send(previous.restore(), OnAbandon::CancelAndClose);
                if let Some((session, Ok(_))) = restored.answered().await {
                    session.return_to_pool();
                }
            }
            answer.map(drop).map_err(Error::from)
        };
        let (result, ()) = tokio::join!(work, poll.run(self.connections()));
        (result, poll.blockers(), poll.deadlock_timeout())
    }

    /// A session with this change's settings, and the settings it had before.
    ///
    /// Cancel safety: dropped before the reply, the connection is closed.
    async fn prepare_session(
        &self,
        wait: Duration,
        statement_timeout: Option<Duration>,
    ) -> Result<(Session, PreviousSettings), Error> {
        let set = |session: &Session| {
            session_settings::set(
                session.login_pid(),
                Some(wait),
                statement_timeout,
                &self.application_name,
            )
        };
        let (mut session, reply) = self.exchange(set).await?;
        let previous = session_settings::read_previous(&reply).ok_or_else(|| {
            Error::new(ErrorKind::Database)
                .with_detail("the server's answer about its settings cannot be read")
        })?;
        session.identify(previous.pid, None, Some(&self.application_name));
        if session.login_pid().is_some_and(|pid| pid != previous.pid) {
            // In this case the message has set nothing.
            return Err(Error::new(ErrorKind::TransactionPooler).with_detail(
                "what cannot run in a transaction needs a connection to the server itself",
            ));
        }
        Ok((session, previous))
    }
}

/// The wait for autovacuum workers.
#[derive(Default)]
struct AutovacuumWait {
    /// The lock timeout of the next attempt.
    next: Option<Duration>,
    /// Whether an attempt has had it.
    is_over: bool,
}

impl AutovacuumWait {
    /// Arranges one attempt that waits until the server ends an autovacuum worker, unless the caller has limited the wait.
    fn plan(
        &mut self,
        options: &ChangeOptions,
        blockers: &[Blocker],
        deadlock_timeout: Option<Duration>,
        deadline: &Deadline,
    ) {
        let is_blocked = blockers
            .iter()
            .any(|one| one.is_autovacuum() && one.prevents_wraparound() != Some(true));
        if !is_blocked || options.has_lock_timeout || self.is_over {
            return;
        }
        let wait = deadlock_timeout
            .unwrap_or(DEADLOCK_TIMEOUT)
            .saturating_add(AUTOVACUUM_MARGIN);
        if wait <= LONGEST_AUTOVACUUM_WAIT && wait < deadline.remaining() {
            tracing::debug!(
                ?wait,
                "the next attempt waits until the server ends an autovacuum worker"
            );
            (self.next, self.is_over) = (Some(wait), true);
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
    let detail = if blockers
        .iter()
        .any(|one| one.prevents_wraparound() == Some(true))
    {
        "an autovacuum worker that prevents wraparound yields to no session, so the change has to wait for its end; the \
         change was given up"
    } else if blockers.iter().any(Blocker::is_autovacuum) {
        "an autovacuum worker yields only to a wait longer than deadlock_timeout, which lock_timeout() forbids; leave that \
         out, or cancel the worker; the change was given up"
    } else {
        "the change was given up"
    };
    Error::new(error.kind())
        .with_detail(detail)
        .with_waited(report.elapsed)
        .with_attempts(attempts)
        .with_blockers(blockers)
        .with_source(ChangeFailed {
            report,
            last: error,
        })
}
