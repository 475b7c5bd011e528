//! Which lock modes conflict.

use super::edge::Mode;

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

/// A set of modes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Modes(u8);

impl Modes {
    pub(super) fn add(&mut self, mode: &Mode) {
        if let Some(rank) = rank(mode) {
            self.0 |= 1 << rank;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0 == 0
    }
}

/// Those that conflict with a mode.
pub(super) fn conflicting(mode: &Mode) -> Modes {
    Modes(rank(mode).map_or(0, |rank| CONFLICTS[rank]))
}

/// The strongest of those in both sets.
pub(super) fn strongest(modes: &Modes, among: Modes) -> Option<Mode> {
    let both = modes.0 & among.0;
    (0..NAMES.len())
        .rev()
        .find(|rank| both & (1 << rank) != 0)
        .map(|rank| Mode::Borrowed(NAMES[rank]))
}

/// The mode without a copy of its own, if it is one of those there are.
pub(crate) fn interned(mode: &str) -> Mode {
    rank(mode).map_or_else(|| mode.to_owned().into(), |rank| NAMES[rank].into())
}

fn rank(mode: &str) -> Option<usize> {
    NAMES.iter().position(|name| *name == mode)
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
}
