//! Which right a role lacks.

use std::borrow::Cow;

use tokio_postgres::error::{DbError, SqlState};

use super::cause::printable;

/// What lets a role know who holds which lock, and who waits.
pub(crate) const READ_LOCKS: &str = "GRANT SELECT ON pg_locks";

/// What this crate reads that is every role's by default, and how a role is given it back, in each database by itself.
const GRANTS: [(&str, &str); 4] = [
    ("pg_locks", READ_LOCKS),
    (
        "pg_control_system",
        "GRANT EXECUTE ON FUNCTION pg_control_system()",
    ),
    ("pg_stat_activity", "GRANT SELECT ON pg_stat_activity"),
    ("pg_prepared_xacts", "GRANT SELECT ON pg_prepared_xacts"),
];

/// The right that the role lacks, as far as the server's error tells.
///
/// The message is translated, but not the names in it: what this crate reads is found in every language. Any other object is
/// found in English only.
pub(super) fn missing(error: &DbError) -> Option<Cow<'static, str>> {
    if *error.code() != SqlState::INSUFFICIENT_PRIVILEGE {
        return None;
    }
    let message = error.message();
    let mut words = message.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let known = words.find_map(|word| GRANTS.iter().find(|(name, _)| *name == word));
    if let Some((_, grant)) = known {
        return Some(Cow::Borrowed(grant));
    }
    // Only the server's own check names an object (PostgreSQL's `src/backend/catalog/aclchk.c`).
    let is_own = error
        .routine()
        .is_some_and(|name| name.starts_with("aclcheck_error"));
    is_own.then(|| of_object(message)).flatten().map(Cow::Owned)
}

/// `permission denied for schema public`, `must be owner of table t`.
fn of_object(message: &str) -> Option<String> {
    if let Some(object) = message.strip_prefix("must be owner of ") {
        return Some(format!("the ownership of {}", printable(object)));
    }
    let object = printable(message.strip_prefix("permission denied for ")?);
    let rights = match object.split(' ').next()? {
        "schema" => "USAGE or CREATE",
        "table" | "view" | "relation" | "column" => "SELECT, INSERT, UPDATE or DELETE",
        "sequence" => "USAGE",
        "function" | "procedure" | "aggregate" | "routine" => "EXECUTE",
        "database" => "CONNECT, CREATE or TEMPORARY",
        _ => "USAGE",
    };
    Some(format!("a right on {object} (GRANT {rights})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_named() {
        for (message, expected) in [
            (
                "permission denied for schema public",
                Some("a right on schema public (GRANT USAGE or CREATE)"),
            ),
            (
                "permission denied for function f",
                Some("a right on function f (GRANT EXECUTE)"),
            ),
            ("must be owner of table t", Some("the ownership of table t")),
            ("keine Berechtigung für Schema public", None),
        ] {
            assert_eq!(of_object(message).as_deref(), expected);
        }
    }
}
