//! The tables of coordination, and what is sent to them.

pub(crate) mod fencing;
pub(crate) mod once;
pub(crate) mod semaphore;

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use crate::deadline::timeout_millis;
use crate::postgres::TableName;
use crate::postgres::sql::{is_true, literal, rows};

/// Whether the tables are there.
pub(crate) fn are_there(tables: &[&TableName]) -> String {
    let each: Vec<String> = tables
        .iter()
        .map(|table| {
            format!(
                "EXISTS (SELECT FROM pg_catalog.pg_class AS c \
                 JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
                 WHERE c.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name \
                 AND n.nspname OPERATOR(pg_catalog.=) {}::pg_catalog.name)",
                literal(table.name()),
                literal(table.schema().unwrap_or_default()),
            )
        })
        .collect();
    format!("SELECT {} AS yes", each.join(" AND "))
}

/// Statements that wait no longer for a lock, and those after them in their transaction.
pub(crate) fn waiting(sql: &str, wait: Duration) -> String {
    let wait = timeout_millis(wait);
    format!("SELECT pg_catalog.set_config('lock_timeout', '{wait}', true); {sql}")
}

/// Whether the answer is `yes`.
pub(crate) fn is_yes(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "yes"))
}
