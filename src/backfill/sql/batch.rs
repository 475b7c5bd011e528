//! The statement of one batch.

use tokio_postgres::SimpleQueryMessage;

use super::catalog::{KeyText, Target};
use crate::postgres::sql::{identifier, parsed, rows, set_local, text};

/// The parameters of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchQuery<'a> {
    pub(crate) target: &'a Target,
    /// The caller's SQL: assignments and a condition.
    pub(crate) set: &'a str,
    pub(crate) filter: Option<&'a str>,
    /// The key of the last row of the previous batch.
    pub(crate) last_key: Option<&'a [String]>,
    pub(crate) end: &'a End,
    /// Whether rows that row-level security hides may be left out.
    pub(crate) visible_rows: bool,
}

/// Where a run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// When no rows are left.
    Open,
    /// At this key.
    At(Vec<String>),
    /// At once: there were no rows.
    Empty,
}

/// One statement that selects the next `rows` rows after the last one, locks those that match the filter in the order
/// of their keys, and changes them.
///
/// A batch is a range of the key, not a number of matching rows, so it is short even if few or no rows match. All of
/// its rows are read in one snapshot. The statement waits for a row that another transaction is changing, and then
/// tests the filter on the new version (READ COMMITTED).
///
/// The table is joined with the window by the whole key, not by a range of the key. The planner may estimate that a
/// range is a third of the table, and read the whole table for each batch; it knows the LIMIT of the window.
///
/// The caller's texts are on separate lines, so that a comment at their end does not extend to what follows.
pub(crate) fn batch(query: &BatchQuery<'_>, rows: u32) -> String {
    let BatchQuery {
        target,
        set,
        filter,
        last_key,
        end,
        visible_rows,
    } = *query;
    let Target {
        table,
        less,
        greater,
        ..
    } = target;
    let columns = target.columns();
    let after_last = last_key.map(|key| format!("{columns} {greater} {}", target.value(key)));
    let until_end = match end {
        End::Open => None,
        End::At(key) => Some(format!("NOT {columns} {greater} {}", target.value(key))),
        End::Empty => Some("false".to_owned()),
    };
    let range: Vec<_> = after_last.into_iter().chain(until_end).collect();
    let range = match range.as_slice() {
        [] => String::new(),
        some => format!(" WHERE {}", some.join(" AND ")),
    };
    // The aliases differ from the table's columns, because the caller's texts can refer to both.
    let key = || target.key.iter().zip(1..);
    let list = |items: &mut dyn Iterator<Item = String>, by: &str| {
        let items: Vec<String> = items.collect();
        items.join(by)
    };
    let names = list(
        &mut key().map(|(column, n)| format!("{} AS {KEY_ALIAS}{n}", identifier(&column.name))),
        ", ",
    );
    let aliases = list(&mut key().map(|(_, n)| format!("{KEY_ALIAS}{n}")), ", ");
    let ascending = list(
        &mut target
            .key
            .iter()
            .map(|column| format!("{} USING {less}", identifier(&column.name))),
        ", ",
    );
    let with = |of: &str, operator: &str, by: &str| {
        list(
            &mut key().map(|(_, n)| format!("{of}{KEY_ALIAS}{n}{operator}")),
            by,
        )
    };
    let rows_of = |from: &str| {
        list(
            &mut key().map(|(column, n)| {
                let name = identifier(&column.name);
                format!("{table}.{name} {} {from}.{KEY_ALIAS}{n}", column.equal)
            }),
            " AND ",
        )
    };
    let last_values = list(
        &mut key().map(|(column, n)| {
            let value = key_text(column.text, &format!("e.{KEY_ALIAS}{n}"));
            format!("(SELECT {value} FROM lockkeeper_edge AS e) AS {KEY_ALIAS}{n}")
        }),
        ", ",
    );
    // A row that matches the filter after its change, too, cannot be told by it from one that is left.
    let stays = filter.map_or("false".to_owned(), |filter| format!("(\n{filter}\n)"));
    let filter = filter.map_or_else(String::new, |filter| format!(" AND (\n{filter}\n)"));
    let settings = settings(target, visible_rows);
    format!(
        "{settings}WITH lockkeeper_window AS MATERIALIZED \
         (SELECT {names} FROM {table}{range} ORDER BY {ascending} LIMIT {rows}), \
         lockkeeper_edge AS MATERIALIZED \
         (SELECT {aliases} FROM lockkeeper_window ORDER BY {descending} LIMIT 1), \
         lockkeeper_batch AS MATERIALIZED \
         (SELECT {windows} FROM {table} JOIN lockkeeper_window ON {in_window}{filter} \
         ORDER BY {in_order} FOR NO KEY UPDATE OF {itself}), \
         lockkeeper_changed AS \
         (UPDATE {table} SET\n{set}\nFROM lockkeeper_batch WHERE {in_batch} RETURNING {stays} AS lockkeeper_stays) \
         SELECT (SELECT pg_catalog.count(*) FROM lockkeeper_window) AS processed, \
         (SELECT pg_catalog.count(*) FROM lockkeeper_batch) AS matching, \
         (SELECT pg_catalog.count(*) FROM lockkeeper_changed) AS changed, \
         (SELECT pg_catalog.count(*) FROM lockkeeper_changed WHERE lockkeeper_stays) AS still_matching, {last_values}",
        descending = with("", &format!(" USING {greater}"), ", "),
        windows = with("lockkeeper_window.", "", ", "),
        in_window = rows_of("lockkeeper_window"),
        in_order = with("lockkeeper_window.", &format!(" USING {less}"), ", "),
        itself = identifier(table.name()),
        in_batch = rows_of("lockkeeper_batch"),
    )
}

