//! The format `stderr`: a prefix, a label and a text. Continuation lines begin with a tab.

use super::entry::Entry;
use super::labels::{self, Label};
use super::prefix::{Head, Prefix, guess};
use super::time_zones::TimeZones;

/// How many bytes of a message are kept: the server writes none that long, but other programs may.
const MAX_MESSAGE_BYTES: usize = 4 << 20;

#[derive(Clone, Debug, Default)]
pub(super) struct Stderr {
    /// `None` if the prefix is unknown.
    prefix: Option<Prefix>,
    open: Option<Entry>,
    /// The part of the open message that continuation lines belong to.
    part: Part,
    length: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Nothing,
    Message,
    Detail,
    Context,
    Statement,
}

impl Stderr {
    pub(super) fn of_prefix(prefix: Prefix) -> Self {
        Self {
            prefix: Some(prefix),
            ..Self::default()
        }
    }

    /// Reads a line, given without its line end. Returns the previous message if the line begins another one.
    pub(super) fn line(&mut self, line: &str, zones: &TimeZones) -> Option<Entry> {
        if let Some(more) = line.strip_prefix('\t') {
            self.add(more, true);
            return None;
        }
        let head = match &self.prefix {
            Some(prefix) => prefix.head(line, zones),
            None => guess(line, zones),
        };
        let Some(head) = head else {
            self.part = Part::Nothing;
            return None;
        };
        let part = match head.label {
            Some(Label::Detail) => Part::Detail,
            Some(Label::Context) => Part::Context,
            Some(Label::Statement) => Part::Statement,
            Some(Label::More) => Part::Nothing,
            _ => return self.begin(head),
        };
        // A line of another backend is not part of this message.
        let is_same = self
            .open
            .as_ref()
            .is_some_and(|open| open.origin.pid == head.origin.pid);
        self.part = if is_same { part } else { Part::Nothing };
        self.add(head.rest, false);
        None
    }

    pub(super) fn finish(&mut self) -> Option<Entry> {
        self.part = Part::Nothing;
        self.open.take().map(without_position)
    }

    fn begin(&mut self, head: Head<'_>) -> Option<Entry> {
        let is_error = match head.label {
            Some(Label::Error) => Some(true),
            Some(Label::Log) => Some(false),
            _ => None,
        };
        let (code, message) = split_sqlstate(head.rest);
        let entry = Entry {
            // A message that is neither a LOG nor an ERROR is not about locks.
            sqlstate: head.sqlstate.or(code).filter(|_| is_error.is_some()),
            is_error,
            pid_is_guessed: head.pid_is_guessed,
            origin: head.origin,
            ..Entry::default()
        };
        self.part = Part::Message;
        self.length = 0;
        let before = self.open.replace(entry);
        self.add(message, false);
        before.map(without_position)
    }

    fn add(&mut self, text: &str, on_a_new_line: bool) {
        let Some(open) = &mut self.open else { return };
        let part = match self.part {
            Part::Nothing => return,
            Part::Message => &mut open.message,
            Part::Detail => &mut open.detail,
            Part::Context => &mut open.context,
            Part::Statement => &mut open.statement,
        };
        self.length = self.length.saturating_add(text.len() + 1);
        if self.length <= MAX_MESSAGE_BYTES {
            if on_a_new_line {
                part.push('\n');
            }
            part.push_str(text);
        }
    }
}

/// Removes the position in the statement, which this format appends to the message.
fn without_position(mut entry: Entry) -> Entry {
    let length = labels::without_position(&entry.message).len();
    entry.message.truncate(length);
    entry
}

/// Splits off the SQLSTATE that `log_error_verbosity = verbose` puts before the message.
fn split_sqlstate(message: &str) -> (Option<String>, &str) {
    match message.split_once(": ") {
        Some((code, rest))
            if code.len() == 5
                && code
                    .bytes()
                    .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
                && code.bytes().any(|byte| byte.is_ascii_digit()) =>
        {
            (Some(code.to_owned()), rest)
        }
        _ => (None, message),
    }
}
