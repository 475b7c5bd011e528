//! Why an incident happened, in plain words, and how to fix it.

mod cycle;
mod wait;

use std::fmt;

use crate::graph::{BackendId, LockObject};
use crate::postgres::statement::{self, StatementKind};

use super::observed_graph::ObservedGraph;
use super::server::ServerMessage;
use super::{IncidentEdge, IncidentKind, JournalMark, Participant, wording};

/// How many characters of a statement are quoted.
const QUOTED: usize = 120;

/// The cause of an incident, as far as the evidence shows it, and how to prevent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    cause: Cause,
    is_certain: bool,
    text: String,
    fix: Option<String>,
}

/// The cause of an incident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// Transactions took the same locks in different orders.
    OrderInversion,
    /// Several transactions held one lock in a shareable mode, and each requested a stronger mode.
    LockUpgrade,
    /// The check of a foreign key waited for the parent's row, which was locked more strongly than necessary.
    ForeignKeyParent,
    /// An insert waited for a transaction that had inserted the same key of a unique index.
    UniqueInsert,
    /// A write waited for a transaction that had written a row which may overlap with its own under an exclusion constraint.
    ExclusionOverlap,
    /// An index build and a writer blocked each other.
    IndexBuild,
    /// The holder was idle in its transaction.
    IdleInTransaction,
    /// The lock was free, or held in a mode that does not conflict, but another session waited for it ahead in the
    /// queue.
    LockQueue,
    /// Another session held the advisory lock.
    AdvisoryLockHeld,
    /// A prepared transaction held the lock.
    PreparedTransaction,
    /// The holder was running a statement.
    RunningHolder,
    /// The blockers were in a deadlock of their own.
    BehindDeadlock,
    /// The evidence does not tell.
    Unknown,
}

impl Diagnosis {
    getters! {
        /// The cause of the incident.
        cause: Cause;

        /// Whether the evidence proves the cause; otherwise it is the most likely one. Always false for [`Cause::Unknown`].
        is_certain: bool;

        /// What happened, in complete sentences. Sessions are called by their [letters](super::Participant::letter).
        text: &str;

        /// How to fix it, in complete sentences.
        text fix;
    }

    fn new(cause: Cause, is_certain: bool, text: String) -> Self {
        Self {
            cause,
            is_certain,
            text,
            fix: None,
        }
    }

    pub(super) fn probably(&self) -> &'static str {
        match self.cause {
            Cause::Unknown => "",
            _ if self.is_certain => "",
            _ => "probably ",
        }
    }

    fn with_fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl Cause {
    /// Its name in JSON and in metric labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        self.names().0
    }

    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::OrderInversion => ("order_inversion", "lock order inversion"),
            Self::LockUpgrade => ("lock_upgrade", "lock upgrade"),
            Self::ForeignKeyParent => ("foreign_key_parent", "foreign key's parent row locked"),
            Self::UniqueInsert => ("unique_insert", "same unique key inserted"),
            Self::ExclusionOverlap => {
                ("exclusion_overlap", "overlap under an exclusion constraint")
            }
            Self::IndexBuild => ("index_build", "index build against a writer"),
            Self::IdleInTransaction => ("idle_in_transaction", "holder idle in its transaction"),
            Self::LockQueue => ("lock_queue", "queue of a lock"),
            Self::AdvisoryLockHeld => ("advisory_lock_held", "advisory lock held"),
            Self::PreparedTransaction => ("prepared_transaction", "prepared transaction left open"),
            Self::RunningHolder => ("running_holder", "holder busy with a statement"),
            Self::BehindDeadlock => ("behind_deadlock", "behind another deadlock"),
            Self::Unknown => ("unknown", "unknown"),
        }
    }
}

/// The cause in plain words.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().1)
    }
}

/// The cause, the text and the fix: `lock order inversion: …`.
impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}: {}", self.probably(), self.cause, self.text)?;
        match &self.fix {
            Some(fix) => write!(f, " {fix}"),
            None => Ok(()),
        }
    }
}

/// The facts that a diagnosis is made from.
pub(super) struct Facts<'a> {
    pub(super) kind: IncidentKind,
    pub(super) observed: &'a ObservedGraph,
    pub(super) participants: &'a [Participant],
    pub(super) message: &'a ServerMessage,
}

pub(super) fn diagnose(facts: &Facts<'_>) -> Diagnosis {
    if facts.observed.cycle > 0 {
        cycle::diagnose(facts)
    } else {
        wait::diagnose(facts)
    }
}

