//! The lock waits of a snapshot, as numbers that can be compared.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::database_filter::DatabaseFilter;
use crate::graph::{BackendId, Snapshot};
use crate::postgres::timestamp::Age;

/// How many sessions wait for a lock at one moment, and the longest of these waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WaitSummary {
    sessions: usize,
    longest: Option<Duration>,
}

impl WaitSummary {
    /// The waits of a snapshot.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        Self::among(snapshot, &DatabaseFilter::default())
    }

    /// The waits of sessions in some databases.
    pub(crate) fn among(snapshot: &Snapshot, databases: &DatabaseFilter) -> Self {
        let mut waiters: BTreeMap<&BackendId, Option<Duration>> = BTreeMap::new();
        for edge in snapshot.edges() {
            let backend = snapshot.backend(edge.waiter());
            if databases.includes(backend.and_then(|backend| backend.database())) {
                let longest = waiters.entry(edge.waiter()).or_default();
                *longest = (*longest).max(edge.wait_age());
            }
        }
        Self {
            sessions: waiters.len(),
            longest: waiters.into_values().flatten().max(),
        }
    }

    getters! {
        /// How many sessions wait for a lock.
        sessions: usize;

        /// How long the longest wait has lasted; `None` if no session waits, or if all waits have just begun.
        longest: Option<Duration>;
    }

    /// Whether no session waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions == 0
    }

    /// Whether the waits have decreased: fewer sessions wait, or as many and the longest wait has ended.
    #[must_use]
    pub fn has_fallen_since(&self, before: &Self) -> bool {
        self.sessions < before.sessions
            || (self.sessions == before.sessions && self.longest < before.longest)
    }
}

/// `3 sessions wait, the longest for 12.0s` or `nobody waits`.
impl fmt::Display for WaitSummary {
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

#[cfg(test)]
mod tests {
    use super::super::testing::{backend, edge, snapshot};
    use super::*;

    #[test]
    fn a_session_counts_once_with_its_longest_wait() {
        let seconds = Duration::from_secs;
        let found = WaitSummary::of(&snapshot(
            vec![],
            vec![
                edge(2, 1, seconds(5)),
                edge(2, 3, seconds(7)),
                edge(3, 1, seconds(1)),
            ],
        ));
        assert_eq!((found.sessions(), found.longest()), (2, Some(seconds(7))));
        assert_eq!(found.to_string(), "2 sessions wait, the longest for 7.0s");
        let none = WaitSummary::of(&snapshot(vec![], vec![]));
        assert!(none.is_empty() && none.has_fallen_since(&found));
        assert!(!found.has_fallen_since(&none) && !found.has_fallen_since(&found));
    }

    #[test]
    fn only_sessions_of_the_databases_count() {
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
        let among = DatabaseFilter(vec!["here".into()]);
        assert_eq!(WaitSummary::among(&snapshot, &among).sessions(), 1);
        assert_eq!(WaitSummary::of(&snapshot).sessions(), 3);
    }
}
