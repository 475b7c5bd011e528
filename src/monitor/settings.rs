//! Which of the server's settings and privileges are unsafe for locking, and what fixes them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{settings_check, unreadable};
use crate::connection::sql::server::{BACKEND_PID, backend_pid};
use crate::connection::{Checkout, Connections, Session, SideConnection};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, is_insufficient_privilege};
use crate::monitor::sql::settings::{self as sql, PoolSession, SettingRow};

/// How long to wait for a connection of the pool.
const CHECKOUT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for a second connection to compare with.
const SECOND_CHECKOUT_TIMEOUT: Duration = Duration::from_secs(1);

/// The server's settings as the application's connections see them, and what should be changed:
/// [`Monitor::settings`](super::Monitor::settings).
///
/// `Display` lists the findings, worst first. With the feature `serde` it is `Serialize`: in JSON it has `version` (1),
/// `role`, `database`, `values`, an object of the settings that were read, as `SHOW` writes them, and `findings`, an
/// array. A finding has `name`, `severity` (`note`, `advice`, `warning`), `value`, `why`, the `statement` that fixes it
/// and its `effect` (`immediate`, `new_connections`, `reload`, `restart`), both `null` if no statement does.
#[derive(Clone, Debug)]
pub struct SettingsReport {
    session: PoolSession,
    values: Vec<SettingRow>,
    findings: Vec<SettingsFinding>,
}

impl SettingsReport {
    /// What should be changed or known, worst first. Empty for a server that is configured well.
    #[must_use]
    pub fn findings(&self) -> &[SettingsFinding] {
        &self.findings
    }

    /// The finding of one kind.
    #[must_use]
    pub fn finding(&self, kind: SettingsFindingKind) -> Option<&SettingsFinding> {
        self.findings.iter().find(|finding| finding.kind == kind)
    }

    /// The value of one of the settings that were read, as `SHOW` writes it: `1s`, `off`.
    #[must_use]
    pub fn value(&self, setting: &str) -> Option<&str> {
        let found = self.values.iter().find(|value| value.name == setting);
        found.map(|setting| &*setting.shown)
    }

    /// The settings that were read, each with its value as `SHOW` writes it.
    pub fn values(&self) -> impl Iterator<Item = (&str, &str)> {
        let values = self.values.iter();
        values.map(|setting| (&*setting.name, &*setting.shown))
    }

    getters! {
        /// The role the pool's connections log in as.
        role: &str = session.role;

        /// The database that the pool's connections are connected to.
        database: &str = session.database;
    }
}

/// One line for each finding; `nothing to mend` if there is none.
impl fmt::Display for SettingsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.findings.is_empty() {
            return f.write_str("nothing to mend\n");
        }
        self.findings
            .iter()
            .try_for_each(|finding| writeln!(f, "{finding}"))
    }
}

/// A property of the server, or of the connection to it, that should be changed or known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsFinding {
    pub(super) kind: SettingsFindingKind,
    pub(super) severity: Severity,
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) why: String,
    pub(super) fix: Option<(String, Effect)>,
}

impl SettingsFinding {
    getters! {
        /// What it is about.
        kind: SettingsFindingKind;

        /// How much it matters.
        severity: Severity;

        /// The setting or privilege, as PostgreSQL calls it (`lock_timeout`, `pg_read_all_stats`); `pooler`, `standby`,
        /// `side connection`.
        name: &str;

        /// What was seen: a setting as `SHOW` writes it; `not granted to "app"`, or `not inherited by "app"`.
        value: &str;

        /// The consequence, as a text for people.
        why: &str;
    }

    /// The statement that fixes it, with all names quoted. A role with the necessary privileges must run it on its own:
    /// `ALTER SYSTEM` does not run in a transaction. `None` if no statement fixes it; [`why`](Self::why) then says what
    /// does. If the server's provider does not permit `ALTER SYSTEM`, set the value through the provider's own
    /// configuration.
    #[must_use]
    pub fn statement(&self) -> Option<&str> {
        self.fix.as_ref().map(|(statement, _)| &**statement)
    }

