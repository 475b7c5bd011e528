//! What is left on the server, asked over a connection that takes no part.

use std::fmt;
use std::time::{Duration, Instant};

use lockkeeper_testkit::Database;
use tokio_postgres::Client;

use crate::{Failure, case};

/// A connection beside all pools.
#[derive(Debug)]
pub struct Observer {
    client: Client,
}

/// Advisory locks of the database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Granted.
    pub held: i64,
    /// Awaited.
    pub waiting: i64,
}

impl Left {
    /// Neither held nor awaited.
    #[must_use]
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} held, {} waiting", self.held, self.waiting))
    }
}

impl Observer {
    /// Connects, and makes the table that the cases need.
    ///
    /// # Errors
    /// The server's.
    pub async fn new(database: &Database) -> Result<Self, Failure> {
        let client = database.connect().await;
        case::prepare(&client).await?;
        Ok(Self { client })
    }

    /// What is in `pg_locks` now.
    ///
    /// # Errors
    /// The server's.
    pub async fn left(&self) -> Result<Left, Failure> {
        let row = self
            .client
            .query_one(
                "SELECT count(*) FILTER (WHERE granted), count(*) FILTER (WHERE NOT granted) FROM pg_locks \
                 WHERE locktype = 'advisory' \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                &[],
            )
            .await?;
        Ok(Left {
            held: row.get(0),
            waiting: row.get(1),
        })
    }

    /// Looks again and again, until nothing is left or the time is over: the last look, and how long it took.
    ///
    /// # Errors
    /// The server's.
    pub async fn left_within(&self, limit: Duration) -> Result<(Left, Duration), Failure> {
        let started = Instant::now();
        loop {
            let left = self.left().await?;
            if left.is_nothing() || started.elapsed() >= limit {
                return Ok((left, started.elapsed()));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// How many more connections the server takes.
    ///
    /// # Errors
    /// The server's.
    pub async fn free_connections(&self) -> Result<usize, Failure> {
        let row = self
            .client
            .query_one(
                "SELECT current_setting('max_connections')::bigint \
                 - current_setting('superuser_reserved_connections')::bigint - count(*) \
                 FROM pg_stat_activity WHERE backend_type = 'client backend'",
                &[],
            )
            .await?;
        Ok(usize::try_from(row.get::<_, i64>(0)).unwrap_or_default())
    }

    /// How many sessions this database has ever had, once this one is the last.
    ///
    /// The server counts a session even if its client had given up before the login was through, and shows it when the
    /// session has ended.
    ///
    /// # Errors
    /// The server's.
    pub async fn sessions_when_alone(&self) -> Result<i64, Failure> {
        let started = Instant::now();
        loop {
            let row = self
                .client
                .query_one(
                    "SELECT count(*), (SELECT sessions FROM pg_stat_database WHERE datname = current_database()) \
                     FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
                    &[],
                )
                .await?;
            if row.get::<_, i64>(0) == 0 || started.elapsed() > Duration::from_secs(5) {
                return Ok(row.get(1));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The server's version, as it says it.
    ///
    /// # Errors
    /// The server's.
    pub async fn version(&self) -> Result<String, Failure> {
        let row = self.client.query_one("SHOW server_version", &[]).await?;
        Ok(row.get(0))
    }
}
