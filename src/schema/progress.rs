//! How far an index build is.

use std::fmt;

use crate::schema::sql::index::Progress;

/// How far an index build is, as `pg_stat_progress_create_index` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexProgress {
    seen: Progress,
}

impl IndexProgress {
    /// The backend that builds it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.seen.pid
    }

    /// What it does, in PostgreSQL's words: `building index: scanning table`, `waiting for old snapshots`, …
    #[must_use]
    pub fn phase(&self) -> &str {
        &self.seen.phase
    }

    /// Blocks of the table gone through in this phase, and how many there are; both 0 in phases that count none.
    #[must_use]
    pub fn blocks(&self) -> (u64, u64) {
        self.seen.blocks
    }

    /// Rows gone through in this phase, and how many there are; both 0 in phases that count none.
    #[must_use]
    pub fn rows(&self) -> (u64, u64) {
        self.seen.rows
    }

    /// Sessions waited for that are done, and how many there are.
    #[must_use]
    pub fn lockers(&self) -> (u64, u64) {
        self.seen.lockers
    }

    /// The session that is waited for.
    #[must_use]
    pub fn waits_for(&self) -> Option<i32> {
        self.seen.waits_for
    }
}

impl From<Progress> for IndexProgress {
    fn from(seen: Progress) -> Self {
        Self { seen }
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
