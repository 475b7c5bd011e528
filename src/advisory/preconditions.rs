//! Whether the server is one on which advisory locks mean what they say. Asked of each server now and then.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::IsolationLevel;

use super::{Advisory, sql};
use crate::advisory::sql::{Locks, TryLockOutcome};
use crate::connection::sql::server::{self, Server};
use crate::connection::sql::{Probe, Refusal};
use crate::connection::{Checkout, Connections, LockScope, OnAbandon, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, is_insufficient_privilege};
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::sql::{is_true, rows};
use crate::transaction;

/// A second connection to compare with.
const SECOND: Duration = Duration::from_secs(1);
/// One question to a pooler, which may have no backend to answer it.
const QUESTION: Duration = Duration::from_millis(500);
/// Sets of locks this large are compared with the room in the lock table first.
const WORTH_COUNTING: usize = 128;
/// How often two sessions are compared before they count as kept apart.
const COMPARISONS: usize = 3;

/// Checks, where that is not known of the server or was long ago, that the locks just granted to `session` are there.
///
/// An engine whose lock functions do nothing shows nothing in `pg_locks`, and does not count locks, which is looked at
/// where the role may not read that. One that locks and does not show it is told
/// apart by a second session, which must be refused what the first one holds.
///
/// # Errors
/// `NoAdvisoryLocks`.
pub(super) async fn check_locking(
    session: &Session,
    scope: LockScope,
    server: Option<&Server>,
    locks: Locks<'_>,
) -> Result<(), Error> {
    let Some(server) = server else { return Ok(()) };
    let capabilities = session.connections().capabilities();
    if capabilities.locks(scope, &server.identity) {
        return Ok(());
    }
    // Boxed, because it is rare and the future of every lock would have its size.
    Box::pin(find_locks(session, scope, server, locks)).await
}

async fn find_locks(
    session: &Session,
    scope: LockScope,
    server: &Server,
    locks: Locks<'_>,
) -> Result<(), Error> {
    let capabilities = session.connections().capabilities();
    let shown = if session.denied().pg_locks {
        sql::are_counted(locks, scope)
    } else {
        sql::shown_in_pg_locks(locks)
    };
    let reply = session.message(&shown).await?;
    if !rows(&reply).any(|row| is_true(row, "shown"))
        && !excludes_a_second(session.connections(), locks.keys).await?
    {
        return Err(Error::new(ErrorKind::NoAdvisoryLocks)
            .with_key(&locks.keys[0])
            .with_detail(
                "the server granted one exclusive lock to two sessions; it must not be relied on, use row locks on this \
                 engine",
            ));
    }
    capabilities.learn_locks(scope, &server.identity);
    Ok(())
}

/// Whether a second session is refused a key that the first one holds. `false` where there is no second one: what
/// cannot be shown to lock is not relied on.
async fn excludes_a_second(
    connections: &Arc<Connections>,
    keys: &[LockKey],
) -> Result<bool, Error> {
    let second = Deadline::after(SECOND);
    let Ok(second) = connections.check_out_beyond(&second).await else {
        return Ok(false);
    };
    let locks = Locks {
        keys: &keys[..1],
        mode: AdvisoryMode::Exclusive,
    };
    // Whatever the session's default isolation is: the verdict is about the lock alone.
    let begin = transaction::sql::Begin {
        isolation: Some(IsolationLevel::ReadCommitted),
        ..transaction::sql::Begin::default()
    };
    let sql = sql::begin_and_try(&begin, locks, &Probe::Full(Refusal::None));
    let request = second.send(sql, OnAbandon::rollback());
    let Some((second, answer)) = request.answered().await else {
        return Ok(false);
    };
    let tried = sql::tried(&answer?);
    let request = second.send(sql::rollback(), OnAbandon::Finish);
    if let Some((second, Ok(_))) = request.answered().await {
        second.return_to_pool();
    }
    Ok(tried.is_some_and(|tried| tried.verdict == TryLockOutcome::Busy))
}

impl Advisory {
    /// Checks that session locks may be taken through the pooler that `session` goes through.
    ///
    /// Two clients that are both open, and are both served by one backend, prove that the pooler gives a server session
    /// to whoever has a statement to run; so does one client that is served by two backends.
    ///
    /// A finding that is too old and cannot be examined again counts once more where it allows them: guards that fill the
    /// pooler would else forbid any other.
    ///
    /// # Errors
    /// `TransactionPooler`, where that is proven, and where there is no second connection to find out with.
    pub(super) async fn check_pooler(
        &self,
        session: &Session,
        server: &Arc<str>,
        key: &LockKey,
    ) -> Result<(), Error> {
        let capabilities = self.connections.capabilities();
        let keeps = match capabilities.keeps_sessions(server) {
            Some(keeps) => keeps,
            None => {
                let keeps = match self.pooler_keeps_sessions(session).await {
                    Ok(keeps) => keeps,
                    Err(_) if capabilities.kept_sessions(server) == Some(true) => true,
                    Err(error) => return Err(error.with_key(key)),
                };
                capabilities.learn_keeps_sessions(server, keeps);
                keeps
            }
        };
        if keeps {
            return Ok(());
        }
        Err(refused(key))
    }

    /// The error of a session lock where the pooler is known not to keep one server session for each client.
    pub(super) fn refused_by_pooler(&self, key: &LockKey) -> Option<Error> {
        let keep = self.connections.capabilities().all_keep_sessions();
        (keep == Some(false)).then(|| refused(key))
    }

