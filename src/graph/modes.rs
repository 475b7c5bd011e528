//! Sets of lock modes.

use crate::mode::LockMode;

/// A set of modes, with one bit for each, in the order of [`LockMode::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Modes(u8);

impl Modes {
    /// The modes that conflict with a mode.
    pub(super) fn conflicting(mode: LockMode) -> Self {
        let mut modes = Self::default();
        for other in mode.conflicting() {
            modes.add(other);
        }
        modes
    }

    pub(super) fn add(&mut self, mode: LockMode) {
        self.0 |= 1 << mode as u8;
    }

    /// The strongest mode that is in both sets.
    pub(super) fn strongest_of(self, others: Self) -> Option<LockMode> {
        let both = self.0 & others.0;
        let strongest = both.checked_ilog2()?;
        LockMode::ALL.into_iter().nth(strongest as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_conflicting_mode_is_found() {
        let mut held = Modes::default();
        held.add(LockMode::AccessShare);
        let exclusive = Modes::conflicting(LockMode::Exclusive);
        assert_eq!(held.strongest_of(exclusive), None);
        held.add(LockMode::RowExclusive);
        held.add(LockMode::RowShare);
        assert_eq!(held.strongest_of(exclusive), Some(LockMode::RowExclusive));
        for (a, b) in LockMode::ALL
            .iter()
            .flat_map(|a| LockMode::ALL.map(|b| (*a, b)))
        {
            let mut only = Modes::default();
            only.add(b);
            let found = only.strongest_of(Modes::conflicting(a));
            assert_eq!(found, a.conflicts_with(b).then_some(b));
        }
    }
}
