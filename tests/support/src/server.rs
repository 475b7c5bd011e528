//! The server that tests talk to: a private cluster, or the one of `DATABASE_URL`.

use std::env;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::Host;
use tokio_postgres::error::SqlState;

use crate::bouncer::{PgBouncer, PoolMode};
use crate::cluster::Cluster;
use crate::database::Database;
use crate::error::SetupError;
use crate::find;
use crate::probe;
use crate::skip::Skip;
use crate::standby;

/// A PostgreSQL server: a private cluster, or the one of `DATABASE_URL`.
///
/// A private cluster is stopped and removed when the server and all its [`Database`]s are dropped, or when the process
/// ends.
pub struct Server {
    inner: Arc<Inner>,
}

enum Inner {
    Private(Cluster),
    External {
        config: Box<Config>,
        url: String,
        major: u32,
    },
}

impl Server {
    /// The server of this process, started at first use and gone when the process ends.
    ///
    /// # Panics
    ///
    /// With the text of the [`SetupError`], when there is none.
    #[track_caller]
    #[must_use]
    pub fn shared() -> &'static Server {
        Server::shared_with_progress(|_| {})
    }

    /// As [`shared`](Self::shared), and passes a line of text to `report` before each step of the start: a server that
    /// has to be fetched first takes a while. A server that has been started before is not reported.
    ///
    /// # Panics
    ///
    /// With the text of the [`SetupError`], when there is none.
    #[track_caller]
    pub fn shared_with_progress(report: impl Fn(&str)) -> &'static Server {
        match Server::start_shared(&report) {
            Ok(server) => server,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`shared`](Self::shared), for a caller who can do something about it.
    ///
    /// # Errors
    ///
    /// The same one at each call of the process: no server was found, or it does not start or answer.
    pub fn try_shared() -> Result<&'static Server, SetupError> {
        Server::start_shared(&|_| {})
    }

    fn start_shared(report: &dyn Fn(&str)) -> Result<&'static Server, SetupError> {
        static SHARED: OnceLock<Result<Server, SetupError>> = OnceLock::new();
        SHARED
            .get_or_init(|| match env::var("DATABASE_URL") {
                Ok(url) if !url.is_empty() => {
                    report("connecting to the server of DATABASE_URL …");
                    Server::external(url)
                }
                _ => Ok(Server::private(Cluster::start(&[], report)?)),
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// A cluster of its own, with more lines for `postgresql.conf`.
    ///
    /// # Errors
    ///
    /// No PostgreSQL was found, or it does not start (the text has the end of its log).
    pub fn start(settings: &[(&str, &str)]) -> Result<Server, SetupError> {
        Ok(Server::private(Cluster::start(settings, &|_| {})?))
    }

    pub(crate) fn private(cluster: Cluster) -> Server {
        Server {
            inner: Arc::new(Inner::Private(cluster)),
        }
    }

    fn external(url: String) -> Result<Server, SetupError> {
        // The text of the URL stays out of the messages: it may have a password.
        let config: Config = url.parse().map_err(|error| {
            SetupError::new(format!(
                "DATABASE_URL cannot be read: {}",
                probe::describe(&error)
            ))
        })?;
        let asked = config.clone();
        let number =
            probe::blocking(|| async move { probe::ask(&asked, "SHOW server_version_num").await })
                .map_err(SetupError::because(
                    "the server of DATABASE_URL does not answer",
                ))?;
        let major = number.parse::<u32>().map_err(SetupError::because(
            "server_version_num of the server of DATABASE_URL",
        ))? / 10_000;
        match find::demanded_major()? {
            Some(demanded) if demanded != major => Err(SetupError::new(format!(
                "DATABASE_URL leads to PostgreSQL {major}, but LOCKKEEPER_PG_MAJOR={demanded}; unset one of them"
            ))),
            _ => Ok(Server {
                inner: Arc::new(Inner::External {
                    config: Box::new(config),
                    url,
                    major,
                }),
            }),
        }
    }

    /// Another handle, which keeps a private cluster alive.
    pub(crate) fn handle(&self) -> Server {
        Server {
            inner: Arc::clone(&self.inner),
        }
    }

    /// A superuser in the database `postgres`, or what `DATABASE_URL` says.
    #[must_use]
    pub fn config(&self) -> Config {
        match &*self.inner {
            Inner::Private(cluster) => cluster.config(),
            Inner::External { config, .. } => Config::clone(config),
        }
    }

    /// The same as a connection string.
    #[must_use]
    pub fn url(&self) -> String {
        match &*self.inner {
            Inner::Private(cluster) => {
                format!("postgresql://postgres@127.0.0.1:{}/postgres", cluster.port)
            }
            Inner::External { url, .. } => url.clone(),
        }
    }

    /// The host, or the folder of a Unix socket.
    #[must_use]
    pub fn host(&self) -> String {
        match self.config().get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            #[cfg(unix)]
            Some(Host::Unix(path)) => path.display().to_string(),
            None => self
                .config()
                .get_hostaddrs()
                .first()
                .map_or_else(|| "localhost".to_owned(), ToString::to_string),
        }
    }

    /// The TCP port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.config().get_ports().first().copied().unwrap_or(5432)
    }

    /// The major version of the server: 15 for PostgreSQL 15.18.
    #[must_use]
    pub fn major(&self) -> u32 {
        match &*self.inner {
            Inner::Private(cluster) => cluster.installation.major,
            Inner::External { major, .. } => *major,
        }
    }

    /// Whether this is a cluster that was started here, and not the server of `DATABASE_URL`.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.cluster().is_some()
    }

    pub(crate) fn cluster(&self) -> Option<&Cluster> {
        match &*self.inner {
            Inner::Private(cluster) => Some(cluster),
            Inner::External { .. } => None,
        }
    }

    /// The server's log so far; empty for an external server.
    #[must_use]
    pub fn log(&self) -> String {
        self.cluster().map(Cluster::log).unwrap_or_default()
    }

    /// The length of the log in bytes, for [`log_since`](Self::log_since).
    #[must_use]
    pub fn log_len(&self) -> usize {
        self.cluster()
            .and_then(|cluster| std::fs::metadata(cluster.log_file()).ok())
            .map_or(0, |metadata| {
                usize::try_from(metadata.len()).unwrap_or(usize::MAX)
            })
    }

    /// What was logged after the first `offset` bytes.
    #[must_use]
    pub fn log_since(&self, offset: usize) -> String {
        let mut bytes = Vec::new();
        if let Some(cluster) = self.cluster()
            && let Ok(mut file) = File::open(cluster.log_file())
            && file.seek(SeekFrom::Start(offset as u64)).is_ok()
        {
            // What could be read is all there is to say about a log.
            file.read_to_end(&mut bytes).ok();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A new empty database, `lockkeeper_<pid>_<number>`.
    ///
    /// # Panics
    ///
    /// When it cannot be created.
    pub async fn database(&self) -> Database {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let name = format!(
            "lockkeeper_{}_{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let client = probe::connect(&self.config())
            .await
            .unwrap_or_else(|error| {
                panic!(
                    "cannot connect to the test server: {}",
                    probe::describe(&error)
                )
            });
        let mut tries = 0;
        loop {
            tries += 1;
            match client
                .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE template0"))
                .await
            {
                Ok(()) => return Database::new(self.handle(), name),
                Err(error) if tries < 5 && error.code() == Some(&SqlState::OBJECT_IN_USE) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(error) => panic!("cannot create a database: {}", probe::describe(&error)),
            }
        }
    }

    /// A hot standby that streams from this server; it may lag behind, and is stopped when dropped.
    ///
    /// # Errors
    ///
    /// A [`Skip`] (`standby`) when this server is external.
    ///
    /// # Panics
    ///
    /// When the standby does not start.
    pub fn standby(&self) -> Result<Server, Skip> {
        let Some(primary) = self.cluster() else {
            return Err(Skip::new(
                "standby",
                "the server of DATABASE_URL is not ours to copy",
            ));
        };
        match standby::start(primary) {
            Ok(cluster) => Ok(Server::private(cluster)),
            Err(error) => panic!("no standby could be made: {error}"),
        }
    }

    /// A PgBouncer in front of `database`, with 20 server connections at most.
    ///
    /// # Errors
    ///
    /// A [`Skip`] (`pgbouncer`) when PgBouncer is not installed.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub fn pgbouncer(&self, mode: PoolMode, database: &str) -> Result<PgBouncer, Skip> {
        self.pgbouncer_with(mode, database, &[])
    }

    /// A PgBouncer with more lines for the section `[pgbouncer]` of its settings, such as `("default_pool_size", "1")`.
    ///
    /// # Errors
    ///
    /// A [`Skip`] (`pgbouncer`) when PgBouncer is not installed.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub fn pgbouncer_with(
        &self,
        mode: PoolMode,
        database: &str,
        settings: &[(&str, &str)],
    ) -> Result<PgBouncer, Skip> {
        PgBouncer::start(self, mode, database, settings)
    }

    /// Stops the server at once, as a crash of the machine would seem to its clients; [`restart`](Self::restart) starts
    /// it again.
    ///
    /// # Panics
    ///
    /// When the server is external.
    pub fn stop(&self) {
        self.own_cluster().stop("QUIT");
    }

    /// Kills the postmaster with SIGKILL; its backends end as soon as they notice.
    ///
    /// # Panics
    ///
    /// When the server is external.
    pub fn kill(&self) {
        self.own_cluster().stop("KILL");
    }

    /// Starts the server on the same port and with the same data, after a fast shutdown if it runs.
    ///
    /// # Panics
    ///
    /// When the server is external, or does not start.
    pub fn restart(&self) {
        if let Err(error) = self.own_cluster().restart() {
            panic!("{error}");
        }
    }

    fn own_cluster(&self) -> &Cluster {
        self.cluster()
            .expect("only a private server is stopped and started by tests: ask is_private() first")
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("private", &self.is_private())
            .field("major", &self.major())
            .field("host", &self.host())
            .field("port", &self.port())
            .finish()
    }
}
