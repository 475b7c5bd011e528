//! What programs that carry logs put before each line: syslog, Heroku, docker compose, Kubernetes, and tools that add a
//! time.

use std::borrow::Cow;

use super::time_zones::TimeZones;

/// How many wrappings, one within another, are removed.
const MAX_DEPTH: usize = 4;

/// A line without what its carrier added to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Carried<'a> {
    /// Which of the streams that share the log it comes from; empty without a carrier that names them.
    pub(super) source: &'a str,
    pub(super) pid: Option<i32>,
    /// Whether [`pid`](Self::pid) may be some other number.
    pub(super) pid_is_guessed: bool,
    /// When the carrier received it.
    pub(super) time: Option<&'a str>,
    /// Several lines where the carrier has escaped line ends.
    pub(super) text: Cow<'a, str>,
    /// The same with syslog's number, which can be part of the prefix instead.
    pub(super) numbered: Option<Cow<'a, str>>,
    /// Whether a line that the carrier has cut continues in the text.
    pub(super) is_rest_of_line: bool,
    /// Whether the rest of the line is in the source's next line.
    pub(super) is_cut: bool,
}

impl<'a> Carried<'a> {
    pub(super) fn plain(line: &'a str) -> Self {
        Self {
            text: Cow::Borrowed(line),
            ..Self::default()
        }
    }

    /// Removes what is recognized; `None` if nothing is.
    pub(super) fn unwrap(line: &'a str) -> Option<Self> {
        let mut carried = Self::plain(line);
        let mut rest = line;
        let mut found = false;
        for _ in 0..MAX_DEPTH {
            let Some(inner) = carried.one(rest) else {
                break;
            };
            found = true;
            rest = inner;
            if let Cow::Owned(_) = carried.text {
                break;
            }
            carried.text = Cow::Borrowed(rest);
        }
        found.then_some(carried)
    }

    fn one(&mut self, line: &'a str) -> Option<&'a str> {
        let line = without_colours(line);
        if let Some((name, rest)) = compose(line).or_else(|| kubectl(line)) {
            self.source = name;
            return Some(rest);
        }
        let (time, rest) = time(line)?;
        if time.len() > 16 {
            self.time = Some(time);
        }
        if let Some((stream, tag, rest)) = cri(rest) {
            if self.source.is_empty() {
                self.source = stream;
            }
            self.is_cut = tag == "P";
            return Some(rest);
        }
        if let Some(rest) = self.syslog(rest) {
            return Some(rest);
        }
        // Of RFC 3339 only: no server writes its times with a `T`.
        time.contains('T').then_some(rest)
    }

    /// `host postgres[405]: [8-3] #011Process …`, `app[postgres.405]: [GREEN] [15-1]  …`, and of RFC 5424 `host postgres
    /// 405 - - [8-3] …`.
    fn syslog(&mut self, line: &'a str) -> Option<&'a str> {
        let (ident, pid, rest) = ident(line).or_else(|| rfc5424(line))?;
        let is_heroku = pid.contains('.');
        self.source = ident;
        self.pid = pid.rsplit('.').next().and_then(|pid| pid.parse().ok());
        self.pid_is_guessed = is_heroku;
        let without_colour = if is_heroku { colour(rest) } else { rest };
        let (chunk, text) = number(without_colour).unwrap_or((1, without_colour));
        let is_numbered = text.len() < without_colour.len();
        let text = if is_heroku && text.trim_start().starts_with("sql_error_code") {
            text.trim_start()
        } else {
            text
        };
        let unescaped = unescape(text);
        // Line ends are escaped too, if syslog takes whole messages (`syslog_split_messages = off`).
        self.is_rest_of_line = is_numbered && chunk > 1;
        self.numbered = is_numbered.then(|| unescape(without_colour));
        self.text = Cow::Owned(unescaped.into_owned());
        Some(text)
    }
}

/// `[36mdb_1  |[0m `: what terminals show as colours.
fn without_colours(mut line: &str) -> &str {
    while let Some(code) = line.strip_prefix("\u{1b}[") {
        let end = code.find(|c: char| !(c.is_ascii_digit() || c == ';'));
        match end.map(|end| code.split_at(end)) {
            Some((_, rest)) if rest.starts_with('m') => line = &rest[1..],
            _ => break,
        }
    }
    line
}

/// `db_1  | …`
fn compose(line: &str) -> Option<(&str, &str)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let end = line.find(|c| !is_name(c)).filter(|end| *end < 128)?;
    let (name, rest) = line.split_at(end);
    let rest = without_colours(rest);
    let behind = rest.trim_start_matches(' ');
    let is_padded = behind.len() < rest.len() && name.contains(|c: char| c.is_ascii_alphabetic());
    let rest = without_colours(behind.strip_prefix('|')?);
    is_padded.then(|| (name, rest.strip_prefix(' ').unwrap_or(rest)))
}

/// `[pod/name/container] …`
fn kubectl(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.strip_prefix("[pod/")?.split_once(']')?;
    (name.len() < 256 && !name.contains(' '))
        .then(|| (name, rest.strip_prefix(' ').unwrap_or(rest)))
}

/// `2026-01-31T12:34:56.789Z …`, `Jan 31 12:34:56 …`, both also with syslog's `<134>` or `<134>1 `.
fn time(line: &str) -> Option<(&str, &str)> {
    let line = priority(line).unwrap_or(line);
    let (word, rest) = line.split_once(' ')?;
    let bytes = word.as_bytes();
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    if word.len() >= 19 && word.len() < 40 && bytes[10] == b'T' && is_digit(0) && is_digit(18) {
        return Some((word, rest));
    }
    let is_month = word.len() == 3 && bytes.iter().all(u8::is_ascii_alphabetic);
    let clock = rest.get(..12)?;
    let (day, clock) = clock.trim_start_matches(' ').split_once(' ')?;
    let is_day = day.len() <= 2 && day.bytes().all(|byte| byte.is_ascii_digit());
    let is_clock = clock.get(2..3) == Some(":");
    let rest = rest.trim_start_matches(' ').split_once(' ')?.1;
    let (_, rest) = rest.split_once(' ')?;
    (is_month && is_day && is_clock).then_some((word, rest))
}

fn priority(line: &str) -> Option<&str> {
    let (number, rest) = line.strip_prefix('<')?.split_once('>')?;
    let is_number = number.len() <= 3 && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| rest.strip_prefix("1 ").unwrap_or(rest))
}

