//! PostgreSQL's own log about locks, read: waits that last, deadlocks with their statements, lock timeouts.
//!
//! The server sees what no look from outside can: every deadlock with the statements of all who took part, and, with
//! `log_lock_waits = on`, every wait longer than `deadlock_timeout`, who held the lock and who else waited. A [`Reader`] is
//! fed the text of a log file as it comes and gives a [`LogEvent`] for each message about locks. It reads the formats
//! `stderr`, `csvlog` and `jsonlog` (15 and later) of PostgreSQL 14 to 18. No I/O: where the file is, and how
//! it is followed, is the caller's.
//!
//! Messages are in the server's language (`lc_messages`). They are told apart by their SQLSTATE where the format has
//! it (`csvlog`, `jsonlog`, and `stderr` with `%e` in `log_line_prefix`), and by their shape and a few words where it has
//! not, in all languages that PostgreSQL has translations for.
//!
//! Lines that are of no use, of another program, damaged or cut off, are passed over. Nothing here panics, and memory is
//! bounded: of a message longer than four megabytes the rest is dropped, and in `jsonlog` all of it.
//!
//! # What can be believed
//!
//! In `csvlog` and `jsonlog` the text of a client cannot begin a message (in `csvlog` it can where reading begins within
//! one). In `stderr` it can: whoever may choose an `application_name` that is in the prefix, or raise errors, can write
//! lines that look like the server's.
//!
//! In every format the text of a message may be a client's: PL/pgSQL's `RAISE` logs any text, with any DETAIL and
//! SQLSTATE. In `csvlog` and `jsonlog` whoever does that can tell of waits and failures of its own process only, but name
//! whom it likes as those in its way, in the queue, or in a deadlock with it.
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
mod prefix;
mod stderr;
mod words;
mod zones;

use std::fmt;

pub use event::{LogEvent, LogEventKind, LogRow, LogWait};

use csv::Csv;
use prefix::Prefix;
use stderr::Stderr;
use zones::Zones;

/// Bytes of a line that are kept.
const LONGEST_LINE: usize = 4 << 20;

/// Reads the text of a log, as it comes.
///
/// Cheap to make; one for each log file, since a message may go over several lines. After a gap in the text it finds its
/// way back by itself.
#[derive(Clone)]
pub struct Reader {
    format: Format,
    zones: Zones,
    /// The beginning of a line whose end has not come.
    line: String,
    /// What comes of that line is dropped.
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
    /// log_line_prefix` gives it: `"%m [%p] "` by default.
    ///
    /// Time, process id, user, database, `application_name`, SQLSTATE and query identifier are had from it where it has them
    /// (`%t`, `%m`, `%n`, `%p`, `%u`, `%d`, `%a`, `%e`, `%Q`). Lines that do not begin with it are passed over.
    #[must_use]
    pub fn stderr(log_line_prefix: &str) -> Self {
        Self::new(Format::Stderr(Box::new(Stderr::of_prefix(Prefix::new(
            log_line_prefix,
        )))))
    }

    /// For `log_destination = stderr` where the prefix is not known. Times, process ids, `user@database` and `user=…` are
    /// found where they look like it; more cannot be had.
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

    /// What an abbreviation of a time zone means in this log, in seconds ahead of UTC: the server writes times in
    /// `log_timezone`, and abbreviations have many meanings. `UTC`, `GMT` and numbers such as `+03` are known.
    ///
    /// # Examples
    ///
    /// ```
    /// use lockkeeper::server_log::Reader;
    ///
    /// let reader = Reader::csv().zone("CET", 3600).zone("CEST", 7200);
    /// ```
    #[must_use = "gives back a reader that knows the zone"]
    pub fn zone(mut self, abbreviation: impl Into<String>, seconds_ahead_of_utc: i32) -> Self {
        self.zones.add(abbreviation.into(), seconds_ahead_of_utc);
        self
    }

    /// Any part of the log's text, in its order: lines, many lines, or parts of lines.
    ///
    /// In `stderr` format a message ends where the next one begins: it is given then, or by [`finish`](Self::finish).
    ///
    /// Databases of several encodings write into one log: of lines that are no UTF-8, give what
    /// [`String::from_utf8_lossy`] makes of them.
    pub fn push(&mut self, text: &str) -> impl Iterator<Item = LogEvent> + use<> {
        let mut events = Vec::new();
        let mut rest = text;
        while let Some((line, behind)) = rest.split_once('\n') {
            rest = behind;
            // Of a line in parts this may be the last one.
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

    /// One line, without its end, as [`BufRead::lines`](std::io::BufRead::lines) gives it.
    pub fn push_line(&mut self, line: &str) -> impl Iterator<Item = LogEvent> + use<> {
        let events = self.push(line);
        events.chain(self.push("\n"))
    }

    /// The message that would end with the next line, if there is one. To be called at the end of the log, and when
    /// nothing has come for a while; reading may go on afterwards.
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
            zones: Zones::default(),
            line: String::new(),
            too_long: false,
        }
    }

    fn keep(&mut self, part: &str) {
        if self.line.len() + part.len() > LONGEST_LINE {
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

/// Without the text that has not been read to its end: it may have literals.
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
mod hostile;
#[cfg(test)]
mod tests;
