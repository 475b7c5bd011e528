//! Taking transaction-level locks: `BEGIN`, the settings and a `try` in one message; if busy, bounded waits.

use std::time::Duration;

use super::environment::check_locking;
use super::gate::Turn;
use super::sql;
use super::{Advisory, Request};
use crate::advisory::sql::{Tried, Verdict};
use crate::connection::sql::Ask;
use crate::connection::sql::Preparable;
use crate::connection::sql::server;
use crate::connection::sql::server::Server;
use crate::connection::{Reply, Scope, Session, Undo};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify, is_not_supported};
use crate::mode::AdvisoryMode;
use crate::postgres::sql::Message;
use crate::postgres::sql::{is_true, rows};
use crate::transaction::Tx;

/// How much later than its deadline an answer may come before the connection counts as lost. The server ends a wait by
/// its own clock; this is for its reply to arrive.
pub(super) const ANSWER: Duration = Duration::from_secs(2);
/// For a last look after a deadline that passed in the line of this process, where others look for a connection at the
/// same time.
pub(super) const LINE_LOOK: Duration = Duration::from_millis(30);
/// For a try after the deadline, where a connection has to be found first.
const LAST_LOOK: Duration = Duration::from_millis(30);
/// The longest single wait at the server, where `deadlock_timeout` does not ask for shorter ones.
const LONGEST_SLICE: Duration = Duration::from_millis(500);
const SHORTEST_SLICE: Duration = Duration::from_millis(5);

