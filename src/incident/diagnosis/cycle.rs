//! Sessions that waited for one another in a circle.

use crate::graph::LockObject;

use super::super::{IncidentEdge, words};
use super::{Cause, Diagnosis, Facts, foreign_key, index_fix};

pub(super) fn diagnose(facts: &Facts<'_>) -> Diagnosis {
    upgrade(facts)
        .or_else(|| index_build(facts))
        .or_else(|| {
            facts
                .circle()
                .iter()
                .find_map(|edge| foreign_key(facts, edge))
        })
        .or_else(|| unique(facts))
        .or_else(|| queue(facts))
        .or_else(|| inversion(facts))
        .unwrap_or_else(|| unknown(facts))
}

/// All of them are about one thing, which each of them has already.
fn upgrade(facts: &Facts<'_>) -> Option<Diagnosis> {
    let (first, rest) = facts.circle().split_first()?;
    let is_one = rest.iter().all(|edge| edge.same_thing(first));
    let is_known = first.row.is_some()
        || matches!(
            first.object,
            LockObject::Relation(_) | LockObject::Advisory { .. }
        );
    if !is_one || !is_known || facts.circle().iter().any(IncidentEdge::is_soft) {
        return None;
    }
    let names: Vec<_> = facts
        .circle()
        .iter()
        .map(|edge| facts.name(&edge.waiter))
        .collect();
    let all = if names.len() == 2 { "both" } else { "all" };
    let thing = words::thing(first);
    let (held, fix) = if let Some(row) = &first.row {
        (
            "in a mode that can be shared (FOR SHARE, FOR KEY SHARE, or a foreign key's check)"
                .to_owned(),
            format!(
                "Lock the row of {} at once as strongly as it is needed, FOR NO KEY UPDATE before an update, and before \
                 rows that refer to it are inserted.",
                row.relation()
            ),
        )
    } else if let LockObject::Advisory { .. } = first.object {
        (
            "shared".to_owned(),
            "Ask for it exclusively from the start where it may be needed so.".to_owned(),
        )
    } else {
        let modes = facts.circle().iter().filter_map(IncidentEdge::mode_held);
        let mut modes: Vec<_> = modes.map(words::plain).collect();
        modes.sort();
        modes.dedup();
        let held = match modes.as_slice() {
            [] => "in a mode that can be shared".to_owned(),
            modes => format!("in {}", modes.join(" and ")),
        };
        (
            held,
            format!(
                "Lock {thing} at once as strongly as it is needed: LOCK TABLE … IN SHARE ROW EXCLUSIVE MODE, or a \
                 stronger one, before the first statement that uses it."
            ),
        )
    };
    let text = format!(
        "{} {all} held {thing} {held}, and each wanted more of it, which the others' hold did not allow.",
        list(&names)
    );
    let is_certain = facts.circle().iter().all(IncidentEdge::was_seen);
    Some(Diagnosis::new(Cause::LockUpgrade, is_certain, text).with_fix(fix))
}

fn index_build(facts: &Facts<'_>) -> Option<Diagnosis> {
    let (edge, kind) = facts.circle().iter().find_map(|edge| {
        let waits = matches!(
            edge.object,
            LockObject::Relation(_) | LockObject::VirtualTransaction(_)
        );
        let kind = facts.builds_index(&edge.waiter).filter(|_| waits)?;
        Some((edge, kind))
    })?;
    let before = facts
        .circle()
        .iter()
        .find(|before| before.blocker == edge.waiter)?;
    let what = match &edge.object {
        LockObject::VirtualTransaction(_) => {
            "the end of a transaction that was there before it".to_owned()
        }
        _ => words::thing(edge),
    };
    let text = format!(
        "{} was building an index and waited for {what}, which {} had; meanwhile {} waited for {}, which the session of \
         the index build held.",
        facts.name(&edge.waiter),
        facts.name(&edge.blocker),
        facts.name(&before.waiter),
        words::thing(before),
    );
    Some(Diagnosis::new(Cause::IndexBuild, true, text).with_fix(index_fix(kind)))
}

fn unique(facts: &Facts<'_>) -> Option<Diagnosis> {
    let waits = facts.circle().iter();
    let waits: Vec<_> = waits
        .filter_map(|edge| Some((edge, facts.is_unique_wait(edge)?)))
        .collect();
    let (edge, _) = waits.iter().max_by_key(|(_, is_told)| *is_told)?;
    let is_told = waits.iter().any(|(_, is_told)| *is_told);
    let key = match &edge.context {
        Some(context) => format!("the same key of {}", words::plain(&context.relation)),
        None => "the same unique key".to_owned(),
    };
    let all = waits.len() == facts.circle().len();
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
    Some(Diagnosis::new(Cause::UniqueInsert, is_told, text).with_fix(fix))
}

