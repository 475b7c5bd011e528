//! The eight modes in which a table can be locked.

use std::fmt;
use std::str::FromStr;

use super::parse::{ParseModeError, same_words};

/// How strongly a transaction has locked a table.
///
/// The names are historical, PostgreSQL's documentation says ("Explicit Locking"): all eight are locks of the whole
/// table, also those with ROW in their name. A mode means nothing but the modes it conflicts with. The order is that of
/// the server's own numbers (`src/include/storage/lockdefs.h`); each mode conflicts with all that the one before it does,
/// except that SHARE goes with SHARE.
///
/// `Display` shows them as `pg_locks.mode` and the server's messages do.
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
    /// What only reads takes it: SELECT, COPY TO, pg_dump.
    AccessShare,
    /// SELECT … FOR UPDATE and its kin, and the checks of foreign keys.
    RowShare,
    /// What writes rows: INSERT, UPDATE, DELETE, MERGE, COPY FROM.
    RowExclusive,
    /// Maintenance beside reads and writes, one at a time: VACUUM, ANALYZE, CREATE INDEX CONCURRENTLY.
    ShareUpdateExclusive,
    /// CREATE INDEX: the rows must not change, several may do it at once.
    Share,
    /// CREATE TRIGGER, ADD FOREIGN KEY: as SHARE, one at a time.
    ShareRowExclusive,
    /// REFRESH MATERIALIZED VIEW CONCURRENTLY: beside reads only.
    Exclusive,
    /// DROP, TRUNCATE, VACUUM FULL, most forms of ALTER TABLE: alone.
    AccessExclusive,
}

use LockMode::{
    AccessExclusive, AccessShare, Exclusive, RowExclusive, RowShare, Share, ShareRowExclusive,
    ShareUpdateExclusive,
};

/// Wanted down, held across, both in the order of [`LockMode::ALL`]. As `LockConflicts` in
/// `src/backend/storage/lmgr/lock.c`; each pair is tried (test `lock_modes::every_pair_of_table_modes`).
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
    /// All of them, the weakest first.
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
    /// It is the mode of a table lock where `pg_locks.locktype` is `relation`. The server's locks on other things have
    /// the same modes and conflicts, but other meanings: for the row locks of `tuple` see [`RowLock::from_pg_locks`],
    /// for `advisory` [`AdvisoryMode::from_pg_locks`]. `SIReadLock`, which `relation` can show too, is none of them: the
    /// mark that a serializable transaction has read something, which blocks nobody.
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

    /// Whether one transaction has to wait for another one that holds the `other` mode on the same table. Symmetric. A
    /// transaction never waits for itself.
    #[must_use]
    pub const fn conflicts_with(self, other: Self) -> bool {
        CONFLICTS[self as usize][other as usize] == 1
    }

    /// The modes that conflict with this one, the weakest first.
    pub fn conflicting(self) -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(move |other| self.conflicts_with(*other))
    }

    /// What a lock of this mode keeps others from doing with the table, and what goes on, in words that follow the verb:
    /// “blocks …”.
    ///
    /// A lock that is only waited for blocks the same: who comes later and conflicts with it queues behind it.
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

/// Reads both spellings: `RowExclusiveLock` exactly, `ROW EXCLUSIVE` in any case.
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
    fn both_spellings_survive_the_round_trip() {
        for mode in LockMode::ALL {
            assert_eq!(LockMode::from_pg_locks(&mode.to_string()), Some(mode));
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(mode.as_sql().parse(), Ok(mode));
            let sloppy = format!(" {}\n", mode.as_sql().to_lowercase().replace(' ', "  "));
            assert_eq!(sloppy.parse(), Ok(mode));
            // The one is the other without spaces, and with `Lock`.
            let joined = format!("{}lock", mode.as_sql().replace(' ', "").to_lowercase());
            assert_eq!(mode.as_pg_locks().to_lowercase(), joined);
        }
    }

    #[test]
    fn other_texts_are_no_mode() {
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
    fn the_order_is_that_of_the_list() {
        assert!(LockMode::ALL.is_sorted());
        for (at, mode) in LockMode::ALL.into_iter().enumerate() {
            assert_eq!(mode as usize, at, "the matrix is read by this number");
        }
    }

    #[test]
    fn conflicts_are_symmetric_and_grow_but_for_share() {
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
    fn the_words_say_what_the_matrix_says() {
        for mode in LockMode::ALL {
            let (blocked, goes_on) = mode
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
                assert_eq!(goes_on.contains(word), !mode.conflicts_with(of), "{mode}");
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
