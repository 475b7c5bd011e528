//! Taking session-level locks: a `try` that never waits, then bounded waits that cannot leak.

use super::acquire::{
    FINAL_TRY_AFTER_QUEUE, no_answer, slice, standby, timed_out, timed_out_unseen,
};
use super::local_queue::{Entry, Handoff, HeadTicket, Woken};
use super::preconditions::check_locking;
use super::server_waiter_limit::Permit;
use super::{Advisory, LockRequest, SessionGuard, sql};
use crate::advisory::sql::{Locks, Names, TryLockOutcome, TryLockRow};
use crate::connection::sql::{Probe, Refusal};
use crate::connection::{AfterReply, LockScope, OnAbandon, Reply, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify};
use crate::mode::AdvisoryMode;

/// A session that holds the locks, what the server said of it, what was asked for, and what keeps the line in order.
pub(super) struct Locked {
    pub(super) session: Session,
    pub(super) tried: TryLockRow,
    pub(super) request: LockRequest,
    pub(super) ticket: Option<HeadTicket>,
}

impl Locked {
    fn new(session: Session, tried: TryLockRow, request: LockRequest) -> Self {
        Self {
            session,
            tried,
            request,
            ticket: None,
        }
    }

    fn with_ticket(self, ticket: HeadTicket) -> Self {
        Self {
            ticket: Some(ticket),
            ..self
        }
    }
}

impl Advisory {
    /// Takes session locks, waiting as long as the request says.
    ///
    /// Cancel safety: dropped at any point, what was sent is cancelled or unlocked in the background.
    pub(crate) async fn acquire_session(
        &self,
        request: LockRequest,
    ) -> Result<SessionGuard, Error> {
        let deadline = Deadline::after(request.wait);
        self.check_lock_table_capacity(request.keys(), &deadline)
            .await?;
        let locked = if uses_local_queue(&request) {
            self.acquire_in_queue(request, &deadline).await?
        } else {
            self.acquire_session_locks(request, &deadline, true).await?
        };
        self.guard(locked, &deadline).await
    }

    /// Takes session locks if they are free; never waits for one.
    ///
    /// Cancel safety: as [`acquire_session`](Self::acquire_session).
    pub(crate) async fn try_acquire_session(
        &self,
        request: LockRequest,
    ) -> Result<Option<SessionGuard>, Error> {
        let deadline = Deadline::after(request.lock_wait);
        self.check_lock_table_capacity(request.keys(), &deadline)
            .await?;
        let Some((session, tried)) = self.try_session_locks(&request, &deadline, true).await?
        else {
            return Ok(None);
        };
        let mut locked = Locked::new(session, tried, request);
        if uses_local_queue(&locked.request) {
            locked.ticket = Some(self.queue.ticket(&locked.request.keys()[0]));
        }
        self.guard(locked, &deadline).await.map(Some)
    }

