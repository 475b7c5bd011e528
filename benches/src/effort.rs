//! How much to do.

use std::env;

/// `cargo bench` wants figures; `cargo test --benches` only wants to know that the programs work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Enough of everything for the figures to mean something.
    Full,
    /// A little of everything.
    Trial,
}

impl Effort {
    /// By the arguments: cargo gives `--bench` to a benchmark, and not to a test; `--quick` makes a trial of it too.
    #[must_use]
    pub fn from_args() -> Self {
        let given = |name| env::args().any(|arg| arg == name);
        if given("--bench") && !given("--quick") {
            Self::Full
        } else {
            Self::Trial
        }
    }

    /// One of two numbers.
    #[must_use]
    pub fn of<T>(self, full: T, trial: T) -> T {
        match self {
            Self::Full => full,
            Self::Trial => trial,
        }
    }
}
