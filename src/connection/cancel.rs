//! Stopping what a backend is running, from outside its connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::{CancelToken, NoTls};

use super::Connections;
use super::pool::Asker;
use super::request::{poll_once, run_shielded};
use super::sql::server;
use crate::error::Error;

/// How long one attempt to cancel may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// What a signal to the backend of a session may hit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum SignalTarget {
    /// Nothing: the session has no transaction there, or has begun to end it.
    #[default]
    Nothing,
    /// Whatever the backend is executing. It executes only for this session as long as the session's connection is open.
    Backend,
    /// The transaction that began at this time, in microseconds since 1970 by the server's clock.
    Transaction(i64),
}

impl SignalTarget {
    fn includes(self, xact_start: i64) -> bool {
        match self {
            Self::Nothing => false,
            Self::Backend => true,
            Self::Transaction(own) => own == xact_start,
        }
    }
}

/// The target of one session. It is locked while a signal is under way.
///
/// A pooler gives the backend to another client when the session's transaction ends, or when its connection is closed.
/// A signal that was sent before can then hit the other client's statement, whatever it compares: the server compares
/// first and sends the signal after. So whoever ends the transaction or closes the connection takes the lock before, and
/// leaves what a later signal may still hit.
pub(super) type SharedSignalTarget = Arc<Mutex<SignalTarget>>;

/// Ready at the first poll where no signal is under way.
pub(super) async fn lock(target: &SharedSignalTarget) -> OwnedMutexGuard<SignalTarget> {
    match Arc::clone(target).try_lock_owned() {
        Ok(locked) => locked,
        Err(_) => Arc::clone(target).lock_owned().await,
    }
}

/// What it takes to cancel one backend's statement after its session is out of reach. One for each session.
#[derive(Clone)]
pub(crate) struct Canceller(Arc<Reach>);

struct Reach {
    token: CancelToken,
    /// The pid the server itself gave, where it was asked; 0 before. Behind a pooler it differs from the one of the protocol.
    server_pid: AtomicI32,
    /// What a signal to the backend may hit.
    target: SharedSignalTarget,
    connections: Arc<Connections>,
}

impl Canceller {
    pub(super) fn new(token: CancelToken, connections: Arc<Connections>) -> Self {
        Self(Arc::new(Reach {
            token,
            server_pid: AtomicI32::new(0),
            target: SharedSignalTarget::default(),
            connections,
        }))
    }

    pub(super) fn connections(&self) -> &Arc<Connections> {
        &self.0.connections
    }

    pub(super) fn target(&self) -> &SharedSignalTarget {
        &self.0.target
    }

    /// `None` before the server was asked.
    pub(super) fn server_pid(&self) -> Option<i32> {
        let pid = self.0.server_pid.load(Ordering::Relaxed);
        (pid != 0).then_some(pid)
    }

    pub(super) fn set_server_pid(&self, pid: i32) {
        self.0.server_pid.store(pid, Ordering::Relaxed);
    }

    /// The pid that the protocol gave at login.
    pub(super) fn login_pid(&self) -> Option<i32> {
        login_pid(&self.0.token)
    }

    /// See [`login_name`].
    pub(super) fn login_name(&self) -> Option<Box<[u8]>> {
        login_name(&self.0.token)
    }

    /// Ready when no signal is under way.
    pub(crate) async fn settled(&self) {
        drop(lock(self.target()).await);
    }

    /// Sends one cancel. Failures are logged: the caller sees by the answer whether it helped.
    ///
    /// Nothing is sent where the server has not answered yet. Whether there is a pooler is not known then, and a first
    /// message waits for no lock.
    pub(crate) async fn cancel(&self) {
        if self.server_pid().is_none() {
            return;
        }
        let attempt = async {
            if self.is_pooled() {
                // A pooler's own way of passing a cancel on may hit another client's statement
                // (<https://github.com/pgbouncer/pgbouncer/issues/801>): signal through the server instead.
                return self.signal().await;
            }
            let sent = match self.connections().side() {
                Some(side) => side.cancel(&self.0.token).await,
                // A server takes a cancel request unencrypted, whatever its pg_hba.conf says of logins.
                None => self.0.token.cancel_query(NoTls).await,
            };
            match sent {
                Ok(()) => Ok(()),
                Err(error) => {
                    tracing::debug!(%error, "cancel request not sent, signalling the backend instead");
                    self.signal().await
                }
            }
        };
        match tokio::time::timeout(ATTEMPT, attempt).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, pid = self.server_pid(), "cancel failed"),
            Err(_) => tracing::debug!(pid = self.server_pid(), "cancel took too long"),
        }
    }

    pub(super) fn is_pooled(&self) -> bool {
        matches!((self.login_pid(), self.server_pid()), (Some(login), Some(server)) if login != server)
    }

    /// `pg_cancel_backend` over another connection.
    ///
    /// Cancel safety: once polled it goes on, so that the lock is held until the signal is answered.
    async fn signal(&self) -> Result<(), Error> {
        let signalled = self.signal_if(Asker::default(), || Some(()), drop);
        signalled.await
    }

    /// The same over the connection of an `asker`, for what is wanted at the moment when nothing else can follow on the
    /// session. `confirm` is told at such a moment too, when the signal has been sent.
    ///
    /// Cancel safety: once polled it goes on. Where it is not confirmed, the signal may still be under way.
    pub(crate) async fn signal_if<T: Send>(
        &self,
        asker: Asker,
        is_wanted: impl FnOnce() -> Option<T> + Send + 'static,
        confirm: impl FnOnce(T) + Send + 'static,
    ) -> Result<(), Error> {
        let this = self.clone();
        let signalled = run_shielded(async move {
            let Some(pid) = this.server_pid() else {
                return Ok(());
            };
            let question = server::executing(pid);
            let asked = asker.ask_first(this.connections(), &question);
            let Ok(asked) = tokio::time::timeout(ATTEMPT, asked).await else {
                return Ok(());
            };
            let (asked, reply) = asked?;
            let executing = server::xact_start(&reply);
            let target = lock(this.target()).await;
            // Where the connection is still open, the answer was about this session.
            let executing = executing.filter(|xact_start| target.includes(*xact_start));
            let Some((xact_start, wanted)) = executing.and_then(|at| Some((at, is_wanted()?)))
            else {
                asked.end();
                return Ok(());
            };
            // Sent once: where its answer is lost, it may still arrive.
            let signal = server::cancel_transaction(pid, xact_start);
            drop(asked.ask(&signal).await?);
            confirm(wanted);
            Ok(())
        });
        signalled.await.unwrap_or(Ok(()))
    }
}

