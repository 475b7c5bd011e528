//! The format `stderr`: a prefix, a label and a text. Continuation lines begin with a tab.

use crate::postgres::message::deadlock_detail;

use super::entry::Entry;
use super::guess::guess;
use super::labels::{self, Label};
use super::prefix::{Head, Prefix};
use super::time_zones::TimeZones;
use super::transport::{Carried, received};

/// How many bytes of all open messages are kept: the server writes none that long, but other programs may.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// How many messages are open at a time.
const MAX_OPEN: usize = 64;
/// After how many more lines the rest of a message is no longer expected.
const MAX_LINES_BETWEEN: u64 = 1000;
/// How many streams of lines are told apart.
const MAX_SOURCES: usize = 64;
/// A tab in a text that was pasted is up to eight blanks.
const TAB: usize = 8;

#[derive(Clone, Debug, Default)]
pub(super) struct Stderr {
    /// `None` if the prefix is unknown.
    prefix: Option<Prefix>,
    /// The messages whose end has not been read, oldest first. Lines of other sessions and programs can stand between
    /// the lines of a message.
    open: Vec<Open>,
    sources: Vec<Source>,
    lines: u64,
    begun: u64,
    complete: Vec<Entry>,
}

/// A message whose end has not been read.
#[derive(Clone, Debug)]
struct Open {
    number: u64,
    source: String,
    entry: Entry,
    /// The line that was last added.
    line: u64,
    /// Whether the part has been read that is the last one of a message.
    has_statement: bool,
}

