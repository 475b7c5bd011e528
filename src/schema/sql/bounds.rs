//! What is known of a partition's rows before it is attached.

use std::fmt::Write as _;

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{is_true, literal, rows, text};

/// The key column of a partitioned table with a key of one column, and what a partition says of it. Reading constraints as
/// text takes ACCESS SHARE on the partition, for which it waits this many milliseconds.
pub(crate) fn checks(parent: u32, partition: u32, lock_timeout: i32) -> String {
    format!(
        "SET LOCAL lock_timeout = {lock_timeout}; \
         SELECT q.attname, q.attnotnull, pg_catalog.format_type(q.atttypid, NULL) AS type, \
         (SELECT pg_catalog.string_agg(pg_catalog.pg_get_constraintdef(k.oid), E'\\x01') FROM pg_catalog.pg_constraint AS k \
         WHERE k.conrelid OPERATOR(pg_catalog.=) q.attrelid AND k.contype OPERATOR(pg_catalog.=) 'c' AND k.convalidated) AS checks \
         FROM pg_catalog.pg_partitioned_table AS p \
         JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) p.partrelid \
         AND a.attnum OPERATOR(pg_catalog.=) p.partattrs[0] \
         JOIN pg_catalog.pg_attribute AS q ON q.attrelid OPERATOR(pg_catalog.=) '{partition}'::pg_catalog.oid \
         AND q.attname OPERATOR(pg_catalog.=) a.attname AND q.atttypid OPERATOR(pg_catalog.=) a.atttypid \
         WHERE p.partrelid OPERATOR(pg_catalog.=) '{parent}'::pg_catalog.oid \
         AND p.partnatts OPERATOR(pg_catalog.=) '1'::pg_catalog.int2 \
         AND (p.partstrat OPERATOR(pg_catalog.=) 'r' OR p.partstrat OPERATOR(pg_catalog.=) 'l')"
    )
}

#[derive(Debug)]
pub(crate) struct Checks {
    pub(crate) column: String,
    pub(crate) ty: String,
    pub(crate) is_not_null: bool,
    pub(crate) checks: Vec<String>,
}

pub(crate) fn read_checks(reply: &[SimpleQueryMessage]) -> Option<Checks> {
    let row = rows(reply).next()?;
    Some(Checks {
        column: text(row, "attname")?,
        ty: text(row, "type")?,
        is_not_null: is_true(row, "attnotnull"),
        checks: text(row, "checks")
            .map(|all| all.split('\u{1}').map(str::to_owned).collect())
            .unwrap_or_default(),
    })
}

/// Whether all of these comparisons of constants of a type are true. `ty` is the server's own text.
pub(crate) fn comparisons(ty: &str, all: &[(String, &'static str, String)]) -> String {
    let mut sql = "SELECT true".to_owned();
    for (left, operator, right) in all {
        // Infallible: writing to a String.
        let _ = write!(
            sql,
            " AND {}::{ty} OPERATOR(pg_catalog.{operator}) {}::{ty}",
            literal(left),
            literal(right)
        );
    }
    sql + " AS yes"
}
