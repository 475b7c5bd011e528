//! Reads what PostgreSQL's own log contains about locks: long waits, deadlocks with their statements, lock timeouts.
//!
//! The log contains what sampling the server cannot see: every deadlock with the statements of all its sessions, and,
//! with `log_lock_waits = on`, every wait longer than `deadlock_timeout` with the lock's holders and other waiters. A
//! [`Reader`] takes the text of a log file piece by piece and returns a [`LogEvent`] for each message about locks. It
//! reads the formats `stderr`, `csvlog` and `jsonlog` (15 and later) of PostgreSQL 14 to 18. It does no I/O: finding
//! and following the file is up to the caller.
//!
//! Messages are in the server's language (`lc_messages`). They are recognized by their SQLSTATE if the format contains
//! it (`csvlog`, `jsonlog`, and `stderr` with `%e` in `log_line_prefix`). Otherwise they are recognized by their form
//! and a few words, in all languages that PostgreSQL has translations for; [`Reader::limits`] says so.
//!
//! What carries a log is removed from its lines: syslog, Heroku, docker compose, docker's JSON, Kubernetes, the JSON of
//! CloudNativePG, Cloud SQL and Azure. A message is put together even if lines of other sessions and programs stand
//! between its lines.
//!
//! Lines that come from another program, are damaged or cut off are skipped and [counted](Reader::lines_skipped), so that
//! a log that could not be read is not mistaken for one without problems. No input causes a panic, and memory is bounded:
//! a message longer than four megabytes is truncated, and skipped in `jsonlog`.
//!
//! # Trust
//!
//! In `csvlog` and `jsonlog` the text of a client cannot begin a message (in `csvlog` it can if reading starts within a
//! message). In `stderr` it can: a client that may choose an `application_name` that is in the prefix, or raise errors,
//! can write lines that look like the server's.
//!
//! In every format a client can write the text of a message: PL/pgSQL's `RAISE` logs any text, with any DETAIL and
//! SQLSTATE. In `csvlog` and `jsonlog` such a message can only report waits and failures of the client's own process,
//! but it can name any process as a blocker, as a waiter in the queue, or as part of a deadlock with it.
//!
//! # Examples
//!
//! ```
//! use lockkeeper::server_log::{LogEventKind, Reader};
//!
//! // As in postgresql.conf: log_line_prefix = '%m [%p] %q%u@%d %a '
//! let mut reader = Reader::stderr("%m [%p] %q%u@%d %a ");
//! let log = "\
//! 2026-01-31 12:34:56.789 UTC [12] app@shop billing src/pay.rs:42 LOG:  process 12 still waiting for ShareLock on transaction 733 after 1000.123 ms
//! 2026-01-31 12:34:56.789 UTC [12] app@shop billing src/pay.rs:42 DETAIL:  Process holding the lock: 11. Wait queue: 12.
//! 2026-01-31 12:34:56.789 UTC [12] app@shop billing src/pay.rs:42 STATEMENT:  UPDATE account SET balance = 7
//! ";
//! let mut events: Vec<_> = reader.push(log).collect();
//! events.extend(reader.finish());
//! let event = &events[0];
//! assert_eq!(event.kind(), LogEventKind::StillWaiting);
//! assert_eq!((event.pid(), event.holders(), event.queue()), (Some(12), &[11][..], &[12][..]));
//! assert_eq!(event.call_site(), Some("src/pay.rs:42"));
//! assert_eq!(
//!     event.to_string(),
//!     "pid 12 (billing src/pay.rs:42) still waits after 1.0s for ShareLock on transaction 733, held by pid 11: \
//!      UPDATE account SET balance = ?"
//! );
//! ```

mod csv;
mod entry;
mod event;
mod guess;
mod json;
mod labels;
mod prefix;
mod stderr;
mod time_zones;
mod transport;

use std::fmt;

pub use event::{LogEvent, LogEventKind, LogRow, LogWait};

use csv::Csv;
use json::{Found, Objects};
use prefix::Prefix;
use stderr::Stderr;
use time_zones::TimeZones;
use transport::Carried;

/// How many bytes of a line are kept.
const MAX_LINE_BYTES: usize = 4 << 20;

/// Reads the text of a log, piece by piece.
///
/// A reader is cheap to create. Use one for each log file, because a message can span several lines. After a gap in the
/// text, the reader resynchronizes at the next message.
#[derive(Clone)]
pub struct Reader {
    format: Format,
    zones: TimeZones,
    /// The beginning of a line whose end has not been read yet.
    line: String,
    /// Whether the rest of that line is dropped.
    too_long: bool,
    has_begun: bool,
    lines_read: u64,
    lines_skipped: u64,
}

#[derive(Clone)]
enum Format {
    Text(Box<Text>),
    Csv(Csv),
}

/// Lines of text or JSON, in what carries them.
#[derive(Clone, Default)]
struct Text {
    stderr: Stderr,
    objects: Objects,
    /// Whether only JSON is read.
    is_json: bool,
}