/// One of the streams that share the log, each with lines in their order.
#[derive(Clone, Debug, Default)]
struct Source {
    name: String,
    /// What the next continuation line continues.
    continues: Continues,
    /// The beginning of a line that the carrier has cut.
    cut: String,
    line: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Continues {
    /// A line that was not read.
    #[default]
    Unread,
    /// A part that is not used.
    Unused,
    /// A part of an open message, by its number.
    Open(u64, Part),
    /// The same, but a line that was not read came after it.
    Interrupted(u64, Part),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
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

    pub(super) fn limits(&self) -> &[String] {
        self.prefix.as_ref().map_or(&[], Prefix::limits)
    }

    /// Whether the line begins with the prefix and a label, without a carrier.
    pub(super) fn is_plain(&self, line: &str, zones: &TimeZones) -> bool {
        match &self.prefix {
            Some(prefix) => prefix.head(line, zones).is_some(),
            None => false,
        }
    }

    /// Reads a line, given without its line end and without its carrier. Returns whether it was read.
    pub(super) fn line(&mut self, carried: &Carried<'_>, zones: &TimeZones) -> bool {
        let source = self.source(carried.source);
        let cut = std::mem::take(&mut self.sources[source].cut);
        let text = if cut.is_empty() {
            carried.text.as_ref().into()
        } else {
            std::borrow::Cow::Owned(cut + &carried.text)
        };
        if carried.is_cut && text.len() <= MAX_MESSAGE_BYTES {
            self.sources[source].cut = text.into_owned();
            return true;
        }
        let mut all_read = true;
        for (at, line) in text.split('\n').enumerate() {
            let numbered = carried.numbered.as_deref().filter(|_| at == 0);
            all_read &= self.one(line, numbered, source, carried, zones);
        }
        all_read
    }

    /// Takes the messages that are known to have ended.
    pub(super) fn take_complete(&mut self) -> Vec<Entry> {
        std::mem::take(&mut self.complete)
    }

    pub(super) fn finish(&mut self) {
        for source in &mut self.sources {
            source.continues = Continues::Unread;
        }
        let open = std::mem::take(&mut self.open);
        self.complete
            .extend(open.into_iter().map(|open| without_position(open.entry)));
    }

    fn one(
        &mut self,
        line: &str,
        numbered: Option<&str>,
        source: usize,
        carried: &Carried<'_>,
        zones: &TimeZones,
    ) -> bool {
        self.lines += 1;
        self.sources[source].line = self.lines;
        if let Some(more) = line.strip_prefix('\t') {
            return self.continued(source, more, true);
        }
        let head = match &self.prefix {
            Some(prefix) => prefix
                .head(line, zones)
                .or_else(|| prefix.head(numbered?, zones)),
            // With blanks in place of a tab, it is the text of a statement rather than a label.
            None if line.starts_with("  ") => None,
            None => guess(line, zones),
        };
        let Some(mut head) = head else {
            return self.without_head(source, line, carried.is_rest_of_line);
        };
        if let Some(pid) = carried.pid
            && (head.origin.pid.is_none() || head.pid_is_guessed && !carried.pid_is_guessed)
        {
            head.origin.pid = Some(pid);
            head.pid_is_guessed = carried.pid_is_guessed;
        }
        if head.origin.time_text.is_none()
            && let Some(time) = carried.time
        {
            head.origin.time = received(time, zones);
            head.origin.time_text = Some(time.to_owned());
        }
        self.end_messages(source);
        let part = match head.label {
            Some(Label::Detail) => Some(Part::Detail),
            Some(Label::Context) => Some(Part::Context),
            Some(Label::Statement) => Some(Part::Statement),
            Some(Label::More) => None,
            _ => {
                self.begin(source, head);
                return true;
            }
        };
        let Some(open) = self.opened(source, &head) else {
            self.sources[source].continues = Continues::Unread;
            return false;
        };
        open.has_statement |= part == Some(Part::Statement);
        let number = open.number;
        self.sources[source].continues =
            part.map_or(Continues::Unused, |part| Continues::Open(number, part));
        if part.is_some() {
            self.continued(source, head.rest, false);
        }
        true
    }

    /// The open message of the session that wrote the line.
    fn opened(&mut self, source: usize, head: &Head<'_>) -> Option<&mut Open> {
        let name = &self.sources[source].name;
        let pid = head.origin.pid;
        let mut newest = self
            .open
            .iter_mut()
            .rev()
            .filter(|open| open.source == *name);
        if head.pid_is_guessed {
            // The number may be the line's, which is one more in each line.
            return newest.next().filter(|open| {
                let before = open.entry.origin.pid;
                let is_next =
                    |(before, pid): (i32, i32)| (before..=before.saturating_add(8)).contains(&pid);
                open.entry.pid_is_guessed && before.zip(pid).is_none_or(is_next)
            });
        }
        newest.find(|open| open.entry.origin.pid == pid)
    }

    /// Reads a line without a prefix and a label.
    fn without_head(&mut self, source: usize, line: &str, is_rest_of_line: bool) -> bool {
        let text = line.trim_start_matches(' ');
        let blanks = line.len() - text.len();
        if text.is_empty() {
            return true;
        }
        if is_rest_of_line && self.sources[source].continues != Continues::Unread {
            return self.continued(source, line, false);
        }
        if blanks > 0 && self.continued(source, &line[blanks.min(TAB)..], true) {
            return true;
        }
        // The lines of a deadlock have a form of their own.
        if let Continues::Open(number, Part::Detail) | Continues::Interrupted(number, Part::Detail) =
            self.sources[source].continues
            && self.is_deadlock_line(number, text)
        {
            self.sources[source].continues = Continues::Open(number, Part::Detail);
            return self.continued(source, text, true);
        }
        let continues = &mut self.sources[source].continues;
        *continues = match *continues {
            Continues::Open(number, part) => Continues::Interrupted(number, part),
            Continues::Unused => Continues::Unread,
            other => other,
        };
        false
    }

    /// Ends the messages of which no more is expected.
    fn end_messages(&mut self, source: usize) {
        let name = &self.sources[source].name;
        let mut kept = Vec::new();
        for open in std::mem::take(&mut self.open) {
            let is_old = self.lines - open.line > MAX_LINES_BETWEEN;
            if open.has_statement && open.source == *name || is_old {
                self.complete.push(without_position(open.entry));
            } else {
                kept.push(open);
            }
        }
        self.open = kept;
    }

    fn begin(&mut self, source: usize, head: Head<'_>) {
        let is_error = match head.label {
            Some(Label::Error) => Some(true),
            Some(Label::Log) => Some(false),
            _ => None,
        };
        let (code, message) = split_sqlstate(head.rest);
        let name = self.sources[source].name.clone();
        let same = |open: &Open| {
            open.source == name && (open.entry.origin.pid == head.origin.pid || head.pid_is_guessed)
        };
        let (ended, open): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.open).into_iter().partition(same);
        self.open = open;
        let length: usize = self.open.iter().map(|open| open.entry.length()).sum();
        let too_many = if length > MAX_MESSAGE_BYTES / 2 {
            self.open.len()
        } else {
            (self.open.len() + 1).saturating_sub(MAX_OPEN)
        };
        let ended = ended.into_iter().chain(self.open.drain(..too_many));
        self.complete
            .extend(ended.map(|open| without_position(open.entry)));
        self.begun += 1;
        self.open.push(Open {
            number: self.begun,
            source: name,
            line: self.lines,
            has_statement: false,
            entry: Entry {
                // A message that is neither a LOG nor an ERROR is not about locks.
                sqlstate: head.sqlstate.or(code).filter(|_| is_error.is_some()),
                is_error,
                pid_is_guessed: head.pid_is_guessed,
                origin: head.origin,
                ..Entry::default()
            },
        });
        self.sources[source].continues = Continues::Open(self.begun, Part::Message);
        self.continued(source, message, false);
    }

