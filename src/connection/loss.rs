//! Whether something that is held is still held: one side says that it is lost, the other waits for it.
//!
//! A pure shared cell. What finds the loss out is elsewhere: for a session lock the watch of its connection
//! (`heartbeat.rs`).

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, ErrorKind};
use crate::key::LockKey;

/// Completes when a lock is not held any more: from [`SessionGuard::loss`](crate::SessionGuard::loss).
///
/// It is owned: it does not borrow the guard, so a `select!` over it and a [`transaction`](crate::SessionGuard::transaction)
/// of the guard compiles, and it can be moved into a task of its own. Clones are independent, and each of them completes.
/// It does not keep the lock.
///
/// It completes when the lock is lost, and also when the guard is released or dropped, since work under the lock has to end
/// then too. [`is_lost`](Self::is_lost) tells the two apart.
///
/// # Cancel safety
/// May be dropped at any time. Polled after it has completed, it completes again.
///
/// # Examples
/// ```no_run
/// # async fn work() {}
/// # async fn example(keeper: lockkeeper::Keeper) -> Result<(), lockkeeper::Error> {
/// let mut guard = keeper.advisory_lock("leader").session().acquire().await?;
/// let loss = guard.loss();
/// tokio::select! {
///     () = loss.clone() => eprintln!("the lock is lost"),
///     done = guard.transaction(async |tx| {
///         tx.execute("UPDATE job SET done = true", &[]).await?;
///         Ok::<_, lockkeeper::Error>(())
///     }) => done?,
/// }
/// # Ok(()) }
/// ```
#[must_use = "a future does nothing unless it is awaited"]
pub struct Loss {
    cell: Arc<Cell>,
    /// Where its waker is, once it was polled.
    place: Option<u64>,
}

/// The side that says so. Every clone is the same cell. Dropping one says nothing.
#[derive(Clone)]
pub(crate) struct LossSignal {
    cell: Arc<Cell>,
}

#[derive(Default)]
struct Cell(Mutex<Facts>);

#[derive(Default)]
struct Facts {
    ended: Option<End>,
    wakers: Vec<(u64, Waker)>,
    next_place: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// With the reason, as the detail of an error.
    Lost(Option<&'static str>),
    Released,
}

impl Cell {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Nothing that panics runs while it is locked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LossSignal {
    /// Of something that is held.
    pub(crate) fn new() -> Self {
        Self {
            cell: Arc::default(),
        }
    }

    /// It is lost, if it was held until now. The reason becomes the detail of an error; none where its connection has simply
    /// ended, which the error says anyway.
    pub(crate) fn lose(&self, why: impl Into<Option<&'static str>>) {
        self.end(End::Lost(why.into()));
    }

    /// It is given up by its holder, if it was held until now.
    pub(crate) fn release(&self) {
        self.end(End::Released);
    }

    fn end(&self, end: End) {
        let mut facts = self.cell.facts();
        if facts.ended.is_some() {
            return;
        }
        facts.ended = Some(end);
        let wakers = std::mem::take(&mut facts.wakers);
        drop(facts);
        for (_, waker) in wakers {
            waker.wake();
        }
    }

    /// Whether it was lost, and not released before.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self.cell.facts().ended, Some(End::Lost(_)))
    }

    /// Whether there is nothing more to find out.
    pub(crate) fn has_ended(&self) -> bool {
        self.cell.facts().ended.is_some()
    }

    /// Whether a [`Loss`] is awaited at the moment.
    pub(crate) fn is_awaited(&self) -> bool {
        !self.cell.facts().wakers.is_empty()
    }

    /// The future of its loss.
    pub(crate) fn loss(&self) -> Loss {
        Loss {
            cell: Arc::clone(&self.cell),
            place: None,
        }
    }

    /// Runs work until it is lost.
    ///
    /// Cancel safety: as the work's own.
    pub(crate) async fn run<F: Future>(&self, key: &LockKey, work: F) -> Result<F::Output, Error> {
        let mut loss = pin!(self.loss());
        let mut work = pin!(work);
        let both = poll_fn(|cx| match loss.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(None),
            Poll::Pending => work.as_mut().poll(cx).map(Some),
        });
        both.await.ok_or_else(|| self.error(key))
    }

