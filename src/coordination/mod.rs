//! What several processes agree on over advisory locks: fencing tokens ([`fencing`]), and what is built on them.
//!
//! The rest of the crate needs no table. Here some things have to outlive the session that holds a lock, so they are rows of
//! tables, which `set_up()` makes ([`set_up`]).

mod fencing;
mod leader;
mod line;
mod once;
mod semaphore;
mod set_up;
mod sql;
mod term;
mod token;

use std::sync::Arc;
use std::time::Duration;

pub use fencing::Fencing;
pub use leader::Leader;
pub(crate) use line::Lines;
pub use once::Once;
pub use semaphore::{Semaphore, SemaphorePermit};
pub use term::{Leadership, Term};
pub use token::FencingToken;

use crate::advisory::{Advisory, AdvisoryLock, LockDescription};
use crate::call_site::CallSite;
use crate::connection::Connections;
use crate::error::{Error, ErrorKind, is_not_supported};
use crate::key::LockKey;
use crate::postgres::TableName;
use crate::transaction::TransactionOptions;
use crate::transaction::sql::Begin;

/// The part of a keeper that all of this shares.
#[derive(Clone, Debug)]
pub(crate) struct Coordination {
    pub(crate) advisory: Arc<Advisory>,
    pub(crate) application_name: Arc<str>,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) lock_wait: Duration,
    pub(crate) lines: Arc<Lines>,
}

impl Coordination {
    fn connections(&self) -> &Arc<Connections> {
        &self.advisory.connections
    }

    /// What every transaction here begins with, whatever the session's defaults are: a statement sees what was committed
    /// before it, and may write.
    fn begin(&self) -> Begin {
        plain().begin(Some(Arc::clone(&self.application_name)))
    }

    fn describe(&self, key: LockKey, wait: Duration) -> LockDescription {
        LockDescription::new(
            Arc::clone(&self.advisory),
            vec![key],
            wait,
            self.begin(),
            self.call_site,
        )
    }

    fn lock(&self, key: LockKey) -> AdvisoryLock {
        self.lock_within(key, self.lock_wait)
    }

    /// A lock for which a connection, too, is waited for no longer.
    fn lock_within(&self, key: LockKey, wait: Duration) -> AdvisoryLock {
        AdvisoryLock::new(self.describe(key, wait))
    }
}

/// The options of a transaction in which a statement sees what was committed before it.
fn plain() -> TransactionOptions {
    TransactionOptions::new()
        .isolation(tokio_postgres::IsolationLevel::ReadCommitted)
        .read_only(false)
}

/// A table of this crate.
fn table(connections: &Connections, name: &str) -> Result<TableName, Error> {
    let table = TableName::in_schema(connections.tables_schema(), name);
    match table.flaw() {
        Some(flaw) => Err(Error::config(flaw)),
        None => Ok(table),
    }
}

/// The error of a transaction that could not begin. A standby refuses one that may write.
fn begin_error(error: Error) -> Error {
    match is_not_supported(&error) {
        true => error.with_kind(ErrorKind::ReadOnlyServer),
        false => error,
    }
}