/// The backend's pid as the protocol gave it at login. The driver keeps it to itself, so it is read from the cancel
/// request that the driver would send.
fn login_pid(token: &CancelToken) -> Option<i32> {
    pid_to_cancel(&cancel_request(token)?)
}

/// What tells a connection from all others of the process: its cancel request, which has the pid and a secret.
pub(super) fn login_name(token: &CancelToken) -> Option<Box<[u8]>> {
    Some(cancel_request(token)?.into())
}

fn cancel_request(token: &CancelToken) -> Option<Vec<u8>> {
    let mut wire = Wire::default();
    // Everything in it is ready at the first poll.
    poll_once(std::pin::pin!(token.cancel_query_raw(&mut wire, PlainTls)))?.ok()?;
    Some(wire.written)
}

/// The code of a cancel request (PostgreSQL's documentation, "Message Formats", CancelRequest).
const CANCEL_REQUEST: u32 = 80_877_102;

/// The pid in the cancel request among a client's first messages. Each begins with its length and its code; in a cancel
/// request the pid follows, and then a key of 4 bytes, or of 4 to 256 since protocol 3.2.
fn pid_to_cancel(mut messages: &[u8]) -> Option<i32> {
    loop {
        let length = u32::from_be_bytes(*messages.first_chunk()?);
        let (message, rest) = messages.split_at_checked(usize::try_from(length).ok()?)?;
        let code = message.get(4..8)?.try_into().ok()?;
        if u32::from_be_bytes(code) == CANCEL_REQUEST {
            // A key has to follow.
            let pid = message.get(8..12).filter(|_| message.len() >= 16)?;
            return pid.try_into().ok().map(i32::from_be_bytes);
        }
        messages = rest;
    }
}

/// A stream that goes nowhere: it keeps what is written, and answers a request for TLS with yes.
#[derive(Default)]
struct Wire {
    written: Vec<u8>,
}

impl AsyncRead for &mut Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        buf.put_slice(b"S");
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for &mut Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.written.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl TlsStream for &mut Wire {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

/// TLS that changes nothing, for [`Wire`] alone.
struct PlainTls;

impl<'a> TlsConnect<&'a mut Wire> for PlainTls {
    type Stream = &'a mut Wire;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Stream, Self::Error>>;

    fn connect(self, stream: &'a mut Wire) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(8 + body.len()).expect("it is short");
        [&length.to_be_bytes(), &code.to_be_bytes(), body].concat()
    }

    #[test]
    fn the_pid_is_found_whatever_the_length_of_the_key() {
        let pid = 4711_i32.to_be_bytes();
        for key in [4, 32, 256] {
            let request = message(CANCEL_REQUEST, &[&pid[..], &vec![0xab; key]].concat());
            assert_eq!(pid_to_cancel(&request), Some(4711), "{key}");
            // Behind a request for TLS.
            let both = [message(80_877_103, &[]), request].concat();
            assert_eq!(pid_to_cancel(&both), Some(4711), "{key}");
        }
    }

    #[test]
    fn what_is_no_cancel_request_has_no_pid() {
        let request = message(CANCEL_REQUEST, &[0; 8]);
        for bytes in [
            &[][..],
            &request[..15],
            &[0; 16],
            &message(196_608, &[0; 8]),
            &message(CANCEL_REQUEST, &[0; 4]),
        ] {
            assert_eq!(pid_to_cancel(bytes), None, "{bytes:?}");
        }
    }
}
