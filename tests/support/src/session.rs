//! Sessions that do not use the library.

use std::sync::Arc;

use lockkeeper::LockKey;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config};

use crate::probe;
use crate::wait::until_waiting;

/// What comes of a statement that takes a while.
pub type Running = JoinHandle<Result<(), tokio_postgres::Error>>;

/// A connection of the driver's, and the pid of its backend.
#[derive(Clone, Debug)]
pub struct Session {
    /// The connection.
    pub client: Arc<Client>,
    /// Its backend.
    pub pid: i32,
}

impl Session {
    /// A new connection.
    ///
    /// # Panics
    ///
    /// When the server does not answer, or refuses.
    pub async fn connect(config: &Config) -> Session {
        Session::of(connect(config).await).await
    }

    /// A connection that there is.
    pub async fn of(client: Client) -> Session {
        let pid = pid_of(&client).await;
        // The statement that asked is closed by a message of its own, which is to be over by the time this is.
        client.batch_execute("").await.expect("an open connection");
        Session {
            client: Arc::new(client),
            pid,
        }
    }

    /// Runs statements to their end.
    pub async fn run(&self, sql: &str) {
        if let Err(error) = self.client.batch_execute(sql).await {
            panic!("{sql}: {}", probe::describe(&error));
        }
    }

    /// Begins statements that take a while.
    pub fn start(&self, sql: &str) -> Running {
        let (client, sql) = (Arc::clone(&self.client), sql.to_owned());
        tokio::spawn(async move { client.batch_execute(&sql).await })
    }

    /// Begins statements that wait for a lock, and returns when they do.
    pub async fn start_waiting(&self, observer: &Client, sql: &str) -> Running {
        let running = self.start(sql);
        until_waiting(observer, self.pid).await;
        running
    }

    /// Whether the server answers it.
    pub async fn is_alive(&self) -> bool {
        self.client.batch_execute("").await.is_ok()
    }
}

/// A connection of the driver's, served by a task of the current runtime.
///
/// # Panics
///
/// When the server does not answer, or refuses.
pub async fn connect(config: &Config) -> Client {
    match probe::connect(config).await {
        Ok(client) => client,
        Err(error) => panic!("cannot connect: {}", probe::describe(&error)),
    }
}

/// Cancels what a backend runs; panics if there is no such backend.
pub async fn cancel(observer: &Client, pid: i32) {
    signal(observer, "pg_cancel_backend", pid).await;
}

/// Ends a backend; panics if there is no such backend.
pub async fn terminate(observer: &Client, pid: i32) {
    signal(observer, "pg_terminate_backend", pid).await;
}

/// Calls one of the functions that signal a backend; panics if there is no such backend.
pub async fn signal(observer: &Client, function: &str, pid: i32) {
    let sql = format!("SELECT {function}($1)");
    let row = observer.query_one(&sql, &[&pid]).await;
    assert!(row.expect(&sql).get::<_, bool>(0), "{pid} has ended");
}

/// The backend of a connection.
pub async fn pid_of(client: &Client) -> i32 {
    let row = client.query_one("SELECT pg_backend_pid()", &[]).await;
    row.expect("an open connection").get(0)
}

/// How the SQL functions of advisory locks are given a key.
#[must_use]
pub fn sql_key(key: &LockKey) -> String {
    match (key.as_i32_pair(), key.as_i64()) {
        (Some((a, b)), _) => format!("({a})::int4, ({b})::int4"),
        // As a string, since the least of them is no number with a sign before it.
        (None, Some(n)) => format!("('{n}')::int8"),
        (None, None) => unreachable!("a key is one number or two"),
    }
}

/// Takes a session lock with `pg_advisory_lock`.
pub async fn lock_by_sql(client: &Client, key: impl Into<LockKey>) {
    let sql = format!("SELECT pg_advisory_lock({})", sql_key(&key.into()));
    client.batch_execute(&sql).await.expect(&sql);
}

/// Releases a session lock with `pg_advisory_unlock`; panics if the session does not hold it.
pub async fn unlock_by_sql(client: &Client, key: impl Into<LockKey>) {
    let sql = format!("SELECT pg_advisory_unlock({})", sql_key(&key.into()));
    let row = client.query_one(&sql, &[]).await.expect(&sql);
    assert!(row.get::<_, bool>(0), "the session does not hold the lock");
}

/// A name as SQL quotes it.
#[must_use]
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