impl Reader {
    /// For `log_destination = stderr`, with the server's `log_line_prefix` as it is in `postgresql.conf` or as `SHOW
    /// log_line_prefix` shows it: `"%m [%p] "` by default.
    ///
    /// Time, process id, user, database, `application_name`, SQLSTATE and query identifier are read from the prefix if
    /// it contains them (`%t`, `%m`, `%n`, `%p`, `%u`, `%d`, `%a`, `%e`, `%Q`). Lines that do not begin with the prefix
    /// are skipped and [counted](Self::lines_skipped). What cannot be told apart in lines with this prefix is in
    /// [`limits`](Self::limits), before any line is read.
    #[must_use]
    pub fn stderr(log_line_prefix: &str) -> Self {
        Self::new(Format::Text(Box::new(Text {
            stderr: Stderr::of_prefix(Prefix::new(log_line_prefix)),
            ..Text::default()
        })))
    }

    /// For `log_destination = stderr` with an unknown prefix. Times, process ids, `user@database` and `user=…` are
    /// recognized by their form; other fields are not available.
    #[must_use]
    pub fn stderr_of_any_prefix() -> Self {
        Self::new(Format::Text(Box::default()))
    }

    /// For `log_destination = csvlog`.
    #[must_use]
    pub fn csv() -> Self {
        Self::new(Format::Csv(Csv::default()))
    }

    /// For `log_destination = jsonlog`, and for JSON that other programs make of the log: records with their own names
    /// for the fields, as of CloudNativePG and Azure, and lines of text in an object, as of docker and Cloud SQL. Lines of
    /// text are read as by [`stderr_of_any_prefix`](Self::stderr_of_any_prefix).
    #[must_use]
    pub fn json() -> Self {
        Self::new(Format::Text(Box::new(Text {
            is_json: true,
            ..Text::default()
        })))
    }

    /// Defines a time zone abbreviation of this log, in seconds ahead of UTC. The server writes times in
    /// `log_timezone`, and abbreviations are ambiguous. `UTC`, `GMT` and numbers such as `+03` need no definition.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::server_log::Reader;
    ///
    /// let reader = Reader::csv().zone("CET", 3600).zone("CEST", 7200);
    /// ```
    #[must_use = "returns a reader that knows the zone"]
    pub fn zone(mut self, abbreviation: impl Into<String>, seconds_ahead_of_utc: i32) -> Self {
        self.zones.add(abbreviation.into(), seconds_ahead_of_utc);
        self
    }

    /// What this reader cannot tell apart, in a sentence each: fields of the prefix that nothing separates, sessions
    /// without a process id, errors without a SQLSTATE. It is known before any line is read. Empty for `csvlog` and
    /// `jsonlog`.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::server_log::Reader;
    ///
    /// assert!(Reader::stderr("%m [%p] %e ").limits().is_empty());
    /// let limits = Reader::stderr("%m %u%d %e ").limits();
    /// assert_eq!(
    ///     limits[0],
    ///     "nothing separates %u from %d in this prefix, so neither value is read"
    /// );
    /// ```
    #[must_use]
    pub fn limits(&self) -> Vec<String> {
        match &self.format {
            Format::Text(text) if !text.is_json => text.stderr.limits().to_vec(),
            Format::Text(_) | Format::Csv(_) => Vec::new(),
        }
    }

    /// How many lines were read as the server's, whether they are about locks or not.
    #[must_use]
    pub fn lines_read(&self) -> u64 {
        self.lines_read
    }

    /// How many lines were not read: lines of other programs, lines without the prefix, and lines that are damaged, cut
    /// off or too long. Empty lines are not counted. If most lines are skipped, the log has another format or prefix, and
    /// the absence of events means nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::server_log::Reader;
    ///
    /// let mut reader = Reader::stderr("%m [%p] ");
    /// assert_eq!(reader.push("2026-01-31 12:34:56 UTC:app@shop:[7]:LOG:  checkpoint starting: time\n").count(), 0);
    /// assert_eq!((reader.lines_read(), reader.lines_skipped()), (0, 1));
    /// ```
    #[must_use]
    pub fn lines_skipped(&self) -> u64 {
        self.lines_skipped
    }

    /// Reads the next part of the log's text: a line, several lines, or part of a line.
    ///
    /// In the `stderr` format nothing marks the end of a message. It is returned when the same session's next message
    /// begins, when a line follows its STATEMENT, when no part of it has come for 1000 lines, or by
    /// [`finish`](Self::finish).
    ///
    /// Databases with different encodings write to one log: convert lines that are not UTF-8 with
    /// [`String::from_utf8_lossy`].
    pub fn push(&mut self, text: &str) -> impl Iterator<Item = LogEvent> + use<> {
        let mut events = Vec::new();
        let mut rest = text;
        while let Some((line, after)) = rest.split_once('\n') {
            rest = after;
            // This can be the last part of a line that came in parts.
            if self.line.is_empty() && !self.too_long {
                events.extend(self.whole_line(line));
            } else {
                self.keep(line);
                let line = std::mem::take(&mut self.line);
                if std::mem::take(&mut self.too_long) {
                    self.lines_skipped += 1;
                } else {
                    events.extend(self.whole_line(&line));
                }
            }
        }
        self.keep(rest);
        events.into_iter()
    }

