//! The one queue inside the process, before the server's own.
//!
//! A waiter at the server occupies a connection. Did all waiters wait there, they would take the whole pool, and a holder that
//! needs one connection more would starve behind its own waiters. So most of them wait here, without a connection.
//!
//! For each key the callers of one keeper stand in a line, first come, first served. A caller enters it when it has found
//! the lock busy, or others in line; for a session lock at once, because only one at a time is to deal with the server for
//! it (see [`SessionGuard`](super::SessionGuard)). Only the first [`TRYING`] of a line try the lock at the server. Those who find
//! it busy wait there if they get a place. The places are few for all lines together: [`places`].
//!
//! The first of a line stands in turn for the next place. While one stands in turn, a waiter with a place gives it up: at
//! once if it is not the first of its line, else after [`TURN`]. A place that no first wants goes to one that is second in its
//! line. In the meantime its lock may become free: what this keeper releases wakes the first of its line; what others
//! release is seen by a look at `pg_locks`, one for all lines each [`LOOK_INTERVAL`].
//!
//! A set stands in the line of its first key only: that one it waits for or holds, so whoever waits behind it here would
//! wait for it at the server too. In the line of a later key it could keep others from a key that is free, and so even the
//! one who holds its first key. [`Tx::advisory_lock`](crate::Tx::advisory_lock) waits on a connection that it has in any case: it
//! stands in no line, and takes no place.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::{Advisory, LockRequest, sql};
use crate::advisory::sql::TryLockRow;
use crate::connection::{Session, run_shielded};
use crate::deadline::Deadline;
use crate::error::is_insufficient_privilege;
use crate::key::{KeyId, LockKey};
use crate::meter::Waiting;
use crate::mode::AdvisoryMode;

/// How many of one line deal with the server. More than one, so that while the first is being granted the next is in the
/// server's queue already.
const TRYING: usize = 2;
/// How often those who wait here have `pg_locks` looked at. It is also how much later than at the server a waiter can find a
/// lock free that was released by others.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// After so long a look counts as lost.
const LONGEST_LOOK: Duration = Duration::from_secs(10);
/// How many keys of a set are looked at. Of a larger one more are tried than are free.
const LOOKED_AT: usize = 100;
/// How long a waiter may wait at the server before others are to: longer than most waits are.
pub(super) const TURN: Duration = Duration::from_secs(10);

/// How many requests of a keeper wait at the server at a time: a quarter of the pool, at least one.
pub(super) fn places(pool_size: usize) -> usize {
    (pool_size / 4).max(1)
}

/// The lines of one keeper.
#[derive(Default)]
pub(crate) struct WaitQueue(Mutex<State>);

#[derive(Default)]
struct State {
    lines: BTreeMap<KeyId, Line>,
    places: usize,
    taken: usize,
    /// The first of their lines that found their lock busy and have no place, in their turn for one.
    in_turn: VecDeque<(KeyId, u64)>,
    /// The others who found their lock busy and have no place: they get one where nobody is in turn.
    behind: VecDeque<(KeyId, u64)>,
    next_number: u64,
    is_looking: bool,
    last_look: Option<Instant>,
}

#[derive(Default)]
struct Line {
    /// Guards of this keeper that hold the key and hand their session over.
    guards: usize,
    waiters: VecDeque<Entry>,
}

struct Entry {
    number: u64,
    /// What is looked at.
    keys: Vec<LockKey>,
    mode: AdvisoryMode,
    /// Whether its single wait may take as long as it has.
    is_group: bool,
    heir: Option<Heir>,
    wake: Arc<Notify>,
    /// The best position in the line at which it was told to try.
    told_at: Option<usize>,
    is_to_try: bool,
    has_place: bool,
    /// Whether it has stepped back, and is to have no place.
    is_aside: bool,
    /// Whether it does nothing but wait here.
    is_parked: bool,
    /// Whether a session is on its way to it.
    is_heir: bool,
    handed: Option<HandedSession>,
}

/// One to whom a guard's session can be handed over.
#[derive(Clone)]
pub(super) struct Heir {
    pub(super) application_name: String,
    /// The runtime it waits on, which sees to the session from now on: that of the one before may stand still, or end.
    pub(super) runtime: Option<Handle>,
}

