//! Which backends this process is using.
//!
//! One register for the process, not for the keeper: a lock that a guard of another keeper owns is not a forgotten one.
//! A backend is known by its process id alone. On another server somebody else may have the same: then one is taken for
//! owned that is not, and never the other way round.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

static REGISTER: LazyLock<Mutex<BTreeMap<i32, usize>>> = LazyLock::new(Mutex::default);

/// A backend that this process uses, until this is dropped.
#[derive(Debug)]
pub(super) struct OwnBackend {
    pid: i32,
}

impl OwnBackend {
    pub(super) fn of(pid: i32) -> Self {
        *register().entry(pid).or_default() += 1;
        Self { pid }
    }
}

impl Drop for OwnBackend {
    fn drop(&mut self) {
        let mut register = register();
        if let Some(count) = register.get_mut(&self.pid) {
            *count -= 1;
            if *count == 0 {
                register.remove(&self.pid);
            }
        }
    }
}

/// Whether a guard, or a transaction, of this process has the backend.
pub(crate) fn is_own_backend(pid: i32) -> bool {
    register().contains_key(&pid)
}

fn register() -> MutexGuard<'static, BTreeMap<i32, usize>> {
    // Nothing that panics runs while it is locked.
    REGISTER.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_custody_counts() {
        // No process has such a number.
        let pid = -7;
        let (one, other) = (OwnBackend::of(pid), OwnBackend::of(pid));
        drop(one);
        assert!(is_own_backend(pid));
        drop(other);
        assert!(!is_own_backend(pid));
    }
}
