//! What a watchdog reports, and whether it clears it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::finding::Finding;
use crate::error::Error;
use crate::key::LockKey;
use crate::resolver::ResolverPolicy;
use crate::resolver::pattern::Pattern;

/// An application's name is truncated if a long call site follows it, but never to less than this (test
/// `a_long_prefix_gives_way_to_the_path`).
const MIN_APPLICATION_PREFIX: usize = 24;
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// The application's callback for findings.
pub(super) type FindingCallback = Arc<dyn Fn(&Finding) + Send + Sync>;

/// The age from which on a problem is reported, and whether it is then cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FindingRule {
    pub(super) age: Option<Duration>,
    pub(super) clear: bool,
}

impl FindingRule {
    const fn reported_from(seconds: u64) -> Self {
        Self {
            age: Some(Duration::from_secs(seconds)),
            clear: false,
        }
    }
}

/// What a [`Watchdog`](super::Watchdog) reports, and how often it checks. It changes nothing unless it is allowed to.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use lockkeeper::WatchdogPolicy;
///
/// let policy = WatchdogPolicy::new()
///     .every(Duration::from_secs(30))
///     .leaked_locks(Duration::from_secs(600))
///     .idle_blockers(Duration::from_secs(60))
///     .clear_idle_blockers(true)
///     .on_finding(|finding| eprintln!("{finding}"));
/// ```
#[derive(Clone)]
pub struct WatchdogPolicy {
    pub(super) interval: Duration,
    pub(super) leaks: FindingRule,
    pub(super) idle: FindingRule,
    pub(super) zombies: FindingRule,
    pub(super) zombie_applications: Vec<Pattern>,
    /// Which sessions are left alone, and in which databases: as for a resolver.
    pub(super) protection_policy: ResolverPolicy,
    pub(super) callback: Option<FindingCallback>,
}

impl Default for WatchdogPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl WatchdogPolicy {
    /// Reports every kind of finding, every 10 seconds, and clears none.
    #[must_use]
    pub fn new() -> Self {
        Self {
            interval: Duration::from_secs(10),
            leaks: FindingRule::reported_from(5 * 60),
            idle: FindingRule::reported_from(60),
            zombies: FindingRule::reported_from(10 * 60),
            zombie_applications: Vec::new(),
            protection_policy: ResolverPolicy::new(),
            callback: None,
        }
    }

    /// The interval between samples; 10 seconds by default, 100 milliseconds at least.
    #[must_use]
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long a session must have been idle, outside of any transaction, for the advisory locks that it holds to
    /// count as leaked, unless a live guard of this process owns it; 5 minutes by default, `None` for never. See
    /// [`Monitor::leaks`](crate::Monitor::leaks): guards of other processes are not known here, but
    /// their [heartbeat](crate::KeeperBuilder::heartbeat) keeps their sessions from being idle for long.
    #[must_use]
    pub fn leaked_locks(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.leaks.age = age.into();
        self
    }

    /// Whether sessions with leaked locks are terminated; not by default.
    #[must_use]
    pub fn clear_leaked_locks(mut self, clear: bool) -> Self {
        self.leaks.clear = clear;
        self
    }

    /// How long a session that blocks others must have been idle in its transaction to be reported; 1 minute by
    /// default, `None` for never.
    #[must_use]
    pub fn idle_blockers(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.idle.age = age.into();
        self
    }

    /// Whether such sessions are terminated; not by default.
    #[must_use]
    pub fn clear_idle_blockers(mut self, clear: bool) -> Self {
        self.idle.clear = clear;
        self
    }

    /// How long a session must have waited for a lock for its client to count as gone; 10 minutes by default, `None`
    /// for never.
    ///
    /// The server does not show whether a client is still connected. A session that waits for a lock does not check its
    /// connection unless `client_connection_check_interval` is set; if it is, the server itself ends the session. So a
    /// zombie is a wait that is longer than any client of the application would tolerate: give the limit of the
    /// application's own timeouts, plus a margin for a slow network. Sessions that a guard or transaction of this
    /// process owns are alive, and are never zombies.
    #[must_use]
    pub fn zombie_waiters(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.zombies.age = age.into();
        self
    }