impl Entry {
    fn tell(&mut self) {
        self.is_to_try = true;
        self.wake.notify_one();
    }
}

impl WaitQueue {
    /// A place in the line, if others wait there whom this caller has to let go first.
    pub(super) fn enter_behind(
        self: &Arc<Self>,
        request: &LockRequest,
        places: usize,
    ) -> Option<QueuedWaiter> {
        let is_crowded = |line: &Line| {
            line.waiters.len() >= TRYING || line.waiters.iter().any(|waiter| !waiter.has_place)
        };
        let id = request.keys()[0].id();
        let must_wait = self.lock().lines.get(&id).is_some_and(is_crowded);
        must_wait.then(|| self.enter(request, places, None, false))
    }

    /// A place in the line; for one that has tried the lock, or has not yet.
    pub(super) fn enter(
        self: &Arc<Self>,
        request: &LockRequest,
        places: usize,
        heir: Option<Heir>,
        has_tried: bool,
    ) -> QueuedWaiter {
        let keys = request.keys().iter().take(LOOKED_AT).cloned().collect();
        let id = request.keys()[0].id();
        let wake = Arc::new(Notify::new());
        // Before the queue is locked: it calls the program's own recorder.
        let counted = Waiting::begin();
        let mut state = self.lock();
        state.next_number += 1;
        let number = state.next_number;
        let waiters = &mut state.lines.entry(id).or_default().waiters;
        waiters.push_back(Entry {
            number,
            keys,
            mode: request.mode(),
            is_group: request.is_group,
            heir,
            wake: Arc::clone(&wake),
            told_at: has_tried.then_some(waiters.len()).filter(|at| *at < TRYING),
            is_to_try: false,
            has_place: false,
            is_aside: false,
            is_parked: false,
            is_heir: false,
            handed: None,
        });
        state.places = places;
        state.settle(id);
        state.give_places();
        QueuedWaiter {
            queue: Arc::clone(self),
            id,
            number,
            wake,
            has_waited: has_tried,
            _counted: counted,
        }
    }

    /// Notes locks that were granted. `hands_over` is true for those of a guard that can hand its session over.
    pub(super) fn hold(self: &Arc<Self>, keys: &[LockKey], hands_over: bool) -> HeldKeys {
        let ids: Vec<_> = keys.iter().map(LockKey::id).collect();
        if hands_over {
            self.lock().lines.entry(ids[0]).or_default().guards += 1;
        }
        HeldKeys {
            queue: Arc::clone(self),
            ids,
            hands_over,
        }
    }

    /// The next in line, if it waits here for a session to be handed over.
    pub(super) fn next(self: &Arc<Self>, key: &LockKey) -> Option<NextWaiter> {
        let id = key.id();
        let mut state = self.lock();
        let first = state.lines.get_mut(&id)?.waiters.front_mut()?;
        let heir = first.heir.clone()?;
        if !first.is_parked || first.is_heir || first.has_place {
            return None;
        }
        first.is_heir = true;
        Some(NextWaiter {
            heir,
            queue: Arc::clone(self),
            id,
            number: first.number,
        })
    }

    pub(super) fn is_aside(&self, aside: &Aside) -> bool {
        let mut state = self.lock();
        let waiter = state.entry(aside.id, aside.number);
        waiter.is_some_and(|waiter| waiter.is_aside)
    }

    /// Has one that has stepped back try again, and wait at the server as before.
    pub(super) fn rejoin(&self, aside: &Aside) {
        if let Some(waiter) = self.lock().entry(aside.id, aside.number) {
            waiter.is_aside = false;
            waiter.tell();
        }
    }

