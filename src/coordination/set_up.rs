//! Making the tables that coordination needs, once, whoever comes first.

use super::{Coordination, begin_error, sql};
use crate::error::{Error, is_insufficient_privilege, is_missing_table};
use crate::key::LockKey;
use crate::postgres::TableName;

/// What there is to set up.
pub(super) struct SetUp<'a> {
    pub(super) tables: &'a [&'a TableName],
    /// Makes the tables.
    pub(super) create: String,
    /// Whether there is nothing more to do, once there are tables.
    pub(super) is_done: Option<String>,
    /// What there is to do more.
    pub(super) finish: Option<String>,
    /// Where its SQL is found.
    pub(super) documented: &'a str,
}

/// Sets it up in one transaction, unless all is there. Sessions that do so at the same time wait for one another. Where
/// nothing is missing, nothing is written, so that a role may call it that could not create a table.
///
/// Cancel safety: dropped, the transaction is rolled back in the background.
pub(super) async fn set_up(coordination: &Coordination, what: &SetUp<'_>) -> Result<(), Error> {
    let key = LockKey::from(("lockkeeper set_up", what.tables[0].to_string()));
    let guard = coordination
        .lock(key)
        .acquire()
        .await
        .map_err(begin_error)?;
    let explain = |error: tokio_postgres::Error| {
        let error = Error::from(error);
        let schema = what.tables[0].schema().unwrap_or_default();
        if is_insufficient_privilege(&error) {
            error.with_detail(format!(
                "this role may not set up {}: GRANT CREATE ON SCHEMA {schema:?}, or have the SQL of {} run by another role",
                what.tables[0], what.documented
            ))
        } else if is_missing_table(&error) {
            error.with_detail(format!(
                "there is no schema {schema:?}; create it, or name another one with KeeperBuilder::coordination_schema"
            ))
        } else {
            error
        }
    };
    let ask = async |sql: &str| guard.simple_query(sql).await.map_err(explain);
    if !sql::is_yes(&ask(&sql::are_there(what.tables)).await?) {
        ask(&what.create).await?;
    }
    if let (Some(is_done), Some(finish)) = (&what.is_done, &what.finish)
        && !sql::is_yes(&ask(is_done).await?)
    {
        ask(finish).await?;
    }
    guard.commit().await
}