/// Queries the last key; no row for an empty table.
pub(crate) fn last_key(target: &Target, visible_rows: bool) -> String {
    let Target { table, greater, .. } = target;
    let key = || target.key.iter().zip(1..);
    let values: Vec<_> = key()
        .map(|(column, n)| {
            let value = key_text(column.text, &format!("e.{KEY_ALIAS}{n}"));
            format!("{value} AS {KEY_ALIAS}{n}")
        })
        .collect();
    let names: Vec<_> = key()
        .map(|(column, n)| format!("{} AS {KEY_ALIAS}{n}", identifier(&column.name)))
        .collect();
    let descending: Vec<_> = key()
        .map(|(column, _)| format!("{} USING {greater}", identifier(&column.name)))
        .collect();
    format!(
        "{}SELECT {} FROM (SELECT {} FROM {table} ORDER BY {} LIMIT 1) AS e",
        settings(target, visible_rows),
        values.join(", "),
        names.join(", "),
        descending.join(", ")
    )
}

pub(crate) fn read_last_key(target: &Target, reply: &[SimpleQueryMessage]) -> Option<End> {
    let Some(row) = rows(reply).next() else {
        return Some(End::Empty);
    };
    let key = (1..=target.key.len()).map(|n| text(row, &format!("{KEY_ALIAS}{n}")));
    key.collect::<Option<_>>().map(End::At)
}

/// The text of a key's value.
fn key_text(kind: KeyText, value: &str) -> String {
    if kind == KeyText::Time {
        // In JSON, a time does not depend on DateStyle.
        format!("pg_catalog.to_json({value}) OPERATOR(pg_catalog.#>>) '{{}}'::pg_catalog.text[]")
    } else {
        format!("{value}::pg_catalog.text")
    }
}

/// The settings of a statement that reads or writes keys.
pub(super) fn settings(target: &Target, visible_rows: bool) -> String {
    let mut sql = String::new();
    if !visible_rows {
        // The statement fails if row-level security would hide rows from it.
        set_local(&mut sql, "row_security", "off");
    }
    let mut key = target.key.iter();
    if key.any(|column| column.text == KeyText::Settings) {
        sql.push_str(&fixed_settings());
    }
    sql
}

/// Settings under which a key's text is written and later read as the same value, independent of the settings of the
/// session that continues the backfill (test `backfill::a_checkpoint_is_read_as_it_was_written`).
///
/// They are used only if the key needs them, because the caller's texts run under them, too. The time zone is not among
/// them, because ISO dates contain it.
fn fixed_settings() -> String {
    let mut sql = String::new();
    for (name, value) in [
        ("DateStyle", "'ISO'"),
        ("IntervalStyle", "'postgres'"),
        ("extra_float_digits", "1"),
        ("lc_monetary", "'C'"),
    ] {
        set_local(&mut sql, name, value);
    }
    sql
}

/// The alias of a key column, followed by its number.
const KEY_ALIAS: &str = "lockkeeper_key_";

/// The result of a batch.
#[derive(Clone, Debug)]
pub(crate) struct BatchResult {
    /// The number of processed rows, changed or not.
    pub(crate) processed: u64,
    /// The number of rows that matched the filter.
    pub(crate) matching: u64,
    pub(crate) changed: u64,
    /// The number of changed rows that match the filter still.
    pub(crate) still_matching: u64,
    /// The key of the last of them.
    pub(crate) last_key: Option<Vec<String>>,
}

pub(crate) fn read_batch(target: &Target, reply: &[SimpleQueryMessage]) -> Option<BatchResult> {
    let row = rows(reply).next()?;
    let last_key = (1..=target.key.len()).map(|n| text(row, &format!("{KEY_ALIAS}{n}")));
    Some(BatchResult {
        processed: parsed(row, "processed")?,
        matching: parsed(row, "matching")?,
        changed: parsed(row, "changed")?,
        still_matching: parsed(row, "still_matching")?,
        last_key: last_key.collect(),
    })
}