    /// Takes a lock as one of those that line up for it in this process.
    async fn acquire_in_queue(
        &self,
        request: LockRequest,
        deadline: &Deadline,
    ) -> Result<Locked, Error> {
        let key = request.keys()[0].clone();
        let name = request.session_names().holding.unwrap_or_default();
        let mut waiting = match self.queue.enter(&key, name) {
            Entry::First(ticket) => return self.acquire_as_head(request, deadline, ticket).await,
            Entry::QueuedWaiter(waiting) => waiting,
        };
        tracing::debug!(%key, "waiting in line for a session lock");
        let next_handoff = loop {
            match waiting.next_handoff(deadline).await {
                Ok(next_handoff) => break next_handoff,
                Err(Woken::TimedOut) => {
                    drop(waiting);
                    return self.final_session_try_afresh(request, deadline, true).await;
                }
                Err(Woken::Poll) => {
                    // A short wait: the session that is about to be handed over may be the pool's only one.
                    let look = Deadline::after(FINAL_TRY_AFTER_QUEUE);
                    let tried = self.try_session_locks(&request, &look, true).await;
                    if let Ok(Some((session, tried))) = tried {
                        let ticket = self.queue.ticket(&key);
                        // Drops a session that was handed over at this moment: it is no longer needed.
                        drop(waiting);
                        return Ok(Locked::new(session, tried, request).with_ticket(ticket));
                    }
                }
                Err(Woken::Disconnected) => break Handoff::Permit(self.queue.ticket(&key)),
            }
        };
        let passed = match next_handoff {
            Handoff::Permit(ticket) => {
                return self.acquire_as_head(request, deadline, ticket).await;
            }
            Handoff::Session(passed) => passed,
        };
        let (mut session, tried, ticket) = passed.take();
        session.identify(tried.pid, request.begin.application_name.as_deref());
        if tried.granted {
            return Ok(Locked::new(session, tried, request).with_ticket(ticket));
        }
        // Somebody else stood in the server's queue: so does this one now, unless transactions of this process are
        // waiting for their turn there.
        let Some(turn) = self.waiter_limit.try_permit(request.keys()) else {
            session.return_to_pool();
            return self.acquire_as_head(request, deadline, ticket).await;
        };
        let locked = self
            .wait_for_session_locks(session, request, tried, deadline, true, Some(turn))
            .await?;
        Ok(locked.with_ticket(ticket))
    }

    /// Takes a lock as the one of its line that deals with the server.
    async fn acquire_as_head(
        &self,
        request: LockRequest,
        deadline: &Deadline,
        ticket: HeadTicket,
    ) -> Result<Locked, Error> {
        let locked = self.acquire_session_locks(request, deadline, true).await?;
        Ok(locked.with_ticket(ticket))
    }

    async fn guard(&self, locked: Locked, deadline: &Deadline) -> Result<SessionGuard, Error> {
        let Locked {
            session,
            tried,
            request,
            ticket,
        } = locked;
        for key in request.keys() {
            tracing::debug!(%key, mode = %request.mode(), waited = ?deadline.waited(), pid = tried.pid, "session lock acquired");
        }
        let renamed = request.begin.application_name.is_some();
        let name = renamed.then(|| tried.application_name.clone());
        let statement = request.locks().prepared_name(true);
        let cache = self.connections.cache();
        let unlock = cache.prepared_name(&session, statement);
        let guard = SessionGuard::new(session, request, name, unlock, ticket);
        let server = self.server(guard.session(), &tried);
        let checked = check_locking(
            guard.session(),
            LockScope::Session,
            server.as_ref(),
            guard.locks(),
        );
        match checked.await {
            Ok(()) => Ok(guard),
            Err(error) => {
                // Nothing is held when the caller sees the error.
                drop(guard.release().await);
                Err(error)
            }
        }
    }

    /// The locks, on a session that goes by the request's name if it is to be `named`.
    pub(super) async fn acquire_session_locks(
        &self,
        request: LockRequest,
        deadline: &Deadline,
        named: bool,
    ) -> Result<Locked, Error> {
        let mut turn = None;
        if self.waiter_limit.is_contended(request.keys()) {
            turn = self.waiter_limit.permit(request.keys(), deadline).await;
            if turn.is_none() {
                return self
                    .final_session_try_afresh(request, deadline, named)
                    .await;
            }
        }
        loop {
            let (session, tried) = self.try_once(&request, deadline, named).await?;
            if tried.verdict == TryLockOutcome::Granted {
                return Ok(Locked::new(session, tried, request));
            }
            if turn.is_none() {
                turn = self.waiter_limit.try_permit(request.keys());
            }
            if turn.is_some() || deadline.has_passed() {
                return self
                    .wait_for_session_locks(session, request, tried, deadline, named, turn)
                    .await;
            }
            // A busy try leaves nothing on the session.
            session.return_to_pool();
            turn = self.waiter_limit.permit(request.keys(), deadline).await;
            if turn.is_none() {
                return self
                    .final_session_try_afresh(request, deadline, named)
                    .await;
            }
        }
    }

