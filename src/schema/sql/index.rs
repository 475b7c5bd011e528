//! Queries of a table's indexes and their builds, and the statements that build and drop indexes.

use tokio_postgres::SimpleQueryMessage;

use super::catalog::with_t;
use super::columns;
use crate::postgres::sql::{identifier, is_true, literal, parsed, rows, text};
use crate::postgres::table_name::TableName;

/// One column of an index: a quoted name, or the caller's SQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) sql: String,
    /// The column's name; `None` for an expression.
    pub(crate) column: Option<String>,
}

impl Part {
    pub(crate) fn column(name: &str) -> Self {
        Self {
            sql: identifier(name),
            column: Some(name.to_owned()),
        }
    }

    pub(crate) fn expression(sql: &str) -> Self {
        Self {
            sql: format!("({sql}\n)"),
            column: None,
        }
    }
}

/// The definition of an index to build.
#[derive(Clone, Debug, Default)]
pub(crate) struct IndexDefinition {
    pub(crate) name: String,
    pub(crate) unique: bool,
    pub(crate) method: Option<String>,
    pub(crate) parts: Vec<Part>,
    pub(crate) include: Vec<String>,
    pub(crate) predicate: Option<String>,
}

impl IndexDefinition {
    /// Whether the definition has more than column names.
    pub(crate) fn has_sql(&self) -> bool {
        let plain =
            |part: &Part| (part.column.as_deref()).is_some_and(|name| part.sql == identifier(name));
        self.predicate.is_some() || !self.include.is_empty() || !self.parts.iter().all(plain)
    }

    fn sql(&self, how: &str, on: &str, table: &TableName) -> String {
        let unique = if self.unique { "UNIQUE " } else { "" };
        let method = match &self.method {
            Some(method) => format!(" USING {}", identifier(method)),
            None => String::new(),
        };
        let parts: Vec<_> = self.parts.iter().map(|part| part.sql.as_str()).collect();
        let include = if self.include.is_empty() {
            String::new()
        } else {
            format!(" INCLUDE ({})", columns(&self.include))
        };
        // The line break ends a comment at the end of the caller's text.
        let predicate = match &self.predicate {
            Some(predicate) => format!(" WHERE ({predicate}\n)"),
            None => String::new(),
        };
        format!(
            "CREATE {unique}INDEX {how}{} ON {on}{table}{method} ({}){include}{predicate}",
            identifier(&self.name),
            parts.join(", ")
        )
    }

    pub(crate) fn concurrently(&self, table: &TableName) -> String {
        self.sql("CONCURRENTLY ", "", table)
    }

    /// The index of a partitioned table alone. It is invalid until an index of each partition is attached.
    pub(crate) fn on_only(&self, table: &TableName) -> String {
        self.sql("", "ONLY ", table)
    }
}

pub(crate) fn drop_concurrently(index: &TableName) -> String {
    format!("DROP INDEX CONCURRENTLY IF EXISTS {index}")
}

pub(crate) fn drop_plainly(index: &TableName) -> String {
    format!("DROP INDEX IF EXISTS {index}")
}

