//! Taking transaction-level locks: `BEGIN`, the settings and a `try` in one message; if busy, bounded waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::build_watch::Withdrawn;
use super::preconditions::check_locking;
use super::wait_queue::{QueuedWaiter, TURN, Turn, places};
use super::{Advisory, LockRequest, sql};
use crate::advisory::sql::{TryLockOutcome, TryLockRow};
use crate::connection::sql::server::{self, Denied, Server};
use crate::connection::sql::{PreparedName, Probe};
use crate::connection::{Checkout, LockScope, OnAbandon, Reply, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, READ_LOCKS, classify, is_not_supported};
use crate::meter::milliseconds;
use crate::mode::AdvisoryMode;
use crate::postgres::sql::{Message, is_true, rows};
use crate::transaction::{Reporting, Tx};

/// How much later than its deadline an answer may come before the connection counts as lost. The server ends a wait by
/// its own clock; this is for its reply to arrive.
const ANSWER: Duration = Duration::from_secs(2);
/// For a last look after a deadline that passed in the line of this process, where others look for a connection at the
/// same time.
pub(super) const FINAL_TRY_AFTER_QUEUE: Duration = Duration::from_millis(30);
/// For a try after the deadline, where a connection has to be found first.
const FINAL_TRY: Duration = Duration::from_millis(30);
/// The longest single wait at the server, where nobody watches it and `deadlock_timeout` does not require a shorter one.
const LONGEST_SLICE: Duration = Duration::from_millis(500);
const SHORTEST_SLICE: Duration = Duration::from_millis(5);

/// How long to wait at the server at a time where nobody [watches](super::build_watch) for index builds that wait for the
/// waiter.
///
/// A wait shorter than `deadlock_timeout` is over before the server looks for deadlocks, so the build goes on in the
/// pause. Between two slices others go before. For a conflict group's lock the wait is a single one: who is to run alone
/// would never come to it where the others run for longer than a slice, and none of them builds an index.
fn slice(request: &LockRequest, server: Option<&Server>) -> Duration {
    if request.is_group {
        return Duration::MAX;
    }
    server.map_or(LONGEST_SLICE, |server| {
        (server.deadlock_timeout / 2).clamp(SHORTEST_SLICE, LONGEST_SLICE)
    })
}

impl Advisory {
    /// Takes the locks in a new transaction, waiting as long as the request says.
    ///
    /// Cancel safety: dropped at any point, what was sent is cancelled or rolled back in the background, and what was
    /// not sent never is.
    pub(crate) async fn acquire(&self, request: Box<LockRequest>) -> Result<Tx, Error> {
        let deadline = Deadline::after(request.wait);
        self.check_lock_table_capacity(request.keys(), &deadline)
            .await?;
        let mut waiter = self.queue.enter_behind(&request, self.places());
        loop {
            if let Some(waiter) = &mut waiter
                && let Turn::TimedOut = self.turn(waiter, &deadline).await
            {
                return Box::pin(self.final_try_afresh(request, &deadline)).await;
            }
            let begun = self.begin_and_try(&request, &deadline).await;
            let (session, tried) =
                begun.map_err(|error| late(error, waiter.as_ref(), &request, &deadline))?;
            match tried.verdict {
                TryLockOutcome::Granted => {
                    return self.granted(session, request, &tried, &deadline).await;
                }
                TryLockOutcome::Busy => {}
                TryLockOutcome::Snapshot => {
                    end_granted(session, &request, &deadline).await?;
                    if let Some(waiter) = &mut waiter {
                        waiter.try_again();
                    }
                    let acquired = self.acquire_before_snapshot(request, &deadline, waiter);
                    return Box::pin(acquired).await;
                }
                _ => {
                    end(session).await;
                    return Err(standby(&request));
                }
            }
            if deadline.has_passed() {
                return Box::pin(self.final_try(session, request, &deadline, true)).await;
            }
            let waiter =
                waiter.get_or_insert_with(|| self.queue.enter(&request, self.places(), None, true));
            if !waiter.take_place() {
                // Without the connection.
                end(session).await;
                continue;
            }
            tracing::debug!(key = %request.keys()[0], "waiting for an advisory lock");
            let text = |wait, after_timeout| match after_timeout {
                true => sql::begin_again_and_wait(&request.begin, request.locks(), wait),
                false => sql::wait_in_transaction(request.locks(), wait),
            };
            let waited = self.wait(session, &request, &tried, &deadline, waiter, text);
            match Box::pin(waited).await? {
                Waited::Granted(session) => {
                    return self.granted(session, request, &tried, &deadline).await;
                }
                Waited::TimedOut(session) if deadline.has_passed() => {
                    return Box::pin(self.final_try(session, request, &deadline, true)).await;
                }
                Waited::TimedOut(session) | Waited::Cancelled(session) => drop(end(session).await),
                Waited::Lost => {}
            }
        }
    }

