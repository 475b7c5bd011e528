//! Diagnoses a lock wait without a cycle.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use crate::graph::{BackendId, LockObject};

use super::super::{IncidentEdge, IncidentKind, Participant, wording};
use super::{Cause, Diagnosis, Facts, QUOTED, foreign_key, index_fix};

pub(super) fn diagnose(facts: &Facts<'_>) -> Diagnosis {
    let Some(first) = facts.direct().next() else {
        return by_server_message(facts);
    };
    if facts.kind == IncidentKind::Deadlock {
        // The deadlock was ended before a sample: its blockers are not the cause.
        return by_server_message(facts);
    }
    let Some(chain) = chain(facts) else {
        let text = format!(
            "{}, which {} held, was not released, since those in the way waited for one another in a cycle.",
            sentence(&wording::object(first)),
            facts.name(&first.blocker),
        );
        let fix = "The server fails one of them when a wait has lasted for deadlock_timeout; that deadlock has to be mended.";
        return Diagnosis::new(Cause::BehindDeadlock, true, text).with_fix(fix);
    };
    let wait = WaitFacts {
        facts,
        first: chain[0],
        root: &chain[chain.len() - 1].blocker,
        is_chain: chain.len() > 1,
    };
    wait.prepared()
        .or_else(|| wait.index_build())
        .or_else(|| wait.queue())
        .or_else(|| wait.idle())
        .or_else(|| facts.direct().find_map(|edge| foreign_key(facts, edge)))
        .or_else(|| wait.overlap())
        .or_else(|| wait.unique())
        .or_else(|| wait.advisory())
        .or_else(|| wait.running())
        .unwrap_or_else(|| wait.unknown())
}

/// The diagnosis by the server's message alone, without a sample.
fn by_server_message(facts: &Facts<'_>) -> Diagnosis {
    let parent = facts.message.parent.as_ref();
    if let (Some(parent), true) = (parent, facts.direct().next().is_none()) {
        let table = format!(
            "{}.{}",
            wording::printable(&parent.schema),
            wording::printable(&parent.name)
        );
        let text = format!(
            "A row was written that refers to {table}; the foreign key's check locks the row there FOR KEY SHARE, and had to \
             wait for another transaction, which was not seen."
        );
        let fix = format!(
            "If that is a SELECT … FOR UPDATE on {table}, use FOR NO KEY UPDATE: that does not conflict with the check."
        );
        return Diagnosis::new(Cause::ForeignKeyParent, false, text).with_fix(fix);
    }
    if let Some(diagnosis) = facts.direct().find_map(|edge| foreign_key(facts, edge)) {
        return diagnosis;
    }
    let row = facts.message.row.as_deref();
    if let Some(row) = row.filter(|row| row.exclusion) {
        let text = format!(
            "A row of {} was written that may overlap under an exclusion constraint with a row of another transaction, which had \
             not ended.",
            wording::printable(&row.relation)
        );
        let fix =
            "Keep transactions short that write rows which may overlap, and write such rows last.";
        return Diagnosis::new(
            Cause::ExclusionOverlap,
            facts.kind != IncidentKind::Deadlock,
            text,
        )
        .with_fix(fix);
    }
    if let Some(row) = row.filter(|row| row.index_entry) {
        let text = format!(
            "A key of {} was inserted that another transaction, which had not ended, had inserted too.",
            wording::printable(&row.relation)
        );
        let fix = "Insert rows in the order of their unique key, in every transaction.";
        return Diagnosis::new(
            Cause::UniqueInsert,
            facts.kind != IncidentKind::Deadlock,
            text,
        )
        .with_fix(fix);
    }
    let what = match facts.kind {
        IncidentKind::Deadlock => "The deadlock was broken before it was seen",
        _ => "Nobody was seen in the way",
    };
    let text = match row {
        Some(row) => format!("{what}; the wait was for {}.", wording::row_of_context(row)),
        None => format!("{what}."),
    };
    Diagnosis::new(Cause::Unknown, false, text)
}

