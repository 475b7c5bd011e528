//! How much is waited, in numbers that can be compared.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::graph::{BackendId, Snapshot};
use crate::postgres::timestamp::Age;

/// How many sessions wait for a lock in one moment, and how long by then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Waits {
    sessions: usize,
    longest: Option<Duration>,
}

impl Waits {
    /// Of a snapshot.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        Self::among(snapshot, &Databases::default())
    }

    /// Of those who wait in some databases.
    pub(crate) fn among(snapshot: &Snapshot, databases: &Databases) -> Self {
        let mut waiters: BTreeMap<&BackendId, Option<Duration>> = BTreeMap::new();
        for edge in snapshot.edges() {
            let backend = snapshot.backend(edge.waiter());
            if databases.has(backend.and_then(|backend| backend.database())) {
                let longest = waiters.entry(edge.waiter()).or_default();
                *longest = (*longest).max(edge.wait_age());
            }
        }
        Self {
            sessions: waiters.len(),
            longest: waiters.into_values().flatten().max(),
        }
    }

    /// How many sessions wait for a lock.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions
    }

    /// For how long the one that has waited longest has; `None` where nobody waits, or where all have begun just now.
    #[must_use]
    pub fn longest(&self) -> Option<Duration> {
        self.longest
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions == 0
    }

    /// Whether they are less than they were: fewer sessions wait, or the one that had waited longest does not any more.
    #[must_use]
    pub fn have_fallen_since(&self, before: &Self) -> bool {
        self.sessions < before.sessions
            || (self.sessions == before.sessions && self.longest < before.longest)
    }
}

/// `3 sessions wait, the longest for 12.0s` or `nobody waits`.
impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sessions {
            0 => return f.write_str("nobody waits"),
            1 => f.write_str("1 session waits")?,
            n => write!(f, "{n} sessions wait")?,
        }
        match self.longest {
            Some(longest) if self.sessions > 1 => write!(f, ", the longest for {}", Age(longest)),
            Some(longest) => write!(f, ", for {}", Age(longest)),
            None => Ok(()),
        }
    }
}

/// Databases to which something is limited, by their names; all of them where none is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Databases(pub(crate) Vec<Box<str>>);

impl Databases {
    /// Whether a session of this database belongs to it. One whose database is not known, only where all do.
    pub(crate) fn has(&self, database: Option<&str>) -> bool {
        self.0.is_empty() || database.is_some_and(|name| self.0.iter().any(|one| **one == *name))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{backend, edge, snapshot};
    use super::*;

    #[test]
    fn a_session_counts_once_with_its_longest_wait() {
        let seconds = Duration::from_secs;
        let found = Waits::of(&snapshot(
            vec![],
            vec![
                edge(2, 1, seconds(5)),
                edge(2, 3, seconds(7)),
                edge(3, 1, seconds(1)),
            ],
        ));
        assert_eq!((found.sessions(), found.longest()), (2, Some(seconds(7))));
        assert_eq!(found.to_string(), "2 sessions wait, the longest for 7.0s");
        let none = Waits::of(&snapshot(vec![], vec![]));
        assert!(none.is_empty() && none.have_fallen_since(&found));
        assert!(!found.have_fallen_since(&none) && !found.have_fallen_since(&found));
    }

    #[test]
    fn only_those_of_the_databases_count() {
        let mut here = backend(2);
        here.database = Some("here".into());
        let mut there = backend(3);
        there.database = Some("there".into());
        let snapshot = snapshot(
            vec![here, there],
            vec![
                edge(2, 1, Duration::ZERO),
                edge(3, 1, Duration::ZERO),
                edge(4, 1, Duration::ZERO),
            ],
        );
        let among = Databases(vec!["here".into()]);
        assert_eq!(Waits::among(&snapshot, &among).sessions(), 1);
        assert_eq!(Waits::of(&snapshot).sessions(), 3);
    }
}