    /// How many requests may wait at the server at a time.
    pub(super) fn places(&self) -> usize {
        places(self.connections.most())
    }

    /// Takes the locks in a new transaction if they are free; never waits for one.
    ///
    /// Cancel safety: as [`acquire`](Self::acquire).
    pub(crate) async fn try_acquire(&self, request: Box<LockRequest>) -> Result<Option<Tx>, Error> {
        let deadline = Deadline::after(request.lock_wait);
        self.check_lock_table_capacity(request.keys(), &deadline)
            .await?;
        let (session, tried) = self.begin_and_try(&request, &deadline).await?;
        match tried.verdict {
            TryLockOutcome::Granted => self
                .granted(session, request, &tried, &deadline)
                .await
                .map(Some),
            TryLockOutcome::Busy => {
                end(session).await;
                tracing::debug!(key = %request.keys()[0], "advisory lock busy");
                Ok(None)
            }
            TryLockOutcome::Snapshot => {
                end_granted(session, &request, &deadline).await?;
                Box::pin(self.try_before_snapshot(request, &deadline)).await
            }
            _ => {
                end(session).await;
                Err(standby(&request))
            }
        }
    }

    /// One `try`, on a connection that is alive and clean.
    async fn begin_and_try(
        &self,
        request: &LockRequest,
        deadline: &Deadline,
    ) -> Result<(Session, TryLockRow), Error> {
        let text = |session: &Session| {
            let probe = match self.probe(session, request.locks().prepared_name(false)) {
                // What is prepared sets the name.
                Probe::Prepare(_) | Probe::Execute(_)
                    if request.begin.application_name.is_none() =>
                {
                    Probe::Minimal
                }
                probe => probe,
            };
            let sql = sql::begin_and_try(&request.begin, request.locks(), &probe);
            (probe, sql)
        };
        let (session, probe, mut tried) = self
            .try_on_clean_connection(request, deadline, text, OnAbandon::rollback)
            .await?;
        self.learn(
            &session,
            &probe,
            &tried,
            request.locks().prepared_name(false),
        );
        forgive_snapshot(request, &session, &mut tried);
        Ok((session, tried))
    }