fn queue(facts: &Facts<'_>) -> Option<Diagnosis> {
    let soft = facts.circle().iter().find(|edge| edge.is_soft())?;
    let text = format!(
        "{} waited for {} only because {} waited for it too, ahead in the queue, in a mode that conflicts{}.",
        facts.name(&soft.waiter),
        words::thing(soft),
        facts.name(&soft.blocker),
        soft.mode_queued()
            .map(|mode| format!(" ({})", words::plain(mode)))
            .unwrap_or_default(),
    );
    let fix = "Take the strong lock under a short lock_timeout and try again after a pause, so that nobody queues behind it \
               for long; and let transactions lock all they need at their beginning, in one order.";
    Some(Diagnosis::new(Cause::LockQueue, true, text).with_fix(fix))
}

/// What a wait is known to be for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Row,
    /// Of a transaction, whichever row it is.
    AnyRow,
    Relation,
    Advisory,
    Other,
}

fn class(edge: &IncidentEdge) -> Class {
    match &edge.object {
        _ if edge.row.is_some() => Class::Row,
        LockObject::Transaction(_) => Class::AnyRow,
        LockObject::Relation(_) => Class::Relation,
        LockObject::Advisory { .. } => Class::Advisory,
        _ => Class::Other,
    }
}

fn differ(a: &IncidentEdge, b: &IncidentEdge) -> bool {
    match (class(a), class(b)) {
        (Class::Row | Class::AnyRow, Class::AnyRow) | (Class::AnyRow, Class::Row) => false,
        (x, y) => x != y || !a.same_thing(b),
    }
}

fn inversion(facts: &Facts<'_>) -> Option<Diagnosis> {
    let circle = facts.circle();
    let differs = circle.iter().any(|a| circle.iter().any(|b| differ(a, b)));
    if !differs {
        return None;
    }
    let orders = circle.iter().enumerate().map(|(at, wanted)| {
        // The edge before it in the circle is the one that waits for this session.
        let held = &circle[(at + circle.len() - 1) % circle.len()];
        format!(
            "{} held {} and wanted {}",
            facts.name(&wanted.waiter),
            words::thing(held),
            words::thing(wanted),
        )
    });
    let orders: Vec<_> = orders.collect();
    let text = format!(
        "The same locks were taken in different orders: {}.",
        orders.join("; ")
    );
    let is_certain = circle.iter().all(IncidentEdge::was_seen)
        && !circle
            .iter()
            .any(|edge| matches!(class(edge), Class::AnyRow | Class::Other));
    Some(Diagnosis::new(Cause::OrderInversion, is_certain, text).with_fix(one_order(circle)))
}

/// The order to use.
fn one_order(circle: &[IncidentEdge]) -> String {
    let all = |class_of: Class| circle.iter().all(|edge| class(edge) == class_of);
    if all(Class::Advisory) {
        let mut keys: Vec<_> = circle
            .iter()
            .filter_map(|edge| edge.object.advisory_key())
            .collect();
        keys.sort();
        keys.dedup();
        let keys: Vec<_> = keys.into_iter().map(words::in_rust).collect();
        return format!(
            "Take them with one call, which puts them into one order: advisory_locks([{}]).",
            keys.join(", ")
        );
    }
    let relations = circle.iter().filter_map(words::relation_of);
    let mut relations: Vec<_> = relations.map(ToString::to_string).collect();
    relations.sort();
    relations.dedup();
    if all(Class::Row)
        && let [relation] = relations.as_slice()
    {
        let edges: Vec<_> = circle.iter().collect();
        let key = words::order(&edges).unwrap_or_else(|| "its primary key".to_owned());
        return format!(
            "Lock the rows of {relation} in one order in every transaction, that of {key}, before the first of them is \
             written: SELECT … ORDER BY {} FOR NO KEY UPDATE.",
            if key.starts_with("its ") {
                "the primary key"
            } else {
                &key
            },
        );
    }
    if circle.iter().all(|edge| words::relation_of(edge).is_some()) {
        return format!(
            "Use one order in every transaction, such as that of the names: {}.",
            relations.join(" before ")
        );
    }
    if circle.iter().any(|edge| class(edge) == Class::Advisory) {
        return "Take the advisory lock first, in every transaction, before anything else is locked.".to_owned();
    }
    "Take these locks in one order in every transaction.".to_owned()
}

fn unknown(facts: &Facts<'_>) -> Diagnosis {
    let names: Vec<_> = facts
        .circle()
        .iter()
        .map(|edge| facts.name(&edge.waiter))
        .collect();
    let text = format!(
        "{} waited for one another, but for which rows or keys was not seen: the server's message names transactions only.",
        list(&names)
    );
    Diagnosis::new(Cause::Unknown, false, text)
}

/// `a, b and c`
fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
