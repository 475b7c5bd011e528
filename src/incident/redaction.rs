//! Which redaction of statements may be shown.

use std::sync::Arc;

use crate::postgres::statement::{self, StatementKind};
use crate::postgres::text::{beginning, shortened};

/// Longer statements are cut.
const MAX_CHARS: usize = 4000;

/// Whether literals are shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Redaction {
    pub(super) literals: bool,
}

impl Redaction {
    pub(super) fn statement(self, sql: &str) -> Arc<str> {
        if self.literals || is_call(sql) {
            shortened(sql, MAX_CHARS).into()
        } else {
            shortened(&statement::redact(sql), MAX_CHARS).into()
        }
    }
}

/// Whether the text is a call of this crate that takes advisory locks, as it is logged: `advisory_lock("invoice:42")`.
/// Its only data is keys.
pub(super) fn is_call(text: &str) -> bool {
    let name = text.split_once('(').map_or("", |(name, _)| name);
    name.contains("advisory_lock")
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_'))
        && !name.starts_with("pg_")
}

/// The fingerprint of a statement, equal whether its text comes from the client's log or from the server.
pub(super) fn fingerprint(sql: &str) -> statement::StatementFingerprint {
    // The keys are data, and the SQL that is sent depends on the waits before.
    if is_call(sql) || statement::kind(sql) == StatementKind::AdvisoryLock {
        return statement::fingerprint("advisory_lock");
    }
    statement::fingerprint(as_server_keeps(sql))
}

/// The beginning of a statement that the server keeps by default (`track_activity_query_size`).
fn as_server_keeps(sql: &str) -> &str {
    const KEPT_BYTES: usize = 1023;
    beginning(sql, KEPT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_compared_as_the_server_keeps_it() {
        let long = "é".repeat(600);
        assert_eq!(as_server_keeps(&long).len(), 1022);
        assert_eq!(as_server_keeps("SELECT 1"), "SELECT 1");
    }

    #[test]
    fn calls_are_distinguished_from_statements() {
        let redacted = Redaction { literals: false };
        for call in [
            "advisory_lock(42)",
            "try_advisory_lock(\"a'b\")",
            "advisory_locks((1, 2) and 2 more)",
        ] {
            assert!(is_call(call), "{call}");
            assert_eq!(&*redacted.statement(call), call);
            assert_eq!(fingerprint(call), fingerprint("advisory_lock(7)"));
        }
        for sql in [
            "SELECT advisory_lock(42)",
            "pg_advisory_lock(42)",
            "SELECT pg_advisory_lock('advisory_lock(')",
            "advisory_lock",
            "ADVISORY_LOCK(1)",
            "",
        ] {
            assert!(!is_call(sql), "{sql}");
        }
        assert_eq!(
            fingerprint("advisory_lock(42)"),
            fingerprint("SAVEPOINT a; SELECT pg_catalog.pg_advisory_xact_lock(42); RELEASE a")
        );
        assert_ne!(fingerprint("advisory_lock(42)"), fingerprint("SELECT 42"));
    }
}
