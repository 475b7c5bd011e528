//! The transactions and session guards of one keeper that are alive, and those that ended a moment ago.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::journal::Journal;

/// How many that have ended are remembered, and for how long: a report about a deadlock is written when its survivor may
/// have ended already.
const MOST_RECENT: usize = 256;
const RECENT: Duration = Duration::from_secs(5);

/// Who is in flight.
#[derive(Default)]
pub(crate) struct Flights {
    state: Mutex<State>,
    /// Whether somebody waits for a flight to begin.
    awaited: AtomicBool,
    begun: Notify,
}

#[derive(Default)]
struct State {
    next: u64,
    live: HashMap<u64, Arc<Journal>>,
    recent: VecDeque<(Instant, Arc<Journal>)>,
}

impl Flights {
    /// Enters a journal, until the flight is dropped.
    pub(crate) fn enter(self: &Arc<Self>, journal: Journal) -> Flight {
        let journal = Arc::new(journal);
        let number = {
            let mut state = self.lock();
            state.next += 1;
            let number = state.next;
            drop(state.live.insert(number, Arc::clone(&journal)));
            number
        };
        if self.awaited.load(Ordering::Acquire) {
            self.begun.notify_one();
        }
        Flight {
            flights: Arc::clone(self),
            number,
            journal,
        }
    }

    /// Everything that is alive, by numbers that are never used twice.
    pub(crate) fn live(&self) -> Vec<(u64, Arc<Journal>)> {
        let state = self.lock();
        let live = state.live.iter();
        live.map(|(number, journal)| (*number, Arc::clone(journal)))
            .collect()
    }

    /// Those on the backend with this pid, the latest first.
    pub(crate) fn of_backend(&self, pid: i32) -> Vec<Arc<Journal>> {
        let state = self.lock();
        let recent = state
            .recent
            .iter()
            .filter(|(ended, _)| ended.elapsed() < RECENT)
            .map(|(_, journal)| journal);
        let mut found: Vec<_> = state
            .live
            .values()
            .chain(recent)
            .filter(|journal| journal.pid() == Some(pid))
            .map(Arc::clone)
            .collect();
        found.sort_by_key(|journal| std::cmp::Reverse(journal.began));
        found
    }

    /// Whether no transaction is alive. Session guards do not count: they idle for long.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().live.values().all(|journal| journal.of_guard)
    }

    /// Waits until a flight begins, or one is there already, or for [`wake`](Self::wake).
    ///
    /// Cancel safety: nothing is lost; flights that are there count the next time.
    pub(crate) async fn begun(&self) {
        // In this order, so that one that begins in between is seen by one side or the other.
        self.awaited.store(true, Ordering::Release);
        let not_awaited = scopeguard::guard(&self.awaited, |awaited| {
            awaited.store(false, Ordering::Release);
        });
        if self.is_empty() {
            self.begun.notified().await;
        }
        drop(not_awaited);
    }

    /// Lets whoever waits for a flight look at what else has changed.
    pub(crate) fn wake(&self) {
        self.begun.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Flights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights")
            .field("live", &self.lock().live.len())
            .finish_non_exhaustive()
    }
}

/// One that is alive. Dropping it ends its journal.
#[derive(Debug)]
pub(crate) struct Flight {
    flights: Arc<Flights>,
    number: u64,
    journal: Arc<Journal>,
}

impl Flight {
    pub(crate) fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.journal.end();
        let mut state = self.flights.lock();
        if let Some(journal) = state.live.remove(&self.number) {
            if state.recent.len() >= MOST_RECENT {
                drop(state.recent.pop_front());
            }
            state.recent.push_back((Instant::now(), journal));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        Journal::new(None, None, None, false)
    }

    #[test]
    fn those_that_ended_are_remembered_for_a_while() {
        let flights = Arc::new(Flights::default());
        let first = flights.enter(journal());
        first.journal().identify(7);
        let second = flights.enter(journal());
        second.journal().identify(7);
        let numbers = |flights: &Flights| flights.live().len();
        assert_eq!(numbers(&flights), 2);
        drop(first);
        assert_eq!(numbers(&flights), 1);
        let found = flights.of_backend(7);
        assert_eq!(
            found
                .iter()
                .map(|journal| journal.has_ended())
                .collect::<Vec<_>>(),
            [false, true]
        );
        assert!(flights.of_backend(8).is_empty());
        for _ in 0..MOST_RECENT * 2 {
            drop(flights.enter(journal()));
        }
        assert_eq!(flights.of_backend(7).len(), 1);
    }

    #[tokio::test]
    async fn a_flight_wakes_who_waits_for_one() {
        let flights = Arc::new(Flights::default());
        let waiting = tokio::spawn({
            let flights = Arc::clone(&flights);
            async move { flights.begun().await }
        });
        tokio::task::yield_now().await;
        let flight = flights.enter(journal());
        waiting.await.expect("woken");
        flights.begun().await;
        drop(flight);
    }
}
