//! How participants, locks and times are worded in all reports.

use std::time::Duration;

use crate::graph::{LockObject, Relation};
use crate::key::LockKey;
use crate::postgres::message::RowContext;
use crate::postgres::text::shortened;
use crate::postgres::timestamp::Age;
pub(super) use crate::postgres::timestamp::rfc3339 as timestamp;

use super::{Incident, IncidentEdge, JournalLine, Participant};

/// `src/pay.rs:42`, or else the `application_name`.
pub(super) fn call_site(participant: &Participant) -> Option<String> {
    let name = participant.application_name.as_deref();
    let name = name.filter(|name| !name.is_empty());
    participant.call_site().or(name).map(printable)
}

/// `A`: what a session is called within one report.
pub(super) fn name(participant: &Participant) -> String {
    participant.letter().to_owned()
}

/// `src/pay.rs:42`, or `pid 4711`: what a session is called on its own.
pub(super) fn site_or_id(participant: &Participant) -> String {
    call_site(participant).unwrap_or_else(|| id(participant))
}

/// `pid 4711`
pub(super) fn id(participant: &Participant) -> String {
    match &participant.id {
        Some(id) => printable(&id.to_string()),
        None => "the victim".to_owned(),
    }
}

/// `pid 4711 (src/pay.rs:42)`
pub(super) fn full_name(participant: &Participant) -> String {
    let id = id(participant);
    match call_site(participant) {
        Some(call_site) => format!("{id} ({call_site})"),
        None => id,
    }
}

