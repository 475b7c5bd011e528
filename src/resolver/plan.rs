//! What to do about each root blocker, and why. Pure logic.

use std::fmt;
use std::time::Duration;

use super::policy::ResolverPolicy;
use super::protection_rules::{self, SessionFacts};
use crate::graph::{Backend, LockTree, TreeNode};
use crate::monitor::WaitSummary;
use crate::postgres::text::Joined;
use crate::postgres::timestamp::Age;
use crate::resolver::protection::Protection;
use crate::resolver::sql::signal::{self, MissingPrivilege};

/// A step against a root blocker. Each step is taken only if the previous one did not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Wait this long for it to finish or to continue.
    Wait(Duration),
    /// Cancel its statement: `pg_cancel_backend`.
    Cancel,
    /// End its session: `pg_terminate_backend`.
    Terminate,
}

/// What to do about one root blocker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decision {
    /// Take these steps, as far as they are needed.
    Act(
        /// In order.
        Vec<Step>,
    ),
    /// It is left alone.
    LeaveAlone(Protection),
    /// What it does is hidden from this role, so it is left alone.
    Hidden {
        /// The GRANT, or whatever else is missing, that would show it.
        grant: Box<str>,
    },
    /// It is a prepared transaction, which has no session to signal.
    ByHand {
        /// The statement that ends it. Run it only if you know that nothing else will.
        statement: Option<Box<str>>,
    },
    /// It is part of a cycle. If that is a deadlock, the server ends it when the longest wait in it reaches
    /// `deadlock_timeout`.
    LeftToTheServer,
    /// The policy does not allow what would help.
    NotAllowed {
        /// The option that would have to be set.
        option: &'static str,
    },
    /// It is in a database that the policy does not name.
    OtherDatabase,
    /// It had ended when it was observed.
    Gone,
}

/// One root blocker, and what to do about it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedRoot {
    backend: Backend,
    blocks: usize,
    why: String,
    decision: Decision,
}

/// What a [`Resolver`](super::Resolver) would do, and why: one root blocker after another, the one that blocks most
/// sessions first.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    roots: Vec<PlannedRoot>,
    waits: WaitSummary,
    execute: bool,
    /// Whether it was made from the tree alone.
    from_tree_only: bool,
}

impl Step {
    fn describe(self) -> String {
        match self {
            Self::Wait(time) if time.is_zero() => "look again".to_owned(),
            Self::Wait(time) => format!("wait {} for it", Age(time)),
            Self::Cancel => "cancel its statement".to_owned(),
            Self::Terminate => "terminate its session".to_owned(),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Act(steps) => Joined(steps, ", then ").fmt(f),
            Self::LeaveAlone(why) => write!(f, "left alone: {why}"),
            Self::Hidden { grant } => write!(
                f,
                "left alone: what it does is hidden from this role; {grant} would show it"
            ),
            Self::ByHand {
                statement: Some(statement),
            } => write!(
                f,
                "by hand: it can be neither cancelled nor terminated; if its transaction manager will not end it: {statement}"
            ),
            Self::ByHand { statement: None } => f.write_str(
                "by hand: it can be neither cancelled nor terminated; see pg_prepared_xacts",
            ),
            Self::LeftToTheServer => {
                f.write_str("left to the server, which ends a deadlock after deadlock_timeout")
            }
            Self::NotAllowed { option } => write!(f, "left alone: it would need {option}"),
            Self::OtherDatabase => f.write_str("left alone: it is in another database"),
            Self::Gone => f.write_str("nothing: it has ended"),
        }
    }
}

impl PlannedRoot {
    getters! {
        /// The root blocker.
        backend: &Backend;

        /// How many sessions cannot continue before this one does.
        blocks: usize;

        /// What to do about it.
        decision: &Decision;

        /// The reason, in a sentence.
        why: &str;
    }

    /// The steps, if there are any.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        match &self.decision {
            Decision::Act(steps) => steps,
            _ => &[],
        }
    }
}

impl Plan {
    pub(super) fn new(policy: &ResolverPolicy, facts: &SessionFacts, tree: &LockTree) -> Self {
        let included = tree.roots().filter(|root| includes(policy, *root));
        let roots = included.map(|root| {
            let decision = if root.is_in_cycle() {
                Decision::LeftToTheServer
            } else {
                decision(policy, facts, root.backend())
            };
            PlannedRoot {
                why: why(root.backend(), root.blocked_count()),
                backend: root.backend().clone(),
                blocks: root.blocked_count(),
                decision,
            }
        });
        Self {
            roots: roots.collect(),
            waits: WaitSummary::among(tree.snapshot(), &policy.databases),
            execute: policy.execute,
            from_tree_only: false,
        }
    }

    /// The same plan, marked as made from the tree alone.
    pub(super) fn mark_from_tree_only(self) -> Self {
        Self {
            from_tree_only: true,
            ..self
        }
    }

    getters! {
        /// The root blockers, the one that blocks most sessions first.
        roots: &[PlannedRoot];

        /// The lock waits.
        waits: &WaitSummary;
    }

