//! Finds out what a change locks by running it and rolling it back.

use std::fmt;

use super::Env;
use super::ddl::{self, Placement};
use super::options::ChangeOptions;
use crate::error::{Error, ErrorKind};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::postgres::text::Joined;
use crate::schema::sql::catalog;
use crate::transaction::sql::Begin;

/// The locks that a change took before it was rolled back: [`Schema::dry_run`](crate::Schema::dry_run).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    locks: Vec<(TableName, LockMode)>,
}

impl DryRun {
    /// Every relation that was locked at the end of the change, including new ones, with its strongest mode; sorted by
    /// name.
    #[must_use]
    pub fn locks(&self) -> &[(TableName, LockMode)] {
        &self.locks
    }

    /// The mode in which the change had locked a relation.
    #[must_use]
    pub fn mode_on(&self, relation: impl Into<TableName>) -> Option<LockMode> {
        let wanted = relation.into();
        let mut all = self.locks.iter();
        let found = all.find(|(name, _)| {
            name.name() == wanted.name()
                && wanted
                    .schema()
                    .is_none_or(|schema| name.schema() == Some(schema))
        });
        found.map(|(_, mode)| *mode)
    }
}

/// One lock per line.
impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let locks = self.locks.iter();
        let locks = locks.map(|(name, mode)| format!("{} on {name}", mode.as_sql()));
        Joined(&locks.collect::<Vec<_>>(), "\n").fmt(f)
    }
}

/// Cancel safety: dropped, the transaction is rolled back in the background.
pub(super) async fn run(env: &Env, options: &ChangeOptions, sql: &str) -> Result<DryRun, Error> {
    options.check()?;
    if let Some(flaw) = ddl::flaw(sql) {
        return Err(Error::config(flaw));
    }
    for statement in ddl::read(sql) {
        if statement.placement != Placement::InTransaction {
            return Err(Error::config(format!(
                "{:?} cannot run in a transaction, or would end it, and so could not be rolled back",
                statement.text
            )));
        }
    }
    let begin = Begin {
        lock_timeout: Some(options.lock_timeout),
        statement_timeout: options.statement_timeout,
        ..env.begin()
    };
    let tx = env.open(&begin).await?;
    let locked = async {
        tx.batch_execute(sql).await?;
        let rows = tx.simple_query(catalog::OWN_LOCKS).await?;
        Ok::<_, tokio_postgres::Error>(rows)
    };
    let locked = locked.await;
    tx.rollback().await;
    let own = match locked {
        Ok(reply) => catalog::read_own_locks(&reply),
        Err(error) => {
            let error = Error::from(error);
            return Err(match error.kind() {
                ErrorKind::LockTimeout => {
                    error.with_detail("others were in the way of the dry run")
                }
                _ => error,
            });
        }
    };
    // After the rollback, dropped relations have their names again.
    let nameless = own.iter().filter(|lock| lock.name.is_none());
    let dropped: Vec<u32> = nameless.map(|lock| lock.oid).collect();
    let dropped = if dropped.is_empty() {
        Vec::new()
    } else {
        catalog::read_names(&env.ask(&catalog::names_of(&dropped)).await?)
    };
    let named = |oid| dropped.iter().find(|(of, _)| *of == oid);
    let mut all: Vec<(TableName, LockMode)> = own
        .into_iter()
        .filter_map(|lock| {
            let name = lock
                .name
                .or_else(|| named(lock.oid).map(|(_, name)| name.clone()));
            Some((name?, lock.mode))
        })
        // TOAST tables are locked only together with their tables.
        .filter(|(name, _)| name.schema() != Some("pg_toast"))
        .collect();
    all.sort();
    let mut locks: Vec<(TableName, LockMode)> = Vec::new();
    for (name, mode) in all {
        match locks.last_mut() {
            // The locks are sorted, so the strongest mode of a relation comes last.
            Some(last) if last.0 == name => last.1 = mode,
            _ => locks.push((name, mode)),
        }
    }
    Ok(DryRun { locks })
}
