//! One backend, or one prepared transaction, as seen in `pg_stat_activity` or `pg_prepared_xacts`.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::postgres::statement;

/// Identifies a participant within one [`Snapshot`](super::Snapshot): the process id of a backend, or the global
/// identifier of a prepared transaction.
///
/// Later backends reuse process ids. Between snapshots, compare [`Backend::backend_start`] too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum BackendId {
    /// A backend, by its process id. For a parallel query it is the leader.
    Pid(i32),
    /// A prepared transaction, by its global identifier (`pg_prepared_xacts.gid`). It holds locks without a backend.
    /// `None` if the server only reported that a prepared transaction blocks.
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

    /// The global identifier of a prepared transaction, if known.
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

/// How much of a backend was visible to the role that took the snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// No row in `pg_stat_activity`: the backend had ended when that was read.
    #[default]
    Gone,
    /// Without the columns that only its own role and `pg_read_all_stats` may read.
    Hidden,
    Full,
}

/// A backend, or a prepared transaction, that waits for a lock or blocks one that waits.
///
/// A value that the querying role may not see is `None`: it means *unknown*, never *idle*. For backends of other roles, a
/// role without `pg_read_all_stats` sees only the process id, `application_name`, role and database (PostgreSQL's
/// documentation, "The Cumulative Statistics System", `pg_stat_activity`). Then [`is_hidden`](Self::is_hidden) is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    pub(crate) id: BackendId,
    pub(crate) visibility: Visibility,
    pub(crate) backend_start: Option<SystemTime>,
    pub(crate) transaction_start: Option<SystemTime>,
    pub(crate) application_name: Option<Box<str>>,
    pub(crate) user: Option<Box<str>>,
    pub(crate) database: Option<Box<str>>,
    pub(crate) client_address: Option<Box<str>>,
    pub(crate) backend_type: Option<Box<str>>,
    pub(crate) state: Option<Box<str>>,
    pub(crate) connection_age: Option<Duration>,
    pub(crate) transaction_age: Option<Duration>,
    pub(crate) statement_age: Option<Duration>,
    pub(crate) state_age: Option<Duration>,
    pub(crate) wait_event_type: Option<Box<str>>,
    pub(crate) wait_event: Option<Box<str>>,
    pub(crate) statement: Option<RawStatement>,
    pub(crate) query_id: Option<i64>,
    pub(crate) leader_pid: Option<i32>,
}

impl Backend {
    /// A backend of which only the id is known.
    pub(crate) fn unknown(id: BackendId) -> Self {
        Self {
            id,
            visibility: Visibility::Gone,
            backend_start: None,
            transaction_start: None,
            application_name: None,
            user: None,
            database: None,
            client_address: None,
            backend_type: None,
            state: None,
            connection_age: None,
            transaction_age: None,
            statement_age: None,
            state_age: None,
            wait_event_type: None,
            wait_event: None,
            statement: None,
            query_id: None,
            leader_pid: None,
        }
    }

    /// The id used in [`Edge`](super::Edge).
    #[must_use]
    pub fn id(&self) -> &BackendId {
        &self.id
    }

    /// The process id; `None` for a prepared transaction, which has no backend.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.id.pid()
    }

    /// The global identifier of the prepared transaction, which `COMMIT PREPARED` or `ROLLBACK PREPARED` ends. Only if
    /// [`pid`](Self::pid) is `None`.
    #[must_use]
    pub fn prepared_transaction(&self) -> Option<&str> {
        self.id.prepared_transaction()
    }

    /// Whether parts were hidden from the querying role, so that a `None` means unknown.
    #[must_use]
    pub fn is_hidden(&self) -> bool {
        self.visibility == Visibility::Hidden
    }

    /// Whether the backend had ended before it was read: the locks are read a moment before the activity.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.visibility == Visibility::Gone
    }

    getters! {
        /// When the backend was started, to the microsecond. Together with the process id it identifies the backend.
        backend_start: Option<SystemTime>;

        /// When the open transaction began, to the microsecond, or when the transaction was prepared.
        transaction_start: Option<SystemTime>;

        /// The backend's `application_name`, which contains the call site if the session uses this crate. A worker of a
        /// subscription has none, and is named by it: `subscription orders`.
        text application_name;

        /// The role that the backend is logged in as, or that prepared the transaction.
        text user;

        /// The database that it is connected to; also `None` for background processes without one.
        text database;

        /// The client's IP address; also `None` for a client on a Unix socket and for a background process.
        text client_address;

        /// The kind of process: `client backend`, `autovacuum worker`, `parallel worker`, …
        text backend_type;

        /// The backend's state as PostgreSQL names it: `active`, `idle`, `idle in transaction`, …
        text state;

        /// How long the backend has been in that state.
        state_age: Option<Duration>;

        /// The age of the open transaction, or the time since the transaction was prepared; also `None` outside a transaction.
        transaction_age: Option<Duration>;

        /// The time since the statement began: the running one, or the last one if the backend is idle.
        statement_age: Option<Duration>;

        /// The age of the connection.
        connection_age: Option<Duration>;

        /// The type of event that it waits for, as PostgreSQL names it (`Lock`, `Client`, `IO`, …); also `None` if it runs.
        text wait_event_type;

        /// The event that it waits for, as PostgreSQL names it (`transactionid`, `ClientRead`, …).
        text wait_event;
    }

    /// The [`statement`](Self::statement), unless it is idle since one that this crate sent of its own accord: that is not what
    /// the application ran last.
    pub(crate) fn shown_statement(&self) -> Option<&str> {
        let is_active = self.state() == Some("active");
        self.statement()
            .filter(|text| is_active || !statement::is_own(text))
    }

    /// The text of the statement as the client sent it, with all literals: the running one, or the last one if the backend
    /// is idle. The server keeps its first 1024 bytes (`track_activity_query_size`).
    ///
    /// `Display` and `Debug` never show the literals.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.statement.as_ref().map(|statement| &*statement.0)
    }

    getters! {
        /// The statement's identifier (`compute_query_id`), as in `pg_stat_statements.queryid`.
        query_id: Option<i64>;

        /// The leader of the parallel query, if this backend is a parallel worker.
        leader_pid: Option<i32>;
    }
}

/// A statement's text with its literals, which `Debug` redacts because they may be confidential.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct RawStatement(pub(crate) Box<str>);

impl fmt::Debug for RawStatement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&statement::redact(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_displayed_with_its_kind() {
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
    fn debug_shows_no_literal() {
        let mut backend = Backend::unknown(7.into());
        backend.statement = Some(RawStatement("UPDATE users SET password = 'secret'".into()));
        assert!(!format!("{backend:?}").contains("secret"));
        assert_eq!(
            backend.statement(),
            Some("UPDATE users SET password = 'secret'")
        );
    }

    #[test]
    fn an_unknown_backend_is_not_hidden() {
        let backend = Backend::unknown(7.into());
        assert!(backend.is_gone() && !backend.is_hidden());
        assert_eq!(backend.state(), None);
    }
}
