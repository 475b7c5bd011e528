//! What is known of the pool's connections, so that it is not asked each time.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant as Birth;

use tokio::time::Instant;

use super::Session;
use super::server_capabilities::AGE;
use crate::connection::sql::server::Server;
use crate::connection::sql::{PreparedName, Probe, Refusal};
use crate::error::Failure;

/// Connections remembered at most: pools are smaller, but their connections come and go.
const MOST: usize = 4096;

/// The connections that lead to their server directly and have told all about it.
#[derive(Debug)]
pub(crate) struct ConnectionCache {
    connections: Mutex<Connections>,
    /// Cleared when something deallocates what was prepared (`DISCARD ALL` between two borrowers of a pool).
    prepares: AtomicBool,
    database: OnceLock<Arc<str>>,
}

#[derive(Debug)]
struct Connections {
    // By the time the pool opened them, which tells them apart.
    by_birth: BTreeMap<Birth, Connection>,
    /// In the names of statements: unlike that of any other keeper, or of those forgotten.
    owner: String,
}

#[derive(Debug)]
struct Connection {
    server: Server,
    learnt: Instant,
    prepared: BTreeMap<PreparedName, Preparing>,
}

/// How far a statement has come on a connection.
#[derive(Debug, Default)]
struct Preparing {
    /// How often it was to be prepared: each time under another name, since a message that was given up may have prepared it.
    tries: u32,
    is_prepared: bool,
    /// What the last try named it.
    name: Arc<str>,
}

impl Preparing {
    /// Its name for one more try.
    fn next_name(&mut self, statement: PreparedName, owner: &str) -> Arc<str> {
        self.tries = self.tries.saturating_add(1);
        let name = statement.name(owner);
        self.name = match self.tries {
            1 => name.into(),
            tries => format!("{name}_{tries}").into(),
        };
        Arc::clone(&self.name)
    }
}

impl Default for ConnectionCache {
    fn default() -> Self {
        Self {
            connections: Mutex::new(Connections {
                by_birth: BTreeMap::new(),
                owner: owner(),
            }),
            prepares: AtomicBool::new(true),
            database: OnceLock::new(),
        }
    }
}

impl ConnectionCache {
    /// What is to be asked on this connection, and how: everything where that was long ago.
    pub(crate) fn probe(&self, session: &Session, statement: Option<PreparedName>) -> Probe {
        let mut connections = self.lock();
        let Connections { by_birth, owner } = &mut *connections;
        let Some(connection) = by_birth.get_mut(&session.created()) else {
            return Probe::Full(Refusal::None);
        };
        if connection.learnt.elapsed() >= AGE {
            return Probe::Full(Refusal::None);
        }
        match statement {
            Some(statement) if self.prepares.load(Ordering::Relaxed) => {
                let preparing = connection.prepared.entry(statement).or_default();
                if preparing.is_prepared {
                    return Probe::Execute(Arc::clone(&preparing.name));
                }
                Probe::Prepare(preparing.next_name(statement, owner))
            }
            _ => Probe::Minimal,
        }
    }

    /// The name of a statement that is prepared on this connection.
    pub(crate) fn prepared_name(
        &self,
        session: &Session,
        statement: Option<PreparedName>,
    ) -> Option<Arc<str>> {
        let connections = self.lock();
        let connection = connections.by_birth.get(&session.created())?;
        let statement = statement.filter(|_| self.prepares.load(Ordering::Relaxed))?;
        let preparing = connection.prepared.get(&statement)?;
        preparing.is_prepared.then(|| Arc::clone(&preparing.name))
    }

    /// Remembers that what was to be prepared is: its message was answered.
    fn prepared(&self, session: &Session, statement: PreparedName) {
        if let Some(connection) = self.lock().by_birth.get_mut(&session.created())
            && let Some(preparing) = connection.prepared.get_mut(&statement)
        {
            preparing.is_prepared = true;
        }
    }

    /// Remembers the server behind a connection, if that is direct: behind a pooler there may be another the next time. Not
    /// a standby, which may be promoted.
    fn learn(&self, session: &Session, pid: i32, server: &Server) {
        session
            .connections()
            .capabilities()
            .learn_denied(server.denied);
        if server.is_standby || session.login_pid() != Some(pid) {
            return;
        }
        let (server, learnt) = (server.clone(), Instant::now());
        let mut connections = self.lock();
        if let Some(connection) = connections.by_birth.get_mut(&session.created()) {
            (connection.server, connection.learnt) = (server, learnt);
            return;
        }
        if connections.by_birth.len() >= MOST {
            connections.by_birth.clear();
            connections.owner = owner();
        }
        let connection = Connection {
            server,
            learnt,
            prepared: BTreeMap::new(),
        };
        connections.by_birth.insert(session.created(), connection);
    }

    /// Remembers what the reply to a probe says: that the statement is prepared, and which server it is.
    pub(crate) fn learn_reply(
        &self,
        session: &Session,
        probe: &Probe,
        statement: Option<PreparedName>,
        pid: i32,
        server: Option<&Server>,
    ) {
        if let (Probe::Prepare(_), Some(statement)) = (probe, statement) {
            self.prepared(session, statement);
        }
        if let Some(server) = server {
            self.database.get_or_init(|| Arc::clone(&server.database));
            self.learn(session, pid, server);
        }
    }

    /// The database that all connections of the pool lead to, once one of them has said it.
    pub(crate) fn database(&self) -> Option<&str> {
        self.database.get().map(|database| &**database)
    }

    /// The server behind a connection.
    pub(crate) fn server(&self, session: &Session) -> Option<Server> {
        let connections = self.lock();
        let connection = connections.by_birth.get(&session.created())?;
        Some(connection.server.clone())
    }

    /// Where what was prepared is not there, something deallocates it, and whole texts are sent from now on. The other way
    /// round, where somebody has prepared our name, only the connection is lost.
    pub(crate) fn learn_failure(&self, failure: Failure) {
        if failure == Failure::MissingStatement {
            self.prepares.store(false, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What nobody else has: several keepers may share a pool, several copies of this crate a process, and several processes
/// the backends of a pooler.
fn owner() -> String {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let keeper = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{:016x}_{keeper}", *PROCESS)
}