    pub(super) async fn try_session_locks(
        &self,
        request: &LockRequest,
        deadline: &Deadline,
        named: bool,
    ) -> Result<Option<(Session, TryLockRow)>, Error> {
        let (session, tried) = self.try_once(request, deadline, named).await?;
        if tried.verdict == TryLockOutcome::Granted {
            return Ok(Some((session, tried)));
        }
        session.return_to_pool();
        tracing::debug!(key = %request.keys()[0], "session lock busy");
        Ok(None)
    }

    /// One `try`: granted or busy, or an error.
    async fn try_once(
        &self,
        request: &LockRequest,
        deadline: &Deadline,
        named: bool,
    ) -> Result<(Session, TryLockRow), Error> {
        loop {
            let (session, tried) = self.try_on_some_session(request, deadline, named).await?;
            match tried.verdict {
                TryLockOutcome::Granted | TryLockOutcome::Busy => return Ok((session, tried)),
                TryLockOutcome::Pooled => {
                    self.examine(&session, &tried, request).await?;
                    session.return_to_pool();
                }
                _ => {
                    session.return_to_pool();
                    return Err(standby(request));
                }
            }
        }
    }

    async fn try_on_some_session(
        &self,
        request: &LockRequest,
        deadline: &Deadline,
        named: bool,
    ) -> Result<(Session, TryLockRow), Error> {
        let names = names(request, named);
        // The text depends on the connection's own pid, so it is made for each.
        let text = |session: &Session| {
            let probe = match self.probe(session, request.locks().prepared_name(true)) {
                Probe::Full(_) => Probe::Full(self.refused_poolers(session)),
                // What is prepared sets the holder's name.
                Probe::Prepare(_) | Probe::Execute(_) if names.holding.is_none() => Probe::Minimal,
                probe => probe,
            };
            let sql = sql::try_session(request.locks(), names, &probe);
            (probe, sql)
        };
        let tried = self.try_on_clean_connection(request, deadline, text, || undo_try(request));
        let (session, probe, tried) = tried.await.map_err(|error| match error.kind() {
            // Nor would it be granted with a connection.
            ErrorKind::Pool => self.refused_by_pooler(&request.keys()[0]).unwrap_or(error),
            _ => error,
        })?;
        self.learn(
            &session,
            &probe,
            &tried,
            request.locks().prepared_name(true),
        );
        Ok((session, tried))
    }

    /// What a `try` on this connection is to refuse.
    fn refused_poolers(&self, session: &Session) -> Refusal {
        session
            .login_pid()
            .map_or(Refusal::None, |login_pid| Refusal::Pooled {
                login_pid,
                but_before: self.connections.capabilities().session_servers(),
            })
    }

    /// Whether the pooler may be gone through that a `try` was refused behind.
    async fn examine(
        &self,
        session: &Session,
        tried: &TryLockRow,
        request: &LockRequest,
    ) -> Result<(), Error> {
        let key = &request.keys()[0];
        match &tried.server {
            Some(server) => self.check_pooler(session, &server.identity, key).await,
            None => Err(request
                .error(ErrorKind::Database)
                .with_detail("no answer to a lock request")),
        }
    }

    /// Waits at the server, a slice at a time.
    async fn wait_for_session_locks(
        &self,
        mut session: Session,
        request: LockRequest,
        tried: TryLockRow,
        deadline: &Deadline,
        named: bool,
        turn: Option<Permit>,
    ) -> Result<Locked, Error> {
        let slice = slice(&request, self.server(&session, &tried).as_ref());
        let mut after_timeout = false;
        tracing::debug!(key = %request.keys()[0], "waiting for a session lock");
        while !deadline.has_passed() {
            let wait = deadline.remaining().min(slice);
            let sql =
                sql::wait_session(request.locks(), names(&request, named), wait, after_timeout);
            let sent = session.send(sql, OnAbandon::CancelAndClose);
            let Some((answered, answer)) =
                sent.within(wait.saturating_add(self.answer_time())).await
            else {
                return Err(no_answer(&request, deadline));
            };
            session = answered;
            let Err(error) = answer else {
                drop(turn);
                return Ok(Locked::new(session, tried, request));
            };
            match classify(&error) {
                // Both are raised before the grant of a transaction lock, which the next message rolls back.
                Failure::LockTimeout | Failure::Deadlock => after_timeout = true,
                // Anything else may have struck after the session lock was granted: the connection is closed.
                failure => {
                    return Err(request
                        .error(failure.kind())
                        .with_waited(deadline.waited())
                        .with_source(error));
                }
            }
        }
        self.final_session_try(session, request, deadline, named, after_timeout)
            .await
    }

