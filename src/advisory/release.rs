//! How a session guard ends: its lock is released, or goes to the next in line together with its session.

use std::sync::{Arc, Mutex, PoisonError};

use super::wait_queue::NextWaiter;
use super::{SessionGuard, sql};
use crate::advisory::sql::{TryLockOutcome, TryLockRow};
use crate::connection::{AfterReply, OnAbandon, Reply, ReplyHandler, Session};
use crate::key::LockKey;
use crate::postgres::sql::{Message, is_true, rows};

/// The end of a guard: what is sent, and what the reply leaves to be done.
pub(super) struct ReleasePlan {
    pub(super) message: Message,
    /// Whether somebody waits for what comes of it.
    pub(super) hands_off: bool,
    pub(super) then: OnceHandler,
}

/// What the reply leaves to be done: taken by whoever reads it, the caller or the background.
#[derive(Clone)]
pub(super) struct OnceHandler(Arc<Mutex<Option<ReplyHandler>>>);

impl ReleasePlan {
    pub(super) fn of(guard: &SessionGuard, session: &mut Session) -> Self {
        let application_name = guard.application_name();
        let mut hands_off = false;
        let (message, then) = match (guard.prepared(), application_name, guard.held_keys()) {
            (Some(statement), Some(name), [key]) => match next(guard, session) {
                Some(next) => {
                    hands_off = true;
                    session.set_runtime(next.heir.runtime.as_ref());
                    hand_over(statement, key, name, next)
                }
                None => (
                    sql::execute_unlock(statement, key, name),
                    after_unlock(Some(name.to_owned())),
                ),
            },
            _ => (
                guard.release_text().into(),
                after_unlock(application_name.map(str::to_owned)),
            ),
        };
        Self {
            message,
            hands_off,
            then: OnceHandler(Arc::new(Mutex::new(Some(then)))),
        }
    }
}

impl OnceHandler {
    /// What to do with the reply if nobody waits for it.
    pub(super) fn undo(&self) -> OnAbandon {
        let then = self.clone();
        OnAbandon::Then(Box::new(move |reply| then.read(reply)))
    }

    /// What to do with the reply.
    pub(super) fn read(&self, reply: &Reply) -> AfterReply {
        let then = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        then.map_or(AfterReply::Close, |then| then(reply))
    }
}

/// The next in line, unless the session has been used: what somebody has set on it is not for the next one, and the pool
/// may have its own way of cleaning a connection. And unless somebody waits for one of the pool's: a line that does not
/// end would keep the connection for itself.
fn next(guard: &SessionGuard, session: &Session) -> Option<NextWaiter> {
    if session.was_used() || session.connections().are_awaited() {
        return None;
    }
    guard.queue()?.next(&guard.held_keys()[0])
}

/// The lock is released and tried again for the next in line, in one message. A waiter of another process that is in the
/// server's queue gets it in between.
fn hand_over(
    statement: &str,
    key: &LockKey,
    name: &str,
    next: NextWaiter,
) -> (Message, ReplyHandler) {
    let message = sql::execute_hand_over(statement, key, &next.heir.application_name, name);
    let unlock = sql::execute_unlock(statement, key, name);
    let (key, name) = (key.clone(), name.to_owned());
    let then: ReplyHandler = Box::new(move |reply| {
        if !is_unlocked(reply) {
            return AfterReply::Close;
        }
        let locked = rows(reply).any(|row| is_true(row, "locked"));
        AfterReply::Pass(Box::new(move |session: Session| {
            if session.has_pending_cancel() {
                return;
            }
            // The next one has its own guard, or nothing.
            session.mark_unlocked();
            let own = name.clone();
            let tried = TryLockRow {
                verdict: if locked {
                    TryLockOutcome::Granted
                } else {
                    TryLockOutcome::Busy
                },
                granted: locked,
                pid: session.server_pid().unwrap_or_default(),
                xact_start: None,
                application_name: name,
                server: None,
            };
            let queue = next.queue();
            let unlock = Box::new(move |session: Session| {
                // Others in line are told once it is returned.
                session.keep_until_clean(Box::new(queue.hold(&[key], false)));
                let undo = OnAbandon::Then(after_unlock(Some(own)));
                session.send(unlock, undo).detach();
            });
            next.pass(session, tried, unlock);
        }))
    });
    (message, then)
}

/// What is left to do after an unlock: end the transaction that somebody left open, which would take the restored name
/// with it.
fn after_unlock(application_name: Option<String>) -> ReplyHandler {
    Box::new(move |reply| {
        match sql::unlocked(reply) {
            (false, _) => return AfterReply::Close,
            (true, true) => return AfterReply::ReturnToPool,
            (true, false) => {}
        }
        let mut sql = String::from(sql::ROLLBACK);
        if let Some(name) = &application_name {
            sql.push_str("; ");
            sql.push_str(&sql::set_application_name(name));
        }
        AfterReply::Send(sql)
    })
}

pub(super) fn is_unlocked(reply: &Reply) -> bool {
    sql::unlocked(reply).0
}
