//! The session settings under which a statement runs outside of a transaction, and their restoration.

use tokio_postgres::SimpleQueryMessage;

use crate::deadline::timeout_millis;
use crate::postgres::sql::{literal, parsed, rows, text};
use std::time::Duration;

/// The settings that a session had before.
#[derive(Clone, Debug)]
pub(crate) struct PreviousSettings {
    pub(crate) pid: i32,
    lock_timeout: String,
    statement_timeout: String,
    application_name: String,
}

/// Reads the settings and sets others in one statement, so all or none. `None` as a timeout disables it.
///
/// The settings are the session's, because the statement that follows cannot run in a transaction. So nothing is set on
/// a backend other than that of the login, if that is known: such a backend is a pooler's, and another client would
/// inherit the settings.
pub(crate) fn set(
    login_pid: Option<i32>,
    lock_timeout: Option<Duration>,
    statement_timeout: Option<Duration>,
    application_name: &str,
) -> String {
    let millis = |timeout: Option<Duration>| timeout.map_or(0, timeout_millis);
    let only = login_pid.map_or_else(String::new, |pid| {
        format!("WHEN b.pid OPERATOR(pg_catalog.<>) {pid} THEN NULL ")
    });
    let set = |name: &str, value: &str| {
        format!("CASE {only}WHEN true THEN pg_catalog.set_config('{name}', {value}, false) END")
    };
    format!(
        "SELECT b.pid, b.l, b.s, b.a, {}, {}, {} FROM (SELECT pg_catalog.pg_backend_pid() AS pid, \
         pg_catalog.current_setting('lock_timeout') AS l, pg_catalog.current_setting('statement_timeout') AS s, \
         pg_catalog.current_setting('application_name') AS a OFFSET 0) AS b",
        set("lock_timeout", &format!("'{}'", millis(lock_timeout))),
        set(
            "statement_timeout",
            &format!("'{}'", millis(statement_timeout))
        ),
        set("application_name", &literal(application_name)),
    )
}

pub(crate) fn read_previous(reply: &[SimpleQueryMessage]) -> Option<PreviousSettings> {
    let row = rows(reply).next()?;
    Some(PreviousSettings {
        pid: parsed(row, "pid")?,
        lock_timeout: text(row, "l")?,
        statement_timeout: text(row, "s")?,
        application_name: text(row, "a")?,
    })
}

impl PreviousSettings {
    /// The statement that restores the settings.
    pub(crate) fn restore(&self) -> String {
        format!(
            "SELECT pg_catalog.set_config('lock_timeout', {}, false), pg_catalog.set_config('statement_timeout', {}, false), \
             pg_catalog.set_config('application_name', {}, false)",
            literal(&self.lock_timeout),
            literal(&self.statement_timeout),
            literal(&self.application_name)
        )
    }
}
