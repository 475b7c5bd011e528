//! Why the server has ended a connection.
//!
//! The server gives its reason in an ErrorResponse before it closes the connection. Where a statement is under way, the
//! driver hands it to that statement. Where none is, the driver's connection ends with it, whatever task that is in, and
//! later statements only learn that the connection is closed. So the reason has to be kept by who runs the connection: a
//! [`Connector`] does. In a pool without one it is worked out from the server's settings, as far as that is possible.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::error::DbError;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, Socket};

use super::silence::{closed, login_error};
use super::sql::server;
use super::{Session, cancel};
use crate::error::{Failure, IdleEnd, classify};

/// How many reasons are remembered. One is forgotten when so many more have come.
const MOST: usize = 1024;
/// How much longer than its timeout a session lives, or appears to live, because of the network.
const SLACK: Duration = Duration::from_millis(50);
/// How often a reason is searched again.
const LOOKS: usize = 3;
/// How long to wait for the settings that may be the reason.
const ASKING: Duration = Duration::from_secs(1);

/// Opens a pool's connections, and remembers the reason that the server gave before it closed one.
///
/// With it in the pool, an error about a closed connection carries that reason, also where the connection was idle: 57P01
/// for a session that was terminated, 25P03 for one that was idle in its transaction, 57P05 for one that was idle. Without
/// it, the driver drops what the server says to an idle connection. This crate then compares the time that the connection
/// was idle with the server's timeouts; a termination it cannot tell from a broken network.
///
/// # Examples
/// ```
/// use deadpool_postgres::{Manager, ManagerConfig, Pool};
/// use lockkeeper::{Connector, deadpool_postgres, tokio_postgres::{Config, NoTls}};
///
/// let config: Config = "host=db user=app dbname=shop".parse()?;
/// let manager = Manager::from_connect(config, Connector::new(NoTls), ManagerConfig::default());
/// let pool = Pool::builder(manager).max_size(8).build()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Connector<T> {
    tls: T,
}

impl<T> Connector<T> {
    /// One that connects with this TLS connector, or with [`NoTls`](tokio_postgres::NoTls).
    pub fn new(tls: T) -> Self {
        Self { tls }
    }
}

impl<T> fmt::Debug for Connector<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").finish_non_exhaustive()
    }
}

type Connected = Result<(Client, JoinHandle<()>), tokio_postgres::Error>;

impl<T> deadpool_postgres::Connect for Connector<T>
where
    T: MakeTlsConnect<Socket> + Clone + Sync + Send + 'static,
    T::Stream: Sync + Send,
    T::TlsConnect: Sync + Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn connect(&self, config: &Config) -> Pin<Box<dyn Future<Output = Connected> + Send + '_>> {
        let (tls, config) = (self.tls.clone(), config.clone());
        Box::pin(async move {
            let (client, mut connection) = config.connect(tls).await?;
            let name = cancel::login_name(&client.cancel_token());
            let task = tokio::spawn(async move {
                let Err(error) = (&mut connection).await else {
                    return;
                };
                tracing::debug!(
                    sqlstate = error.code().map(tokio_postgres::error::SqlState::code),
                    "connection ended by the server"
                );
                // Before the connection is dropped, and with it what tells the client that it has ended.
                if let (Some(name), Some(error)) = (name, error.as_db_error()) {
                    remember(name, error.clone());
                }
                drop(connection);
            });
            Ok((client, task))
        })
    }
}

/// What tells a connection from all others: its cancel request.
type Name = Box<[u8]>;

static REASONS: Mutex<VecDeque<(Name, DbError)>> = Mutex::new(VecDeque::new());

fn reasons() -> MutexGuard<'static, VecDeque<(Name, DbError)>> {
    REASONS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember(name: Name, reason: DbError) {
    let mut reasons = reasons();
    if reasons.len() >= MOST {
        reasons.pop_front();
    }
    reasons.push_back((name, reason));
}

