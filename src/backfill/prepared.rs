//! A backfill that has been checked against the catalogs and can be run.

use std::sync::Arc;

use tokio_postgres::{IsolationLevel, SimpleQueryMessage};

use super::builder::Backfill;
use super::name::default_name;
use super::sql::{self, Checkpoint, CheckpointId, CheckpointTable, Target};
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
        let id = self.checkpoint_id();
        if self.backfill.restarts {
            self.ask(&sql::delete(&id)).await?;
        }
        let load = sql::load(&id, &self.target, &self.definition);
        let reply = self.ask(&load).await?;
        let checkpoint = sql::read_checkpoint(&self.target, &reply).ok_or_else(unreadable)?;
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
        Ok(checkpoint)
    }

    async fn ensure_table(&self) -> Result<(), Error> {
        if self.has_table().await? {
            return Ok(());
        }
        let create = sql::create_table(self.target.schema());
        let Err(error) = self.ask(&create).await else {
            return Ok(());
        };
        // Another backfill may have created it at the same time.
        if self.has_table().await? {
            return Ok(());
        }
        Err(Error::new(error.kind())
            .with_detail(format!(
                "the table for checkpoints is missing and could not be created; its owner shall be who may: {create}"
            ))
            .with_source(error))
    }

    /// Whether the checkpoint table exists. A table that cannot be used is an error.
    async fn has_table(&self) -> Result<bool, Error> {
        let reply = self.ask(&sql::find_table(&self.target)).await?;
        match sql::read_table(&self.target, &reply) {
            CheckpointTable::Missing => Ok(false),
            CheckpointTable::Usable => Ok(true),
            CheckpointTable::Unusable(reason) => Err(Error::config(reason)),
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
