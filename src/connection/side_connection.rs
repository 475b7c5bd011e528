//! A connection beside the pool, for sampling and cancelling while the pool's own connections are stuck.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use tokio::sync::Mutex;
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

/// The side connection of one keeper: opened when it is first needed, and again when it has ended.
pub(crate) struct SideConnection {
    connect: Box<dyn Connect>,
    client: Mutex<Option<Client>>,
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
            connect: Box::new(connection),
            client: Mutex::new(None),
        }
    }

    pub(super) async fn cancel(&self, token: &CancelToken) -> Result<(), tokio_postgres::Error> {
        self.connect.cancel(token).await
    }

    /// Takes as long as the server, login included: callers bound it.
    pub(super) async fn ask(&self, sql: &str) -> Result<Reply, crate::error::Error> {
        let mut place = self.client.lock().await;
        // Cancel safety: taken out while in use, so that one whose answer was not awaited is closed, not used again.
        let client = match place.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => self.connect.connect().await?,
        };
        let bounded = crate::connection::sql::server::with_short_timeouts(sql);
        let reply = client.simple_query(&bounded).await;
        *place = Some(client);
        Ok(reply?)
    }
}

impl fmt::Debug for SideConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SideConnection").finish_non_exhaustive()
    }
}
