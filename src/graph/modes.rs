//! Which lock modes conflict.

use std::fmt;

/// A lock mode, by its place among [`NAMES`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Mode(u8);

/// From the weakest to the strongest, as `pg_locks.mode` spells them.
const NAMES: [&str; 8] = [
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];

/// Of each mode those it conflicts with, a bit for each (PostgreSQL's documentation, "Table-Level Locks").
const CONFLICTS: [u8; 8] = [
    0b1000_0000,
    0b1100_0000,
    0b1111_0000,
    0b1111_1000,
    0b1110_1100,
    0b1111_1100,
    0b1111_1110,
    0b1111_1111,
];

impl Mode {
    /// The mode that `pg_locks.mode` spells like this. `SIReadLock` is none: it blocks nobody.
    pub(crate) fn from_pg_locks(mode: &str) -> Option<Self> {
        let rank = NAMES.iter().position(|name| *name == mode)?;
        u8::try_from(rank).ok().map(Self)
    }

    /// As `pg_locks.mode` spells it.
    pub(crate) fn name(self) -> &'static str {
        NAMES[usize::from(self.0)]
    }
}

impl fmt::Debug for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Modes(u8);

impl Modes {
    pub(super) fn add(&mut self, mode: Mode) {
        self.0 |= 1 << mode.0;
    }

    /// The strongest of those that conflict with a mode.
    pub(super) fn strongest_against(self, mode: Mode) -> Option<Mode> {
        let both = self.0 & CONFLICTS[usize::from(mode.0)];
        // Invariant: eight bits have at most seven zeros before the first one.
        (both != 0).then(|| Mode(7 - u8::try_from(both.leading_zeros()).unwrap_or(7)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflicts_are_mutual() {
        for (a, conflicts) in CONFLICTS.iter().enumerate() {
            for (b, others) in CONFLICTS.iter().enumerate() {
                assert_eq!(
                    conflicts >> b & 1,
                    others >> a & 1,
                    "{} {}",
                    NAMES[a],
                    NAMES[b]
                );
            }
        }
    }

    #[test]
    fn the_strongest_in_conflict_is_found() {
        let mode = |name| Mode::from_pg_locks(name).expect("one of the eight");
        let mut held = Modes::default();
        held.add(mode("AccessShareLock"));
        assert_eq!(held.strongest_against(mode("ExclusiveLock")), None);
        held.add(mode("RowExclusiveLock"));
        held.add(mode("RowShareLock"));
        let found = held.strongest_against(mode("AccessExclusiveLock"));
        assert_eq!(found.map(Mode::name), Some("RowExclusiveLock"));
        assert_eq!(Mode::from_pg_locks("SIReadLock"), None);
    }
}
