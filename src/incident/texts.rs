//! Statements as they may be shown.

use std::sync::Arc;

use crate::statement;

/// Longer statements are cut.
const MOST_CHARS: usize = 4000;

/// Whether literals may be shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Texts {
    pub(super) literals: bool,
}

impl Texts {
    pub(super) fn statement(self, sql: &str) -> Arc<str> {
        if self.literals {
            shortened(sql)
        } else {
            shortened(&statement::redact(sql))
        }
    }
}

fn shortened(text: &str) -> Arc<str> {
    match text.char_indices().nth(MOST_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}
