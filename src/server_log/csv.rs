//! The format `csvlog`: a record for each message, texts in quotes over as many lines as they have.

use super::entry::{Entry, Origin};
use super::zones::Zones;

/// Bytes of a record that are kept, against one whose quote never ends.
const LONGEST: usize = 4 << 20;
/// 23 columns up to `application_name`, three more since 14 (PostgreSQL's documentation, "Using CSV-Format Log Output").
const LEAST_COLUMNS: usize = 23;

#[derive(Clone, Debug, Default)]
pub(super) struct Csv {
    fields: Vec<String>,
    field: String,
    state: State,
    length: usize,
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
        // Behind a gap in the text there may be the end of a record, with a quote in it that begins nothing.
        if self.length == 0 && !begins_record(line) {
            return None;
        }
        for c in line.chars() {
            self.char(c);
        }
        self.length = self.length.saturating_add(line.len() + 1);
        if self.state == State::Quoted {
            self.field.push('\n');
            if self.length > LONGEST {
                self.reset();
            }
            return None;
        }
        let last = std::mem::take(&mut self.field);
        self.fields.push(last);
        let fields = std::mem::take(&mut self.fields);
        self.reset();
        entry(fields, zones)
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn char(&mut self, c: char) {
        self.state = match (self.state, c) {
            (State::Start, '"') => State::Quoted,
            (State::Quoted, '"') => State::Quote,
            (State::Quote, '"') => {
                self.field.push('"');
                State::Quoted
            }
            (State::Start | State::Plain | State::Quote, ',') => {
                self.fields.push(std::mem::take(&mut self.field));
                State::Start
            }
            (State::Quoted, c) => {
                self.field.push(c);
                State::Quoted
            }
            (_, c) => {
                self.field.push(c);
                State::Plain
            }
        };
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
    if fields.len() < LEAST_COLUMNS {
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
