//! What all SQL of the crate shares: how texts are quoted, and how the rows that come back are decoded. The texts
//! themselves stand with the room that sends them, in its `sql.rs` or `sql/`.
//!
//! Three rules hold for all of it. Functions and operators are called by their `pg_catalog` name, so that nothing
//! planted earlier on a `search_path` is ever run. Nothing of a caller's is interpolated but numbers and
//! [`literal`]s. And everything is a *simple query* message of one or several statements: it is one round trip, it is
//! on its way after a single poll (which is what makes a `Drop` able to send it), and it works behind every pooler.
//!
//! Two exceptions: the ids of `Tx::lock_rows` are bound, since only their own types know how they are written; and the
//! assignments and the condition of a `Backfill` are the caller's SQL, run as they are, as its documentation says.

#[cfg(any(feature = "schema", feature = "coordination"))]
use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

pub(crate) const ROLLBACK: &str = "ROLLBACK";

/// A simple-query message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) text: String,
    /// How many statements that is, where it is known: the answer is complete with the last one's end. The server says
    /// ready a moment later, behind the new values of settings that it reports, `application_name` among them, and
    /// waiting for that costs a wake-up more.
    pub(crate) statements: Option<usize>,
}

impl Message {
    /// A text of so many statements.
    pub(crate) fn of(statements: usize, text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            statements: Some(statements),
        }
    }
}

/// A text of one or more statements.
impl From<String> for Message {
    fn from(text: String) -> Self {
        Self {
            text,
            statements: None,
        }
    }
}

/// [`ROLLBACK`] as a message.
pub(crate) fn rollback() -> Message {
    Message::of(1, ROLLBACK)
}

/// Succeeds outside a transaction and in one that has not failed.
pub(crate) const PROBE: &str = "SELECT";

/// What only this crate's messages have in them: names that begin with its own, and columns that it asks for when it begins,
/// locks and commits. The server keeps the beginning of a text only, so one of them has to be near it.
#[cfg(feature = "incidents")]
pub(crate) const OWN: [&str; 8] = [
    "EXECUTE lockkeeper_",
    "PREPARE lockkeeper_",
    "SAVEPOINT lockkeeper_",
    "$lockkeeper$",
    "'lockkeeper.",
    "pg_catalog.pg_backend_pid() AS pid",
    "pg_catalog.statement_timestamp()) AS fresh",
    "pg_catalog.pg_advisory_unlock",
];

/// What all of its questions about the server have in them: they name every operator by its schema, which nobody else does.
#[cfg(feature = "incidents")]
pub(crate) const QUESTION: [&str; 2] = ["FROM pg_catalog.pg_", "OPERATOR(pg_catalog."];

/// COMMIT of a transaction none of whose statements has failed.
pub(crate) const COMMIT: &str = "COMMIT";

/// A string literal that means the same whatever `standard_conforming_strings` is. The server has no text with NUL in it.
pub(crate) fn literal(text: &str) -> String {
    let mut sql = String::with_capacity(text.len() + 2);
    push_literal(&mut sql, text);
    sql
}

/// The same, behind what is there.
pub(crate) fn push_literal(sql: &mut String, text: &str) {
    sql.push_str(if text.contains('\\') { "E'" } else { "'" });
    let mut rest = text;
    while let Some((plain, special, after)) = split_at_special(rest) {
        sql.push_str(plain);
        sql.push_str(match special {
            b'\'' => "''",
            b'\\' => "\\\\",
            _ => "",
        });
        rest = after;
    }
    sql.push_str(rest);
    sql.push('\'');
}

/// What is before and after the first quote, backslash or NUL, and which of them it is.
fn split_at_special(text: &str) -> Option<(&str, u8, &str)> {
    let bytes = text.as_bytes();
    let at = bytes
        .iter()
        .position(|byte| matches!(byte, b'\'' | b'\\' | 0))?;
    Some((&text[..at], bytes[at], &text[at + 1..]))
}

/// A text that a server of any encoding takes, and another one for each text: plain ASCII as it is, and else with
/// `\u{…}` for what is not ASCII, and for the backslash.
#[cfg(any(feature = "schema", feature = "coordination"))]
pub(crate) fn in_ascii(text: &str) -> Cow<'_, str> {
    if text.is_ascii() && !text.contains("\\u{") {
        return Cow::Borrowed(text);
    }
    let escaped = text.chars().map(|c| match c {
        c if c.is_ascii() && c != '\\' => c.to_string(),
        c => c.escape_unicode().to_string(),
    });
    Cow::Owned(escaped.collect())
}

