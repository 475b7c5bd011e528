//! Which statements are this crate's own, and not the application's.

use crate::postgres::sql::PROBE;

/// What only this crate's messages have in them: names that begin with its own, and columns that it asks for when it begins,
/// locks and commits. The server keeps the beginning of a text only, so one of them has to be near it.
const MARKS: [&str; 8] = [
    "EXECUTE lockkeeper_",
    "PREPARE lockkeeper_",
    "SAVEPOINT lockkeeper_",
    "$lockkeeper$",
    "'lockkeeper.",
    "pg_catalog.pg_backend_pid() AS pid",
    "pg_catalog.statement_timestamp()) AS fresh",
    "pg_catalog.pg_advisory_unlock",
];

/// Whether a text was sent by this crate of its own accord: `BEGIN` with its settings, a savepoint, a probe.
pub(crate) fn is_own(sql: &str) -> bool {
    // Its questions about the server name every operator by its schema, which nobody else does.
    let asks = sql.contains("FROM pg_catalog.pg_") && sql.contains("OPERATOR(pg_catalog.");
    sql == PROBE || asks || MARKS.iter().any(|mark| sql.contains(mark))
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
