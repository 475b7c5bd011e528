//! Running a statement outside of a transaction, under settings of the session that are put back.

use tokio_postgres::SimpleQueryMessage;

use crate::deadline::timeout_millis;
use crate::sql::{literal, parsed, rows, text};
use std::time::Duration;

/// The settings of a session before ours.
#[derive(Clone, Debug)]
pub(crate) struct Before {
    pub(crate) pid: i32,
    lock_timeout: String,
    statement_timeout: String,
    application_name: String,
}

/// Tells the settings and sets others: one statement, so all or none. Without a timeout there is none.
///
/// They are the session's, since the statement behind may not stand in a transaction.
pub(crate) fn set(
    lock_timeout: Option<Duration>,
    statement_timeout: Option<Duration>,
    application_name: &str,
) -> String {
    let millis = |timeout: Option<Duration>| timeout.map_or(0, timeout_millis);
    format!(
        "SELECT pg_catalog.pg_backend_pid() AS pid, b.l, b.s, b.a, pg_catalog.set_config('lock_timeout', '{}', false), \
         pg_catalog.set_config('statement_timeout', '{}', false), pg_catalog.set_config('application_name', {}, false) \
         FROM (SELECT pg_catalog.current_setting('lock_timeout') AS l, pg_catalog.current_setting('statement_timeout') AS s, \
         pg_catalog.current_setting('application_name') AS a OFFSET 0) AS b",
        millis(lock_timeout),
        millis(statement_timeout),
        literal(application_name)
    )
}

pub(crate) fn before(reply: &[SimpleQueryMessage]) -> Option<Before> {
    let row = rows(reply).next()?;
    Some(Before {
        pid: parsed(row, "pid")?,
        lock_timeout: text(row, "l")?,
        statement_timeout: text(row, "s")?,
        application_name: text(row, "a")?,
    })
}

impl Before {
    /// Puts them back.
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
