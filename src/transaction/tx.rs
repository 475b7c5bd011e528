//! A transaction that owns its connection.

use std::sync::Arc;
use std::time::Duration;

use super::Held;
use crate::call_site::CallSite;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify, classify_db};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::session::{Connections, Session, Undo, query_methods};
use crate::sql::{self, Ask, Preparable};

/// An open transaction on a connection of its own.
///
/// It has the driver's query methods. Closures get it as `&mut Tx`; whoever runs the closure commits or rolls back.
/// When it is dropped, ROLLBACK is sent at once, and the connection goes back to the pool after the server has answered
/// it.
#[must_use = "a transaction that is not used is rolled back when it is dropped"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct Tx {
    // Invariant: `Some` until the transaction ends; an open transaction is on it.
    session: Option<Session>,
    held: Vec<Held>,
    /// Session locks on the same connection, which are not this transaction's.
    beside: Vec<(LockKey, AdvisoryMode)>,
    depth: u32,
    call_site: Option<CallSite>,
    lock_wait: Duration,
}

/// What ends a transaction's life by its owner's will.
enum End {
    Commit,
    Rollback,
}

impl Tx {
    /// A transaction that has begun on `session`.
    pub(crate) fn new(
        session: Session,
        held: Vec<Held>,
        call_site: Option<CallSite>,
        lock_wait: Duration,
    ) -> Self {
        Self {
            session: Some(session),
            held,
            beside: Vec::new(),
            depth: 0,
            call_site,
            lock_wait,
        }
    }

    pub(crate) fn session(&self) -> &Session {
        self.session
            .as_ref()
            .expect("a transaction has its session until it ends")
    }

    /// The backend's process id, as `pg_stat_activity` shows it; `None` where nothing has asked the server yet.
    #[must_use]
    pub fn backend_pid(&self) -> Option<i32> {
        self.session().server_pid()
    }

    /// Where in the code this transaction was asked for; `None` where call sites are switched off.
    #[must_use]
    pub fn call_site(&self) -> Option<&CallSite> {
        self.call_site.as_ref()
    }

    /// The advisory locks that this transaction holds through this crate, in the order they were granted.
    pub fn held_keys(&self) -> impl Iterator<Item = &LockKey> {
        self.held.iter().map(|held| &held.key)
    }

    pub(crate) fn held(&self) -> &[Held] {
        &self.held
    }

    pub(crate) fn hold(&mut self, locks: impl IntoIterator<Item = Held>) {
        for lock in locks {
            if !self.held.iter().any(|held| held.key.same_lock(&lock.key)) {
                self.held.push(lock);
            }
        }
    }

    pub(crate) fn holding(mut self, locks: impl IntoIterator<Item = Held>) -> Self {
        self.hold(locks);
        self
    }

    /// Notes session locks that are held on the connection already.
    pub(crate) fn beside(
        mut self,
        locks: impl IntoIterator<Item = (LockKey, AdvisoryMode)>,
    ) -> Self {
        self.beside.extend(locks);
        self
    }

    /// How the key is held on this connection.
    pub(crate) fn mode_of(&self, key: &LockKey) -> Option<AdvisoryMode> {
        let held = self.held.iter().map(|held| (&held.key, held.mode));
        let beside = self.beside.iter().map(|(key, mode)| (key, *mode));
        held.chain(beside)
            .find(|(held, _)| held.same_lock(key))
            .map(|(_, mode)| mode)
    }

    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    pub(crate) fn enter_savepoint(&mut self) -> u32 {
        self.depth += 1;
        self.depth
    }

    /// Back outside the savepoint `depth`; rolled back, its locks have been returned.
    pub(crate) fn leave_savepoint(&mut self, depth: u32, rolled_back: bool) {
        self.depth = depth - 1;
        if rolled_back {
            self.held.retain(|held| held.depth < depth);
        } else {
            for held in &mut self.held {
                held.depth = held.depth.min(self.depth);
            }
        }
    }

    /// How long a lock may be waited for where the call does not say.
    pub(crate) fn lock_wait(&self) -> Duration {
        self.lock_wait
    }

    /// Gives the session out of a transaction whose end is somebody else's business from now on.
    pub(crate) fn into_session(mut self) -> Option<Session> {
        self.session.take()
    }

