//! Who is next for a session lock inside this process.
//!
//! Of all callers of one keeper that want one key exclusively, one at a time deals with the server: the first. The others
//! stand in line here, in order and without a connection, until it has finished. When it releases the lock, its session
//! goes to the next of them together with the lock, in the message that releases it: see
//! [`SessionGuard`](super::SessionGuard).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::advisory::sql::TryLockRow;
use crate::connection::Session;
use crate::deadline::Deadline;
use crate::key::{KeyId, LockKey};

/// How often the first in line looks whether the lock is free all the same: a holder's connection can have ended without
/// its guard having been dropped.
const POLL_INTERVAL: Duration = Duration::from_millis(300);

/// The lines of one keeper.
#[derive(Default)]
pub(crate) struct LocalQueue {
    places: Mutex<HashMap<KeyId, KeyQueue>>,
}

#[derive(Default)]
struct KeyQueue {
    /// Who holds the lock, or deals with the server for it.
    heads: usize,
    waiting: VecDeque<WaiterEntry>,
    next: u64,
}

struct WaiterEntry {
    number: u64,
    application_name: String,
    /// Where it waits.
    runtime: Option<Handle>,
    sender: oneshot::Sender<Handoff>,
}

/// What comes of entering the line.
pub(crate) enum Entry {
    /// Nobody is there: deal with the server.
    First(HeadTicket),
    QueuedWaiter(QueuedWaiter),
}

/// What the first in line is given.
pub(crate) enum Handoff {
    /// Its turn to deal with the server.
    Permit(HeadTicket),
    /// A session, with the lock or without it.
    Session(HandedSession),
}

impl LocalQueue {
    /// Takes the place of the first, or one in the line.
    pub(crate) fn enter(self: &Arc<Self>, key: &LockKey, application_name: &str) -> Entry {
        let id = key.id();
        let mut places = self.lock();
        let place = places.entry(id).or_default();
        if place.heads == 0 && place.waiting.is_empty() {
            place.heads = 1;
            return Entry::First(self.with_ticket(id));
        }
        let (sender, receiver) = oneshot::channel();
        place.next += 1;
        let number = place.next;
        place.waiting.push_back(WaiterEntry {
            number,
            application_name: application_name.to_owned(),
            runtime: Handle::try_current().ok(),
            sender,
        });
        Entry::QueuedWaiter(QueuedWaiter {
            line: Arc::clone(self),
            id,
            number,
            receiver,
        })
    }

    /// A ticket for a caller that was granted the lock without queueing.
    pub(crate) fn ticket(self: &Arc<Self>, key: &LockKey) -> HeadTicket {
        let id = key.id();
        self.lock().entry(id).or_default().heads += 1;
        self.with_ticket(id)
    }

    fn with_ticket(self: &Arc<Self>, id: KeyId) -> HeadTicket {
        HeadTicket {
            line: Arc::clone(self),
            id,
        }
    }

    /// Removes the first caller that still waits, with a ticket for it.
    fn pop(
        self: &Arc<Self>,
        places: &mut HashMap<KeyId, KeyQueue>,
        id: KeyId,
    ) -> Option<(WaiterEntry, HeadTicket)> {
        let place = places.get_mut(&id)?;
        while let Some(waiter) = place.waiting.pop_front() {
            if !waiter.sender.is_closed() {
                place.heads += 1;
                return Some((waiter, self.with_ticket(id)));
            }
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, KeyQueue>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LocalQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalQueue")
            .field("keys", &self.lock().len())
            .finish_non_exhaustive()
    }
}

/// The right to deal with the server, and then to hold the lock. When the last one ends, the next in line has its turn.
///
/// Invariant: while a caller waits for a key, a ticket for that key exists, and its end wakes the first waiter.
pub(crate) struct HeadTicket {
    line: Arc<LocalQueue>,
    id: KeyId,
}

impl HeadTicket {
    /// The next in line, if there is one.
    pub(crate) fn next(&self) -> Option<NextWaiter> {
        let (waiter, ticket) = self.line.pop(&mut self.line.lock(), self.id)?;
        Some(NextWaiter {
            application_name: waiter.application_name,
            runtime: waiter.runtime,
            sender: waiter.sender,
            ticket,
        })
    }
}

impl Drop for HeadTicket {
    fn drop(&mut self) {
        let next = {
            let mut places = self.line.lock();
            let Some(place) = places.get_mut(&self.id) else {
                return;
            };
            place.heads -= 1;
            if place.heads > 0 {
                return;
            }
            let next = self.line.pop(&mut places, self.id);
            if next.is_none() {
                places.remove(&self.id);
            }
            next
        };
        if let Some((waiter, ticket)) = next {
            // When the receiver is gone, the ticket is dropped with the message, and so passes to the next waiter.
            drop(waiter.sender.send(Handoff::Permit(ticket)));
        }
    }
}

impl fmt::Debug for HeadTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeadTicket").finish_non_exhaustive()
    }
}

