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
    pub(crate) autovacuum: bool,
    /// Whether it prevents wraparound, if it is an autovacuum worker and that is known.
    pub(crate) wraparound: Option<bool>,
    /// What it waits for that this process holds, in words.
    pub(crate) waits_for_us: Option<String>,
    /// Whether a guard or transaction of this process has it.
    pub(crate) is_own: bool,
}

/// Whether an autovacuum worker prevents wraparound, by its `pg_stat_activity.query`; `None` if that is not visible. The
/// server ends any other worker once a session has waited for it for `deadlock_timeout`.
#[cfg(feature = "schema")]
pub(crate) fn prevents_wraparound(query: Option<&str>) -> Option<bool> {
    let query = query.filter(|query| query.starts_with("autovacuum: "))?;
    Some(query.ends_with("(to prevent wraparound)"))
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

    /// Whether it is an autovacuum worker. It yields to a session that waits for longer than `deadlock_timeout`, unless
    /// it [prevents wraparound](Self::prevents_wraparound).
    #[must_use]
    pub fn is_autovacuum(&self) -> bool {
        self.autovacuum
    }

    /// Whether it is an autovacuum worker that prevents transaction id wraparound, which yields to no session. `None` if
    /// that is unknown, because the role may not see it.
    #[must_use]
    pub fn prevents_wraparound(&self) -> Option<bool> {
        if self.autovacuum {
            self.wraparound
        } else {
            Some(false)
        }
    }

    /// What the session itself waits for that this process holds, in words: then this process waits for itself, and the
    /// server does not always find such a deadlock. `None` if there is no such wait, or none was seen.
    #[must_use]
    pub fn waits_for_us(&self) -> Option<&str> {
        self.waits_for_us.as_deref()
    }

    /// Whether a guard or a transaction of this process is on that backend, by its process id: this process blocks itself.
    ///
    /// A backend of another server can have the same process id. So in a process that uses several servers this can be true of a
    /// session of another process.
    #[must_use]
    pub fn is_this_process(&self) -> bool {
        self.is_own
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
                _ if self.autovacuum && self.wraparound == Some(true) => {
                    f.write_str("autovacuum worker that prevents wraparound")?;
                }
                _ if self.autovacuum => f.write_str("autovacuum worker")?,
                None => f.write_str("application hidden")?,
                Some("") => f.write_str("no application_name")?,
                Some(name) => write!(f, "{}", name.escape_debug())?,
            }
            if self.is_own {
                f.write_str(", this process")?;
            }
            match &self.user {
                Some(user) => write!(f, ", user {}", user.escape_debug())?,
                // A worker has no user.
                None if self.autovacuum => {}
                None => f.write_str(", user hidden")?,
            }
            match (&self.state, self.state_age) {
                (None, _) if self.autovacuum => {}
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
            Some((object, mode)) => write!(f, " {verb} {mode} on {}", object.escape_debug())?,
            None => write!(f, " {verb} {}", self.mode)?,
        }
        match &self.waits_for_us {
            Some(object) => write!(
                f,
                ", and itself waits for our lock on {}",
                object.escape_debug()
            ),
            None => Ok(()),
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
            autovacuum: false,
            wraparound: None,
            waits_for_us: None,
            is_own: false,
        }
    }

    #[cfg(feature = "schema")]
    #[test]
    fn an_autovacuum_worker_is_named() {
        let worker = |query| Blocker {
            application_name: Some(String::new()),
            user: None,
            state: None,
            state_age: None,
            autovacuum: true,
            wraparound: prevents_wraparound(query),
            ..blocker()
        };
        let routine = worker(Some("autovacuum: VACUUM public.t"));
        assert_eq!(
            routine.to_string(),
            "pid 4711 (autovacuum worker) holds ExclusiveLock"
        );
        assert_eq!(routine.prevents_wraparound(), Some(false));
        let wraparound = worker(Some("autovacuum: VACUUM public.t (to prevent wraparound)"));
        assert!(
            wraparound
                .to_string()
                .contains("worker that prevents wraparound)")
        );
        assert_eq!(wraparound.prevents_wraparound(), Some(true));
        assert_eq!(
            worker(Some("<insufficient privilege>")).prevents_wraparound(),
            None
        );
        assert!(!blocker().is_autovacuum());
        let waits = Blocker {
            waits_for_us: Some("advisory lock 7".into()),
            ..blocker()
        };
        assert!(
            waits
                .to_string()
                .ends_with("and itself waits for our lock on advisory lock 7")
        );
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
