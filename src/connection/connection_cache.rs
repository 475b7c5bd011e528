//! What is known of the pool's connections, so that it is not asked each time.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Session;
use crate::connection::sql::server::Server;
use crate::connection::sql::{PreparedName, Probe};
use crate::error::Failure;

/// Connections remembered at most: pools are smaller, but their connections come and go.
const MOST: usize = 4096;

/// The connections that lead to their server directly and have told all about it.
#[derive(Debug)]
pub(crate) struct ConnectionCache {
    connections: Mutex<Connections>,
    /// Cleared when something deallocates what was prepared (`DISCARD ALL` between two borrowers of a pool).
    prepares: AtomicBool,
}

#[derive(Debug)]
struct Connections {
    // By the time the pool opened them, which tells them apart.
    by_birth: HashMap<Instant, Connection>,
    /// In the names of statements: unlike that of any other keeper, or of those forgotten.
    owner: String,
}

#[derive(Debug)]
struct Connection {
    server: Server,
    prepared: HashSet<PreparedName>,
}

impl Default for ConnectionCache {
    fn default() -> Self {
        Self {
            connections: Mutex::new(Connections {
                by_birth: HashMap::new(),
                owner: owner(),
            }),
            prepares: AtomicBool::new(true),
        }
    }
}

impl ConnectionCache {
    /// What is to be asked on this connection, and how.
    pub(crate) fn probe(&self, session: &Session, statement: Option<PreparedName>) -> Probe {
        let connections = self.lock();
        let Some(connection) = connections.by_birth.get(&session.created()) else {
            return Probe::Full { login_pid: None };
        };
        match statement {
            Some(statement) if self.prepares.load(Ordering::Relaxed) => {
                let name = statement.name(&connections.owner);
                if connection.prepared.contains(&statement) {
                    Probe::Execute(name)
                } else {
                    Probe::Prepare(name)
                }
            }
            _ => Probe::Minimal,
        }
    }

    /// Remembers that what was to be prepared is: its message was answered.
    fn prepared(&self, session: &Session, statement: PreparedName) {
        if let Some(connection) = self.lock().by_birth.get_mut(&session.created()) {
            connection.prepared.insert(statement);
        }
    }

    /// Remembers the server behind a connection, if that is direct: behind a pooler there may be another the next time.
    fn learn(&self, session: &Session, pid: i32, server: &Server) {
        if session.login_pid() != Some(pid) {
            return;
        }
        let mut connections = self.lock();
        if connections.by_birth.len() >= MOST {
            connections.by_birth.clear();
            connections.owner = owner();
        }
        connections.by_birth.insert(
            session.created(),
            Connection {
                server: server.clone(),
                prepared: HashSet::new(),
            },
        );
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
            self.learn(session, pid, server);
        }
    }

    /// The server behind a connection.
    pub(crate) fn server(&self, session: &Session) -> Option<Server> {
        let connections = self.lock();
        let connection = connections.by_birth.get(&session.created())?;
        Some(connection.server.clone())
    }

    /// Where what was prepared is not there, something deallocates it, and whole texts are sent from now on. The other way
    /// round, where a message that prepared was given up before its answer, only its connection is lost.
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

/// A number nobody else in this process has: several keepers may share a pool.
fn owner() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed).to_string()
}
