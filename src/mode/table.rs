//! The eight modes of table locks.

use std::fmt;
use std::str::FromStr;

use super::parse::{ParseModeError, same_words};

/// The mode in which a transaction has locked a table.
///
/// The names are historical, as PostgreSQL's documentation explains ("Explicit Locking"): all eight modes lock the
/// whole table, even those with ROW in their name. A mode is defined only by the modes it conflicts with. The order is
/// that of the server's numbers (`src/include/storage/lockdefs.h`). Each mode conflicts with all modes that the mode
/// before it conflicts with, except that SHARE does not conflict with SHARE.
///
/// `Display` shows the modes as `pg_locks.mode` and the server's messages do.
///
/// # Conflicts
///
#[doc = include_str!("table.md")]
///
/// # Examples
///
/// ```
/// use lockkeeper::LockMode;
///
/// let build: LockMode = "SHARE".parse()?;
/// let write = LockMode::from_pg_locks("RowExclusiveLock").expect("that is what INSERT takes");
/// assert!(build.conflicts_with(write));
/// assert!(build.blocks().starts_with("writes (INSERT, UPDATE, DELETE, MERGE, COPY FROM), VACUUM"));
/// # Ok::<(), lockkeeper::ParseModeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LockMode {
    /// Taken by statements that only read: SELECT, COPY TO, pg_dump.
    AccessShare,
    /// Taken by SELECT … FOR UPDATE and the other row locking clauses, and by foreign key checks.
    RowShare,
    /// Taken by statements that write rows: INSERT, UPDATE, DELETE, MERGE, COPY FROM.
    RowExclusive,
    /// Taken by maintenance that allows reads and writes, one session at a time: VACUUM, ANALYZE, CREATE INDEX
    /// CONCURRENTLY.
    ShareUpdateExclusive,
    /// Taken by CREATE INDEX: the rows must not change, and several sessions can hold it.
    Share,
    /// Taken by CREATE TRIGGER and ADD FOREIGN KEY: as SHARE, but one session at a time.
    ShareRowExclusive,
    /// Taken by REFRESH MATERIALIZED VIEW CONCURRENTLY: allows only reads.
    Exclusive,
    /// Taken by DROP, TRUNCATE, VACUUM FULL and most forms of ALTER TABLE: conflicts with every mode.
    AccessExclusive,
}

use LockMode::{
    AccessExclusive, AccessShare, Exclusive, RowExclusive, RowShare, Share, ShareRowExclusive,
    ShareUpdateExclusive,
};

/// The requested mode by row and the held mode by column, both in the order of [`LockMode::ALL`]. As `LockConflicts` in
/// `src/backend/storage/lmgr/lock.c`; each pair is tested (test `lock_modes::every_pair_of_table_modes`).
const CONFLICTS: [[u8; 8]; 8] = [
    [0, 0, 0, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0, 1, 1],
    [0, 0, 0, 0, 1, 1, 1, 1],
    [0, 0, 0, 1, 1, 1, 1, 1],
    [0, 0, 1, 1, 0, 1, 1, 1],
    [0, 0, 1, 1, 1, 1, 1, 1],
    [0, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 1, 1],
];

impl LockMode {
    /// All modes, weakest first.
    pub const ALL: [Self; 8] = [
        AccessShare,
        RowShare,
        RowExclusive,
        ShareUpdateExclusive,
        Share,
        ShareRowExclusive,
        Exclusive,
        AccessExclusive,
    ];

