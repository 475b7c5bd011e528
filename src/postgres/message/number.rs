//! Numbers in a message. The server formats them the same way in every language.

use std::ops::Range;

/// A run of ASCII digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Number {
    pub(super) at: Range<usize>,
    /// `None` if it is too large for any number that the server writes.
    pub(super) value: Option<u32>,
}

/// All numbers of a text, in order.
pub(super) fn numbers(text: &str) -> Vec<Number> {
    let mut numbers = Vec::new();
    let mut from = 0;
    while let Some(start) = text[from..].find(|c: char| c.is_ascii_digit()) {
        let start = from + start;
        let end = text[start..]
            .find(|c: char| !c.is_ascii_digit())
            .map_or(text.len(), |length| start + length);
        numbers.push(Number {
            at: start..end,
            value: text[start..end].parse().ok(),
        });
        from = end;
    }
    numbers
}

/// Whether only a comma is between the two numbers, as in `(0,9)`; some languages put a space after it.
pub(super) fn is_pair(text: &str, first: &Number, second: &Number) -> bool {
    text[first.at.end..second.at.start].trim_end() == ","
}
