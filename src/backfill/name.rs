//! What a backfill is called.

use crate::key::LockKey;
use crate::postgres::statement::redact;

/// Bytes of a name.
pub(super) const MOST_NAME: usize = 200;

/// What a backfill is called that was given no name: what it does, without the literals, since names are shown in errors
/// and logs; and with a number, where that does not say it all.
pub(super) fn name_of(definition: &str) -> String {
    let shown = redact(definition);
    if shown == definition && shown.len() <= MOST_NAME {
        return shown;
    }
    let number = LockKey::from(definition);
    let mut end = shown.len().min(MOST_NAME - 24);
    while !shown.is_char_boundary(end) {
        end -= 1;
    }
    let cut = if end < shown.len() { "…" } else { "" };
    format!(
        "{}{cut} {:08x}{:08x}",
        &shown[..end],
        number.classid(),
        number.objid()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_definitions_make_names_of_their_own() {
        assert_eq!(name_of("t (id) SET a = b"), "t (id) SET a = b");
        let long = |end: &str| name_of(&format!("{}{end}", "é".repeat(200)));
        assert!(long("a").len() <= MOST_NAME, "{}", long("a"));
        assert_ne!(long("a"), long("b"));
    }

    #[test]
    fn names_show_no_literals() {
        let name = |literal: &str| name_of(&format!("t (id) SET a = {literal} WHERE b = c"));
        let (secret, other) = (name("'secret'"), name("'other'"));
        assert!(
            secret.starts_with("t (id) SET a = ? WHERE b = c "),
            "{secret}"
        );
        assert_ne!(secret, other);
        assert_eq!(secret, name("'secret'"));
    }
}