    /// Whether the plan has no step to take.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.roots.iter().all(|root| root.steps().is_empty())
    }

    /// Whether it was made from a tree alone. Only [`run`](super::Resolver::run) reads from the server, before it does
    /// anything, which sessions are superusers', and which take a backup or build an index although their statement
    /// does not show it.
    #[must_use]
    pub fn is_from_tree_only(&self) -> bool {
        self.from_tree_only
    }
}

/// A summary of the waits, and two lines for each root blocker.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.execute { "" } else { " (dry run)" };
        writeln!(f, "plan{how}: {}", self.waits)?;
        for (n, root) in self.roots.iter().enumerate() {
            writeln!(f, "{}. {}", n + 1, root.backend)?;
            writeln!(f, "   {}: {}", root.why, root.decision)?;
        }
        if self.from_tree_only && !self.is_empty() {
            writeln!(
                f,
                "before any step: superusers' sessions, backups, index builds and holders of migrations' locks are looked for"
            )?;
        }
        Ok(())
    }
}

/// Whether a root blocker, or a session that it blocks, is in a database that the policy names.
fn includes(policy: &ResolverPolicy, root: TreeNode<'_>) -> bool {
    let mut unvisited = vec![root];
    while let Some(node) = unvisited.pop() {
        if policy.databases.includes(node.backend().database()) {
            return true;
        }
        unvisited.extend(node.children());
    }
    false
}

/// What to do about a session that blocks others and waits for no lock.
pub(super) fn decision(
    policy: &ResolverPolicy,
    facts: &SessionFacts,
    backend: &Backend,
) -> Decision {
    if !policy.databases.includes(backend.database()) {
        return Decision::OtherDatabase;
    }
    if backend.pid().is_none() {
        let statement = backend
            .prepared_transaction()
            .map(|gid| signal::rollback_prepared(gid).into());
        return Decision::ByHand { statement };
    }
    if backend.is_gone() {
        return Decision::Gone;
    }
    if let Some(protection) = protection_rules::protection_of(policy, facts, backend) {
        return Decision::LeaveAlone(protection);
    }
    // Unknown is not idle.
    let (Some(state), false) = (backend.state(), backend.is_hidden()) else {
        let sessions = &facts.sessions;
        let missing = MissingPrivilege {
            role: "pg_read_all_stats",
            is_member: sessions.is_stats_member,
        };
        let role = sessions.role.as_deref().unwrap_or("this role");
        return Decision::Hidden {
            grant: signal::grant(&[missing], role, sessions.version).into(),
        };
    };
    let remaining = |grace: Duration| grace.saturating_sub(backend.state_age().unwrap_or_default());
    let terminate = |grace: Duration| {
        if policy.allow_terminate {
            Decision::Act(vec![Step::Wait(remaining(grace)), Step::Terminate])
        } else {
            Decision::NotAllowed {
                option: "allow_terminate(true)",
            }
        }
    };
    match state {
        "active" | "fastpath function call" => {
            let mut steps = vec![Step::Wait(policy.wait), Step::Cancel];
            if policy.allow_terminate && backend.backend_type() != Some("autovacuum worker") {
                steps.push(Step::Terminate);
            }
            Decision::Act(steps)
        }
        "idle" => match policy.idle_session_grace {
            Some(grace) => terminate(grace),
            None => Decision::NotAllowed {
                option: "idle_session_grace",
            },
        },
        state if state.starts_with("idle in transaction") => terminate(policy.idle_grace),
        // `disabled`: the server does not track what the session does.
        _ => Decision::NotAllowed {
            option: "track_activities = on, to see what it does",
        },
    }
}

