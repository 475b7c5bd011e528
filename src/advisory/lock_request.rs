//! What is asked for, checked before anything is sent.

use std::time::{Duration, Instant};

use crate::advisory::sql::{Locks, Names, TryLockRow};
use crate::call_site::CallSite;
use crate::connection::Session;
use crate::error::{Error, ErrorKind};
use crate::key::LockKey;
use crate::key::names::{Registration, register};
use crate::mode::AdvisoryMode;
use crate::transaction::HeldLock;
use crate::transaction::sql::Begin;

/// One or several locks to be taken together.
#[derive(Debug)]
pub(crate) struct LockRequest {
    // Invariant: sorted, no key twice, at least one.
    keys: Vec<LockKey>,
    names: Vec<Registration>,
    mode: AdvisoryMode,
    pub(crate) wait: Duration,
    /// How the transaction begins that holds the locks; its `application_name` is also the session locks' holder's.
    pub(crate) begin: Begin,
    pub(crate) call_site: Option<CallSite>,
    /// The keeper's wait for locks that are taken later in the same transaction.
    pub(crate) lock_wait: Duration,
    /// Whether it is a conflict group's: what is read under a shared one need not be younger than its grant.
    pub(crate) is_group: bool,
}

impl LockRequest {
    /// Notes on a session what a `try` for this request has brought to light.
    pub(crate) fn identify(&self, session: &mut Session, tried: &TryLockRow) {
        let name = self.begin.application_name.as_ref();
        session.identify(tried.pid, tried.xact_start, name);
        session.set_idle_timeout(self.begin.idle_in_transaction_session_timeout);
    }

    /// # Errors
    /// `Config` for no keys at all, `KeyCollision` for two names that have one key, within the set or in the process.
    pub(crate) fn new(
        mut keys: Vec<LockKey>,
        mode: AdvisoryMode,
        wait: Duration,
    ) -> Result<Box<Self>, Error> {
        // One order for all callers, so that two of them never wait for each other.
        keys.sort();
        keys.dedup();
        if keys.is_empty() {
            return Err(Error::config("no keys given; a lock needs at least one"));
        }
        let names = keys
            .iter()
            .map(register)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|collision| {
                Error::new(ErrorKind::KeyCollision)
                    .with_key(&collision.refused)
                    .with_detail(format!(
                        "its number is {} already; rename one of the two",
                        collision.known
                    ))
            })?;
        // A number and a name for it are one lock.
        keys.dedup_by(|later, kept| {
            let same = later.same_lock(kept);
            if same && kept.name().is_none() {
                std::mem::swap(later, kept);
            }
            same
        });
        // Boxed, because requests move through many futures.
        Ok(Box::new(Self {
            keys,
            names,
            mode,
            wait,
            begin: Begin::default(),
            call_site: None,
            lock_wait: wait,
            is_group: false,
        }))
    }

    pub(crate) fn keys(&self) -> &[LockKey] {
        &self.keys
    }

    pub(crate) fn mode(&self) -> AdvisoryMode {
        self.mode
    }

    pub(crate) fn locks(&self) -> Locks<'_> {
        Locks {
            keys: &self.keys,
            mode: self.mode,
        }
    }

    /// The names of a session lock's backend.
    pub(crate) fn session_names(&self) -> Names<'_> {
        let name = self.begin.application_name.as_deref();
        Names {
            waiting: name,
            holding: name,
        }
    }

    /// The locks as a transaction holds them once they are granted.
    pub(crate) fn into_held(self, depth: u32) -> impl Iterator<Item = HeldLock> {
        let mut names = self.names;
        let mode = self.mode;
        let last = self.keys.len() - 1;
        self.keys
            .into_iter()
            .enumerate()
            .map(move |(n, key)| HeldLock {
                key,
                mode,
                since: Instant::now(),
                depth,
                counted: None,
                // Which registration goes with which lock does not matter: they end together.
                _names: if n == last {
                    std::mem::take(&mut names)
                } else {
                    Vec::new()
                },
            })
    }

    /// What a session guard keeps of it.
    pub(crate) fn into_parts(self) -> (Vec<LockKey>, Vec<Registration>) {
        (self.keys, self.names)
    }

    /// An error about these locks.
    pub(crate) fn error(&self, kind: ErrorKind) -> Error {
        let error = Error::new(kind).with_key(&self.keys[0]);
        match self.keys.len() {
            1 => error,
            n => error.with_detail(format!("and {} more", n - 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(keys: Vec<LockKey>) -> Result<Box<LockRequest>, Error> {
        LockRequest::new(keys, AdvisoryMode::Exclusive, Duration::ZERO)
    }

    #[test]
    fn sorted_and_without_repeats() {
        let keys = vec![
            LockKey::from((1, 2)),
            LockKey::from(9),
            LockKey::from(-3),
            LockKey::from(9),
        ];
        let request = request(keys).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            request.keys(),
            [LockKey::from(-3), LockKey::from(9), LockKey::from((1, 2))]
        );
    }

    #[test]
    fn nothing_is_not_a_lock() {
        assert_eq!(
            request(Vec::new()).map_err(|error| error.kind()).err(),
            Some(ErrorKind::Config)
        );
    }

    #[test]
    fn two_names_with_one_number_are_refused() {
        let meet = vec![
            LockKey::from(("request\u{1f}b", "c")),
            LockKey::from(("request", "b\u{1f}c")),
        ];
        let error = request(meet).map(drop).map_err(|error| error.kind());
        assert_eq!(error, Err(ErrorKind::KeyCollision));
    }
}