/// `SET LOCAL name = value; `, where `value` is SQL already.
pub(crate) fn set_local(sql: &mut String, name: &str, value: &str) {
    // Infallible: writing to a String.
    let _ = write!(sql, "SET LOCAL {name} = {value}; ");
}

/// A quoted identifier.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\"").replace('\0', ""))
}

/// An array of numbers, for a simple message.
#[cfg(feature = "incidents")]
pub(crate) fn int4_array(numbers: &[i32]) -> String {
    let numbers: Vec<_> = numbers.iter().map(i32::to_string).collect();
    format!("'{{{}}}'::pg_catalog.int4[]", numbers.join(","))
}

/// The rows of a reply, without the frames around them.
pub(crate) fn rows(reply: &[SimpleQueryMessage]) -> impl Iterator<Item = &SimpleQueryRow> {
    reply.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}

/// `true` in a simple query's text form.
pub(crate) fn is_true(row: &SimpleQueryRow, column: &str) -> bool {
    row.try_get(column).ok().flatten() == Some("t")
}

/// `false` in a simple query's text form: not NULL, and not missing.
pub(crate) fn is_false(row: &SimpleQueryRow, column: &str) -> bool {
    row.try_get(column).ok().flatten() == Some("f")
}

/// `SELECT …`: several values as the one column [`fields`] of a row. Columns have names, and each is sent with each reply.
///
/// None may be NULL, and only the first may contain a `|`.
pub(crate) fn push_select_fields(sql: &mut String, values: &[&str]) {
    let _ = write!(
        sql,
        "SELECT pg_catalog.concat_ws('|', {}) AS fields",
        values.join(", ")
    );
}

/// Sets a setting, as one of the values of [`push_select_fields`] that is empty. `value` is SQL.
pub(crate) fn set_config(name: &str, value: &str, is_local: bool) -> String {
    format!("pg_catalog.left(pg_catalog.set_config('{name}', {value}, {is_local}), 0)")
}

/// The values of [`push_select_fields`] in a reply, the last one first.
pub(crate) fn fields(reply: &[SimpleQueryMessage]) -> Option<impl Iterator<Item = &str>> {
    let row = rows(reply).find(|row| row.columns()[0].name() == "fields")?;
    row.get(0).map(|fields| fields.rsplit('|'))
}

/// A column parsed; `None` where it is NULL or something else.
pub(crate) fn parsed<T: std::str::FromStr>(row: &SimpleQueryRow, column: &str) -> Option<T> {
    row.try_get(column).ok().flatten()?.parse().ok()
}

pub(crate) fn text(row: &SimpleQueryRow, column: &str) -> Option<String> {
    row.try_get(column).ok().flatten().map(str::to_owned)
}

/// A column of seconds; negative ages (clocks step) are zero.
pub(crate) fn seconds(row: &SimpleQueryRow, column: &str) -> Option<Duration> {
    let seconds: f64 = parsed(row, column)?;
    Duration::try_from_secs_f64(seconds.max(0.0)).ok()
}

/// A time setting as `SHOW` writes it (`1s`, `1500ms`, `5min`; a bare number is in milliseconds). PostgreSQL's
/// documentation, "Parameter Names and Values". `None` for what it never writes.
pub(crate) fn setting_duration(text: &str) -> Option<Duration> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().ok()?;
    let micros = match unit {
        "us" => 1,
        "" | "ms" => 1_000,
        "s" => 1_000_000,
        "min" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    Some(Duration::from_micros(number.checked_mul(micros)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_quoted() {
        assert_eq!(literal("o'clock"), "'o''clock'");
        assert_eq!(literal(r"C:\o'jobs"), r"E'C:\\o''jobs'");
    }

    #[test]
    fn settings_are_read_in_every_unit_the_server_writes() {
        let ms = |n| Some(Duration::from_millis(n));
        assert_eq!(setting_duration("0"), ms(0));
        assert_eq!(setting_duration("1500ms"), ms(1500));
        assert_eq!(setting_duration("1s"), ms(1000));
        assert_eq!(setting_duration("5min"), ms(300_000));
        assert_eq!(setting_duration("2h"), ms(7_200_000));
        assert_eq!(setting_duration("1d"), ms(86_400_000));
        assert_eq!(setting_duration("250us"), Some(Duration::from_micros(250)));
        assert_eq!(setting_duration("soon"), None);
        assert_eq!(setting_duration(""), None);
    }

    #[cfg(any(feature = "schema", feature = "coordination"))]
    #[test]
    fn no_two_texts_become_one() {
        assert_eq!(in_ascii(r"k'e\y"), r"k'e\y");
        assert_eq!(in_ascii(r"é\"), r"\u{e9}\u{5c}");
        assert_eq!(in_ascii(r"\u{e9}"), r"\u{5c}u{e9}");
    }
}