    /// The mode that `pg_locks.mode` spells like this; `None` for every other text.
    ///
    /// The entry is a table lock if its `pg_locks.locktype` is `relation`. Locks on other objects have the same modes
    /// and conflicts, but other meanings: see [`RowLock::from_pg_locks`] for `tuple` and
    /// [`AdvisoryMode::from_pg_locks`] for `advisory`. `SIReadLock`, which an entry of `relation` can also have, is not
    /// a lock mode: it marks what a serializable transaction has read, and blocks no session.
    ///
    /// [`RowLock::from_pg_locks`]: crate::RowLock::from_pg_locks
    /// [`AdvisoryMode::from_pg_locks`]: crate::AdvisoryMode::from_pg_locks
    #[must_use]
    pub fn from_pg_locks(mode: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|candidate| candidate.as_pg_locks() == mode)
    }

    /// The mode as `pg_locks.mode` and the server's messages spell it: `RowExclusiveLock`.
    #[must_use]
    pub const fn as_pg_locks(self) -> &'static str {
        match self {
            AccessShare => "AccessShareLock",
            RowShare => "RowShareLock",
            RowExclusive => "RowExclusiveLock",
            ShareUpdateExclusive => "ShareUpdateExclusiveLock",
            Share => "ShareLock",
            ShareRowExclusive => "ShareRowExclusiveLock",
            Exclusive => "ExclusiveLock",
            AccessExclusive => "AccessExclusiveLock",
        }
    }

    /// The mode as `LOCK TABLE … IN … MODE` and PostgreSQL's documentation spell it: `ROW EXCLUSIVE`.
    #[must_use]
    pub const fn as_sql(self) -> &'static str {
        match self {
            AccessShare => "ACCESS SHARE",
            RowShare => "ROW SHARE",
            RowExclusive => "ROW EXCLUSIVE",
            ShareUpdateExclusive => "SHARE UPDATE EXCLUSIVE",
            Share => "SHARE",
            ShareRowExclusive => "SHARE ROW EXCLUSIVE",
            Exclusive => "EXCLUSIVE",
            AccessExclusive => "ACCESS EXCLUSIVE",
        }
    }

    /// Whether a transaction has to wait for another transaction that holds the `other` mode on the same table.
    /// Symmetric. A transaction never waits for itself.
    #[must_use]
    pub const fn conflicts_with(self, other: Self) -> bool {
        CONFLICTS[self as usize][other as usize] == 1
    }

    /// The modes that conflict with this one, weakest first.
    pub fn conflicting(self) -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(move |other| self.conflicts_with(*other))
    }

    /// What a lock of this mode prevents other transactions from doing with the table, and what it still allows, as a
    /// phrase that follows “blocks …”.
    ///
    /// A waiting request blocks the same: later requests that conflict with it queue behind it.
    #[must_use]
    pub const fn blocks(self) -> &'static str {
        match self {
            AccessShare => {
                "what takes ACCESS EXCLUSIVE (DROP, TRUNCATE, most forms of ALTER TABLE); reads, SELECT … FOR UPDATE, \
                 writes and VACUUM go on"
            }
            RowShare => {
                "what takes EXCLUSIVE or ACCESS EXCLUSIVE (REFRESH MATERIALIZED VIEW CONCURRENTLY, DROP, TRUNCATE, most \
                 forms of ALTER TABLE); reads, SELECT … FOR UPDATE, writes and VACUUM go on"
            }
            RowExclusive => {
                "index builds without CONCURRENTLY, CREATE TRIGGER, ADD FOREIGN KEY and stronger schema changes; reads, \
                 SELECT … FOR UPDATE, writes and VACUUM go on"
            }
            ShareUpdateExclusive => {
                "VACUUM, ANALYZE, index builds and schema changes; reads, SELECT … FOR UPDATE and writes go on"
            }
            Share => {
                "writes (INSERT, UPDATE, DELETE, MERGE, COPY FROM), VACUUM and schema changes other than CREATE INDEX; \
                 reads and SELECT … FOR UPDATE go on"
            }
            ShareRowExclusive => {
                "writes (INSERT, UPDATE, DELETE, MERGE, COPY FROM), VACUUM, index builds and schema changes; reads and \
                 SELECT … FOR UPDATE go on"
            }
            Exclusive => {
                "writes (INSERT, UPDATE, DELETE, MERGE, COPY FROM), SELECT … FOR UPDATE and its kin, the checks of \
                 foreign keys that refer to it, VACUUM, index builds and schema changes; reads go on"
            }
            AccessExclusive => {
                "everything: reads, SELECT … FOR UPDATE, writes, VACUUM, index builds and schema changes"
            }
        }
    }
}

impl fmt::Display for LockMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_pg_locks())
    }
}

