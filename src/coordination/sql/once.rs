//! The table of what has run.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::TableName;
use crate::postgres::sql::{in_ascii, is_true, literal, rows};

/// When each name last ran.
pub(crate) const TABLE: &str = "lockkeeper_once";

/// The table, where it is missing.
pub(crate) fn create(table: &TableName) -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS {table} (name pg_catalog.text PRIMARY KEY, bucket pg_catalog.timestamp NOT NULL, \
         ran_at pg_catalog.timestamptz NOT NULL, ran_by pg_catalog.text NOT NULL)"
    )
}

/// A run to be recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim<'a> {
    pub(crate) name: &'a str,
    /// Who runs it.
    pub(crate) by: &'a str,
    pub(crate) period: Duration,
    pub(crate) time_zone: &'a str,
    /// From one run to the next, instead of by the calendar.
    pub(crate) since_last_run: bool,
}

/// Records a run unless there was one in the period: a row where it is to run.
///
/// The clock is read here, not at the transaction's beginning, which may have been long before its lock was granted. A
/// bucket is compared as local time without its zone: where clocks are put back an hour happens twice, and is one bucket.
pub(crate) fn claim(table: &TableName, claim: &Claim<'_>) -> String {
    // A number of microseconds would not be read beyond an int4.
    let period = format!(
        "('{}.{:06} seconds')::pg_catalog.interval",
        claim.period.as_secs(),
        claim.period.subsec_micros()
    );
    // A Monday, so that weeks begin on Mondays.
    let bucket = format!(
        "pg_catalog.date_bin({period}, pg_catalog.timezone({}, c.now), ('2001-01-01')::pg_catalog.timestamp)",
        literal(claim.time_zone)
    );
    let is_due = if claim.since_last_run {
        format!(
            "pg_catalog.timestamptz_le(pg_catalog.timestamptz_pl_interval(o.ran_at, {period}), EXCLUDED.ran_at)"
        )
    } else {
        "pg_catalog.timestamp_lt(o.bucket, EXCLUDED.bucket)".to_owned()
    };
    format!(
        "INSERT INTO {table} AS o (name, bucket, ran_at, ran_by) SELECT {}, {bucket}, c.now, \
         {} OPERATOR(pg_catalog.||) (' as ' OPERATOR(pg_catalog.||) CURRENT_USER::pg_catalog.text) \
         FROM (SELECT pg_catalog.clock_timestamp() AS now OFFSET 0) AS c \
         ON CONFLICT (name) DO UPDATE SET bucket = EXCLUDED.bucket, ran_at = EXCLUDED.ran_at, ran_by = EXCLUDED.ran_by \
         WHERE {is_due} RETURNING true AS claimed",
        literal(&in_ascii(claim.name)),
        literal(&in_ascii(claim.by)),
    )
}

pub(crate) fn is_claimed(reply: &[SimpleQueryMessage]) -> bool {
    rows(reply).any(|row| is_true(row, "claimed"))
}
