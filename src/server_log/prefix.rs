//! Splits lines into the fields of `log_line_prefix`.

use super::entry::Origin;
use super::labels::{self, Label};
use super::time_zones::TimeZones;

/// The maximum length of a line's prefix, in bytes.
pub(super) const MAX_PREFIX_BYTES: usize = 1024;
/// The maximum length of a free text field, in bytes: names have up to 63, other fields little more.
const MAX_TEXT_BYTES: usize = 256;
/// The maximum number of fields and characters of a prefix. With a longer prefix no line is read.
const MAX_PARTS: usize = 300;

/// A parsed `log_line_prefix`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prefix {
    parts: Vec<Part>,
    /// The fields whose values are not known, because nothing separates them from their neighbours.
    unclear: Vec<char>,
    /// What cannot be told apart in lines with this prefix, a sentence each.
    limits: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(char),
    Field(char),
    /// `%q`: the prefix of a process without a session ends here.
    SessionsOnly,
}

/// The prefix and the label of a line, and the text after them.
#[derive(Clone, Debug, Default)]
pub(super) struct Head<'a> {
    pub(super) origin: Origin,
    pub(super) sqlstate: Option<String>,
    /// Whether the process id is just some number in the prefix.
    pub(super) pid_is_guessed: bool,
    pub(super) label: Option<Label>,
    pub(super) rest: &'a str,
}

impl Prefix {
    pub(super) fn new(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next()
            && parts.len() <= MAX_PARTS
        {
            if c != '%' {
                parts.push(Part::Literal(c));
                continue;
            }
            // `%-10u`: padding, which appears as blanks in the line.
            while chars.next_if(|c| *c == '-' || c.is_ascii_digit()).is_some() {}
            match chars.next() {
                Some('%') => parts.push(Part::Literal('%')),
                Some('q') => parts.push(Part::SessionsOnly),
                // The server writes nothing for an unknown letter.
                Some(c) if "abcdehilLmnpPQrstuvxY".contains(c) => parts.push(Part::Field(c)),
                _ => {}
            }
        }
        let mut prefix = Self {
            parts,
            ..Self::default()
        };
        prefix.find_limits();
        prefix
    }

    /// What cannot be told apart in lines with this prefix.
    pub(super) fn limits(&self) -> &[String] {
        &self.limits
    }

    fn find_limits(&mut self) {
        if self.parts.len() > MAX_PARTS {
            self.limits = vec![format!(
                "this prefix cannot be read: it has more than {MAX_PARTS} characters and fields"
            )];
            return;
        }
        let parts: Vec<_> = self
            .parts
            .iter()
            .filter(|part| **part != Part::SessionsOnly)
            .collect();
        for pair in parts.windows(2) {
            let [Part::Field(first), Part::Field(second)] = pair else {
                continue;
            };
            if is_separate(*first, *second) {
                continue;
            }
            // Names usually begin with a letter.
            if matches!(first, 'p' | 'P' | 'l' | 'x') && is_free_text(*second) {
                self.limits.push(format!(
                    "nothing separates %{first} from %{second} in this prefix, so %{first} is wrong where %{second} \
                     begins with a digit"
                ));
                continue;
            }
            self.unclear.extend([*first, *second]);
            self.limits.push(format!(
                "nothing separates %{first} from %{second} in this prefix, so neither value is read"
            ));
        }
        let has = |field| parts.contains(&&Part::Field(field)) && !self.unclear.contains(&field);
        if !has('p') && !has('c') {
            self.limits.push(
                "the prefix contains neither %p nor %c, so the lines of sessions that log at the same time cannot be \
                 told apart"
                    .to_owned(),
            );
        }
        if !has('e') {
            self.limits.push(
                "the prefix does not contain %e, so errors are recognized by their text, in the languages that \
                 PostgreSQL has translations for"
                    .to_owned(),
            );
        }
    }

    /// Splits a line that begins with the prefix and a label; `None` for any other line.
    pub(super) fn head<'a>(&self, line: &'a str, zones: &TimeZones) -> Option<Head<'a>> {
        if self.parts.len() > MAX_PARTS {
            return None;
        }
        let sessions = self
            .parts
            .iter()
            .position(|part| *part == Part::SessionsOnly);
        let attempts = [Some(self.parts.len()), sessions];
        attempts.into_iter().flatten().find_map(|end| {
            let mut search = Search {
                parts: &self.parts[..end],
                line,
                zones,
                failed: Vec::new(),
                fields: Vec::new(),
            };
            let (label, rest) = search.from(0, 0)?;
            let mut head = Head {
                label: Some(label),
                rest,
                ..Head::default()
            };
            let fields = search.fields.into_iter().rev();
            for (field, text) in fields.filter(|(field, _)| !self.unclear.contains(field)) {
                head.field(field, text, zones);
            }
            Some(head)
        })
    }
}

