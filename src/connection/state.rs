//! What is on a connection, as far as this process knows.
//!
//! All transitions are here, and so is the only way to a [`Clean`], without which no connection goes back to its pool.

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is on a connection. Where several are true, the last of them counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing of ours, by the server's answers.
    Clean,
    /// A transaction.
    InTransaction,
    /// Session locks, and perhaps a transaction beside them.
    HoldsLocks,
    /// A statement of the caller is running, or was dropped and may still be.
    Unanswered,
    /// A cancel may hit any later statement, or the server was silent for too long.
    Unknown,
}

/// The proof that nothing of ours is on a connection.
///
/// Invariant: only [`ConnectionState::prove_clean`] makes one.
#[derive(Debug)]
pub(super) struct Clean(());

/// What is dropped once the server has answered that nothing of ours is left on a connection, or with the connection.
pub(crate) type UntilClean = Box<dyn Debug + Send + Sync>;

/// The state of one connection, and what led to it.
#[derive(Debug, Default)]
pub(super) struct ConnectionState(Mutex<Facts>);

#[derive(Debug, Default)]
struct Facts {
    in_transaction: bool,
    /// When it began, by the server's clock.
    xact_start: Option<i64>,
    session_locks: bool,
    /// Statements of the caller that are awaited.
    running: usize,
    /// Statements have been dropped before this number was given. The server answers in order, so the answer to one with
    /// this number or a later one proves that they have ended.
    dropped_before: Option<u64>,
    next_number: u64,
    cancel_pending: bool,
    lost: bool,
    /// The caller had the bare client, or a stream of rows: there may be statements we do not know of.
    untracked: bool,
    /// The caller may have begun a transaction of their own.
    may_have_begun: bool,
    /// Somebody has run something on it, beyond what takes and returns its locks.
    used: bool,
    /// A statement has failed at some time, or its end is not known.
    failed_or_unknown: bool,
    /// When the server last answered a statement.
    answered: Option<Instant>,
    /// The transaction's `idle_in_transaction_session_timeout`, where it was set for it.
    idle_timeout: Option<Duration>,
    until_clean: Option<UntilClean>,
}

impl Facts {
    fn state(&self) -> State {
        if self.lost || self.cancel_pending {
            State::Unknown
        } else if self.is_unanswered() {
            State::Unanswered
        } else if self.session_locks {
            State::HoldsLocks
        } else if self.in_transaction {
            State::InTransaction
        } else {
            State::Clean
        }
    }

    fn is_unanswered(&self) -> bool {
        self.running > 0 || self.dropped_before.is_some()
    }
}

/// Transitions.
impl ConnectionState {
    /// A transaction has begun.
    pub(super) fn began(&self) {
        let mut facts = self.facts();
        facts.in_transaction = true;
        facts.answered = Some(Instant::now());
    }

    /// It was given this `idle_in_transaction_session_timeout`.
    pub(super) fn idles_for(&self, timeout: Duration) {
        self.facts().idle_timeout = Some(timeout);
    }

    /// It began at this time, where that is known.
    pub(super) fn began_at(&self, xact_start: Option<i64>) {
        self.facts().xact_start = xact_start;
    }

    /// The server has answered that the transaction has ended.
    pub(super) fn ended(&self) {
        self.end(|facts| {
            facts.in_transaction = false;
            facts.idle_timeout = None;
        });
    }

    /// A guard has session locks on it.
    pub(super) fn locked(&self) {
        self.facts().session_locks = true;
    }

    /// The server has answered that the session locks are returned.
    pub(super) fn unlocked(&self) {
        self.end(|facts| facts.session_locks = false);
    }

    fn end(&self, end: impl FnOnce(&mut Facts)) {
        let mut facts = self.facts();
        end(&mut facts);
        let is_left = facts.in_transaction || facts.session_locks;
        let ended = facts.until_clean.take_if(|_| !is_left);
        drop(facts);
        drop(ended);
    }

    /// Keeps something as long as a transaction or session locks are on the connection.
    pub(super) fn keep_until_clean(&self, kept: UntilClean) {
        self.facts().until_clean = Some(kept);
    }

    /// A statement is sent, and gets a number.
    pub(super) fn sent(&self) -> u64 {
        let mut facts = self.facts();
        facts.used = true;
        facts.running += 1;
        facts.next_number += 1;
        facts.next_number - 1
    }

    /// The statement has ended, and so have all that were dropped before it was sent.
    pub(super) fn answered(&self, number: u64, failed: bool) {
        let mut facts = self.facts();
        facts.running -= 1;
        facts.answered = Some(Instant::now());
        facts.failed_or_unknown |= failed;
        facts.dropped_before = facts.dropped_before.filter(|before| number < *before);
    }

    /// Nobody waits for the statement any more.
    pub(super) fn dropped(&self) {
        let mut facts = self.facts();
        facts.running -= 1;
        facts.failed_or_unknown = true;
        facts.dropped_before = Some(facts.next_number);
    }

    /// The server has answered something that is no statement of the caller.
    pub(super) fn heard(&self) {
        self.facts().answered = Some(Instant::now());
    }

