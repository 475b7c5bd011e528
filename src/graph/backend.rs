//! One backend, or one prepared transaction, as `pg_stat_activity` or `pg_prepared_xacts` showed it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::postgres::statement;

/// What tells the participants of one [`Snapshot`](super::Snapshot) apart: a backend's process id, or a prepared
/// transaction's global identifier.
///
/// A process id is used again by later backends; between snapshots compare [`Backend::backend_start`] too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum BackendId {
    /// A backend, by its process id. Of a parallel query it is the leader's.
    Pid(i32),
    /// A prepared transaction, by its global identifier (`pg_prepared_xacts.gid`), which may hold locks without any
    /// backend. `None` where the server only said that there is one.
    Prepared(Option<Arc<str>>),
}

impl BackendId {
    /// The process id; `None` for a prepared transaction.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        match self {
            Self::Pid(pid) => Some(*pid),
            Self::Prepared(_) => None,
        }
    }

    /// The global identifier of a prepared transaction, where it is known.
    #[must_use]
    pub fn prepared_transaction(&self) -> Option<&str> {
        match self {
            Self::Pid(_) => None,
            Self::Prepared(gid) => gid.as_deref(),
        }
    }
}

impl From<i32> for BackendId {
    fn from(pid: i32) -> Self {
        Self::Pid(pid)
    }
}

/// `pid 4711` or `prepared transaction "order-7"`.
impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "pid {pid}"),
            Self::Prepared(Some(gid)) => write!(f, "prepared transaction {gid:?}"),
            Self::Prepared(None) => f.write_str("a prepared transaction"),
        }
    }
}

/// How much of a backend was there to be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sight {
    /// No row of `pg_stat_activity`: it had ended when that was read.
    #[default]
    Gone,
    /// All but what is for its own role and `pg_read_all_stats` only.
    Hidden,
    Whole,
}

/// A backend, or a prepared transaction, that waits for a lock or is in the way of one.
///
/// What the role that looked may not see is `None`: it means *unknown*, never *idle*. A role without
/// `pg_read_all_stats` sees of the backends of other roles the process id, `application_name`, role and database, and
/// nothing else (PostgreSQL's documentation, "The Cumulative Statistics System", `pg_stat_activity`); then
/// [`is_hidden`](Self::is_hidden) is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    pub(crate) id: BackendId,
    pub(crate) sight: Sight,
    pub(crate) backend_start: Option<SystemTime>,
    pub(crate) transaction_start: Option<SystemTime>,
    pub(crate) application_name: Option<Box<str>>,
    pub(crate) user: Option<Box<str>>,
    pub(crate) database: Option<Box<str>>,
    pub(crate) client_address: Option<Box<str>>,
    pub(crate) backend_type: Option<Box<str>>,
    pub(crate) state: Option<Box<str>>,
    pub(crate) connected_for: Option<Duration>,
    pub(crate) in_transaction: Option<Duration>,
    pub(crate) since_statement: Option<Duration>,
    pub(crate) in_state: Option<Duration>,
    pub(crate) wait_event_type: Option<Box<str>>,
    pub(crate) wait_event: Option<Box<str>>,
    pub(crate) statement: Option<Verbatim>,
    pub(crate) query_id: Option<i64>,
    pub(crate) leader_pid: Option<i32>,
}

impl Backend {
    /// One of which nothing else is known.
    pub(crate) fn unknown(id: BackendId) -> Self {
        Self {
            id,
            sight: Sight::Gone,
            backend_start: None,
            transaction_start: None,
            application_name: None,
            user: None,
            database: None,
            client_address: None,
            backend_type: None,
            state: None,
            connected_for: None,
            in_transaction: None,
            since_statement: None,
            in_state: None,
            wait_event_type: None,
            wait_event: None,
            statement: None,
            query_id: None,
            leader_pid: None,
        }
    }

