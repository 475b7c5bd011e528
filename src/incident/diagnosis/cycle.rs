//! Diagnoses a wait cycle.

use crate::graph::LockObject;
use crate::postgres::statement::{self, StatementKind};

use super::super::journal::locks_rows;
use super::super::wording::list;
use super::super::{IncidentEdge, JournalLine, JournalMark, wording};
use super::{Cause, Diagnosis, Facts, QUOTED, foreign_key, index_fix};

pub(super) fn diagnose(facts: &Facts<'_>) -> Diagnosis {
    upgrade(facts)
        .or_else(|| index_build(facts))
        .or_else(|| {
            facts
                .cycle()
                .iter()
                .find_map(|edge| foreign_key(facts, edge))
        })
        .or_else(|| overlap(facts))
        .or_else(|| unique(facts))
        .or_else(|| queue(facts))
        .or_else(|| inversion(facts))
        .or_else(|| shared_row(facts))
        .or_else(|| by_journals(facts))
        .unwrap_or_else(|| unknown(facts))
}

/// All waits are for one object that each of the waiters has locked already.
fn upgrade(facts: &Facts<'_>) -> Option<Diagnosis> {
    let (first, rest) = facts.cycle().split_first()?;
    let is_one = rest.iter().all(|edge| edge.same_object(first));
    let is_known = first.row.is_some()
        || matches!(
            first.object,
            LockObject::Relation(_) | LockObject::Advisory { .. }
        );
    if !is_one || !is_known || facts.cycle().iter().any(IncidentEdge::is_soft) {
        return None;
    }
    let names = facts.waiters();
    let all = if names.len() == 2 { "both" } else { "all" };
    let object = wording::object(first);
    let (held, fix) = if let Some(row) = &first.row {
        (
            "in a mode that can be shared (FOR SHARE, FOR KEY SHARE, or a foreign key's check)"
                .to_owned(),
            format!(
                "Lock the row of {} at once as strongly as it is needed, FOR NO KEY UPDATE before an update, and before \
                 rows that refer to it are inserted{}.",
                row.relation(),
                call_for_rows(
                    &row.relation().to_string(),
                    wording::key_columns(&[first]).as_deref()
                ),
            ),
        )
    } else if let LockObject::Advisory { .. } = first.object {
        (
            "shared".to_owned(),
            "Ask for it exclusively from the start where it may be needed so: tx.advisory_lock or advisory_locks, without shared()."
                .to_owned(),
        )
    } else {
        let modes = facts.cycle().iter().filter_map(IncidentEdge::mode_held);
        let mut modes: Vec<_> = modes.map(wording::printable).collect();
        modes.sort();
        modes.dedup();
        let held = match modes.as_slice() {
            [] => "in a mode that can be shared".to_owned(),
            modes => format!("in {}", modes.join(" and ")),
        };
        (
            held,
            format!(
                "Lock {object} at once as strongly as it is needed: LOCK TABLE … IN SHARE ROW EXCLUSIVE MODE, or a \
                 stronger one, before the first statement that uses it."
            ),
        )
    };
    let text = format!(
        "{} {all} held {object} {held}, and each wanted more of it, which the others' hold did not allow.",
        list(&names)
    );
    let is_certain = facts.cycle().iter().all(IncidentEdge::was_seen);
    Some(Diagnosis::new(Cause::LockUpgrade, is_certain, text).with_fix(fix))
}

fn index_build(facts: &Facts<'_>) -> Option<Diagnosis> {
    let (edge, kind) = facts.cycle().iter().find_map(|edge| {
        let waits = matches!(
            edge.object,
            LockObject::Relation(_) | LockObject::VirtualTransaction(_)
        );
        let kind = facts.builds_index(&edge.waiter).filter(|_| waits)?;
        Some((edge, kind))
    })?;
    let before = facts
        .cycle()
        .iter()
        .find(|before| before.blocker == edge.waiter)?;
    let what = match &edge.object {
        LockObject::VirtualTransaction(_) => {
            "the end of a transaction that was there before it".to_owned()
        }
        _ => wording::object(edge),
    };
    let text = format!(
        "{} was building an index and waited for {what}, which {} had; meanwhile {} waited for {}, which the session of \
         the index build held.",
        facts.name(&edge.waiter),
        facts.name(&edge.blocker),
        facts.name(&before.waiter),
        wording::object(before),
    );
    Some(Diagnosis::new(Cause::IndexBuild, true, text).with_fix(index_fix(kind)))
}