    /// When the statement takes effect.
    #[must_use]
    pub fn effect(&self) -> Option<Effect> {
        self.fix.as_ref().map(|(_, effect)| *effect)
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
        match &self.fix {
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
    /// The sessions of other roles are not fully visible to the role that monitors.
    ReadAllStats,
    /// The role that monitors may not read `pg_locks`, which every role may by default.
    ReadLocks,
    /// The role that monitors may not cancel or terminate the sessions of other roles.
    SignalBackend,
    /// A pooler stands between the pool and the server: the backend's process id differs from the one announced at
    /// login.
    Pooler,
    /// The pool is connected to a standby.
    Standby,
    /// The side connection goes over TCP, and finds out late, or never, that its server is dead: see
    /// [`tcp_timeouts`](crate::tcp_timeouts). The pool's own configuration is not to be seen.
    TcpTimeouts,
}

/// How much a [`SettingsFinding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// Informational.
    Note,
    /// A recommended change.
    Advice,
    /// As configured, locks may be held or waited for too long, or problems go unreported.
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

/// When the statement that fixes a finding takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Effect {
    /// At once, for all sessions.
    Immediate,
    /// For connections opened afterwards: the pool's connections have to be closed.
    NewConnections,
    /// When the server reloads its configuration: `SELECT pg_reload_conf()`.
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

/// What is known about a pooler between the pool and the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pooler {
    /// No pooler was detected.
    Direct,
    /// There is a pooler; whether it keeps one server session for each client is not known.
    Unknown,
    /// There is a pooler, and it keeps one server session for each client.
    KeepsSessions,
    /// There is a pooler, and it was proven not to keep one server session for each client.
    SharesSessions,
}

/// Reads the settings and privileges, and judges them.
pub(super) async fn examine(connections: &Arc<Connections>) -> Result<SettingsReport, Error> {
    let reply = match connections.look(&sql::monitoring_role(true)).await {
        Err(error) if is_insufficient_privilege(&error) => {
            connections.look(&sql::monitoring_role(false)).await?
        }
        answer => answer?,
    };
    let role = sql::read_monitoring_role(&reply).ok_or_else(|| unreadable("privileges"))?;
    let (session, pool_session, values) = read_settings(connections).await?;
    let pooler = pooler(connections, session, pool_session.pid).await;
    let side = connections.side();
    let missing = side.and_then(SideConnection::missing_tcp_timeouts);
    let findings = settings_check::findings(&pool_session, &values, &role, pooler, missing);
    Ok(SettingsReport {
        session: pool_session,
        values,
        findings,
    })
}

/// Reads them on the first connection of the pool that is alive.
async fn read_settings(
    connections: &Arc<Connections>,
) -> Result<(Session, PoolSession, Vec<SettingRow>), Error> {
    let wait = Deadline::after(CHECKOUT_TIMEOUT);
    let mut checkout = Checkout::new(connections, &wait);
    loop {
        let (session, _) = checkout.next().await?;
        // Cancel safety: reads only; if the reply is not received, the connection is closed.
        match connections.answer(session.message(sql::SETTINGS)).await? {
            Ok(reply) => {
                let (pool_session, values) =
                    sql::read_settings(&reply).ok_or_else(|| unreadable("settings"))?;
                return Ok((session, pool_session, values));
            }
            Err(error) => {
                let error = Error::from(error);
                if error.kind() != ErrorKind::ConnectionLost {
                    return Err(error);
                }
                checkout.replace(error)?;
            }
        }
    }
}

/// Finds out what the session shows about a pooler, and returns it to the pool.
async fn pooler(connections: &Arc<Connections>, first: Session, pid: i32) -> Pooler {
    let direct = first.login_pid().is_none_or(|login| login == pid);
    let known = connections.capabilities().all_keep_sessions();
    if direct || known.is_some() {
        first.return_to_pool();
        return match (direct, known) {
            (true, _) => Pooler::Direct,
            (false, Some(true)) => Pooler::KeepsSessions,
            (false, _) => Pooler::SharesSessions,
        };
    }
    // Two connected clients that share one backend, or one client with two backends, prove that the pooler assigns a
    // server session to a client only while that runs something. The opposite observation proves nothing.
    let compared = connections.answer(async {
        let second = connections
            .check_out(&Deadline::after(SECOND_CHECKOUT_TIMEOUT))
            .await
            .ok()?;
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
