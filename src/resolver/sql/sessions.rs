//! What is known about sessions besides their waits: what they must not be interrupted in.

use std::collections::HashSet;

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{is_true, parsed, rows, text};

/// The role and the backend that run this query, and which sessions are superusers', take a backup or build an index.
pub(crate) const SESSIONS: &str = "SELECT CURRENT_USER AS role, pg_catalog.current_database() AS database, \
     pg_catalog.pg_backend_pid() AS own, pg_catalog.current_setting('server_version_num') AS version, \
     pg_catalog.pg_has_role('pg_read_all_stats'::pg_catalog.name, 'MEMBER'::pg_catalog.text) AS is_member; \
     SELECT a.pid, r.rolsuper AND NOT pg_catalog.nameeq(r.rolname, CURRENT_USER) AS superuser, \
     EXISTS (SELECT FROM pg_catalog.pg_stat_progress_basebackup AS b \
     WHERE b.pid OPERATOR(pg_catalog.=) a.pid) AS backup, \
     EXISTS (SELECT FROM pg_catalog.pg_stat_progress_create_index AS b \
     WHERE b.pid OPERATOR(pg_catalog.=) a.pid) OR EXISTS (SELECT FROM pg_catalog.pg_stat_progress_cluster AS b \
     WHERE b.pid OPERATOR(pg_catalog.=) a.pid) AS builds FROM pg_catalog.pg_stat_activity AS a \
     JOIN pg_catalog.pg_roles AS r ON r.oid OPERATOR(pg_catalog.=) a.usesysid";

/// The reply to [`SESSIONS`].
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerSessions {
    /// The role that runs the query.
    pub(crate) role: Option<Box<str>>,
    /// The role is a member of `pg_read_all_stats`.
    pub(crate) is_stats_member: bool,
    pub(crate) version: u32,
    /// The database that the query runs in.
    pub(crate) database: Option<Box<str>>,
    /// The backend that runs the query.
    pub(crate) own_pid: Option<i32>,
    /// Sessions of superusers other than that role.
    pub(crate) superusers: HashSet<i32>,
    pub(crate) backups: HashSet<i32>,
    /// Sessions that build an index, or rewrite a table.
    pub(crate) builds: HashSet<i32>,
}

pub(crate) fn read_sessions(reply: &[SimpleQueryMessage]) -> Option<ServerSessions> {
    let mut rows = rows(reply);
    let first = rows.next()?;
    let mut found = ServerSessions {
        role: text(first, "role").map(Into::into),
        is_stats_member: is_true(first, "is_member"),
        version: parsed(first, "version").unwrap_or(0),
        database: text(first, "database").map(Into::into),
        own_pid: parsed(first, "own"),
        ..ServerSessions::default()
    };
    for row in rows {
        let Some(pid) = parsed(row, "pid") else {
            continue;
        };
        for (column, set) in [
            ("superuser", &mut found.superusers),
            ("backup", &mut found.backups),
            ("builds", &mut found.builds),
        ] {
            if is_true(row, column) {
                set.insert(pid);
            }
        }
    }
    Some(found)
}

/// The settings that decide how long a session waits for a lock, and what is recorded about it. They are listed by
/// name, so that no secret is among them.
pub(crate) const LOCK_SETTINGS: &str = "SELECT s.name, s.setting, s.unit, s.source FROM pg_catalog.pg_settings AS s \
     WHERE s.name OPERATOR(pg_catalog.=) ANY ('{autovacuum,client_connection_check_interval,deadlock_timeout,\
     default_transaction_isolation,idle_in_transaction_session_timeout,idle_session_timeout,lock_timeout,\
     log_lock_waits,log_line_prefix,max_connections,max_locks_per_transaction,max_prepared_transactions,\
     server_version,statement_timeout,superuser_reserved_connections,tcp_keepalives_count,tcp_keepalives_idle,\
     tcp_keepalives_interval,tcp_user_timeout,track_activities,track_activity_query_size,transaction_timeout}'\
     ::pg_catalog.text[]) ORDER BY s.name USING OPERATOR(pg_catalog.<)";

/// The rows of [`LOCK_SETTINGS`]: name, value, unit, source.
pub(crate) fn read_settings(
    reply: &[SimpleQueryMessage],
) -> impl Iterator<Item = (String, String, Option<String>, Option<String>)> {
    rows(reply).filter_map(|row| {
        Some((
            text(row, "name")?,
            text(row, "setting")?,
            text(row, "unit"),
            text(row, "source"),
        ))
    })
}
