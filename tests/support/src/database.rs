//! A database of its own for each test.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, NoTls, Socket};

use crate::probe;
use crate::server::Server;

/// An empty database of its own; see [`Server::database`].
///
/// In the server of `DATABASE_URL` it is dropped with this value; a private cluster is removed as a whole.
#[derive(Debug)]
pub struct Database {
    server: Server,
    name: String,
}

impl Database {
    pub(crate) fn new(server: Server, name: String) -> Database {
        Database { server, name }
    }

    /// Its name, which needs no quotes in SQL.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The server it is in.
    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// How to connect to it, as the user of [`Server::config`].
    #[must_use]
    pub fn config(&self) -> Config {
        let mut config = self.server.config();
        config.dbname(&self.name);
        config
    }

    /// The same as a connection string.
    #[must_use]
    pub fn url(&self) -> String {
        with_database(&self.server.url(), &self.name)
    }

    /// A new connection, served by a task of the current runtime.
    ///
    /// # Panics
    ///
    /// When the server does not answer, or refuses.
    pub async fn connect(&self) -> Client {
        match probe::connect(&self.config()).await {
            Ok(client) => client,
            Err(error) => panic!(
                "cannot connect to {}: {}",
                self.name,
                probe::describe(&error)
            ),
        }
    }

    /// A pool of at most `size` connections, recycled the `Fast` way.
    ///
    /// # Panics
    ///
    /// Never: the pool connects at first use.
    #[must_use]
    pub fn pool(&self, size: usize) -> Pool {
        pool_of(self.config(), size)
    }

    /// The same, as another role.
    ///
    /// # Panics
    ///
    /// Never: the pool connects at first use.
    #[must_use]
    pub fn pool_as(&self, role: &str, size: usize) -> Pool {
        let mut config = self.config();
        config.user(role);
        pool_of(config, size)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if self.server.is_private() {
            return;
        }
        let config = self.server.config();
        let statement = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        // On a thread of its own, and not waited for longer than two seconds: dropping may not fail or hang a test. But
        // waited for, since the process may end next.
        let (done, ended) = mpsc::channel::<()>();
        let dropper = thread::Builder::new().spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            if let Ok(runtime) = runtime {
                runtime.block_on(async {
                    if let Ok(client) = probe::connect(&config).await {
                        client.batch_execute(&statement).await.ok();
                    }
                });
            }
            drop(done);
        });
        if dropper.is_ok() {
            // Either answer is an end: the channel closed, or the time is over.
            ended.recv_timeout(Duration::from_secs(2)).ok();
        }
    }
}

/// A pool of at most `size` connections, recycled the `Fast` way: one is not tried before it is given out.
///
/// # Panics
///
/// Never: the pool connects at first use.
#[must_use]
pub fn pool_of(config: Config, size: usize) -> Pool {
    pool_over(config, NoTls, size)
}

/// The same over an encrypted network.
pub(crate) fn pool_over<T>(config: Config, tls: T, size: usize) -> Pool
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::Stream: Send + Sync,
    T::TlsConnect: Send + Sync,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let manager = Manager::from_config(
        config,
        tls,
        ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        },
    );
    Pool::builder(manager)
        .max_size(size)
        .runtime(Runtime::Tokio1)
        .build()
        .expect("a pool without timeouts can always be built")
}

/// The connection string `url`, for another database.
fn with_database(url: &str, name: &str) -> String {
    let Some(authority) = url.find("://").map(|at| at + 3) else {
        // The form `key=value …`, in which the last one counts.
        return format!("{url} dbname={name}");
    };
    let path = url[authority..]
        .find(['/', '?'])
        .map_or(url.len(), |at| authority + at);
    let query = url[path..].find('?').map_or("", |at| &url[path + at..]);
    format!("{}/{name}{query}", &url[..path])
}

#[cfg(test)]
mod tests {
    use super::with_database;

    #[test]
    fn another_database() {
        for (url, expected) in [
            ("postgresql://u:p@h:1/old", "postgresql://u:p@h:1/new"),
            ("postgres://h", "postgres://h/new"),
            (
                "postgres://h/old?connect_timeout=3",
                "postgres://h/new?connect_timeout=3",
            ),
            (
                "postgres://h?connect_timeout=3",
                "postgres://h/new?connect_timeout=3",
            ),
            ("host=h dbname=old", "host=h dbname=old dbname=new"),
        ] {
            assert_eq!(with_database(url, "new"), expected);
            let parsed: Result<tokio_postgres::Config, _> = expected.parse();
            assert_eq!(
                parsed.ok().as_ref().and_then(|c| c.get_dbname()),
                Some("new")
            );
        }
    }
}