    /// Whose turn to look it is; nobody's while another looks, or has just looked.
    fn begin_look(self: &Arc<Self>) -> Option<Look> {
        let mut state = self.lock();
        let is_due = state
            .last_look
            .is_none_or(|last| last.elapsed() >= LOOK_INTERVAL);
        // A look that is so old is on a runtime that stands still.
        let is_under_way = state
            .last_look
            .is_some_and(|last| last.elapsed() < LONGEST_LOOK);
        if state.is_looking && is_under_way || !is_due {
            return None;
        }
        state.is_looking = true;
        let now = Instant::now();
        state.last_look = Some(now);
        Some(Look(Arc::clone(self), now))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn entry(&mut self, id: KeyId, number: u64) -> Option<&mut Entry> {
        let waiters = &mut self.lines.get_mut(&id)?.waiters;
        waiters.iter_mut().find(|waiter| waiter.number == number)
    }

    fn position(&self, id: KeyId, number: u64) -> Option<usize> {
        let waiters = &self.lines.get(&id)?.waiters;
        waiters.iter().position(|waiter| waiter.number == number)
    }

    fn is_first(&self, id: KeyId, number: u64) -> bool {
        self.position(id, number) == Some(0)
    }

    fn is_to_yield(&self, id: KeyId, number: u64) -> bool {
        if self.in_turn.is_empty() {
            return false;
        }
        // Before the first of any line, those go who have a place although they are not.
        let yields = |waiter: &Entry| waiter.has_place && !waiter.is_group;
        let mut lines = self.lines.values();
        !self.is_first(id, number) || !lines.any(|line| line.waiters.iter().skip(1).any(yields))
    }

    /// Tells those to try who have come far enough in the line.
    fn settle(&mut self, id: KeyId) {
        let Some(line) = self.lines.get_mut(&id) else {
            return;
        };
        if line.guards == 0 && line.waiters.is_empty() {
            self.lines.remove(&id);
            return;
        }
        // Of those who want a session lock one at a time, and none while it can be handed the holder's session.
        let mut one_deals = line.guards > 0;
        for (at, waiter) in line.waiters.iter_mut().take(TRYING).enumerate() {
            let may_try = waiter.heir.is_none() || !one_deals;
            one_deals |= waiter.heir.is_some();
            if may_try && !waiter.is_heir && waiter.told_at.is_none_or(|told| at < told) {
                waiter.told_at = Some(at);
                waiter.tell();
            }
        }
    }

    /// The first of a line tries once more.
    fn tell_first(&mut self, id: KeyId) {
        let line = self.lines.get_mut(&id);
        if let Some(first) = line.and_then(|line| line.waiters.front_mut())
            && !first.is_heir
        {
            first.tell();
        }
    }

    /// Has one that found its lock busy wait for a place, unless it is told to try again in any case when it has come
    /// further.
    fn stand(&mut self, id: KeyId, number: u64) {
        let without_place = match self.position(id, number) {
            Some(0) => &mut self.in_turn,
            Some(at) if at < TRYING => &mut self.behind,
            _ => return,
        };
        if !without_place.contains(&(id, number)) {
            without_place.push_back((id, number));
        }
    }

    fn give_places(&mut self) {
        while self.taken < self.places
            && let Some((id, number)) = self.in_turn.pop_front().or_else(|| self.behind.pop_front())
        {
            // It may have become the first since, and have got one.
            if let Some(waiter) = self.entry(id, number)
                && !waiter.has_place
            {
                waiter.has_place = true;
                waiter.tell();
                self.taken += 1;
            }
        }
    }

    /// It waits for no place any more.
    fn forget(&mut self, number: u64) {
        for without_place in [&mut self.in_turn, &mut self.behind] {
            without_place.retain(|(_, waiter)| *waiter != number);
        }
    }

    fn remove(&mut self, id: KeyId, number: u64) -> Option<Entry> {
        let waiters = &mut self.lines.get_mut(&id)?.waiters;
        let at = waiters.iter().position(|waiter| waiter.number == number)?;
        let removed = waiters.remove(at)?;
        // The new first is the one who looks.
        if let (0, Some(first)) = (at, waiters.front()) {
            first.wake.notify_one();
        }
        self.taken -= usize::from(removed.has_place);
        self.forget(number);
        self.settle(id);
        self.give_places();
        Some(removed)
    }
}

impl fmt::Debug for WaitQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("WaitQueue")
            .field("lines", &state.lines.len())
            .field("at_server", &state.taken)
            .finish_non_exhaustive()
    }
}

/// Locks that this keeper holds. Dropped when they are released, it wakes the first who wait for them.
#[derive(Debug)]
pub(super) struct HeldKeys {
    queue: Arc<WaitQueue>,
    ids: Vec<KeyId>,
    hands_over: bool,
}