impl<'a> Facts<'a> {
    fn cycle(&self) -> &'a [IncidentEdge] {
        &self.observed.edges[..self.observed.cycle]
    }

    /// The edges of the victim.
    fn direct(&self) -> impl Iterator<Item = &'a IncidentEdge> {
        let victim = self.observed.victim.as_ref();
        let edges = self.observed.edges.iter();
        edges.filter(move |edge| Some(&edge.waiter) == victim)
    }

    fn participant(&self, id: &BackendId) -> Option<&'a Participant> {
        let mut participants = self.participants.iter();
        participants.find(|participant| participant.id.as_ref() == Some(id))
    }

    /// `pid 4711 (src/pay.rs:42)`
    fn name(&self, id: &BackendId) -> String {
        match self.participant(id) {
            Some(participant) => wording::name(participant),
            None => id.to_string(),
        }
    }

    fn waiters(&self) -> Vec<String> {
        let cycle = self.cycle().iter();
        cycle.map(|edge| self.name(&edge.waiter)).collect()
    }

    fn statement(&self, id: &BackendId) -> Option<StatementKind> {
        let statement = self.participant(id)?.statement.as_deref();
        statement.map(statement::kind)
    }

    fn builds_index(&self, id: &BackendId) -> Option<StatementKind> {
        self.statement(id).filter(|kind| kind.builds_index())
    }

    /// Whether the server's CONTEXT proves that the waiter waits in order to learn whether its row overlaps with another one.
    fn is_overlap_wait(edge: &IncidentEdge) -> bool {
        edge.context
            .as_ref()
            .is_some_and(|context| context.exclusion)
    }

    /// Whether the waiter waits for a transaction in order to learn whether a key is taken. The value is true if the
    /// server's CONTEXT proves it.
    fn is_unique_wait(&self, edge: &IncidentEdge) -> Option<bool> {
        if let Some(context) = &edge.context {
            return context.index_entry.then_some(true);
        }
        if matches!(edge.object, LockObject::SpeculativeToken { .. }) {
            return Some(true);
        }
        // A waiter for a row holds its tuple lock, and a plain insert waits for no other transaction.
        let inserts = matches!(
            self.statement(&edge.waiter),
            Some(StatementKind::Insert | StatementKind::Copy)
        );
        let is_bare = edge.row.is_none() && matches!(edge.object, LockObject::Transaction(_));
        (inserts && is_bare && edge.was_seen()).then_some(false)
    }

    /// The statements of a session that name a relation, by kind, each with whether it waited: those of its journal,
    /// and the one in its sample.
    fn statements_on(
        &self,
        id: &BackendId,
        schema: &str,
        name: &str,
    ) -> Vec<(StatementKind, bool)> {
        let Some(participant) = self.participant(id) else {
            return Vec::new();
        };
        let journal = participant.journal.iter().filter_map(|line| {
            Some((
                line.text.as_deref()?,
                line.mark == Some(JournalMark::Waited),
            ))
        });
        let seen = participant.statement.as_deref();
        let all = journal.chain(seen.map(|text| (text, participant.waits)));
        all.filter(|(text, _)| statement::mentions(text, schema, name))
            .map(|(text, waits)| (statement::kind(text), waits))
            .collect()
    }
}

/// For a waiter whose foreign key's check waits for the parent's row, which another transaction has locked.
fn foreign_key(facts: &Facts<'_>, edge: &IncidentEdge) -> Option<Diagnosis> {
    let waiter = facts.name(&edge.waiter);
    let blocker = facts.name(&edge.blocker);
    let is_victim = Some(&edge.waiter) == facts.observed.victim.as_ref();
    let (schema, name, is_from_context) = match &facts.message.parent {
        Some(parent) if is_victim => (parent.schema.as_str(), parent.name.as_str(), true),
        _ if is_victim && facts.message.has_context => return None,
        _ => {
            // Without a CONTEXT: an insert that waits for a row of a table that it does not name.
            let relation = edge.row.as_ref()?.relation();
            let (schema, name) = (relation.schema()?, relation.name()?);
            let statement = facts.participant(&edge.waiter)?.statement.as_deref()?;
            let inserts = statement::kind(statement) == StatementKind::Insert;
            if !inserts || statement::mentions(statement, schema, name) {
                return None;
            }
            (schema, name, false)
        }
    };
    let table = format!(
        "{}.{}",
        wording::printable(schema),
        wording::printable(name)
    );
    let on_parent = facts.statements_on(&edge.blocker, schema, name);
    let locks = on_parent
        .iter()
        .any(|(kind, _)| *kind == StatementKind::SelectForUpdate);
    let writes = [StatementKind::Delete, StatementKind::Update];
    // A statement that waits itself has not written yet.
    let writes = on_parent
        .iter()
        .any(|(kind, waits)| !waits && writes.contains(kind));
    if !is_from_context && !locks {
        return None;
    }
    let check = format!(
        "{waiter} wrote a row that refers to {table}; the foreign key's check locks the row there FOR KEY SHARE, and had \
         to wait for {blocker}"
    );
    let (text, fix) = if locks {
        (
            format!("{check}, which has selected it FOR UPDATE."),
            "Use FOR NO KEY UPDATE there: it keeps others from changing the row, and does not conflict with the check. \
             FOR UPDATE is for rows that are going to be deleted, or get another key."
                .to_owned(),
        )
    } else if writes {
        (
            format!("{check}, which has deleted the row or changed its key."),
            format!(
                "Lock the rows of {table} before those that refer to them, in every transaction, and leave the columns \
                 of its keys out of updates that do not change them."
            ),
        )
    } else {
        (
            format!(
                "{check}. Only FOR UPDATE, a DELETE or a change of its key conflicts with that check; which of them it \
                 was, was not seen."
            ),
            format!(
                "If it is SELECT … FOR UPDATE on {table}, use FOR NO KEY UPDATE: that does not conflict with the check."
            ),
        )
    };
    // It may be about another row of that table, or about another statement of a function.
    let is_certain = is_from_context && locks;
    Some(Diagnosis::new(Cause::ForeignKeyParent, is_certain, text).with_fix(fix))
}

fn index_fix(kind: StatementKind) -> &'static str {
    match kind {
        StatementKind::CreateIndexConcurrently => {
            "A concurrent build waits for every transaction that was there before it. Do not hold a lock, an advisory one \
             included, that such transactions may wait for while the index is built, and keep transactions short meanwhile."
        }
        _ => {
            "Build the index CONCURRENTLY, outside of any transaction: then it does not lock writers out. Where that \
             cannot be, build it in a transaction of its own that holds no other lock, under a short lock_timeout."
        }
    }
}
