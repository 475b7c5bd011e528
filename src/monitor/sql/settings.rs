//! Settings and privileges: the server's side of [`crate::Monitor::settings`], and what mends them.

use tokio_postgres::SimpleQueryMessage;

use super::health::{FILL, TABLE};
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};

/// Settings as the session that asks sees them, and where it is.
///
/// Those in `pg_settings` are the values in force, however they came to be; `source` says which of all places won.
pub(crate) const SEEN: &str = "SELECT SESSION_USER AS place, pg_catalog.current_database() AS database, \
     pg_catalog.pg_is_in_recovery() AS standby, pg_catalog.pg_backend_pid() AS pid; \
     SELECT s.name AS setting, s.setting AS value, s.source, pg_catalog.current_setting(s.name) AS shown \
     FROM pg_catalog.pg_settings AS s WHERE s.name OPERATOR(pg_catalog.=) ANY \
     ('{deadlock_timeout,lock_timeout,log_lock_waits,log_line_prefix,log_destination,\
     idle_in_transaction_session_timeout,client_connection_check_interval,max_locks_per_transaction}'::pg_catalog.text[])";

/// One setting.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) name: String,
    /// In the setting's own unit, which is not told with it.
    pub(crate) value: String,
    /// As `SHOW` writes it, unit and all.
    pub(crate) shown: String,
    /// Where the value comes from, in the words of `pg_settings.source`.
    pub(crate) source: String,
}

/// The session that was asked.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The role it logged in as, whose settings it got.
    pub(crate) role: String,
    pub(crate) database: String,
    pub(crate) standby: bool,
    pub(crate) pid: i32,
}

/// Reads the answer to [`SEEN`].
pub(crate) fn seen(reply: &[SimpleQueryMessage]) -> Option<(Place, Vec<Setting>)> {
    let mut rows = rows(reply);
    let first = rows.next()?;
    let place = Place {
        role: text(first, "place")?,
        database: text(first, "database")?,
        standby: is_true(first, "standby"),
        pid: parsed(first, "pid")?,
    };
    let settings = rows
        .map(|row| {
            Some(Setting {
                name: text(row, "setting")?,
                value: text(row, "value")?,
                shown: text(row, "shown")?,
                source: text(row, "source")?,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    Some((place, settings))
}

/// What the role that asks may do, and how full the lock table is. `USAGE` is what the server asks for itself, of
/// `CURRENT_USER`: membership with the privileges at hand, not by SET ROLE only.
pub(crate) fn looker() -> String {
    format!(
        "WITH {TABLE} SELECT CURRENT_USER AS looker, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_read_all_stats', 'USAGE') AS reads, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_signal_backend', 'USAGE') AS signals, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_read_all_stats', 'MEMBER') AS may_read, \
         pg_catalog.pg_has_role(CURRENT_USER, 'pg_signal_backend', 'MEMBER') AS may_signal, \
         (SELECT r.rolinherit FROM pg_catalog.pg_roles AS r WHERE pg_catalog.nameeq(r.rolname, CURRENT_USER)) AS inherits, \
         pg_catalog.current_setting('server_version_num') AS version, {FILL}"
    )
}

/// What a role has of another's privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Membership {
    None,
    /// Only after SET ROLE.
    Uninherited,
    Full,
}

/// The role that looks.
#[derive(Clone, Debug)]
pub(crate) struct Looker {
    pub(crate) role: String,
    pub(crate) reads_all_stats: Membership,
    pub(crate) signals: Membership,
    /// Whether it has the privileges of what it is granted, where the grant says nothing else.
    pub(crate) inherits: bool,
    /// 150018 for 15.18.
    pub(crate) version: u32,
    /// The lock table's entries and capacity.
    pub(crate) entries: u64,
    pub(crate) capacity: u64,
}

/// Reads the answer to [`looker`].
pub(crate) fn read_looker(reply: &[SimpleQueryMessage]) -> Option<Looker> {
    let row = rows(reply).next()?;
    let membership = |has: &str, is_member: &str| match (is_true(row, has), is_true(row, is_member))
    {
        (true, _) => Membership::Full,
        (false, true) => Membership::Uninherited,
        (false, false) => Membership::None,
    };
    Some(Looker {
        role: text(row, "looker")?,
        reads_all_stats: membership("reads", "may_read"),
        signals: membership("signals", "may_signal"),
        inherits: is_true(row, "inherits"),
        version: parsed(row, "version")?,
        entries: parsed(row, "entries")?,
        capacity: parsed(row, "capacity")?,
    })
}

/// For the whole server.
pub(crate) fn alter_system(setting: &str, value: &str) -> String {
    format!("ALTER SYSTEM SET {setting} = {}", literal(value))
}

/// For the sessions of a role, in one database or in all.
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

/// Membership in one of the server's own roles.
///
/// Whether a member has the privileges is the grant's from version 16 on, and the member's before (PostgreSQL's
/// documentation, `GRANT`, `CREATE ROLE`).
pub(crate) fn grant(privileges: &str, has: Membership, looker: &Looker) -> String {
    let role = identifier(&looker.role);
    let inherits = looker.inherits && has == Membership::None;
    match (inherits, has) {
        (true, _) => format!("GRANT {privileges} TO {role}"),
        (false, _) if looker.version >= 160_000 => {
            format!("GRANT {privileges} TO {role} WITH INHERIT TRUE")
        }
        (false, Membership::None) => format!("GRANT {privileges} TO {role}"),
        (false, _) => format!("ALTER ROLE {role} INHERIT"),
    }
}