    async fn pooler_keeps_sessions(&self, first: &Session) -> Result<bool, Error> {
        let pid_of = async |session: &Session| {
            let reply = session.message(server::BACKEND_PID).await?;
            Ok::<_, Error>(server::backend_pid(&reply))
        };
        for _ in 0..COMPARISONS {
            let second = Deadline::after(SECOND);
            let Ok(second) = self.connections.check_out_beyond(&second).await else {
                return Err(undetermined());
            };
            // A pooler that takes its backends in turn gives another one to the next statement.
            let before = within(pid_of(first)).await.ok_or_else(undetermined)??;
            for _ in 0..COMPARISONS {
                if within(pid_of(first)).await.ok_or_else(undetermined)?? != before {
                    second.return_to_pool();
                    return Ok(false);
                }
            }
            // One that prefers those just used gives the same one to the next client.
            // In a transaction the second client keeps its backend while the first is asked again.
            let begin = transaction::sql::begin_transaction(
                &transaction::sql::Begin::default(),
                &Probe::Minimal,
            );
            let begun = second.send(begin, OnAbandon::rollback());
            let Some((second, answer)) = begun.within(QUESTION).await else {
                return Err(undetermined());
            };
            let second_pid = transaction::sql::begun(&answer?).map(|begun| begun.pid);
            let after = within(pid_of(first)).await;
            let request = second.send(sql::rollback(), OnAbandon::Finish);
            let Some((second, answer)) = request.answered().await else {
                return Err(undetermined());
            };
            answer?;
            second.return_to_pool();
            // No answer: the first client had no backend of its own any more, and there was none to be had.
            let Some(after) = after else { return Ok(false) };
            let after = after?;
            if before != after || before == second_pid || after == second_pid {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Refuses a set of locks for which the server has no room, before it takes the room of others: one session can
    /// fill the lock table of the whole server, and then nobody can log in.
    ///
    /// # Errors
    /// `OutOfLocks`, nothing taken.
    pub(super) async fn check_lock_table_capacity(
        &self,
        keys: &[LockKey],
        deadline: &Deadline,
    ) -> Result<(), Error> {
        if !is_worth_counting(keys) {
            return Ok(());
        }
        Box::pin(self.compare_with_capacity(keys, deadline)).await
    }

    async fn compare_with_capacity(
        &self,
        keys: &[LockKey],
        deadline: &Deadline,
    ) -> Result<(), Error> {
        let mut checkout =
            Checkout::within(&self.connections, deadline, self.answer_bound(deadline));
        loop {
            let (session, patience) = checkout.next().await?;
            let answer = check_capacity_on(&session, keys, false);
            let Ok(answer) = tokio::time::timeout(patience, answer).await else {
                checkout.replace_silent(
                    Error::new(ErrorKind::ConnectionLost)
                        .with_key(&keys[0])
                        .with_detail("no answer from the server"),
                )?;
                continue;
            };
            match answer {
                Err(error) if error.kind() == ErrorKind::ConnectionLost => {
                    checkout.replace(error)?;
                }
                Err(error) if error.kind() != ErrorKind::OutOfLocks => return Err(error),
                answer => {
                    session.return_to_pool();
                    return answer;
                }
            }
        }
    }
}

/// Whether a set is so large that counting what is taken is worth its while.
pub(super) fn is_worth_counting(keys: &[LockKey]) -> bool {
    keys.len() >= WORTH_COUNTING
}

/// Compares a set of locks with what is free in the lock table; with all of it where the role may not know what is taken.
///
/// # Errors
/// `OutOfLocks`, and the connection's.
pub(super) async fn check_capacity_on(
    session: &Session,
    keys: &[LockKey],
    in_transaction: bool,
) -> Result<(), Error> {
    let mut denied = session.denied();
    let reply = loop {
        let answer = session.message(&server::lock_table_query(denied)).await;
        match answer.map_err(Error::from) {
            // Not known of a role's first connection. Outside a transaction, nothing is lost by it.
            Err(error)
                if !denied.pg_locks && !in_transaction && is_insufficient_privilege(&error) =>
            {
                denied.pg_locks = true;
            }
            answer => break answer?,
        }
    };
    let Some(table) = server::lock_table(&reply) else {
        return Ok(());
    };
    let wanted = u64::try_from(keys.len()).unwrap_or(u64::MAX);
    if table.taken.unwrap_or_default().saturating_add(wanted) <= table.capacity {
        return Ok(());
    }
    let taken = table.taken.map_or_else(
        || "in".to_owned(),
        |taken| format!("beside the {taken} that are taken in"),
    );
    Err(Error::new(ErrorKind::OutOfLocks)
        .with_key(&keys[0])
        .with_detail(format!(
            "{wanted} locks do not fit {taken} the server's lock table, which is made for {} \
             (max_locks_per_transaction × (max_connections + max_prepared_transactions)); lock fewer keys, for \
             instance one for the whole set, or raise max_locks_per_transaction",
            table.capacity
        )))
}

/// Bounds one question to a pooler, which may have no backend to answer it.
async fn within<F: Future>(question: F) -> Option<F::Output> {
    tokio::time::timeout(QUESTION, question).await.ok()
}

/// Not proven either way, so nothing to be learnt for the next time.
fn undetermined() -> Error {
    Error::new(ErrorKind::TransactionPooler).with_detail(
        "a pooler stands between, and no second connection was to be had to find out whether it keeps one server session \
         for each client; use a transaction lock or larger pools",
    )
}

fn refused(key: &LockKey) -> Error {
    Error::new(ErrorKind::TransactionPooler).with_key(key).with_detail(
        "the pooler gives one server session to several clients, which would share the lock or lose it; use a \
         transaction lock, connect to the server directly, or set the pooler to session mode",
    )
}
