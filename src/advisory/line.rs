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

use crate::advisory::sql::Tried;
use crate::connection::Session;
use crate::deadline::Deadline;
use crate::key::{KeyId, LockKey};

/// How often the first in line looks whether the lock is free all the same: a holder's connection can have ended without
/// its guard having been dropped.
const LOOK: Duration = Duration::from_millis(300);

/// The lines of one keeper.
#[derive(Default)]
pub(crate) struct Line {
    places: Mutex<HashMap<KeyId, Place>>,
}

#[derive(Default)]
struct Place {
    /// Who holds the lock, or deals with the server for it.
    stakes: usize,
    waiting: VecDeque<Waiter>,
    next: u64,
}

struct Waiter {
    number: u64,
    application_name: String,
    /// Where it waits.
    runtime: Option<Handle>,
    sender: oneshot::Sender<Handed>,
}

/// What comes of entering the line.
pub(crate) enum Entered {
    /// Nobody is there: deal with the server.
    First(Stake),
    Waiting(Waiting),
}

/// What the first in line is given.
pub(crate) enum Handed {
    /// Its turn to deal with the server.
    Turn(Stake),
    /// A session, with the lock or without it.
    Session(Passed),
}

impl Line {
    /// Takes the place of the first, or one in the line.
    pub(crate) fn enter(self: &Arc<Self>, key: &LockKey, application_name: &str) -> Entered {
        let id = key.id();
        let mut places = self.lock();
        let place = places.entry(id).or_default();
        if place.stakes == 0 && place.waiting.is_empty() {
            place.stakes = 1;
            return Entered::First(self.staked(id));
        }
        let (sender, receiver) = oneshot::channel();
        place.next += 1;
        let number = place.next;
        place.waiting.push_back(Waiter {
            number,
            application_name: application_name.to_owned(),
            runtime: Handle::try_current().ok(),
            sender,
        });
        Entered::Waiting(Waiting {
            line: Arc::clone(self),
            id,
            number,
            receiver,
        })
    }

    /// A stake of somebody who has got the lock without having been in line.
    pub(crate) fn stake(self: &Arc<Self>, key: &LockKey) -> Stake {
        let id = key.id();
        self.lock().entry(id).or_default().stakes += 1;
        self.staked(id)
    }

    fn staked(self: &Arc<Self>, id: KeyId) -> Stake {
        Stake {
            line: Arc::clone(self),
            id,
        }
    }

    /// The first in line that still waits, with a stake for it.
    fn pop(
        self: &Arc<Self>,
        places: &mut HashMap<KeyId, Place>,
        id: KeyId,
    ) -> Option<(Waiter, Stake)> {
        let place = places.get_mut(&id)?;
        while let Some(waiter) = place.waiting.pop_front() {
            if !waiter.sender.is_closed() {
                place.stakes += 1;
                return Some((waiter, self.staked(id)));
            }
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("keys", &self.lock().len())
            .finish_non_exhaustive()
    }
}

/// The right to deal with the server, and then to hold the lock. When the last one ends, the next in line has its turn.
///
/// Invariant: while anybody waits for a key there is a stake in it, so there is somebody who will wake the first.
pub(crate) struct Stake {
    line: Arc<Line>,
    id: KeyId,
}

impl Stake {
    /// The next in line, if there is one.
    pub(crate) fn next(&self) -> Option<Next> {
        let (waiter, stake) = self.line.pop(&mut self.line.lock(), self.id)?;
        Some(Next {
            application_name: waiter.application_name,
            runtime: waiter.runtime,
            sender: waiter.sender,
            stake,
        })
    }
}

impl Drop for Stake {
    fn drop(&mut self) {
        let next = {
            let mut places = self.line.lock();
            let Some(place) = places.get_mut(&self.id) else {
                return;
            };
            place.stakes -= 1;
            if place.stakes > 0 {
                return;
            }
            let next = self.line.pop(&mut places, self.id);
            if next.is_none() {
                places.remove(&self.id);
            }
            next
        };
        if let Some((waiter, stake)) = next {
            // Refused, the stake in it is dropped, and so goes on to the next.
            drop(waiter.sender.send(Handed::Turn(stake)));
        }
    }
}

impl fmt::Debug for Stake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stake").finish_non_exhaustive()
    }
}

/// Somebody who waits for a session to be passed on. Dropped, its stake is, and the line goes on.
pub(crate) struct Next {
    pub(crate) application_name: String,
    /// The runtime it waits on, which sees to the session from now on: that of the one before may stand still, or end.
    pub(crate) runtime: Option<Handle>,
    sender: oneshot::Sender<Handed>,
    stake: Stake,
}

impl Next {
    /// Passes a session on. `unlock` is what returns the lock if nobody is there any more to take it.
    pub(crate) fn pass(
        self,
        session: Session,
        tried: Tried,
        unlock: Box<dyn FnOnce(Session) + Send>,
    ) {
        let passed = Passed(Some(Box::new(Parts {
            session,
            tried,
            unlock,
            stake: self.stake,
        })));
        // Refused, it is dropped.
        drop(self.sender.send(Handed::Session(passed)));
    }
}

/// A session on its way from one guard to the next. Where nobody takes it the lock is returned, and then the session.
pub(crate) struct Passed(Option<Box<Parts>>);

struct Parts {
    session: Session,
    /// What came of the `try` in the name of the next.
    tried: Tried,
    unlock: Box<dyn FnOnce(Session) + Send>,
    stake: Stake,
}

impl Passed {
    pub(crate) fn take(mut self) -> (Session, Tried, Stake) {
        let parts = self.0.take().expect("a session is passed on once");
        (parts.session, parts.tried, parts.stake)
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        let Some(parts) = self.0.take() else { return };
        if parts.tried.granted {
            (parts.unlock)(parts.session);
        } else {
            parts.session.give_back();
        }
        // Only now the next has its turn.
        drop(parts.stake);
    }
}

/// A place in the line. Dropping it gives it up.
pub(crate) struct Waiting {
    line: Arc<Line>,
    id: KeyId,
    number: u64,
    receiver: oneshot::Receiver<Handed>,
}

/// Why the wait in line was interrupted.
pub(crate) enum Interrupted {
    /// The deadline has passed.
    Late,
    /// First in line, or out of it to be handed a session whose answer does not come, and time to look for oneself.
    Look,
    /// Taken out of the line, to be handed a session that was then lost.
    Lost,
}

impl Waiting {
    /// What one is handed, until the deadline.
    ///
    /// Cancel safety: may be called again.
    pub(crate) async fn handed(&mut self, deadline: &Deadline) -> Result<Handed, Interrupted> {
        loop {
            let wait = Deadline::after(deadline.remaining().min(LOOK));
            match wait.bound(Duration::ZERO, &mut self.receiver).await {
                Some(Ok(handed)) => return Ok(handed),
                Some(Err(_)) => return Err(Interrupted::Lost),
                None if deadline.has_passed() => {
                    // What is handed over in this moment is not lost: it is dropped with the receiver.
                    return Err(Interrupted::Late);
                }
                None if self.is_first() => return Err(Interrupted::Look),
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

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut places = self.line.lock();
        if let Some(place) = places.get_mut(&self.id) {
            place.waiting.retain(|waiter| waiter.number != self.number);
        }
    }
}
