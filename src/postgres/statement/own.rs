//! Which statements are this crate's own, and not the application's.

use crate::postgres::sql::{OWN, PROBE, QUESTION};

/// Whether a text was sent by this crate of its own accord: `BEGIN` with its settings, a savepoint, a probe.
pub(crate) fn is_own(sql: &str) -> bool {
    let has = |mark: &&str| sql.contains(*mark);
    sql == PROBE || QUESTION.iter().all(has) || OWN.iter().any(has)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_applications_statements_are_not_ours() {
        for sql in [
            "SELECT 1",
            "SELECT pg_backend_pid() AS pid",
            "SAVEPOINT a",
            "UPDATE lockkeeper_migration SET key = 'lockkeeper'",
            "SELECT pg_advisory_unlock(1)",
            "SELECT relname FROM pg_catalog.pg_class WHERE oid = 1",
        ] {
            assert!(!is_own(sql), "{sql}");
        }
        for sql in [
            "SELECT",
            "BEGIN; EXECUTE lockkeeper_00_1_b8('a')",
            "ROLLBACK TO SAVEPOINT lockkeeper_1",
            "SELECT 1 FROM pg_catalog.pg_locks AS l WHERE l.pid OPERATOR(pg_catalog.=) 7",
        ] {
            assert!(is_own(sql), "{sql}");
        }
    }
}
