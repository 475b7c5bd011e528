//! Earlier incidents with the same fingerprint.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::Fingerprint;

const MAX_ENTRIES: usize = 1024;

/// The occurrences of earlier incidents, by fingerprint. Bounded: the incidents that occurred longest ago are
/// forgotten.
#[derive(Debug, Default)]
pub(crate) struct IncidentHistory {
    by_fingerprint: Mutex<HashMap<Fingerprint, Occurrences>>,
}

/// How often incidents with one fingerprint occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Occurrences {
    pub(super) first: SystemTime,
    /// Before the current one.
    pub(super) previous: Option<SystemTime>,
    pub(super) last: SystemTime,
    pub(super) count: u64,
}

impl IncidentHistory {
    /// Counts an incident, and returns the occurrences including this one. Times may come in any order.
    pub(super) fn count(&self, fingerprint: Fingerprint, at: SystemTime) -> Occurrences {
        let mut by_fingerprint = self
            .by_fingerprint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if by_fingerprint.len() >= MAX_ENTRIES && !by_fingerprint.contains_key(&fingerprint) {
            let oldest = by_fingerprint
                .iter()
                .min_by_key(|(_, occurrences)| occurrences.last);
            if let Some(oldest) = oldest.map(|(fingerprint, _)| *fingerprint) {
                by_fingerprint.remove(&oldest);
            }
        }
        match by_fingerprint.entry(fingerprint) {
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                known.previous = Some(known.last);
                known.first = known.first.min(at);
                known.last = known.last.max(at);
                known.count = known.count.saturating_add(1);
                *known
            }
            Entry::Vacant(new) => *new.insert(Occurrences {
                first: at,
                previous: None,
                last: at,
                count: 1,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn equal_fingerprints_are_counted() {
        let history = IncidentHistory::default();
        assert_eq!(history.count(Fingerprint(1), at(10)).count, 1);
        assert_eq!(history.count(Fingerprint(2), at(11)).previous, None);
        let again = history.count(Fingerprint(1), at(20));
        assert_eq!((again.first, again.previous), (at(10), Some(at(10))));
        assert_eq!((again.last, again.count), (at(20), 2));
        // The clock was set back.
        let early = history.count(Fingerprint(1), at(5));
        assert_eq!((early.first, early.previous), (at(5), Some(at(20))));
        assert_eq!((early.last, early.count), (at(20), 3));
    }

    #[test]
    fn the_oldest_occurrence_is_forgotten() {
        let history = IncidentHistory::default();
        for n in 0..MAX_ENTRIES as u64 {
            history.count(Fingerprint(n), at(n));
        }
        history.count(Fingerprint(0), at(5000));
        history.count(Fingerprint(9999), at(5001));
        assert_eq!(
            history
                .by_fingerprint
                .lock()
                .expect("nobody panicked")
                .len(),
            MAX_ENTRIES
        );
        assert_eq!(history.count(Fingerprint(0), at(5002)).count, 3);
        assert_eq!(
            history.count(Fingerprint(1), at(5003)).count,
            1,
            "forgotten"
        );
    }
}
