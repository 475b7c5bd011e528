//! The two modes of advisory locks.

use std::fmt;

/// The mode of an advisory lock: shared or exclusive.
///
/// PostgreSQL has just these two modes for advisory locks. `Display` shows them as `pg_locks.mode` does.
///
/// # Examples
///
/// ```
/// use lockkeeper::AdvisoryMode;
///
/// assert_eq!(AdvisoryMode::Shared.to_string(), "ShareLock");
/// assert_eq!(AdvisoryMode::from_pg_locks("ExclusiveLock"), Some(AdvisoryMode::Exclusive));
/// assert!(!AdvisoryMode::Shared.conflicts_with(AdvisoryMode::Shared));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum AdvisoryMode {
    /// Several sessions can hold the lock in this mode, but none exclusively meanwhile: `ShareLock`.
    Shared,
    /// One session holds the lock alone: `ExclusiveLock`.
    #[default]
    Exclusive,
}

impl AdvisoryMode {
    /// The mode that `pg_locks.mode` spells like this; `None` for every other text, table lock modes included.
    #[must_use]
    pub fn from_pg_locks(mode: &str) -> Option<Self> {
        [Self::Shared, Self::Exclusive]
            .into_iter()
            .find(|candidate| candidate.as_pg_locks() == mode)
    }

    /// The mode as `pg_locks.mode` spells it.
    #[must_use]
    pub const fn as_pg_locks(self) -> &'static str {
        match self {
            Self::Shared => "ShareLock",
            Self::Exclusive => "ExclusiveLock",
        }
    }

    /// Whether a session has to wait for another session that holds the lock in the `other` mode. Symmetric.
    #[must_use]
    pub const fn conflicts_with(self, other: Self) -> bool {
        !matches!((self, other), (Self::Shared, Self::Shared))
    }
}

impl fmt::Display for AdvisoryMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_pg_locks())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [AdvisoryMode; 2] = [AdvisoryMode::Shared, AdvisoryMode::Exclusive];

    #[test]
    fn text_round_trips() {
        for mode in MODES {
            assert_eq!(AdvisoryMode::from_pg_locks(&mode.to_string()), Some(mode));
        }
        for other in [
            "",
            "sharelock",
            "ShareLock ",
            "AccessExclusiveLock",
            "Share",
        ] {
            assert_eq!(AdvisoryMode::from_pg_locks(other), None, "{other:?}");
        }
    }

    #[test]
    fn only_shared_and_shared_do_not_conflict() {
        for a in MODES {
            for b in MODES {
                assert_eq!(a.conflicts_with(b), b.conflicts_with(a));
                let both_shared = a == AdvisoryMode::Shared && b == AdvisoryMode::Shared;
                assert_eq!(a.conflicts_with(b), !both_shared);
            }
        }
    }

    #[test]
    fn the_default_is_exclusive() {
        assert_eq!(AdvisoryMode::default(), AdvisoryMode::Exclusive);
    }
}