impl HeldKeys {
    /// The queue to which the session is handed over, if it can be.
    pub(super) fn queue_to_hand_over(&self) -> Option<Arc<WaitQueue>> {
        self.hands_over.then(|| Arc::clone(&self.queue))
    }
}

impl Drop for HeldKeys {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        if state.lines.is_empty() {
            return;
        }
        for id in &self.ids {
            state.tell_first(*id);
            if let (true, Some(line)) = (self.hands_over, state.lines.get_mut(id)) {
                line.guards -= 1;
                state.settle(*id);
            }
        }
    }
}

/// The waiter that a session is about to be handed to. Dropped, the waiter tries the lock by itself.
pub(super) struct NextWaiter {
    pub(super) heir: Heir,
    queue: Arc<WaitQueue>,
    id: KeyId,
    number: u64,
}

impl NextWaiter {
    pub(super) fn queue(&self) -> Arc<WaitQueue> {
        Arc::clone(&self.queue)
    }

    /// Hands a session over. `unlock` is what returns the lock if nobody is there any more to take it.
    pub(super) fn pass(
        self,
        session: Session,
        tried: TryLockRow,
        unlock: Box<dyn FnOnce(Session) + Send>,
    ) {
        let mut handed = Some(HandedSession(Some(Box::new((session, tried, unlock)))));
        if let Some(waiter) = self.queue.lock().entry(self.id, self.number)
            && waiter.is_parked
        {
            waiter.is_heir = false;
            waiter.handed = handed.take();
            waiter.wake.notify_one();
        }
        // Refused, it is dropped, and only then, with `self`, the next is told to try.
        drop(handed);
    }
}

impl Drop for NextWaiter {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        if let Some(waiter) = state.entry(self.id, self.number)
            && waiter.is_heir
        {
            waiter.is_heir = false;
            waiter.tell();
        }
    }
}

type Parts = (Session, TryLockRow, Box<dyn FnOnce(Session) + Send>);

/// A session on its way from one guard to the next. Where nobody takes it the lock is returned, and then the session.
pub(super) struct HandedSession(Option<Box<Parts>>);

impl HandedSession {
    /// The session, and what came of the `try` in the name of the next.
    pub(super) fn take(mut self) -> (Session, TryLockRow) {
        let (session, tried, _) = *self.0.take().expect("a session is handed over once");
        (session, tried)
    }
}

impl Drop for HandedSession {
    fn drop(&mut self) {
        let Some(parts) = self.0.take() else { return };
        let (session, tried, unlock) = *parts;
        if tried.granted {
            unlock(session);
        } else {
            session.return_to_pool();
        }
    }
}

/// One in a line. Dropping it gives up its place in the line, and at the server.
pub(super) struct QueuedWaiter {
    queue: Arc<WaitQueue>,
    id: KeyId,
    number: u64,
    wake: Arc<Notify>,
    /// Whether it has found the lock busy, or others before it.
    pub(super) has_waited: bool,
    _counted: Waiting,
}

/// What a waiter is to do next.
pub(super) enum Turn {
    /// Try the lock at the server.
    Try,
    /// Use the session of the guard before, with the lock or without it.
    Session(HandedSession),
    /// Give up: the deadline has passed.
    TimedOut,
}

impl QueuedWaiter {
    /// Waits for its turn, or for that to look, after which it is to wait further.
    ///
    /// Cancel safety: may be called again.
    async fn next(&mut self, deadline: &Deadline) -> Result<Turn, Look> {
        loop {
            let pause = {
                let mut state = self.queue.lock();
                let is_first = state.is_first(self.id, self.number);
                let Some(waiter) = state.entry(self.id, self.number) else {
                    return Ok(Turn::TimedOut);
                };
                let handed = waiter.handed.take();
                let is_to_try = std::mem::take(&mut waiter.is_to_try);
                waiter.is_parked = handed.is_none() && !is_to_try;
                if let Some(handed) = handed {
                    return Ok(Turn::Session(handed));
                }
                if is_to_try {
                    return Ok(Turn::Try);
                }
                if is_first {
                    LOOK_INTERVAL
                } else {
                    Duration::MAX
                }
            };
            self.has_waited = true;
            if deadline.has_passed() {
                // A session that is handed over at this moment is dropped with the waiter, not lost.
                return Ok(Turn::TimedOut);
            }
            let woken = Deadline::after(deadline.remaining().min(pause));
            let woken = woken.bound(Duration::ZERO, self.wake.notified()).await;
            if woken.is_none()
                && pause == LOOK_INTERVAL
                && let Some(look) = self.queue.begin_look()
            {
                return Err(look);
            }
        }
    }