fn why(backend: &Backend, blocks: usize) -> String {
    let what = match (backend.pid(), backend.state()) {
        (None, _) => "prepared and not ended",
        (_, Some("active" | "fastpath function call")) => "runs a statement",
        (_, Some("idle")) => "idle, with a lock of its session",
        (_, Some(state)) if state.starts_with("idle in transaction") => {
            "idle in its transaction, so that there is nothing to cancel"
        }
        (_, _) if backend.is_gone() => "has ended",
        _ => "does what this role cannot see",
    };
    match blocks {
        1 => format!("keeps 1 session waiting, {what}"),
        n => format!("keeps {n} sessions waiting, {what}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::graph::BackendId;
    use crate::graph::Visibility;
    use crate::monitor::testing::{backend, edge, snapshot};

    const SECOND: Duration = Duration::from_secs(1);

    fn in_state(state: &str, seconds: u64) -> Backend {
        let mut backend = backend(1);
        backend.state = Some(state.into());
        backend.state_age = Some(SECOND * u32::try_from(seconds).expect("small"));
        backend
    }

    fn of(policy: &ResolverPolicy, backend: &Backend) -> Decision {
        decision(policy, &SessionFacts::default(), backend)
    }

    #[test]
    fn a_termination_is_never_the_first_step() {
        let policy = ResolverPolicy::new().wait(30 * SECOND);
        assert_eq!(
            of(&policy, &in_state("active", 999)),
            Decision::Act(vec![Step::Wait(30 * SECOND), Step::Cancel, Step::Terminate])
        );
        let policy = policy.allow_terminate(false);
        assert_eq!(
            of(&policy, &in_state("active", 999)),
            Decision::Act(vec![Step::Wait(30 * SECOND), Step::Cancel])
        );
    }

    #[test]
    fn idle_in_transaction_is_terminated_only_after_its_own_grace() {
        let policy = ResolverPolicy::new().idle_grace(60 * SECOND);
        for state in ["idle in transaction", "idle in transaction (aborted)"] {
            assert_eq!(
                of(&policy, &in_state(state, 45)),
                Decision::Act(vec![Step::Wait(15 * SECOND), Step::Terminate])
            );
        }
        assert!(matches!(
            of(
                &policy.allow_terminate(false),
                &in_state("idle in transaction", 99)
            ),
            Decision::NotAllowed { .. }
        ));
    }

    #[test]
    fn an_idle_session_is_terminated_only_if_allowed() {
        let policy = ResolverPolicy::new();
        assert!(matches!(
            of(&policy, &in_state("idle", 9999)),
            Decision::NotAllowed { .. }
        ));
        assert_eq!(
            of(&policy.idle_session_grace(SECOND), &in_state("idle", 9)),
            Decision::Act(vec![Step::Wait(Duration::ZERO), Step::Terminate])
        );
    }

    #[test]
    fn an_autovacuum_is_never_terminated() {
        let mut worker = in_state("active", 5);
        worker.backend_type = Some("autovacuum worker".into());
        let policy = ResolverPolicy::new();
        assert_eq!(
            of(&policy, &worker),
            Decision::Act(vec![Step::Wait(policy.wait), Step::Cancel])
        );
    }

    #[test]
    fn unknown_is_not_idle() {
        let mut hidden = Backend::unknown(1.into());
        hidden.visibility = Visibility::Hidden;
        hidden.application_name = Some("app".into());
        let facts = SessionFacts {
            sessions: crate::resolver::sql::sessions::ServerSessions {
                role: Some("o\"ps".into()),
                ..Default::default()
            },
            ..SessionFacts::default()
        };
        assert_eq!(
            decision(&ResolverPolicy::new(), &facts, &hidden),
            Decision::Hidden {
                grant: "GRANT pg_read_all_stats TO \"o\"\"ps\"".into()
            }
        );
        let off = in_state("disabled", 0);
        assert!(matches!(
            of(&ResolverPolicy::new(), &off),
            Decision::NotAllowed { .. }
        ));
    }

    #[test]
    fn a_plan_names_each_root_and_the_reason() {
        let mut prepared = Backend::unknown(BackendId::Prepared(Some(Arc::from("it's"))));
        prepared.visibility = Visibility::Full;
        let mut queued = edge(4, 9, SECOND);
        queued.blocker = prepared.id().clone();
        let tree = snapshot(
            vec![in_state("idle in transaction", 5), prepared],
            vec![
                edge(2, 1, 9 * SECOND),
                edge(3, 2, SECOND),
                queued,
                edge(11, 12, SECOND),
                edge(12, 11, SECOND),
            ],
        )
        .tree();
        let plan = Plan::new(&ResolverPolicy::new(), &SessionFacts::default(), &tree)
            .mark_from_tree_only();
        assert!(plan.is_from_tree_only() && !plan.is_empty());
        let text = plan.to_string();
        assert!(
            text.starts_with("plan (dry run): 5 sessions wait"),
            "{text}"
        );
        assert!(
            text.contains("keeps 2 sessions waiting, idle in its transaction"),
            "{text}"
        );
        assert!(text.contains("ROLLBACK PREPARED 'it''s'"), "{text}");
        assert!(text.contains("deadlock_timeout"), "{text}");
        assert!(
            text.contains("wait 55.0s for it, then terminate its session"),
            "{text}"
        );
        let blocked: Vec<_> = plan.roots().iter().map(PlannedRoot::blocks).collect();
        assert_eq!(blocked[0], 2);
        let empty = Plan::new(
            &ResolverPolicy::new(),
            &SessionFacts::default(),
            &snapshot(vec![], vec![]).tree(),
        );
        assert!(empty.is_empty() && empty.to_string().contains("nobody waits"));
    }

    #[test]
    fn another_database_is_left_alone() {
        let policy = ResolverPolicy::new().database("here");
        let mut there = in_state("active", 9);
        there.database = Some("there".into());
        assert_eq!(of(&policy, &there), Decision::OtherDatabase);
        there.database = Some("here".into());
        assert!(matches!(of(&policy, &there), Decision::Act(_)));

        // A root blocker elsewhere is listed if it blocks a session here.
        let mut with = |database: &str| {
            let mut waiter = backend(2);
            waiter.database = Some(database.into());
            there.database = Some("there".into());
            snapshot(vec![there.clone(), waiter], vec![edge(2, 1, SECOND)]).tree()
        };
        for (database, roots) in [("here", 1), ("there", 0)] {
            let plan = Plan::new(&policy, &SessionFacts::default(), &with(database));
            assert_eq!(plan.roots().len(), roots);
            assert!(plan.is_empty());
        }
    }
}
