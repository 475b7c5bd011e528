//! A change: one statement or a batch.

use super::Env;
use super::ddl::{self, Placement, Target};
use super::lint::{self, Allowed};
use super::options::{ChangeOptions, change_options, into_future};
use super::refusals;
use super::report::ChangeReport;
use super::run::Method;
use crate::error::{Error, ErrorKind};
use crate::postgres::TableName;
use crate::schema::sql::catalog;

/// A schema change: [`Schema::change`](crate::Schema::change). Awaiting it runs it.
#[must_use = "a change does nothing until it is awaited"]
#[derive(Clone, Debug)]
pub struct Change {
    env: Env,
    options: ChangeOptions,
    sql: String,
    allowed: Allowed,
}

impl Change {
    pub(super) fn new(env: Env, options: ChangeOptions, sql: String) -> Self {
        Self {
            env,
            options,
            sql,
            allowed: Allowed::default(),
        }
    }

    /// Allows statements that read a whole table while they block other sessions: CREATE INDEX without CONCURRENTLY,
    /// constraints that are checked at once, SET NOT NULL.
    pub fn allow_scan(mut self) -> Self {
        self.allowed.scan = true;
        self
    }

    /// Allows statements that rewrite a table while they block other sessions: VACUUM FULL, CLUSTER, a new column type,
    /// a volatile default. Includes [`allow_scan`](Self::allow_scan).
    pub fn allow_rewrite(mut self) -> Self {
        self.allowed.rewrite = true;
        self.allowed.scan = true;
        self
    }

    /// Allows statements that are not understood, and statements that are understood in part, such as DO, CALL, a query
    /// that calls a function of the database, or a form of ALTER TABLE that is newer than this library. What they lock, and
    /// for how long, is unknown.
    pub fn allow_unknown(mut self) -> Self {
        self.allowed.unknown = true;
        self
    }

    /// Makes the change.
    ///
    /// # SQL
    /// First, queries of the catalogs, which take no locks, except ACCESS SHARE to read the size of a table that the
    /// change would process, and the CHECKs of a partition that it would attach. Then for each attempt `BEGIN; SET LOCAL lock_timeout = …`, the caller's SQL in one
    /// message, and COMMIT; meanwhile another connection samples the blockers. A statement that cannot run in a
    /// transaction block is sent alone, under session settings that are restored afterwards. A statement with
    /// CONCURRENTLY waits up to the deadline, because no readers or writers queue behind it, and is not repeated: see
    /// [`create_index`](crate::Schema::create_index), which cleans up after it. `DETACH PARTITION … CONCURRENTLY` is an
    /// exception: readers of the partition queue behind its last step, so it waits no longer than other changes. If
    /// that leaves the detach pending, `DETACH PARTITION … FINALIZE` follows as a change of its own.
    ///
    /// # Errors
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout), [`Deadlock`](crate::ErrorKind::Deadlock) or
    /// [`Serialization`](crate::ErrorKind::Serialization), depending on the last attempt, if the deadline left no time
    /// for another attempt: with the [`blockers`](Error::blockers) of the last attempt, and all attempts in a
    /// [`ChangeFailed`](crate::ChangeFailed) as its source. [`Config`](crate::ErrorKind::Config), with the reason and a
    /// better way, if the change is refused; nothing has been changed then. So are CREATE INDEX … IF NOT EXISTS over an
    /// INVALID index, COPY … FROM STDIN, and a text that begins with a byte-order mark. Every other error of a statement is
    /// returned at once. After an error, nothing of the batch has been changed, except by statements outside of
    /// transactions, and except possibly after [`CommitUnknown`](crate::ErrorKind::CommitUnknown).
    ///
    /// # Cancel safety
    /// Can be dropped at any point: the statement that runs on the server is cancelled, its connection closed, and its
    /// transaction rolled back. If the future is dropped during COMMIT, the change may have been committed.
    ///
    /// # Longest silence
    /// That of each [change of the schema](crate::Schema#longest-silence).
    pub async fn run(self) -> Result<ChangeReport, Error> {
        self.options.check()?;
        if let Some(flaw) = refusals::file_flaw(&self.sql) {
            return Err(Error::config(flaw));
        }
        let statements = ddl::read(&self.sql);
        let method = match ddl::flaw(&self.sql) {
            Some(flaw) => return Err(Error::config(flaw)),
            None => method(&statements)?,
        };
        lint::check(
            &self.env,
            &statements,
            self.allowed,
            self.options.lock_timeout,
        )
        .await?;
        for statement in &statements {
            refusals::check_index(&self.env, statement.text).await?;
        }
        let detach = match method {
            Method::OutsideTransactionOnce => detach(&statements),
            _ => None,
        };
        match detach {
            Some((parent, partition)) => self.detach(&parent, &partition).await,
            None => self.env.run(&self.options, &self.sql, method).await,
        }
    }

    /// Runs the caller's DETACH PARTITION CONCURRENTLY, and FINALIZE if it is left pending. Only FINALIZE can be
    /// repeated.
    async fn detach(
        &self,
        parent: &TableName,
        partition: &TableName,
    ) -> Result<ChangeReport, Error> {
        let deadline = self.options.deadline();
        let pending = catalog::is_detach_pending(partition);
        let mut retry = self.options.retry(deadline, u32::MAX);
        loop {
            retry.begin();
            let options = self.options.until(&deadline);
            if self.env.is_yes(&pending).await? {
                let sql = catalog::finalize(parent, partition);
                return self.env.run(&options, &sql, Method::InTransaction).await;
            }
            let error = match self
                .env
                .run(&options, &self.sql, Method::OutsideTransactionOnce)
                .await
            {
                Err(error) if error.kind() == ErrorKind::LockTimeout => error,
                result => return result,
            };
            let Some(pause) = self.env.pause_before_retry(&retry) else {
                return Err(error);
            };
            // Cancel safety: no connection is held between two attempts.
            tokio::time::sleep(pause).await;
        }
    }
}