    /// Has the next turn be a try: the last one has not shown whether the lock is free.
    pub(super) fn try_again(&mut self) {
        if let Some(waiter) = self.queue.lock().entry(self.id, self.number) {
            waiter.tell();
        }
    }

    /// Whether this waiter, who has found the lock busy, may wait for it at the server. If not it waits here until it may.
    pub(super) fn take_place(&mut self) -> bool {
        self.has_waited = true;
        let (id, number) = (self.id, self.number);
        let mut state = self.queue.lock();
        let deals = state.position(id, number).is_some_and(|at| at < TRYING);
        let is_free = deals && state.taken < state.places && state.in_turn.is_empty();
        let Some(waiter) = state.entry(id, number) else {
            return false;
        };
        if waiter.has_place || waiter.is_aside {
            return waiter.has_place;
        }
        if is_free {
            waiter.has_place = true;
            state.taken += 1;
        } else {
            state.stand(id, number);
        }
        is_free
    }

    /// Whether others are to wait at the server now. Only after its turn before the first of a line.
    pub(super) fn is_to_yield(&self, is_after_turn: bool) -> bool {
        let state = self.queue.lock();
        (is_after_turn || !state.is_first(self.id, self.number))
            && state.is_to_yield(self.id, self.number)
    }

    /// The same. Then this waiter has given its place up, and waits here for its next turn.
    pub(super) fn yield_place(&mut self) -> bool {
        let (id, number) = (self.id, self.number);
        let mut state = self.queue.lock();
        if !state.is_to_yield(id, number) {
            return false;
        }
        let is_first = state.is_first(id, number);
        if let Some(waiter) = state.entry(id, number) {
            waiter.has_place = false;
            // Told that the lock is free, the first tries once more before it waits here.
            waiter.is_to_try &= is_first;
            state.taken -= 1;
            state.stand(id, number);
        }
        state.give_places();
        true
    }
}

/// A waiter that has stepped back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Aside {
    id: KeyId,
    number: u64,
}

impl QueuedWaiter {
    /// Gives the place up until [`WaitQueue::rejoin`], unless the lock is found free before.
    pub(super) fn step_aside(&mut self) -> Aside {
        let (id, number) = (self.id, self.number);
        let mut state = self.queue.lock();
        if let Some(waiter) = state.entry(id, number) {
            waiter.is_aside = true;
            if std::mem::take(&mut waiter.has_place) {
                state.taken -= 1;
            }
        }
        state.forget(number);
        state.give_places();
        Aside { id, number }
    }
}

impl Drop for QueuedWaiter {
    fn drop(&mut self) {
        let removed = self.queue.lock().remove(self.id, self.number);
        // What it was handed is returned.
        drop(removed);
    }
}

/// A look at `pg_locks` for all lines; while it exists, there is no other.
struct Look(Arc<WaitQueue>, Instant);

impl Drop for Look {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        // Unless another has begun, because this one took too long.
        if state.last_look == Some(self.1) {
            state.is_looking = false;
        }
    }
}

impl Look {
    /// Those who wait here at the head of their lines, with what they want.
    fn waiters(&self) -> Vec<(KeyId, u64, Vec<LockKey>, AdvisoryMode)> {
        let state = self.0.lock();
        let firsts = state.lines.iter().filter_map(|(id, line)| {
            let first = line.waiters.front().filter(|first| first.is_parked)?;
            Some((*id, first.number, first.keys.clone(), first.mode))
        });
        firsts.collect()
    }

    /// Tells one to try whose locks are free.
    fn found_free(&self, id: KeyId, number: u64) {
        if let Some(waiter) = self.0.lock().entry(id, number) {
            // The session on its way to it may never come.
            waiter.is_heir = false;
            waiter.tell();
        }
    }
}

