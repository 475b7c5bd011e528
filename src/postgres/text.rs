//! Texts that are shown: cut to a length, and one after another.

#[cfg(feature = "incidents")]
use std::borrow::Cow;
#[cfg(feature = "incidents")]
use std::fmt;

/// The first characters of a text, of no more than this many bytes.
pub(crate) fn beginning(text: &str, max_bytes: usize) -> &str {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The text; cut after this many characters, with `…` in place of the rest.
#[cfg(feature = "incidents")]
pub(crate) fn shortened(text: &str, max_chars: usize) -> Cow<'_, str> {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

/// The items, with the text between them.
#[cfg(feature = "incidents")]
pub(crate) struct Joined<'a, T>(pub(crate) &'a [T], pub(crate) &'static str);

#[cfg(feature = "incidents")]
impl<T: fmt::Display> fmt::Display for Joined<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if at > 0 { self.1 } else { "" })?;
        }
        Ok(())
    }
}
