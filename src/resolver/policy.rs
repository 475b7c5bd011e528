//! What a resolver may do.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::key::LockKey;
use crate::monitor::RecoveryCriterion;
use crate::monitor::database_filter::DatabaseFilter;
use crate::resolver::pattern::Pattern;

use super::load_hook::LoadChange;

/// More frequent polling would show nothing more.
const MIN_POLL: Duration = Duration::from_millis(10);

/// Programs that take backups over an ordinary connection.
const BACKUP_PROGRAMS: [&str; 9] = [
    "pg_dump*",
    "pg_basebackup*",
    "pg_receivewal*",
    "pg_recvlogical*",
    "pg_rewind*",
    "pg_probackup*",
    "pgbackrest*",
    "barman*",
    "wal-g*",
];

/// Programs that change schemas.
const MIGRATION_PROGRAMS: [&str; 9] = [
    "*migrat*",
    "*flyway*",
    "*liquibase*",
    "*alembic*",
    "*sqitch*",
    "pgroll*",
    "pg_repack*",
    "pg_squeeze*",
    "pg_restore*",
];

/// What a [`Resolver`](super::Resolver) may do, when, and to which sessions: nothing unless [`execute`](Self::execute)
/// is set.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use lockkeeper::{RecoveryCriterion, ResolverPolicy};
///
/// let policy = ResolverPolicy::new()
///     .wait(Duration::from_secs(20))
///     .idle_grace(Duration::from_secs(60))
///     .protect("reporting *")
///     .recovered_when(RecoveryCriterion::waits_shorter_than(Duration::from_secs(1)).checks(5))
///     .execute(true);
/// ```
#[derive(Clone)]
pub struct ResolverPolicy {
    pub(super) execute: bool,
    pub(super) wait: Duration,
    pub(super) idle_grace: Duration,
    pub(super) idle_session_grace: Option<Duration>,
    pub(super) settle: Duration,
    pub(super) poll: Duration,
    pub(super) deadline: Duration,
    pub(super) max_signals: u32,
    pub(super) allow_terminate: bool,
    pub(super) protected_applications: Vec<Pattern>,
    pub(super) backup_programs: Vec<Pattern>,
    pub(super) migration_programs: Vec<Pattern>,
    pub(super) migration_keys: Vec<LockKey>,
    pub(super) allow_migrations: bool,
    pub(super) allow_superusers: bool,
    pub(super) allow_own_sessions: bool,
    pub(super) databases: DatabaseFilter,
    pub(super) criterion: RecoveryCriterion,
    pub(super) load_callback: Option<Arc<dyn Fn(LoadChange) + Send + Sync>>,
    pub(super) hook_timeout: Duration,
}

impl Default for ResolverPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl ResolverPolicy {
    /// A dry run: reports what it would do, and does nothing.
    #[must_use]
    pub fn new() -> Self {
        let patterns = |texts: &[&str]| texts.iter().map(|text| Pattern::new(text)).collect();
        Self {
            execute: false,
            wait: Duration::from_secs(30),
            idle_grace: Duration::from_secs(60),
            idle_session_grace: None,
            settle: Duration::from_secs(5),
            poll: Duration::from_millis(500),
            deadline: Duration::from_secs(15 * 60),
            max_signals: 10,
            allow_terminate: true,
            protected_applications: Vec::new(),
            backup_programs: patterns(&BACKUP_PROGRAMS),
            migration_programs: patterns(&MIGRATION_PROGRAMS),
            migration_keys: Vec::new(),
            allow_migrations: false,
            allow_superusers: false,
            allow_own_sessions: false,
            databases: DatabaseFilter::default(),
            criterion: RecoveryCriterion::no_waits(),
            load_callback: None,
            hook_timeout: Duration::from_secs(5),
        }
    }

    /// Whether [`run`](super::Resolver::run) does what the plan says. By default it does not: it is a dry run, which
    /// sends no signal and calls no hook.
    #[must_use]
    pub fn execute(mut self, execute: bool) -> Self {
        self.execute = execute;
        self
    }

    /// How long a root blocker that runs a statement is left to finish before the statement is cancelled, counted from
    /// when the resolver starts with it; 30 seconds by default.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How long a root blocker must have been idle in its transaction before its session is terminated, which is the
    /// only thing that ends such a transaction; 60 seconds by default.
    #[must_use]
    pub fn idle_grace(mut self, grace: Duration) -> Self {
        self.idle_grace = grace;
        self
    }

    /// How long a session that blocks others with a session-level advisory lock must have been idle, outside of any
    /// transaction, before it is terminated. `None`, the default, is never: it may be intended.
    #[must_use]
    pub fn idle_session_grace(mut self, grace: impl Into<Option<Duration>>) -> Self {
        self.idle_session_grace = grace.into();
        self
    }

    /// How long to wait for the effect of a signal before the next step; 5 seconds by default.
    #[must_use]
    pub fn settle(mut self, settle: Duration) -> Self {
        self.settle = settle;
        self
    }

    /// How often to take a snapshot; every 500 milliseconds by default, 10 at least.
    #[must_use]
    pub fn poll(mut self, poll: Duration) -> Self {
        self.poll = poll;
        self
    }

