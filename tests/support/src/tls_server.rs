//! A server that takes no connection over the network that is not encrypted.

use std::fmt;
use std::sync::{Arc, OnceLock};

use deadpool_postgres::Pool;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres::Config;
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::cluster::Cluster;
use crate::database::{Database, pool_over};
use crate::error::SetupError;
use crate::server::Server;
use crate::skip::Skip;

/// The only name of the server, and what its certificate is for.
const HOST: &str = "127.0.0.1";

/// A private cluster with a certificate of its own. What is not encrypted goes through the socket in its folder only: so
/// go the observers of the tests.
pub struct TlsServer {
    server: Server,
    connector: MakeRustlsConnect,
}

impl TlsServer {
    /// The one of this process, started at first use and gone when the process ends.
    ///
    /// # Errors
    ///
    /// A [`Skip`] (`tls`) where this PostgreSQL was built without it.
    ///
    /// # Panics
    ///
    /// When the server does not start for another reason.
    pub fn shared() -> Result<&'static TlsServer, Skip> {
        static SHARED: OnceLock<Result<TlsServer, Skip>> = OnceLock::new();
        let start = || match TlsServer::start() {
            Ok(server) => Ok(server),
            Err(error) if error.to_string().contains("not supported by this build") => {
                Err(Skip::new("tls", "this PostgreSQL was built without it"))
            }
            Err(error) => panic!("{error}"),
        };
        SHARED.get_or_init(start).as_ref().map_err(Clone::clone)
    }

    fn start() -> Result<TlsServer, SetupError> {
        let own = rcgen::generate_simple_self_signed([HOST.to_owned()])
            .map_err(SetupError::because("the certificate"))?;
        let mut roots = RootCertStore::empty();
        roots
            .add(own.cert.der().clone())
            .map_err(SetupError::because("the certificate"))?;
        let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(SetupError::because("the client's TLS"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let cluster = Cluster::start_encrypted(&own.cert.pem(), &own.signing_key.serialize_pem())?;
        Ok(TlsServer {
            server: Server::private(cluster),
            connector: MakeRustlsConnect::new(client),
        })
    }

    /// The server, whose [`config`](Server::config) leads to the socket in its folder.
    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// How to connect to a database of it over the network.
    #[must_use]
    pub fn config(&self, database: &Database, mode: SslMode) -> Config {
        let mut config = Config::new();
        config
            .host(HOST)
            .port(self.server.port())
            .user("postgres")
            .dbname(database.name())
            .ssl_mode(mode);
        config
    }

    /// What encrypts, and trusts this server alone.
    #[must_use]
    pub fn connector(&self) -> MakeRustlsConnect {
        self.connector.clone()
    }

    /// A pool of encrypted connections, like [`Database::pool`].
    ///
    /// # Panics
    ///
    /// Never: the pool connects at first use.
    #[must_use]
    pub fn pool(&self, database: &Database, mode: SslMode, size: usize) -> Pool {
        pool_over(self.config(database, mode), self.connector(), size)
    }
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}