/// `stderr F …`
fn cri(rest: &str) -> Option<(&str, &str, &str)> {
    let (stream, rest) = rest.split_once(' ')?;
    let (tag, text) = rest.split_once(' ').unwrap_or((rest, ""));
    // More tags can follow, separated by colons.
    let first = tag.split(':').next()?;
    (matches!(stream, "stdout" | "stderr") && matches!(first, "F" | "P"))
        .then_some((stream, first, text))
}

/// `host postgres[405]: …`: the words before it, what is in brackets, and the rest.
fn ident(line: &str) -> Option<(&str, &str, &str)> {
    let open = line.find('[').filter(|open| *open > 0 && *open < 256)?;
    let before = &line[..open];
    let words = before.split(' ').count();
    let is_word = before.ends_with(|c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    let (inside, rest) = line[open + 1..].split_once(']')?;
    let rest = rest.strip_prefix(':')?;
    let rest = rest.strip_prefix(' ').unwrap_or(rest);
    let is_pid = inside.ends_with(|c: char| c.is_ascii_digit()) && !inside.contains(' ');
    let ident = &line[..open + 1 + inside.len()];
    (is_word && is_pid && words <= 2).then_some((ident, inside, rest))
}

/// `host postgres 405 - - …`
fn rfc5424(line: &str) -> Option<(&str, &str, &str)> {
    let mut words = line.splitn(6, ' ');
    let (_, _, pid) = (words.next()?, words.next()?, words.next()?);
    let (_, data, rest) = (words.next()?, words.next()?, words.next()?);
    let is_pid = !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit());
    let end = line.len() - rest.len();
    (is_pid && data == "-").then(|| (&line[..end], pid, rest))
}

/// `[GREEN] …`, the name of a Heroku database.
fn colour(text: &str) -> &str {
    let inside = text.strip_prefix('[').and_then(|text| text.split_once(']'));
    match inside {
        Some((name, rest)) if name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') => {
            rest.strip_prefix(' ').unwrap_or(rest)
        }
        _ => text,
    }
}

