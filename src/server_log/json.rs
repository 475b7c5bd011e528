//! JSON: the format `jsonlog`, one object per line, and what other programs make of the log.

use std::str::Chars;

use super::entry::{Entry, Origin};
use super::time_zones::TimeZones;

/// The server writes no nested values, and carriers nest a few, so a deeply nested line is neither's.
const MAX_DEPTH: usize = 32;
/// How many texts and records of one object are read.
const MAX_FOUND: usize = 10_000;
/// How many bytes of an object that spans several lines are kept.
const MAX_OBJECT_BYTES: usize = 4 << 20;

/// What an object contains.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A message with its fields.
    Record(Box<Entry>),
    /// Lines of the format `stderr`.
    Text(Lines),
}

/// Lines within an object.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Lines {
    pub(super) text: String,
    pub(super) pid: Option<i32>,
    /// When the carrier received them.
    pub(super) time: Option<String>,
    /// Whether the rest of the last line is in the next object, as docker writes long lines.
    pub(super) is_cut: bool,
}

/// Puts objects together that span several lines.
#[derive(Clone, Debug, Default)]
pub(super) struct Objects {
    pending: String,
    lines: u64,
}

impl Objects {
    /// Reads a line, given without its line end. Returns what it contains, and how many lines were not read.
    pub(super) fn line(&mut self, line: &str, zones: &TimeZones) -> (Vec<Found>, u64) {
        if line.trim().is_empty() {
            return (Vec::new(), 0);
        }
        if let Read::Whole(value) = read(line) {
            // The object before was cut off.
            let skipped = self.reset();
            return found(value, zones).map_or((Vec::new(), skipped + 1), |found| (found, skipped));
        }
        let begins = line.trim_start().starts_with(['{', '[']);
        if self.pending.is_empty() && !begins {
            // The brackets and commas of a list that spans several lines.
            let is_of_list = line
                .trim()
                .chars()
                .all(|c| matches!(c, '[' | ']' | '}' | ','));
            return (Vec::new(), u64::from(!is_of_list));
        }
        if self.pending.len() + line.len() >= MAX_OBJECT_BYTES {
            return (Vec::new(), self.reset() + 1);
        }
        if !self.pending.is_empty() {
            self.pending.push('\n');
        }
        self.pending.push_str(line);
        self.lines += 1;
        // Most lines of such an object do not end it.
        if line.trim_end().ends_with(['}', ']', ','])
            && let Read::Whole(value) = read(&self.pending)
        {
            let lines = self.reset();
            return found(value, zones).map_or((Vec::new(), lines), |found| (found, 0));
        }
        if self.lines == 1 && matches!(read(&self.pending), Read::Wrong) {
            return (Vec::new(), self.reset());
        }
        (Vec::new(), 0)
    }

    /// Forgets an unfinished object; returns how many lines it had.
    pub(super) fn reset(&mut self) -> u64 {
        self.pending.clear();
        std::mem::take(&mut self.lines)
    }
}

/// What an object or list contains; `None` if it has nothing to do with the server's log.
fn found(value: Json, zones: &TimeZones) -> Option<Vec<Found>> {
    let mut found = Vec::new();
    collect(value, &Around::default(), zones, &mut found);
    (!found.is_empty()).then_some(found)
}

/// What the objects around a text say about it.
#[derive(Clone, Default)]
struct Around {
    pid: Option<i32>,
    time: Option<String>,
}

/// The fields of the server's own records and of those of CloudNativePG, Azure and others: in lower case, without
/// underscores, and without the `_s` and `_d` that Azure adds to mark the type.
const FIELDS: [(Field, &str); 11] = [
    (Field::Time, "timestamp|logtime|time|ts"),
    (Field::User, "user|username"),
    (Field::Database, "dbname|databasename|datname|database"),
    (Field::Application, "applicationname"),
    (Field::Pid, "pid|processid"),
    (Field::QueryId, "queryid"),
    (
        Field::Sqlstate,
        "statecode|sqlstatecode|sqlerrcode|sqlerrorcode|sqlstate",
    ),
    (Field::Severity, "errorseverity|errorlevel"),
    (Field::Detail, "detail"),
    (Field::Context, "context"),
    (Field::Statement, "statement|query"),
];

/// The keys of lines within an object.
const TEXTS: [&str; 8] = [
    "log",
    "textpayload",
    "message",
    "msg",
    "line",
    "raw",
    "@message",
    "text",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Time,
    User,
    Database,
    Application,
    Pid,
    QueryId,
    Sqlstate,
    Severity,
    Detail,
    Context,
    Statement,
}

