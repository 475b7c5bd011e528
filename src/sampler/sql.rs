//! The sampler's own SQL; [`crate::graph`] has the rest.

use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use crate::graph::{Relation, RowId};
use crate::postgres::sql::{
    identifier, int4_array, literal, parsed, rows, seconds, setting_duration, text,
};

/// Which of these backends wait for a lock, and for how long. Cheap, because most of the time none does.
pub(crate) fn waits(pids: &[i32]) -> String {
    let pids = int4_array(pids);
    format!(
        "SELECT l.pid, pg_catalog.date_part('epoch', \
         pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) l.waitstart) AS waited, \
         pg_catalog.current_setting('deadlock_timeout') AS deadlock_timeout \
         FROM pg_catalog.pg_locks AS l WHERE NOT l.granted \
         AND l.pid OPERATOR(pg_catalog.=) ANY ({pids})"
    )
}

/// A backend that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitingBackend {
    pub(crate) pid: i32,
    /// Zero for a moment when a wait begins.
    pub(crate) waited: Duration,
    pub(crate) deadlock_timeout: Option<Duration>,
}

pub(crate) fn waiting_backends(reply: &[SimpleQueryMessage]) -> Vec<WaitingBackend> {
    rows(reply)
        .filter_map(|row| {
            Some(WaitingBackend {
                pid: parsed(row, "pid")?,
                waited: seconds(row, "waited").unwrap_or_default(),
                deadlock_timeout: text(row, "deadlock_timeout")
                    .as_deref()
                    .and_then(setting_duration),
            })
        })
        .collect()
}

const RELATION: &str = "SET LOCAL lock_timeout = 50; SET LOCAL statement_timeout = 200; \
     SELECT c.oid, n.nspname, c.relname, c.relkind FROM pg_catalog.pg_class AS c \
     JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE ";

/// The relations with these oids.
pub(crate) fn relations_by_oid(oids: &[u32]) -> String {
    let oids: Vec<_> = oids.iter().map(u32::to_string).collect();
    format!(
        "{RELATION} c.oid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.oid[])",
        oids.join(",")
    )
}

/// The tables of this name, at most two.
pub(crate) fn relations_by_name(name: &str) -> String {
    format!(
        "{RELATION} pg_catalog.nameeq(c.relname, {}) \
         AND pg_catalog.strpos('rpm', c.relkind::pg_catalog.text) OPERATOR(pg_catalog.>) 0 LIMIT 2",
        literal(name)
    )
}

pub(crate) fn found_relations(reply: &[SimpleQueryMessage]) -> Vec<Relation> {
    let relation = |row| {
        Some(Relation {
            oid: parsed(row, "oid")?,
            name: Some((
                text(row, "nspname")?.as_str().into(),
                text(row, "relname")?.as_str().into(),
            )),
            kind: text(row, "relkind").and_then(|kind| kind.chars().next()),
            database: None,
        })
    };
    rows(reply).filter_map(relation).collect()
}

/// The columns of a relation's primary key, in order.
pub(crate) fn primary_key(oid: u32) -> String {
    format!(
        "SELECT a.attname FROM pg_catalog.pg_index AS i \
         CROSS JOIN LATERAL pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k (attnum, place) \
         JOIN pg_catalog.pg_attribute AS a ON a.attrelid OPERATOR(pg_catalog.=) i.indrelid \
         AND a.attnum OPERATOR(pg_catalog.=) k.attnum \
         WHERE i.indisprimary AND i.indrelid OPERATOR(pg_catalog.=) '{oid}'::pg_catalog.oid \
         ORDER BY k.place USING OPERATOR(pg_catalog.<)"
    )
}

pub(crate) fn key_columns(reply: &[SimpleQueryMessage]) -> Vec<String> {
    rows(reply).filter_map(|row| text(row, "attname")).collect()
}

/// Reads the key of the row that has its version at this ctid, as text. Its timeouts are short, because a session may
/// have locked the whole table, or be waiting to. `None` if the relation's name is unknown.
///
/// The row version stays visible until the transaction that replaces it commits.
pub(crate) fn row_key(row: &RowId, columns: &[String]) -> Option<String> {
    let relation = row.relation();
    let mut sql =
        String::from("SET LOCAL lock_timeout = 50; SET LOCAL statement_timeout = 200; SELECT ");
    for (n, column) in columns.iter().enumerate() {
        let comma = if n > 0 { ", " } else { "" };
        let _ = write!(sql, "{comma}t.{}::pg_catalog.text", identifier(column));
    }
    let _ = write!(
        sql,
        " FROM ONLY {}.{} AS t WHERE t.ctid OPERATOR(pg_catalog.=) {}::pg_catalog.tid",
        identifier(relation.schema()?),
        identifier(relation.name()?),
        literal(&row.ctid())
    );
    Some(sql)
}

/// The values in the reply to [`row_key`], in the order of the columns.
pub(crate) fn key_values(reply: &[SimpleQueryMessage]) -> Option<Vec<Option<String>>> {
    let row = rows(reply).next()?;
    (0..row.len())
        .map(|n| Some(row.try_get(n).ok()?.map(str::to_owned)))
        .collect()
}
