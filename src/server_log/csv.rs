//! The format `csvlog`: one record per message. Quoted fields can span several lines.

use super::entry::{Entry, Origin};
use super::time_zones::TimeZones;

/// How many bytes of a record are kept.
const MAX_RECORD_BYTES: usize = 4 << 20;
/// How many bytes of each field are always kept: the fields after a long statement tell which session ran it.
const MIN_FIELD_BYTES: usize = 1024;
/// The number of columns: 23 up to `application_name`, three more since 14 (PostgreSQL's documentation, "Using
/// CSV-Format Log Output"), and a reserve for later versions. A record whose end is missing is joined with the next one
/// and has more.
const COLUMNS: std::ops::RangeInclusive<usize> = 23..=32;

#[derive(Clone, Debug, Default)]
pub(super) struct Csv {
    fields: Vec<String>,
    field: String,
    state: State,
    /// How many bytes of its fields are kept so far.
    kept: usize,
    /// How many lines the record has so far.
    lines: u64,
    /// Whether a record has begun.
    open: bool,
    /// Whether the current line belongs to no record.
    skips_line: bool,
    /// Whether a carriage return is pending: it belongs to the text or to the end of the line.
    pending_return: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    Plain,
    Quoted,
    /// After a quote that ends the field or is the first of two.
    Quote,
}

impl Csv {
    /// Reads a line, given without its line end. Returns the record if the line ends it, and how many lines belong to no
    /// record.
    pub(super) fn line(&mut self, line: &str, zones: &TimeZones) -> (Option<Entry>, u64) {
        self.part(line);
        if std::mem::take(&mut self.skips_line) {
            return (None, u64::from(!line.trim().is_empty()));
        }
        self.lines += 1;
        let pending_return = std::mem::take(&mut self.pending_return);
        if self.state == State::Quoted {
            if pending_return {
                self.keep('\r');
            }
            self.keep('\n');
            return (None, 0);
        }
        self.end_field();
        let fields = std::mem::take(&mut self.fields);
        let lines = self.reset();
        let entry = entry(fields, zones);
        let skipped = if entry.is_none() { lines } else { 0 };
        (entry, skipped)
    }

    /// Reads part of a line that is too long to keep. It cannot be skipped, because a quoted field may end in it.
    pub(super) fn part(&mut self, part: &str) {
        // After a gap in the text, the end of a record may follow. A quote in it does not begin a field.
        if !self.open && !self.skips_line {
            self.open = begins_record(part);
            self.skips_line = !self.open;
        }
        if self.skips_line {
            return;
        }
        for c in part.chars() {
            if std::mem::take(&mut self.pending_return) {
                self.char('\r');
            }
            match c {
                '\r' => self.pending_return = true,
                c => self.char(c),
            }
        }
    }

    /// Forgets an unfinished record; returns how many lines it had.
    pub(super) fn reset(&mut self) -> u64 {
        std::mem::take(self).lines
    }

    fn char(&mut self, c: char) {
        self.state = match (self.state, c) {
            (State::Start, '"') => State::Quoted,
            (State::Quoted, '"') => State::Quote,
            (State::Quote, '"') => {
                self.keep('"');
                State::Quoted
            }
            (State::Start | State::Plain | State::Quote, ',') => {
                self.end_field();
                State::Start
            }
            (State::Quoted, c) => {
                self.keep(c);
                State::Quoted
            }
            (_, c) => {
                self.keep(c);
                State::Plain
            }
        };
    }

    fn keep(&mut self, c: char) {
        if self.kept < MAX_RECORD_BYTES || self.field.len() < MIN_FIELD_BYTES {
            self.kept += c.len_utf8();
            self.field.push(c);
        }
    }

    fn end_field(&mut self) {
        let field = std::mem::take(&mut self.field);
        // One more than allowed is kept, so that the record is known to have too many.
        if self.fields.len() <= *COLUMNS.end() {
            self.fields.push(field);
        }
    }
}

/// `2026-01-31 12:34:56.789 UTC,`, with or without quotes.
fn begins_record(line: &str) -> bool {
    let line = line.strip_prefix('"').unwrap_or(line);
    let shape = "dddd-dd-dd dd:dd:dd.ddd ";
    line.len() > shape.len()
        && line
            .bytes()
            .zip(shape.bytes())
            .all(|(byte, shape)| match shape {
                b'd' => byte.is_ascii_digit(),
                other => byte == other,
            })
}

fn entry(mut fields: Vec<String>, zones: &TimeZones) -> Option<Entry> {
    if !COLUMNS.contains(&fields.len()) {
        return None;
    }
    let mut take = |at: usize| std::mem::take(&mut fields[at]);
    let known = |text: String| Some(text).filter(|text| !text.is_empty());
    let time = take(0);
    let mut entry = Entry {
        origin: Origin {
            time: zones.time(&time),
            time_text: known(time),
            user: known(take(1)),
            database: known(take(2)),
            pid: take(3).parse().ok(),
            application: known(take(22)),
            query_id: None,
        },
        is_error: None,
        pid_is_guessed: false,
        sqlstate: known(take(12)),
        message: take(13),
        detail: take(14),
        context: take(18),
        statement: take(19),
    };
    let id = fields.get(25).and_then(|id| id.parse().ok());
    entry.origin.query_id = id.filter(|id| *id != 0);
    Some(entry)
}
