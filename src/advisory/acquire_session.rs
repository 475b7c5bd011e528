//! Taking session-level locks: a `try` that never waits, then bounded waits that cannot leak.

use tokio::runtime::Handle;

use super::acquire::{
    FINAL_TRY_AFTER_QUEUE, Waited, end, late, standby, timed_out, timed_out_unseen,
};
use super::preconditions::check_locking;
use super::wait_queue::{Heir, QueuedWaiter, Turn};
use super::{Advisory, LockRequest, SessionGuard, sql};
use crate::advisory::sql::{Locks, Names, TryLockOutcome, TryLockRow};
use crate::connection::sql::{Probe, Refusal};
use crate::connection::{AfterReply, LockScope, OnAbandon, Reply, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
use crate::meter::milliseconds;
use crate::mode::AdvisoryMode;

/// A session that holds the locks, what the server said of it, what was asked for, and the place in the line.
pub(super) struct Locked {
    pub(super) session: Session,
    pub(super) tried: TryLockRow,
    pub(super) request: Box<LockRequest>,
    waiter: Option<QueuedWaiter>,
}

impl Locked {
    fn new(
        session: Session,
        tried: TryLockRow,
        request: Box<LockRequest>,
        waiter: Option<QueuedWaiter>,
    ) -> Self {
        Self {
            session,
            tried,
            request,
            waiter,
        }
    }
}

impl Advisory {
    /// Takes session locks, waiting as long as the request says.
    ///
    /// Cancel safety: dropped at any point, what was sent is cancelled or unlocked in the background.
    pub(crate) async fn acquire_session(
        &self,
        request: Box<LockRequest>,
    ) -> Result<SessionGuard, Error> {
        let deadline = Deadline::after(request.wait);
        self.check_lock_table_capacity(request.keys(), &deadline)
            .await?;
        let waiter = if hands_over(&request) {
            let name = request.session_names().holding.unwrap_or_default();
            let heir = Heir {
                application_name: name.to_owned(),
                runtime: Handle::try_current().ok(),
            };
            let entered = self.queue.enter(&request, self.places(), Some(heir), false);
            Some(entered)
        } else {
            self.queue.enter_behind(&request, self.places())
        };
        let locked = self.acquire_session_locks(request, &deadline, true, waiter);
        self.guard(locked.await?, &deadline).await
    }

    /// Takes session locks if they are free; never waits for one.
    ///
    /// Cancel safety: as [`acquire_session`](Self::acquire_session).
    pub(crate) async fn try_acquire_session(
        &self,
        request: Box<LockRequest>,
    ) -> Result<Option<SessionGuard>, Error> {
        let deadline = Deadline::after(request.lock_wait);
        self.check_lock_table_capacity(request.keys(), &deadline)
            .await?;
        let Some((session, tried)) = self.try_session_locks(&request, &deadline, true).await?
        else {
            return Ok(None);
        };
        let locked = Locked::new(session, tried, request, None);
        self.guard(locked, &deadline).await.map(Some)
    }

    async fn guard(&self, locked: Locked, deadline: &Deadline) -> Result<SessionGuard, Error> {
        let Locked {
            session,
            tried,
            request,
            waiter,
        } = locked;
        let held = self.queue.hold(request.keys(), hands_over(&request));
        // Only now, so that the next in line finds a guard whose session it can be handed.
        drop(waiter);
        for key in request.keys() {
            tracing::debug!(%key, mode = %request.mode(), waited_ms = milliseconds(deadline.waited()), pid = tried.pid, "session lock acquired");
        }
        let renamed = request.begin.application_name.is_some();
        let name = renamed.then(|| tried.application_name.clone());
        let statement = request.locks().prepared_name(true);
        let cache = self.connections.cache();
        let unlock = cache.prepared_name(&session, statement);
        let guard = SessionGuard::new(session, *request, name, unlock, held);
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
                drop(Box::pin(guard.release()).await);
                Err(error)
            }
        }
    }

    /// The locks, on a session that goes by the request's name if it is to be `named`.
    pub(super) async fn acquire_session_locks(
        &self,
        request: Box<LockRequest>,
        deadline: &Deadline,
        named: bool,
        mut waiter: Option<QueuedWaiter>,
    ) -> Result<Locked, Error> {
        loop {
            let turn = match &mut waiter {
                Some(waiter) => self.turn(waiter, deadline).await,
                None => Turn::Try,
            };
            let (session, tried) = match turn {
                Turn::TimedOut => {
                    drop(waiter);
                    let last = self.final_session_try_afresh(request, deadline, named);
                    return Box::pin(last).await;
                }
                Turn::Session(handed) => {
                    let (mut session, tried) = handed.take();
                    request.identify(&mut session, &tried);
                    (session, tried)
                }
                Turn::Try => {
                    let tried = self.try_once(&request, deadline, named).await;
                    tried.map_err(|error| late(error, waiter.as_ref(), &request, deadline))?
                }
            };
            if tried.verdict == TryLockOutcome::Granted {
                return Ok(Locked::new(session, tried, request, waiter));
            }
            if deadline.has_passed() {
                let last = self.final_session_try(session, request, deadline, named, false);
                return Box::pin(last).await;
            }
            let queued =
                waiter.get_or_insert_with(|| self.queue.enter(&request, self.places(), None, true));
            if !queued.take_place() {
                // A busy try leaves nothing on the session.
                session.return_to_pool();
                continue;
            }
            tracing::debug!(key = %request.keys()[0], "waiting for a session lock");
            let text = |wait, after_timeout| {
                sql::wait_session(request.locks(), names(&request, named), wait, after_timeout)
            };
            let waited = self.wait(session, &request, &tried, deadline, queued, text);
            match Box::pin(waited).await? {
                Waited::Granted(session) => {
                    return Ok(Locked::new(session, tried, request, waiter));
                }
                Waited::TimedOut(session) if deadline.has_passed() => {
                    let last = self.final_session_try(session, request, deadline, named, true);
                    return Box::pin(last).await;
                }
                Waited::TimedOut(session) => drop(end(session).await),
                // What a session lock may have been granted on is closed.
                Waited::Cancelled(session) => drop(session),
                Waited::Lost => {}
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
                    Box::pin(self.examine(&session, &tried, request)).await?;
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

    async fn final_session_try_afresh(
        &self,
        request: Box<LockRequest>,
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
        request: Box<LockRequest>,
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
                request.identify(&mut session, &tried);
                Ok(Locked::new(session, tried, request, None))
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
fn hands_over(request: &LockRequest) -> bool {
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
