//! What schema changes and backfills need of a keeper.

use std::sync::Arc;
use std::time::Duration;

use crate::advisory::{Advisory, AdvisoryLock, LockDescription};
use crate::backoff::Jitter;
use crate::call_site::CallSite;
use crate::connection::{Checkout, Connections, OnAbandon, Reply, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify};
use crate::key::LockKey;
use crate::schema::sql::catalog::{self, CatalogRelation};
use crate::transaction::sql::Begin;
use crate::transaction::{OpenPlain, Tx};

/// The part of a keeper that all its schema changes and backfills share.
#[derive(Clone, Debug)]
pub(crate) struct Env {
    pub(crate) advisory: Arc<Advisory>,
    pub(crate) application_name: Arc<str>,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) lock_wait: Duration,
    pub(crate) jitter: Arc<Jitter>,
}

impl Env {
    pub(crate) fn connections(&self) -> &Arc<Connections> {
        &self.advisory.connections
    }

    /// The settings of a transaction that differ in nothing but the `application_name`.
    pub(crate) fn begin(&self) -> Begin {
        Begin {
            application_name: Some(self.application_name.clone()),
            ..Begin::default()
        }
    }

    /// Transactions for the runner.
    pub(crate) fn opener(&self, begin: &Begin) -> OpenPlain {
        OpenPlain {
            connections: Arc::clone(self.connections()),
            begin: begin.clone(),
            call_site: self.call_site,
            lock_wait: self.lock_wait,
        }
    }

    /// Begins a transaction.
    ///
    /// Cancel safety: dropped, the transaction is rolled back in the background.
    pub(crate) async fn open(&self, begin: &Begin) -> Result<Tx, Error> {
        self.opener(begin).begin().await
    }

    pub(crate) fn lock(&self, key: LockKey) -> AdvisoryLock {
        let advisory = Arc::clone(&self.advisory);
        AdvisoryLock::new(LockDescription::new(
            advisory,
            vec![key],
            self.lock_wait,
            self.begin(),
            self.call_site,
        ))
    }

    /// Sends one message on a connection like those that changes run on, with the same `search_path`.
    ///
    /// Cancel safety: dropped before the reply, the connection is closed.
    pub(super) async fn ask(&self, sql: &str) -> Result<Reply, Error> {
        let (session, reply) = self.exchange(|_| sql.to_owned()).await?;
        session.return_to_pool();
        Ok(reply)
    }

    /// Whether the answer is `yes`.
    pub(super) async fn is_yes(&self, sql: &str) -> Result<bool, Error> {
        Ok(catalog::is_yes(&self.ask(sql).await?))
    }

    /// The relations that a text of [`catalog`]'s asks for.
    pub(super) async fn relations(&self, sql: &str) -> Result<Vec<CatalogRelation>, Error> {
        Ok(catalog::read_relations(&self.ask(sql).await?))
    }

    /// Sends the first message on a connection of the pool. A connection that turns out to be lost is replaced.
    ///
    /// Cancel safety: dropped before the reply, the connection is closed.
    pub(super) async fn exchange(
        &self,
        text: impl Fn(&Session) -> String + Send,
    ) -> Result<(Session, Reply), Error> {
        let deadline = Deadline::after(self.lock_wait);
        let mut checkout = Checkout::new(self.connections(), &deadline);
        loop {
            let (session, patience) = checkout.next().await?;
            let text = text(&session);
            let sent = session.send(text, OnAbandon::CancelAndClose);
            match sent.within(patience).await {
                Some((session, Ok(reply))) => return Ok((session, reply)),
                // Dropped, the session closes its connection.
                Some((_, Err(error))) if classify(&error) != Failure::ConnectionLost => {
                    return Err(error.into());
                }
                Some((_, Err(error))) => checkout.replace(error.into())?,
                None => {
                    let silent = Error::new(ErrorKind::ConnectionLost);
                    checkout.replace_silent(silent.with_detail("no answer from the server"))?;
                }
            }
        }
    }
}