fn field(key: &str) -> Option<Field> {
    let named = |key: &str| {
        let known = |names: &str| names.split('|').any(|name| name == key);
        FIELDS
            .iter()
            .find(|(_, names)| known(names))
            .map(|(field, _)| *field)
    };
    named(&plain(key))
}

fn plain(key: &str) -> String {
    let key = key.to_ascii_lowercase();
    let key = key
        .strip_suffix("_s")
        .or_else(|| key.strip_suffix("_d"))
        .unwrap_or(&key);
    key.replace('_', "")
}

fn collect(value: Json, around: &Around, zones: &TimeZones, out: &mut Vec<Found>) {
    if out.len() >= MAX_FOUND {
        return;
    }
    let members = match value {
        Json::List(list) => {
            for value in list {
                collect(value, around, zones, out);
            }
            return;
        }
        Json::Object(members) => members,
        Json::Text(_) | Json::Other(_) => return,
    };
    let mut entry = Entry {
        // Messages that are not errors have no SQLSTATE (`write_jsonlog` in PostgreSQL's
        // `src/backend/utils/error/jsonlog.c`).
        is_error: Some(false),
        ..Entry::default()
    };
    let (mut is_record, mut is_servers) = (false, false);
    let mut text = None;
    let mut nested = Vec::new();
    for (key, value) in members {
        let (content, is_text) = match value {
            Json::Text(text) => (text, true),
            Json::Other(text) => (text, false),
            nest => {
                nested.push(nest);
                continue;
            }
        };
        is_servers |= key == "error_severity";
        let key_field = field(&key);
        if is_text && key_field.is_none() {
            let plain = plain(&key);
            if TEXTS.contains(&&*plain) && (text.is_none() || plain == "message") {
                text = Some((plain, content));
            }
            continue;
        }
        let known = Some(content).filter(|text| !text.is_empty());
        let Entry { origin, .. } = &mut entry;
        match key_field {
            Some(Field::Time) if is_text => origin.time_text = origin.time_text.take().or(known),
            Some(Field::User) if is_text => origin.user = known,
            Some(Field::Database) if is_text => origin.database = known,
            Some(Field::Application) if is_text => origin.application = known,
            Some(Field::Pid) => origin.pid = known.and_then(|pid| number(&pid)),
            Some(Field::QueryId) => {
                let id = known.and_then(|id| id.parse().ok());
                origin.query_id = id.filter(|id| *id != 0);
            }
            Some(Field::Sqlstate) if is_text => {
                is_record = true;
                entry.sqlstate = known;
            }
            Some(Field::Severity) if is_text => is_record = true,
            Some(Field::Detail) if is_text => entry.detail = known.unwrap_or_default(),
            Some(Field::Context) if is_text => entry.context = known.unwrap_or_default(),
            Some(Field::Statement) if is_text => entry.statement = known.unwrap_or_default(),
            _ => {}
        }
    }
    let Origin {
        pid,
        time,
        time_text,
        ..
    } = &mut entry.origin;
    *time = time_text.as_deref().and_then(|text| zones.time(text));
    let around = Around {
        pid: pid.or(around.pid),
        time: time_text.clone().or_else(|| around.time.clone()),
    };
    let is_cut =
        |key: &str, text: &str| key == "log" && !text.ends_with('\n') && text.len() >= 16_000;
    match text {
        // The server's own records contain a message, never lines. Azure's contain either.
        Some((_, message)) if is_servers || is_record && !has_label(&message) => {
            entry.message = message;
            out.push(Found::Record(Box::new(entry)));
        }
        None if is_record => {
            out.push(Found::Record(Box::new(entry)));
        }
        // A record without SQLSTATE and severity.
        Some((_, message)) if nested.is_empty() && pid_and_time(&entry) && !has_label(&message) => {
            entry.message = message;
            out.push(Found::Record(Box::new(entry)));
        }
        Some((key, text)) => {
            let before = out.len();
            if !is_record && !has_label(&text) {
                for value in nested {
                    collect(value, &around, zones, out);
                }
            }
            // A line without a label continues the one before.
            if out.len() == before {
                out.push(Found::Text(Lines {
                    is_cut: is_cut(&key, &text),
                    text,
                    pid: around.pid,
                    time: around.time,
                }));
            }
        }
        None => {
            for value in nested {
                collect(value, &around, zones, out);
            }
        }
    }
}

fn pid_and_time(entry: &Entry) -> bool {
    entry.origin.pid.is_some() && entry.origin.time_text.is_some()
}