fn reason(name: &Name) -> Option<DbError> {
    let reasons = reasons();
    let known = reasons.iter().rev().find(|(of, _)| of == name);
    known.map(|(_, reason)| reason.clone())
}

impl Session {
    /// The error of a statement that found the connection ended, with the server's reason if that is known.
    pub(super) async fn explained(
        &self,
        error: tokio_postgres::Error,
        idle: Option<Duration>,
    ) -> tokio_postgres::Error {
        let is_bare = error.as_db_error().is_none() && classify(&error) == Failure::ConnectionLost;
        if !is_bare {
            return error;
        }
        self.ending(idle).await.unwrap_or(error)
    }

    /// Why the connection has ended: by the server's word to it, or else by the server's settings and the time that it was
    /// idle. `None` where that is not known.
    ///
    /// Takes a second at most.
    pub(crate) async fn ending(&self, idle: Option<Duration>) -> Option<tokio_postgres::Error> {
        // Given up by this crate, and not by the server.
        if self.is_lost() {
            return None;
        }
        // What the server has said to an earlier statement.
        let said = self.failure().map(|failure| *failure);
        let said = said.filter(crate::error::is_end_of_session);
        let name = self.canceller.login_name();
        let remembered = || name.as_ref().and_then(reason);
        let mut known = said.or_else(remembered);
        for _ in 0..LOOKS {
            if known.is_none() {
                // The driver tells that a connection has ended a moment before its task has its error.
                tokio::task::yield_now().await;
                known = remembered();
            }
        }
        if let Some(reason) = known {
            return Some(error_of(&reason));
        }
        let idle = idle?;
        let (end, default) = if self.state.is_in_transaction() {
            (IdleEnd::InTransaction, self.state.idle_timeout())
        } else {
            (IdleEnd::OutsideTransaction, None)
        };
        let timeout = match default {
            Some(timeout) => timeout,
            None => {
                let question = server::setting(end.setting());
                let most = ASKING.min(self.connections().longest_silence());
                let asked = self.connections().ask_persistently(most, &question);
                server::duration(&asked.await.ok()?)?
            }
        };
        if timeout.is_zero() || idle + SLACK < timeout {
            return None;
        }
        let message = format!(
            "connection closed by the server, probably by its {} of {timeout:?}: the session was idle for {idle:.1?}",
            end.setting()
        );
        Some(made(end.sqlstate(), &message, None))
    }
}

fn error_of(reason: &DbError) -> tokio_postgres::Error {
    made(reason.code().code(), reason.message(), reason.routine())
}

/// The driver's error for a FATAL error of the server. The driver lets nobody make one, so it is made by a connection to a
/// server that refuses it with this error.
fn made(sqlstate: &str, message: &str, routine: Option<&str>) -> tokio_postgres::Error {
    let mut body = Vec::new();
    let fields = [
        (b'S', Some("FATAL")),
        (b'V', Some("FATAL")),
        (b'C', Some(sqlstate)),
        (b'M', Some(message)),
        (b'R', routine),
    ];
    for (field, value) in fields {
        if let Some(value) = value {
            body.push(field);
            body.extend(value.bytes().filter(|byte| *byte != 0));
            body.push(0);
        }
    }
    body.push(0);
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    let answer = [&b"E"[..], &length.to_be_bytes(), &body].concat();
    let stream = tokio::io::join(std::io::Cursor::new(answer), tokio::io::sink());
    login_error(stream).unwrap_or_else(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_error_for_a_reason() {
        let error = made(IdleEnd::InTransaction.sqlstate(), "gone \0 away", Some("f"));
        assert_eq!(classify(&error), Failure::ConnectionLost);
        let error = error.as_db_error().expect("it is the server's");
        assert_eq!(error.message(), "gone  away");
        assert_eq!(error.code().code(), IdleEnd::InTransaction.sqlstate());
        assert_eq!(error.routine(), Some("f"));
    }
}