    /// The connection is closed: what is on it is gone with it.
    pub(super) fn closed(&self) {
        let kept = self.facts().until_clean.take();
        drop(kept);
    }

    /// A message behind all statements has been answered.
    pub(super) fn all_answered(&self) {
        let mut facts = self.facts();
        facts.running = 0;
        facts.dropped_before = None;
    }

    /// The bare client is given out.
    pub(super) fn given_out(&self) {
        let mut facts = self.facts();
        facts.untracked = true;
        facts.used = true;
    }

    /// A statement has failed, or nobody will see whether it does.
    pub(super) fn failed(&self) {
        self.facts().failed_or_unknown = true;
    }

    /// The caller may have begun a transaction of their own.
    pub(super) fn may_begin(&self) {
        self.facts().may_have_begun = true;
    }

    /// A cancel is on its way that may hit any later statement.
    pub(super) fn cancelling(&self) {
        self.facts().cancel_pending = true;
    }

    /// The server was silent for too long.
    pub(super) fn lost(&self) {
        self.facts().lost = true;
    }
}

/// Questions.
impl ConnectionState {
    pub(super) fn state(&self) -> State {
        self.facts().state()
    }

    pub(super) fn prove_clean(&self) -> Option<Clean> {
        (self.state() == State::Clean).then_some(Clean(()))
    }

    pub(super) fn is_lost(&self) -> bool {
        self.facts().lost
    }

    /// Whether statements of the caller may be running that were dropped, or are awaited elsewhere.
    pub(super) fn is_unanswered(&self) -> bool {
        self.facts().is_unanswered()
    }

    /// Whether the caller had the bare client.
    pub(super) fn is_untracked(&self) -> bool {
        self.facts().untracked
    }

    /// Whether a transaction that began at this time is another one than ours.
    pub(super) fn is_another(&self, xact_start: Option<i64>) -> bool {
        let own = self.facts().xact_start;
        own.is_some() && xact_start.is_some() && own != xact_start
    }

    /// For how long no statement has been under way; `None` where one is, or that is not known.
    pub(super) fn idle(&self) -> Option<Duration> {
        let facts = self.facts();
        let is_known = !facts.untracked && !facts.is_unanswered();
        facts
            .answered
            .filter(|_| is_known)
            .map(|answered| answered.elapsed())
    }

    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        self.facts().idle_timeout
    }

    pub(super) fn is_in_transaction(&self) -> bool {
        self.facts().in_transaction
    }

    /// Whether a guard has session locks on it.
    pub(super) fn holds_locks(&self) -> bool {
        self.facts().session_locks
    }

    /// Whether the caller may have a transaction open that we do not know of.
    pub(super) fn may_be_in_transaction(&self) -> bool {
        let facts = self.facts();
        facts.may_have_begun || facts.untracked
    }

    /// How many statements of the caller have been sent.
    pub(super) fn statements(&self) -> u64 {
        self.facts().next_number
    }

    /// Sends something on a connection with session locks, unless there is a transaction or a statement under way, or
    /// another statement has been sent since there were so many. A statement of the caller is sent either before or after.
    pub(super) fn if_idle<T>(&self, statements: u64, send: impl FnOnce() -> T) -> Option<T> {
        let facts = self.facts();
        let is_idle = facts.state() == State::HoldsLocks
            && !facts.in_transaction
            && facts.next_number == statements;
        is_idle.then(send)
    }

    pub(super) fn was_used(&self) -> bool {
        self.facts().used
    }

    pub(super) fn is_cancelling(&self) -> bool {
        self.facts().cancel_pending
    }

    /// Whether a failed statement can have gone by unseen, or seen and swallowed: then COMMIT may be a rollback.
    pub(super) fn may_have_failed(&self) -> bool {
        let facts = self.facts();
        facts.failed_or_unknown || facts.untracked || facts.is_unanswered()
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Nothing that panics runs while it is locked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_clean_is_proven_clean() {
        let state = ConnectionState::default();
        assert!(state.prove_clean().is_some());
        state.began();
        assert_eq!(state.state(), State::InTransaction);
        state.locked();
        assert_eq!(state.state(), State::HoldsLocks);
        state.ended();
        assert!(state.prove_clean().is_none());
        state.unlocked();
        assert!(state.prove_clean().is_some());
        state.cancelling();
        assert_eq!(state.state(), State::Unknown);
        assert!(state.prove_clean().is_none());
    }

    #[test]
    fn a_later_answer_proves_that_dropped_statements_have_ended() {
        let state = ConnectionState::default();
        let before = state.sent();
        state.sent();
        state.dropped();
        assert_eq!(state.state(), State::Unanswered);
        // Sent before the other was dropped: that one may have sent the rest of itself later.
        state.answered(before, false);
        assert_eq!(state.state(), State::Unanswered);
        let after = state.sent();
        state.answered(after, false);
        assert_eq!(state.state(), State::Clean);
        assert!(state.may_have_failed());
    }

    #[test]
    fn a_lost_connection_stays_lost() {
        let state = ConnectionState::default();
        state.lost();
        state.all_answered();
        assert_eq!(state.state(), State::Unknown);
    }
}
