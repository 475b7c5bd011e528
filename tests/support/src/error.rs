//! Why no server could be set up.

use std::fmt;

/// Why no server could be set up, and what would help.
#[derive(Clone)]
pub struct SetupError(String);

impl SetupError {
    pub(crate) fn new(text: impl Into<String>) -> SetupError {
        SetupError(text.into())
    }

    /// `what` and the error that stopped it, for `map_err`.
    pub(crate) fn because<E: fmt::Display>(
        what: impl fmt::Display,
    ) -> impl FnOnce(E) -> SetupError {
        move |error| SetupError(format!("{what}: {error}"))
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text as it is, so that `unwrap` and a `main` that returns it can be read.
impl fmt::Debug for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SetupError {}
