//! Splits lines whose prefix is unknown: finds the label, and recognizes the fields before it by their form.

use super::labels;
use super::prefix::{Head, MAX_PREFIX_BYTES, pid_of_session};
use super::time_zones::TimeZones;

/// The names that fields have in prefixes such as `user=%u,db=%d` or `sql_error_code = %e`.
const KEYS: [(char, &str); 6] = [
    ('u', "user|usr|username|user_name|role"),
    ('d', "db|database|dbname|datname|database_name"),
    ('a', "app|application|application_name|appname|client_app"),
    ('p', "pid|process|process_id|procpid"),
    (
        'e',
        "sql_error_code|sqlstate|sql_state|state_code|error_code|errcode|err|e",
    ),
    ('c', "session|session_id|sid"),
];

/// Splits a line whose prefix is unknown; `None` for a line without a label.
pub(super) fn guess<'a>(line: &'a str, zones: &TimeZones) -> Option<Head<'a>> {
    let (at, label, rest) = labels::first_label(line, MAX_PREFIX_BYTES)?;
    let mut head = Head {
        label: Some(label),
        rest,
        ..Head::default()
    };
    let mut before = line[..at].to_owned();
    if let Some((from, to)) = zones.find(&before) {
        head.field('m', &before[from..to], zones);
        before.replace_range(from..to, " ");
    } else if let Some(first) = before.split(' ').next().filter(|word| zones.is_epoch(word)) {
        head.field('n', first, zones);
        before = before[first.len()..].to_owned();
    }
    for (key, value) in pairs(&before) {
        let key = key.to_ascii_lowercase();
        let known = |names: &str| names.split('|').any(|name| name == key);
        if let Some((field, _)) = KEYS.iter().find(|(_, names)| known(names)) {
            // A word such as `e=` stands for other things, too.
            let is_code = value.len() == 5
                && value
                    .bytes()
                    .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
            if *field != 'e' || is_code {
                head.field(*field, value, zones);
            }
        }
    }
    let words = before
        .split([' ', ',', ';', '(', ')', '[', ']', '|'])
        .map(|word| word.trim_matches(':'));
    let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
    for (user, database) in words.iter().filter_map(|word| word.split_once('@')) {
        if head.origin.user.is_none() && !user.contains('=') {
            head.field('u', user, zones);
            head.field('d', database, zones);
        }
    }
    if head.origin.pid.is_none() {
        head.origin.pid = bracketed(&before, |inside| inside.parse().ok())
            .or_else(|| {
                let mut parts = before.split(|c: char| !(c.is_ascii_hexdigit() || c == '.'));
                parts.find_map(pid_of_session)
            })
            .filter(|pid| *pid > 0);
    }
    if head.origin.pid.is_none() {
        head.pid_is_guessed = true;
        // A line number can follow the process id: `[77-1]`. Or it is the line number: `[5-1]`.
        let numbered = bracketed(&before, |inside| {
            let (pid, line) = inside.split_once(['-', ':'])?;
            let is_line = !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_digit());
            pid.parse().ok().filter(|_| is_line)
        });
        let mut bare = words.iter().filter_map(|word| word.parse().ok());
        head.origin.pid = numbered.or_else(|| bare.next()).filter(|pid| *pid > 0);
    }
    Some(head)
}

fn bracketed(text: &str, read: impl Fn(&str) -> Option<i32>) -> Option<i32> {
    let mut parts = text.split('[').skip(1);
    parts.find_map(|part| read(part.split_once(']')?.0))
}

/// The pairs of `key=value`, `key = value` and `key="a value"`.
fn pairs(text: &str) -> Vec<(&str, &str)> {
    let is_key = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut pairs = Vec::new();
    let mut from = 0;
    while let Some(equals) = text[from..].find('=').map(|at| from + at) {
        let before = text[from..equals].trim_end_matches(' ');
        let key = before.rfind(|c| !is_key(c)).map_or(0, |at| {
            at + before[at..].chars().next().map_or(1, char::len_utf8)
        });
        let behind = text[equals + 1..].trim_start_matches(' ');
        let start = text.len() - behind.len();
        let (value, end) = match behind.strip_prefix('"') {
            Some(quoted) => {
                let length = quoted.find('"').unwrap_or(quoted.len());
                (&quoted[..length], start + 1 + length)
            }
            None => {
                let is_end = |c: char| matches!(c, ' ' | ',' | ';' | ')' | ']' | '|' | '>');
                let length = behind.find(is_end).unwrap_or(behind.len());
                (&behind[..length], start + length)
            }
        };
        if key < before.len() {
            pairs.push((&before[key..], value));
        }
        from = end.max(equals + 1);
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    type Fields<'a> = (
        Option<i32>,
        Option<&'a str>,
        Option<&'a str>,
        Option<&'a str>,
    );

    #[test]
    fn an_unknown_prefix_is_guessed() {
        let zones = TimeZones::default();
        let shop = |pid, app| -> Fields<'static> { (Some(pid), Some("app"), Some("shop"), app) };
        let cases: [(&str, Fields<'_>); 10] = [
            (
                "2026-01-31 12:34:56.789 UTC [77] app@shop LOG:  x",
                shop(77, None),
            ),
            (
                "2026-01-31 12:34:56 CET [77-1] user=app,db=shop,app=billing LOG:  x",
                shop(77, Some("billing")),
            ),
            (
                "2026-01-31 12:34:56 UTC:10.0.0.7(5555):app@shop:[77]: LOG:  x",
                shop(77, None),
            ),
            (
                "2026-01-31 12:34:56 UTC:2001:db8::1(5555):app@shop:[77]: LOG:  x",
                shop(77, None),
            ),
            ("[77]: [5-1] db=shop,user=app LOG:  x", shop(77, None)),
            (
                "sql_error_code = 40P01 time_ms = \"x\" pid=\"77\" database=\"shop\" user = \"app\" LOG:  x",
                shop(77, None),
            ),
            (
                "2026-01-31 12:34:56 UTC-6055d3a0.195-LOG:  x",
                (Some(0x195), None, None, None),
            ),
            ("77 LOG:  x", (Some(77), None, None, None)),
            ("LOG:  x", (None, None, None, None)),
            ("é=é=\"é LOG:  x", (None, None, None, None)),
        ];
        for (line, expected) in cases {
            let head = guess(line, &zones).unwrap_or_else(|| panic!("{line}"));
            let origin = &head.origin;
            let fields = (
                origin.pid,
                origin.user.as_deref(),
                origin.database.as_deref(),
                origin.application.as_deref(),
            );
            assert_eq!((head.rest, fields), ("x", expected), "{line}");
        }
        assert!(guess("nothing", &zones).is_none());
    }
}
