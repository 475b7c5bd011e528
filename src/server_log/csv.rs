//! The format `csvlog`: a record for each message, texts in quotes over as many lines as they have.

use super::entry::{Entry, Origin};
use super::zones::Zones;

/// Bytes of a record that are kept.
const LONGEST: usize = 4 << 20;
/// Bytes of each field that are kept in any case: behind a long statement stands who ran it.
const SHORT: usize = 1024;
/// 23 columns up to `application_name`, three more since 14 (PostgreSQL's documentation, "Using CSV-Format Log Output"),
/// and room for some to come. Where the end of a record is missing, the next one is a part of it, and there are more.
const COLUMNS: std::ops::RangeInclusive<usize> = 23..=32;

#[derive(Clone, Debug, Default)]
pub(super) struct Csv {
    fields: Vec<String>,
    field: String,
    state: State,
    /// Bytes of its texts that are kept.
    kept: usize,
    /// Part of a record has been read.
    open: bool,
    /// This line is no part of a record.
    skips: bool,
    /// A carriage return, which is the text's or of the end of a line.
    held_back: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    Plain,
    Quoted,
    /// Behind a quote that may be the end, or the first of two.
    Quote,
}

impl Csv {
    /// A line without its end; the record, if it ends here.
    pub(super) fn line(&mut self, line: &str, zones: &Zones) -> Option<Entry> {
        self.part(line);
        if std::mem::take(&mut self.skips) {
            return None;
        }
        let held_back = std::mem::take(&mut self.held_back);
        if self.state == State::Quoted {
            if held_back {
                self.keep('\r');
            }
            self.keep('\n');
            return None;
        }
        self.end_field();
        let fields = std::mem::take(&mut self.fields);
        self.reset();
        entry(fields, zones)
    }

    /// Part of a line that is too long to be kept: a text in it may end, so that it cannot be passed over.
    pub(super) fn part(&mut self, part: &str) {
        // Behind a gap in the text there may be the end of a record, with a quote in it that begins nothing.
        if !self.open && !self.skips {
            self.open = begins_record(part);
            self.skips = !self.open;
        }
        if self.skips {
            return;
        }
        for c in part.chars() {
            if std::mem::take(&mut self.held_back) {
                self.char('\r');
            }
            match c {
                '\r' => self.held_back = true,
                c => self.char(c),
            }
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
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
        if self.kept < LONGEST || self.field.len() < SHORT {
            self.kept += c.len_utf8();
            self.field.push(c);
        }
    }

    fn end_field(&mut self) {
        let field = std::mem::take(&mut self.field);
        // One too many, which is known as such.
        if self.fields.len() <= *COLUMNS.end() {
            self.fields.push(field);
        }
    }
}

/// `2026-01-31 12:34:56.789 UTC,`
fn begins_record(line: &str) -> bool {
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

fn entry(mut fields: Vec<String>, zones: &Zones) -> Option<Entry> {
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
