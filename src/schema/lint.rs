//! Refuses statements that read or rewrite a table while they block other sessions.

use super::plan::{LockPlan, PlannedLock, printable};
use super::{Env, bounds, ddl};
use crate::deadline::timeout_millis;
use crate::error::Error;
use crate::mode::LockMode;
use crate::schema::sql::catalog;
use crate::schema::statements::{LockedRelation, TableWork};
use std::time::Duration;

/// Work under a blocking lock, and statements, that the caller allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Allowed {
    pub(super) scan: bool,
    pub(super) rewrite: bool,
    pub(super) unknown: bool,
}

impl Allowed {
    fn work(self, work: TableWork) -> bool {
        match work {
            TableWork::Rewrite => self.rewrite,
            TableWork::Scan | TableWork::Rows => self.scan || self.rewrite,
            _ => true,
        }
    }
}

/// The size up to which rows of one table may be changed while a lock on another blocks other sessions, in bytes:
/// tables in which tools keep the number of a migration.
const SMALL: u64 = 1 << 20;

/// Refuses statements that would block other sessions while they process a whole table, and those that are not
/// understood.
///
/// Cancel safety: only reads the catalogs.
pub(super) async fn check(
    env: &Env,
    statements: &[ddl::Statement<'_>],
    allowed: Allowed,
    lock_timeout: Duration,
) -> Result<(), Error> {
    if allowed.rewrite && allowed.scan && allowed.unknown {
        return Ok(());
    }
    let plan = LockPlan::of(env, statements).await?;
    if let Some(one) = plan.unrecognized.first().filter(|_| !allowed.unknown) {
        return Err(Error::config(format!(
            "{:?} is not understood ({}), so what it locks is unknown; .allow_unknown() if that may be, after a dry_run on \
             a copy",
            shortened(&one.statement),
            printable(&one.part)
        )));
    }
    // What earlier statements of the batch hold, so that other sessions wait.
    let mut blocked: Option<&PlannedLock> = None;
    let mut next = None;
    let mut at = 0;
    for lock in &plan.locks {
        if lock.at != at {
            blocked = blocked.or(next.take());
            at = lock.at;
        }
        if blocks(lock.mode) && !is_index(lock) {
            next = next.or(Some(lock));
        }
        let elsewhere = blocked.filter(|_| works_on_its_table(lock) && !is_index(lock));
        let is_heavy = is_heavy(lock);
        if !(is_heavy || elsewhere.is_some()) || allowed.work(lock.work) {
            continue;
        }
        let size = catalog::size(&[lock.relation.oid], timeout_millis(lock_timeout));
        // A table whose lock is not available for this query is in use, and so not empty.
        let bytes = match env.ask(&size).await {
            Ok(reply) => catalog::read_size(&reply),
            Err(error) if error.kind() == crate::error::ErrorKind::LockTimeout => u64::MAX,
            Err(error) => return Err(error),
        };
        let is_small = !is_heavy && lock.work == TableWork::Rows && bytes <= SMALL;
        if bytes == 0 || is_small || is_spared(env, &plan, statements, lock, lock_timeout).await? {
            continue;
        }
        return Err(match elsewhere {
            Some(other) if !is_heavy => of_batch(lock, other),
            _ if !blocks(lock.mode) => of_batch(lock, lock),
            _ => refused(lock),
        });
    }
    Ok(())
}

/// Whether the lock keeps writers waiting.
fn blocks(mode: LockMode) -> bool {
    mode.conflicts_with(LockMode::RowExclusive)
}

fn is_index(lock: &PlannedLock) -> bool {
    // The index's table is locked, too, and has a row of its own.
    matches!(lock.relation.kind, 'i' | 'I')
}

/// Whether the statement processes the table that it is about, and for how long depends on the size.
fn works_on_its_table(lock: &PlannedLock) -> bool {
    let is_the_table = !matches!(
        lock.on,
        LockedRelation::Referenced | LockedRelation::Referencing | LockedRelation::Source
    );
    let takes_long = match lock.work {
        TableWork::Scan | TableWork::Rewrite => true,
        // The rows of VALUES are few.
        TableWork::Rows => lock.statement != "INSERT",
        _ => false,
    };
    let is_alone = !lock.statement.contains("CONCURRENTLY");
    takes_long && is_the_table && is_alone
}

/// Whether the lock blocks writers for a time that depends on the table's size.
pub(super) fn is_heavy(lock: &PlannedLock) -> bool {
    works_on_its_table(lock) && !is_index(lock) && blocks(lock.under)
}

/// The beginning of a statement.
fn shortened(statement: &str) -> String {
    let mut short: String = statement.chars().take(80).collect();
    if short.len() < statement.len() {
        short.push('…');
    }
    short
}

/// Whether the lock is that of a partition that is not read, because one of its CHECKs implies its bounds.
async fn is_spared(
    env: &Env,
    plan: &LockPlan,
    statements: &[ddl::Statement<'_>],
    lock: &PlannedLock,
    lock_timeout: Duration,
) -> Result<bool, Error> {
    let is_attached =
        lock.statement == "ALTER TABLE … ATTACH PARTITION" && lock.on == LockedRelation::Partition;
    let bounds = statements
        .get(lock.at)
        .into_iter()
        .flat_map(|one| one.actions.iter().flatten());
    let bounds = bounds.into_iter().find_map(|action| match &action.check {
        ddl::CatalogCheck::Bounds(bounds) => Some(bounds.as_str()),
        _ => None,
    });
    let (true, Some(bounds)) = (is_attached, bounds) else {
        return Ok(false);
    };
    let of_statement = |role| {
        let mut all = plan.locks.iter();
        all.find(|one| one.at == lock.at && one.on == role && one.statement == lock.statement)
    };
    // The partition itself comes before what is below it.
    let (Some(parent), Some(partition)) = (
        of_statement(LockedRelation::Parent),
        of_statement(LockedRelation::Partition),
    ) else {
        return Ok(false);
    };
    // What the batch has changed before is not what the catalogs say.
    let is_changed = (plan.locks.iter())
        .any(|one| one.at < lock.at && one.relation.oid == partition.relation.oid);
    if is_changed {
        return Ok(false);
    }
    let (parent, partition) = (parent.relation.oid, partition.relation.oid);
    match bounds::are_implied(env, parent, partition, bounds, lock_timeout).await {
        Err(error) if error.kind() == crate::error::ErrorKind::LockTimeout => Ok(false),
        found => found,
    }
}

fn about(lock: &PlannedLock) -> String {
    let rows = lock.relation.rows.filter(|rows| *rows > 0);
    let rows = rows.map_or_else(String::new, |rows| format!(", about {rows} rows"));
    format!("{}{rows}", lock.relation.label())
}

fn does_and_allows(work: TableWork) -> (&'static str, &'static str) {
    match work {
        TableWork::Rewrite => ("rewrites it", "allow_rewrite"),
        TableWork::Rows => ("works on its rows", "allow_scan"),
        _ => ("reads all of it", "allow_scan"),
    }
}

fn refused(lock: &PlannedLock) -> Error {
    let (does, allow) = does_and_allows(lock.work);
    Error::config(format!(
        "{} on {} keeps others waiting while it {does}; {}, or .{allow}() if that may be",
        lock.statement,
        about(lock),
        if lock.on == LockedRelation::DefaultPartition {
            "better while the default partition is empty"
        } else {
            advice(lock.statement)
        }
    ))
}

/// A statement that would be harmless alone.
fn of_batch(lock: &PlannedLock, held: &PlannedLock) -> Error {
    let (does, allow) = does_and_allows(lock.work);
    let held_on = if held.relation.oid == lock.relation.oid {
        format!("{} on it", lock.under.as_sql())
    } else {
        format!("{} on {}", held.mode.as_sql(), held.relation.label())
    };
    Error::config(format!(
        "{} on {} {does} while its transaction holds {held_on}, so others wait as long; better a change of its own, or \
         .{allow}() if that may be",
        lock.statement,
        about(lock),
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
    } else if begins("ALTER DOMAIN") {
        "better a CHECK on each table by add_check, which validates it beside others' work"
    } else if alters("ALTER CONSTRAINT … INHERIT") {
        "better by set_not_null on each child first"
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
    } else if alters("ADD COLUMN … REFERENCES") {
        "better the column without the foreign key, its values, and then add_foreign_key"
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
