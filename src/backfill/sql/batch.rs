//! One batch.

use tokio_postgres::SimpleQueryMessage;

use super::catalog::{KeyText, Target};
use crate::postgres::sql::{identifier, parsed, rows, set_local, text};

/// What one batch does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) target: &'a Target,
    /// The caller's: assignments, and a condition.
    pub(crate) set: &'a str,
    pub(crate) filter: Option<&'a str>,
    /// The key of the last row of the batch before.
    pub(crate) last: Option<&'a [String]>,
}

/// The next `rows` rows behind the last one, of which those that the filter lets through are locked in the order of
/// their keys and changed: one statement.
///
/// A batch is a stretch of the key, not so many rows that match: it ends soon also where few or none do. Its rows and
/// those to be changed are all seen in one snapshot; a row that somebody changes meanwhile is waited for, and tested
/// again as it is then (READ COMMITTED).
///
/// What is behind the window is joined with it by the whole key, not by where it begins and ends: of a range the planner
/// may think that it is a third of the table, and read all of it for each batch; of the window it knows its LIMIT.
///
/// The caller's texts are on lines of their own, so that a comment at their end does not swallow what follows.
pub(crate) fn batch(batch: &Batch<'_>, rows: u32) -> String {
    let Batch {
        target,
        set,
        filter,
        last,
    } = *batch;
    let Target {
        table,
        less,
        greater,
        ..
    } = target;
    let behind = last.map_or_else(String::new, |last| {
        format!(
            " WHERE {} {greater} {}",
            target.columns(),
            target.value(last)
        )
    });
    // Under names that are no column of the table's: the caller's texts see both.
    let key = || target.key.iter().zip(1..);
    let list = |items: &mut dyn Iterator<Item = String>, by: &str| {
        let items: Vec<String> = items.collect();
        items.join(by)
    };
    let names = list(
        &mut key().map(|(column, n)| format!("{} AS {OURS}{n}", identifier(&column.name))),
        ", ",
    );
    let ours = list(&mut key().map(|(_, n)| format!("{OURS}{n}")), ", ");
    let rising = list(
        &mut target
            .key
            .iter()
            .map(|column| format!("{} USING {less}", identifier(&column.name))),
        ", ",
    );
    let with = |of: &str, operator: &str, by: &str| {
        list(
            &mut key().map(|(_, n)| format!("{of}{OURS}{n}{operator}")),
            by,
        )
    };
    let rows_of = |from: &str| {
        list(
            &mut key().map(|(column, n)| {
                let name = identifier(&column.name);
                format!("{table}.{name} {} {from}.{OURS}{n}", column.equal)
            }),
            " AND ",
        )
    };
    let told = list(
        &mut key().map(|(column, n)| {
            let value = format!("e.{OURS}{n}");
            let value = if column.text == KeyText::Time {
                // As JSON a time is the same whatever DateStyle is.
                format!(
                    "pg_catalog.to_json({value}) OPERATOR(pg_catalog.#>>) '{{}}'::pg_catalog.text[]"
                )
            } else {
                format!("{value}::pg_catalog.text")
            };
            format!("(SELECT {value} FROM lockkeeper_edge AS e) AS {OURS}{n}")
        }),
        ", ",
    );
    let filter = filter.map_or_else(String::new, |filter| format!(" AND (\n{filter}\n)"));
    let settings = if target
        .key
        .iter()
        .any(|column| column.text == KeyText::Settings)
    {
        fixed_settings()
    } else {
        String::new()
    };
    format!(
        "{settings}WITH lockkeeper_window AS MATERIALIZED \
         (SELECT {names} FROM {table}{behind} ORDER BY {rising} LIMIT {rows}), \
         lockkeeper_edge AS MATERIALIZED \
         (SELECT {ours} FROM lockkeeper_window ORDER BY {falling} LIMIT 1), \
         lockkeeper_batch AS MATERIALIZED \
         (SELECT {windows} FROM {table} JOIN lockkeeper_window ON {in_window}{filter} \
         ORDER BY {in_order} FOR NO KEY UPDATE OF {itself}), \
         lockkeeper_changed AS \
         (UPDATE {table} SET\n{set}\nFROM lockkeeper_batch WHERE {in_batch} RETURNING 1) \
         SELECT (SELECT pg_catalog.count(*) FROM lockkeeper_window) AS passed, \
         (SELECT pg_catalog.count(*) FROM lockkeeper_changed) AS changed, {told}",
        falling = with("", &format!(" USING {greater}"), ", "),
        windows = with("lockkeeper_window.", "", ", "),
        in_window = rows_of("lockkeeper_window"),
        in_order = with("lockkeeper_window.", &format!(" USING {less}"), ", "),
        itself = identifier(table.name()),
        in_batch = rows_of("lockkeeper_batch"),
    )
}

/// What is written under these settings is read under them as the same value, whatever those of the session that goes on
/// with the backfill are otherwise (test `backfill::a_checkpoint_is_read_as_it_was_written`).
///
/// Only where the key needs it: the caller's texts are run under them too. A time zone is not among them, as ISO dates
/// have theirs with them.
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

/// What the key's columns are called, with a number behind it.
const OURS: &str = "lockkeeper_key_";

/// What one batch did.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    /// Rows gone by, changed or not.
    pub(crate) passed: u64,
    pub(crate) changed: u64,
    /// The key of the last of them.
    pub(crate) last: Option<Vec<String>>,
}

pub(crate) fn done(target: &Target, reply: &[SimpleQueryMessage]) -> Option<Done> {
    let row = rows(reply).next()?;
    let last = (1..=target.key.len()).map(|n| text(row, &format!("{OURS}{n}")));
    Some(Done {
        passed: parsed(row, "passed")?,
        changed: parsed(row, "changed")?,
        last: last.collect(),
    })
}
