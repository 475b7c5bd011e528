//! A backfill that has been checked against the catalogs and can be run.

use std::sync::Arc;

use tokio_postgres::{IsolationLevel, SimpleQueryMessage};

use super::builder::Backfill;
use super::name::default_name;
use super::sql::{self, Checkpoint, CheckpointId, CheckpointTable, End, Target};
use crate::advisory::AdvisoryLock;
use crate::backoff::{Backoff, RetryBudget};
use crate::error::{Error, ErrorKind, Failure, Report, classify_db};
use crate::key::LockKey;
use crate::transaction::sql::Begin;
use crate::transaction::{
    self, AfterFailure, BoxFuture, Deferred, FailedAttempt, NoRetry, Policy, Reporter, Tx,
};

/// The namespace of the lock keys.
const LOCKS: &str = "lockkeeper_backfill";

/// A backfill whose table and key have been found.
pub(super) struct Prepared {
    pub(super) backfill: Backfill,
    pub(super) target: Target,
    pub(super) name: Arc<str>,
    pub(super) set: String,
    definition: String,
    pub(super) key: LockKey,
    pub(super) estimate: Option<u64>,
    pub(super) policy: Policy,
    pub(super) begin: Begin,
}

impl Prepared {
    /// Finds the table and its key.
    pub(super) async fn find(backfill: Backfill) -> Result<Self, Error> {
        backfill.check()?;
        let begin = Begin {
            // A batch that has waited for a row must see its new version.
            isolation: Some(IsolationLevel::ReadCommitted),
            read_only: Some(false),
            lock_timeout: Some(backfill.lock_timeout),
            ..backfill.env.begin()
        };
        let policy = policy(&backfill);
        let (table, key) = (&backfill.table, &backfill.key);
        let reply = ask(&backfill, &policy, &begin, &sql::target(table, key)).await?;
        let target = sql::read_target(table, key, &reply).map_err(Error::config)?;
        if !backfill.visible_rows {
            let reply = ask(&backfill, &policy, &begin, &sql::row_security(&target)).await?;
            if sql::read_row_security(&reply).ok_or_else(unreadable)? {
                return Err(Error::config(format!(
                    "row-level security of {} applies to this role, so rows that its policies hide would be left out \
                     without a word; run the backfill as a role with BYPASSRLS, or with visible_rows() for the visible \
                     rows only",
                    target.table
                )));
            }
        }
        let estimate = ask(&backfill, &policy, &begin, &sql::estimate(&target.table)).await?;
        let set = backfill.set.join("\n, ");
        let definition = target.definition(&set, backfill.filter.as_deref());
        let name = match &backfill.name {
            Some(name) => name.clone(),
            None => default_name(&definition),
        };
        Ok(Self {
            key: LockKey::from((LOCKS, format!("{}.{name}", target.schema()))),
            estimate: sql::read_estimate(&estimate),
            name: name.into(),
            backfill,
            target,
            set,
            definition,
            policy,
            begin,
        })
    }

    pub(super) fn lock(&self) -> AdvisoryLock {
        let lock = self.backfill.env.lock(self.key.clone());
        lock.wait(self.backfill.wait)
    }

