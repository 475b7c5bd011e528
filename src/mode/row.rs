//! The four modes in which a row can be locked.

use std::fmt;
use std::str::FromStr;

use super::parse::{ParseModeError, same_words};

/// How strongly a transaction has locked a row.
///
/// Row locks stop writers and lockers of the same row, never readers. They are kept in the row itself, not in the
/// server's lock table: `pg_locks` shows nothing of a row lock that nobody waits for. Who waits for one waits for the
/// transaction that holds it (`locktype` `transactionid`), and holds its own place as the next with a lock of `locktype`
/// `tuple`, whose mode tells what it wants ([`from_pg_locks`](Self::from_pg_locks)).
///
/// # Conflicts
///
#[doc = include_str!("row.md")]
///
/// # Examples
///
/// ```
/// use lockkeeper::RowLock;
///
/// // Why FOR NO KEY UPDATE is the one to take before an UPDATE: rows that refer to this one can be inserted meanwhile.
/// let foreign_key_check = RowLock::KeyShare;
/// assert!(!foreign_key_check.conflicts_with(RowLock::NoKeyUpdate));
/// assert!(foreign_key_check.conflicts_with(RowLock::Update));
/// assert_eq!(RowLock::NoKeyUpdate.to_string(), "FOR NO KEY UPDATE");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RowLock {
    /// FOR KEY SHARE: the row stays, and keeps its key. What the check of a foreign key takes on the row referred to.
    KeyShare,
    /// FOR SHARE: the row stays as it is.
    Share,
    /// FOR NO KEY UPDATE: what an UPDATE takes that leaves the key as it is.
    NoKeyUpdate,
    /// FOR UPDATE: what DELETE takes, and an UPDATE of a column that a foreign key could refer to.
    Update,
}

use RowLock::{KeyShare, NoKeyUpdate, Share, Update};

/// Wanted down, held across, both in the order of [`RowLock::ALL`]. PostgreSQL's documentation, "Conflicting Row-Level
/// Locks"; each pair is tried (test `lock_modes::every_pair_of_row_modes`).
const CONFLICTS: [[u8; 4]; 4] = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]];

impl RowLock {
    /// All of them, the weakest first.
    pub const ALL: [Self; 4] = [KeyShare, Share, NoKeyUpdate, Update];

    /// The row lock that a backend wants whose row in `pg_locks` has the `locktype` `tuple` and this mode; `None` for
    /// every other text.
    ///
    /// Such a lock borrows the modes of table locks and means something else by them: `AccessExclusiveLock` is FOR
    /// UPDATE (`tupleLockExtraInfo` in `src/backend/access/heap/heapam.c`; test
    /// `lock_modes::a_waiter_for_a_row_says_which_lock_it_wants`). Of a row whose `locktype` is `relation` it is a
    /// [`LockMode`](crate::LockMode).
    #[must_use]
    pub fn from_pg_locks(mode: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|candidate| candidate.as_pg_locks() == mode)
    }

    /// The mode of the `tuple` lock in `pg_locks` that stands for a wait for this row lock.
    #[must_use]
    pub const fn as_pg_locks(self) -> &'static str {
        match self {
            KeyShare => "AccessShareLock",
            Share => "RowShareLock",
            NoKeyUpdate => "ExclusiveLock",
            Update => "AccessExclusiveLock",
        }
    }

    /// The clause of SELECT that takes it: `FOR NO KEY UPDATE`.
    #[must_use]
    pub const fn as_sql(self) -> &'static str {
        match self {
            KeyShare => "FOR KEY SHARE",
            Share => "FOR SHARE",
            NoKeyUpdate => "FOR NO KEY UPDATE",
            Update => "FOR UPDATE",
        }
    }

    /// Whether one transaction has to wait for another one that holds the `other` lock on the same row. Symmetric. A
    /// transaction never waits for itself.
    #[must_use]
    pub const fn conflicts_with(self, other: Self) -> bool {
        CONFLICTS[self as usize][other as usize] == 1
    }

    /// What a lock of this mode keeps others from doing with the row, and what goes on, in words that follow the verb:
    /// “blocks …”.
    #[must_use]
    pub const fn blocks(self) -> &'static str {
        match self {
            KeyShare => {
                "a DELETE of the row, an UPDATE of its key and FOR UPDATE; reads, foreign key checks, other UPDATEs and \
                 the other row locks go on"
            }
            Share => {
                "every UPDATE and DELETE of the row, FOR NO KEY UPDATE and FOR UPDATE; reads, foreign key checks and \
                 FOR SHARE go on"
            }
            NoKeyUpdate => {
                "every UPDATE and DELETE of the row and all row locks but FOR KEY SHARE; reads and foreign key checks \
                 go on"
            }
            Update => {
                "every UPDATE and DELETE of the row, foreign key checks against it and all row locks; reads go on"
            }
        }
    }
}

