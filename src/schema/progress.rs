//! The progress of an index build.

use std::fmt;

use crate::schema::sql::index::BuildProgress;

/// The progress of an index build, as `pg_stat_progress_create_index` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexProgress {
    row: BuildProgress,
}

impl IndexProgress {
    getters! {
        /// The backend that builds the index.
        pid: i32 = row.pid;

        /// The phase, as PostgreSQL names it: `building index: scanning table`, `waiting for old snapshots`, …
        phase: &str = row.phase;

        /// Blocks processed in this phase, and their total; both are 0 in phases that do not count blocks.
        blocks: (u64, u64) = row.blocks;

        /// Rows processed in this phase, and their total; both are 0 in phases that do not count rows.
        rows: (u64, u64) = row.rows;

        /// Sessions that the build has already waited for, and their total.
        lockers: (u64, u64) = row.lockers;

        /// The session that the build waits for.
        waits_for: Option<i32> = row.waits_for;
    }
}

impl From<BuildProgress> for IndexProgress {
    fn from(row: BuildProgress) -> Self {
        Self { row }
    }
}

/// `building index: scanning table, 120 of 4425 blocks`
impl fmt::Display for IndexProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.phase())?;
        for ((done, of), what) in [
            (self.blocks(), "blocks"),
            (self.rows(), "rows"),
            (self.lockers(), "sessions"),
        ] {
            if of > 0 {
                write!(f, ", {done} of {of} {what}")?;
            }
        }
        if let Some(pid) = self.waits_for() {
            write!(f, ", waits for pid {pid}")?;
        }
        Ok(())
    }
}
