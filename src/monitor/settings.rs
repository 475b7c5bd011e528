//! What of the server's set-up is in the way of safe locking, and what mends it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{doctor, unreadable};
use crate::connection::sql::server::{BACKEND_PID, backend_pid};
use crate::connection::{Connections, Session};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
use crate::monitor::sql::settings::{self as sql, Place, Setting};

/// How long to wait for a connection of the pool.
const SPARE: Duration = Duration::from_secs(5);
/// How long for an answer on it; a pooler may have no backend to ask.
const ANSWER: Duration = Duration::from_secs(5);
/// The same for a second connection, to compare with.
const SECOND: Duration = Duration::from_secs(1);

/// What the application's connections see of the server's settings, and what is to be mended:
/// [`Monitor::settings`](super::Monitor::settings).
///
/// `Display` lists the findings, worst first. With the feature `serde` it is `Serialize`: in JSON `version` (1), `role`,
/// `database`, `values`, an object of the settings that were looked at, as `SHOW` writes them, and `findings`, an array.
/// A finding has `name`, `severity` (`note`, `advice`, `warning`), `value`, `why`, the `statement` that mends it and its
/// `effect` (`immediate`, `new_connections`, `reload`, `restart`), both `null` where no statement does.
#[derive(Clone, Debug)]
pub struct Settings {
    place: Place,
    values: Vec<Setting>,
    findings: Vec<SettingsFinding>,
}

impl Settings {
    /// What is to be mended or to be known, worst first. Nothing on a server that is set up well.
    #[must_use]
    pub fn findings(&self) -> &[SettingsFinding] {
        &self.findings
    }

    /// The finding of one kind.
    #[must_use]
    pub fn finding(&self, kind: SettingsFindingKind) -> Option<&SettingsFinding> {
        self.findings.iter().find(|finding| finding.kind == kind)
    }

    /// The value of one of the settings that were looked at, as `SHOW` writes it: `1s`, `off`.
    #[must_use]
    pub fn value(&self, setting: &str) -> Option<&str> {
        let found = self.values.iter().find(|value| value.name == setting);
        found.map(|setting| &*setting.shown)
    }

    /// The settings that were looked at, each with its value as `SHOW` writes it.
    pub fn values(&self) -> impl Iterator<Item = (&str, &str)> {
        let values = self.values.iter();
        values.map(|setting| (&*setting.name, &*setting.shown))
    }

    /// The role the pool's connections log in as.
    #[must_use]
    pub fn role(&self) -> &str {
        &self.place.role
    }

    /// The database they are connected to.
    #[must_use]
    pub fn database(&self) -> &str {
        &self.place.database
    }
}

/// A finding each line; `nothing to mend` where there is none.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.findings.is_empty() {
            return f.write_str("nothing to mend\n");
        }
        self.findings
            .iter()
            .try_for_each(|finding| writeln!(f, "{finding}"))
    }
}

/// Something about the server, or the way to it, that is to be mended or to be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsFinding {
    pub(super) kind: SettingsFindingKind,
    pub(super) severity: Severity,
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) why: String,
    pub(super) mend: Option<(String, Effect)>,
}

impl SettingsFinding {
    /// What it is about.
    #[must_use]
    pub fn kind(&self) -> SettingsFindingKind {
        self.kind
    }

    /// How much it matters.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.severity
    }

    /// The setting or privilege, as PostgreSQL calls it (`lock_timeout`, `pg_read_all_stats`); `pooler`, `standby`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name
    }

    /// What was seen: a setting as `SHOW` writes it; `not granted to "app"`, or `not inherited by "app"`.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// What follows from it, for people.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }

    /// The statement that mends it, with all names quoted, to be run on its own (`ALTER SYSTEM` does not run in a
    /// transaction) by whoever has the right to: `None` where no statement does, which is then in [`why`](Self::why).
    /// Where the server's provider does not let anybody run `ALTER SYSTEM`, it is the value to be given there.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.mend.as_ref().map(|(statement, _)| &**statement)
    }

    /// When the statement takes effect.
    #[must_use]
    pub fn effect(&self) -> Option<Effect> {
        self.mend.as_ref().map(|(_, effect)| *effect)
    }
}

/// `warning: lock_timeout = 0: … (mend with: ALTER ROLE "app" SET lock_timeout = '10s'; for new connections)`
impl fmt::Display for SettingsFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            severity,
            name,
            value,
            why,
            ..
        } = self;
        write!(f, "{severity}: {name} = {}: {why}", value.escape_debug())?;
        match &self.mend {
            Some((statement, effect)) => write!(f, " (mend with: {statement}; {effect})"),
            None => Ok(()),
        }
    }
}