    async fn final_session_try_afresh(
        &self,
        request: LockRequest,
        deadline: &Deadline,
        named: bool,
    ) -> Result<Locked, Error> {
        match self
            .connections
            .check_out(&Deadline::after(FINAL_TRY_AFTER_QUEUE))
            .await
        {
            Ok(session) => {
                self.final_session_try(session, request, deadline, named, false)
                    .await
            }
            Err(_) => Err(self
                .refused_by_pooler(&request.keys()[0])
                .unwrap_or_else(|| timed_out_unseen(&request, deadline))),
        }
    }

    /// A last `try`, and who is in the way.
    async fn final_session_try(
        &self,
        session: Session,
        request: LockRequest,
        deadline: &Deadline,
        named: bool,
        after_timeout: bool,
    ) -> Result<Locked, Error> {
        // A wait was let through a pooler only if it keeps sessions; a first look may not have been examined.
        let refusal = if after_timeout {
            Refusal::None
        } else {
            self.refused_poolers(&session)
        };
        let denied = session.denied();
        let sql = sql::try_session_and_find_blockers(
            request.locks(),
            names(&request, named),
            &Probe::Full(refusal),
            after_timeout,
            denied,
        );
        let (mut session, reply) = self
            .send(session, sql, undo_try(&request), deadline, &request)
            .await?;
        match sql::tried(&reply) {
            Some(tried) if tried.verdict == TryLockOutcome::Granted => {
                session.identify(tried.pid, request.begin.application_name.as_deref());
                Ok(Locked::new(session, tried, request))
            }
            // Not examined in this call: what matters is not who is in the way, but that nothing can be had through it.
            Some(tried) if tried.verdict == TryLockOutcome::Pooled => {
                self.examine(&session, &tried, &request).await?;
                let again = self.final_session_try(session, request, deadline, named, false);
                Box::pin(again).await
            }
            found => {
                // Whatever else it is, its connection is closed.
                if found.is_some_and(|tried| tried.verdict == TryLockOutcome::Busy) {
                    session.return_to_pool();
                }
                let error = timed_out(&request, deadline, &reply, denied);
                tracing::debug!(%error, "session lock timed out");
                Err(error)
            }
        }
    }
}

/// Whether others may want the same: one key, exclusively, by a name of one's own.
fn uses_local_queue(request: &LockRequest) -> bool {
    request.keys().len() == 1
        && request.mode() == AdvisoryMode::Exclusive
        && request.begin.application_name.is_some()
}

fn names(request: &LockRequest, named: bool) -> Names<'_> {
    let names = request.session_names();
    if named {
        names
    } else {
        Names {
            holding: None,
            ..names
        }
    }
}

/// What to do about a `try` whose answer nobody waited for: return what it got, and the session's own name.
fn undo_try(request: &LockRequest) -> OnAbandon {
    let keys = request.keys().to_vec();
    let mode = request.mode();
    let renamed = request.begin.application_name.is_some();
    OnAbandon::Then(Box::new(move |reply: &Reply| {
        let Some(tried) = sql::tried(reply) else {
            return AfterReply::Close;
        };
        if tried.verdict == TryLockOutcome::Dirty {
            return AfterReply::Close;
        }
        if !tried.granted {
            return AfterReply::ReturnToPool;
        }
        let name = renamed.then_some(tried.application_name.as_str());
        AfterReply::Send(sql::unlock(Locks { keys: &keys, mode }, name))
    }))
}
