//! The table that records which migrations are done.

use super::catalog::is_named;
use crate::postgres::sql::{in_ascii, literal};
use crate::postgres::table_name::TableName;

/// The table's name.
pub(crate) const TABLE: &str = "lockkeeper_migration";

pub(crate) fn is_there(table: &TableName) -> String {
    format!(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class AS c \
         JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE {}) AS yes",
        is_named(table)
    )
}

/// Two sessions that run this at the same time can conflict in the catalogs in spite of IF NOT EXISTS; then one of them
/// fails.
pub(crate) fn create(table: &TableName) -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS {table} (key pg_catalog.text PRIMARY KEY, \
         done_at pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.now(), \
         done_by pg_catalog.text NOT NULL)"
    )
}

pub(crate) fn is_done(table: &TableName, key: &str) -> String {
    format!(
        "SELECT EXISTS (SELECT FROM {table} AS m WHERE pg_catalog.texteq(m.key, {})) AS yes",
        literal(&in_ascii(key))
    )
}

pub(crate) fn done(table: &TableName, key: &str, by: &str) -> String {
    format!(
        "INSERT INTO {table} (key, done_by) VALUES ({}, {} OPERATOR(pg_catalog.||) \
         (' as ' OPERATOR(pg_catalog.||) CURRENT_USER::pg_catalog.text)) ON CONFLICT DO NOTHING",
        literal(&in_ascii(key)),
        literal(&in_ascii(by))
    )
}

/// Whether the transaction began before this statement.
pub(crate) const IN_TRANSACTION: &str = "SELECT pg_catalog.transaction_timestamp() \
    OPERATOR(pg_catalog.<) pg_catalog.statement_timestamp() AS yes";

/// Whether there is a backend with this pid. Needs no lock and no privilege.
pub(crate) fn is_alive(pid: i32) -> String {
    format!("SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity({pid})) AS yes")
}