/// Parses both spellings: `RowExclusiveLock` exactly, `ROW EXCLUSIVE` in any case.
impl FromStr for LockMode {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Self, ParseModeError> {
        Self::from_pg_locks(text)
            .or_else(|| {
                Self::ALL
                    .into_iter()
                    .find(|mode| same_words(mode.as_sql(), text))
            })
            .ok_or_else(|| {
                ParseModeError::new(text, "a table lock mode", Self::ALL.map(Self::as_sql))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_round_trip() {
        for mode in LockMode::ALL {
            assert_eq!(LockMode::from_pg_locks(&mode.to_string()), Some(mode));
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(mode.as_sql().parse(), Ok(mode));
            let sloppy = format!(" {}\n", mode.as_sql().to_lowercase().replace(' ', "  "));
            assert_eq!(sloppy.parse(), Ok(mode));
            // `pg_locks` spells the mode without spaces and with `Lock` appended.
            let joined = format!("{}lock", mode.as_sql().replace(' ', "").to_lowercase());
            assert_eq!(mode.as_pg_locks().to_lowercase(), joined);
        }
    }

    #[test]
    fn other_texts_are_not_a_mode() {
        for text in [
            "",
            "Lock",
            "SIReadLock",
            "rowexclusivelock",
            "ROWEXCLUSIVE",
            "RowExclusiveLock ",
            "ROW EXCLUSIVE MODE",
            "FOR UPDATE",
        ] {
            assert_eq!(LockMode::from_pg_locks(text), None, "{text:?}");
            assert_eq!(
                text.parse::<LockMode>()
                    .map_err(|error| error.text().to_owned()),
                Err(text.to_owned())
            );
        }
        assert_eq!(LockMode::from_pg_locks("ROW EXCLUSIVE"), None);
        let message = "SIReadLock"
            .parse::<LockMode>()
            .map_err(|error| error.to_string());
        assert_eq!(
            message,
            Err(
                "\"SIReadLock\" is not a table lock mode; there are ACCESS SHARE, ROW SHARE, ROW EXCLUSIVE, \
                 SHARE UPDATE EXCLUSIVE, SHARE, SHARE ROW EXCLUSIVE, EXCLUSIVE, ACCESS EXCLUSIVE"
                    .to_owned()
            )
        );
    }

    #[test]
    fn modes_are_ordered_as_listed() {
        assert!(LockMode::ALL.is_sorted());
        for (at, mode) in LockMode::ALL.into_iter().enumerate() {
            assert_eq!(mode as usize, at, "the matrix is read by this number");
        }
    }

    #[test]
    fn conflicts_are_symmetric_and_increase_except_for_share() {
        for a in LockMode::ALL {
            for b in LockMode::ALL {
                assert_eq!(a.conflicts_with(b), b.conflicts_with(a), "{a} {b}");
            }
            assert!(
                a.conflicting()
                    .eq(LockMode::ALL.into_iter().filter(|b| a.conflicts_with(*b)))
            );
        }
        for pair in LockMode::ALL.windows(2) {
            let lost: Vec<_> = pair[0]
                .conflicting()
                .filter(|mode| !pair[1].conflicts_with(*mode))
                .collect();
            assert!(lost.is_empty() || pair[1] == Share && lost == [Share]);
        }
    }

    #[test]
    fn blocks_agrees_with_the_matrix() {
        for mode in LockMode::ALL {
            let (blocked, still_allowed) = mode
                .blocks()
                .split_once("; ")
                .unwrap_or((mode.blocks(), ""));
            for (word, of) in [
                ("reads", AccessShare),
                ("SELECT … FOR UPDATE", RowShare),
                ("writes", RowExclusive),
                ("VACUUM", ShareUpdateExclusive),
            ] {
                assert_eq!(blocked.contains(word), mode.conflicts_with(of), "{mode}");
                assert_eq!(
                    still_allowed.contains(word),
                    !mode.conflicts_with(of),
                    "{mode}"
                );
            }
            let builds = blocked.contains("index builds");
            assert_eq!(builds, mode.conflicts_with(Share), "{mode}");
        }
    }

    #[test]
    fn the_table_in_the_docs_is_the_matrix() {
        let mut table = String::from("| wanted ↓, held → |");
        for mode in LockMode::ALL {
            table += &format!(" {} |", mode.as_sql());
        }
        table.push_str("\n|---|");
        table.push_str(&"---|".repeat(LockMode::ALL.len()));
        for wanted in LockMode::ALL {
            table += &format!("\n| **{}** |", wanted.as_sql());
            for held in LockMode::ALL {
                table.push_str(if wanted.conflicts_with(held) {
                    " waits |"
                } else {
                    " |"
                });
            }
        }
        assert_eq!(include_str!("table.md").trim_end(), table, "put\n{table}");
    }
}
