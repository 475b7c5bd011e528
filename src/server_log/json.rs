//! The format `jsonlog`: one object per line.

use std::str::Chars;

use super::entry::{Entry, Origin};
use super::time_zones::TimeZones;

/// The server writes no nested values, so a deeply nested line is not the server's.
const MAX_DEPTH: usize = 32;

/// Reads a line, given without its line end.
pub(super) fn line(line: &str, zones: &TimeZones) -> Option<Entry> {
    let mut entry = Entry {
        // Messages that are not errors have no SQLSTATE (`write_jsonlog` in PostgreSQL's
        // `src/backend/utils/error/jsonlog.c`).
        is_error: Some(false),
        ..Entry::default()
    };
    let mut reader = JsonReader {
        chars: line.chars(),
    };
    reader.object(&mut |key, value| {
        let Value { text, is_text } = value;
        let known = Some(text).filter(|text| !text.is_empty());
        let Entry { origin, .. } = &mut entry;
        match (key, is_text) {
            ("timestamp", true) => origin.time_text = known,
            ("user", true) => origin.user = known,
            ("dbname", true) => origin.database = known,
            ("application_name", true) => origin.application = known,
            ("pid", false) => origin.pid = known.and_then(|pid| pid.parse().ok()),
            ("query_id", false) => {
                let id = known.and_then(|id| id.parse().ok());
                origin.query_id = id.filter(|id| *id != 0);
            }
            ("state_code", true) => entry.sqlstate = known,
            ("message", true) => entry.message = known.unwrap_or_default(),
            ("detail", true) => entry.detail = known.unwrap_or_default(),
            ("context", true) => entry.context = known.unwrap_or_default(),
            ("statement", true) => entry.statement = known.unwrap_or_default(),
            _ => {}
        }
    })?;
    let Origin {
        time, time_text, ..
    } = &mut entry.origin;
    *time = time_text.as_deref().and_then(|text| zones.time(text));
    Some(entry)
}

#[derive(Debug, Default)]
struct Value {
    text: String,
    is_text: bool,
}

struct JsonReader<'a> {
    chars: Chars<'a>,
}

impl JsonReader<'_> {
    /// Reads a whole line; `None` if it is not an object.
    fn object(&mut self, field: &mut dyn FnMut(&str, Value)) -> Option<()> {
        self.members(0, field)?;
        self.blanks();
        self.chars.as_str().is_empty().then_some(())
    }

    fn members(&mut self, depth: usize, field: &mut dyn FnMut(&str, Value)) -> Option<()> {
        self.expect('{')?;
        if self.next_if('}') {
            return Some(());
        }
        loop {
            self.expect('"')?;
            let key = self.string()?;
            self.expect(':')?;
            let value = self.value(depth + 1)?;
            field(&key, value);
            if self.next_if('}') {
                return Some(());
            }
            self.expect(',')?;
        }
    }

    /// Reads a value. Arrays and objects are skipped.
    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.blanks();
        match self.chars.clone().next()? {
            '"' => {
                self.chars.next();
                Some(Value {
                    text: self.string()?,
                    is_text: true,
                })
            }
            '{' => {
                self.members(depth, &mut |_, _| {})?;
                Some(Value::default())
            }
            '[' => {
                self.chars.next();
                if self.next_if(']') {
                    return Some(Value::default());
                }
                loop {
                    self.value(depth + 1)?;
                    if self.next_if(']') {
                        return Some(Value::default());
                    }
                    self.expect(',')?;
                }
            }
            _ => {
                let rest = self.chars.as_str();
                let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
                let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                self.chars = rest[end..].chars();
                (end > 0).then(|| Value {
                    text: rest[..end].to_owned(),
                    is_text: false,
                })
            }
        }
    }

    /// Reads a string whose opening quote has been read.
    fn string(&mut self) -> Option<String> {
        let mut text = String::new();
        loop {
            match self.chars.next()? {
                '"' => return Some(text),
                '\\' => text.push(self.escape()?),
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        Some(match self.chars.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => {
                let first = self.hex()?;
                if !(0xd800..0xdc00).contains(&first) {
                    return Some(char::from_u32(first).unwrap_or('\u{fffd}'));
                }
                // The first half of a surrogate pair.
                let before = self.chars.clone();
                let second = match (self.chars.next(), self.chars.next()) {
                    (Some('\\'), Some('u')) => self.hex()?,
                    _ => 0,
                };
                if (0xdc00..0xe000).contains(&second) {
                    let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                    char::from_u32(code)?
                } else {
                    self.chars = before;
                    '\u{fffd}'
                }
            }
            c @ ('"' | '\\' | '/') => c,
            _ => return None,
        })
    }

    fn hex(&mut self) -> Option<u32> {
        let mut code = 0;
        for _ in 0..4 {
            code = code * 16 + self.chars.next()?.to_digit(16)?;
        }
        Some(code)
    }

    fn blanks(&mut self) {
        let rest = self.chars.as_str();
        self.chars = rest.trim_start_matches([' ', '\t', '\r', '\n']).chars();
    }

    fn next_if(&mut self, expected: char) -> bool {
        self.blanks();
        let found = self.chars.clone().next() == Some(expected);
        if found {
            self.chars.next();
        }
        found
    }

    fn expect(&mut self, expected: char) -> Option<()> {
        self.next_if(expected).then_some(())
    }
}