/// `a, b and c`, with `two transactions of a` for names that are there more than once.
pub(super) fn counted(names: &[String]) -> String {
    let mut counts: Vec<(&String, usize)> = Vec::new();
    for name in names {
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    let counts = counts.into_iter().map(|(name, count)| match count {
        1 => name.clone(),
        _ => format!("{} transactions of {name}", number(count)),
    });
    list(&counts.collect::<Vec<_>>())
}

fn number(count: usize) -> String {
    const WORDS: [&str; 11] = [
        "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    ];
    let word = count.checked_sub(2).and_then(|at| WORDS.get(at));
    word.map_or_else(|| count.to_string(), |word| (*word).to_owned())
}

/// `a, b and c`
pub(super) fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Whether the wait is for the place at the head of a row's queue: whoever has it does not hold the row, but waits for it.
pub(super) fn is_row_queue(edge: &IncidentEdge) -> bool {
    matches!(edge.object, LockObject::Tuple(_))
}

/// `row id = 7 of public.users`, `table public.users`, `advisory lock "invoice:42"`.
pub(super) fn object(edge: &IncidentEdge) -> String {
    if let Some(row) = &edge.row {
        return match &edge.row_key {
            Some(key) => format!("row {key} of {}", row.relation),
            None => row.to_string(),
        };
    }
    if let Some(context) = &edge.context {
        return match (&edge.context_relation, &edge.row_key) {
            (Some(relation), Some(key)) => format!("row {key} of {relation}"),
            _ => row_of_context(context),
        };
    }
    match &edge.object {
        LockObject::Relation(relation) => format!("{} {relation}", relation_kind(relation)),
        // The row or key itself was not observed.
        LockObject::Transaction(xid) => format!("a row or key of transaction {xid}"),
        object => object.to_string(),
    }
}

/// If CONTEXT has an index entry, its row is the one that was being inserted.
pub(super) fn row_of_context(context: &RowContext) -> String {
    let relation = printable(&context.relation);
    if context.index_entry {
        format!("a key of {relation}")
    } else {
        format!("row ({},{}) of {relation}", context.page, context.offset)
    }
}

/// The relation, or else the locked object.
pub(super) fn subject(edge: &IncidentEdge) -> String {
    match &edge.row {
        Some(row) => row.relation().to_string(),
        None => object(edge),
    }
}

/// The lock, with its object unless [`object`] already shows it: `ShareLock on transaction 733`.
pub(super) fn lock(edge: &IncidentEdge) -> String {
    let is_named = match &edge.object {
        LockObject::Relation(_) | LockObject::Advisory { .. } => true,
        LockObject::Transaction(_) => edge.row.is_none() && edge.context.is_none(),
        other => object(edge) == other.to_string(),
    };
    let mode = printable(edge.mode_wanted());
    if is_named {
        mode
    } else {
        format!("{mode} on {}", edge.object)
    }
}

fn relation_kind(relation: &Relation) -> &'static str {
    match relation.kind() {
        Some('r' | 'p' | 'f') => "table",
        Some('i' | 'I') => "index",
        Some('S') => "sequence",
        Some('m') => "materialized view",
        Some('v') => "view",
        Some('t') => "TOAST table",
        _ => "relation",
    }
}

/// The key as it is written in Rust, if that is short: `"invoice:42"`, `("billing", "invoice:42")`, `(1, 2)`.
pub(super) fn rust_literal(key: &LockKey) -> String {
    match (key.namespace(), key.name()) {
        (Some(namespace), Some(name)) if namespace.len() + name.len() < 100 => {
            format!("({namespace:?}, {name:?})")
        }
        _ => key.to_string(),
    }
}

/// The columns of a row's key, for ORDER BY.
pub(super) fn key_columns(edges: &[&IncidentEdge]) -> Option<String> {
    let keys = edges.iter().find_map(|edge| edge.row_key.as_ref());
    let columns: Vec<_> = keys?.columns().map(|(name, _)| printable(name)).collect();
    (!columns.is_empty()).then(|| columns.join(", "))
}

/// The relation of a row, or the relation that is locked as a whole.
pub(super) fn relation_of(edge: &IncidentEdge) -> Option<&Relation> {
    match (&edge.row, &edge.object) {
        (Some(row), _) => Some(row.relation()),
        (None, LockObject::Relation(relation)) => Some(relation),
        _ => None,
    }
}

/// The text without characters that control a terminal or change the direction of text.
pub(super) fn printable(text: &str) -> String {
    let shown = |c: char| {
        let acts = c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if acts { '\u{fffd}' } else { c }
    };
    text.chars().map(shown).collect()
}

/// The text on one line, cut after this many characters.
pub(super) fn one_line(statement: &str, max_chars: usize) -> String {
    let words: Vec<_> = statement.split_whitespace().map(printable).collect();
    shortened(&words.join(" "), max_chars).into_owned()
}

/// As [`Age`], with a decimal digit below 10 milliseconds.
pub(super) fn age(age: Duration) -> String {
    if age < Duration::from_millis(10) {
        return format!("{}.{}ms", age.as_millis(), age.subsec_micros() / 100 % 10);
    }
    Age(age).to_string()
}

/// `active for 3.2s`
pub(super) fn state(participant: &Participant) -> Option<String> {
    let state = participant.state()?;
    Some(match participant.state_age() {
        Some(since) => format!("{state} for {}", age(since)),
        None => state.to_owned(),
    })
}

/// How long a statement took, or why that is not known.
pub(super) fn took(line: &JournalLine) -> String {
    match (line.failed(), line.duration()) {
        (true, _) => "failed".to_owned(),
        (false, Some(duration)) => age(duration),
        (false, None) => "open".to_owned(),
    }
}

/// A statement on one line, cut after this many characters, or what it locked.
pub(super) fn statement(line: &JournalLine, max_chars: usize) -> String {
    let locks = line.advisory();
    let locks: Vec<_> = locks
        .map(|(key, mode)| format!("{key} in {mode}"))
        .collect();
    match line.text() {
        Some(text) => one_line(text, max_chars),
        None if !locks.is_empty() => format!("(advisory lock {})", locks.join(", ")),
        None => "(a statement whose text is not known)".to_owned(),
    }
}

/// The parts of the server's message that are about the failure: their labels and texts.
pub(super) fn details(incident: &Incident) -> impl Iterator<Item = (&'static str, &str)> {
    let details = [
        ("DETAIL", incident.detail()),
        ("CONTEXT", incident.context()),
    ];
    let details = details.into_iter();
    details.filter_map(|(label, text)| Some((label, text?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        for (millis, expected) in [
            (0, "0.0ms"),
            (9, "9.0ms"),
            (10, "10ms"),
            (999, "999ms"),
            (1999, "1.9s"),
            (61_000, "1min 01s"),
            (3_660_000, "1h 01min"),
            (90_000_000, "1d 01h"),
        ] {
            assert_eq!(age(Duration::from_millis(millis)), expected);
        }
        assert_eq!(age(Duration::from_micros(412)), "0.4ms");
    }

    #[test]
    fn control_characters_are_replaced() {
        assert_eq!(printable("a\x1b[2J\u{202e}é"), "a\u{fffd}[2J\u{fffd}é");
        assert_eq!(one_line("a \n\t b", 10), "a b");
        assert_eq!(one_line("äbcdef", 3), "äbc…");
    }
}
