//! A migration that one process of many runs.

use std::time::Duration;

use super::Schema;
use super::run::Context;
use crate::advisory::{AdvisoryLock, SessionGuard};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, is_already_there};
use crate::key::LockKey;
use crate::postgres::TableName;
use crate::schema::sql::once;
use crate::transaction::AsyncFunc;
use crate::transaction::sql::Begin;

/// How long others wait for the one that runs it.
const DEADLINE: Duration = Duration::from_secs(3600);
/// The longest pause between two looks whether it is done.
const LOOK: Duration = Duration::from_millis(250);

/// What a migration is run with: [`Schema::migrate_once`].
#[derive(Debug)]
pub struct Migration {
    schema: Schema,
    guard: SessionGuard,
}

impl Migration {
    /// For schema changes, each on a connection of its own.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The lock under which no other process runs it, and its connection: for work that must end with the lock.
    pub fn guard(&mut self) -> &mut SessionGuard {
        &mut self.guard
    }
}

/// Runs `f` if the migration is not done and nobody runs it.
///
/// Cancel safety: dropped, the lock is released, and it is not done.
pub(super) async fn run<R, E, F>(schema: &Schema, key: String, f: F) -> Result<Option<R>, E>
where
    for<'r> F: AsyncFnOnce(&'r mut Migration) -> Result<R, E>
        + AsyncFunc<&'r mut Migration, Result<R, E>, Fut: Send>
        + Send,
    E: From<Error> + Send,
    R: Send,
{
    let cx = &schema.cx;
    if key.contains('\0') {
        return Err(Error::config(
            "the migration's key has a NUL in it, which no text of PostgreSQL's can have",
        )
        .into());
    }
    let table = table(schema)?;
    let pace = schema.pace.or_deadline(DEADLINE);
    let Some(guard) = lock(cx, &table, &key, &pace.deadline()).await? else {
        return Ok(None);
    };
    let mut migration = Migration {
        schema: schema.clone(),
        guard,
    };
    let pid = migration.guard.backend_pid();
    // Cancel safety: dropped when the lock is lost, the work is cancelled as it is where this is dropped.
    let ended = tokio::select! {
        biased;
        result = f(&mut migration) => Some(result),
        () = gone(cx, pid) => None,
    };
    let guard = migration.guard;
    let Some(result) = ended else {
        return Err(Error::new(ErrorKind::LockLost)
            .with_key(&lock_key(&key))
            .with_detail("the migration was stopped, for another process may run it now")
            .into());
    };
    let value = match result {
        Ok(value) => value,
        Err(error) => {
            // The lock goes with the connection if this fails.
            drop(guard.release().await);
            return Err(error);
        }
    };
    // On the connection that holds the lock: once it is lost, somebody else may be at it.
    if let Err(error) = note(&guard, &table, &key, &cx.application_name).await {
        let kind = if guard.is_lost() {
            ErrorKind::LockLost
        } else {
            error.kind()
        };
        return Err(Error::new(kind)
            .with_key(&lock_key(&key))
            .with_detail("the migration has run, and could not be noted as done")
            .with_source(error)
            .into());
    }
    // Done is done, whatever becomes of the lock.
    if let Err(error) = guard.release().await {
        tracing::debug!(%error, key, "the lock of a migration that is done was lost");
    }
    Ok(Some(value))
}

/// Notes it as done, in a transaction of its own.
async fn note(guard: &SessionGuard, table: &TableName, key: &str, by: &str) -> Result<(), Error> {
    // In a transaction that was left open the note would be rolled back with it, and so would be what it says is done.
    if once::yes(&guard.simple_query(once::IN_TRANSACTION).await?) {
        return Err(Error::config(
            "the migration has left a transaction open on its guard's connection, which is rolled back; commit it",
        ));
    }
    Ok(guard.batch_execute(&once::done(table, key, by)).await?)
}

/// Waits until the server has ended the backend that holds the lock.
///
/// Cancel safety: a question that is not awaited closes its connection.
async fn gone(cx: &Context, pid: Option<i32>) {
    let Some(pid) = pid else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(LOOK).await;
        // Who cannot ask does not know.
        let reply = (cx.connections().ask_within(LOOK, &once::is_alive(pid))).await;
        if reply.is_ok_and(|reply| !once::yes(&reply)) {
            return;
        }
    }
}

/// The lock, once nobody else has it; `None` when it is done.
///
/// By trying now and then, so that a process that waits has no snapshot, for which the index builds of the one that runs
/// it would wait, and no connection.
async fn lock(
    cx: &Context,
    table: &TableName,
    key: &str,
    deadline: &Deadline,
) -> Result<Option<SessionGuard>, Error> {
    loop {
        let noted = once::yes(&cx.ask(&once::is_there(table)).await?);
        if noted && is_done(cx, table, key).await? {
            return Ok(None);
        }
        let begin = Begin {
            application_name: Some(cx.application_name.clone()),
            ..Begin::default()
        };
        let advisory = std::sync::Arc::clone(&cx.advisory);
        let keys = vec![lock_key(key)];
        let lock = AdvisoryLock::new(advisory, keys, cx.lock_wait, begin, cx.call_site).session();
        if let Some(guard) = lock.try_acquire().await? {
            if !noted {
                create(cx, table).await?;
            }
            // Under the lock, it cannot become done any more.
            if is_done(cx, table, key).await? {
                guard.release().await?;
                return Ok(None);
            }
            return Ok(Some(guard));
        }
        if deadline.has_passed() {
            return Err(Error::new(ErrorKind::LockTimeout)
                .with_key(&lock_key(key))
                .with_detail("another process runs the migration still")
                .with_waited(deadline.waited()));
        }
        let jitter = LOOK.mul_f64(0.5 + 0.5 * unit(cx.jitter.next()));
        // Cancel safety: nothing is held between two looks.
        tokio::time::sleep(jitter.min(deadline.remaining())).await;
    }
}

/// From 0 to 1.
fn unit(random: u64) -> f64 {
    f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

fn lock_key(key: &str) -> LockKey {
    LockKey::from(("lockkeeper migration", key))
}

async fn is_done(cx: &Context, table: &TableName, key: &str) -> Result<bool, Error> {
    Ok(once::yes(&cx.ask(&once::is_done(table, key)).await?))
}

async fn create(cx: &Context, table: &TableName) -> Result<(), Error> {
    match cx.ask(&once::create(table)).await {
        // A process with another key was as fast.
        Err(error) if is_already_there(&error) => Ok(()),
        created => created.map(drop),
    }
}

fn table(schema: &Schema) -> Result<TableName, Error> {
    let table = TableName::in_schema(&schema.bookkeeping, once::TABLE);
    match table.flaw() {
        Some(flaw) => Err(Error::config(flaw)),
        None => Ok(table),
    }
}