    /// The maximum duration of a run; 15 minutes by default.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The maximum number of signals that a run sends; 10 by default.
    #[must_use]
    pub fn max_signals(mut self, signals: u32) -> Self {
        self.max_signals = signals;
        self
    }

    /// Whether sessions may be terminated if a cancel did not help or is not possible; allowed by default.
    #[must_use]
    pub fn allow_terminate(mut self, allow: bool) -> Self {
        self.allow_terminate = allow;
        self
    }

    /// Leaves sessions alone whose `application_name` matches the pattern, in addition to those that are always left
    /// alone. `*` matches any characters, `?` any one character; case is ignored.
    #[must_use]
    pub fn protect(mut self, pattern: impl AsRef<str>) -> Self {
        self.protected_applications
            .push(Pattern::new(pattern.as_ref()));
        self
    }

    /// An advisory lock that a program holds while it changes the schema: its holder is a migration. These keys are
    /// known without this call: those with `migrat` in their name, if this process knows the name; that of goose; and
    /// with the feature `compat` those that Rails, sqlx, golang-migrate and Flyway use by default. Advisory locks of
    /// databases other than the monitor's are not considered.
    #[must_use]
    pub fn migration_key(mut self, key: impl Into<LockKey>) -> Self {
        self.migration_keys.push(key.into());
        self
    }

    /// Whether migrations and index builds may be signalled; not allowed by default.
    #[must_use]
    pub fn allow_migrations(mut self, allow: bool) -> Self {
        self.allow_migrations = allow;
        self
    }

    /// Whether sessions of superusers other than the resolver's own role may be signalled; not allowed by default.
    #[must_use]
    pub fn allow_superusers(mut self, allow: bool) -> Self {
        self.allow_superusers = allow;
        self
    }

    /// Whether sessions that a guard or transaction of this process owns may be signalled; not allowed by default.
    #[must_use]
    pub fn allow_own_sessions(mut self, allow: bool) -> Self {
        self.allow_own_sessions = allow;
        self
    }

    /// Resolves only root blockers in this database, and counts only sessions that wait in it. Several calls name
    /// several databases. By default all databases of the server are included.
    #[must_use]
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.databases.0.push(name.into().into());
        self
    }

    /// When the incident is over: the run stops, and the load that was shed is resumed. By default, when no session
    /// waits in three consecutive snapshots.
    #[must_use]
    pub fn recovered_when(mut self, criterion: RecoveryCriterion) -> Self {
        self.criterion = criterion;
        self
    }

    /// A hook that pauses the application's heavy jobs before anything else is done, and resumes them when the incident
    /// is over.
    ///
    /// It is called with [`LoadChange::Shed`] once, and then once with [`LoadChange::Resume`] when the criterion of
    /// [`recovered_when`](Self::recovered_when) holds, or with [`LoadChange::GaveUp`] when the run ends in another way,
    /// including when its future is dropped. It runs on a thread on which blocking is permitted. A panic is contained
    /// and logged. If the hook takes longer than the [`hook_timeout`](Self::hook_timeout), the run continues without
    /// it. It is not called in a dry run.
    #[must_use]
    pub fn shed_load(mut self, hook: impl Fn(LoadChange) + Send + Sync + 'static) -> Self {
        self.load_callback = Some(Arc::new(hook));
        self
    }

    /// How long a run waits for the hook of [`shed_load`](Self::shed_load); 5 seconds by default.
    #[must_use]
    pub fn hook_timeout(mut self, timeout: Duration) -> Self {
        self.hook_timeout = timeout;
        self
    }

    /// Whether sessions of this database are included.
    pub(super) fn includes_database(&self, name: Option<&str>) -> bool {
        self.databases.includes(name)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if self.poll < MIN_POLL {
            return Err(Error::config(format!(
                "a resolver that looks every {:?}: at least {MIN_POLL:?}",
                self.poll
            )));
        }
        if self.max_signals == 0 && self.execute {
            return Err(Error::config(
                "a resolver that may send 0 signals: at least 1, or leave out execute(true)",
            ));
        }
        if self.deadline.is_zero() {
            return Err(Error::config(
                "a resolver with a deadline of 0s: more than that",
            ));
        }
        self.criterion.check()
    }
}

impl fmt::Debug for ResolverPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResolverPolicy")
            .field("execute", &self.execute)
            .field("wait", &self.wait)
            .field("idle_grace", &self.idle_grace)
            .field("settle", &self.settle)
            .field("deadline", &self.deadline)
            .field("max_signals", &self.max_signals)
            .field("allow_terminate", &self.allow_terminate)
            .field("criterion", &self.criterion)
            .field("sheds_load", &self.load_callback.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn by_default_nothing_is_done() {
        assert!(!ResolverPolicy::new().execute);
        assert!(ResolverPolicy::default().check().is_ok());
    }

    #[test]
    fn an_invalid_policy_is_refused() {
        let policy = ResolverPolicy::new;
        for policy in [
            policy().poll(Duration::from_millis(9)),
            policy().execute(true).max_signals(0),
            policy().deadline(Duration::ZERO),
            policy().recovered_when(RecoveryCriterion::no_waits().checks(0)),
        ] {
            let error = policy.check().expect_err("it is refused");
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        }
    }
}
