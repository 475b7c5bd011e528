//! What is to be done once a transaction has been committed.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

type Hook = Box<dyn FnOnce() + Send>;

/// The hooks of one transaction, each with the savepoints that were open when it was given.
#[derive(Default)]
pub(super) struct Hooks {
    // The mutex is never locked: it makes a transaction `Sync`, which hooks need not be.
    hooks: Mutex<Vec<(u32, Hook)>>,
}

impl Hooks {
    fn hooks(&mut self) -> &mut Vec<(u32, Hook)> {
        self.hooks.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&mut self, depth: u32, hook: Hook) {
        self.hooks().push((depth, hook));
    }

    /// Those given inside the savepoint go with it, or become the outer one's.
    pub(super) fn leave_savepoint(&mut self, depth: u32, rolled_back: bool) {
        if rolled_back {
            self.hooks().retain(|(given, _)| *given < depth);
        } else {
            for (given, _) in self.hooks() {
                *given = (*given).min(depth - 1);
            }
        }
    }

    /// Runs them all. The transaction has been committed, which a panic must not hide.
    pub(super) fn run(&mut self) {
        for (_, hook) in self.hooks().drain(..) {
            if catch_unwind(AssertUnwindSafe(hook)).is_err() {
                tracing::error!(
                    "an after_commit hook panicked; the transaction has been committed"
                );
            }
        }
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}
