//! A monitor, and sessions for it to see.

use lockkeeper::graph::Backend;
use lockkeeper::{Keeper, Monitor};
use tokio_postgres::{Client, Config, NoTls};

use crate::database::Database;
use crate::server::Server;
use crate::session::{Session, quoted};
use crate::wait::{until_gone, until_in_state, until_waiting};

/// A table `t (id, v)` with the rows 1 to 9.
pub const NINE_ROWS: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); \
                             INSERT INTO t SELECT n, 'x' FROM generate_series(1, 9) n";

/// A database with the table of [`NINE_ROWS`], a monitor that sees it over a side connection, and an observer.
#[derive(Debug)]
pub struct MonitorScene {
    /// The database, in the server that all tests share or in one of the test's own.
    pub database: Database,
    /// The monitor's keeper.
    pub keeper: Keeper,
    /// What is tested.
    pub monitor: Monitor,
    /// Asks the server about all of this.
    pub observer: Client,
}

impl MonitorScene {
    /// One in the shared server.
    pub async fn new() -> MonitorScene {
        MonitorScene::on(Server::shared()).await
    }

    /// One in another server.
    pub async fn on(server: &Server) -> MonitorScene {
        let database = server.database().await;
        let observer = database.connect().await;
        observer.batch_execute(NINE_ROWS).await.expect(NINE_ROWS);
        let keeper = keeper_as(&database, database.config());
        MonitorScene {
            monitor: keeper.monitor(),
            keeper,
            observer,
            database,
        }
    }

    /// A session that does not use the library.
    pub async fn session(&self) -> Session {
        Session::connect(&self.database.config()).await
    }

    /// Runs statements on the observer's connection.
    pub async fn run(&self, sql: &str) {
        self.observer.batch_execute(sql).await.expect(sql);
    }

    /// How to connect as a role, which is made. It is called `name` and the name of the database.
    pub async fn role(&self, name: &str, with: &str) -> Config {
        let name = format!("{name} {}", self.database.name());
        let quoted = quoted(&name);
        self.run(&format!(
            "CREATE ROLE {quoted} LOGIN PASSWORD 'secret' {with}; GRANT ALL ON t TO {quoted}"
        ))
        .await;
        let mut config = self.database.config();
        config.user(&name).password("secret");
        config
    }

    /// Roles are of the whole server, and outlive the database.
    pub async fn drop_roles(&self) {
        let like = format!("% {}", self.database.name());
        let sql = "SELECT rolname FROM pg_roles WHERE rolname LIKE $1";
        for row in self.observer.query(sql, &[&like]).await.expect(sql) {
            let role = quoted(row.get(0));
            self.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
                .await;
        }
    }

    /// The session as the monitor sees it now.
    pub async fn seen(&self, pid: i32) -> Backend {
        seen_by(&self.monitor, pid).await
    }

    /// Waits until a backend is in a state of `pg_stat_activity`.
    pub async fn until_in_state(&self, pid: i32, state: &str) {
        until_in_state(&self.observer, pid, state).await;
    }

    /// Waits until a backend waits for a lock.
    pub async fn until_waiting(&self, pid: i32) {
        until_waiting(&self.observer, pid).await;
    }

    /// Waits until a backend has ended.
    pub async fn until_gone(&self, pid: i32) {
        until_gone(&self.observer, pid).await;
    }
}

/// A keeper of one role. Its pool is of the same role: a question that the side connection does not answer in time is asked
/// on the pool's.
#[must_use]
pub fn keeper_as(database: &Database, config: Config) -> Keeper {
    let role = config.get_user().expect("a role is named");
    Keeper::builder(database.pool_as(role, 2))
        .application("test")
        .side_connection(config, NoTls)
        .build()
}

/// A session as a monitor sees it now.
pub async fn seen_by(monitor: &Monitor, pid: i32) -> Backend {
    let activity = monitor.activity().await.expect("an answer of the server");
    let found = activity.iter().find(|backend| backend.pid() == Some(pid));
    found.expect("a backend of this pid").clone()
}
