//! The error for a text that is not a lock mode, and the comparison of such texts.

use std::fmt;

/// The error for a text that is not the name of a lock mode. Its message contains the text and the valid names.
///
/// # Examples
///
/// ```
/// use lockkeeper::LockMode;
///
/// let error = "ROW".parse::<LockMode>().unwrap_err();
/// assert!(error.to_string().starts_with(r#""ROW" is not a table lock mode; there are ACCESS SHARE, ROW SHARE, "#));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseModeError {
    text: String,
    wanted: &'static str,
    names: Vec<&'static str>,
}

impl ParseModeError {
    pub(super) fn new(
        text: &str,
        wanted: &'static str,
        names: impl IntoIterator<Item = &'static str>,
    ) -> Self {
        Self {
            text: text.to_owned(),
            wanted,
            names: names.into_iter().collect(),
        }
    }

    /// The text that is not a mode's name.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for ParseModeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not {}; there are {}",
            self.text,
            self.wanted,
            self.names.join(", ")
        )
    }
}

impl std::error::Error for ParseModeError {}

/// Whether two texts consist of the same words, compared as SQL keywords: ignoring case and white space.
pub(super) fn same_words(a: &str, b: &str) -> bool {
    a.split_whitespace()
        .map(str::to_ascii_uppercase)
        .eq(b.split_whitespace().map(str::to_ascii_uppercase))
}