fn overlap(facts: &Facts<'_>) -> Option<Diagnosis> {
    let mut cycle = facts.cycle().iter();
    let edge = cycle.find(|edge| Facts::is_overlap_wait(edge))?;
    let text = format!(
        "{} wrote a row that may overlap under an exclusion constraint with {}, which {} had written, and had to wait until that \
         transaction ends; meanwhile that transaction waited, directly or through others, for {}.",
        facts.name(&edge.waiter),
        wording::object(edge),
        facts.name(&edge.blocker),
        facts.name(&edge.waiter),
    );
    let fix = "Let each transaction write one such row, or take one lock for all rows that may overlap before the first of them \
               is written: tx.advisory_lock, or tx.lock_rows on the row that they all belong to.";
    Some(Diagnosis::new(Cause::ExclusionOverlap, true, text).with_fix(fix))
}

fn unique(facts: &Facts<'_>) -> Option<Diagnosis> {
    let waits = facts.cycle().iter();
    let waits: Vec<_> = waits
        .filter_map(|edge| Some((edge, facts.is_unique_wait(edge)?)))
        .collect();
    let (edge, _) = waits
        .iter()
        .max_by_key(|(_, is_from_context)| *is_from_context)?;
    let is_from_context = waits.iter().any(|(_, is_from_context)| *is_from_context);
    let key = match &edge.context {
        Some(context) => format!("the same key of {}", wording::printable(&context.relation)),
        None => "the same unique key".to_owned(),
    };
    let all = waits.len() == facts.cycle().len();
    let (others, fix) = if all {
        (
            "; the others waited for keys that were inserted in another order",
            "Insert rows in the order of their unique key, in every transaction: sort them before, or insert them with one \
             statement that does (INSERT … SELECT … ORDER BY). ON CONFLICT does not help: it waits in the same way.",
        )
    } else {
        (
            ", while that one waited for a lock of the first",
            "Insert the row whose key may be there already before anything else is locked, in every transaction, or \
             lock what both need in one order.",
        )
    };
    let text = format!(
        "{} inserted {key} as {} had, and had to wait until that transaction ends{others}.",
        facts.name(&edge.waiter),
        facts.name(&edge.blocker),
    );
    Some(Diagnosis::new(Cause::UniqueInsert, is_from_context, text).with_fix(fix))
}

fn queue(facts: &Facts<'_>) -> Option<Diagnosis> {
    let soft = facts.cycle().iter().find(|edge| edge.is_soft())?;
    let text = format!(
        "{} waited for {} only because {} waited for it too, ahead in the queue, in a mode that conflicts{}.",
        facts.name(&soft.waiter),
        wording::object(soft),
        facts.name(&soft.blocker),
        soft.mode_queued()
            .map(|mode| format!(" ({})", wording::printable(mode)))
            .unwrap_or_default(),
    );
    let fix = "Take the strong lock under a short lock_timeout and try again after a pause, so that nobody queues behind it \
               for long; and let transactions lock all they need at their beginning, in one order.";
    Some(Diagnosis::new(Cause::LockQueue, true, text).with_fix(fix))
}

/// What is known of the object of a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ObjectClass {
    Row,
    /// A row of a transaction; which row is unknown.
    AnyRow,
    Relation,
    Advisory,
    Other,
}

