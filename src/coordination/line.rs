//! The lines in which the tasks of one process wait for the permits of a semaphore.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, Notify};

/// The lines of one keeper, by the semaphore's name.
#[derive(Debug, Default)]
pub(crate) struct Lines(Mutex<HashMap<Box<str>, Weak<Line>>>);

/// One line: first come, first served.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// Held by the first in line, who tries for all. Tokio's mutex is fair.
    pub(super) turn: AsyncMutex<()>,
    /// Tells the first that a permit of this process was released.
    pub(super) released: Notify,
    waiting: AtomicUsize,
}

impl Lines {
    /// The line of a name, the same one for all who have it at a time.
    pub(super) fn of(&self, name: &str) -> Arc<Line> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(name).and_then(Weak::upgrade) {
            return line;
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let line = Arc::default();
        lines.insert(name.into(), Arc::downgrade(&line));
        line
    }
}

impl Line {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Notes one more who waits, until what this gives is dropped.
    pub(super) fn enter(&self) -> impl Drop + Send + '_ {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        scopeguard::guard((), |()| {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_shared_while_it_is_used_and_no_longer_kept() {
        let lines = Lines::default();
        let (first, same) = (lines.of("a"), lines.of("a"));
        assert!(Arc::ptr_eq(&first, &same));
        let place = first.enter();
        assert!(!same.is_empty());
        drop(place);
        assert!(same.is_empty());
        drop(same);
        drop(first);
        let _other = lines.of("b");
        assert_eq!(
            lines.0.lock().unwrap_or_else(PoisonError::into_inner).len(),
            1
        );
    }
}