/// A backtracking search: a free text field ends where the rest of the prefix matches. Each position is tried once for
/// each part.
struct Search<'p, 'a> {
    parts: &'p [Part],
    line: &'a str,
    zones: &'p TimeZones,
    /// What has failed, by part and position; empty until something fails.
    failed: Vec<bool>,
    /// The matched fields, last first.
    fields: Vec<(char, &'a str)>,
}

impl<'a> Search<'_, 'a> {
    fn from(&mut self, part: usize, at: usize) -> Option<(Label, &'a str)> {
        let attempt = part * (MAX_PREFIX_BYTES + 1) + at;
        if at > MAX_PREFIX_BYTES || self.failed.get(attempt).copied().unwrap_or(false) {
            return None;
        }
        let line = self.line;
        let found = match self.parts.get(part) {
            None => labels::label(&line[at..]),
            Some(Part::SessionsOnly) => self.from(part + 1, at),
            Some(Part::Literal(c)) => line[at..]
                .starts_with(*c)
                .then(|| self.from(part + 1, at + c.len_utf8()))
                .flatten(),
            Some(Part::Field(field)) => self.field(*field, part, at),
        };
        if found.is_none() {
            self.failed
                .resize((self.parts.len() + 1) * (MAX_PREFIX_BYTES + 1), false);
            self.failed[attempt] = true;
        }
        found
    }

    fn field(&mut self, field: char, part: usize, at: usize) -> Option<(Label, &'a str)> {
        let rest = &self.line[at..];
        let ends = lengths(field, rest, self.zones);
        let mut attempt = |length: usize| {
            let found = self.from(part + 1, at + length)?;
            self.fields.push((field, &rest[..length]));
            Some(found)
        };
        for length in ends {
            let blanks = rest[length..].len() - rest[length..].trim_start_matches(' ').len();
            let found = (0..=blanks.min(64)).find_map(|blanks| attempt(length + blanks));
            if found.is_some() {
                return found;
            }
        }
        if !is_free_text(field) {
            return None;
        }
        // The shortest match first.
        let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
        let mut ends = ends.take_while(|end| *end <= MAX_TEXT_BYTES);
        ends.find_map(attempt)
    }
}

/// Whether a field can contain any character.
fn is_free_text(field: char) -> bool {
    "aubdhirLY".contains(field)
}

/// Whether the end of a field is known without a character between it and the next one.
fn is_separate(first: char, second: char) -> bool {
    match first {
        // A SQLSTATE has five characters, and a time ends with the name of its zone.
        // A host ends with a port in parentheses.
        'e' | 't' | 'm' | 's' | 'r' => true,
        'p' | 'P' | 'l' | 'x' | 'Q' | 'n' | 'v' | 'c' => false,
        _ => second == 't' || second == 'm' || second == 's',
    }
}

/// The possible lengths of the field that begins here, with the padding before it, best first. A field of free text can
/// have any other length too.
fn lengths(field: char, text: &str, zones: &TimeZones) -> Vec<usize> {
    let padding = text.len() - text.trim_start_matches(' ').len();
    let value = &text[padding..];
    let run = |allowed: fn(char) -> bool| value.find(|c| !allowed(c)).unwrap_or(value.len());
    let mut lengths = match field {
        'p' | 'P' | 'l' | 'x' => vec![run(|c| c.is_ascii_digit())],
        'Q' => vec![run(|c| c.is_ascii_digit() || c == '-')],
        'n' => vec![run(|c| c.is_ascii_digit() || c == '.')],
        'e' => match run(|c| c.is_ascii_uppercase() || c.is_ascii_digit()) {
            whole @ ..=5 => vec![whole],
            whole => vec![5, whole],
        },
        'c' => vec![run(|c| c.is_ascii_hexdigit() || c == '.')],
        'v' => vec![run(|c| c.is_ascii_digit() || matches!(c, '/' | '-'))],
        't' | 'm' | 's' => zones.lengths(value),
        'r' => remote(value).into_iter().collect(),
        'h' | 'L' => addresses(value),
        _ => return Vec::new(),
    };
    if lengths.is_empty() && !is_free_text(field) {
        lengths.push(0);
    }
    lengths.iter().map(|length| padding + length).collect()
}