fn object_class(edge: &IncidentEdge) -> ObjectClass {
    match &edge.object {
        _ if edge.row.is_some() => ObjectClass::Row,
        LockObject::Transaction(_) => ObjectClass::AnyRow,
        LockObject::Relation(_) => ObjectClass::Relation,
        LockObject::Advisory { .. } => ObjectClass::Advisory,
        _ => ObjectClass::Other,
    }
}

fn differ(a: &IncidentEdge, b: &IncidentEdge) -> bool {
    match (object_class(a), object_class(b)) {
        (ObjectClass::Row | ObjectClass::AnyRow, ObjectClass::AnyRow)
        | (ObjectClass::AnyRow, ObjectClass::Row) => false,
        (x, y) => x != y || !a.same_object(b),
    }
}

fn inversion(facts: &Facts<'_>) -> Option<Diagnosis> {
    let cycle = facts.cycle();
    let differs = cycle.iter().any(|a| cycle.iter().any(|b| differ(a, b)));
    if !differs {
        return None;
    }
    let orders = cycle.iter().enumerate().map(|(at, wanted)| {
        // The edge before it in the cycle is the one that waits for this session.
        let held = &cycle[(at + cycle.len() - 1) % cycle.len()];
        let waiter = facts.name(&wanted.waiter);
        // Whoever is first in a row's queue holds the queue's head and not the row.
        if wording::is_row_queue(held) && held.same_object(wanted) {
            return format!("{waiter} was queued for {}", wording::object(wanted));
        }
        format!(
            "{waiter} held {} and wanted {}",
            wording::object(held),
            wording::object(wanted),
        )
    });
    let orders: Vec<_> = orders.collect();
    let text = format!(
        "The same locks were taken in different orders: {}.",
        orders.join("; ")
    );
    let is_certain = cycle.iter().all(IncidentEdge::was_seen)
        && !cycle
            .iter()
            .any(|edge| matches!(object_class(edge), ObjectClass::AnyRow | ObjectClass::Other));
    Some(Diagnosis::new(Cause::OrderInversion, is_certain, text).with_fix(lock_order(cycle)))
}

/// For rows that no sample shows, if every transaction belongs to this process: each had written some rows, and then
/// waited in a statement that writes others.
fn by_journals(facts: &Facts<'_>) -> Option<Diagnosis> {
    let sequences = facts.cycle().iter().map(|edge| {
        let participant = facts.participant(&edge.waiter)?;
        let lines = participant.journal();
        let waited = lines
            .iter()
            .position(|line| line.mark() == Some(JournalMark::Waited))?;
        let kind = |line: &JournalLine| line.text().map(statement::kind);
        let writes = |line: &JournalLine| kind(line).is_some_and(locks_for_itself);
        let shares = |line: &JournalLine| {
            kind(line).is_some_and(|kind| !locks_for_itself(kind) && locks_rows(kind))
        };
        let before = lines[..waited].iter().filter(|line| !line.failed());
        // A shared lock may have been requested a second time.
        let first = before.clone().find(|line| writes(line))?;
        let is_plain = writes(&lines[waited])
            && participant.journal_dropped() == 0
            && !before.clone().any(shares);
        let quoted =
            |line: &JournalLine| wording::one_line(line.text().unwrap_or_default(), QUOTED);
        let (first, then) = (quoted(first), quoted(&lines[waited]));
        is_plain.then(|| {
            format!(
                "{} ran {first} before it waited in {then}",
                facts.name(&edge.waiter)
            )
        })
    });
    let sequences = sequences.collect::<Option<Vec<_>>>()?;
    let text = format!(
        "Rows were locked in different orders, if the rows of the first of these statements are those that others waited for, \
         which was not seen: {}.",
        sequences.join("; ")
    );
    let fix = "Lock the rows in one order in every transaction, that of their keys, before the first of them is written: \
               tx.lock_rows, or SELECT … ORDER BY … FOR NO KEY UPDATE.";
    Some(Diagnosis::new(Cause::OrderInversion, false, text).with_fix(fix))
}