/// `[8-3] …`: the number of the message's chunk, and the rest.
fn number(text: &str) -> Option<(u32, &str)> {
    let (inside, rest) = text.strip_prefix('[')?.split_once(']')?;
    let (message, chunk) = inside.split_once('-')?;
    message.parse::<u64>().ok()?;
    Some((chunk.parse().ok()?, rest.strip_prefix(' ').unwrap_or(rest)))
}

/// Replaces `#011` and other control characters, which syslog writes in octal.
fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('#') {
        return Cow::Borrowed(text);
    }
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('#') {
        plain.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4);
        let value = code.and_then(|code| u8::from_str_radix(code, 8).ok());
        match value.filter(|value| *value < 32) {
            Some(value) => {
                plain.push(char::from(value));
                rest = &rest[at + 4..];
            }
            None => {
                plain.push('#');
                rest = &rest[at + 1..];
            }
        }
    }
    plain.push_str(rest);
    Cow::Owned(plain)
}

/// When the carrier received the line: `2026-01-31T12:34:56.789Z`, `…+00:00`.
pub(super) fn received(text: &str, zones: &TimeZones) -> Option<std::time::SystemTime> {
    let zone = text.len()
        - text
            .get(19..)?
            .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.')
            .len();
    let local: String = text[..zone].chars().take(29).collect();
    zones.time(&format!("{} {}", local.replace('T', " "), &text[zone..]))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn carriers_are_recognized() {
        for (line, source, pid, text) in [
            ("db_1  | LOG:  x", "db_1", None, "LOG:  x"),
            ("db_1  | \tx", "db_1", None, "\tx"),
            ("\u{1b}[36mdb-1  |\u{1b}[0m \tx", "db-1", None, "\tx"),
            (
                "2026-01-31T12:34:56.789012345Z stderr F \tx",
                "stderr",
                None,
                "\tx",
            ),
            (
                "[pod/a/b] 2026-01-31T12:34:56Z stdout F x",
                "pod/a/b",
                None,
                "x",
            ),
            (
                "Jan 31 12:34:56 host postgres[405]: [8-3] #011Process 1",
                "host postgres[405",
                Some(405),
                "\tProcess 1",
            ),
            (
                "Feb  1 12:34:56 host postgres[405]: a#012#011b",
                "host postgres[405",
                Some(405),
                "a\n\tb",
            ),
            (
                "2026-01-31T12:34:56+00:00 app[postgres.405]: [GREEN] [15-1]  sql_error_code = 1",
                "app[postgres.405",
                Some(405),
                "sql_error_code = 1",
            ),
            (
                "<134>1 2026-01-31T12:34:56.789Z host postgres 405 - - [8-1] x",
                "host postgres 405 - - ",
                Some(405),
                "x",
            ),
            ("2026-01-31T12:34:56.789Z x", "", None, "x"),
        ] {
            let source = source.strip_prefix("pod/").unwrap_or(source);
            let carried = Carried::unwrap(line).unwrap_or_else(|| panic!("{line}"));
            let found = (carried.source, carried.pid, &*carried.text);
            assert_eq!(found, (source, pid, text), "{line}");
        }
        for line in [
            "",
            "77|app|LOG:  x",
            "2026-01-31 12:34:56 UTC:h(1):u@d:[77]: LOG:  x",
            "[77]: [5-1] LOG:  x",
            "é",
            "Jan",
            "Jan é1 12:34:56 é",
            "<1>",
            "\u{1b}[",
        ] {
            assert_eq!(Carried::unwrap(line), None, "{line}");
        }
    }

    #[test]
    fn the_time_of_the_carrier_is_read() {
        let zones = TimeZones::default();
        let expected = SystemTime::UNIX_EPOCH + Duration::from_millis(1_769_862_896_789);
        for text in ["2026-01-31T12:34:56.789Z", "2026-01-31T13:34:56.789+01:00"] {
            assert_eq!(received(text, &zones), Some(expected), "{text}");
        }
        assert_eq!(received("x", &zones), None);
    }
}