impl fmt::Display for RowLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_sql())
    }
}

/// Reads the clause, in any case: `FOR UPDATE`.
impl FromStr for RowLock {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Self, ParseModeError> {
        Self::ALL
            .into_iter()
            .find(|lock| same_words(lock.as_sql(), text))
            .ok_or_else(|| ParseModeError::new(text, "a row lock", Self::ALL.map(Self::as_sql)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_survive_the_round_trip() {
        for lock in RowLock::ALL {
            assert_eq!(lock.to_string().parse(), Ok(lock));
            assert_eq!(lock.as_sql().to_lowercase().parse(), Ok(lock));
            assert_eq!(RowLock::from_pg_locks(lock.as_pg_locks()), Some(lock));
        }
        let message = "UPDATE"
            .parse::<RowLock>()
            .map_err(|error| error.to_string());
        assert_eq!(
            message,
            Err(
                "\"UPDATE\" is not a row lock; there are FOR KEY SHARE, FOR SHARE, FOR NO KEY UPDATE, FOR UPDATE"
                    .to_owned()
            )
        );
        for text in ["", "SIReadLock", "ShareLock", "FOR UPDATE"] {
            assert_eq!(RowLock::from_pg_locks(text), None);
        }
    }

    #[test]
    fn conflicts_are_symmetric_and_grow() {
        for a in RowLock::ALL {
            for b in RowLock::ALL {
                assert_eq!(a.conflicts_with(b), b.conflicts_with(a), "{a} {b}");
                for stronger in RowLock::ALL.into_iter().filter(|lock| *lock > a) {
                    assert!(!a.conflicts_with(b) || stronger.conflicts_with(b));
                }
            }
        }
    }

    #[test]
    fn the_words_say_what_the_matrix_says() {
        for lock in RowLock::ALL {
            let (blocked, goes_on) = lock
                .blocks()
                .split_once("; ")
                .expect("all let something in");
            assert!(goes_on.contains("reads"), "{lock}");
            let checks = lock.conflicts_with(KeyShare);
            assert_eq!(blocked.contains("foreign key checks"), checks, "{lock}");
            assert_eq!(goes_on.contains("foreign key checks"), !checks, "{lock}");
            let updates = lock.conflicts_with(NoKeyUpdate);
            assert_eq!(blocked.contains("every UPDATE"), updates, "{lock}");
            assert_eq!(goes_on.contains("UPDATE"), !updates, "{lock}");
        }
    }

    #[test]
    fn the_table_in_the_docs_is_the_matrix() {
        let mut table = String::from("| wanted ↓, held → |");
        for lock in RowLock::ALL {
            table += &format!(" {lock} |");
        }
        table.push_str("\n|---|---|---|---|---|");
        for wanted in RowLock::ALL {
            table += &format!("\n| **{wanted}** |");
            for held in RowLock::ALL {
                let cell = wanted.conflicts_with(held);
                table.push_str(if cell { " waits |" } else { " |" });
            }
        }
        assert_eq!(include_str!("row.md").trim_end(), table, "put\n{table}");
    }
}
