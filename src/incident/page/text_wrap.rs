//! Wraps text to lines of bounded width.

use super::super::wording;

/// In columns.
const WIDTH: usize = 100;

/// Text for a terminal: no line is wider than [`WIDTH`], and it has no characters that control a terminal.
#[derive(Debug, Default)]
pub(super) struct WrappedText(String);

impl WrappedText {
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// A paragraph. If it has to be wrapped, the following lines begin with `hang`.
    pub(super) fn write(&mut self, first: &str, hang: &str, text: &str) {
        let mut line = first.to_owned();
        let mut column = width(first);
        let indent = width(hang);
        let mut is_empty = true;
        for word in wording::printable(text)
            .split(' ')
            .filter(|word| !word.is_empty())
        {
            let mut rest = word;
            let space = usize::from(!is_empty);
            if !is_empty && column + space + width(word) > WIDTH {
                self.line(&line);
                line = hang.to_owned();
                column = indent;
            } else if !is_empty {
                line.push(' ');
                column += 1;
            }
            while column + width(rest) > WIDTH {
                let end = fitting(rest, WIDTH.saturating_sub(column).max(2));
                line.push_str(&rest[..end]);
                rest = &rest[end..];
                self.line(&line);
                line = hang.to_owned();
                column = indent;
            }
            line.push_str(rest);
            column += width(rest);
            is_empty = false;
        }
        self.line(&line);
    }

    /// Several lines, each a paragraph.
    pub(super) fn lines(&mut self, first: &str, hang: &str, text: &str) {
        for (at, line) in text.lines().enumerate() {
            self.write(if at == 0 { first } else { hang }, hang, line);
        }
    }

    pub(super) fn heading(&mut self, text: &str) {
        self.0.push('\n');
        self.write("", "  ", text);
    }

    fn line(&mut self, line: &str) {
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }
}

/// How many bytes of the text fit, at least one character.
fn fitting(text: &str, columns: usize) -> usize {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        used += columns_of(c);
        if used > columns && at > 0 {
            return at;
        }
    }
    text.len()
}

pub(super) fn width(text: &str) -> usize {
    text.chars().map(columns_of).sum()
}

/// An upper bound: Chinese, Japanese and Korean characters, and all others that may be as wide, count as two columns.
fn columns_of(c: char) -> usize {
    match c {
        '\u{fffd}' => 1,
        '\u{1100}'..='\u{115f}' | '\u{2e80}'.. => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(first: &str, hang: &str, text: &str) -> String {
        let mut wrapped = WrappedText::default();
        wrapped.write(first, hang, text);
        wrapped.0
    }

    #[test]
    fn lines_are_broken_between_words() {
        let text = written("  a: ", "     ", &"word ".repeat(40));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("  a: word") && lines[1].starts_with("     word"));
        assert!(
            lines
                .iter()
                .all(|line| line.len() <= 100 && line.ends_with("word"))
        );
        let long = written("", "  ", &"x".repeat(250));
        assert_eq!(
            long.lines().map(str::len).collect::<Vec<_>>(),
            [100, 100, 54]
        );
        assert_eq!(written("a", "b", ""), "a\n");
    }

    proptest! {
        #[test]
        fn no_line_is_wider(text in any::<String>(), word in "[a-zé表\u{202e}\n]{0,300}", hang in " {0,40}") {
            for text in [text, word] {
                let written = written(&hang, &hang, &text);
                prop_assert!(written.lines().all(|line| width(line) <= WIDTH), "{}", written);
                prop_assert!(!written.trim_end_matches('\n').contains(|c: char| c.is_control() && c != '\n'));
                let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).count();
                prop_assert_eq!(letters(&written), letters(&wording::printable(&text)));
            }
        }
    }
}
