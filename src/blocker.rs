//! A session that blocks a lock: it holds the lock, or is ahead in the lock's queue.

use std::fmt;
use std::time::Duration;

use crate::mode::{AdvisoryMode, LockMode};

/// A backend that blocks a lock: an advisory lock or, for [schema changes](crate::Schema), a lock of any kind. It is
/// described as in `pg_locks` and `pg_stat_activity` while the waiter was still blocked.
///
/// A value that the role in use may not see is `None`: it means *unknown*, never *idle* or *no session*. A role without
/// `pg_read_all_stats` sees only the pid and `application_name` of other roles' sessions (PostgreSQL's documentation,
/// "The Cumulative Statistics System", `pg_stat_activity`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    pub(crate) pid: Option<i32>,
    pub(crate) prepared: Option<String>,
    pub(crate) application_name: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) state_age: Option<Duration>,
    pub(crate) transaction_age: Option<Duration>,
    pub(crate) mode: AdvisoryMode,
    /// The locked object and the mode, if it is not the requested advisory lock.
    pub(crate) object: Option<(String, LockMode)>,
    pub(crate) granted: bool,
}

impl Blocker {
    getters! {
        /// The backend's process id; `None` for a prepared transaction, which has no backend.
        pid: Option<i32>;

        /// The global identifier of the prepared transaction that may hold the lock, which `COMMIT PREPARED` or
        /// `ROLLBACK PREPARED` ends. Only if [`pid`](Self::pid) is `None`.
        text prepared_transaction = prepared;

        /// The backend's `application_name`, which contains the call site if the session uses this crate.
        text application_name;

        /// The role that the backend is logged in as.
        text user;

        /// The backend's state as PostgreSQL names it: `active`, `idle`, `idle in transaction`, …
        text state;

        /// How long the backend has been in that state.
        state_age: Option<Duration>;

        /// The age of its open transaction; also `None` outside a transaction.
        transaction_age: Option<Duration>;

        /// The mode of an advisory lock that it holds or waits for; for other locks see [`lock_mode`](Self::lock_mode).
        mode: AdvisoryMode;
    }

    /// The mode that it holds or waits for, of any kind of lock.
    #[must_use]
    pub fn lock_mode(&self) -> LockMode {
        match (&self.object, self.mode) {
            (Some((_, mode)), _) => *mode,
            (None, AdvisoryMode::Shared) => LockMode::Share,
            (None, AdvisoryMode::Exclusive) => LockMode::Exclusive,
        }
    }

    /// The locked object in words, if it is not an advisory lock: `relation public.orders`.
    #[must_use]
    pub fn object(&self) -> Option<&str> {
        self.object.as_ref().map(|(object, _)| object.as_str())
    }

    /// Whether it holds the lock; `false` if it waits ahead in the lock's queue.
    #[must_use]
    pub fn is_holder(&self) -> bool {
        self.granted
    }
}

/// `pid 4711 (billing src/pay.rs:42, user app, idle in transaction for 3.2s) holds ExclusiveLock`
impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, &self.prepared) {
            (Some(pid), _) => write!(f, "pid {pid}")?,
            (None, Some(gid)) => write!(f, "prepared transaction {gid:?}")?,
            (None, None) => f.write_str("a prepared transaction")?,
        }
        if self.pid.is_some() {
            f.write_str(" (")?;
            match self.application_name.as_deref() {
                None => f.write_str("application hidden")?,
                Some("") => f.write_str("no application_name")?,
                Some(name) => write!(f, "{}", name.escape_debug())?,
            }
            match &self.user {
                Some(user) => write!(f, ", user {}", user.escape_debug())?,
                None => f.write_str(", user hidden")?,
            }
            match (&self.state, self.state_age) {
                (Some(state), Some(age)) => write!(f, ", {state} for {age:.1?}")?,
                (Some(state), None) => write!(f, ", {state}")?,
                (None, _) => f.write_str(", state hidden")?,
            }
            if let Some(age) = self.transaction_age {
                write!(f, ", in its transaction for {age:.1?}")?;
            }
            f.write_str(")")?;
        }
        let verb = if self.granted { "holds" } else { "waits for" };
        match &self.object {
            Some((object, mode)) => write!(f, " {verb} {mode} on {}", object.escape_debug()),
            None => write!(f, " {verb} {}", self.mode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocker() -> Blocker {
        Blocker {
            pid: Some(4711),
            prepared: None,
            application_name: Some("billing src/pay.rs:42".into()),
            user: Some("app".into()),
            state: Some("idle in transaction".into()),
            state_age: Some(Duration::from_millis(3200)),
            transaction_age: None,
            mode: AdvisoryMode::Exclusive,
            object: None,
            granted: true,
        }
    }

    #[test]
    fn display_is_one_line() {
        assert_eq!(
            blocker().to_string(),
            "pid 4711 (billing src/pay.rs:42, user app, idle in transaction for 3.2s) holds ExclusiveLock"
        );
    }

    #[test]
    fn another_kind_of_lock_is_displayed() {
        let table = Blocker {
            object: Some(("relation orders".into(), LockMode::AccessShare)),
            ..blocker()
        };
        assert!(
            table
                .to_string()
                .ends_with(" holds AccessShareLock on relation orders")
        );
        assert_eq!(table.lock_mode(), LockMode::AccessShare);
        assert_eq!(blocker().lock_mode(), LockMode::Exclusive);
    }

    #[test]
    fn hidden_values_are_displayed_as_hidden() {
        let hidden = Blocker {
            user: None,
            state: None,
            state_age: None,
            granted: false,
            ..blocker()
        };
        assert_eq!(
            hidden.to_string(),
            "pid 4711 (billing src/pay.rs:42, user hidden, state hidden) waits for ExclusiveLock"
        );
    }

    #[test]
    fn a_prepared_transaction_has_no_pid() {
        let prepared = Blocker {
            pid: None,
            prepared: Some("order-7".into()),
            ..blocker()
        };
        assert_eq!(
            prepared.to_string(),
            "prepared transaction \"order-7\" holds ExclusiveLock"
        );
    }
}
