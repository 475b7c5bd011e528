//! Clearing a pile-up of lock waits, in the safest order: what a [`Resolver`] may do, would do, and has done.

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

/// Clears a pile-up of lock waits in the safest order: [`Monitor::resolver`], [`Keeper::resolver`](crate::Keeper::resolver).
///
/// It deals with root blockers, those that are in the way of others and wait for no lock themselves, one at a time and
/// first with the one that keeps most sessions waiting:
///
/// - One that **runs a statement** is left to finish first ([`wait`](ResolverPolicy::wait)); then its statement is
///   cancelled; then its session is terminated. After each step it waits to see whether that helped
///   ([`settle`](ResolverPolicy::settle)), and takes the next one only if it did not.
/// - One that is **idle in its transaction** has nothing to be cancelled. Its session is terminated, once it has been idle for
///   [`idle_grace`](ResolverPolicy::idle_grace).
/// - A **prepared transaction** has no session; the plan says which statement ends it, for somebody to run who knows that
///   its transaction manager will not.
/// - A **circle** of waits is left to the server.
/// - What this role **cannot see** is left alone, with the GRANT that would show it.
///
/// # Who is left alone
///
/// Always: replication (walsenders, logical workers, the startup process), backups, autovacuum to prevent wraparound,
/// commits that wait for a synchronous standby, the server's own processes, and the session that asks. Other autovacuum workers are cancelled, as the server does
/// itself, and never terminated. Unless the policy says otherwise: sessions of other roles that are superusers, migrations and
/// index builds, sessions that guards and transactions of this process have, and what the policy
/// [protects](ResolverPolicy::protect) by name.
///
/// A migration is a session whose statement (the last one, where it is idle in its transaction) changes the schema or
/// writes to a table that is called like one in which migrations are noted (`schema_migrations`), that holds the advisory
/// lock of a program that does, or that is called like one. A migration that has gone on to write other rows in the same
/// transaction looks like any other writer: give its programs a name, or a [key](ResolverPolicy::migration_key).
///
/// Whom a signal is for is checked again by the statement that sends it: see [`Monitor::cancel`].
///
/// # Examples
///
/// ```no_run
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// use lockkeeper::ResolverPolicy;
///
/// // What would it do?
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
    /// Clears a pile-up of lock waits as a policy says. Nothing is sent before it is [run](Resolver::run).
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
    /// A tree does not show whose sessions are superusers', nor who takes a backup, builds an index or holds a migration's
    /// lock without its statement saying so. That is looked up by [`run`](Self::run), a dry run too, whose
    /// [plan](RunLog::plan) has it.
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

    /// Does what the policy says, or, in a dry run, only finds out what it would do.
    ///
    /// First a baseline is kept (who is there, who waits for whom, settings), then the application is told to
    /// [shed load](ResolverPolicy::shed_load), then the root blockers are dealt with, until the
    /// [criterion](ResolverPolicy::recovered_when) holds, nothing is left that may be done, or the policy's bounds are
    /// reached. What fails on the way is noted in the log, and tried again until the deadline.
    ///
    /// # SQL
    /// The messages of [`Monitor::activity`], [`Monitor::advisory_locks`] and one over `pg_settings` at the beginning;
    /// then [`Monitor::snapshot`] at each look, one over `pg_stat_activity`, `pg_roles` and the views of progress
    /// before each decision, and for each signal the one of [`Monitor::cancel`].
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) for a policy that cannot work, naming what is wrong, before anything is sent.
    /// Those of [`Monitor::activity`], where not even the baseline could be had; nothing was done then.
    ///
    /// # Cancel safety
    /// May be dropped at any point. A signal under way may or may not be sent, and no other is. Where load was shed, the
    /// hook is told [`GaveUp`](LoadChange::GaveUp).
    pub async fn run(&self) -> Result<RunLog, Error> {
        self.policy.check()?;
        run::run(&self.monitor, &self.policy).await
    }
}

/// Why one session must not be signalled, if so: what a policy says, and what the server and this process know now.
pub(super) async fn check_protection(
    monitor: &Monitor,
    policy: &ResolverPolicy,
    backend: &Backend,
) -> Result<Option<Protection>, Error> {
    let mut facts = run::session_facts(monitor, policy).await?;
    let own_sessions = backend.pid().filter(|pid| connection::is_in_custody(*pid));
    facts.own_sessions.extend(own_sessions);
    Ok(protection_rules::protection_of(policy, &facts, backend))
}

/// Those who take part in a tree and whom a guard or a transaction of this process has.
fn own_sessions_in(tree: &LockTree) -> HashSet<i32> {
    let backends = tree.snapshot().backends().iter();
    backends
        .filter_map(Backend::pid)
        .filter(|pid| connection::is_in_custody(*pid))
        .collect()
}