/// The length of `2001:db8::1(5555)`, `db.example(5555)` or `[local]`.
fn remote(text: &str) -> Option<usize> {
    let host = host(text)?;
    let port = text[host..].strip_prefix('(')?;
    let digits = port.find(|c: char| !c.is_ascii_digit())?;
    (digits > 0 && port[digits..].starts_with(')')).then_some(host + digits + 2)
}

/// The length of what can be a host's name or address; 0 for none.
fn host(text: &str) -> Option<usize> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '-' | '_' | '%');
    text.find(|c| !is_part(c))
}

/// The possible lengths of an address, the longest first, because an IPv6 address contains colons.
fn addresses(text: &str) -> Vec<usize> {
    let end = host(text).unwrap_or_default().min(64);
    let is_address = |end: &usize| text[..*end].parse::<std::net::IpAddr>().is_ok();
    (2..=end).rev().filter(is_address).collect()
}

impl Head<'_> {
    pub(super) fn field(&mut self, field: char, text: &str, zones: &TimeZones) {
        let known = labels::known(text.trim_matches(' '));
        let owned = known.map(str::to_owned);
        let origin = &mut self.origin;
        match field {
            'a' => origin.application = owned,
            'u' => origin.user = owned,
            'd' => origin.database = owned,
            'p' => origin.pid = known.and_then(|pid| pid.parse().ok()),
            // The session's identifier is its start and its process id, in hexadecimal.
            'c' if origin.pid.is_none() => origin.pid = known.and_then(pid_of_session),
            'Q' => origin.query_id = known.and_then(|id| id.parse().ok()).filter(|id| *id != 0),
            'e' => self.sqlstate = owned,
            // `%m` is more precise than `%t`.
            't' if origin.time.is_some() => {}
            't' | 'm' | 'n' => {
                origin.time = known.and_then(|time| zones.time(time));
                origin.time_text = owned;
            }
            _ => {}
        }
    }
}

