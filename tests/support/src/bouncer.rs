//! A PgBouncer of its own.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use tokio_postgres::Config;

use crate::account::Account;
use crate::cluster::free_port;
use crate::database;
use crate::error::SetupError;
use crate::guardian::{self, Guardian};
use crate::probe;
use crate::server::Server;
use crate::skip::Skip;

/// When PgBouncer gives a server connection back to its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// When the client disconnects.
    Session,
    /// At the end of each transaction.
    Transaction,
    /// After each statement.
    Statement,
}

impl PoolMode {
    fn as_str(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Statement => "statement",
        }
    }
}

/// A PgBouncer in front of one database; stopped when dropped.
///
/// It asks for no password and logs in to the server as the user of [`Server::config`].
#[derive(Debug)]
pub struct PgBouncer {
    guardian: Guardian,
    process: Child,
    port: u16,
    database: String,
    version: (u32, u32),
}

impl PgBouncer {
    pub(crate) fn start(
        server: &Server,
        mode: PoolMode,
        database: &str,
        settings: &[(&str, &str)],
    ) -> Result<PgBouncer, Skip> {
        let Some(program) = find() else {
            return Err(Skip::new("pgbouncer", "PgBouncer is not installed"));
        };
        let mut tries = 0;
        loop {
            tries += 1;
            match launch(&program, server, mode, database, settings) {
                Ok(bouncer) => return Ok(bouncer),
                // Another process may have taken the port since.
                Err(error) if tries == 3 => panic!("{error}"),
                Err(_) => {}
            }
        }
    }

    /// How to connect to the database through it.
    #[must_use]
    pub fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host("127.0.0.1")
            .port(self.port)
            .user("postgres")
            .dbname(&self.database);
        config
    }

    /// The same as a connection string.
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "postgresql://postgres@127.0.0.1:{}/{}",
            self.port, self.database
        )
    }

    /// A pool of at most `size` connections to it, recycled the `Fast` way.
    ///
    /// # Panics
    ///
    /// Never: the pool connects at first use.
    #[must_use]
    pub fn pool(&self, size: usize) -> Pool {
        database::pool_of(self.config(), size)
    }

    /// Changes its mode while it runs, as a RELOAD does.
    ///
    /// # Panics
    ///
    /// When its console does not answer, or refuses.
    pub async fn set_pool_mode(&self, mode: PoolMode) {
        let mut console = self.config();
        console.dbname("pgbouncer");
        let client = probe::connect(&console).await.expect("a console");
        let set = format!("SET pool_mode = '{}'", mode.as_str());
        client.simple_query(&set).await.expect("the new mode");
    }

    /// Its TCP port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its version, such as `(1, 18)`: prepared statements in transaction mode came with `(1, 21)`.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.guardian.dir().join("pgbouncer.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        self.guardian.end(Some(&mut self.process));
    }
}

fn find() -> Option<PathBuf> {
    // The folders for servers are on root's PATH only.
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain(
            [
                "/usr/sbin",
                "/usr/bin",
                "/opt/homebrew/bin",
                "/usr/local/bin",
            ]
            .map(PathBuf::from),
        )
        .map(|dir| dir.join("pgbouncer"))
        .find(|program| program.is_file())
}

fn launch(
    program: &Path,
    server: &Server,
    mode: PoolMode,
    database: &str,
    settings: &[(&str, &str)],
) -> Result<PgBouncer, SetupError> {
    let account = Account::for_servers()?;
    let guardian = Guardian::new(account)?;
    let port = free_port()?;
    let ini = guardian.dir().join("pgbouncer.ini");
    let log = guardian.dir().join("pgbouncer.log");
    fs::write(&ini, settings_file(server, mode, database, settings, port))
        .and_then(|()| account.own(&ini))
        .map_err(SetupError::because(ini.display()))?;
    let args: [OsString; 1] = [ini.into()];
    let process = guardian
        .spawn(program, args, &log)
        .map_err(SetupError::because(program.display()))?;
    let mut bouncer = PgBouncer {
        guardian,
        process,
        port,
        database: database.to_owned(),
        version: version(program),
    };
    match bouncer.wait_until_ready() {
        Ok(()) => Ok(bouncer),
        Err(why) => Err(SetupError::new(format!(
            "{}: {why}\n{}",
            program.display(),
            guardian::tail(&log)
        ))),
    }
}

impl PgBouncer {
    fn wait_until_ready(&mut self) -> Result<(), String> {
        let config = self.config();
        let process = &mut self.process;
        probe::blocking(|| async move {
            let deadline = Instant::now() + Duration::from_secs(15);
            loop {
                if let Ok(Some(status)) = process.try_wait() {
                    return Err(format!("it ended with {status}"));
                }
                match probe::ask(&config, "SELECT 1").await {
                    Ok(_) => return Ok(()),
                    Err(why) if Instant::now() > deadline => return Err(why),
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        })
    }
}

fn settings_file(
    server: &Server,
    mode: PoolMode,
    database: &str,
    settings: &[(&str, &str)],
    port: u16,
) -> String {
    let config = server.config();
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let mut target = format!(
        "host={} port={} dbname={} user={}",
        quoted(&server.host()),
        server.port(),
        quoted(database),
        quoted(config.get_user().unwrap_or("postgres"))
    );
    if let Some(password) = config.get_password() {
        target.push_str(" password=");
        target.push_str(&quoted(&String::from_utf8_lossy(password)));
    }
    let mode = mode.as_str();
    let mut ini = format!(
        "[databases]\n{database} = {target}\n\n\
         [pgbouncer]\n\
         listen_addr = 127.0.0.1\n\
         listen_port = {port}\n\
         unix_socket_dir =\n\
         auth_type = any\n\
         admin_users = postgres\n\
         pool_mode = {mode}\n\
         max_client_conn = 500\n\
         default_pool_size = 20\n\
         ignore_startup_parameters = extra_float_digits\n"
    );
    for (name, value) in settings {
        writeln!(ini, "{name} = {value}").expect("writing to a string cannot fail");
    }
    ini
}

/// The first line of `pgbouncer --version` is `PgBouncer 1.18.0`.
fn version(program: &Path) -> (u32, u32) {
    let output = Command::new(program)
        .arg("--version")
        .current_dir("/")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    parse_version(&String::from_utf8_lossy(&text)).unwrap_or((0, 0))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.lines().next()?.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn versions_are_read() {
        assert_eq!(
            parse_version("PgBouncer 1.18.0\nlibevent 2.1.12\n"),
            Some((1, 18))
        );
        assert_eq!(parse_version(""), None);
    }
}