impl Advisory {
    /// Waits for the waiter's turn, and looks meanwhile for all who wait.
    pub(super) async fn turn(&self, waiter: &mut QueuedWaiter, deadline: &Deadline) -> Turn {
        loop {
            let look = match waiter.next(deadline).await {
                Ok(turn) => return turn,
                Err(look) => look,
            };
            self.watch.keep_asking();
            let connections = Arc::clone(&self.connections);
            let looking = run_shielded(async move {
                let waiters = look.waiters();
                let keys: Vec<_> = waiters.iter().flat_map(|(.., keys, _)| keys).collect();
                if keys.is_empty() {
                    return;
                }
                let sql = sql::blockers::held(keys);
                let held = match connections.ask(&sql).await {
                    Ok(reply) => sql::blockers::held_keys(&reply),
                    // Whoever may not look has to try.
                    Err(error) if is_insufficient_privilege(&error) => BTreeMap::new(),
                    Err(error) => {
                        return tracing::debug!(%error, "not found out which locks are free");
                    }
                };
                for (id, number, keys, mode) in waiters {
                    let is_busy = |key: &LockKey| {
                        let held = held.get(&key.id());
                        held.is_some_and(|held| held.conflicts_with(mode))
                    };
                    if !keys.iter().any(is_busy) {
                        look.found_free(id, number);
                    }
                }
            });
            // It goes on in the background, where this waiter is woken before.
            let wake = Arc::clone(&waiter.wake);
            let until_woken = async {
                tokio::select! {
                    biased;
                    _ = looking => {}
                    () = wake.notified() => wake.notify_one(),
                }
            };
            Box::pin(deadline.bound(Duration::ZERO, until_woken)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(queue: &Arc<WaitQueue>, key: i64) -> QueuedWaiter {
        let keys = vec![LockKey::from(key)];
        let request = LockRequest::new(keys, AdvisoryMode::Exclusive, Duration::ZERO);
        let request = request.unwrap_or_else(|error| panic!("{error}"));
        queue.enter(&request, places(4), None, true)
    }

    async fn is_told(waiter: &mut QueuedWaiter) -> bool {
        let at_once = Deadline::after(Duration::ZERO);
        matches!(waiter.next(&at_once).await, Ok(Turn::Try))
    }

    #[test]
    fn a_quarter_of_the_pool_waits_at_the_server() {
        assert_eq!([1, 7, 8, 100].map(places), [1, 1, 2, 25]);
    }

    #[tokio::test]
    async fn the_first_of_each_line_take_turns() {
        let queue = Arc::new(WaitQueue::default());
        let (mut a, mut behind_a, mut b) = (enter(&queue, 1), enter(&queue, 1), enter(&queue, 2));
        assert!(a.take_place() && !behind_a.take_place() && !b.take_place());
        assert!(!is_told(&mut b).await);
        assert!(a.yield_place() && is_told(&mut b).await && b.take_place());
        assert!(!a.take_place() && !is_told(&mut a).await && !is_told(&mut behind_a).await);
        drop(b);
        assert!(is_told(&mut a).await && a.take_place() && !a.yield_place());
        drop(a);
        assert!(is_told(&mut behind_a).await && behind_a.take_place());
        drop(behind_a);
        assert!(queue.lock().lines.is_empty() && queue.lock().taken == 0);
    }

    #[tokio::test]
    async fn a_place_that_no_first_wants_goes_to_a_second() {
        let queue = Arc::new(WaitQueue::default());
        let (mut a, mut behind_a, mut b) = (enter(&queue, 1), enter(&queue, 1), enter(&queue, 2));
        queue.lock().places = 2;
        assert!(a.take_place() && behind_a.take_place() && !b.take_place());
        assert!(!a.yield_place() && behind_a.yield_place() && b.take_place());
        assert!(!is_told(&mut behind_a).await);
        drop(b);
        assert!(is_told(&mut behind_a).await && behind_a.take_place());
        drop((a, behind_a));
        let state = queue.lock();
        assert!(state.lines.is_empty() && state.taken == 0 && state.behind.is_empty());
    }

    #[tokio::test]
    async fn a_release_tells_the_first_alone() {
        let queue = Arc::new(WaitQueue::default());
        let held = queue.hold(&[LockKey::from(1)], false);
        let (mut first, mut second) = (enter(&queue, 1), enter(&queue, 1));
        drop(held);
        assert!(is_told(&mut first).await && !is_told(&mut second).await);
    }
}
