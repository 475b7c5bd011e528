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
//! and a few words, in all languages that PostgreSQL has translations for.
//!
//! Lines that are not about locks, come from another program, are damaged or cut off are skipped. No input causes a
//! panic, and memory is bounded: a message longer than four megabytes is truncated, and skipped in `jsonlog`.
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
mod json;
mod labels;
mod prefix;
mod stderr;
mod time_zones;

use std::fmt;

pub use event::{LogEvent, LogEventKind, LogRow, LogWait};

use csv::Csv;
use prefix::Prefix;
use stderr::Stderr;
use time_zones::TimeZones;

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
}

#[derive(Clone)]
enum Format {
    Stderr(Box<Stderr>),
    Csv(Csv),
    Json,
}

impl Reader {
    /// For `log_destination = stderr`, with the server's `log_line_prefix` as it is in `postgresql.conf` or as `SHOW
    /// log_line_prefix` shows it: `"%m [%p] "` by default.
    ///
    /// Time, process id, user, database, `application_name`, SQLSTATE and query identifier are read from the prefix if
    /// it contains them (`%t`, `%m`, `%n`, `%p`, `%u`, `%d`, `%a`, `%e`, `%Q`). Lines that do not begin with the prefix
    /// are skipped.
    #[must_use]
    pub fn stderr(log_line_prefix: &str) -> Self {
        Self::new(Format::Stderr(Box::new(Stderr::of_prefix(Prefix::new(
            log_line_prefix,
        )))))
    }

    /// For `log_destination = stderr` with an unknown prefix. Times, process ids, `user@database` and `user=…` are
    /// recognized by their form; other fields are not available.
    #[must_use]
    pub fn stderr_of_any_prefix() -> Self {
        Self::new(Format::Stderr(Box::default()))
    }

    /// For `log_destination = csvlog`.
    #[must_use]
    pub fn csv() -> Self {
        Self::new(Format::Csv(Csv::default()))
    }

    /// For `log_destination = jsonlog`.
    #[must_use]
    pub fn json() -> Self {
        Self::new(Format::Json)
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

    /// Reads the next part of the log's text: a line, several lines, or part of a line.
    ///
    /// In the `stderr` format a message ends where the next one begins: it is returned then, or by
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
                if !std::mem::take(&mut self.too_long) {
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
        if !std::mem::take(&mut self.too_long) && !line.is_empty() {
            events.extend(self.whole_line(&line));
        }
        let last = match &mut self.format {
            Format::Stderr(stderr) => stderr.finish(),
            Format::Csv(csv) => {
                csv.reset();
                None
            }
            Format::Json => None,
        };
        events.extend(last.and_then(entry::Entry::event));
        events.into_iter()
    }

    fn new(format: Format) -> Self {
        Self {
            format,
            zones: TimeZones::default(),
            line: String::new(),
            too_long: false,
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
                Format::Stderr(_) | Format::Json => self.too_long = true,
            }
        }
        if !self.too_long {
            self.line.push_str(part);
        }
    }

    fn whole_line(&mut self, line: &str) -> Option<LogEvent> {
        let without_return = line.strip_suffix('\r').unwrap_or(line);
        let entry = match &mut self.format {
            Format::Stderr(stderr) => stderr.line(without_return, &self.zones),
            Format::Csv(csv) => csv.line(line, &self.zones),
            Format::Json => json::line(without_return, &self.zones),
        };
        entry?.event()
    }
}

/// Without the text that is kept of incomplete lines: it can contain literals.
impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field(
                "format",
                &match self.format {
                    Format::Stderr(_) => "stderr",
                    Format::Csv(_) => "csv",
                    Format::Json => "json",
                },
            )
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod adversarial;
#[cfg(test)]
mod tests;