/// Whether the text begins with a prefix and a label.
fn has_label(text: &str) -> bool {
    let line = text.split('\n').next().unwrap_or_default();
    super::labels::first_label(line, super::prefix::MAX_PREFIX_BYTES).is_some()
}

/// A number, also one that a program has made a fraction of: `405.0`.
fn number(text: &str) -> Option<i32> {
    text.split('.').next()?.parse().ok()
}

#[derive(Debug)]
enum Json {
    Text(String),
    /// A number, `true`, `false` or `null`, as it is written.
    Other(String),
    Object(Vec<(String, Json)>),
    List(Vec<Json>),
}

enum Read {
    Whole(Json),
    /// The text ends within an object.
    Part,
    Wrong,
}

/// Reads an object or a list. A comma can follow, or the end of the list that it is in.
fn read(text: &str) -> Read {
    let mut reader = JsonReader {
        chars: text.chars(),
    };
    // The beginning of the list that it is in.
    if reader.clone().value(0).is_none() {
        let inner = text.trim_start().strip_prefix(['[', ',']).unwrap_or(text);
        reader.chars = inner.chars();
    }
    let value = reader.value(0);
    reader.blanks();
    let rest = reader.chars.as_str();
    match value {
        Some(value @ (Json::Object(_) | Json::List(_))) => {
            let is_end = rest.is_empty() || rest == "," || rest.trim_end() == "]";
            if is_end {
                Read::Whole(value)
            } else {
                Read::Wrong
            }
        }
        Some(_) => Read::Wrong,
        None if rest.is_empty() => Read::Part,
        None => Read::Wrong,
    }
}

#[derive(Clone)]
struct JsonReader<'a> {
    chars: Chars<'a>,
}

impl JsonReader<'_> {
    fn members(&mut self, depth: usize) -> Option<Json> {
        let mut members = Vec::new();
        self.expect('{')?;
        if self.next_if('}') {
            return Some(Json::Object(members));
        }
        loop {
            self.expect('"')?;
            let key = self.string()?;
            self.expect(':')?;
            members.push((key, self.value(depth + 1)?));
            if self.next_if('}') {
                return Some(Json::Object(members));
            }
            self.expect(',')?;
        }
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.blanks();
        match self.chars.clone().next()? {
            '"' => {
                self.chars.next();
                self.string().map(Json::Text)
            }
            '{' => self.members(depth),
            '[' => {
                self.chars.next();
                let mut list = Vec::new();
                if self.next_if(']') {
                    return Some(Json::List(list));
                }
                loop {
                    list.push(self.value(depth + 1)?);
                    if self.next_if(']') {
                        return Some(Json::List(list));
                    }
                    self.expect(',')?;
                }
            }
            _ => {
                let rest = self.chars.as_str();
                let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
                let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                self.chars = rest[end..].chars();
                (end > 0).then(|| Json::Other(rest[..end].to_owned()))
            }
        }
    }

    /// Reads a string whose opening quote has been read.
    fn string(&mut self) -> Option<String> {
        let mut text = String::new();
        loop {
            match self.chars.next()? {
                '"' => return Some(text),
                '\\' => text.push(self.escape()?),
                // A string does not span lines.
                '\n' => return None,
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        Some(match self.chars.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => {
                let first = self.hex()?;
                if !(0xd800..0xdc00).contains(&first) {
                    return Some(char::from_u32(first).unwrap_or('\u{fffd}'));
                }
                // The first half of a surrogate pair.
                let before = self.chars.clone();
                let second = match (self.chars.next(), self.chars.next()) {
                    (Some('\\'), Some('u')) => self.hex()?,
                    _ => 0,
                };
                if (0xdc00..0xe000).contains(&second) {
                    let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                    char::from_u32(code)?
                } else {
                    self.chars = before;
                    '\u{fffd}'
                }
            }
            c @ ('"' | '\\' | '/') => c,
            _ => return None,
        })
    }

    fn hex(&mut self) -> Option<u32> {
        let mut code = 0;
        for _ in 0..4 {
            code = code * 16 + self.chars.next()?.to_digit(16)?;
        }
        Some(code)
    }

    fn blanks(&mut self) {
        let rest = self.chars.as_str();
        self.chars = rest.trim_start_matches([' ', '\t', '\r', '\n']).chars();
    }

    fn next_if(&mut self, expected: char) -> bool {
        self.blanks();
        let found = self.chars.clone().next() == Some(expected);
        if found {
            self.chars.next();
        }
        found
    }

    fn expect(&mut self, expected: char) -> Option<()> {
        self.next_if(expected).then_some(())
    }
}