/// The chain from the victim to the nearest root blocker.
fn chain<'a>(facts: &Facts<'a>) -> Option<Vec<&'a IncidentEdge>> {
    let edges = &facts.observed.edges;
    let waiters: HashSet<_> = edges.iter().map(|edge| &edge.waiter).collect();
    let mut chains: VecDeque<_> = facts.direct().map(|edge| vec![edge]).collect();
    // Holders before sessions that are only ahead in the queue.
    chains
        .make_contiguous()
        .sort_by_key(|chain| chain[0].is_soft());
    let mut known: HashSet<&BackendId> = facts.observed.victim.iter().collect();
    while let Some(chain) = chains.pop_front() {
        let end = &chain[chain.len() - 1].blocker;
        if !waiters.contains(end) {
            return Some(chain);
        }
        if known.insert(end) {
            let next = edges.iter().filter(|edge| &edge.waiter == end);
            chains.extend(next.map(|edge| [&chain[..], &[edge]].concat()));
        }
    }
    None
}

struct WaitFacts<'a> {
    facts: &'a Facts<'a>,
    /// The first edge of the chain, whose waiter is the victim.
    first: &'a IncidentEdge,
    /// The blocker at the end of the chain.
    root: &'a BackendId,
    is_chain: bool,
}

impl WaitFacts<'_> {
    fn root(&self) -> Option<&Participant> {
        self.facts.participant(self.root)
    }

    /// `pid 12 (src/pay.rs:42) held row id = 7 of public.users`, or through a chain.
    fn holds(&self) -> String {
        let object = wording::object(self.first);
        let root = self.facts.name(self.root);
        if self.is_chain {
            let before = self.facts.name(&self.first.blocker);
            if wording::is_row_queue(self.first) {
                return format!(
                    "{} was queued for {object} behind {before}, which itself waited, in the end for {root}",
                    self.facts.name(&self.first.waiter)
                );
            }
            format!(
                "{object} was not to be had from {before}, which itself waited, in the end for {root}"
            )
        } else {
            format!("{root} held {object}")
        }
    }

    fn prepared(&self) -> Option<Diagnosis> {
        let BackendId::Prepared(gid) = self.root else {
            return None;
        };
        let text = format!(
            "{}: a transaction that was prepared, and neither committed nor rolled back. No session has it, so it ends with \
             none.",
            sentence(&self.holds())
        );
        let which = match gid {
            Some(gid) => format!("{gid:?}"),
            None => "the one in pg_prepared_xacts".to_owned(),
        };
        let fix = format!(
            "End it: ROLLBACK PREPARED or COMMIT PREPARED, of {which}. Its transaction manager has to do that, after a crash \
             too; where there is none, set max_prepared_transactions to 0."
        );
        Some(Diagnosis::new(Cause::PreparedTransaction, true, text).with_fix(fix))
    }

    fn index_build(&self) -> Option<Diagnosis> {
        let victim = self.facts.builds_index(&self.first.waiter);
        let waits = matches!(
            self.first.object,
            LockObject::Relation(_) | LockObject::VirtualTransaction(_)
        );
        if let Some(kind) = victim.filter(|_| waits) {
            let text = format!(
                "The index build waited for {}, which {} had.",
                wording::object(self.first),
                self.facts.name(&self.first.blocker)
            );
            let mut fix = index_fix(kind).to_owned();
            if let Some(idle) = self.root().and_then(idle_for) {
                fix = format!(
                    "End the transaction of {}, which was idle{idle}. {fix}",
                    self.facts.name(self.root)
                );
            }
            return Some(Diagnosis::new(Cause::IndexBuild, true, text).with_fix(fix));
        }
        let mut direct = self.facts.direct();
        let (edge, kind) = direct.find_map(|edge| {
            let kind = self.facts.builds_index(&edge.blocker)?;
            (matches!(edge.object, LockObject::Relation(_)) && !edge.is_soft())
                .then_some((edge, kind))
        })?;
        let text = format!(
            "{} was building an index, and held {}{} meanwhile.",
            sentence(&self.facts.name(&edge.blocker)),
            wording::object(edge),
            edge.mode_held()
                .map(|mode| format!(" in {}", wording::printable(mode)))
                .unwrap_or_default(),
        );
        Some(Diagnosis::new(Cause::IndexBuild, true, text).with_fix(index_fix(kind)))
    }

    fn queue(&self) -> Option<Diagnosis> {
        if !self.facts.direct().all(IncidentEdge::is_soft) {
            return None;
        }
        let ahead = self.facts.name(&self.first.blocker);
        let mode = self.first.mode_queued();
        let mode = mode
            .map(|mode| format!(" ({})", wording::printable(mode)))
            .unwrap_or_default();
        let mut text = format!(
            "{} was not held in a mode that conflicts, but {ahead} waited for it ahead in the queue, in a mode that does{mode}",
            sentence(&wording::object(self.first)),
        );
        if self.is_chain {
            text.push_str(&format!("; it waited for {}", self.facts.name(self.root)));
            if let Some(idle) = self.root().and_then(idle_for) {
                text.push_str(&format!(", which was idle in its transaction{idle}"));
            }
        }
        text.push('.');
        let fix = "Take the strong lock (ALTER TABLE, LOCK TABLE, TRUNCATE, …) under a short lock_timeout, 50 to 100 ms, and \
                   try again after a pause: whoever comes after it queues behind it for that long only.";
        Some(Diagnosis::new(Cause::LockQueue, true, text).with_fix(fix))
    }

    fn idle(&self) -> Option<Diagnosis> {
        let root = self.root()?;
        let idle = idle_for(root)?;
        // It may have been idle only between two statements.
        let waited = self.first.wait_age.unwrap_or(Duration::MAX);
        let is_certain = root.state_age.is_some_and(|age| age >= waited / 2);
        let text = format!(
            "{}, and was idle in its transaction{idle}: its client did something else meanwhile, or forgot it.",
            sentence(&self.holds())
        );
        let fix = "End the transaction before anything that is no SQL (calls over the network, questions to people), and on \
                   every path out, errors included. idle_in_transaction_session_timeout ends those that are left.";
        Some(Diagnosis::new(Cause::IdleInTransaction, is_certain, text).with_fix(fix))
    }

    fn overlap(&self) -> Option<Diagnosis> {
        if !Facts::is_overlap_wait(self.first) {
            return None;
        }
        let text = format!(
            "{} wrote a row that may overlap under an exclusion constraint with {}, which {} had written; whether it does is not \
             known before that transaction ends.",
            sentence(&self.facts.name(&self.first.waiter)),
            wording::object(self.first),
            self.facts.name(&self.first.blocker),
        );
        let fix =
            "Keep transactions short that write rows which may overlap, and write such rows last.";
        Some(Diagnosis::new(Cause::ExclusionOverlap, true, text).with_fix(fix))
    }

    fn unique(&self) -> Option<Diagnosis> {
        let is_from_context = self.facts.is_unique_wait(self.first)?;
        let key = match &self.first.context {
            Some(context) => format!("a key of {}", wording::printable(&context.relation)),
            None => "a unique key".to_owned(),
        };
        let text = format!(
            "{} inserted {key} that {} had inserted too, and whether it is taken is not known before that transaction ends.",
            sentence(&self.facts.name(&self.first.waiter)),
            self.facts.name(&self.first.blocker),
        );
        let fix = "Keep transactions short that insert keys others may insert too, and insert such rows last. ON CONFLICT \
                   does not help: it waits in the same way.";
        Some(Diagnosis::new(Cause::UniqueInsert, is_from_context, text).with_fix(fix))
    }

    fn advisory(&self) -> Option<Diagnosis> {
        self.first.object.advisory_key()?;
        let mut text = sentence(&self.holds());
        if let Some(state) = self.root().and_then(|root| root.state.as_deref()) {
            text.push_str(&format!(" ({})", wording::printable(state)));
        }
        text.push('.');
        let fix = "Hold it for less long, wait for it longer, or use more than one key for what need not exclude each other.";
        Some(Diagnosis::new(Cause::AdvisoryLockHeld, true, text).with_fix(fix))
    }

    fn running(&self) -> Option<Diagnosis> {
        let root = self.root()?;
        if root.state.as_deref() != Some("active") {
            return None;
        }
        let mut text = format!("{}, and was busy", sentence(&self.holds()));
        if let Some(age) = root.state_age {
            text.push_str(&format!(" for {}", wording::age(age)));
        }
        if let Some(statement) = &root.statement {
            text.push_str(&format!(" with {}", wording::one_line(statement, QUOTED)));
        }
        text.push('.');
        let fix = "Make that statement, or what its transaction does after it took the lock, shorter; or let it take the lock \
                   later.";
        // It may have been idle a moment later.
        Some(Diagnosis::new(Cause::RunningHolder, false, text).with_fix(fix))
    }

    fn unknown(&self) -> Diagnosis {
        let why = match self.root() {
            Some(root) if root.is_hidden => {
                "what it did with it is hidden from this role (pg_read_all_stats would show it)"
            }
            _ => "what it did with it was not seen",
        };
        let text = format!("{}; {why}.", sentence(&self.holds()));
        Diagnosis::new(Cause::Unknown, false, text)
    }
}

