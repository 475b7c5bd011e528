//! Numbers that look random, and are the same in each run.

use std::time::Duration;

/// SplitMix64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers of their own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// One from 0 to `bound` - 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let count = u64::try_from(choices.len()).expect("not so many");
        let index = usize::try_from(self.below(count)).expect("an index of the slice");
        choices[index]
    }

    /// In microseconds, up to `most`.
    pub fn duration(&mut self, most: Duration) -> Duration {
        let most = u64::try_from(most.as_micros()).expect("less than half a million years");
        Duration::from_micros(self.below(most + 1))
    }
}