/// How long to wait at the server at a time.
///
/// A waiting statement holds a snapshot, and `CREATE INDEX CONCURRENTLY` waits for all older snapshots: a waiter for a
/// lock that the index builder holds would be in a deadlock with it. A wait shorter than `deadlock_timeout` is over
/// before the server looks for deadlocks, so the build goes on in the pause (test
/// `index_build_under_a_session_lock_finishes`). It also bounds how long a waiter whose process was killed stays in the
/// queue.
///
/// Between two slices others go before. For a conflict group's lock the wait is a single one: who is to run alone would
/// never come to it where the others run for longer than a slice, and none of them builds an index.
pub(super) fn slice(request: &Request, server: Option<&Server>) -> Duration {
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
    pub(crate) async fn acquire(&self, request: Request) -> Result<Tx, Error> {
        let deadline = Deadline::after(request.wait);
        self.check_room(request.keys(), &deadline).await?;
        let mut turn = None;
        if self.gate.is_crowded(request.keys()) {
            turn = self.gate.turn(request.keys(), &deadline).await;
            if turn.is_none() {
                return self.look_afresh(request, &deadline).await;
            }
        }
        loop {
            let (session, tried) = self.begin_and_try(&request, &deadline).await?;
            match tried.verdict {
                Verdict::Granted => return self.granted(session, request, &tried, &deadline).await,
                Verdict::Busy => {}
                Verdict::Snapshot => {
                    end(session).await;
                    drop(turn);
                    return self.acquire_before_snapshot(request, &deadline).await;
                }
                _ => {
                    end(session).await;
                    return Err(standby(&request));
                }
            }
            if turn.is_none() {
                turn = self.gate.try_turn(request.keys());
            }
            if turn.is_some() || deadline.has_passed() {
                return self.wait(session, request, &tried, &deadline, turn).await;
            }
            // Others of this process wait at the server already: wait here, without the connection.
            end(session).await;
            turn = self.gate.turn(request.keys(), &deadline).await;
            if turn.is_none() {
                return self.look_afresh(request, &deadline).await;
            }
        }
    }

    /// Takes the locks in a new transaction if they are free; never waits for one.
    ///
    /// Cancel safety: as [`acquire`](Self::acquire).
    pub(crate) async fn try_acquire(&self, request: Request) -> Result<Option<Tx>, Error> {
        let deadline = Deadline::after(request.lock_wait);
        self.check_room(request.keys(), &deadline).await?;
        let (session, tried) = self.begin_and_try(&request, &deadline).await?;
        match tried.verdict {
            Verdict::Granted => self
                .granted(session, request, &tried, &deadline)
                .await
                .map(Some),
            Verdict::Busy => {
                end(session).await;
                tracing::debug!(key = %request.keys()[0], "advisory lock busy");
                Ok(None)
            }
            Verdict::Snapshot => {
                end(session).await;
                self.try_before_snapshot(request, &deadline).await
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
        request: &Request,
        deadline: &Deadline,
    ) -> Result<(Session, Tried), Error> {
        let text = |session: &Session| {
            let ask = match self.ask(session, request.locks().preparable(false)) {
                // What is prepared sets the name.
                Ask::Prepare(_) | Ask::Execute(_) if request.begin.application_name.is_none() => {
                    Ask::Little
                }
                ask => ask,
            };
            let sql = sql::begin_and_try(&request.begin, request.locks(), &ask);
            (ask, sql)
        };
        let (session, ask, mut tried) = self
            .on_a_clean_connection(request, deadline, text, Undo::rollback)
            .await?;
        self.learn(&session, &ask, &tried, request.locks().preparable(false));
        forgive_snapshot(request, &session, &mut tried);
        Ok((session, tried))
    }

    /// Sends a `try` on one connection after another until one of them is neither dead nor left in a transaction.
    pub(super) async fn on_a_clean_connection(
        &self,
        request: &Request,
        deadline: &Deadline,
        text: impl Fn(&Session) -> (Ask, Message),
        undo: impl Fn() -> Undo,
    ) -> Result<(Session, Ask, Tried), Error> {
        let most = self.connections.most() + 1;
        let mut stale = 0;
        loop {
            // A try is made even when the wait is over, so a connection is waited for a little in any case.
            let patience = Deadline::after(deadline.remaining().max(LAST_LOOK));
            let session = self
                .connections
                .check_out(&patience)
                .await
                .map_err(|error| error.with_key(&request.keys()[0]))?;
            let (ask, message) = text(&session);
            match self.send(session, message, undo(), deadline, request).await {
                Ok((mut session, reply)) => match sql::tried(&reply) {
                    // Its transaction is somebody else's: closing the connection is all that can be done for it.
                    Some(Tried {
                        verdict: Verdict::Dirty,
                        pid,
                        ..
                    }) => {
                        if stale >= most {
                            return Err(request.error(ErrorKind::Pool).with_detail(
                                "the pool gave connections with transactions left open on them; they were closed",
                            ));
                        }
                        tracing::warn!(
                            pid,
                            "the pool gave a connection with an open transaction, closing it"
                        );
                    }
                    Some(tried) => {
                        session.identify(tried.pid, request.begin.application_name.as_deref());
                        return Ok((session, ask, tried));
                    }
                    None => {
                        return Err(request
                            .error(ErrorKind::Database)
                            .with_detail("no answer to a lock request"));
                    }
                },
                // Nothing was done yet that could be done twice: a connection that died in the pool is not an error.
                Err(error) if is_lost_at_once(&error) && stale < most => {}
                // So is one that was left in a transaction, which refuses BEGIN once it has failed or done something, and
                // one on which somebody deallocates prepared statements, or prepares some of our names.
                Err(error) if stale < most && is_of_the_connection(&error) => {
                    if let Some(failure) = error.failure() {
                        self.connections.known().failed(failure);
                    }
                }
                // A standby refuses to begin a SERIALIZABLE transaction.
                Err(error) if is_not_supported(&error) => {
                    // Under that default it refuses the question as well.
                    let standby_said = match self.connections.ask(server::IN_RECOVERY).await {
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
            tracing::debug!("a pool connection could not be used, taking another");
            stale += 1;
        }
    }

    pub(super) fn ask(&self, session: &Session, statement: Option<Preparable>) -> Ask {
        self.connections.known().ask(session, statement)
    }

    /// Remembers what a `try` has brought to light.
    pub(super) fn learn(
        &self,
        session: &Session,
        ask: &Ask,
        tried: &Tried,
        statement: Option<Preparable>,
    ) {
        let lasting = !matches!(tried.verdict, Verdict::Standby | Verdict::Dirty);
        let server = tried.server.as_ref().filter(|_| lasting);
        let known = self.connections.known();
        known.answered(session, ask, statement, tried.pid, server);
    }

    /// The server that has answered, by its own word or by what is remembered of the connection.
    pub(super) fn server(&self, session: &Session, tried: &Tried) -> Option<Server> {
        let remembered = || self.connections.known().server(session);
        tried.server.clone().or_else(remembered)
    }

    /// One message and its reply; any error closes the connection, by dropping its session.
    pub(super) async fn send(
        &self,
        session: Session,
        message: impl Into<Message>,
        undo: Undo,
        deadline: &Deadline,
        request: &Request,
    ) -> Result<(Session, Reply), Error> {
        let most = deadline.remaining().saturating_add(ANSWER);
        match session.exchange(message, undo).within(most).await {
            Some((session, Ok(reply))) => Ok((session, reply)),
            Some((_, Err(error))) => Err(request.error(classify(&error).kind()).with_source(error)),
            None => Err(no_answer(request, deadline)),
        }
    }

    /// Waits at the server, a slice at a time, in the transaction that the `try` has begun.
    async fn wait(
        &self,
        mut session: Session,
        request: Request,
        tried: &Tried,
        deadline: &Deadline,
        turn: Option<Turn>,
    ) -> Result<Tx, Error> {
        let slice = slice(&request, self.server(&session, tried).as_ref());
        let mut after_timeout = false;
        tracing::debug!(key = %request.keys()[0], "waiting for an advisory lock");
        while !deadline.has_passed() {
            let wait = deadline.remaining().min(slice);
            let sql = if after_timeout {
                sql::begin_again_and_wait(&request.begin, request.locks(), wait)
            } else {
                sql::wait_in_transaction(request.locks(), wait)
            };
            let exchange = session.exchange(sql, Undo::Cancel);
            let Some((answered, answer)) = exchange.within(wait.saturating_add(ANSWER)).await
            else {
                return Err(no_answer(&request, deadline));
            };
            session = answered;
            let Err(error) = answer else {
                drop(turn);
                return self.granted(session, request, tried, deadline).await;
            };
            match classify(&error) {
                // A deadlock here is between waiters and somebody who waits for them: the pause resolves it.
                Failure::LockTimeout | Failure::Deadlock => after_timeout = true,
                failure => {
                    return Err(request
                        .error(failure.kind())
                        .with_waited(deadline.waited())
                        .with_source(error));
                }
            }
        }
        self.look(session, request, deadline, true).await
    }

    /// The last look of a wait whose deadline has passed while it stood in line in this process.
    async fn look_afresh(&self, request: Request, deadline: &Deadline) -> Result<Tx, Error> {
        match self
            .connections
            .check_out(&Deadline::after(LINE_LOOK))
            .await
        {
            Ok(session) => self.look(session, request, deadline, false).await,
            Err(_) => Err(timed_out(&request, deadline)),
        }
    }

    /// A last `try`, and who is in the way.
    async fn look(
        &self,
        session: Session,
        request: Request,
        deadline: &Deadline,
        in_transaction: bool,
    ) -> Result<Tx, Error> {
        let sql = sql::begin_and_look(&request.begin, request.locks(), in_transaction);
        let (mut session, reply) = self
            .send(session, sql, Undo::rollback(), deadline, &request)
            .await?;
        let mut tried = sql::tried(&reply);
        if let Some(tried) = &mut tried {
            forgive_snapshot(&request, &session, tried);
        }
        match tried {
            Some(tried) if tried.verdict == Verdict::Granted => {
                session.identify(tried.pid, request.begin.application_name.as_deref());
                self.granted(session, request, &tried, deadline).await
            }
            Some(tried) if tried.verdict == Verdict::Snapshot => {
                end(session).await;
                let blockers = sql::blockers::blockers(&reply, request.mode());
                let error = timed_out(&request, deadline).with_blockers(blockers);
                self.try_before_snapshot(request, deadline)
                    .await?
                    .ok_or(error)
            }
            Some(tried) if tried.verdict == Verdict::Standby => {
                end(session).await;
                Err(standby(&request))
            }
            _ => {
                end(session).await;
                let blockers = sql::blockers::blockers(&reply, request.mode());
                let error = timed_out(&request, deadline).with_blockers(blockers);
                tracing::debug!(%error, "advisory lock timed out");
                Err(error)
            }
        }
    }

    /// What is true of all locks just granted.
    async fn granted(
        &self,
        session: Session,
        request: Request,
        tried: &Tried,
        deadline: &Deadline,
    ) -> Result<Tx, Error> {
        for key in request.keys() {
            tracing::debug!(%key, mode = %request.mode(), waited = ?deadline.waited(), pid = tried.pid, "advisory lock acquired");
        }
        let tx = Tx::new(
            session,
            request.call_site,
            request.lock_wait,
            request.begin.lock_timeout,
        );
        if let (true, Some(observed)) = (request.is_group, tx.session().observed()) {
            observed.is_in_group(&request.keys()[0]);
        }
        let server = self.server(tx.session(), tried);
        check_locking(
            tx.session(),
            Scope::Transaction,
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
        request: Request,
        deadline: &Deadline,
    ) -> Result<Tx, Error> {
        let locked = self.acquire_session_locks(request, deadline, false).await?;
        self.begin_over_session_locks(locked.session, locked.request, &locked.tried, deadline)
            .await
    }

    async fn try_before_snapshot(
        &self,
        request: Request,
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
        request: Request,
        tried: &Tried,
        deadline: &Deadline,
    ) -> Result<Tx, Error> {
        let sql = sql::begin_over_session_locks(&request.begin, request.locks());
        // Until the session locks are returned, nothing but closing the connection is sure to return them.
        let (mut session, reply) = self
            .send(session, sql, Undo::Cancel, deadline, &request)
            .await?;
        if !rows(&reply).any(|row| is_true(row, "unlocked")) {
            return Err(request.error(ErrorKind::LockLost));
        }
        session.identify(tried.pid, request.begin.application_name.as_deref());
        self.granted(session, request, tried, deadline).await
    }
}

/// Lets a conflict group's lock count under a snapshot that is older.
///
/// What is read under a shared one need not be younger. An exclusive one is taken before the snapshot where that can be
/// done: not through a pooler, where it still keeps the others out.
fn forgive_snapshot(request: &Request, session: &Session, tried: &mut Tried) {
    if !request.is_group || tried.verdict != Verdict::Snapshot {
        return;
    }
    let pooled = session.login_pid() != Some(tried.pid);
    if tried.granted && (pooled || request.mode() == AdvisoryMode::Shared) {
        tried.verdict = Verdict::Granted;
    } else if pooled {
        tried.verdict = Verdict::Busy;
    }
}

fn is_of_the_connection(error: &Error) -> bool {
    error.failure().is_some_and(Failure::is_of_the_connection)
}

/// Whether the connection was dead, rather than its server silent: that will not be better on the next one.
fn is_lost_at_once(error: &Error) -> bool {
    error.kind() == ErrorKind::ConnectionLost && std::error::Error::source(error).is_some()
}

/// Ends a transaction that has done nothing, and gives its connection back.
async fn end(session: Session) {
    if let (session, Ok(_)) = session.exchange(sql::rollback(), Undo::Nothing).await {
        session.give_back();
    }
}

pub(super) fn standby(request: &Request) -> Error {
    request.error(ErrorKind::ReadOnlyServer).with_detail(
        "connect to the primary, for instance with target_session_attrs=read-write; nothing was locked",
    )
}

pub(super) fn timed_out(request: &Request, deadline: &Deadline) -> Error {
    request
        .error(ErrorKind::LockTimeout)
        .with_waited(deadline.waited())
}

pub(super) fn no_answer(request: &Request, deadline: &Deadline) -> Error {
    request
        .error(ErrorKind::ConnectionLost)
        .with_detail("no answer from the server")
        .with_waited(deadline.waited())
}
