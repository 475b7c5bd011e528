//! What a watchdog looks for, and whether it does something about it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::finding::Finding;
use crate::error::Error;
use crate::key::LockKey;
use crate::resolver::ResolverPolicy;
use crate::resolver::pattern::Pattern;

/// A long call site behind it cuts an application's name, but not to less than that (test
/// `a_long_prefix_gives_way_to_the_path`).
const MIN_APPLICATION_PREFIX: usize = 24;
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// What an application does with a finding.
pub(super) type FindingCallback = Arc<dyn Fn(&Finding) + Send + Sync>;

/// From which age on something is reported, and whether it is cleared then.
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

/// What a [`Watchdog`](super::Watchdog) looks for, and how often. It reports, and changes nothing unless told to.
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
    /// Who is left alone is the same as for a resolver.
    pub(super) protection_policy: ResolverPolicy,
    pub(super) callback: Option<FindingCallback>,
}

impl Default for WatchdogPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl WatchdogPolicy {
    /// Reports all that it knows to look for, every 10 seconds.
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

    /// How often to look; every 10 seconds by default, 100 milliseconds at least.
    #[must_use]
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// For how long a session must have been idle, outside of any transaction, for the advisory locks that it holds to be
    /// leaked, where no live guard of this process has it; 5 minutes by default, `None` for never. See
    /// [`Monitor::leaks`](crate::Monitor::leaks): guards of other processes are not known here.
    #[must_use]
    pub fn leaked_locks(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.leaks.age = age.into();
        self
    }

    /// Whether sessions with leaked locks are terminated; they are not by default.
    #[must_use]
    pub fn clear_leaked_locks(mut self, clear: bool) -> Self {
        self.leaks.clear = clear;
        self
    }

    /// For how long a session that keeps others waiting must have been idle in its transaction; 1 minute by default,
    /// `None` for never.
    #[must_use]
    pub fn idle_blockers(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.idle.age = age.into();
        self
    }

    /// Whether such sessions are terminated; they are not by default.
    #[must_use]
    pub fn clear_idle_blockers(mut self, clear: bool) -> Self {
        self.idle.clear = clear;
        self
    }

    /// How long a session must have waited for a lock to be taken for one whose client is gone; 10 minutes by default,
    /// `None` for never.
    ///
    /// The server does not tell whether a client is still there: a session that waits for a lock does not look at its
    /// connection, unless `client_connection_check_interval` is set, and then the server ends it itself. So what is found is
    /// a wait that is longer than any that the application would sit out: give the bound of its own timeouts, and more
    /// for a slow network. Sessions that a guard or a transaction of this process has are alive, and not among them.
    #[must_use]
    pub fn zombie_waiters(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.zombies.age = age.into();
        self
    }

    /// Whether the statements of such waiters are cancelled, which takes them out of the queue; a client that is there
    /// after all gets an error it can deal with. They are not by default.
    #[must_use]
    pub fn clear_zombie_waiters(mut self, clear: bool) -> Self {
        self.zombies.clear = clear;
        self
    }

    /// Looks for zombies only among sessions whose `application_name` matches: `*` stands for any characters, `?` for any
    /// one. With several calls, one of them. A [`Keeper`](crate::Keeper) looks among those that bear its own
    /// [application](crate::KeeperBuilder::application), where this is not called, since it knows how long they wait; a
    /// [`Monitor`](crate::Monitor) among all.
    #[must_use]
    pub fn zombie_application(mut self, pattern: impl AsRef<str>) -> Self {
        self.zombie_applications
            .push(Pattern::new(pattern.as_ref()));
        self
    }

    /// Never clears sessions whose `application_name` matches, in addition to those that a
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

    /// Looks for sessions in this database only; with several calls, in these. All of the server's by default, but
    /// advisory locks of other databases are never looked at.
    #[must_use]
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.protection_policy = self.protection_policy.database(name);
        self
    }

    /// Is given each [`Finding`] once, and again when something else came of clearing it.
    ///
    /// It is called on a thread where blocking does no harm, one finding after another: while it is slow, up to 64 wait,
    /// a look with more waits 5 seconds for it, and the rest is dropped; a panic is contained. Each is also one `tracing` event of level `WARN` and target
    /// `lockkeeper::watchdog`.
    #[must_use]
    pub fn on_finding(mut self, f: impl Fn(&Finding) + Send + Sync + 'static) -> Self {
        self.callback = Some(Arc::new(f));
        self
    }

    /// Where nothing was said of it, looks for zombies among the sessions of a keeper with this `application_name`.
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