    /// What [`Edge`](super::Edge)s call it.
    #[must_use]
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// The process id; `None` for a prepared transaction, which has no backend.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.id.pid()
    }

    /// The global identifier of the prepared transaction: `COMMIT PREPARED` or `ROLLBACK PREPARED` ends it. Only where
    /// [`pid`](Self::pid) is `None`.
    #[must_use]
    pub fn prepared_transaction(&self) -> Option<&str> {
        self.id.prepared_transaction()
    }

    /// Whether parts were hidden from the role that looked, so that a `None` says nothing.
    #[must_use]
    pub fn is_hidden(&self) -> bool {
        self.sight == Sight::Hidden
    }

    /// Whether it had ended before it could be described: the locks are read a moment before the activity.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.sight == Sight::Gone
    }

    /// When the backend was started, to the microsecond: with the process id it tells a backend from all others.
    #[must_use]
    pub fn backend_start(&self) -> Option<SystemTime> {
        self.backend_start
    }

    /// When its open transaction began, to the microsecond, or when the transaction was prepared.
    #[must_use]
    pub fn transaction_start(&self) -> Option<SystemTime> {
        self.transaction_start
    }

    /// The backend's `application_name`, with the call site in it where it uses this crate.
    #[must_use]
    pub fn application_name(&self) -> Option<&str> {
        self.application_name.as_deref()
    }

    /// The role the backend is logged in as, or that prepared the transaction.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// The database it is connected to; `None` for background processes without one too.
    #[must_use]
    pub fn database(&self) -> Option<&str> {
        self.database.as_deref()
    }

    /// The client's IP address; `None` for a client on a Unix socket and a background process too.
    #[must_use]
    pub fn client_address(&self) -> Option<&str> {
        self.client_address.as_deref()
    }

    /// What kind of process it is: `client backend`, `autovacuum worker`, `parallel worker`, …
    #[must_use]
    pub fn backend_type(&self) -> Option<&str> {
        self.backend_type.as_deref()
    }

    /// The backend's state in PostgreSQL's words: `active`, `idle`, `idle in transaction`, …
    #[must_use]
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }

    /// For how long it has been in that state.
    #[must_use]
    pub fn in_state(&self) -> Option<Duration> {
        self.in_state
    }

    /// Age of its open transaction, or since the transaction was prepared; `None` outside a transaction too.
    #[must_use]
    pub fn in_transaction(&self) -> Option<Duration> {
        self.in_transaction
    }

    /// Since its statement began: the running one, or the last one where the backend is idle.
    #[must_use]
    pub fn since_statement(&self) -> Option<Duration> {
        self.since_statement
    }

    /// Age of the connection.
    #[must_use]
    pub fn connected_for(&self) -> Option<Duration> {
        self.connected_for
    }

    /// What kind of thing it waits for, in PostgreSQL's words (`Lock`, `Client`, `IO`, …); `None` where it runs too.
    #[must_use]
    pub fn wait_event_type(&self) -> Option<&str> {
        self.wait_event_type.as_deref()
    }

    /// What it waits for, in PostgreSQL's words (`transactionid`, `ClientRead`, …).
    #[must_use]
    pub fn wait_event(&self) -> Option<&str> {
        self.wait_event.as_deref()
    }

    /// The text of its statement, as the client sent it, with all literals: the running one, or the last one where the
    /// backend is idle. The server keeps its first 1024 bytes (`track_activity_query_size`).
    ///
    /// Never shown by `Display` and `Debug`.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.statement.as_ref().map(|statement| &*statement.0)
    }

    /// The statement's identifier (`compute_query_id`), as in `pg_stat_statements.queryid`.
    #[must_use]
    pub fn query_id(&self) -> Option<i64> {
        self.query_id
    }

    /// The leader of the parallel query that this backend is a worker of.
    #[must_use]
    pub fn leader_pid(&self) -> Option<i32> {
        self.leader_pid
    }
}

/// A statement's text, which `Debug` does not show: it may carry what is nobody's business.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Verbatim(pub(crate) Box<str>);

impl fmt::Debug for Verbatim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&statement::redact(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_shown_with_what_they_are() {
        assert_eq!(BackendId::from(7).to_string(), "pid 7");
        let prepared = BackendId::Prepared(Some("order-7".into()));
        assert_eq!(prepared.to_string(), "prepared transaction \"order-7\"");
        assert_eq!(
            BackendId::Prepared(None).to_string(),
            "a prepared transaction"
        );
        assert_eq!(
            (prepared.pid(), prepared.prepared_transaction()),
            (None, Some("order-7"))
        );
    }

    #[test]
    fn debug_tells_no_literal() {
        let mut backend = Backend::unknown(7.into());
        backend.statement = Some(Verbatim("UPDATE users SET password = 'secret'".into()));
        assert!(!format!("{backend:?}").contains("secret"));
        assert_eq!(
            backend.statement(),
            Some("UPDATE users SET password = 'secret'")
        );
    }

    #[test]
    fn nothing_known_is_not_hidden() {
        let backend = Backend::unknown(7.into());
        assert!(backend.is_gone() && !backend.is_hidden());
        assert_eq!(backend.state(), None);
    }
}
