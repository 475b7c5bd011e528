//! A connection beside the pool, for sampling and cancelling while the pool's own connections are stuck.
//!
//! It is one connection, as long as it answers at once. A question that finds it busy is asked on another one, which stays
//! until none of them is busy.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard, Notify};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{CancelToken, Client, Config, Socket};

use super::Reply;

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How to reach the server beside the pool, without the type of the TLS connector.
trait Connect: Send + Sync {
    fn connect(&self) -> BoxFuture<'_, Result<Client, tokio_postgres::Error>>;
    fn cancel<'a>(
        &'a self,
        token: &'a CancelToken,
    ) -> BoxFuture<'a, Result<(), tokio_postgres::Error>>;
}

/// Where the side connection goes and how: what [`KeeperBuilder::side_connection`](crate::KeeperBuilder::side_connection)
/// is given.
pub(crate) struct SideConfig<T> {
    pub(crate) config: Config,
    pub(crate) tls: T,
}

impl<T> Connect for SideConfig<T>
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::Stream: Send + Sync,
    T::TlsConnect: Send + Sync,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn connect(&self) -> BoxFuture<'_, Result<Client, tokio_postgres::Error>> {
        Box::pin(async {
            let (client, connection) = self.config.connect(self.tls.clone()).await?;
            drop(tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "side connection ended");
                }
            }));
            Ok(client)
        })
    }

    fn cancel<'a>(
        &'a self,
        token: &'a CancelToken,
    ) -> BoxFuture<'a, Result<(), tokio_postgres::Error>> {
        Box::pin(token.cancel_query(self.tls.clone()))
    }
}

/// How long to wait for a connection in use before another is opened: most answers are there sooner.
const PATIENCE: Duration = Duration::from_millis(20);

/// What a question is for. Questions of one purpose take turns. They do not wait for those of another, so one that the
/// server takes long to answer holds up only its like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// Cancelling, signalling, and what a caller cannot go on without.
    Urgent,
    /// Samples of the server while transactions wait.
    #[cfg(feature = "incidents")]
    Sampling,
    /// What is asked to be shown, and may take the server a while.
    #[cfg(any(feature = "monitor", feature = "schema"))]
    Monitoring,
}

/// How many purposes there are, and so how many connections at most.
const PURPOSES: usize = 3;

/// The side connection of one keeper: opened when it is first needed, and again when it has ended.
pub(crate) struct SideConnection {
    connect: Box<dyn Connect>,
    turns: [AsyncMutex<()>; PURPOSES],
    clients: Mutex<Clients>,
    /// Tells of a connection that is not in use any more.
    returned: Notify,
    #[cfg(feature = "monitor")]
    missing_tcp_timeouts: Option<String>,
}

#[derive(Default)]
struct Clients {
    /// One at most, unless others are in use.
    idle: Vec<Client>,
    in_use: usize,
}

impl SideConnection {
    pub(crate) fn new<T>(connection: SideConfig<T>) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send + Sync,
        T::TlsConnect: Send + Sync,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let mut connection = connection;
        connection
            .config
            .application_name(crate::connection::sql::server::SIDE_NAME);
        Self {
            #[cfg(feature = "monitor")]
            missing_tcp_timeouts: super::tcp_timeouts::missing_tcp_timeouts(&connection.config),
            connect: Box::new(connection),
            turns: Default::default(),
            clients: Mutex::default(),
            returned: Notify::new(),
        }
    }

    /// What its configuration lacks to find a dead peer.
    #[cfg(feature = "monitor")]
    pub(crate) fn missing_tcp_timeouts(&self) -> Option<&str> {
        self.missing_tcp_timeouts.as_deref()
    }

    pub(super) async fn cancel(&self, token: &CancelToken) -> Result<(), tokio_postgres::Error> {
        self.connect.cancel(token).await
    }

    /// A turn to ask, on a connection that nobody else uses meanwhile.
    ///
    /// Takes as long as others of this purpose: callers bound it.
    pub(super) async fn turn(&self, purpose: Purpose) -> Turn<'_> {
        let turn = self.turns[purpose as usize].lock().await;
        let mut returned = std::pin::pin!(self.returned.notified());
        // In this order, so that none is missed that is returned in between.
        returned.as_mut().enable();
        if self.clients().are_all_in_use() {
            // Whether it was in time shows below.
            let _ = tokio::time::timeout(PATIENCE, returned).await;
        }
        let client = {
            let mut clients = self.clients();
            clients.idle.retain(|client| !client.is_closed());
            clients.in_use += 1;
            clients.idle.pop()
        };
        Turn {
            side: self,
            client,
            _turn: turn,
        }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    fn are_all_in_use(&self) -> bool {
        self.in_use > 0 && self.idle.is_empty()
    }
}

/// The use of one side connection.
pub(super) struct Turn<'a> {
    side: &'a SideConnection,
    /// Before the first question there may be none.
    client: Option<Client>,
    _turn: AsyncMutexGuard<'a, ()>,
}

impl Turn<'_> {
    /// Takes as long as the server, login included: callers bound it.
    pub(super) async fn ask(&mut self, sql: &str) -> Result<Reply, crate::error::Error> {
        // Cancel safety: taken out while in use, so that one whose answer was not awaited is closed, not used again.
        let client = match self.client.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => self.side.connect.connect().await?,
        };
        let bounded = crate::connection::sql::server::with_short_timeouts(sql);
        let reply = client.simple_query(&bounded).await;
        self.client = Some(client);
        Ok(reply?)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let client = self.client.take().filter(|client| !client.is_closed());
        let closed = {
            let mut clients = self.side.clients();
            clients.in_use -= 1;
            clients.idle.extend(client);
            let most = if clients.in_use == 0 { 1 } else { PURPOSES };
            let most = most.min(clients.idle.len());
            clients.idle.split_off(most)
        };
        drop(closed);
        self.side.returned.notify_waiters();
    }
}

impl fmt::Debug for SideConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SideConnection").finish_non_exhaustive()
    }
}
