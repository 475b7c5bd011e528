//! What is known of the pool's connections, so that it is not asked each time.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::{Error, is_missing_statement};
use crate::session::Session;
use crate::sql::advisory::{Ask, Locks, Preparable, Server, Tried, Verdict};

/// Connections remembered at most: pools are smaller, but their connections come and go.
const MOST: usize = 4096;

/// The connections that lead to their server directly and have told all about it.
#[derive(Debug)]
pub(crate) struct Known {
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
    prepared: HashSet<Preparable>,
}

impl Default for Known {
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

impl Known {
    /// What is to be asked on this connection, and how.
    pub(super) fn ask(&self, session: &Session, locks: Locks<'_>, session_lock: bool) -> Ask {
        let connections = self.lock();
        let Some(connection) = connections.by_birth.get(&session.created()) else {
            return Ask::All { login_pid: None };
        };
        match Preparable::of(locks, session_lock) {
            Some(statement) if self.prepares.load(Ordering::Relaxed) => {
                let name = statement.name(&connections.owner);
                if connection.prepared.contains(&statement) {
                    Ask::Execute(name)
                } else {
                    Ask::Prepare(name)
                }
            }
            _ => Ask::Little,
        }
    }

    /// Remembers what a `try` has brought to light.
    pub(super) fn learn(
        &self,
        session: &Session,
        ask: &Ask,
        tried: &Tried,
        locks: Locks<'_>,
        session_lock: bool,
    ) {
        if let (Ask::Prepare(_), Some(statement)) = (ask, Preparable::of(locks, session_lock))
            && let Some(connection) = self.lock().by_birth.get_mut(&session.created())
        {
            connection.prepared.insert(statement);
        }
        let Some(server) = &tried.server else { return };
        // Behind a pooler there may be another server the next time.
        if session.login_pid() != Some(tried.pid)
            || matches!(tried.verdict, Verdict::Standby | Verdict::Dirty)
        {
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

    /// The server that has answered, by its own word or by what is remembered of the connection.
    pub(super) fn server(&self, session: &Session, tried: &Tried) -> Option<Server> {
        let remembered = || {
            let connections = self.lock();
            let connection = connections.by_birth.get(&session.created())?;
            Some(connection.server.clone())
        };
        tried.server.clone().or_else(remembered)
    }

    /// What was prepared is not there: something deallocates it, and whole texts are sent from now on. The other way
    /// round, where a message that prepared was given up before its answer, only its connection is lost.
    pub(super) fn unprepared(&self, error: &Error) {
        if is_missing_statement(error) {
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