    /// Adds to what the source's last line continues; returns whether there is such a thing.
    fn continued(&mut self, source: usize, text: &str, on_a_new_line: bool) -> bool {
        let (number, part) = match self.sources[source].continues {
            Continues::Open(number, part) => (number, part),
            Continues::Interrupted(number, Part::Detail) if self.is_deadlock_line(number, text) => {
                self.sources[source].continues = Continues::Open(number, Part::Detail);
                (number, Part::Detail)
            }
            Continues::Unused => return true,
            Continues::Unread | Continues::Interrupted(..) => return false,
        };
        let length: usize = self.open.iter().map(|open| open.entry.length()).sum();
        let Some(open) = self.open.iter_mut().find(|open| open.number == number) else {
            return false;
        };
        open.line = self.lines;
        let part = match part {
            Part::Message => &mut open.entry.message,
            Part::Detail => &mut open.entry.detail,
            Part::Context => &mut open.entry.context,
            Part::Statement => &mut open.entry.statement,
        };
        if length + text.len() < MAX_MESSAGE_BYTES {
            if on_a_new_line {
                part.push('\n');
            }
            part.push_str(text);
        }
        true
    }

    fn is_deadlock_line(&self, number: u64, line: &str) -> bool {
        let open = self.open.iter().find(|open| open.number == number);
        open.is_some_and(|open| is_deadlock_line(line, &open.entry.detail))
    }

    fn source(&mut self, name: &str) -> usize {
        if let Some(at) = self.sources.iter().position(|source| source.name == name) {
            return at;
        }
        if self.sources.len() >= MAX_SOURCES {
            let oldest = (0..self.sources.len()).min_by_key(|at| self.sources[*at].line);
            self.sources.swap_remove(oldest.unwrap_or_default());
        }
        self.sources.push(Source {
            name: name.to_owned(),
            ..Source::default()
        });
        self.sources.len() - 1
    }
}

/// `Process 1 waits for …; blocked by process 2.` or `Process 1: SELECT …`, in any language, after a DETAIL with such
/// lines.
fn is_deadlock_line(line: &str, detail: &str) -> bool {
    if line.len() < 1000 && deadlock_detail(line).waits().next().is_some() {
        return true;
    }
    let head = line.split_once(':').map_or("", |(head, _)| head);
    let words = head.trim_end_matches(|c: char| c.is_ascii_digit());
    let pid = &head[words.len()..];
    !pid.is_empty()
        && head.len() < 40
        && detail
            .split(|c: char| !c.is_ascii_digit())
            .any(|n| n == pid)
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
