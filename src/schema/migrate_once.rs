//! A migration that only one of many processes runs, once.

use std::time::Duration;

use super::{Env, Schema};
use crate::advisory::SessionGuard;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, is_already_there};
use crate::key::LockKey;
use crate::postgres::TableName;
use crate::postgres::sql::identifier;
use crate::schema::sql::{catalog, migrate_once};
use crate::transaction::AsyncFunc;

/// The default time for which other processes wait for the one that runs the migration.
const DEADLINE: Duration = Duration::from_secs(3600);
/// The longest pause between two polls whether the migration is done.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The context in which a migration runs: [`Schema::migrate_once`].
#[derive(Debug)]
pub struct Migration {
    schema: Schema,
    guard: SessionGuard,
}

impl Migration {
    /// The schema changes of the keeper, each of which uses its own connection.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The lock that prevents other processes from running the migration, and its connection. Use the connection for
    /// work that must end with the lock.
    pub fn guard(&mut self) -> &mut SessionGuard {
        &mut self.guard
    }
}

/// Runs `f` if the migration is not done and no other process runs it.
///
/// Cancel safety: dropped, the lock is released, and the migration is not done.
pub(super) async fn run<R, E, F>(schema: &Schema, key: String, f: F) -> Result<Option<R>, E>
where
    for<'r> F: AsyncFnOnce(&'r mut Migration) -> Result<R, E>
        + AsyncFunc<&'r mut Migration, Result<R, E>, Fut: Send>
        + Send,
    E: From<Error> + Send,
    R: Send,
{
    let env = &schema.env;
    if key.contains('\0') {
        return Err(Error::config(
            "the migration's key has a NUL in it, which no text of PostgreSQL's can have",
        )
        .into());
    }
    let table = table(schema)?;
    let options = schema.options.or_deadline(DEADLINE);
    let Some(guard) = lock(
        env,
        (&table, &schema.bookkeeping),
        &key,
        &options.deadline(),
    )
    .await?
    else {
        return Ok(None);
    };
    let mut migration = Migration {
        schema: schema.clone(),
        guard,
    };
    let pid = migration.guard.backend_pid();
    // Cancel safety: if the lock is lost, `f` is dropped, which cancels its work as dropping this future does.
    let ended = tokio::select! {
        biased;
        result = f(&mut migration) => Some(result),
        () = lock_lost(env, pid) => None,
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
            // If this fails, the connection is closed, which releases the lock.
            drop(guard.release().await);
            return Err(error);
        }
    };
    // On the connection that holds the lock: once the lock is lost, another process may run the migration.
    if let Err(error) = record(&guard, &table, &key, &env.application_name).await {
        let kind = if guard.is_lost() {
            ErrorKind::LockLost
        } else {
            error.kind()
        };
        return Err(Error::new(kind)
            .with_key(&lock_key(&key))
            .with_detail(format!(
                "the migration has run, and could not be noted as done{}",
                error
                    .detail()
                    .map_or_else(String::new, |detail| format!(": {detail}"))
            ))
            .with_source(error)
            .into());
    }
    // The migration is done even if the lock is lost now.
    if let Err(error) = guard.release().await {
        tracing::debug!(%error, key, "the lock of a migration that is done was lost");
    }
    Ok(Some(value))
}

/// Records the migration as done, in a separate transaction.
async fn record(guard: &SessionGuard, table: &TableName, key: &str, by: &str) -> Result<(), Error> {
    // In a transaction that `f` has left open, the record would be rolled back together with the work.
    if catalog::is_yes(&guard.simple_query(migrate_once::IN_TRANSACTION).await?) {
        return Err(Error::config(
            "the migration has left a transaction open on its guard's connection, which is rolled back; commit it",
        ));
    }
    let recorded = guard
        .batch_execute(&migrate_once::done(table, key, by))
        .await;
    recorded.map_err(|error| lacking(error.into(), table, "SELECT, INSERT"))
}

/// Completes when the server has ended the backend that holds the lock.
///
/// Cancel safety: a query whose reply is not awaited closes its connection.
async fn lock_lost(env: &Env, pid: Option<i32>) {
    let Some(pid) = pid else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(POLL_INTERVAL).await;
        // A failed query says nothing about the backend.
        let reply = (env
            .connections()
            .look_within(POLL_INTERVAL, &migrate_once::is_alive(pid)))
        .await;
        if reply.is_ok_and(|reply| !catalog::is_yes(&reply)) {
            return;
        }
    }
}

/// Acquires the lock once no other process holds it; `None` if the migration is done.
///
/// The lock is polled, so that a waiting process has no connection and no snapshot. The index builds of the running
/// migration would wait for such a snapshot.
async fn lock(
    env: &Env,
    (table, bookkeeping): (&TableName, &str),
    key: &str,
    deadline: &Deadline,
) -> Result<Option<SessionGuard>, Error> {
    loop {
        let has_table = env.is_yes(&migrate_once::is_there(table)).await?;
        if has_table && is_done(env, table, key).await? {
            return Ok(None);
        }
        if let Some(guard) = env.lock(lock_key(key)).session().try_acquire().await? {
            if !has_table {
                create(env, table, bookkeeping).await?;
            }
            // No other process can complete the migration while this one holds the lock.
            if is_done(env, table, key).await? {
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
        let jitter = POLL_INTERVAL.mul_f64(0.5 + 0.5 * fraction(env.jitter.next()));
        // Cancel safety: no connection is held between two polls.
        tokio::time::sleep(jitter.min(deadline.remaining())).await;
    }
}

/// A fraction from 0 to 1.
fn fraction(random: u64) -> f64 {
    f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

fn lock_key(key: &str) -> LockKey {
    LockKey::from(("lockkeeper migration", key))
}

async fn is_done(env: &Env, table: &TableName, key: &str) -> Result<bool, Error> {
    let done = env.is_yes(&migrate_once::is_done(table, key)).await;
    done.map_err(|error| lacking(error, table, "SELECT, INSERT"))
}

/// An error that names what the role lacks on the table, or on its schema.
fn lacking(error: Error, table: &TableName, rights: &str) -> Error {
    error.lacking(|| {
        format!(
            "the role may not use table {table}: GRANT {rights} ON {table}, or have another schema for it by Schema::bookkeeping"
        )
    })
}

async fn create(env: &Env, table: &TableName, schema: &str) -> Result<(), Error> {
    let schema = identifier(schema);
    match env.ask(&migrate_once::create(table)).await {
        // A process with another key has created it at the same time.
        Err(error) if is_already_there(&error) => Ok(()),
        created => created.map(drop).map_err(|error| {
            error.lacking(|| {
                format!(
                    "the role may not create table {table}: GRANT CREATE ON SCHEMA {schema}, or have the table created by a role that \
                     may, with GRANT SELECT, INSERT on it, or in another schema by Schema::bookkeeping"
                )
            })
        }),
    }
}

fn table(schema: &Schema) -> Result<TableName, Error> {
    let table = TableName::in_schema(&schema.bookkeeping, migrate_once::TABLE);
    match table.flaw() {
        Some(flaw) => Err(Error::config(flaw)),
        None => Ok(table),
    }
}