/// Whether statements of this kind lock rows exclusively.
fn locks_for_itself(kind: StatementKind) -> bool {
    matches!(
        kind,
        StatementKind::Update
            | StatementKind::Delete
            | StatementKind::Merge
            | StatementKind::SelectForUpdate
            | StatementKind::SelectForNoKeyUpdate
    )
}

/// The lock order to use.
fn lock_order(cycle: &[IncidentEdge]) -> String {
    let all = |class_of: ObjectClass| cycle.iter().all(|edge| object_class(edge) == class_of);
    if all(ObjectClass::Advisory) {
        let mut keys: Vec<_> = cycle
            .iter()
            .filter_map(|edge| edge.object.advisory_key())
            .collect();
        keys.sort();
        keys.dedup();
        let keys: Vec<_> = keys.into_iter().map(wording::rust_literal).collect();
        return format!(
            "Take them with one call, which puts them into one order: advisory_locks([{}]).",
            keys.join(", ")
        );
    }
    let relations = cycle.iter().filter_map(wording::relation_of);
    let mut relations: Vec<_> = relations.map(ToString::to_string).collect();
    relations.sort();
    relations.dedup();
    if all(ObjectClass::Row)
        && let [relation] = relations.as_slice()
    {
        let edges: Vec<_> = cycle.iter().collect();
        let key = wording::key_columns(&edges).unwrap_or_else(|| "its primary key".to_owned());
        return format!(
            "Lock the rows of {relation} in one order in every transaction, that of {key}, before the first of them is \
             written{}, or SELECT … ORDER BY {} FOR NO KEY UPDATE.",
            call_for_rows(relation, wording::key_columns(&edges).as_deref()),
            if key.starts_with("its ") {
                "the primary key"
            } else {
                &key
            },
        );
    }
    if cycle
        .iter()
        .all(|edge| wording::relation_of(edge).is_some())
    {
        return format!(
            "Use one order in every transaction, such as that of the names: {}.",
            relations.join(" before ")
        );
    }
    if cycle
        .iter()
        .any(|edge| object_class(edge) == ObjectClass::Advisory)
    {
        return "Take the advisory lock first, in every transaction, before anything else is locked: with_advisory_lock, or \
                advisory_locks for several."
            .to_owned();
    }
    "Take these locks in one order in every transaction.".to_owned()
}

/// A waiter for a row takes its tuple lock before it waits for the holders, unless it shares a lock on the row
/// (`current_is_member` in PostgreSQL's `src/backend/access/heap/heapam.c`; test `diagnoses::lock_upgrade_of_a_row`).
/// So the waiters of this cycle have no tuple lock because all of them had locked the row already.
fn shared_row(facts: &Facts<'_>) -> Option<Diagnosis> {
    let cycle = facts.cycle();
    let is_member = |edge: &IncidentEdge| {
        let changes = matches!(
            facts.statement(&edge.waiter),
            Some(
                StatementKind::Update
                    | StatementKind::Delete
                    | StatementKind::SelectForUpdate
                    | StatementKind::SelectForNoKeyUpdate
            )
        );
        changes && edge.was_seen() && !edge.is_soft() && object_class(edge) == ObjectClass::AnyRow
    };
    if cycle.is_empty() || !cycle.iter().all(is_member) {
        return None;
    }
    let names = facts.waiters();
    let context = cycle.iter().find(|edge| edge.context.is_some());
    let row = context.map_or_else(|| "a row".to_owned(), wording::object);
    let text = format!(
        "{} held {row} in a mode that can be shared (FOR SHARE, FOR KEY SHARE, or a foreign key's check), and each wanted \
         to change it, which the others' hold did not allow.",
        list(&names)
    );
    let fix = "Lock the row at once as strongly as it is needed, FOR NO KEY UPDATE before an update, and before rows that \
               refer to it are inserted: tx.lock_rows.";
    Some(Diagnosis::new(Cause::LockUpgrade, false, text).with_fix(fix))
}

