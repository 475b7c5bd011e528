//! What is left on the server, asked over a connection that takes no part.

use std::fmt;
use std::time::{Duration, Instant};

use lockkeeper_testkit::Database;
use tokio_postgres::Client;

use crate::{Failure, case};

/// How long what is going on may take to end.
const GRACE: Duration = Duration::from_secs(2);

/// A connection beside all pools.
#[derive(Debug)]
pub struct Observer {
    pub(crate) client: Client,
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

/// Transactions of the database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Sessions with a transaction open.
    pub open: i64,
    /// Locks awaited, of whichever kind.
    pub waiting: i64,
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!(
            "{} transactions open, {} locks awaited",
            self.open, self.waiting
        ))
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

    /// The transactions that are open now, but for the observer's own.
    ///
    /// # Errors
    /// The server's.
    pub async fn unfinished(&self) -> Result<Unfinished, Failure> {
        let row = self
            .client
            .query_one(
                "SELECT count(*) FILTER (WHERE a.xact_start IS NOT NULL), \
                 (SELECT count(*) FROM pg_locks AS l WHERE NOT l.granted AND l.pid = ANY (array_agg(a.pid))) \
                 FROM pg_stat_activity AS a WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() \
                 AND a.backend_type = 'client backend'",
                &[],
            )
            .await?;
        Ok(Unfinished {
            open: row.get(0),
            waiting: row.get(1),
        })
    }

    /// Gives what is going on some time to end: a program's last question.
    ///
    /// # Errors
    /// A transaction is still open, or an advisory lock still there; the server's.
    pub async fn nothing_is_left(&self) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            let (left, unfinished) = (self.left().await?, self.unfinished().await?);
            if left.is_nothing() && unfinished == Unfinished::default() {
                return Ok(());
            }
            if started.elapsed() > GRACE {
                return Err(
                    format!("left on the server: advisory locks {left}; {unfinished}").into(),
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until as many locks are awaited.
    ///
    /// # Errors
    /// They never were; the server's.
    pub(crate) async fn waiting(&self, count: usize) -> Result<(), Failure> {
        let started = Instant::now();
        loop {
            let unfinished = self.unfinished().await?;
            if usize::try_from(unfinished.waiting) == Ok(count) {
                return Ok(());
            }
            if started.elapsed() > Duration::from_secs(10) {
                return Err(format!("{unfinished}, and {count} were to wait").into());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// How many deadlocks the server has found in this database. A session tells of its own when it ends, if not before.
    ///
    /// # Errors
    /// The server's.
    pub(crate) async fn deadlocks_when_alone(&self) -> Result<i64, Failure> {
        self.sessions_when_alone().await?;
        let row = self
            .client
            .query_one(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()",
                &[],
            )
            .await?;
        Ok(row.get(0))
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