/// The waiter that a session is about to be handed to. Dropping it drops its ticket, which wakes the next waiter.
pub(crate) struct NextWaiter {
    pub(crate) application_name: String,
    /// The runtime it waits on, which sees to the session from now on: that of the one before may stand still, or end.
    pub(crate) runtime: Option<Handle>,
    sender: oneshot::Sender<Handoff>,
    ticket: HeadTicket,
}

impl NextWaiter {
    /// Passes a session on. `unlock` is what returns the lock if nobody is there any more to take it.
    pub(crate) fn pass(
        self,
        session: Session,
        tried: TryLockRow,
        unlock: Box<dyn FnOnce(Session) + Send>,
    ) {
        let passed = HandedSession(Some(Box::new(Parts {
            session,
            tried,
            unlock,
            ticket: self.ticket,
        })));
        // Refused, it is dropped.
        drop(self.sender.send(Handoff::Session(passed)));
    }
}

/// A session on its way from one guard to the next. Where nobody takes it the lock is returned, and then the session.
pub(crate) struct HandedSession(Option<Box<Parts>>);

struct Parts {
    session: Session,
    /// What came of the `try` in the name of the next.
    tried: TryLockRow,
    unlock: Box<dyn FnOnce(Session) + Send>,
    ticket: HeadTicket,
}

impl HandedSession {
    pub(crate) fn take(mut self) -> (Session, TryLockRow, HeadTicket) {
        let parts = self.0.take().expect("a session is passed on once");
        (parts.session, parts.tried, parts.ticket)
    }
}

impl Drop for HandedSession {
    fn drop(&mut self) {
        let Some(parts) = self.0.take() else { return };
        if parts.tried.granted {
            (parts.unlock)(parts.session);
        } else {
            parts.session.return_to_pool();
        }
        // Only now the next has its turn.
        drop(parts.ticket);
    }
}

/// A place in the line. Dropping it gives it up.
pub(crate) struct QueuedWaiter {
    line: Arc<LocalQueue>,
    id: KeyId,
    number: u64,
    receiver: oneshot::Receiver<Handoff>,
}

/// Why the wait in line was interrupted.
pub(crate) enum Woken {
    /// The deadline has passed.
    TimedOut,
    /// It is first in the queue, or was removed from it for a session whose answer does not come: time to try the lock
    /// itself.
    Poll,
    /// It was removed from the queue for a session that was then lost.
    Disconnected,
}

impl QueuedWaiter {
    /// Waits until the deadline for what this waiter is handed.
    ///
    /// Cancel safety: may be called again.
    pub(crate) async fn next_handoff(&mut self, deadline: &Deadline) -> Result<Handoff, Woken> {
        loop {
            let wait = Deadline::after(deadline.remaining().min(POLL_INTERVAL));
            match wait.bound(Duration::ZERO, &mut self.receiver).await {
                Some(Ok(next_handoff)) => return Ok(next_handoff),
                Some(Err(_)) => return Err(Woken::Disconnected),
                None if deadline.has_passed() => {
                    // A session that is handed over at this moment is dropped with the receiver, not lost.
                    return Err(Woken::TimedOut);
                }
                None if self.is_first() => return Err(Woken::Poll),
                None => {}
            }
        }
    }

    fn is_first(&self) -> bool {
        let places = self.line.lock();
        let Some(place) = places.get(&self.id) else {
            return true;
        };
        // They stand in the order of their numbers.
        let first = place.waiting.front();
        first.is_none_or(|first| self.number <= first.number)
    }
}

impl Drop for QueuedWaiter {
    fn drop(&mut self) {
        let mut places = self.line.lock();
        if let Some(place) = places.get_mut(&self.id) {
            place.waiting.retain(|waiter| waiter.number != self.number);
        }
    }
}
