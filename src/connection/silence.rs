//! What to do about a server that does not answer.
//!
//! The kernel does not help: it sends no TCP keepalives while data is unacknowledged, and `tcp_user_timeout` alone does not
//! wake a connection on which nothing is sent ([`tcp_timeouts`](super::tcp_timeouts) sets both). So each wait for an answer is bounded here. A connection that was silent for
//! too long counts as lost: its statements end with the driver's error for a closed connection, and its session never goes
//! back to the pool.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::task::unconstrained;
use tokio_postgres::{Config, NoTls};

use super::request::poll_once;
use super::{Connections, Session};
use crate::connection::sql::server;
use crate::error::ErrorKind;

/// How much longer an answer may take that is on its way, when its backend has ended the statement.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

impl Session {
    /// The answer to a message of this crate, which waits for nothing but the server's attention.
    pub(super) async fn bounded<T>(
        &self,
        most: Duration,
        answer: Pin<&mut impl Future<Output = Result<T, tokio_postgres::Error>>>,
    ) -> Result<T, tokio_postgres::Error> {
        if self.is_lost() {
            return Err(closed());
        }
        match self.connections().bound(&self.runtime, most, answer).await {
            Some(answer) => answer,
            None => {
                self.lose("no answer to a message");
                Err(closed())
            }
        }
    }

    /// The answer to a statement of the caller, which may take as long as its backend is executing it.
    pub(super) async fn while_executing<T>(
        &self,
        answer: Pin<&mut impl Future<Output = Result<T, tokio_postgres::Error>>>,
        may_copy: bool,
    ) -> Result<T, tokio_postgres::Error> {
        if self.is_lost() {
            return Err(closed());
        }
        let (connections, runtime) = (self.connections(), &self.runtime);
        let pid = self.server_pid();
        match while_executing(connections, runtime, pid, may_copy, answer).await {
            Some(answer) => answer,
            None => {
                self.lose(
                    "a statement was silent, and its backend is not known to be executing it",
                );
                Err(closed())
            }
        }
    }

    /// Gives the connection up: what runs on it is cancelled, as far as the server can be reached.
    pub(super) fn lose(&self, why: &'static str) {
        tracing::warn!(
            pid = self.server_pid(),
            silence = ?self.connections().longest_silence(),
            "connection lost: {why}"
        );
        self.state.lost();
        self.cancel_in_background();
    }
}

/// The answer to a statement, or `None` where it was silent for too long and its backend is not known to be executing it.
pub(super) async fn while_executing<F: Future + Unpin>(
    connections: &Arc<Connections>,
    runtime: &Handle,
    pid: Option<i32>,
    may_copy: bool,
    mut answer: F,
) -> Option<F::Output> {
    let silence = connections.longest_silence();
    loop {
        if let Some(answer) = connections.bound(runtime, silence, &mut answer).await {
            return Some(answer);
        }
        // Boxed, because it is rare and every statement's future would have its size.
        let mut executing = Box::pin(is_executing(connections, pid, may_copy, silence));
        let both = poll_fn(|cx| match Pin::new(&mut answer).poll(cx) {
            Poll::Ready(answer) => Poll::Ready(Ok(answer)),
            Poll::Pending => executing.as_mut().poll(cx).map(Err),
        });
        match both.await {
            Ok(answer) => return Some(answer),
            Err(true) => {}
            Err(false) => break,
        }
    }
    let grace = silence.min(ON_ITS_WAY);
    connections.bound(runtime, grace, &mut answer).await
}

/// Whether the server says, on another connection and in time, that a backend is executing something.
async fn is_executing(
    connections: &Arc<Connections>,
    pid: Option<i32>,
    may_copy: bool,
    most: Duration,
) -> bool {
    let Some(pid) = pid else { return false };
    let question = server::is_executing(pid, may_copy);
    match connections.ask_persistently(most, &question).await {
        Ok(reply) => server::executes(&reply),
        // It answers, and refuses to tell (too many connections, a missing privilege): the server is alive. So it is where
        // it has answered others, and only the pool had no connection to ask on.
        Err(error) => {
            let is_busy = error.kind() == ErrorKind::Pool && connections.heard_within(most);
            is_busy || error.as_db_error().is_some()
        }
    }
}

/// The driver's error for a connection that has ended. The driver lets nobody make one, so it is made by a connection to a
/// server that closes it at once.
pub(super) fn closed() -> tokio_postgres::Error {
    match login_error(tokio::io::empty()) {
        Some(error) => error,
        None => unreachable!("nobody can log in on a stream that has ended"),
    }
}

/// The error of a login to a server whose whole answer is in the stream.
pub(super) fn login_error(
    stream: impl AsyncRead + AsyncWrite + Unpin,
) -> Option<tokio_postgres::Error> {
    let mut config = Config::new();
    config.user("nobody");
    // Everything in it is ready at the first poll, also where the task has used up its budget.
    let connecting = unconstrained(config.connect_raw(stream, NoTls));
    poll_once(pin!(connecting))?.err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Failure, classify};

    #[test]
    fn the_drivers_error_for_an_ended_connection() {
        let error = closed();
        assert!(error.is_closed());
        assert_eq!(error.to_string(), "connection closed");
        assert_eq!(classify(&error), Failure::ConnectionLost);
    }
}
