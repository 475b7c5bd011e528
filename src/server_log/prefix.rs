//! Splits lines into the fields of `log_line_prefix`.

use super::entry::Origin;
use super::labels::{self, Label};
use super::time_zones::TimeZones;

/// The maximum length of a line's prefix, in bytes.
const MAX_PREFIX_BYTES: usize = 1024;
/// The maximum length of a free text field, in bytes: names have up to 63, other fields little more.
const MAX_TEXT_BYTES: usize = 256;
/// The maximum number of fields and characters of a prefix. With a longer prefix no line is read.
const MAX_PARTS: usize = 300;

/// A parsed `log_line_prefix`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prefix {
    parts: Vec<Part>,
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
        Self { parts }
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
                failed: Vec::new(),
                fields: Vec::new(),
            };
            let (label, rest) = search.from(0, 0)?;
            let mut head = Head {
                label: Some(label),
                rest,
                ..Head::default()
            };
            for (field, text) in search.fields.into_iter().rev() {
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
        let mut attempt = |length: usize| {
            let found = self.from(part + 1, at + length)?;
            self.fields.push((field, &rest[..length]));
            Some(found)
        };
        match length(field, rest) {
            Some((length, blanks)) => {
                (0..=blanks.min(64)).find_map(|blanks| attempt(length + blanks))
            }
            // Free text: the shortest match first.
            None => {
                let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
                let mut ends = ends.take_while(|end| *end <= MAX_TEXT_BYTES);
                ends.find_map(attempt)
            }
        }
    }
}

/// The length of the field that begins here, including the padding before it, and the number of blanks after it; `None`
/// for free text.
fn length(field: char, text: &str) -> Option<(usize, usize)> {
    let padding = text.len() - text.trim_start_matches(' ').len();
    let value = &text[padding..];
    let run = |allowed: fn(char) -> bool| value.find(|c| !allowed(c)).unwrap_or(value.len());
    let length = match field {
        'p' | 'P' | 'l' | 'x' => run(|c| c.is_ascii_digit()),
        'Q' => run(|c| c.is_ascii_digit() || c == '-'),
        'n' => run(|c| c.is_ascii_digit() || c == '.'),
        'e' => run(|c| c.is_ascii_uppercase() || c.is_ascii_digit()),
        'c' => run(|c| c.is_ascii_hexdigit() || c == '.'),
        'v' => run(|c| c.is_ascii_digit() || c == '/' || c == '-'),
        't' | 'm' | 's' => time_length(value),
        _ => return None,
    };
    let after = &value[length..];
    let blanks = after.len() - after.trim_start_matches(' ').len();
    Some((padding + length, blanks))
}

/// The length of a time such as `2026-01-31 12:34:56.789 CET`, with or without the fraction.
fn time_length(text: &str) -> usize {
    let mut words = text.splitn(4, ' ');
    let (Some(date), Some(time), Some(zone)) = (words.next(), words.next(), words.next()) else {
        return 0;
    };
    let is_number = |c: char| c.is_ascii_digit() || matches!(c, '-' | ':' | '.');
    if date.len() != 10 || time.len() < 8 || !date.chars().chain(time.chars()).all(is_number) {
        return 0;
    }
    let zone = zone
        .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '_')))
        .unwrap_or(zone.len());
    date.len() + time.len() + 2 + zone
}

impl Head<'_> {
    fn field(&mut self, field: char, text: &str, zones: &TimeZones) {
        let known = labels::known(text.trim_matches(' '));
        let owned = known.map(str::to_owned);
        let origin = &mut self.origin;
        match field {
            'a' => origin.application = owned,
            'u' => origin.user = owned,
            'd' => origin.database = owned,
            'p' => origin.pid = known.and_then(|pid| pid.parse().ok()),
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

/// Splits a line whose prefix is unknown: finds a label, and recognizes fields before it by their form.
pub(super) fn guess<'a>(line: &'a str, zones: &TimeZones) -> Option<Head<'a>> {
    let (at, label, rest) = labels::first_label(line, MAX_PREFIX_BYTES)?;
    let before = line[..at].trim_start_matches(['[', '<', '(', ' ']);
    let mut head = Head {
        label: Some(label),
        rest,
        ..Head::default()
    };
    let length = time_length(before);
    if length > 0 {
        head.field('m', &before[..length], zones);
    }
    let mut unknown = &before[length..];
    if length == 0
        && let Some(first) = unknown
            .split(' ')
            .next()
            .filter(|first| zones.is_epoch(first))
    {
        head.field('n', first, zones);
        unknown = &unknown[first.len()..];
    }
    let bracketed = unknown.split('[').skip(1).find_map(|part| {
        // A line number can follow: `[77-1]`.
        let inside = part.split(']').next()?;
        let (pid, line) = inside.split_once(['-', ':']).unwrap_or((inside, ""));
        let is_line = line.bytes().all(|byte| byte.is_ascii_digit());
        pid.parse::<i32>().ok().filter(|_| is_line)
    });
    let words = || {
        unknown
            .split([' ', ',', ';', '(', ')', '[', ']', '|'])
            .map(|word| word.trim_matches(':'))
            .filter(|word| !word.is_empty())
    };
    let mut bare = words().filter_map(|word| word.parse::<i32>().ok());
    head.origin.pid = bracketed.or_else(|| bare.next()).filter(|pid| *pid > 0);
    head.pid_is_guessed = bracketed.is_none();
    for word in words() {
        if let Some((key, value)) = word.split_once('=') {
            match key {
                "user" => head.field('u', value, zones),
                "db" | "database" => head.field('d', value, zones),
                "app" | "application" => head.field('a', value, zones),
                "pid" => {
                    head.field('p', value, zones);
                    head.pid_is_guessed = head.origin.pid.is_none();
                }
                _ => {}
            }
        } else if let Some((user, database)) = word.split_once('@')
            && head.origin.user.is_none()
        {
            head.field('u', user, zones);
            head.field('d', database, zones);
        }
    }
    Some(head)
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
    fn an_unknown_prefix_is_guessed() {
        let zones = TimeZones::default();
        for (line, expected) in [
            (
                "2026-01-31 12:34:56.789 UTC [77] app@shop LOG:  x",
                (Some(77), Some("app"), Some("shop"), None),
            ),
            (
                "2026-01-31 12:34:56 CET [77-1] user=app,db=shop,app=billing LOG:  x",
                (Some(77), Some("app"), Some("shop"), Some("billing")),
            ),
            (
                "2026-01-31 12:34:56 UTC:10.0.0.7(5555):app@shop:[77]: LOG:  x",
                (Some(77), Some("app"), Some("shop"), None),
            ),
            ("77 LOG:  x", (Some(77), None, None, None)),
            ("LOG:  x", (None, None, None, None)),
        ] {
            let head = guess(line, &zones).unwrap_or_else(|| panic!("{line}"));
            assert_eq!((head.rest, head.origin.pid), ("x", expected.0), "{line}");
            assert_eq!(fields(&head), expected, "{line}");
        }
        assert!(guess("nothing", &zones).is_none());
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
            guess(&labelled, &TimeZones::default());
        }
    }
}
