//! Who is compared, each over a pool of its own.

use std::fmt;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use lockkeeper::Keeper;
use sqlx::PgPool;
use sqlx::postgres::{PgAdvisoryLock, PgConnectOptions, PgPoolOptions, PgSslMode};
use tokio_postgres::config::Host;
use tokio_postgres::{Config, NoTls};

use crate::Failure;

/// One of those that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// This crate.
    Lockkeeper,
    /// tokio-postgres over deadpool-postgres, written out.
    ByHand,
    /// sqlx with its defaults.
    Sqlx,
    /// sqlx whose pool does not ask the server before it gives a connection.
    SqlxUntested,
}

impl Peer {
    /// All of them, in the order of the tables' columns.
    pub const ALL: [Self; 4] = [
        Self::Lockkeeper,
        Self::ByHand,
        Self::Sqlx,
        Self::SqlxUntested,
    ];

    /// Its column's head.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Lockkeeper => "lockkeeper",
            Self::ByHand => "by hand",
            Self::Sqlx => "sqlx",
            Self::SqlxUntested => "sqlx, no ping",
        }
    }

    /// The row of the table that is its own to write.
    pub(crate) fn row(self) -> i64 {
        match self {
            Self::Lockkeeper => 1,
            Self::ByHand => 2,
            Self::Sqlx => 3,
            Self::SqlxUntested => 4,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How many keys there are to choose from.
const KEYS: usize = 16;

/// A pool for each of the peers, all of one size, and the keys as each of them wants them.
#[derive(Debug)]
pub struct Pools {
    pub(crate) size: usize,
    pub(crate) keeper: Keeper,
    pub(crate) keepers_pool: Pool,
    pub(crate) by_hand: Pool,
    pub(crate) sqlx: PgPool,
    pub(crate) sqlx_untested: PgPool,
    pub(crate) names: Vec<String>,
    pub(crate) sqlx_locks: Vec<PgAdvisoryLock>,
}

impl Pools {
    /// Pools of `size` connections each. They connect when they are used.
    ///
    /// # Errors
    /// The configuration has no host, or a pool's builder refuses.
    pub fn new(config: &Config, size: usize) -> Result<Self, Failure> {
        let keepers_pool = deadpool(config, size)?;
        let names: Vec<_> = (0..KEYS).map(|n| format!("invoice:{n}")).collect();
        let sqlx = |tested| {
            let options = PgPoolOptions::new()
                .max_connections(u32::try_from(size)?)
                .test_before_acquire(tested);
            Ok::<_, Failure>(options.connect_lazy_with(sqlx_options(config)?))
        };
        Ok(Self {
            size,
            keeper: Keeper::new(keepers_pool.clone()),
            keepers_pool,
            by_hand: deadpool(config, size)?,
            sqlx: sqlx(true)?,
            sqlx_untested: sqlx(false)?,
            sqlx_locks: names.iter().map(PgAdvisoryLock::new).collect(),
            names,
        })
    }

    pub(crate) fn deadpool(&self, peer: Peer) -> &Pool {
        match peer {
            Peer::Lockkeeper => &self.keepers_pool,
            _ => &self.by_hand,
        }
    }

    pub(crate) fn sqlx(&self, peer: Peer) -> &PgPool {
        match peer {
            Peer::SqlxUntested => &self.sqlx_untested,
            _ => &self.sqlx,
        }
    }

    /// Takes every connection that the peer's pool may have at once, and hears the server on each.
    ///
    /// # Errors
    /// A connection is not to be had, or does not answer.
    pub async fn all_answer(&self, peer: Peer) -> Result<(), Failure> {
        match peer {
            Peer::Lockkeeper | Peer::ByHand => {
                let mut all = Vec::new();
                for _ in 0..self.size {
                    let object = self.deadpool(peer).get().await?;
                    object.batch_execute("SELECT 1").await?;
                    all.push(object);
                }
            }
            Peer::Sqlx | Peer::SqlxUntested => {
                let mut all = Vec::new();
                for _ in 0..self.size {
                    let mut connection = self.sqlx(peer).acquire().await?;
                    sqlx::query("SELECT 1").execute(&mut *connection).await?;
                    all.push(connection);
                }
            }
        }
        Ok(())
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.keepers_pool.close();
        self.by_hand.close();
        self.sqlx.close().await;
        self.sqlx_untested.close().await;
    }
}

/// A pool as deadpool-postgres' own documentation makes it.
fn deadpool(config: &Config, size: usize) -> Result<Pool, Failure> {
    let manager = Manager::from_config(
        config.clone(),
        NoTls,
        ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        },
    );
    let pool = Pool::builder(manager)
        .max_size(size)
        .runtime(Runtime::Tokio1)
        .build()?;
    Ok(pool)
}

/// The same server, in sqlx' terms.
fn sqlx_options(config: &Config) -> Result<PgConnectOptions, Failure> {
    let mut options = PgConnectOptions::new_without_pgpass().ssl_mode(PgSslMode::Disable);
    options = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => options.host(name),
        Some(Host::Unix(folder)) => options.socket(folder),
        None => return Err("the server has no host".into()),
    };
    if let Some(port) = config.get_ports().first() {
        options = options.port(*port);
    }
    if let Some(user) = config.get_user() {
        options = options.username(user);
    }
    if let Some(password) = config.get_password() {
        options = options.password(std::str::from_utf8(password)?);
    }
    if let Some(database) = config.get_dbname() {
        options = options.database(database);
    }
    Ok(options)
}
