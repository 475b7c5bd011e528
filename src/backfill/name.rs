//! The default name of a backfill.

use crate::key::LockKey;
use crate::postgres::statement::redact;
use crate::postgres::text::beginning;

/// The maximum length of a name.
pub(super) const MAX_NAME_BYTES: usize = 200;

/// The name of a backfill that was given none: its definition without the literals, because names are shown in errors
/// and logs. If that is not the whole definition, a hash follows.
pub(super) fn default_name(definition: &str) -> String {
    let shown = redact(definition);
    if shown == definition && shown.len() <= MAX_NAME_BYTES {
        return shown;
    }
    let hash = LockKey::from(definition);
    let begin = beginning(&shown, MAX_NAME_BYTES - 24);
    let cut = if begin.len() < shown.len() { "…" } else { "" };
    let (high, low) = (hash.classid(), hash.objid());
    format!("{begin}{cut} {high:08x}{low:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_definitions_have_distinct_names() {
        assert_eq!(default_name("t (id) SET a = b"), "t (id) SET a = b");
        let long = |end: &str| default_name(&format!("{}{end}", "é".repeat(200)));
        assert!(long("a").len() <= MAX_NAME_BYTES, "{}", long("a"));
        assert_ne!(long("a"), long("b"));
    }

    #[test]
    fn names_contain_no_literals() {
        let name = |literal: &str| default_name(&format!("t (id) SET a = {literal} WHERE b = c"));
        let (secret, other) = (name("'secret'"), name("'other'"));
        assert!(
            secret.starts_with("t (id) SET a = ? WHERE b = c "),
            "{secret}"
        );
        assert_ne!(secret, other);
        assert_eq!(secret, name("'secret'"));
    }
}
