//! Clearing a pile-up of lock waits in the safest order: what a [`Resolver`] may do, would do, and has done.

mod baseline;
mod escalation;
mod load_hook;
mod log;
mod pattern;
mod plan;
mod policy;
mod protection;
mod protection_rules;
mod run;
mod signal;
mod sql;
mod target_status;
pub mod watchdog;

pub use baseline::{Baseline, Setting};
pub use load_hook::LoadChange;
pub use log::{Action, RunEnd, RunLog, RunLogEntry, StepOutcome};
pub use plan::{Decision, Plan, PlannedRoot, Step};
pub use policy::ResolverPolicy;
pub use protection::Protection;
pub use signal::SignalOutcome;

use std::collections::HashSet;

use crate::connection;
use crate::error::Error;
use crate::graph::{Backend, LockTree};
use crate::monitor::Monitor;
use protection_rules::SessionFacts;

/// Clears a pile-up of lock waits in the safest order: [`Monitor::resolver`],
/// [`Keeper::resolver`](crate::Keeper::resolver).
///
/// It resolves the root blockers, which block others and wait for no lock themselves, one at a time, the one that
/// blocks most sessions first:
///
/// - One that **runs a statement** is first left to finish ([`wait`](ResolverPolicy::wait)); then its statement is
///   cancelled; then its session is terminated. After each step the resolver waits for the effect
///   ([`settle`](ResolverPolicy::settle)), and takes the next step only if there was none.
/// - One that is **idle in its transaction** has no statement to cancel. Its session is terminated after it has been
///   idle for [`idle_grace`](ResolverPolicy::idle_grace).
/// - A **prepared transaction** has no session. The plan has the statement that ends it; run that only if you know that
///   the transaction manager will not.
/// - A **cycle** of waits is left to the server.
/// - A session whose activity is **hidden** from this role is left alone; the plan has the GRANT that would show it.
///
/// # Which sessions are left alone
///
/// Always: replication (walsenders, logical workers, the startup process), backups, autovacuum to prevent wraparound,
/// commits that wait for a synchronous standby, the server's own processes, and the session that sends the signals.
/// Other autovacuum workers are cancelled, as the server itself does, and never terminated. Unless the policy allows
/// them: sessions of other roles that are superusers, migrations and index builds, and sessions that guards and
/// transactions of this process own. In addition, sessions that the policy [protects](ResolverPolicy::protect) by name.
///
/// A session is a migration if its statement (the last one, if it is idle in its transaction) changes the schema or
/// writes to a table with a name that is typical of migration bookkeeping (`schema_migrations`), if it holds the
/// advisory lock of a migration program, or if its name is that of such a program. A migration that has continued to
/// write other rows in the same transaction cannot be told from any other writer: give its programs a name, or a
/// [key](ResolverPolicy::migration_key).
///
/// The statement that sends a signal checks again that it is sent to the intended session: see [`Monitor::cancel`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// use lockkeeper::ResolverPolicy;
///
/// // Show what it would do.
/// let resolver = keeper.resolver(ResolverPolicy::new());
/// println!("{}", resolver.run().await?);
///
/// // Do it.
/// let resolver = keeper.resolver(ResolverPolicy::new().execute(true));
/// let log = resolver.run().await?;
/// println!("{log}");
/// assert!(log.is_recovered());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Resolver {
    monitor: Monitor,
    policy: ResolverPolicy,
}

impl Monitor {
    /// Clears a pile-up of lock waits as a policy defines. Nothing is sent before [`run`](Resolver::run) is called.
    #[must_use = "does nothing until it is run"]
    pub fn resolver(&self, policy: ResolverPolicy) -> Resolver {
        Resolver {
            monitor: self.clone(),
            policy,
        }
    }
}

impl Resolver {
    /// What it would do about a tree, and why. Nothing is sent.
    ///
    /// A tree does not show which sessions are superusers', nor which take a backup, build an index or hold a
    /// migration's lock unless their statement shows it. [`run`](Self::run) reads that from the server, in a dry run
    /// too; its [plan](RunLog::plan) includes it.
    #[must_use]
    pub fn plan(&self, tree: &LockTree) -> Plan {
        let facts = SessionFacts {
            own_sessions: own_sessions_in(tree),
            ..SessionFacts::default()
        };
        Plan::new(&self.policy, &facts, tree).mark_from_tree_only()
    }

    /// What it may do.
    #[must_use]
    pub fn policy(&self) -> &ResolverPolicy {
        &self.policy
    }

    /// Executes the policy, or, in a dry run, only finds out what it would do.
    ///
    /// First it records a baseline: the sessions, their waits and the settings. Then the application is asked to [shed
    /// load](ResolverPolicy::shed_load). Then the root blockers are resolved, until the
    /// [criterion](ResolverPolicy::recovered_when) holds, nothing is left that may be done, or a limit of the policy is
    /// reached. Failures are logged, and the failed query is repeated until the deadline.
    ///
    /// # SQL
    /// The messages of [`Monitor::activity`], [`Monitor::advisory_locks`] and one over `pg_settings` at the beginning;
    /// then [`Monitor::snapshot`] after each poll interval, one message over `pg_stat_activity`, `pg_roles` and the
    /// progress views before each decision, and for each signal the one of [`Monitor::cancel`].
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for an invalid policy, naming what is wrong, before anything is sent. Those
    /// of [`Monitor::activity`] if the baseline could not be recorded; nothing was done then.
    ///
    /// # Longest silence
    /// As [`Monitor::activity`] while it records the baseline, which ends with the first failure; later until the policy's
    /// [deadline](ResolverPolicy::deadline), and then as [`Monitor::cancel`] for a signal that is under way.
    ///
    /// # Cancel safety
    /// May be dropped at any point. A signal in progress may or may not be sent, and no other is. If load was shed, the
    /// hook is called with [`GaveUp`](LoadChange::GaveUp).
    pub async fn run(&self) -> Result<RunLog, Error> {
        self.policy.check()?;
        run::run(&self.monitor, &self.policy).await
    }
}

/// Why one session must not be signalled, if so, given the policy and the current facts of the server and this process.
pub(super) async fn check_protection(
    monitor: &Monitor,
    policy: &ResolverPolicy,
    backend: &Backend,
) -> Result<Option<Protection>, Error> {
    let mut facts = run::session_facts(monitor, policy).await?;
    let own_sessions = backend.pid().filter(|pid| connection::is_own_backend(*pid));
    facts.own_sessions.extend(own_sessions);
    Ok(protection_rules::protection_of(policy, &facts, backend))
}

/// The sessions of a tree that a guard or transaction of this process owns.
fn own_sessions_in(tree: &LockTree) -> HashSet<i32> {
    let backends = tree.snapshot().backends().iter();
    backends
        .filter_map(Backend::pid)
        .filter(|pid| connection::is_own_backend(*pid))
        .collect()
}