fn unknown(facts: &Facts<'_>) -> Diagnosis {
    let names = facts.waiters();
    let text = format!(
        "{} waited for one another, but for which rows or keys was not seen: the server's message names transactions only.",
        list(&names)
    );
    Diagnosis::new(Cause::Unknown, false, text)
}

/// This crate's call that locks rows in one order: `: tx.lock_rows("public.account", "id", ids)`. It takes one column.
fn call_for_rows(relation: &str, key: Option<&str>) -> String {
    match key {
        Some(key) if !key.contains(", ") => {
            format!(": tx.lock_rows({relation:?}, {key:?}, ids)")
        }
        _ => ": tx.lock_rows".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use crate::graph::{LockObject, RowId};

    use super::super::super::testing::*;
    use super::super::super::{Evidence, Incident, IncidentTrigger, ServerError};
    use super::*;

    fn diagnosed(evidence: Evidence) -> (Cause, bool, Incident) {
        let report = report(evidence);
        let diagnosis = report.diagnosis();
        (diagnosis.cause(), diagnosis.is_certain(), report)
    }

    fn fix(report: &Incident) -> &str {
        report.diagnosis().fix().unwrap_or_default()
    }

    /// Pid 11 waits for the second object, which 12 holds; 12 waits for the first, which 11 holds.
    fn two(first: (&LockObject, &'static str), second: (&LockObject, &'static str)) -> TestServer {
        TestServer::default()
            .session(11, "billing src/transfer.rs:41", "active", "SELECT 1")
            .session(12, "billing src/refund.rs:17", "active", "SELECT 2")
            .holds(11, first.0, first.1)
            .holds(12, second.0, second.1)
            .waits(11, second.0, second.1, 958, &[12])
            .waits(12, first.0, first.1, 400, &[11])
    }

    fn rows(first: &RowId, second: &RowId, sql: [&str; 2]) -> TestServer {
        TestServer::default()
            .session(11, "src/transfer.rs:41", "active", sql[0])
            .session(12, "src/refund.rs:17", "active", sql[1])
            .waits_for_row(11, second, 12, 958)
            .waits_for_row(12, first, 11, 400)
    }

    #[test]
    fn rows_in_different_orders() {
        let (cause, certain, report) = diagnosed(transfers());
        assert_eq!((cause, certain), (Cause::OrderInversion, true));
        let text = report.diagnosis().text();
        for order in [
            "A held row id = 1 of public.account and wanted row id = 2 of public.account",
            "B held row id = 2 of public.account and wanted row id = 1 of public.account",
        ] {
            assert!(text.contains(order), "{text}");
        }
        assert!(fix(&report).contains("rows of public.account in one order"));
        assert!(fix(&report).contains("ORDER BY id FOR NO KEY UPDATE"));
    }

    #[test]
    fn rows_without_a_known_key_are_ordered_by_the_primary_key() {
        let server = rows(&row(account(), 1), &row(account(), 2), ["", ""]);
        let (cause, _, report) = diagnosed(deadlock(server));
        assert_eq!(cause, Cause::OrderInversion);
        assert!(
            report
                .diagnosis()
                .text()
                .contains("row (0,2) of public.account")
        );
        assert!(fix(&report).contains("that of its primary key"));
    }

    #[test]
    fn tables_in_different_orders() {
        let server = rows(&row(table(2, "zoo"), 1), &row(table(1, "ant"), 1), ["", ""]);
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::OrderInversion, true));
        assert!(fix(&report).contains("public.ant before public.zoo"));
        let (zoo, ant) = (
            LockObject::Relation(table(2, "zoo")),
            LockObject::Relation(table(1, "ant")),
        );
        let server = two((&zoo, "AccessExclusiveLock"), (&ant, "ExclusiveLock"));
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::OrderInversion, true));
        assert!(report.diagnosis().text().contains("held table public.zoo"));
        assert!(fix(&report).contains("public.ant before public.zoo"));
    }

    #[test]
    fn advisory_locks_in_different_orders() {
        let (a, b) = (advisory("b:2"), advisory(("billing", "a:1")));
        let (cause, certain, report) =
            diagnosed(deadlock(two((&a, "ExclusiveLock"), (&b, "ExclusiveLock"))));
        assert_eq!((cause, certain), (Cause::OrderInversion, true));
        let fix = fix(&report);
        assert!(fix.contains("advisory_locks(["), "{fix}");
        assert!(
            fix.contains("(\"billing\", \"a:1\")") && fix.contains("\"b:2\""),
            "{fix}"
        );
    }

    #[test]
    fn an_advisory_lock_and_a_row() {
        let key = advisory("invoice:1");
        let server = TestServer::default()
            .waits_for_row(11, &row(account(), 1), 12, 958)
            .holds(11, &key, "ExclusiveLock")
            .waits(12, &key, "ExclusiveLock", 5, &[11]);
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::OrderInversion, true));
        assert!(fix(&report).contains("advisory lock first"));
    }

    #[test]
    fn an_advisory_lock_and_an_unknown_row() {
        let (cause, certain, _) = diagnosed(Evidence {
            error: Some(deadlock_error(
                "Process 11 waits for ShareLock on transaction 5; blocked by process 12.\n\
                 Process 12 waits for ExclusiveLock on advisory lock [1,0,7,1]; blocked by process 11.",
                "",
            )),
            ..evidence(IncidentTrigger::Deadlock)
        });
        assert_eq!((cause, certain), (Cause::OrderInversion, false));
        // The server does not tell whether they held the locks, or were ahead in the queue.
        let (cause, certain, _) = diagnosed(Evidence {
            error: Some(deadlock_error(
                "Process 11 waits for ExclusiveLock on advisory lock [1,0,8,1]; blocked by process 12.\n\
                 Process 12 waits for ExclusiveLock on advisory lock [1,0,7,1]; blocked by process 11.",
                "",
            )),
            ..evidence(IncidentTrigger::Deadlock)
        });
        assert_eq!((cause, certain), (Cause::OrderInversion, false));
    }

    #[test]
    fn upgrade_of_a_row() {
        let row = row(account(), 1);
        let server = TestServer::default()
            .waits_for_row(11, &row, 12, 958)
            // The second one in the queue.
            .waits(
                12,
                &LockObject::Tuple(row.clone()),
                "ExclusiveLock",
                400,
                &[11],
            );
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::LockUpgrade, true));
        assert!(
            report
                .diagnosis()
                .text()
                .contains("both held row (0,1) of public.account")
        );
        assert!(fix(&report).contains("FOR NO KEY UPDATE"));
    }

    #[test]
    fn upgrade_of_a_table() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .holds(11, &object, "ShareLock")
            .holds(12, &object, "ShareLock")
            .waits(11, &object, "RowExclusiveLock", 958, &[12])
            .waits(12, &object, "RowExclusiveLock", 400, &[11]);
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::LockUpgrade, true));
        assert!(report.diagnosis().text().contains("in ShareLock"));
        assert!(fix(&report).contains("SHARE ROW EXCLUSIVE"));
    }

    #[test]
    fn upgrade_of_an_advisory_lock_by_the_detail_alone() {
        let line = |waiter, blocker| {
            format!(
                "Process {waiter} waits for ExclusiveLock on advisory lock [1,0,7,1]; blocked by process {blocker}."
            )
        };
        let detail = [line(11, 12), line(12, 13), line(13, 11)].join("\n");
        let (cause, certain, report) = diagnosed(Evidence {
            error: Some(deadlock_error(&detail, "")),
            ..evidence(IncidentTrigger::Deadlock)
        });
        assert_eq!((cause, certain), (Cause::LockUpgrade, false));
        assert!(
            report
                .diagnosis()
                .text()
                .contains("B and C all held advisory lock 7")
        );
        assert!(fix(&report).contains("exclusively from the start"));
    }

    #[test]
    fn an_index_build_and_a_writer() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .session(11, "migrate", "active", "CREATE INDEX ON account (note)")
            .session(12, "src/refund.rs:17", "active", "UPDATE audit SET x = 1")
            .holds(12, &object, "RowExclusiveLock")
            .waits(11, &object, "ShareLock", 958, &[12])
            .waits_for_row(12, &row(table(7, "audit"), 3), 11, 400);
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::IndexBuild, true));
        assert!(fix(&report).contains("CONCURRENTLY"));
        let key = advisory("migrations");
        let old = LockObject::VirtualTransaction("3/15".into());
        let server = TestServer::default()
            .session(
                11,
                "src/refund.rs:17",
                "active",
                "SELECT pg_advisory_lock(1)",
            )
            .session(
                12,
                "migrate",
                "active",
                "CREATE INDEX CONCURRENTLY ON account (note)",
            )
            .holds(11, &old, "ExclusiveLock")
            .holds(12, &key, "ExclusiveLock")
            .waits(11, &key, "ExclusiveLock", 958, &[12])
            .waits(12, &old, "ShareLock", 400, &[11]);
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::IndexBuild, true));
        assert!(
            report
                .diagnosis()
                .text()
                .starts_with("B was building an index")
        );
        assert!(fix(&report).contains("an advisory one"));
    }

    const CHECK: &str = "while locking tuple (0,1) in relation \"customer\"\n\
        SQL statement \"SELECT 1 FROM ONLY \"public\".\"customer\" x WHERE \"id\" OPERATOR(pg_catalog.=) $1 \
        FOR KEY SHARE OF x\"";

    fn with_context(evidence: Evidence, context: &str) -> Evidence {
        let error = ServerError {
            detail: None,
            ..deadlock_error("", context)
        };
        Evidence {
            error: Some(error),
            ..evidence
        }
    }

    /// The second session holds the parent's row, and waits for an order of the first.
    fn parent(sql: [&str; 2]) -> Evidence {
        let server = rows(
            &row(table(8, "orders"), 4),
            &row(table(9, "customer"), 1),
            sql,
        );
        deadlock(server)
    }

    #[test]
    fn a_foreign_keys_parent() {
        let sql = ["INSERT INTO orders VALUES (1)", "UPDATE orders SET a = 1"];
        let mut known = with_context(parent(sql), CHECK);
        known.others = vec![journal(
            12,
            REFUND,
            900,
            vec![
                entry(0, "SELECT * FROM customer WHERE id = 1 FOR UPDATE", Some(1)),
                entry(500, sql[1], None),
            ],
        )];
        let (cause, certain, report) = diagnosed(known.clone());
        assert_eq!((cause, certain), (Cause::ForeignKeyParent, true));
        assert!(
            report
                .diagnosis()
                .text()
                .contains("refers to public.customer")
        );
        assert!(fix(&report).contains("Use FOR NO KEY UPDATE"));

        // Without a CONTEXT, by what the insert waits for.
        known.error = None;
        let (cause, certain, _) = diagnosed(known.clone());
        assert_eq!((cause, certain), (Cause::ForeignKeyParent, false));

        // With a CONTEXT about something else, it is not a check.
        let (cause, ..) = diagnosed(with_context(
            known.clone(),
            "PL/pgSQL function f() line 3 at RAISE",
        ));
        assert_eq!(cause, Cause::OrderInversion);

        // The wait may be in a trigger, unless a session is known to have locked the row.
        let (cause, ..) = diagnosed(parent(sql));
        assert_eq!(cause, Cause::OrderInversion);

        // How the parent was locked is unknown.
        let (cause, certain, report) = diagnosed(with_context(parent(sql), CHECK));
        assert_eq!((cause, certain), (Cause::ForeignKeyParent, false));
        assert!(report.diagnosis().text().contains("was not seen"));

        known.others[0].statements[0] = entry(0, "DELETE FROM customer", Some(1));
        let (cause, certain, report) = diagnosed(with_context(known, CHECK));
        assert_eq!((cause, certain), (Cause::ForeignKeyParent, false));
        assert!(report.diagnosis().text().contains("deleted the row"));
    }

    #[test]
    fn keys_inserted_in_different_orders() {
        let transaction = |pid| LockObject::Transaction(pid);
        let server = || {
            TestServer::default()
                .session(
                    11,
                    "src/transfer.rs:41",
                    "active",
                    "INSERT INTO account VALUES (1)",
                )
                .session(
                    12,
                    "src/refund.rs:17",
                    "active",
                    "INSERT INTO account VALUES (2)",
                )
                .holds(11, &transaction(11), "ExclusiveLock")
                .holds(12, &transaction(12), "ExclusiveLock")
                .waits(11, &transaction(12), "ShareLock", 958, &[12])
                .waits(12, &transaction(11), "ShareLock", 400, &[11])
        };
        let (cause, certain, report) = diagnosed(deadlock(server()));
        assert_eq!((cause, certain), (Cause::UniqueInsert, false));
        assert!(fix(&report).contains("in the order of their unique key"));
        let context = "while inserting index tuple (0,2) in relation \"account_pkey\"";
        let (cause, certain, report) = diagnosed(with_context(deadlock(server()), context));
        assert_eq!((cause, certain), (Cause::UniqueInsert, true));
        assert!(report.diagnosis().text().contains("account_pkey"));
        // The other one waits for a row.
        let server = server().holds(12, &LockObject::Tuple(row(account(), 7)), "ExclusiveLock");
        let (cause, certain, report) = diagnosed(with_context(deadlock(server), context));
        assert_eq!((cause, certain), (Cause::UniqueInsert, true));
        assert!(fix(&report).contains("already before anything else"));
    }

    #[test]
    fn a_cycle_over_a_queue() {
        let object = LockObject::Relation(account());
        let server = TestServer::default()
            .holds(13, &object, "AccessShareLock")
            .waits(12, &object, "AccessExclusiveLock", 958, &[13])
            .waits(11, &object, "AccessShareLock", 400, &[12])
            .waits_for_row(13, &row(table(7, "audit"), 3), 11, 100);
        let (cause, certain, report) = diagnosed(deadlock(server));
        assert_eq!((cause, certain), (Cause::LockQueue, true));
        assert!(report.diagnosis().text().contains("AccessExclusiveLock"));
        assert_eq!(report.cycle().len(), 3);
    }

    #[test]
    fn unknown_rows_are_diagnosed_by_the_journals() {
        let mut evidence = Evidence {
            samples: Vec::new(),
            ..transfers()
        };
        evidence.victim.statements.remove(1);
        let (cause, certain, report) = diagnosed(evidence.clone());
        assert_eq!((cause, certain), (Cause::OrderInversion, false));
        let text = report.diagnosis().text();
        let ran = "A ran UPDATE account SET balance = balance - ? WHERE id = ? before it waited";
        assert!(text.contains(ran), "{text}");
        // A lock upgrade, or a foreign key's parent, would look the same.
        for shared in [
            "INSERT INTO log VALUES (1)",
            "SELECT * FROM account FOR SHARE",
        ] {
            let mut evidence = evidence.clone();
            evidence.others[0].statements[0] = entry(0, shared, Some(1));
            assert_eq!(diagnosed(evidence).0, Cause::Unknown);
        }
        evidence.others[0].dropped = 1;
        assert_eq!(diagnosed(evidence.clone()).0, Cause::Unknown);
        evidence.others.clear();
        assert_eq!(diagnosed(evidence).0, Cause::Unknown);
    }

    #[test]
    fn an_unknown_cause_is_not_guessed() {
        let evidence = Evidence {
            samples: Vec::new(),
            others: Vec::new(),
            ..transfers()
        };
        let (cause, certain, report) = diagnosed(evidence);
        assert_eq!((cause, certain), (Cause::Unknown, false));
        assert_eq!(report.diagnosis().fix(), None);
        assert!(report.diagnosis().text().contains("A and B waited"));
    }
}
