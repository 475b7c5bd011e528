//! Locking rows in the order of their keys.

use crate::mode::RowLock;
use crate::postgres::TableName;
use crate::postgres::sql::identifier;

/// What to do about a row that somebody else has locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Busy {
    Wait,
    NoWait,
    SkipLocked,
}

/// Locks the rows whose keys are among those of the array `$1`, and gives the place in it of each that was locked,
/// counted from 1 and in the order of the keys.
///
/// The locks are taken above the sort (`LockRows` over `Sort` or an index scan; test
/// `lock_rows::rows_are_locked_in_the_order_of_their_keys`). They are not joined with the ids in the same query level:
/// the join may read the table's rows in any order.
pub(crate) fn lock(table: &TableName, key: &str, mode: RowLock, busy: Busy) -> String {
    let key = identifier(key);
    let busy = match busy {
        Busy::Wait => "",
        Busy::NoWait => " NOWAIT",
        Busy::SkipLocked => " SKIP LOCKED",
    };
    format!(
        "WITH locked AS MATERIALIZED (SELECT t.{key} AS key FROM {table} AS t \
         WHERE t.{key} OPERATOR(pg_catalog.=) ANY ($1) ORDER BY t.{key} {mode} OF t{busy}) \
         SELECT pg_catalog.min(i.place) AS place FROM locked AS l \
         JOIN ROWS FROM (pg_catalog.unnest($1)) WITH ORDINALITY AS i (key, place) \
         ON l.key OPERATOR(pg_catalog.=) i.key GROUP BY l.key ORDER BY l.key"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        let sql = lock(
            &TableName::from(("a\"b", "c")),
            "K\"",
            RowLock::Update,
            Busy::NoWait,
        );
        assert!(sql.contains("FROM \"a\"\"b\".\"c\" AS t"), "{sql}");
        assert!(
            sql.contains("ORDER BY t.\"K\"\"\" FOR UPDATE OF t NOWAIT)"),
            "{sql}"
        );
    }
}
