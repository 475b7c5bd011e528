//! Settings and privileges: the SQL of [`crate::Monitor::settings`], and of the fixes.

use tokio_postgres::SimpleQueryMessage;

use super::health::{LOCK_TABLE_USAGE, SHARED_LOCKS};
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};

/// The settings in force for the session that runs this query, and its role, database and server.
///
/// `pg_settings` has the values in force, regardless of their origin; `source` says which origin takes precedence.
pub(crate) const SETTINGS: &str = "SELECT SESSION_USER AS role, pg_catalog.current_database() AS database, \
     pg_catalog.pg_is_in_recovery() AS standby, pg_catalog.pg_backend_pid() AS pid; \
     SELECT s.name AS setting, s.setting AS value, s.source, pg_catalog.current_setting(s.name) AS shown \
     FROM pg_catalog.pg_settings AS s WHERE s.name OPERATOR(pg_catalog.=) ANY \
     ('{deadlock_timeout,lock_timeout,log_lock_waits,log_line_prefix,log_destination,\
     idle_in_transaction_session_timeout,client_connection_check_interval,max_locks_per_transaction}'::pg_catalog.text[])";

/// One setting.
#[derive(Clone, Debug)]
pub(crate) struct SettingRow {
    pub(crate) name: String,
    /// In the setting's own unit, which is not part of it.
    pub(crate) value: String,
    /// As `SHOW` writes it, with the unit.
    pub(crate) shown: String,
    /// The origin of the value, as `pg_settings.source` names it.
    pub(crate) source: String,
}

/// The session of the pool that the settings were read on.
#[derive(Clone, Debug)]
pub(crate) struct PoolSession {
    /// The role it logged in as, whose settings it has.
    pub(crate) role: String,
    pub(crate) database: String,
    pub(crate) standby: bool,
    pub(crate) pid: i32,
}

/// Reads the reply to [`SETTINGS`].
pub(crate) fn read_settings(
    reply: &[SimpleQueryMessage],
) -> Option<(PoolSession, Vec<SettingRow>)> {
    let mut rows = rows(reply);
    let first = rows.next()?;
    let session = PoolSession {
        role: text(first, "role")?,
        database: text(first, "database")?,
        standby: is_true(first, "standby"),
        pid: parsed(first, "pid")?,
    };
    let settings = rows
        .map(|row| {
            Some(SettingRow {
                name: text(row, "setting")?,
                value: text(row, "value")?,
                shown: text(row, "shown")?,
                source: text(row, "source")?,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    Some((session, settings))
}

/// The privileges of the current role, and how full the lock table is. The server itself checks `USAGE` of
/// `CURRENT_USER`: membership whose privileges are inherited, not only available by SET ROLE. A role that may not read
/// `pg_locks` cannot ask for the lock table.
pub(crate) fn monitoring_role(reads_locks: bool) -> String {
    let (locks, lock_table) = if reads_locks {
        (
            format!("WITH {SHARED_LOCKS} "),
            format!(", {LOCK_TABLE_USAGE}"),
        )
    } else {
        <(String, String)>::default()
    };
    format!(
        "{locks}SELECT CURRENT_USER AS role, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_read_all_stats', 'USAGE') AS reads, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_signal_backend', 'USAGE') AS signals, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_read_all_stats', 'MEMBER') AS may_read, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_signal_backend', 'MEMBER') AS may_signal, \
         (SELECT r.rolinherit FROM pg_catalog.pg_roles AS r WHERE pg_catalog.nameeq(r.rolname, CURRENT_USER)) AS inherits, \
         pg_catalog.current_setting('server_version_num') AS version{lock_table}"
    )
}

/// How a role has the privileges of another role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    None,
    /// Only after SET ROLE.
    Uninherited,
    Full,
}

/// The role that monitors.
#[derive(Clone, Debug)]
pub(crate) struct MonitoringRole {
    pub(crate) name: String,
    pub(crate) reads_all_stats: Membership,
    pub(crate) signals: Membership,
    /// Whether it inherits the privileges of the roles granted to it, unless a grant says otherwise.
    pub(crate) inherits: bool,
    /// 150018 for 15.18.
    pub(crate) version: u32,
    /// The lock table's entries and capacity; `None` where it may not read `pg_locks`.
    pub(crate) lock_table: Option<(u64, u64)>,
}

/// Reads the reply to [`monitoring_role`].
pub(crate) fn read_monitoring_role(reply: &[SimpleQueryMessage]) -> Option<MonitoringRole> {
    let row = rows(reply).next()?;
    let membership = |has: &str, is_member: &str| match (is_true(row, has), is_true(row, is_member))
    {
        (true, _) => Membership::Full,
        (false, true) => Membership::Uninherited,
        (false, false) => Membership::None,
    };
    Some(MonitoringRole {
        name: text(row, "role")?,
        reads_all_stats: membership("reads", "may_read"),
        signals: membership("signals", "may_signal"),
        inherits: is_true(row, "inherits"),
        version: parsed(row, "version")?,
        lock_table: parsed(row, "entries").zip(parsed(row, "capacity")),
    })
}

/// Changes a setting for the whole server.
pub(crate) fn alter_system(setting: &str, value: &str) -> String {
    format!("ALTER SYSTEM SET {setting} = {}", literal(value))
}

/// Changes a setting for the sessions of a role, in one database or in all.
pub(crate) fn alter_role(role: &str, database: Option<&str>, setting: &str, value: &str) -> String {
    let database = database.map_or_else(String::new, |database| {
        format!(" IN DATABASE {}", identifier(database))
    });
    format!(
        "ALTER ROLE {}{database} SET {setting} = {}",
        identifier(role),
        literal(value)
    )
}

/// Grants what every role has by default.
pub(crate) fn grant_pg_locks(role: &str) -> String {
    format!(
        "GRANT SELECT ON pg_catalog.pg_locks TO {}",
        identifier(role)
    )
}

/// Grants membership in a predefined role.
///
/// Whether a member inherits the privileges is a property of the grant since version 16, and of the member before
/// (PostgreSQL's documentation, `GRANT`, `CREATE ROLE`).
pub(crate) fn grant(privileges: &str, has: Membership, member: &MonitoringRole) -> String {
    let role = identifier(&member.name);
    let inherits = member.inherits && has == Membership::None;
    match (inherits, has) {
        (true, _) => format!("GRANT {privileges} TO {role}"),
        (false, _) if member.version >= 160_000 => {
            format!("GRANT {privileges} TO {role} WITH INHERIT TRUE")
        }
        (false, Membership::None) => format!("GRANT {privileges} TO {role}"),
        (false, _) => format!("ALTER ROLE {role} INHERIT"),
    }
}