/// Whether an index is the same as the definition would build. It builds the definition on an empty temporary table
/// that the transaction drops: expressions, predicates, operator classes and orders are the caller's SQL, which only
/// the server can parse.
///
/// It blocks no other session, and waits only for a holder of ACCESS EXCLUSIVE on the table.
pub(crate) fn is_same(
    index: u32,
    wanted: &IndexDefinition,
    table: &TableName,
    lock_timeout: i32,
) -> String {
    let aside = TableName::in_schema("pg_temp", table.name());
    let shape = |of: &str| {
        format!(
            "SELECT pg_catalog.concat_ws(pg_catalog.chr(10), pg_catalog.pg_get_expr(x.indexprs, x.indrelid), \
             'WHERE', pg_catalog.pg_get_expr(x.indpred, x.indrelid), x.indoption, x.indclass, x.indcollation, \
             (SELECT pg_catalog.string_agg(a.attname::pg_catalog.text, pg_catalog.chr(10) \
             ORDER BY k.place USING OPERATOR(pg_catalog.<)) \
             FROM pg_catalog.unnest(x.indkey) WITH ORDINALITY AS k (attnum, place) \
             JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) x.indrelid \
             AND a.attnum OPERATOR(pg_catalog.=) k.attnum AND a.attnum OPERATOR(pg_catalog.>) 0)) \
             FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS c ON c.oid OPERATOR(pg_catalog.=) x.indexrelid \
             WHERE {of}"
        )
    };
    format!(
        "SET LOCAL lock_timeout = {lock_timeout}; CREATE TEMPORARY TABLE {} (LIKE {table}) ON COMMIT DROP; {}; \
         SELECT COALESCE(pg_catalog.texteq(({}), ({})), false) AS yes",
        identifier(table.name()),
        wanted.sql("", "", &aside),
        shape(&format!(
            "c.oid OPERATOR(pg_catalog.=) '{index}'::pg_catalog.oid"
        )),
        shape(&format!(
            "c.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name \
             AND c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()",
            literal(&wanted.name)
        ))
    )
}

/// Renames an index if it has that oid. Otherwise the division fails, and the batch with it.
pub(crate) fn rename_if(index: &TableName, name: &str, oid: u32) -> String {
    format!(
        "ALTER INDEX {index} RENAME TO {}; SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FROM pg_catalog.pg_class AS c \
         WHERE c.oid OPERATOR(pg_catalog.=) '{oid}'::pg_catalog.oid AND c.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name",
        identifier(name),
        literal(name)
    )
}

pub(crate) fn attach(parent: &TableName, index: &TableName) -> String {
    format!("ALTER INDEX {parent} ATTACH PARTITION {index}")
}

/// An index of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    pub(crate) oid: u32,
    pub(crate) name: String,
    pub(crate) is_partitioned: bool,
    pub(crate) is_valid: bool,
    pub(crate) is_unique: bool,
    pub(crate) has_predicate: bool,
    pub(crate) method: String,
    /// The columns of the key, `None` for expressions.
    pub(crate) key: Vec<Option<String>>,
    pub(crate) included: usize,
    /// The index of the parent that it is attached to.
    pub(crate) attached_to: Option<u32>,
}

/// The indexes of a table.
pub(crate) fn indexes_of(oid: u32) -> String {
    format!(
        "SELECT i.oid, i.relname, i.relkind, x.indisvalid AND x.indisready AND x.indislive AS valid, x.indisunique, \
         x.indpred IS NOT NULL AS predicate, am.amname, \
         x.indnatts OPERATOR(pg_catalog.-) x.indnkeyatts AS included, \
         (SELECT h.inhparent FROM pg_catalog.pg_inherits AS h WHERE h.inhrelid OPERATOR(pg_catalog.=) i.oid) AS parent, \
         (SELECT pg_catalog.string_agg(COALESCE('c' OPERATOR(pg_catalog.||) a.attname::pg_catalog.text, 'e'), \
         pg_catalog.chr(10) ORDER BY k.place USING OPERATOR(pg_catalog.<)) \
         FROM pg_catalog.unnest(x.indkey) WITH ORDINALITY AS k (attnum, place) \
         LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) x.indrelid \
         AND a.attnum OPERATOR(pg_catalog.=) k.attnum WHERE k.place OPERATOR(pg_catalog.<=) x.indnkeyatts) AS key \
         FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS i ON i.oid OPERATOR(pg_catalog.=) x.indexrelid \
         JOIN pg_catalog.pg_am AS am ON am.oid OPERATOR(pg_catalog.=) i.relam \
         WHERE x.indrelid OPERATOR(pg_catalog.=) '{oid}'::pg_catalog.oid"
    )
}

