//! Splits a script into statements as `psql` does.

/// The statements of a script. Lines that are commands of `psql` are left out, as is the data of COPY … FROM STDIN.
#[must_use]
pub fn statements(script: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut text = String::new();
    let mut state = State::default();
    let mut lines = script.lines();
    while let Some(line) = lines.next() {
        let is_command = line.trim_start().starts_with('\\');
        if is_command && state.is_plain() && (text.trim().is_empty() || line.starts_with('\\')) {
            continue;
        }
        let mut rest = line;
        while let Some(end) = state.end_of_statement(rest) {
            text.push_str(&rest[..end]);
            rest = rest[end..].strip_prefix(';').unwrap_or("");
            let statement = std::mem::take(&mut text);
            state = State::default();
            let copies = is_copy_from_stdin(&statement);
            if !is_blank(&statement) {
                all.push(statement.trim().to_owned());
            }
            if copies {
                // The data ends with a line of its own.
                lines.by_ref().find(|line| *line == "\\.");
                rest = "";
            }
        }
        text.push_str(rest);
        text.push('\n');
    }
    if !is_blank(&text) {
        all.push(text.trim().to_owned());
    }
    all
}

fn is_blank(text: &str) -> bool {
    (text.lines()).all(|line| line.trim().is_empty() || line.trim_start().starts_with("--"))
}

fn is_copy_from_stdin(statement: &str) -> bool {
    let lower = statement.to_lowercase();
    let words: Vec<&str> = lower.split_whitespace().collect();
    words.first() == Some(&"copy") && words.windows(2).any(|pair| pair == ["from", "stdin"])
}

/// The position in the text of a statement.
#[derive(Debug, Default)]
struct State {
    /// The text that ends the string, quoted name or dollar-quoted string here.
    closing: Option<String>,
    escapes: bool,
    comments: usize,
    parentheses: usize,
    atomic: usize,
    words: [String; 2],
}

impl State {
    fn is_plain(&self) -> bool {
        self.closing.is_none() && self.comments == 0
    }

    /// The position of the semicolon, or of the command of `psql`, that ends the statement in this line.
    fn end_of_statement(&mut self, line: &str) -> Option<usize> {
        let bytes = line.as_bytes();
        let mut at = 0;
        while at < line.len() {
            let rest = &line[at..];
            if self.comments > 0 {
                at += match rest {
                    _ if rest.starts_with("*/") => {
                        self.comments -= 1;
                        2
                    }
                    _ if rest.starts_with("/*") => {
                        self.comments += 1;
                        2
                    }
                    _ => width(rest),
                };
                continue;
            }
            if let Some(closing) = &self.closing {
                if self.escapes && rest.starts_with('\\') {
                    at += 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
                } else if rest.starts_with(closing.as_str()) {
                    at += closing.len();
                    self.closing = None;
                    self.escapes = false;
                } else {
                    at += width(rest);
                }
                continue;
            }
            match bytes[at] {
                b'-' if rest.starts_with("--") => return None,
                b'/' if rest.starts_with("/*") => {
                    self.comments = 1;
                    at += 2;
                }
                b'\'' => {
                    self.escapes = at > 0 && matches!(bytes[at - 1], b'e' | b'E');
                    self.closing = Some("'".to_owned());
                    at += 1;
                }
                b'"' => {
                    self.closing = Some("\"".to_owned());
                    at += 1;
                }
                b'$' => {
                    let end = rest[1..].find('$').map(|end| end + 2);
                    let tag = end.map(|end| &rest[..end]).filter(|tag| {
                        (tag[1..tag.len() - 1].chars()).all(|c| c.is_alphanumeric() || c == '_')
                            && !tag[1..].starts_with(|c: char| c.is_ascii_digit())
                    });
                    at += tag.map_or(1, str::len);
                    self.closing = tag.map(str::to_owned);
                }
                b'(' => {
                    self.parentheses += 1;
                    at += 1;
                }
                b')' => {
                    self.parentheses = self.parentheses.saturating_sub(1);
                    at += 1;
                }
                b';' if self.parentheses == 0 && self.atomic == 0 => return Some(at),
                b'\\' => return Some(at),
                byte if byte.is_ascii_alphabetic() || byte == b'_' => {
                    let length = rest
                        .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$'))
                        .unwrap_or(rest.len());
                    self.word(&rest[..length]);
                    at += length;
                }
                _ => at += width(rest),
            }
        }
        None
    }

    fn word(&mut self, word: &str) {
        let word = word.to_lowercase();
        match word.as_str() {
            "atomic" if self.words[1] == "begin" => self.atomic = 1,
            "case" if self.atomic > 0 => self.atomic += 1,
            "end" if self.atomic > 0 => self.atomic -= 1,
            _ => {}
        }
        self.words.swap(0, 1);
        self.words[1] = word;
    }
}

fn width(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}

#[cfg(test)]
mod tests {
    use super::statements;

    #[test]
    fn a_script_is_split_as_psql_splits_it() {
        let script = "\\set x 1\n-- nothing;\nSELECT ';' AS a\\gset\nCREATE RULE r AS ON DELETE TO t DO (SELECT 1; SELECT 2);\n\
                      COPY t FROM stdin;\n1\t;\n\\.\nDO $a$ BEGIN; END $a$; DROP TABLE \"a;b\" /* ; */;\nSELECT E'\\';'";
        assert_eq!(
            statements(script),
            [
                "-- nothing;\nSELECT ';' AS a",
                "CREATE RULE r AS ON DELETE TO t DO (SELECT 1; SELECT 2)",
                "COPY t FROM stdin",
                "DO $a$ BEGIN; END $a$",
                "DROP TABLE \"a;b\" /* ; */",
                "SELECT E'\\';'",
            ]
        );
    }
}
