//! Name patterns with shell wildcards.

use std::sync::Arc;

/// A pattern in which `*` matches any characters and `?` any one character. It is case-insensitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    text: Arc<str>,
    folded: Vec<char>,
}

impl Pattern {
    pub(super) fn new(text: &str) -> Self {
        Self {
            text: text.into(),
            folded: fold(text),
        }
    }

    /// The pattern as it was given.
    pub(super) fn text(&self) -> &Arc<str> {
        &self.text
    }

    pub(super) fn matches(&self, name: &str) -> bool {
        let (pattern, name) = (&self.folded, fold(name));
        let (mut pattern_at, mut name_at) = (0, 0);
        // The position of the last star, and how much of the name it matches. On a mismatch behind it, it matches one
        // character more. Only the last star has to be retried, so the cost is at most the product of the lengths.
        let mut star: Option<(usize, usize)> = None;
        while name_at < name.len() {
            match pattern.get(pattern_at) {
                Some('*') => {
                    star = Some((pattern_at, name_at));
                    pattern_at += 1;
                }
                Some(c) if *c == '?' || *c == name[name_at] => {
                    pattern_at += 1;
                    name_at += 1;
                }
                _ => match &mut star {
                    Some((before, taken)) => {
                        *taken += 1;
                        pattern_at = *before + 1;
                        name_at = *taken;
                    }
                    None => return false,
                },
            }
        }
        pattern[pattern_at..].iter().all(|c| *c == '*')
    }
}

fn fold(text: &str) -> Vec<char> {
    text.chars().flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_question_marks() {
        for (pattern, name, expected) in [
            ("pg_dump", "pg_dump", true),
            ("pg_dump", "pg_dumpall", false),
            ("pg_dump*", "pg_dumpall", true),
            ("*migrat*", "App DB-Migrations 3", true),
            ("*migrat*", "immigrant", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("", "", true),
            ("", "x", false),
            ("*", "", true),
            ("**a*b**", "xaxxabx", true),
            ("*ab", "aab", true),
            ("?ä*", "XÄ", true),
        ] {
            assert_eq!(
                Pattern::new(pattern).matches(name),
                expected,
                "{pattern} {name}"
            );
        }
        let hard = Pattern::new(&"a*".repeat(500));
        assert!(!hard.matches(&format!("{}b", "a".repeat(499))));
    }
}