pub(crate) fn read_indexes(reply: &[SimpleQueryMessage]) -> Vec<Index> {
    let read = |row| {
        let key = text(row, "key")?;
        Some(Index {
            oid: parsed(row, "oid")?,
            name: text(row, "relname")?,
            is_partitioned: text(row, "relkind")? == "I",
            is_valid: is_true(row, "valid"),
            is_unique: is_true(row, "indisunique"),
            has_predicate: is_true(row, "predicate"),
            method: text(row, "amname")?,
            // A name with a line break is read as two names. The index then counts as different.
            key: (key.split('\n'))
                .map(|part| part.strip_prefix('c').map(str::to_owned))
                .collect(),
            included: parsed(row, "included").unwrap_or(0),
            attached_to: parsed(row, "parent"),
        })
    };
    rows(reply).filter_map(read).collect()
}

/// The other backends that currently build an index of the table.
///
/// A role that may not see another role's progress sees a row without the table. Such a row counts if the backend holds
/// a lock on the table in the mode of an index build (PostgreSQL's source, `pg_stat_get_progress_info`).
pub(crate) fn builders(table: u32) -> String {
    format!(
        "SELECT p.pid FROM pg_catalog.pg_stat_progress_create_index AS p \
         WHERE p.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid() \
         AND p.datname OPERATOR(pg_catalog.=) pg_catalog.current_database() \
         AND (p.relid OPERATOR(pg_catalog.=) '{table}'::pg_catalog.oid OR p.relid IS NULL AND EXISTS (SELECT \
         FROM pg_catalog.pg_locks AS l WHERE pg_catalog.texteq(l.locktype, 'relation') AND l.granted \
         AND l.pid OPERATOR(pg_catalog.=) p.pid AND l.relation OPERATOR(pg_catalog.=) '{table}'::pg_catalog.oid \
         AND l.mode OPERATOR(pg_catalog.=) ANY (ARRAY['ShareUpdateExclusiveLock', 'ShareLock'])))"
    )
}

pub(crate) fn read_pids(reply: &[SimpleQueryMessage]) -> Vec<i32> {
    rows(reply).filter_map(|row| parsed(row, "pid")).collect()
}

/// The progress of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BuildProgress {
    pub(crate) pid: i32,
    pub(crate) phase: String,
    pub(crate) blocks: (u64, u64),
    pub(crate) rows: (u64, u64),
    pub(crate) lockers: (u64, u64),
    pub(crate) waits_for: Option<i32>,
}

pub(crate) fn progress(pid: i32) -> String {
    format!(
        "SELECT p.pid, p.phase, p.blocks_done, p.blocks_total, p.tuples_done, p.tuples_total, p.lockers_done, \
         p.lockers_total, p.current_locker_pid FROM pg_catalog.pg_stat_progress_create_index AS p \
         WHERE p.pid OPERATOR(pg_catalog.=) {pid}"
    )
}

pub(crate) fn read_progress(reply: &[SimpleQueryMessage]) -> Option<BuildProgress> {
    let row = rows(reply).next()?;
    let pair = |done, total| {
        (
            parsed(row, done).unwrap_or(0),
            parsed(row, total).unwrap_or(0),
        )
    };
    Some(BuildProgress {
        pid: parsed(row, "pid")?,
        phase: text(row, "phase")?,
        blocks: pair("blocks_done", "blocks_total"),
        rows: pair("tuples_done", "tuples_total"),
        lockers: pair("lockers_done", "lockers_total"),
        waits_for: parsed(row, "current_locker_pid").filter(|pid| *pid > 0),
    })
}
/// Whether the table's schema has an INVALID index of that name.
pub(crate) fn is_invalid(table: &TableName, name: &str) -> String {
    format!(
        "WITH {} SELECT EXISTS (SELECT FROM t JOIN pg_catalog.pg_class AS c \
         ON c.relnamespace OPERATOR(pg_catalog.=) t.relnamespace AND c.relname OPERATOR(pg_catalog.=) {}::pg_catalog.name \
         AND c.relkind OPERATOR(pg_catalog.=) 'i' \
         JOIN pg_catalog.pg_index AS i ON i.indexrelid OPERATOR(pg_catalog.=) c.oid AND NOT i.indisvalid) AS yes",
        with_t(table),
        literal(name)
    )
}
