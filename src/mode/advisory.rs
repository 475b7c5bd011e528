//! How strongly an advisory lock is held, in PostgreSQL's words.

use std::fmt;

/// Whether an advisory lock excludes everybody or only those who want it for themselves.
///
/// PostgreSQL has just these two modes for advisory locks. They are called what `pg_locks.mode` calls them, and so
/// `Display` shows them.
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
    /// Held together with other shared holders, never with an exclusive one: `ShareLock`.
    Shared,
    /// Held alone: `ExclusiveLock`.
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

    /// Whether one session has to wait for another one that holds the lock in the `other` mode. Symmetric.
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
    fn text_survives_the_round_trip() {
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
    fn only_shared_goes_with_shared() {
        for a in MODES {
            for b in MODES {
                assert_eq!(a.conflicts_with(b), b.conflicts_with(a));
                let both_shared = a == AdvisoryMode::Shared && b == AdvisoryMode::Shared;
                assert_eq!(a.conflicts_with(b), !both_shared);
            }
        }
    }

    #[test]
    fn the_default_is_the_safe_one() {
        assert_eq!(AdvisoryMode::default(), AdvisoryMode::Exclusive);
    }
}