    /// Reads one line, without its line end, as [`BufRead::lines`](std::io::BufRead::lines) returns it.
    pub fn push_line(&mut self, line: &str) -> impl Iterator<Item = LogEvent> + use<> {
        let events = self.push(line);
        events.chain(self.push("\n"))
    }

    /// Returns the message that would end with the next line, if there is one. Call it at the end of the log, and when
    /// no text has come for a while. Reading can continue afterwards.
    pub fn finish(&mut self) -> impl Iterator<Item = LogEvent> + use<> {
        let mut events = Vec::new();
        let line = std::mem::take(&mut self.line);
        if std::mem::take(&mut self.too_long) {
            self.lines_skipped += 1;
        } else if !line.is_empty() {
            events.extend(self.whole_line(&line));
        }
        match &mut self.format {
            Format::Text(text) => {
                text.stderr.finish();
                let last = text.stderr.take_complete();
                events.extend(last.into_iter().filter_map(entry::Entry::event));
                self.lines_skipped += text.objects.reset();
            }
            Format::Csv(csv) => self.lines_skipped += csv.reset(),
        }
        events.into_iter()
    }

    fn new(format: Format) -> Self {
        Self {
            format,
            zones: TimeZones::default(),
            line: String::new(),
            too_long: false,
            has_begun: false,
            lines_read: 0,
            lines_skipped: 0,
        }
    }

    fn keep(&mut self, part: &str) {
        if self.line.len() + part.len() > MAX_LINE_BYTES {
            let mut beginning = std::mem::take(&mut self.line);
            match &mut self.format {
                Format::Csv(csv) => {
                    beginning.push_str(part);
                    csv.part(&beginning);
                    return;
                }
                Format::Text(_) => self.too_long = true,
            }
        }
        if !self.too_long {
            self.line.push_str(part);
        }
    }

    fn whole_line(&mut self, line: &str) -> Vec<LogEvent> {
        // A file that an editor has saved can begin with a byte-order mark.
        let line = if std::mem::replace(&mut self.has_begun, true) {
            line
        } else {
            line.strip_prefix('\u{feff}').unwrap_or(line)
        };
        let (entries, skipped) = match &mut self.format {
            Format::Text(text) => text.line(line.strip_suffix('\r').unwrap_or(line), &self.zones),
            Format::Csv(csv) => {
                let (entry, skipped) = csv.line(line, &self.zones);
                (entry.into_iter().collect(), skipped)
            }
        };
        self.lines_skipped += skipped;
        if skipped == 0 && !line.trim().is_empty() {
            self.lines_read += 1;
        }
        entries
            .into_iter()
            .filter_map(entry::Entry::event)
            .collect()
    }
}

impl Text {
    /// Reads a line, given without its line end. Returns the messages that have ended, and how many lines were not read.
    fn line(&mut self, line: &str, zones: &TimeZones) -> (Vec<entry::Entry>, u64) {
        let is_plain =
            !self.is_json && (line.starts_with('\t') || self.stderr.is_plain(line, zones));
        let carried = if is_plain {
            None
        } else {
            Carried::unwrap(line)
        };
        let carried = carried.unwrap_or_else(|| Carried::plain(line));
        let is_object = self.is_json || carried.text.starts_with('{') && !is_plain;
        let mut entries = Vec::new();
        let skipped = if is_object {
            self.objects(&carried, zones, &mut entries)
        } else {
            u64::from(!self.stderr.line(&carried, zones))
        };
        entries.extend(self.stderr.take_complete());
        (entries, skipped)
    }

    fn objects(
        &mut self,
        carried: &Carried<'_>,
        zones: &TimeZones,
        entries: &mut Vec<entry::Entry>,
    ) -> u64 {
        let (found, skipped) = self.objects.line(&carried.text, zones);
        let (mut any, mut any_read) = (false, false);
        for found in found {
            any = true;
            match found {
                Found::Record(entry) => {
                    any_read = true;
                    entries.push(*entry);
                }
                Found::Text(lines) => {
                    let text = lines.text.strip_suffix('\n').unwrap_or(&lines.text);
                    any_read |= self.stderr.line(
                        &Carried {
                            source: carried.source,
                            pid: lines.pid.or(carried.pid),
                            pid_is_guessed: lines.pid.is_none() && carried.pid_is_guessed,
                            time: lines.time.as_deref().or(carried.time),
                            is_cut: lines.is_cut,
                            ..Carried::plain(text)
                        },
                        zones,
                    );
                }
            }
        }
        skipped + u64::from(any && !any_read)
    }
}

/// Without the text that is kept of incomplete lines: it can contain literals.
impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field(
                "format",
                &match &self.format {
                    Format::Text(text) if text.is_json => "json",
                    Format::Text(_) => "stderr",
                    Format::Csv(_) => "csv",
                },
            )
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod adversarial;
#[cfg(test)]
mod arrivals;
#[cfg(test)]
mod tests;
