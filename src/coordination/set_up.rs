//! Making the tables that coordination needs, once, whoever comes first.

use super::{Coordination, begin_error, sql};
use crate::error::{Error, ErrorKind, is_insufficient_privilege, is_missing_table};
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
    /// What a role needs besides rights to the tables, behind those.
    pub(super) more_rights: &'a str,
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
    let table = what.tables[0];
    let explain = |error: tokio_postgres::Error, right: &str| {
        let error = Error::from(error);
        let schema = table.schema().unwrap_or_default();
        if is_insufficient_privilege(&error) {
            error.with_detail(format!(
                "this role may not set up {table}: {right}, or have the SQL of {} run by another role",
                what.documented
            ))
        } else if is_missing_table(&error) {
            error.with_detail(format!(
                "there is no schema {schema:?}; create it, or name another one with KeeperBuilder::coordination_schema"
            ))
        } else if error.kind() == ErrorKind::LockTimeout {
            error.with_detail(format!(
                "{table} is in use by a transaction that has not ended"
            ))
        } else {
            error
        }
    };
    let ask = async |sql: &str, right: &str| {
        let reply = guard.simple_query(sql).await;
        reply.map_err(|error| explain(error, right))
    };
    let change =
        async |sql: &str, right: &str| ask(&sql::waiting(sql, coordination.lock_wait), right).await;
    let tables: Vec<String> = what.tables.iter().map(ToString::to_string).collect();
    let tables = tables.join(", ");
    if !sql::is_yes(&ask(&sql::are_there(what.tables), "GRANT SELECT ON pg_class").await?) {
        let schema = table.schema().unwrap_or_default();
        change(
            &what.create,
            &format!("GRANT CREATE, USAGE ON SCHEMA {schema:?}"),
        )
        .await?;
    }
    let (read, write) = (
        format!(
            "GRANT SELECT ON {tables}, USAGE on their schema{}",
            what.more_rights
        ),
        format!(
            "GRANT SELECT, INSERT, UPDATE ON {tables}, USAGE on their schema{}",
            what.more_rights
        ),
    );
    if let (Some(is_done), Some(finish)) = (&what.is_done, &what.finish)
        && !sql::is_yes(&ask(is_done, &read).await?)
    {
        change(finish, &write).await?;
    }
    guard.commit().await
}