/// The process id in `6055d3a0.195`.
pub(super) fn pid_of_session(id: &str) -> Option<i32> {
    let (start, pid) = id.split_once('.')?;
    let is_hex = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
    let looks_like_it = (7..=8).contains(&start.len()) && is_hex(start) && is_hex(pid);
    looks_like_it.then(|| i32::from_str_radix(pid, 16).ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read<'a>(prefix: &str, line: &'a str) -> Option<Head<'a>> {
        Prefix::new(prefix).head(line, &TimeZones::default())
    }

    type Fields<'a> = (
        Option<i32>,
        Option<&'a str>,
        Option<&'a str>,
        Option<&'a str>,
    );

    fn fields<'a>(head: &'a Head<'_>) -> Fields<'a> {
        let origin = &head.origin;
        (
            origin.pid,
            origin.user.as_deref(),
            origin.database.as_deref(),
            origin.application.as_deref(),
        )
    }

    #[test]
    fn fields_of_known_prefixes_are_read() {
        let whole = (Some(77), Some("app"), Some("shop"), Some("a b"));
        for (prefix, line) in [
            (
                "%m [%p] %q%u@%d %a ",
                "2026-01-31 12:34:56.789 UTC [77] app@shop a b LOG:  x: y",
            ),
            (
                "%t:%r:%u@%d:[%p]: app=%a ",
                "2026-01-31 12:34:56 UTC:10.0.0.7(5555):app@shop:[77]: app=a b LOG:  x: y",
            ),
            (
                "%n %e %5p %-8u %d %c %l %v %x %Q %i <%a>%% ",
                "1769862896.789 40P01    77 app      shop 65.4d 12 3/15 0 -77 UPDATE waiting <a b>% LOG:  x: y",
            ),
            ("%p%u%d|%a|", "77appshop|a b|LOG:  x: y"),
        ] {
            let head = read(prefix, line).unwrap_or_else(|| panic!("{prefix}"));
            assert_eq!(head.rest, "x: y", "{prefix}");
            if prefix.starts_with("%p") {
                assert_eq!(fields(&head).0, Some(77));
                continue;
            }
            assert_eq!(fields(&head), whole, "{prefix}");
            assert!(head.origin.time.is_some(), "{prefix}");
        }
        let head = read("%e ", "40P01 ERROR:  x").expect("a code");
        assert_eq!(
            (head.sqlstate.as_deref(), head.label),
            (Some("40P01"), Some(Label::Error))
        );
    }

    #[test]
    fn the_prefix_of_a_process_without_a_session_ends_at_q() {
        let line = "2026-01-31 12:34:56.789 UTC [77] LOG:  checkpoint starting";
        let head = read("%m [%p] %q%u@%d ", line).expect("a line");
        assert_eq!(fields(&head), (Some(77), None, None, None));
        assert!(read("%m [%p] %u@%d ", line).is_none());
        let unknown = read("%u@%d ", "[unknown]@[unknown] LOG:  x").expect("a line");
        assert_eq!(fields(&unknown), (None, None, None, None));
    }

    #[test]
    fn lines_without_the_prefix_have_no_head() {
        for line in [
            "",
            "\tLOG:  x",
            "LOG:  x",
            "2026-01-31 12:34:56.789 UTC [77] x",
            "2026-01-31 12:34:56.789 UTC [seven] LOG:  x",
            "2026-01-31 LOG:  x",
        ] {
            assert!(read("%m [%p] ", line).is_none(), "{line}");
        }
        assert!(read("", "LOG:  x").is_some());
    }

    #[test]
    fn a_field_ends_where_its_form_ends() {
        let zones = TimeZones::default();
        for (prefix, line, expected) in [
            (
                "%t-%c-",
                "2026-01-31 12:34:56 UTC-6055d3a0.195-LOG:  x",
                (Some(0x195), None, None, None),
            ),
            (
                "%t:%r:%u@%d:[%p]:",
                "2026-01-31 12:34:56 UTC:2001:db8::1(5555):app@shop:[77]:LOG:  x",
                (Some(77), Some("app"), Some("shop"), None),
            ),
            (
                "%m-%h:%u:%p ",
                "2026-01-31 12:34:56.789 +03-2001:db8::1:app:77 LOG:  x",
                (Some(77), Some("app"), None, None),
            ),
            (
                "%t%p%e%u ",
                "2026-01-31 12:34:56 +037740P01app LOG:  x",
                (None, None, None, None),
            ),
            (
                "%r %u@%d %p ",
                "[local] app@shop 77 LOG:  x",
                (Some(77), Some("app"), Some("shop"), None),
            ),
        ] {
            let read = Prefix::new(prefix).head(line, &zones);
            let head = read.unwrap_or_else(|| panic!("{prefix}"));
            if prefix.starts_with("%t%p") {
                assert_eq!(head.origin.pid, None, "{prefix}");
                continue;
            }
            assert_eq!(fields(&head), expected, "{prefix}");
        }
    }

    #[test]
    fn what_cannot_be_told_apart_is_known_at_once() {
        for prefix in ["%m [%p] %q%u@%d %a %e ", "%t-%c-%e ", "%p%t%e "] {
            let limits = Prefix::new(prefix).limits;
            assert_eq!(
                limits.is_empty(),
                prefix != "%p%t%e ",
                "{prefix}: {limits:?}"
            );
        }
        for (prefix, words) in [
            ("%p%l %e ", "%p from %l"),
            ("%u%d %p %e ", "%u from %d"),
            ("%t %e ", "neither %p nor %c"),
            ("%m [%p] ", "does not contain %e"),
        ] {
            let limits = Prefix::new(prefix).limits;
            assert!(
                limits.iter().any(|one| one.contains(words)),
                "{prefix}: {limits:?}"
            );
        }
        let long = Prefix::new(&"x".repeat(301));
        assert!(long.limits[0].starts_with("this prefix cannot be read: "));
    }

    #[test]
    fn backtracking_is_bounded() {
        let line = "a ".repeat(5000);
        assert!(read("%u%d%a%u%d%a%u%d%a%u%d%a%u%d%a ", &line).is_none());
    }

    proptest! {
        #[test]
        fn any_prefix_and_line_are_read_without_panic(prefix in any::<String>(), line in any::<String>(), known in "(%[-a-zA-Z0-9]|[ @:]){0,8}") {
            read(&prefix, &line);
            read(&known, &line);
            let labelled = format!("{line} LOG:  x");
            read(&known, &labelled);
            super::super::guess::guess(&labelled, &TimeZones::default());
        }
    }
}