    pub(super) fn checkpoint_id(&self) -> CheckpointId<'_> {
        CheckpointId {
            schema: self.target.schema(),
            name: &self.name,
        }
    }

    /// Reads the checkpoint, or writes the first one. The lock must be held.
    pub(super) async fn checkpoint(&self) -> Result<Checkpoint, Error> {
        self.ensure_table().await?;
        if self.backfill.restarts {
            self.forget().await?;
        }
        self.continued().await
    }

    /// Reads the checkpoint, if the run can continue from it.
    pub(super) async fn continued(&self) -> Result<Checkpoint, Error> {
        let checkpoint = self.load().await?;
        let id = self.checkpoint_id();
        if checkpoint.definition != self.definition {
            return Err(Error::config(format!(
                "the backfill {:?} in {}.{} does something else than this one; give this one another name, or \
                 restart it",
                self.name,
                id.schema,
                sql::TABLE
            )));
        }
        if !checkpoint.same_order {
            return Err(Error::config(format!(
                "the key of {} is ordered otherwise than when the backfill {:?} began (its type, collation or index has \
                 changed), so the rows that are left are not known; restart it",
                self.target.table, self.name
            )));
        }
        let Some(difference) = self.difference(&checkpoint).await? else {
            return Ok(checkpoint);
        };
        // Rows that have been changed do not match the filter any more, so none is changed twice.
        let tells_what_is_left =
            self.backfill.filter.is_some() && checkpoint.changed > 0 && !checkpoint.filter_stays;
        if self.backfill.trusts_checkpoint {
            let visible = self.backfill.visible_rows;
            self.ask(&sql::adopt(&id, &self.target, visible)).await?;
        } else if tells_what_is_left {
            tracing::warn!(
                backfill = &*self.name,
                difference,
                "the checkpoint is not of this table as it is now; the backfill starts over"
            );
            self.forget().await?;
        } else {
            return Err(Error::config(format!(
                "the checkpoint of the backfill {:?} is not of {} as it is now: {difference}; call restart() to begin at \
                 the first row, or trust_checkpoint() if the rows before it have their new values",
                self.name, self.target.table
            )));
        }
        self.load().await
    }

    /// Why the checkpoint is not of the table as it is now.
    async fn difference(&self, checkpoint: &Checkpoint) -> Result<Option<&'static str>, Error> {
        let same = checkpoint.sameness;
        if !same.table {
            return Ok(Some(
                "another table had the name then (it was dropped and created again, or restored)",
            ));
        }
        if !same.columns {
            return Ok(Some(
                "a column of the definition was dropped and another one of its name was added",
            ));
        }
        if !same.rows {
            return Ok(Some(
                "it is of other rows (all, or those visible to a role)",
            ));
        }
        // New types mean that the table was rewritten, with its rows.
        let nothing_done = checkpoint.processed == 0 && !checkpoint.done;
        if same.files || !same.types || nothing_done {
            if !same.files || !same.types {
                let visible = self.backfill.visible_rows;
                self.ask(&sql::adopt(&self.checkpoint_id(), &self.target, visible))
                    .await?;
            }
            return Ok(None);
        }
        if let Some(last_key) = &checkpoint.last_key {
            let kept = sql::has_kept_rows(&self.checkpoint_id(), &self.target, last_key);
            let reply = self.ask(&kept).await?;
            if sql::read_kept_rows(&reply).ok_or_else(unreadable)? {
                let visible = self.backfill.visible_rows;
                self.ask(&sql::adopt(&self.checkpoint_id(), &self.target, visible))
                    .await?;
                return Ok(None);
            }
        }
        Ok(Some(
            "the table was truncated or rewritten since, and whether its rows were loaded again is not known",
        ))
    }

    /// Where this run ends.
    pub(super) async fn end(&self) -> Result<End, Error> {
        if self.backfill.follows_inserts {
            return Ok(End::Open);
        }
        let query = sql::last_key(&self.target, self.backfill.visible_rows);
        let reply = self.ask(&query).await?;
        sql::read_last_key(&self.target, &reply).ok_or_else(unreadable)
    }

    async fn load(&self) -> Result<Checkpoint, Error> {
        let load = sql::load(
            &self.checkpoint_id(),
            &self.target,
            &self.definition,
            self.backfill.visible_rows,
        );
        let reply = self.ask(&load).await?;
        sql::read_checkpoint(&self.target, &reply).ok_or_else(unreadable)
    }

    async fn forget(&self) -> Result<(), Error> {
        self.ask(&sql::delete(&self.checkpoint_id())).await?;
        Ok(())
    }

    async fn ensure_table(&self) -> Result<(), Error> {
        let (change, failed) = match self.table().await? {
            CheckpointTable::Usable => return Ok(()),
            CheckpointTable::Old => (
                sql::add_columns(self.target.schema()),
                "the table for checkpoints is of an earlier version and could not be changed; its owner may",
            ),
            _ => (
                sql::create_table(self.target.schema()),
                "the table for checkpoints is missing and could not be created; its owner shall be who may",
            ),
        };
        let Err(error) = self.ask(&change).await else {
            return Ok(());
        };
        // Another backfill may have done it at the same time.
        if self.table().await? == CheckpointTable::Usable {
            return Ok(());
        }
        Err(Error::new(error.kind())
            .with_detail(format!("{failed}: {change}"))
            .with_source(error))
    }

    /// The state of the checkpoint table. A table that cannot be used is an error.
    async fn table(&self) -> Result<CheckpointTable, Error> {
        let reply = self.ask(&sql::find_table(&self.target)).await?;
        match sql::read_table(&self.target, &reply) {
            CheckpointTable::Unusable(reason) => Err(Error::config(reason)),
            state => Ok(state),
        }
    }

    async fn ask(&self, sql: &str) -> Result<Vec<SimpleQueryMessage>, Error> {
        ask(&self.backfill, &self.policy, &self.begin, sql).await
    }
}

/// Sends one message in its own transaction.
async fn ask(
    backfill: &Backfill,
    policy: &Policy,
    begin: &Begin,
    sql: &str,
) -> Result<Vec<SimpleQueryMessage>, Error> {
    let open = backfill.env.opener(begin);
    let run = transaction::run(policy, &NoRetry, &open, async move |tx: &mut Tx| {
        Ok::<_, Error>(tx.simple_query(sql).await?)
    });
    run.await?.ok_or_else(unreadable)
}

fn policy(backfill: &Backfill) -> Policy {
    let policy = backfill.policy.clone();
    Policy {
        attempts: u32::MAX,
        deadline: Some(backfill.max_lock_wait),
        // Sessions that queued behind a waiting batch get time to finish.
        backoff: Backoff::new(
            backfill.lock_timeout,
            backfill.lock_timeout.saturating_mul(10),
        ),
        // A separate budget, because a backfill must not use up that of the application's transactions. The deadline
        // limits the attempts.
        budget: Arc::new(RetryBudget::new(1, 0, 0)),
        resolve: Some(crate::transaction::Resolve::default()),
        reporter: policy
            .reporter
            .map(|reporter| Arc::new(ReportsSelected(reporter)) as Arc<dyn Reporter>),
        ..policy
    }
}

/// Reports deadlocks, and failures that are not retried. A batch that timed out on a lock and is retried is normal.
#[derive(Debug)]
struct ReportsSelected(Arc<dyn Reporter>);

impl Reporter for ReportsSelected {
    fn begins(self: Arc<Self>) {
        Arc::clone(&self.0).begins();
    }

    fn look_up<'a>(&'a self, failed: &'a FailedAttempt<'a>) -> BoxFuture<'a, ()> {
        self.0.look_up(failed)
    }

    fn failed(&self, failed: &FailedAttempt<'_>) -> Option<Box<dyn Report>> {
        if matches!(failed.then, AfterFailure::Retry(_))
            && classify_db(failed.error) != Failure::Deadlock
        {
            return None;
        }
        self.0.failed(failed)
    }

    fn caught(self: Arc<Self>, failed: &FailedAttempt<'_>) -> Option<Deferred> {
        Arc::clone(&self.0).caught(failed)
    }
}

pub(super) fn unreadable() -> Error {
    Error::new(ErrorKind::Database).with_detail("the server's answer to a backfill cannot be read")
}