    /// Sends a `try` on one connection after another until one of them is neither dead nor left in a transaction.
    pub(super) async fn try_on_clean_connection(
        &self,
        request: &LockRequest,
        deadline: &Deadline,
        text: impl Fn(&Session) -> (Probe, Message),
        undo: impl Fn() -> OnAbandon,
    ) -> Result<(Session, Probe, TryLockRow), Error> {
        // A try is made even when the wait is over, so a connection is waited for a little in any case.
        let wait = Deadline::after(deadline.remaining().max(FINAL_TRY));
        let mut checkout = Checkout::within(&self.connections, &wait, self.answer_bound(deadline));
        loop {
            let next = checkout.next().await;
            let (session, patience) = next.map_err(|error| error.with_key(&request.keys()[0]))?;
            let (probe, message) = text(&session);
            let sent = self.send_within(session, message, undo(), patience, deadline, request);
            match sent.await {
                Ok((mut session, reply)) => match sql::tried(&reply) {
                    // Its transaction is somebody else's: closing the connection is all that can be done for it.
                    Some(TryLockRow {
                        verdict: TryLockOutcome::Dirty,
                        pid,
                        ..
                    }) => {
                        tracing::warn!(
                            pid,
                            "the pool gave a connection with an open transaction, closing it"
                        );
                        checkout.replace(request.error(ErrorKind::Pool).with_detail(
                            "the pool gave connections with transactions left open on them; they were closed",
                        ))?;
                    }
                    Some(tried) => {
                        request.identify(&mut session, &tried);
                        return Ok((session, probe, tried));
                    }
                    None => {
                        return Err(request
                            .error(ErrorKind::Database)
                            .with_detail("no answer to a lock request"));
                    }
                },
                // Nothing was done yet that could be done twice: a connection that died in the pool is not an error.
                Err(error) if is_lost_at_once(&error) => checkout.replace(error)?,
                Err(error) if error.kind() == ErrorKind::ConnectionLost => {
                    checkout.replace_silent(error)?;
                }
                // So is one that was left in a transaction, which refuses BEGIN once it has failed or done something, and
                // one on which somebody deallocates prepared statements, or prepares some of our names.
                Err(error) if is_of_the_connection(&error) => {
                    if let Some(failure) = error.failure() {
                        self.connections.cache().learn_failure(failure);
                    }
                    checkout.replace(error)?;
                }
                // A standby refuses to begin a SERIALIZABLE transaction.
                Err(error) if is_not_supported(&error) => {
                    // Under that default it refuses the question as well.
                    let asked = Box::pin(self.connections.ask(server::IN_RECOVERY));
                    let standby_said = match asked.await {
                        Ok(reply) => server::in_recovery(&reply),
                        Err(refusal) => is_not_supported(&refusal),
                    };
                    return Err(if standby_said {
                        standby(request).with_source(error)
                    } else {
                        error
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// How long to wait for an answer that waits for no lock.
    pub(super) fn answer_bound(&self, deadline: &Deadline) -> Duration {
        let most = deadline.remaining().saturating_add(ANSWER);
        most.min(self.connections.longest_silence())
    }

    pub(super) fn probe(&self, session: &Session, statement: Option<PreparedName>) -> Probe {
        self.connections.cache().probe(session, statement)
    }

    /// Remembers what a `try` has brought to light.
    pub(super) fn learn(
        &self,
        session: &Session,
        probe: &Probe,
        tried: &TryLockRow,
        statement: Option<PreparedName>,
    ) {
        let cache = self.connections.cache();
        cache.learn_reply(session, probe, statement, tried.pid, tried.server.as_ref());
    }

    /// The server that has answered, by its own word or by what is remembered of the connection.
    pub(super) fn server(&self, session: &Session, tried: &TryLockRow) -> Option<Server> {
        let remembered = || self.connections.cache().server(session);
        tried.server.clone().or_else(remembered)
    }

    /// One message and its reply; any error closes the connection, by dropping its session.
    pub(super) async fn send(
        &self,
        session: Session,
        message: impl Into<Message>,
        undo: OnAbandon,
        deadline: &Deadline,
        request: &LockRequest,
    ) -> Result<(Session, Reply), Error> {
        let most = self.answer_bound(deadline);
        self.send_within(session, message, undo, most, deadline, request)
            .await
    }

    async fn send_within(
        &self,
        session: Session,
        message: impl Into<Message>,
        undo: OnAbandon,
        most: Duration,
        deadline: &Deadline,
        request: &LockRequest,
    ) -> Result<(Session, Reply), Error> {
        match session.send(message, undo).within(most).await {
            Some((session, Ok(reply))) => Ok((session, reply)),
            Some((_, Err(error))) => Err(request.error(classify(&error).kind()).with_source(error)),
            None => Err(no_answer(request, deadline)),
        }
    }

    /// Waits at the server, by what `text` makes of the wait and of whether the message before it has timed out: until the
    /// locks are granted, the deadline has passed, or the waiter is to wait in the line of this process. Where it can be
    /// watched the wait is a single one.
    pub(super) async fn wait(
        &self,
        mut session: Session,
        request: &LockRequest,
        tried: &TryLockRow,
        deadline: &Deadline,
        waiter: &mut QueuedWaiter,
        text: impl Fn(Duration, bool) -> String + Send,
    ) -> Result<Waited, Error> {
        let server = self.server(&session, tried);
        let began = Instant::now();
        // How much later than its end a wait's answer may come.
        let grace = ANSWER.min(self.connections.longest_silence());
        let mut after_timeout = false;
        loop {
            if after_timeout {
                // It waits in another transaction than the last one.
                session.set_xact_start(None);
            }
            let watched = self.watch.begin(&session, server.as_ref());
            let is_watched = watched.is_some();
            let longest = match is_watched {
                true => Duration::MAX,
                false => slice(request, server.as_ref()),
            };
            let wait = deadline.remaining().min(longest);
            let end = Deadline::after(wait.saturating_add(grace));
            let mut sent = session.send(text(wait, after_timeout), OnAbandon::CancelAndClose);
            let answered = sent.while_waiting(&end, || {
                if let Some(watched) = &watched {
                    let is_long = began.elapsed() >= TURN;
                    watched.look_up(!request.is_group && waiter.is_to_yield(is_long));
                }
            });
            let Some((answered, answer)) = answered.await else {
                sent.lose();
                return Err(no_answer(request, deadline));
            };
            session = answered;
            let withdrawn = match watched {
                Some(watched) => watched.end(grace).await,
                None => None,
            };
            if withdrawn == Some(Withdrawn::Unsure) {
                waiter.try_again();
                return Ok(Waited::Lost);
            }
            let error = match answer {
                Ok(reply) => {
                    session.set_xact_start(server::xact_start(&reply));
                    return Ok(Waited::Granted(session));
                }
                Err(error) => error,
            };
            match (classify(&error), withdrawn) {
                (Failure::Cancelled, Some(Withdrawn::ForBuild(builder))) => {
                    let aside = waiter.step_aside();
                    self.watch.rejoin_after(builder, aside);
                    return Ok(Waited::Cancelled(session));
                }
                (Failure::Cancelled, Some(_)) => {
                    if !waiter.yield_place() {
                        waiter.try_again();
                    }
                    return Ok(Waited::Cancelled(session));
                }
                // Raised before the grant of a transaction lock, which the next message rolls back. In a transaction that
                // waits for a single lock a deadlock is with somebody who waits for its end: a pause resolves it.
                (Failure::LockTimeout, _) => after_timeout = true,
                (Failure::Deadlock, _) if !is_watched || request.keys().len() == 1 => {
                    after_timeout = true;
                }
                // Anything else may have struck after a session lock was granted: the connection is closed.
                (failure, _) => {
                    return Err(request
                        .error(failure.kind())
                        .with_waited(deadline.waited())
                        .with_source(error));
                }
            }
            if deadline.has_passed() || !is_watched && waiter.yield_place() {
                return Ok(Waited::TimedOut(session));
            }
        }
    }

    /// The last look of a wait whose deadline has passed while it stood in line in this process.
    async fn final_try_afresh(
        &self,
        request: Box<LockRequest>,
        deadline: &Deadline,
    ) -> Result<Tx, Error> {
        match self
            .connections
            .check_out(&Deadline::after(FINAL_TRY_AFTER_QUEUE))
            .await
        {
            Ok(session) => self.final_try(session, request, deadline, false).await,
            Err(_) => Err(timed_out_unseen(&request, deadline)),
        }
    }

    /// A last `try`, and who is in the way.
    async fn final_try(
        &self,
        session: Session,
        request: Box<LockRequest>,
        deadline: &Deadline,
        in_transaction: bool,
    ) -> Result<Tx, Error> {
        let denied = session.denied();
        let sql =
            sql::begin_and_find_blockers(&request.begin, request.locks(), in_transaction, denied);
        let (mut session, reply) = self
            .send(session, sql, OnAbandon::rollback(), deadline, &request)
            .await?;
        let mut tried = sql::tried(&reply);
        if let Some(tried) = &mut tried {
            forgive_snapshot(&request, &session, tried);
        }
        match tried {
            Some(tried) if tried.verdict == TryLockOutcome::Granted => {
                request.identify(&mut session, &tried);
                self.granted(session, request, &tried, deadline).await
            }
            Some(tried) if tried.verdict == TryLockOutcome::Snapshot => {
                end_granted(session, &request, deadline).await?;
                let error = timed_out(&request, deadline, &reply, denied);
                self.try_before_snapshot(request, deadline)
                    .await?
                    .ok_or(error)
            }
            Some(tried) if tried.verdict == TryLockOutcome::Standby => {
                end(session).await;
                Err(standby(&request))
            }
            _ => {
                end(session).await;
                let error = timed_out(&request, deadline, &reply, denied);
                tracing::debug!(%error, "advisory lock timed out");
                Err(error)
            }
        }
    }

    /// What is true of all locks just granted.
    async fn granted(
        &self,
        session: Session,
        request: Box<LockRequest>,
        tried: &TryLockRow,
        deadline: &Deadline,
    ) -> Result<Tx, Error> {
        for key in request.keys() {
            tracing::debug!(%key, mode = %request.mode(), waited_ms = milliseconds(deadline.waited()), pid = tried.pid, "advisory lock acquired");
        }
        let mut tx = Tx::new(
            session,
            request.call_site,
            request.lock_wait,
            request.begin.longest_wait(),
        );
        if let Some(reporter) = &self.runner.reporter {
            let reporter = Arc::clone(reporter);
            tx.report_to(Reporting {
                reporter,
                attempt: 1,
                attempts: 1,
            });
        }
        if let (true, Some(observed)) = (request.is_group, tx.session().observed()) {
            observed.is_in_group(&request.keys()[0]);
        }
        let held = self.queue.hold(request.keys(), false);
        tx.session().keep_until_clean(Box::new(held));
        let server = self.server(tx.session(), tried);
        check_locking(
            tx.session(),
            LockScope::Transaction,
            server.as_ref(),
            request.locks(),
        )
        .await?;
        Ok(tx.holding(request.into_held(0)))
    }

    /// Takes the locks for a transaction that reads from one snapshot: as session locks first, which are moved into the
    /// transaction when it begins. Its snapshot is so taken after the locks were granted, and shows all that their last
    /// holder committed.
    async fn acquire_before_snapshot(
        &self,
        request: Box<LockRequest>,
        deadline: &Deadline,
        waiter: Option<QueuedWaiter>,
    ) -> Result<Tx, Error> {
        let locked = self.acquire_session_locks(request, deadline, false, waiter);
        let locked = locked.await?;
        self.begin_over_session_locks(locked.session, locked.request, &locked.tried, deadline)
            .await
    }

    async fn try_before_snapshot(
        &self,
        request: Box<LockRequest>,
        deadline: &Deadline,
    ) -> Result<Option<Tx>, Error> {
        match self.try_session_locks(&request, deadline, false).await? {
            None => Ok(None),
            Some((session, tried)) => self
                .begin_over_session_locks(session, request, &tried, deadline)
                .await
                .map(Some),
        }
    }

    async fn begin_over_session_locks(
        &self,
        session: Session,
        request: Box<LockRequest>,
        tried: &TryLockRow,
        deadline: &Deadline,
    ) -> Result<Tx, Error> {
        let sql = sql::begin_over_session_locks(&request.begin, request.locks());
        // Until the session locks are returned, nothing but closing the connection is sure to return them.
        let (mut session, reply) = self
            .send(session, sql, OnAbandon::CancelAndClose, deadline, &request)
            .await?;
        if !rows(&reply).any(|row| is_true(row, "unlocked")) {
            return Err(request.error(ErrorKind::LockLost));
        }
        let name = request.begin.application_name.as_ref();
        session.identify(tried.pid, server::xact_start(&reply), name);
        self.granted(session, request, tried, deadline).await
    }
}

/// What came of a wait at the server.
pub(super) enum Waited {
    Granted(Session),
    /// The transaction of the session has failed before a lock was granted.
    TimedOut(Session),
    /// The transaction of the session has failed, perhaps after a session lock was granted.
    Cancelled(Session),
    /// Its connection is closed.
    Lost,
}

/// Lets a conflict group's lock count under a snapshot that is older.
///
/// What is read under a shared one need not be younger. An exclusive one is taken before the snapshot where that can be
/// done: not through a pooler, where it still keeps the others out.
fn forgive_snapshot(request: &LockRequest, session: &Session, tried: &mut TryLockRow) {
    if !request.is_group || tried.verdict != TryLockOutcome::Snapshot {
        return;
    }
    let pooled = session.login_pid() != Some(tried.pid);
    if tried.granted && (pooled || request.mode() == AdvisoryMode::Shared) {
        tried.verdict = TryLockOutcome::Granted;
    } else if pooled {
        tried.verdict = TryLockOutcome::Busy;
    }
}

fn is_of_the_connection(error: &Error) -> bool {
    error.failure().is_some_and(Failure::is_of_the_connection)
}

/// Whether the connection was dead, rather than its server silent.
fn is_lost_at_once(error: &Error) -> bool {
    error.kind() == ErrorKind::ConnectionLost && std::error::Error::source(error).is_some()
}

/// Ends a transaction that has done nothing, and gives its connection back. Whether the server has said that it ended.
pub(super) async fn end(session: Session) -> bool {
    let request = session.send(sql::rollback(), OnAbandon::Finish);
    let ended = request.answered().await;
    if let Some((session, Ok(_))) = ended {
        session.return_to_pool();
        return true;
    }
    false
}

/// The same where the transaction may have been granted locks: while it may have them, they are not asked for again.
async fn end_granted(
    session: Session,
    request: &LockRequest,
    deadline: &Deadline,
) -> Result<(), Error> {
    match end(session).await {
        true => Ok(()),
        false => Err(no_answer(request, deadline)),
    }
}

pub(super) fn standby(request: &LockRequest) -> Error {
    request.error(ErrorKind::ReadOnlyServer).with_detail(
        "connect to the primary, for instance with target_session_attrs=read-write; nothing was locked",
    )
}

/// The end of a wait, with the blockers that the reply to the last look shows, or with why it shows none.
pub(super) fn timed_out(
    request: &LockRequest,
    deadline: &Deadline,
    reply: &Reply,
    denied: Denied,
) -> Error {
    let error = timed_out_unseen(request, deadline);
    if denied.pg_locks {
        return error.with_detail(format!(
            "who holds it is not known, for want of {READ_LOCKS}"
        ));
    }
    error.with_blockers(sql::blockers::blockers(reply, request.mode()))
}

/// The same where there was no last look.
pub(super) fn timed_out_unseen(request: &LockRequest, deadline: &Deadline) -> Error {
    request
        .error(ErrorKind::LockTimeout)
        .with_waited(deadline.waited())
}

/// What the error of a `try` means for a waiter: one that has found the lock busy, or others in line for it, has timed out
/// where it finds no connection in the end.
pub(super) fn late(
    error: Error,
    waiter: Option<&QueuedWaiter>,
    request: &LockRequest,
    deadline: &Deadline,
) -> Error {
    let has_waited = waiter.is_some_and(|waiter| waiter.has_waited);
    if has_waited && error.kind() == ErrorKind::Pool && deadline.has_passed() {
        timed_out_unseen(request, deadline).with_source(error)
    } else {
        error
    }
}

pub(super) fn no_answer(request: &LockRequest, deadline: &Deadline) -> Error {
    request
        .error(ErrorKind::ConnectionLost)
        .with_detail("no answer from the server")
        .with_waited(deadline.waited())
}
