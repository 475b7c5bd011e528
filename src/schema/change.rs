//! One statement or a batch.

use super::ddl::{self, Block, Target};
use super::pace::{Pace, awaited, paced};
use super::refusal::{self, Allowed};
use super::report::ChangeReport;
use super::run::{Context, How};
use crate::error::{Error, ErrorKind};
use crate::postgres::TableName;
use crate::schema::sql::catalog;

/// A schema change to be made: [`Schema::change`](crate::Schema::change). Awaiting it runs it.
#[must_use = "a change does nothing until it is awaited"]
#[derive(Clone, Debug)]
pub struct Change {
    cx: Context,
    pace: Pace,
    sql: String,
    allowed: Allowed,
}

impl Change {
    pub(super) fn new(cx: Context, pace: Pace, sql: String) -> Self {
        Self {
            cx,
            pace,
            sql,
            allowed: Allowed::default(),
        }
    }

    /// Lets it read a whole table while others wait: CREATE INDEX without CONCURRENTLY, constraints that are checked at
    /// once, SET NOT NULL.
    pub fn allow_scan(mut self) -> Self {
        self.allowed.scan = true;
        self
    }

    /// Lets it rewrite a table while others wait: VACUUM FULL, CLUSTER, a new type of a column, a volatile default. Lets
    /// it read all of it, too.
    pub fn allow_rewrite(mut self) -> Self {
        self.allowed.rewrite = true;
        self.allowed.scan = true;
        self
    }

    /// Makes the change.
    ///
    /// # SQL
    /// Questions to the catalogs first, which lock nothing (but that the size of a table that the change would go through
    /// is asked under ACCESS SHARE). Then for each attempt `BEGIN; SET LOCAL lock_timeout = …`, the caller's text in one
    /// message, and COMMIT; meanwhile, on another connection, who is in the way. A statement that may not stand in a
    /// transaction is sent by itself, under settings of the session that are put back; one with CONCURRENTLY waits up to the
    /// deadline, since neither readers nor writers wait behind it, and is not repeated: see
    /// [`create_index`](crate::Schema::create_index) for what cleans up after it. But `DETACH PARTITION … CONCURRENTLY`, for
    /// which readers of the partition itself wait in the end, waits no longer than other changes; where that leaves the
    /// detach pending, `DETACH PARTITION … FINALIZE` follows, as a change of its own.
    ///
    /// # Errors
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) (or [`Deadlock`](crate::ErrorKind::Deadlock),
    /// [`Serialization`](crate::ErrorKind::Serialization), whatever the last attempt failed with) when the deadline left
    /// no time for another attempt: with the [`blockers`](Error::blockers) of the last one, and all attempts in a
    /// [`ChangeFailed`](crate::ChangeFailed) as its source. [`Config`](crate::ErrorKind::Config) for what is refused,
    /// with the reason and a better way, before anything is changed. Every other error of a statement at once. Nothing of
    /// the batch is changed after any of them, but by statements outside of transactions, and where
    /// [`CommitUnknown`](crate::ErrorKind::CommitUnknown) says so.
    ///
    /// # Cancel safety
    /// May be dropped at any point: what runs on the server is cancelled, its connection closed, and a transaction rolled
    /// back. Dropped during COMMIT, it may have committed.
    pub async fn run(self) -> Result<ChangeReport, Error> {
        self.pace.check()?;
        let statements = ddl::read(&self.sql);
        let how = match ddl::flaw(&self.sql) {
            Some(flaw) => return Err(Error::config(flaw)),
            None => how(&statements)?,
        };
        refusal::check(&self.cx, &statements, self.allowed, self.pace.lock_timeout).await?;
        let detach = match how {
            How::Once => detach(&statements),
            _ => None,
        };
        match detach {
            Some((parent, partition)) => self.detach(&parent, &partition).await,
            None => self.cx.run(&self.pace, &self.sql, how).await,
        }
    }

    /// What is begun by the caller's statement is ended by another that can be repeated.
    async fn detach(
        &self,
        parent: &TableName,
        partition: &TableName,
    ) -> Result<ChangeReport, Error> {
        let deadline = self.pace.deadline();
        let pending = catalog::is_detach_pending(partition);
        let mut attempt = 1;
        loop {
            let pace = self.pace.until(&deadline);
            if catalog::yes(&self.cx.ask(&pending).await?) {
                let sql = catalog::finalize(parent, partition);
                return self.cx.run(&pace, &sql, How::Transaction).await;
            }
            let error = match self.cx.run(&pace, &self.sql, How::Once).await {
                Err(error) if error.kind() == ErrorKind::LockTimeout => error,
                result => return result,
            };
            let pause = self.pace.pause(attempt, self.cx.jitter.next());
            if deadline.remaining() <= pause {
                return Err(error);
            }
            // Cancel safety: nothing is held between two attempts.
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }
}

paced!(Change);
awaited!(Change => ChangeReport);

/// Where the batch can run.
fn how(statements: &[ddl::Statement<'_>]) -> Result<How, Error> {
    if statements.is_empty() {
        return Err(Error::config("there is no statement to run"));
    }
    for statement in statements {
        match statement.block {
            Block::May => {}
            Block::Control => {
                return Err(Error::config(format!(
                    "the batch runs in a transaction of its own, which {} would end or change; leave it out",
                    first_word(statement.text)
                )));
            }
            Block::Setting => {
                return Err(Error::config(format!(
                    "{:?} would stay on a connection of the pool, or change the lock_timeout of the attempt; what a batch \
                     sets it sets by LOCAL, and the timeout is the builder's to set",
                    statement.text
                )));
            }
            Block::MustNot | Block::Concurrently | Block::Detach if statements.len() > 1 => {
                return Err(Error::config(format!(
                    "a {} statement that cannot run in a transaction cannot be one of a batch of {}; make it a change of its own",
                    first_word(statement.text),
                    statements.len()
                )));
            }
            Block::MustNot => return Ok(How::Outside),
            Block::Concurrently => return Ok(How::Concurrently),
            Block::Detach => return Ok(How::Once),
        }
    }
    Ok(How::Transaction)
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

    fn of(sql: &str) -> Result<How, String> {
        how(&ddl::read(sql)).map_err(|error| error.to_string())
    }

    #[test]
    fn batches_and_loners() {
        assert_eq!(
            of("ALTER TABLE t ADD a int; DROP TABLE u"),
            Ok(How::Transaction)
        );
        assert_eq!(of("VACUUM t"), Ok(How::Outside));
        assert_eq!(of("DROP INDEX CONCURRENTLY i;"), Ok(How::Concurrently));
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