/// What a [`SettingsFinding`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum SettingsFindingKind {
    /// `deadlock_timeout` is longer than 2 seconds, or shorter than 100 ms.
    DeadlockTimeout,
    /// `lock_timeout` is off, or not longer than `deadlock_timeout`.
    LockTimeout,
    /// `log_lock_waits` is off.
    LogLockWaits,
    /// `log_line_prefix` does not show `application_name` (`%a`), and there is a log with prefixes (`log_destination`).
    LogLinePrefix,
    /// `idle_in_transaction_session_timeout` is off.
    IdleInTransactionSessionTimeout,
    /// `client_connection_check_interval` is off.
    ClientConnectionCheckInterval,
    /// `max_locks_per_transaction` is below its default of 64, or the lock table is more than half full.
    MaxLocksPerTransaction,
    /// The role that looks does not see the sessions of others in full.
    ReadAllStats,
    /// The role that looks may not cancel or terminate the sessions of others.
    SignalBackend,
    /// A pooler stands between the pool and the server: the backend is not the one that was told at login.
    Pooler,
    /// The pool leads to a standby.
    Standby,
}

/// How much a [`SettingsFinding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// To be known.
    Note,
    /// Better otherwise.
    Advice,
    /// Locks will be held or awaited for too long, or trouble will not be seen, as it is.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Note => "note",
            Self::Advice => "advice",
            Self::Warning => "warning",
        })
    }
}

/// When a statement that mends something takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Effect {
    /// At once, everywhere.
    Immediate,
    /// For connections opened from then on: the pool's are to be closed.
    NewConnections,
    /// When the server reads its configuration again: `SELECT pg_reload_conf()`.
    Reload,
    /// When the server is restarted.
    Restart,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Immediate => "at once",
            Self::NewConnections => "for new connections",
            Self::Reload => "after pg_reload_conf()",
            Self::Restart => "after a restart of the server",
        })
    }
}

/// What is known of a pooler in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pooler {
    /// None was seen.
    Direct,
    /// There is one; whether it keeps one server session for each client is not known.
    Unknown,
    /// It does.
    KeepsSessions,
    /// It does not: proven.
    SharesSessions,
}

/// Asks, and judges.
pub(super) async fn examine(connections: &Arc<Connections>) -> Result<Settings, Error> {
    let reply = connections.ask(&sql::looker()).await?;
    let looker = sql::read_looker(&reply).ok_or_else(|| unreadable("privileges"))?;
    let (session, place, values) = see(connections).await?;
    let pooler = pooler(connections, session, place.pid).await;
    let findings = doctor::findings(&place, &values, &looker, pooler);
    Ok(Settings {
        place,
        values,
        findings,
    })
}

/// On the first connection of the pool that is alive.
async fn see(connections: &Arc<Connections>) -> Result<(Session, Place, Vec<Setting>), Error> {
    let mut dead = 0;
    loop {
        let session = connections.check_out(&Deadline::after(SPARE)).await?;
        // Cancel safety: reads only; unanswered, its connection is closed.
        match tokio::time::timeout(ANSWER, session.message(sql::SEEN)).await {
            Ok(Ok(reply)) => {
                let (place, values) = sql::seen(&reply).ok_or_else(|| unreadable("settings"))?;
                return Ok((session, place, values));
            }
            Ok(Err(error)) => {
                let error = Error::from(error);
                if error.kind() != ErrorKind::ConnectionLost || dead > connections.most() {
                    return Err(error);
                }
                dead += 1;
            }
            Err(_) => {
                return Err(Error::new(ErrorKind::ConnectionLost)
                    .with_detail("no answer about the settings on a connection of the pool")
                    .with_waited(ANSWER));
            }
        }
    }
}

/// Gives the session back, after what it can tell of a pooler.
async fn pooler(connections: &Arc<Connections>, first: Session, pid: i32) -> Pooler {
    let direct = first.login_pid().is_none_or(|login| login == pid);
    let known = connections.capabilities().keeps_sessions();
    if direct || known.is_some() {
        first.return_to_pool();
        return match (direct, known) {
            (true, _) => Pooler::Direct,
            (false, Some(true)) => Pooler::KeepsSessions,
            (false, _) => Pooler::SharesSessions,
        };
    }
    // Two clients that are both connected, with one backend between them, or one with two: it gives a server session to
    // whoever has something to run. The contrary proves nothing.
    let compared = tokio::time::timeout(ANSWER, async {
        let second = connections.check_out(&Deadline::after(SECOND)).await.ok()?;
        let beside = pid_of(&second).await;
        let after = pid_of(&first).await;
        second.return_to_pool();
        first.return_to_pool();
        Some(beside? == pid || after? != pid || beside? == after?)
    });
    match compared.await {
        Ok(Some(true)) => Pooler::SharesSessions,
        _ => Pooler::Unknown,
    }
}

async fn pid_of(session: &Session) -> Option<i32> {
    backend_pid(&session.message(BACKEND_PID).await.ok()?)
}
