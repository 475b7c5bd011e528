//! Refuses statements that read or rewrite a table while they block other sessions.

use super::plan::{LockPlan, PlannedLock};
use super::{Env, ddl};
use crate::deadline::timeout_millis;
use crate::error::Error;
use crate::mode::LockMode;
use crate::schema::sql::catalog;
use crate::schema::statements::{LockedRelation, TableWork};
use std::time::Duration;

/// Work under a blocking lock that the caller allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Allowed {
    pub(super) scan: bool,
    pub(super) rewrite: bool,
}

impl Allowed {
    fn work(self, work: TableWork) -> bool {
        match work {
            TableWork::Rewrite => self.rewrite,
            TableWork::Scan => self.scan || self.rewrite,
            _ => true,
        }
    }
}

/// Refuses statements that would block other sessions while they process a whole table.
///
/// Cancel safety: only reads the catalogs.
pub(super) async fn check(
    env: &Env,
    statements: &[ddl::Statement<'_>],
    allowed: Allowed,
    lock_timeout: Duration,
) -> Result<(), Error> {
    if allowed.rewrite && allowed.scan {
        return Ok(());
    }
    let plan = LockPlan::of(env, statements).await?;
    for statement in &plan.database_wide {
        if matches!(*statement, "VACUUM FULL" | "CLUSTER (all)") && !allowed.rewrite {
            return Err(refused(statement, "every table", TableWork::Rewrite, ""));
        }
    }
    for lock in &plan.locks {
        if !is_heavy(lock) || allowed.work(lock.work) {
            continue;
        }
        let size = catalog::size(&[lock.relation.oid], timeout_millis(lock_timeout));
        // A table whose lock is not available for this query is in use, and so not empty.
        let bytes = match env.ask(&size).await {
            Ok(reply) => catalog::read_size(&reply),
            Err(error) if error.kind() == crate::error::ErrorKind::LockTimeout => u64::MAX,
            Err(error) => return Err(error),
        };
        if bytes == 0 || (is_attached(lock) && has_check(env, lock).await?) {
            continue;
        }
        let rows = lock.relation.rows.filter(|rows| *rows > 0);
        let about = rows.map_or_else(String::new, |rows| format!(", about {rows} rows"));
        let table = lock.relation.label();
        return Err(refused(lock.statement, &table, lock.work, &about));
    }
    Ok(())
}

/// Whether the lock blocks writers for a time that depends on the table's size.
pub(super) fn is_heavy(lock: &PlannedLock) -> bool {
    let reads_all = matches!(lock.work, TableWork::Scan | TableWork::Rewrite);
    let is_the_table = !matches!(
        lock.on,
        LockedRelation::Referenced | LockedRelation::Referencing | LockedRelation::Source
    );
    // The index's table is locked, too, and has a row of its own.
    let is_index = matches!(lock.relation.kind, 'i' | 'I');
    let is_alone = !lock.statement.contains("CONCURRENTLY");
    reads_all
        && is_the_table
        && !is_index
        && is_alone
        && lock.mode.conflicts_with(LockMode::RowExclusive)
}

fn is_attached(lock: &PlannedLock) -> bool {
    lock.statement.contains("ATTACH PARTITION")
}

/// Whether the partition to be attached has a CHECK that may make the scan unnecessary.
async fn has_check(env: &Env, lock: &PlannedLock) -> Result<bool, Error> {
    let sql = catalog::has_valid_check(lock.relation.oid);
    Ok(catalog::read_two(&env.ask(&sql).await?, "has", "other").0)
}

fn refused(statement: &str, table: &str, work: TableWork, about: &str) -> Error {
    let (does, allow) = match work {
        TableWork::Rewrite => ("rewrites it", "allow_rewrite"),
        _ => ("reads all of it", "allow_scan"),
    };
    Error::config(format!(
        "{statement} on {table}{about} keeps others waiting while it {does}; {}, or .{allow}() if that may be",
        advice(statement)
    ))
}

/// The advice on how to do the same without blocking other sessions.
pub(super) fn advice(statement: &str) -> &'static str {
    let begins = |prefix: &str| statement.starts_with(prefix);
    let alter = statement.strip_prefix("ALTER TABLE … ").unwrap_or("");
    let alters = |prefix: &str| alter.starts_with(prefix);
    if begins("CREATE INDEX") {
        "better by create_index, which builds it concurrently"
    } else if begins("REINDEX") {
        "better with CONCURRENTLY"
    } else if begins("VACUUM") || begins("CLUSTER") {
        "better a plain VACUUM, or replace_table, which builds the new table aside"
    } else if begins("REFRESH") {
        "better with CONCURRENTLY, for which it needs a unique index"
    } else if alters("ADD COLUMN (volatile") || alters("ADD COLUMN … GENERATED") {
        "better by add_column without the default, then the default, and the rows there are in batches"
    } else if alters("ADD COLUMN (domain") {
        "better with the domain's base type and a CHECK by add_check"
    } else if alters("ADD COLUMN … UNIQUE") || alters("ADD UNIQUE") {
        "better by create_index with unique(), and then ADD CONSTRAINT … UNIQUE USING INDEX"
    } else if alters("ADD PRIMARY KEY") {
        "better by add_primary_key"
    } else if alters("ADD COLUMN … CHECK") || alters("ADD CHECK") {
        "better by add_check, which validates it beside others' work"
    } else if alters("ADD NOT NULL") || alters("ALTER COLUMN … SET NOT NULL") {
        "better by set_not_null, which proves it beside others' work first"
    } else if alters("ADD FOREIGN KEY") {
        "better by add_foreign_key, which validates it beside others' work"
    } else if alters("ALTER COLUMN … TYPE") {
        "better a new column of that type, filled in batches, and renamed in the old one's place"
    } else if alters("ATTACH PARTITION") || begins("CREATE TABLE … PARTITION OF") {
        "better with a valid CHECK first that implies the bounds, by add_check"
    } else if alters("ADD EXCLUDE") {
        "there is no way to build it concurrently"
    } else {
        "better by replace_table, which builds the new table aside"
    }
}
