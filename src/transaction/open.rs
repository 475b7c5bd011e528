//! Beginning a transaction without locks.

use std::sync::Arc;
use std::time::Duration;

use super::{BoxFuture, Open, Tx, sql};
use crate::call_site::CallSite;
use crate::connection::{Checkout, Connections, OnAbandon};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Failure, classify};

/// Transactions without locks.
pub(crate) struct OpenPlain {
    pub(crate) connections: Arc<Connections>,
    pub(crate) begin: sql::Begin,
    pub(crate) call_site: Option<CallSite>,
    pub(crate) lock_wait: Duration,
}

impl Open for OpenPlain {
    fn open(&self, _: u32) -> BoxFuture<'_, Result<Option<Tx>, Error>> {
        Box::pin(async { self.begin().await.map(Some) })
    }

    fn operation(&self) -> &'static str {
        "transaction"
    }
}

impl OpenPlain {
    /// Begins a transaction on a connection that is alive and clean. One message, one round trip.
    ///
    /// A connection of the pool that is silent is replaced, within the longest silence in all.
    ///
    /// Cancel safety: dropped, the transaction is rolled back in the background.
    pub(crate) async fn begin(&self) -> Result<Tx, Error> {
        let deadline = Deadline::after(self.lock_wait);
        let (connections, begin) = (&self.connections, &self.begin);
        let cache = connections.cache();
        let statement = begin.prepared_name();
        let mut checkout = Checkout::new(connections, &deadline);
        loop {
            let (session, patience) = checkout.next().await?;
            let probe = cache.probe(&session, statement);
            // On any error the session is dropped and so closed: what state it came in is not known.
            let sent = session.send(sql::begin_transaction(begin, &probe), OnAbandon::rollback());
            let error = match sent.within(patience).await {
                Some((mut session, Ok(reply))) => match sql::begun(&reply) {
                    Some(begun) if begun.fresh => {
                        let server = begun.server.as_ref();
                        cache.learn_reply(&session, &probe, statement, begun.pid, server);
                        let name = begin.application_name.as_ref();
                        session.identify(begun.pid, begun.xact_start, name);
                        session.set_idle_timeout(begin.idle_in_transaction_session_timeout);
                        return Ok(Tx::new(
                            session,
                            self.call_site,
                            self.lock_wait,
                            begin.longest_wait(),
                        ));
                    }
                    _ => Error::new(ErrorKind::Pool).with_detail(
                        "the pool gave connections with transactions left open on them; they were \
                         closed",
                    ),
                },
                // Nothing was done yet that could be done twice: a connection that died in the pool, or was left in a
                // failed transaction, is replaced, and so is one whose prepared statements are not as expected.
                Some((_, Err(error))) => match classify(&error) {
                    Failure::ConnectionLost => error.into(),
                    failure if failure.is_of_the_connection() => {
                        cache.learn_failure(failure);
                        error.into()
                    }
                    _ => return Err(error.into()),
                },
                None => {
                    let silent = Error::new(ErrorKind::ConnectionLost);
                    checkout.replace_silent(silent.with_detail("no answer to BEGIN"))?;
                    continue;
                }
            };
            checkout.replace(error)?;
        }
    }
}
