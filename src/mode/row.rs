//! The four modes of row locks.

use std::fmt;
use std::str::FromStr;

use super::parse::{ParseModeError, same_words};

/// The mode in which a transaction has locked a row.
///
/// Row locks block writers and lockers of the same row, never readers. They are stored in the row itself, not in the
/// server's lock table: `pg_locks` does not show a row lock without waiters. A waiter waits for the transaction that
/// holds the row lock (`locktype` `transactionid`), and marks itself as next in line with a lock of `locktype` `tuple`,
/// whose mode tells the requested row lock ([`from_pg_locks`](Self::from_pg_locks)).
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
/// // Take FOR NO KEY UPDATE before an UPDATE: rows that refer to this one can still be inserted.
/// let foreign_key_check = RowLock::KeyShare;
/// assert!(!foreign_key_check.conflicts_with(RowLock::NoKeyUpdate));
/// assert!(foreign_key_check.conflicts_with(RowLock::Update));
/// assert_eq!(RowLock::NoKeyUpdate.to_string(), "FOR NO KEY UPDATE");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RowLock {
    /// FOR KEY SHARE: the row cannot be deleted, and its key cannot change. A foreign key check takes it on the
    /// referenced row.
    KeyShare,
    /// FOR SHARE: the row cannot change.
    Share,
    /// FOR NO KEY UPDATE: taken by an UPDATE that does not change the key.
    NoKeyUpdate,
    /// FOR UPDATE: taken by DELETE, and by an UPDATE of a column that a foreign key could refer to.
    Update,
}

use RowLock::{KeyShare, NoKeyUpdate, Share, Update};

/// The requested lock by row and the held lock by column, both in the order of [`RowLock::ALL`]. PostgreSQL's
/// documentation, "Conflicting Row-Level Locks"; each pair is tested (test `lock_modes::every_pair_of_row_modes`).
const CONFLICTS: [[u8; 4]; 4] = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]];

impl RowLock {
    /// All row locks, weakest first.
    pub const ALL: [Self; 4] = [KeyShare, Share, NoKeyUpdate, Update];

    /// The row lock that a backend requests whose entry in `pg_locks` has the `locktype` `tuple` and this mode; `None`
    /// for every other text.
    ///
    /// Such an entry uses the modes of table locks with another meaning: `AccessExclusiveLock` is FOR UPDATE
    /// (`tupleLockExtraInfo` in `src/backend/access/heap/heapam.c`; test
    /// `lock_modes::a_waiter_for_a_row_says_which_lock_it_wants`). In an entry with the `locktype` `relation` the mode
    /// is a [`LockMode`](crate::LockMode).
    #[must_use]
    pub fn from_pg_locks(mode: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|candidate| candidate.as_pg_locks() == mode)
    }

    /// The mode of the `tuple` lock in `pg_locks` that represents a request for this row lock.
    #[must_use]
    pub const fn as_pg_locks(self) -> &'static str {
        match self {
            KeyShare => "AccessShareLock",
            Share => "RowShareLock",
            NoKeyUpdate => "ExclusiveLock",
            Update => "AccessExclusiveLock",
        }
    }

    /// The clause of SELECT that takes the lock: `FOR NO KEY UPDATE`.
    #[must_use]
    pub const fn as_sql(self) -> &'static str {
        match self {
            KeyShare => "FOR KEY SHARE",
            Share => "FOR SHARE",
            NoKeyUpdate => "FOR NO KEY UPDATE",
            Update => "FOR UPDATE",
        }
    }

    /// Whether a transaction has to wait for another transaction that holds the `other` lock on the same row.
    /// Symmetric. A transaction never waits for itself.
    #[must_use]
    pub const fn conflicts_with(self, other: Self) -> bool {
        CONFLICTS[self as usize][other as usize] == 1
    }

    /// What a lock of this mode prevents other transactions from doing with the row, and what it still allows, as a
    /// phrase that follows “blocks …”.
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

/// Parses the clause, in any case: `FOR UPDATE`.
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
    fn conflicts_are_symmetric_and_increase() {
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
    fn blocks_agrees_with_the_matrix() {
        for lock in RowLock::ALL {
            let (blocked, still_allowed) = lock
                .blocks()
                .split_once("; ")
                .expect("every row lock allows something");
            assert!(still_allowed.contains("reads"), "{lock}");
            let checks = lock.conflicts_with(KeyShare);
            assert_eq!(blocked.contains("foreign key checks"), checks, "{lock}");
            assert_eq!(
                still_allowed.contains("foreign key checks"),
                !checks,
                "{lock}"
            );
            let updates = lock.conflicts_with(NoKeyUpdate);
            assert_eq!(blocked.contains("every UPDATE"), updates, "{lock}");
            assert_eq!(still_allowed.contains("UPDATE"), !updates, "{lock}");
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
