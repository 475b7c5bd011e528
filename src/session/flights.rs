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
/// How long the answer to BEGIN may be on its way.
const ANSWER: Duration = Duration::from_millis(50);

/// How long before a report one of its participants may have ended.
const GONE: Duration = Duration::from_millis(50);
/// A transaction younger than this has hardly locked something, waited, and been waited for.
const SETTLED: Duration = Duration::from_millis(3);

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
    recent: VecDeque<Arc<Journal>>,
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

    /// The one on the backend with this pid at that time: of a session guard's and that of the transaction on it, the
    /// transaction's.
    pub(crate) fn of_backend(&self, pid: i32, at: Instant) -> Option<Arc<Journal>> {
        let state = self.lock();
        let is_recent = |ended: Instant| ended.elapsed() < RECENT;
        let recent = state.recent.iter();
        let recent = recent.filter(|journal| journal.ended().is_some_and(is_recent));
        let on_it: Vec<_> = state
            .live
            .values()
            .chain(recent)
            .filter(|journal| journal.pid() == Some(pid))
            .collect();
        let then = on_it.iter().filter(|journal| journal.was_alive(at));
        let alive = then.max_by_key(|journal| journal.began);
        // The winner of a deadlock goes on before the victim has heard of it: it can have committed, and another have
        // begun.
        let gone = || {
            let ended = on_it.iter().filter_map(|journal| {
                let ended = journal.ended().filter(|ended| *ended < at)?;
                (at - ended < GONE).then_some((ended, journal))
            });
            Some(ended.max_by_key(|(ended, _)| *ended)?.1)
        };
        let settled = alive.filter(|journal| at - journal.began >= SETTLED);
        let found = settled.or_else(gone).or(alive).or_else(|| {
            // Locks that BEGIN's message took are held before its answer is here.
            let soon = on_it
                .iter()
                .filter(|journal| journal.began > at && journal.began - at < ANSWER);
            soon.min_by_key(|journal| journal.began)
        });
        found.map(|journal| Arc::clone(journal))
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
pub(crate) struct Flight {
    flights: Arc<Flights>,
    number: u64,
    journal: Arc<Journal>,
}

/// Without the journal, which has statements with their literals in it.
impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flight")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
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
            state.recent.push_back(journal);
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
        let now = Instant::now() + SETTLED;
        let found = |at: Instant| {
            let found = flights.of_backend(7, at);
            found.map(|journal| journal.ended().is_some())
        };
        assert_eq!(found(now), Some(false));
        assert!(flights.of_backend(8, now).is_none());
        for _ in 0..MOST_RECENT * 2 {
            drop(flights.enter(journal()));
        }
        assert_eq!(found(now), Some(false));
    }

    #[test]
    fn a_backend_is_told_apart_by_the_time() {
        let flights = Arc::new(Flights::default());
        let enter = || {
            std::thread::sleep(Duration::from_millis(1));
            let flight = flights.enter(journal());
            flight.journal().identify(7);
            std::thread::sleep(Duration::from_millis(1));
            flight
        };
        let is = |at: Instant, flight: &Arc<Journal>| {
            let found = flights.of_backend(7, at);
            found.is_some_and(|found| Arc::ptr_eq(&found, flight))
        };
        let guard = enter();
        let first = enter();
        let inside = Arc::clone(first.journal());
        drop(first);
        // By what the journals say: the machine may have stood still between any two of these lines.
        let (began, first_began) = (guard.journal().began, inside.began);
        let first_ended = inside.ended().expect("it has ended");
        let guards = began + (first_began - began) / 2;
        let second = first_began + (first_ended - first_began) / 2;
        let after = first_ended.max(began + SETTLED) + Duration::from_millis(1);
        let before = began - ANSWER / 2;
        assert!(is(before, guard.journal()), "its BEGIN was being answered");
        assert!(is(guards, guard.journal()));
        assert!(is(second, &inside));
        assert!(is(after, guard.journal()));
        let guards = Arc::clone(guard.journal());
        drop(guard);
        assert!(is(second, &inside));
        // The one that ended a moment ago may have had a part in what is reported now.
        let ended = guards.ended().expect("it has ended");
        assert!(flights.of_backend(7, ended + GONE / 2).is_some());
        assert!(flights.of_backend(7, ended + GONE).is_none());
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
