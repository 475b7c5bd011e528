//! Taking session-level locks: a `try` that never waits, then bounded waits that cannot leak.

use super::acquire::{ANSWER, LINE_LOOK, no_answer, slice, standby, timed_out};
use super::environment::check_locking;
use super::gate::Turn;
use super::line::{Entered, Handed, Interrupted, Stake};
use super::sql;
use super::{Advisory, Request, SessionGuard};
use crate::advisory::sql::{Locks, Names, Tried, Verdict};
use crate::connection::sql::Ask;
use crate::connection::{Reply, Scope, Session, Then, Undo};
use crate::deadline::Deadline;
use crate::error::{Error, Failure, classify};
use crate::mode::AdvisoryMode;

/// A session that holds the locks, what the server said of it, what was asked for, and what keeps the line in order.
pub(super) struct Locked {
    pub(super) session: Session,
    pub(super) tried: Tried,
    pub(super) request: Request,
    pub(super) stake: Option<Stake>,
}

impl Locked {
    fn new(session: Session, tried: Tried, request: Request) -> Self {
        Self {
            session,
            tried,
            request,
            stake: None,
        }
    }

    fn staked(self, stake: Stake) -> Self {
        Self {
            stake: Some(stake),
            ..self
        }
    }
}

impl Advisory {
    /// Takes session locks, waiting as long as the request says.
    ///
    /// Cancel safety: dropped at any point, what was sent is cancelled or unlocked in the background.
    pub(crate) async fn acquire_session(&self, request: Request) -> Result<SessionGuard, Error> {
        let deadline = Deadline::after(request.wait);
        self.check_room(request.keys(), &deadline).await?;
        let locked = if is_for_the_line(&request) {
            self.acquire_in_line(request, &deadline).await?
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
        request: Request,
    ) -> Result<Option<SessionGuard>, Error> {
        let deadline = Deadline::after(request.lock_wait);
        self.check_room(request.keys(), &deadline).await?;
        let Some((session, tried)) = self.try_session_locks(&request, &deadline, true).await?
        else {
            return Ok(None);
        };
        let mut locked = Locked::new(session, tried, request);
        if is_for_the_line(&locked.request) {
            locked.stake = Some(self.line.stake(&locked.request.keys()[0]));
        }
        self.guard(locked, &deadline).await.map(Some)
    }

    /// Takes a lock as one of those that line up for it in this process.
    async fn acquire_in_line(
        &self,
        request: Request,
        deadline: &Deadline,
    ) -> Result<Locked, Error> {
        let key = request.keys()[0].clone();
        let name = request.session_names().holding.unwrap_or_default();
        let mut waiting = match self.line.enter(&key, name) {
            Entered::First(stake) => return self.acquire_as_first(request, deadline, stake).await,
            Entered::Waiting(waiting) => waiting,
        };
        tracing::debug!(%key, "waiting in line for a session lock");
        let handed = loop {
            match waiting.handed(deadline).await {
                Ok(handed) => break handed,
                Err(Interrupted::Late) => {
                    drop(waiting);
                    return self
                        .look_at_session_locks_afresh(request, deadline, true)
                        .await;
                }
                Err(Interrupted::Look) => {
                    // Not for long: the session that is to be handed over may be the pool's only one.
                    let look = Deadline::after(LINE_LOOK);
                    let tried = self.try_session_locks(&request, &look, true).await;
                    if let Ok(Some((session, tried))) = tried {
                        let stake = self.line.stake(&key);
                        // With what may have been handed over in this very moment, and is not needed any more.
                        drop(waiting);
                        return Ok(Locked::new(session, tried, request).staked(stake));
                    }
                }
                Err(Interrupted::Lost) => break Handed::Turn(self.line.stake(&key)),
            }
        };
        let passed = match handed {
            Handed::Turn(stake) => return self.acquire_as_first(request, deadline, stake).await,
            Handed::Session(passed) => passed,
        };
        let (mut session, tried, stake) = passed.take();
        session.identify(tried.pid, request.begin.application_name.as_deref());
        if tried.granted {
            return Ok(Locked::new(session, tried, request).staked(stake));
        }
        // Somebody else stood in the server's queue: so does this one now, unless transactions of this process are
        // waiting for their turn there.
        let Some(turn) = self.gate.try_turn(request.keys()) else {
            session.give_back();
            return self.acquire_as_first(request, deadline, stake).await;
        };
        let locked = self
            .wait_for_session_locks(session, request, tried, deadline, true, Some(turn))
            .await?;
        Ok(locked.staked(stake))
    }

    /// Takes a lock as the one of its line that deals with the server.
    async fn acquire_as_first(
        &self,
        request: Request,
        deadline: &Deadline,
        stake: Stake,
    ) -> Result<Locked, Error> {
        let locked = self.acquire_session_locks(request, deadline, true).await?;
        Ok(locked.staked(stake))
    }

    async fn guard(&self, locked: Locked, deadline: &Deadline) -> Result<SessionGuard, Error> {
        let Locked {
            session,
            tried,
            request,
            stake,
        } = locked;
        for key in request.keys() {
            tracing::debug!(%key, mode = %request.mode(), waited = ?deadline.waited(), pid = tried.pid, "session lock acquired");
        }
        let renamed = request.begin.application_name.is_some();
        let name = renamed.then(|| tried.application_name.clone());
        let unlock = match self.ask(&session, request.locks().preparable(true)) {
            Ask::Execute(statement) => Some(statement),
            _ => None,
        };
        let guard = SessionGuard::new(session, request, name, unlock, stake);
        let server = self.server(guard.session(), &tried);
        check_locking(
            guard.session(),
            Scope::Session,
            server.as_ref(),
            guard.locks(),
        )
        .await?;
        Ok(guard)
    }

    /// The locks, on a session that goes by the request's name if it is to be `named`.
    pub(super) async fn acquire_session_locks(
        &self,
        request: Request,
        deadline: &Deadline,
        named: bool,
    ) -> Result<Locked, Error> {
        let mut turn = None;
        if self.gate.is_crowded(request.keys()) {
            turn = self.gate.turn(request.keys(), deadline).await;
            if turn.is_none() {
                return self
                    .look_at_session_locks_afresh(request, deadline, named)
                    .await;
            }
        }
        loop {
            let (session, tried) = self.try_once(&request, deadline, named).await?;
            if tried.verdict == Verdict::Granted {
                return Ok(Locked::new(session, tried, request));
            }
            if turn.is_none() {
                turn = self.gate.try_turn(request.keys());
            }
            if turn.is_some() || deadline.has_passed() {
                return self
                    .wait_for_session_locks(session, request, tried, deadline, named, turn)
                    .await;
            }
            // A busy try leaves nothing on the session.
            session.give_back();
            turn = self.gate.turn(request.keys(), deadline).await;
            if turn.is_none() {
                return self
                    .look_at_session_locks_afresh(request, deadline, named)
                    .await;
            }
        }
    }

    pub(super) async fn try_session_locks(
        &self,
        request: &Request,
        deadline: &Deadline,
        named: bool,
    ) -> Result<Option<(Session, Tried)>, Error> {
        let (session, tried) = self.try_once(request, deadline, named).await?;
        if tried.verdict == Verdict::Granted {
            return Ok(Some((session, tried)));
        }
        session.give_back();
        tracing::debug!(key = %request.keys()[0], "session lock busy");
        Ok(None)
    }

    /// One `try`: granted or busy, or an error.
    async fn try_once(
        &self,
        request: &Request,
        deadline: &Deadline,
        named: bool,
    ) -> Result<(Session, Tried), Error> {
        let mut through_pooler = false;
        loop {
            let (session, tried) = self
                .try_on_some_session(request, deadline, named, through_pooler)
                .await?;
            match tried.verdict {
                Verdict::Granted | Verdict::Busy => return Ok((session, tried)),
                Verdict::Pooled => {
                    self.check_pooler(&session, &request.keys()[0]).await?;
                    through_pooler = true;
                    session.give_back();
                }
                _ => {
                    session.give_back();
                    return Err(standby(request));
                }
            }
        }
    }

    async fn try_on_some_session(
        &self,
        request: &Request,
        deadline: &Deadline,
        named: bool,
        through_pooler: bool,
    ) -> Result<(Session, Tried), Error> {
        let names = names(request, named);
        // The text depends on the connection's own pid, so it is made for each.
        let text = |session: &Session| {
            let ask = match self.ask(session, request.locks().preparable(true)) {
                Ask::All { .. } if !through_pooler => Ask::All {
                    login_pid: session.login_pid(),
                },
                // What is prepared sets the holder's name.
                Ask::Prepare(_) | Ask::Execute(_) if names.holding.is_none() => Ask::Little,
                ask => ask,
            };
            let sql = sql::try_session(request.locks(), names, &ask);
            (ask, sql)
        };
        let (session, ask, tried) = self
            .on_a_clean_connection(request, deadline, text, || undo_try(request))
            .await?;
        self.learn(&session, &ask, &tried, request.locks().preparable(true));
        Ok((session, tried))
    }

    /// Waits at the server, a slice at a time.
    async fn wait_for_session_locks(
        &self,
        mut session: Session,
        request: Request,
        tried: Tried,
        deadline: &Deadline,
        named: bool,
        turn: Option<Turn>,
    ) -> Result<Locked, Error> {
        let slice = slice(&request, self.server(&session, &tried).as_ref());
        let mut after_timeout = false;
        tracing::debug!(key = %request.keys()[0], "waiting for a session lock");
        while !deadline.has_passed() {
            let wait = deadline.remaining().min(slice);
            let sql =
                sql::wait_session(request.locks(), names(&request, named), wait, after_timeout);
            let exchange = session.exchange(sql, Undo::Cancel);
            let Some((answered, answer)) = exchange.within(wait.saturating_add(ANSWER)).await
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
        self.look_at_session_locks(session, request, deadline, named, after_timeout)
            .await
    }

    async fn look_at_session_locks_afresh(
        &self,
        request: Request,
        deadline: &Deadline,
        named: bool,
    ) -> Result<Locked, Error> {
        match self
            .connections
            .check_out(&Deadline::after(LINE_LOOK))
            .await
        {
            Ok(session) => {
                self.look_at_session_locks(session, request, deadline, named, false)
                    .await
            }
            Err(_) => Err(timed_out(&request, deadline)),
        }
    }

    /// A last `try`, and who is in the way.
    async fn look_at_session_locks(
        &self,
        session: Session,
        request: Request,
        deadline: &Deadline,
        named: bool,
        after_timeout: bool,
    ) -> Result<Locked, Error> {
        // A wait was let through a pooler only if it keeps sessions; a first look may not have been examined.
        let keeps_sessions = self.connections.findings().keeps_sessions() == Some(true);
        let login_pid = if after_timeout || keeps_sessions {
            None
        } else {
            session.login_pid()
        };
        let sql = sql::look_session(
            request.locks(),
            names(&request, named),
            &Ask::All { login_pid },
            after_timeout,
        );
        let (mut session, reply) = self
            .send(session, sql, undo_try(&request), deadline, &request)
            .await?;
        match sql::tried(&reply) {
            Some(tried) if tried.verdict == Verdict::Granted => {
                session.identify(tried.pid, request.begin.application_name.as_deref());
                Ok(Locked::new(session, tried, request))
            }
            found => {
                // Whatever else it is, its connection is closed.
                if found
                    .is_some_and(|tried| matches!(tried.verdict, Verdict::Busy | Verdict::Pooled))
                {
                    session.give_back();
                }
                let blockers = sql::blockers::blockers(&reply, request.mode());
                let error = timed_out(&request, deadline).with_blockers(blockers);
                tracing::debug!(%error, "session lock timed out");
                Err(error)
            }
        }
    }
}

/// Whether others may want the same: one key, exclusively, by a name of one's own.
fn is_for_the_line(request: &Request) -> bool {
    request.keys().len() == 1
        && request.mode() == AdvisoryMode::Exclusive
        && request.begin.application_name.is_some()
}

fn names(request: &Request, named: bool) -> Names<'_> {
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
fn undo_try(request: &Request) -> Undo {
    let keys = request.keys().to_vec();
    let mode = request.mode();
    let renamed = request.begin.application_name.is_some();
    Undo::After(Box::new(move |reply: &Reply| {
        let Some(tried) = sql::tried(reply) else {
            return Then::Close;
        };
        if tried.verdict == Verdict::Dirty {
            return Then::Close;
        }
        let mut sql = sql::unlock_if_held(Locks { keys: &keys, mode });
        if renamed {
            sql.push_str("; ");
            sql.push_str(&sql::set_application_name(&tried.application_name));
        }
        Then::Send(sql)
    }))
}