    /// Whether the statements of such waiters are cancelled, which removes them from the lock queue; not by default. A
    /// client that is still connected gets an error that it can handle.
    #[must_use]
    pub fn clear_zombie_waiters(mut self, clear: bool) -> Self {
        self.zombies.clear = clear;
        self
    }

    /// Limits zombie waiters to sessions whose `application_name` matches the pattern: `*` matches any characters, `?`
    /// any one character. With several calls, one of the patterns has to match. Without this call, a
    /// [`Keeper`](crate::Keeper) considers the sessions with its own [application](crate::KeeperBuilder::application),
    /// since it knows how long they wait, and a [`Monitor`](crate::Monitor) considers all.
    #[must_use]
    pub fn zombie_application(mut self, pattern: impl AsRef<str>) -> Self {
        self.zombie_applications
            .push(Pattern::new(pattern.as_ref()));
        self
    }

    /// Never clears sessions whose `application_name` matches the pattern, in addition to those that a
    /// [`Resolver`](crate::Resolver) leaves alone: replication, backups, migrations, superusers, this process' own.
    #[must_use]
    pub fn protect(mut self, pattern: impl AsRef<str>) -> Self {
        self.protection_policy = self.protection_policy.protect(pattern);
        self
    }

    /// An advisory lock that a program holds while it changes the schema; see
    /// [`ResolverPolicy::migration_key`](crate::ResolverPolicy::migration_key).
    #[must_use]
    pub fn migration_key(mut self, key: impl Into<LockKey>) -> Self {
        self.protection_policy = self.protection_policy.migration_key(key);
        self
    }

    /// Considers only sessions in this database. Several calls name several databases. By default all databases of the
    /// server are included, but advisory locks of other databases are never considered.
    #[must_use]
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.protection_policy = self.protection_policy.database(name);
        self
    }

    /// A callback that receives each [`Finding`] once, and again when the outcome of clearing it changes.
    ///
    /// It is called on a thread on which blocking is permitted, with one finding after another. While it is slow, up to
    /// 64 findings are queued; a sample with more waits up to 5 seconds for it, and drops the rest. A panic is
    /// contained. Each finding is also a `tracing` event of level `WARN` and target `lockkeeper::watchdog`.
    #[must_use]
    pub fn on_finding(mut self, f: impl Fn(&Finding) + Send + Sync + 'static) -> Self {
        self.callback = Some(Arc::new(f));
        self
    }

    /// Limits zombie waiters to the sessions of a keeper with this `application_name`, unless a limit is set.
    pub(crate) fn default_zombie_application(self, application_name: &str) -> Self {
        if self.zombie_applications.is_empty() {
            let prefix: String = application_name
                .chars()
                .take(MIN_APPLICATION_PREFIX)
                .collect();
            self.zombie_application(format!("{prefix}*"))
        } else {
            self
        }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if self.interval < MIN_INTERVAL {
            return Err(Error::config(format!(
                "a watchdog every {:?}: at least {MIN_INTERVAL:?}",
                self.interval
            )));
        }
        for (rule, option) in [
            (self.leaks, "leaked_locks"),
            (self.idle, "idle_blockers"),
            (self.zombies, "zombie_waiters"),
        ] {
            if rule.clear && rule.age.is_none() {
                return Err(Error::config(format!(
                    "clear_{option}(true), but {option}(None) looks for none: give an age"
                )));
            }
            if rule.clear && rule.age.is_some_and(|age| age.is_zero()) {
                return Err(Error::config(format!(
                    "clear_{option}(true) from an age of 0s would clear what has just begun: give an age in {option}"
                )));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for WatchdogPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchdogPolicy")
            .field("interval", &self.interval)
            .field("leaks", &self.leaks)
            .field("idle", &self.idle)
            .field("zombies", &self.zombies)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn by_default_nothing_is_cleared() {
        let policy = WatchdogPolicy::default();
        assert!(!policy.leaks.clear && !policy.idle.clear && !policy.zombies.clear);
        assert!(policy.check().is_ok());
    }

    #[test]
    fn an_invalid_policy_is_refused() {
        let policy = WatchdogPolicy::new;
        for policy in [
            policy().every(Duration::from_millis(99)),
            policy().leaked_locks(None).clear_leaked_locks(true),
            policy()
                .idle_blockers(Duration::ZERO)
                .clear_idle_blockers(true),
        ] {
            let error = policy.check().expect_err("it is refused");
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        }
    }
}