/// ` for 3.2s`, for a session that is idle in its transaction.
fn idle_for(participant: &Participant) -> Option<String> {
    let state = participant.state.as_deref()?;
    let idle = state
        .starts_with("idle in transaction")
        .then_some(participant)?;
    Some(
        idle.state_age
            .map(|age| format!(" for {}", wording::age(age)))
            .unwrap_or_default(),
    )
}

/// Capitalizes the first word, unless it is a session's name.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) if !text.starts_with("pid ") => {
            first.to_ascii_uppercase().to_string() + chars.as_str()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::super::testing::*;
    use super::super::super::{Evidence, Incident, IncidentTrigger};
    use super::*;

    fn diagnosed(evidence: Evidence) -> (Cause, bool, Incident) {
        let report = report(evidence);
        let diagnosis = report.diagnosis();
        (diagnosis.cause(), diagnosis.is_certain(), report)
    }

    fn text(report: &Incident) -> &str {
        report.diagnosis().text()
    }

    fn fix(report: &Incident) -> &str {
        report.diagnosis().fix().unwrap_or_default()
    }

    fn row_held(state: &str, state_age: u64) -> TestServer {
        TestServer::default()
            .session_for(12, "psql", state, "SELECT 'secret'", state_age)
            .waits_for_row(11, &row(account(), 1), 12, 958)
    }

    #[test]
    fn the_holder_is_idle() {
        let (cause, certain, report) = diagnosed(timeout(row_held("idle in transaction", 30_000)));
        assert_eq!((cause, certain), (Cause::IdleInTransaction, true));
        assert_eq!(
            text(&report),
            "B held row (0,1) of public.account, and was idle in its transaction for 30.0s: its client did \
             something else meanwhile, or forgot it."
        );
        // It may have been between two statements.
        let (cause, certain, _) = diagnosed(timeout(row_held("idle in transaction (aborted)", 3)));
        assert_eq!((cause, certain), (Cause::IdleInTransaction, false));
    }

    #[test]
    fn the_end_of_the_chain_counts() {
        let server = row_held("active", 900)
            .session_for(13, "worker", "idle in transaction", "", 5000)
            .waits_for_row(12, &row(account(), 2), 13, 900);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::IdleInTransaction, true));
        assert!(
            text(&report).contains("not to be had from B"),
            "{}",
            text(&report)
        );
        assert!(
            text(&report).contains("in the end for C"),
            "{}",
            text(&report)
        );
    }

    #[test]
    fn the_holder_runs_a_statement() {
        let (cause, certain, report) = diagnosed(timeout(row_held("active", 5000)));
        assert_eq!((cause, certain), (Cause::RunningHolder, false));
        assert!(text(&report).ends_with("and was busy for 5.0s with SELECT ?."));
    }

    #[test]
    fn the_holder_is_hidden() {
        let server =
            TestServer::default()
                .hidden(12, "psql")
                .waits_for_row(11, &row(account(), 1), 12, 958);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::Unknown, false));
        assert!(text(&report).contains("hidden from this role (pg_read_all_stats"));
        assert!(report.caveats().any(|line| line.contains("B are hidden")));
        let server = TestServer::default().waits_for_row(11, &row(account(), 1), 12, 958);
        let (cause, _, report) = diagnosed(timeout(server));
        assert_eq!(cause, Cause::Unknown);
        assert!(text(&report).contains("was not seen"));
    }

    #[test]
    fn a_prepared_transaction() {
        let prepared = BackendId::Prepared(Some("order-7".into()));
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .holds(prepared, &object, "RowExclusiveLock")
            .waits(11, &object, "ShareLock", 958, &[0]);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::PreparedTransaction, true));
        assert!(fix(&report).contains("ROLLBACK PREPARED or COMMIT PREPARED, of \"order-7\""));
        let server = TestServer::default().waits(11, &object, "ShareLock", 958, &[0]);
        let (cause, _, report) = diagnosed(timeout(server));
        assert_eq!(cause, Cause::PreparedTransaction);
        assert!(fix(&report).contains("pg_prepared_xacts"));
    }

    #[test]
    fn behind_a_migration() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .session(12, "migrate", "active", "ALTER TABLE account ADD x int")
            .session_for(13, "psql", "idle in transaction", "SELECT 1", 60_000)
            .holds(13, &object, "AccessShareLock")
            .waits(12, &object, "AccessExclusiveLock", 2000, &[13])
            .waits(11, &object, "AccessShareLock", 958, &[12]);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::LockQueue, true));
        let text = text(&report);
        assert!(
            text.contains("B waited for it ahead in the queue"),
            "{text}"
        );
        assert!(
            text.contains("(AccessExclusiveLock); it waited for C, which was idle"),
            "{text}"
        );
    }

    #[test]
    fn holders_come_before_those_in_the_queue() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .session_for(13, "psql", "idle in transaction", "", 60_000)
            .holds(13, &object, "ShareLock")
            // The lock that it waits for was released at that moment.
            .waits(12, &object, "AccessExclusiveLock", 2000, &[])
            .waits(11, &object, "RowExclusiveLock", 958, &[12, 13]);
        let (cause, _, report) = diagnosed(timeout(server));
        assert_eq!(cause, Cause::IdleInTransaction);
        assert!(text(&report).starts_with("C held"));
    }

    #[test]
    fn an_index_is_built() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .session(12, "migrate", "active", "CREATE INDEX ON account (note)")
            .holds(12, &object, "ShareLock")
            .waits(11, &object, "RowExclusiveLock", 958, &[12]);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::IndexBuild, true));
        assert!(text(&report).contains("held table public.account in ShareLock"));
        // The build waits for a session that forgot to commit.
        let mut victim = timeout(
            TestServer::default()
                .session_for(12, "psql", "idle in transaction", "", 60_000)
                .holds(12, &object, "RowExclusiveLock")
                .waits(11, &object, "ShareLock", 958, &[12]),
        );
        victim.victim.statements = vec![entry(0, "CREATE INDEX ON account (note)", None)];
        let (cause, certain, report) = diagnosed(victim);
        assert_eq!((cause, certain), (Cause::IndexBuild, true));
        assert!(fix(&report).starts_with("End the transaction of B, which was idle for"));
    }

    #[test]
    fn an_advisory_lock() {
        let key = advisory("invoice:1");
        let server = TestServer::default()
            .session_for(12, "billing src/pay.rs:7", "idle", "", 60_000)
            .holds(12, &key, "ExclusiveLock")
            .waits(11, &key, "ExclusiveLock", 958, &[12]);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::AdvisoryLockHeld, true));
        assert_eq!(text(&report), "B held advisory lock \"invoice:1\" (idle).");
    }

    #[test]
    fn a_key_that_another_session_inserted() {
        let transaction = LockObject::Transaction(12);
        let server = || {
            TestServer::default()
                .session(
                    11,
                    "src/transfer.rs:41",
                    "active",
                    "INSERT INTO account VALUES (1)",
                )
                .session(12, "psql", "active", "SELECT 1")
                .holds(12, &transaction, "ExclusiveLock")
                .waits(11, &transaction, "ShareLock", 958, &[12])
        };
        let (cause, certain, _) = diagnosed(timeout(server()));
        assert_eq!((cause, certain), (Cause::UniqueInsert, false));
        let context = "while inserting index tuple (0,2) in relation \"account_pkey\"";
        let known = Evidence {
            error: Some(timeout_error(Some(context))),
            ..timeout(server())
        };
        let (cause, certain, report) = diagnosed(known.clone());
        assert_eq!((cause, certain), (Cause::UniqueInsert, true));
        assert!(text(&report).contains("a key of account_pkey"));
        let (cause, certain, report) = diagnosed(Evidence {
            samples: Vec::new(),
            ..known
        });
        assert_eq!((cause, certain), (Cause::UniqueInsert, true));
        assert!(
            text(&report).contains("A key of account_pkey"),
            "{}",
            text(&report)
        );
    }

    const CHECK: &str = "while locking tuple (0,1) in relation \"customer\"\n\
        SQL statement \"SELECT 1 FROM ONLY \"public\".\"customer\" x WHERE \"id\" OPERATOR(pg_catalog.=) $1 \
        FOR KEY SHARE OF x\"";

    #[test]
    fn a_foreign_keys_parent() {
        let server = TestServer::default()
            .session(
                11,
                "src/transfer.rs:41",
                "active",
                "INSERT INTO orders VALUES (1)",
            )
            .session(
                12,
                "psql",
                "active",
                "SELECT * FROM public.customer FOR UPDATE",
            )
            .waits_for_row(11, &row(table(9, "customer"), 1), 12, 958);
        let known = Evidence {
            error: Some(timeout_error(Some(CHECK))),
            ..timeout(server)
        };
        let (cause, certain, report) = diagnosed(known.clone());
        assert_eq!((cause, certain), (Cause::ForeignKeyParent, true));
        assert!(fix(&report).contains("Use FOR NO KEY UPDATE"));
        let (cause, certain, report) = diagnosed(Evidence {
            samples: Vec::new(),
            ..known
        });
        assert_eq!((cause, certain), (Cause::ForeignKeyParent, false));
        assert!(text(&report).contains("refers to public.customer"));
    }

    #[test]
    fn behind_a_deadlock_of_others() {
        let server = TestServer::default()
            .waits_for_row(11, &row(account(), 1), 12, 958)
            .waits_for_row(12, &row(account(), 2), 13, 900)
            .waits_for_row(13, &row(account(), 1), 12, 900);
        let (cause, certain, report) = diagnosed(timeout(server));
        assert_eq!((cause, certain), (Cause::BehindDeadlock, true));
        assert!(report.cycle().is_empty());
    }

    #[test]
    fn an_unknown_cause_is_not_guessed() {
        let (cause, certain, report) = diagnosed(evidence(IncidentTrigger::LockTimeout));
        assert_eq!((cause, certain), (Cause::Unknown, false));
        assert_eq!(text(&report), "Nobody was seen in the way.");
        let context = "while updating tuple (0,2) in relation \"account\"";
        let (cause, _, report) = diagnosed(Evidence {
            error: Some(deadlock_error("??", context)),
            caveats: vec![Arc::from("the side connection could not be opened")],
            ..evidence(IncidentTrigger::Deadlock)
        });
        assert_eq!(cause, Cause::Unknown);
        assert_eq!(
            text(&report),
            "The deadlock was broken before it was seen; the wait was for row (0,2) of account."
        );
        // The earlier blocker is not the cause.
        let early = Evidence {
            error: None,
            ..deadlock(row_held("idle in transaction", 30_000))
        };
        assert_eq!(diagnosed(early).0, Cause::Unknown);
    }
}
