//! What a change really locks, found out by doing it and rolling it back.

use std::fmt;

use super::ddl::{self, Block};
use super::pace::Pace;
use super::run::Context;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::sql::catalog;
use crate::transaction;
use crate::transaction::sql::Begin;

/// What a change has really locked: [`Schema::dry_run`](crate::Schema::dry_run).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    locks: Vec<(TableName, LockMode)>,
}

impl DryRun {
    /// Every relation it had locked in the end, those that it created too, with the strongest mode of each; sorted by
    /// name.
    #[must_use]
    pub fn locks(&self) -> &[(TableName, LockMode)] {
        &self.locks
    }

    /// The mode in which it had locked a relation.
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

/// A lock a line.
impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (name, mode)) in self.locks.iter().enumerate() {
            let line = if n == 0 { "" } else { "\n" };
            write!(f, "{line}{} on {name}", mode.as_sql())?;
        }
        Ok(())
    }
}

/// Cancel safety: dropped, the transaction is rolled back in the background.
pub(super) async fn run(cx: &Context, pace: &Pace, sql: &str) -> Result<DryRun, Error> {
    pace.check()?;
    if let Some(flaw) = ddl::flaw(sql) {
        return Err(Error::config(flaw));
    }
    for statement in ddl::read(sql) {
        if statement.block != Block::May {
            return Err(Error::config(format!(
                "{:?} cannot run in a transaction, or would end it, and so could not be rolled back",
                statement.text
            )));
        }
    }
    let begin = Begin {
        application_name: Some(cx.application_name.clone()),
        lock_timeout: Some(pace.lock_timeout),
        statement_timeout: pace.statement_timeout,
        ..Begin::default()
    };
    let wait = Deadline::after(cx.lock_wait);
    let tx = transaction::open(cx.connections(), &wait, &begin, cx.call_site, cx.lock_wait).await?;
    let looked = async {
        tx.batch_execute(sql).await?;
        let rows = tx.simple_query(catalog::OWN_LOCKS).await?;
        Ok::<_, tokio_postgres::Error>(rows)
    };
    let looked = looked.await;
    tx.rollback().await;
    let own = match looked {
        Ok(reply) => catalog::own_locks(&reply),
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
    // Rolled back, what it dropped has its name again.
    let nameless = own.iter().filter(|lock| lock.name.is_none());
    let dropped: Vec<u32> = nameless.map(|lock| lock.oid).collect();
    let dropped = if dropped.is_empty() {
        Vec::new()
    } else {
        catalog::names(&cx.ask(&catalog::names_of(&dropped)).await?)
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
        // The tables beside tables are nobody's to lock but through them.
        .filter(|(name, _)| name.schema() != Some("pg_toast"))
        .collect();
    all.sort();
    let mut locks: Vec<(TableName, LockMode)> = Vec::new();
    for (name, mode) in all {
        match locks.last_mut() {
            // Sorted, so that the strongest comes last.
            Some(last) if last.0 == name => last.1 = mode,
            _ => locks.push((name, mode)),
        }
    }
    Ok(DryRun { locks })
}