change_options!(Change);
into_future!(Change => ChangeReport);

/// How the batch can run.
fn method(statements: &[ddl::Statement<'_>]) -> Result<Method, Error> {
    if statements.is_empty() {
        return Err(Error::config("there is no statement to run"));
    }
    for statement in statements {
        match statement.placement {
            Placement::InTransaction => {}
            Placement::TransactionControl => {
                return Err(Error::config(format!(
                    "the batch runs in a transaction of its own, which {} would end or change; leave it out",
                    first_word(statement.text)
                )));
            }
            Placement::SessionSetting => {
                return Err(Error::config(format!(
                    "{:?} would stay on a connection of the pool, or change the lock_timeout of the attempt; what a batch \
                     sets it sets by LOCAL, and the timeout is the builder's to set",
                    statement.text
                )));
            }
            Placement::OutsideTransaction | Placement::Concurrently | Placement::Detach
                if statements.len() > 1 =>
            {
                return Err(Error::config(format!(
                    "a {} statement that cannot run in a transaction cannot be one of a batch of {}; make it a change of its own",
                    first_word(statement.text),
                    statements.len()
                )));
            }
            Placement::OutsideTransaction => return Ok(Method::OutsideTransaction),
            Placement::Concurrently => return Ok(Method::Concurrently),
            Placement::Detach => return Ok(Method::OutsideTransactionOnce),
        }
    }
    Ok(Method::InTransaction)
}

/// The partitioned table and the partition.
fn detach(statements: &[ddl::Statement<'_>]) -> Option<(TableName, TableName)> {
    let action = statements.first()?.actions.as_ref()?.first()?;
    match (&action.target, action.others.as_slice()) {
        (Target::Relation(parent), [(_, partition)]) => Some((parent.clone(), partition.clone())),
        _ => None,
    }
}

fn first_word(text: &str) -> String {
    let word = text.split_whitespace().next().unwrap_or_default();
    word.to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sql: &str) -> Result<Method, String> {
        method(&ddl::read(sql)).map_err(|error| error.to_string())
    }

    #[test]
    fn batches_run_in_a_transaction_and_concurrent_statements_alone() {
        assert_eq!(
            of("ALTER TABLE t ADD a int; DROP TABLE u"),
            Ok(Method::InTransaction)
        );
        assert_eq!(of("VACUUM t"), Ok(Method::OutsideTransaction));
        assert_eq!(of("DROP INDEX CONCURRENTLY i;"), Ok(Method::Concurrently));
        for sql in [
            "",
            "-- nothing",
            "BEGIN; DROP TABLE t; COMMIT",
            "DROP TABLE t; VACUUM t",
        ] {
            assert!(of(sql).is_err(), "{sql}");
        }
    }
}