    /// The error of what needs the lock after its loss.
    pub(crate) fn error(&self, key: &LockKey) -> Error {
        let error = Error::new(ErrorKind::LockLost).with_key(key);
        match self.cell.facts().ended {
            Some(End::Lost(Some(why))) => error.with_detail(why),
            _ => error,
        }
    }
}

impl Loss {
    /// Whether the lock is lost. Costs nothing, and sends nothing. `false` after the guard's own release, although the lock
    /// is not held any more then.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self.cell.facts().ended, Some(End::Lost(_)))
    }
}

impl Future for Loss {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut facts = this.cell.facts();
        if facts.ended.is_some() {
            return Poll::Ready(());
        }
        let known = this.place.and_then(|place| {
            let mut wakers = facts.wakers.iter_mut();
            wakers.find(|(of, _)| *of == place)
        });
        match known {
            // The old one is dropped unlocked: with it may go a task that has such a future too.
            Some((_, waker)) => {
                let before = std::mem::replace(waker, cx.waker().clone());
                drop(facts);
                drop(before);
            }
            None => {
                let place = facts.next_place;
                facts.next_place += 1;
                facts.wakers.push((place, cx.waker().clone()));
                this.place = Some(place);
            }
        }
        Poll::Pending
    }
}

impl Clone for Loss {
    fn clone(&self) -> Self {
        Self {
            cell: Arc::clone(&self.cell),
            place: None,
        }
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            let mut facts = self.cell.facts();
            let at = facts.wakers.iter().position(|(of, _)| *of == place);
            let waker = at.map(|at| facts.wakers.swap_remove(at));
            drop(facts);
            drop(waker);
        }
    }
}

impl fmt::Debug for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loss")
            .field("is_lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LossSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LossSignal")
            .field("is_lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(loss: &mut Loss) -> Poll<()> {
        pin!(loss).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn it_completes_for_all_and_stays_complete() {
        let signal = LossSignal::new();
        let (mut first, mut second) = (signal.loss(), signal.loss());
        assert!(!signal.is_awaited());
        for _ in 0..2 {
            assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
        }
        assert_eq!(signal.cell.facts().wakers.len(), 2);
        drop(second);
        assert_eq!(signal.cell.facts().wakers.len(), 1);
        let mut later = first.clone();
        signal.lose("why");
        signal.release();
        for loss in [&mut first, &mut later] {
            assert!(poll(loss).is_ready() && poll(loss).is_ready() && loss.is_lost());
        }
        assert!(signal.is_lost() && !signal.is_awaited());
    }

    #[test]
    fn a_release_completes_it_too() {
        let signal = LossSignal::new();
        let mut loss = signal.loss();
        signal.release();
        signal.lose("too late");
        assert!(poll(&mut loss).is_ready() && !loss.is_lost());
    }

    #[tokio::test]
    async fn it_wakes_its_task_and_ends_the_work() {
        let signal = LossSignal::new();
        let key = LockKey::from(7);
        assert_eq!(signal.run(&key, async { 1 }).await.ok(), Some(1));
        let (other, work) = (signal.clone(), std::future::pending::<()>());
        let waiting = tokio::spawn(async move { other.run(&LockKey::from(7), work).await });
        while !signal.is_awaited() {
            tokio::task::yield_now().await;
        }
        signal.lose("why");
        let error = waiting
            .await
            .expect("it has not panicked")
            .expect_err("it is lost");
        assert_eq!(error.kind(), ErrorKind::LockLost);
        assert!(signal.run(&key, async { 1 }).await.is_err());
        assert!(!signal.is_awaited());
    }

    #[test]
    fn what_it_promises() {
        fn holds<T: Clone + Send + Sync + Unpin + 'static>() {}
        holds::<Loss>();
    }
}