    /// COMMIT, after which the connection is back in the pool.
    ///
    /// Cancel safety: once polled it goes on in the background, to whatever outcome.
    pub(crate) async fn commit(mut self) -> Result<(), Error> {
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        if session.is_closed() {
            return Err(self.about(Error::new(ErrorKind::ConnectionLost)));
        }
        let message = session.commit_message();
        let (session, answer) = session.exchange(message, Undo::Nothing).await;
        let error = match answer {
            Ok(_) => {
                self.trace_end(&End::Commit);
                session.give_back();
                return Ok(());
            }
            Err(error) => error,
        };
        match classify(&error) {
            // No answer, or none that can be read: the server may have committed. Invariant: never retried.
            Failure::ConnectionLost | Failure::Driver => {
                Err(self.about(Error::new(ErrorKind::CommitUnknown).with_source(error)))
            }
            // Some earlier statement failed, and its error was not passed on.
            Failure::Aborted => {
                let cause = session.failure();
                self.trace_end(&End::Rollback);
                roll_back(session).await;
                Err(self.about(match cause {
                    Some(cause) => Error::new(classify_db(&cause).kind())
                        .with_detail(
                            "an earlier statement of the transaction failed, so it was rolled back",
                        )
                        .with_source(*cause),
                    None => Error::new(ErrorKind::Database)
                        .with_detail(
                            "an earlier statement of the transaction failed, so it was rolled back",
                        )
                        .with_source(error),
                }))
            }
            // An ERROR from COMMIT itself (a deferred constraint, a serialization failure): rolled back.
            failure => {
                self.trace_end(&End::Rollback);
                end_failed(session).await;
                Err(self.about(
                    Error::new(failure.kind())
                        .with_detail("commit failed, the transaction was rolled back")
                        .with_source(error),
                ))
            }
        }
    }

    /// ROLLBACK, after which the connection is back in the pool, or closed.
    ///
    /// Cancel safety: once polled it goes on in the background.
    pub(crate) async fn rollback(mut self) {
        self.trace_end(&End::Rollback);
        if let Some(session) = self.session.take() {
            roll_back(session).await;
        }
    }

    fn about(&self, error: Error) -> Error {
        match self.held.first() {
            Some(held) => error.with_key(&held.key),
            None => error,
        }
    }

    fn trace_end(&self, end: &End) {
        for held in &self.held {
            tracing::debug!(
                key = %held.key,
                mode = %held.mode,
                held = ?held.since.elapsed(),
                by = match end {
                    End::Commit => "commit",
                    End::Rollback => "rollback",
                },
                "advisory lock released"
            );
        }
    }
}

query_methods!(Tx);

impl Drop for Tx {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            self.trace_end(&End::Rollback);
            session.exchange(sql::rollback(), Undo::Nothing).detach();
        }
    }
}

/// Ends a transaction whose outcome is rollback already, or shall be.
async fn roll_back(session: Session) {
    let exchange = session.exchange(sql::rollback(), Undo::Nothing);
    // Unanswered, the session closes its connection, which rolls back too.
    if let Some((session, Ok(_))) = exchange.or_detach().await {
        session.give_back();
    }
}

/// Ends what a failed COMMIT has left. Usually that is nothing, and then a ROLLBACK would be warned of in the server's
/// log; but an error can have struck before COMMIT was run.
async fn end_failed(session: Session) {
    match session
        .exchange(sql::Message::of(1, sql::PROBE), Undo::Nothing)
        .await
    {
        (session, Ok(_)) => session.give_back(),
        (session, Err(error)) if classify(&error) == Failure::Aborted => roll_back(session).await,
        // Dropped, the session closes its connection.
        _ => {}
    }
}

/// Begins a transaction on a connection that is alive and clean. One message, one round trip.
///
/// Cancel safety: dropped, the transaction is rolled back in the background.
pub(crate) async fn open(
    connections: &Arc<Connections>,
    deadline: &Deadline,
    begin: &sql::Begin,
    call_site: Option<CallSite>,
    lock_wait: Duration,
) -> Result<Tx, Error> {
    let known = connections.known();
    let statement = Preparable::begin(begin);
    let mut stale = 0;
    loop {
        let session = connections.check_out(deadline).await?;
        let ask = known.ask(&session, statement);
        // On any error the session is dropped and so closed: what state it came in is not known.
        let (mut session, answer) = session
            .exchange(sql::begin_transaction(begin, &ask), Undo::rollback())
            .await;
        let error = match answer {
            Ok(reply) => match sql::begun(&reply) {
                Some(begun) if begun.fresh => {
                    if let (Ask::Prepare(_), Some(statement)) = (&ask, statement) {
                        known.prepared(&session, statement);
                    }
                    if let Some(server) = &begun.server {
                        known.learn(&session, begun.pid, server);
                    }
                    session.identify(begun.pid, begin.application_name.as_deref());
                    return Ok(Tx::new(session, Vec::new(), call_site, lock_wait));
                }
                _ => Error::new(ErrorKind::Pool)
                    .with_detail("the pool gave connections with transactions left open on them; they were closed"),
            },
            // Nothing was done yet that could be done twice: a connection that died in the pool, or was left in a
            // failed transaction, is replaced, and so is one whose prepared statements are not as expected.
            Err(error) => match classify(&error) {
                failure @ (Failure::ConnectionLost
                | Failure::Aborted
                | Failure::InTransaction
                | Failure::MissingStatement
                | Failure::DuplicateStatement) => {
                    if failure == Failure::MissingStatement {
                        known.missing_statement();
                    }
                    error.into()
                }
                _ => return Err(error.into()),
            },
        };
        stale += 1;
        if stale > connections.most() {
            return Err(error);
        }
        tracing::debug!(%error, "a pool connection could not be used, taking another");
    }
}
