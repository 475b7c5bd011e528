//! One term of a leader: for how long it may believe that it leads, and who finds out that it does not.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot};

use super::{FencingToken, fencing};
use crate::advisory::SessionGuard;
use crate::connection::task::run_in_background;
use crate::connection::{Loss, LossSignal};
use crate::error::Error;
use crate::key::LockKey;

/// What a leader can be told of its term. Cheap to clone, owned, and of no influence on the term.
#[derive(Clone)]
pub struct Term(Arc<TermState>);

struct TermState {
    key: LockKey,
    token: FencingToken,
    signal: LossSignal,
    confirmed: Mutex<Confirmed>,
    step_down_after: Duration,
}

/// When a question was sent, by both clocks: the monotonic one stands still while a machine is suspended, and the other one can
/// be set back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Confirmed {
    sent: Instant,
    by_the_calendar: SystemTime,
}

impl Confirmed {
    /// A question that is about to be sent.
    pub(super) fn now() -> Self {
        Self {
            sent: Instant::now(),
            by_the_calendar: SystemTime::now(),
        }
    }

    /// How much longer its answer counts. A clock that is set forward makes it less.
    fn remaining(&self, time: Duration, now: Instant, by_the_calendar: SystemTime) -> Duration {
        let by_the_calendar = by_the_calendar.duration_since(self.by_the_calendar);
        let elapsed = now.saturating_duration_since(self.sent);
        time.saturating_sub(elapsed.max(by_the_calendar.unwrap_or_default()))
    }
}

impl TermState {
    fn confirmed(&self) -> MutexGuard<'_, Confirmed> {
        // Nothing that panics runs while it is locked.
        self.confirmed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn confirm(&self, confirmed: Confirmed) {
        *self.confirmed() = confirmed;
    }

    /// How much longer the last answer counts.
    fn remaining(&self) -> Duration {
        let confirmed = *self.confirmed();
        confirmed.remaining(self.step_down_after, Instant::now(), SystemTime::now())
    }
}

impl Term {
    /// The number of the term, which is a fencing token: every later term of the same name has a greater one.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.0.token
    }

    /// Whether the term lasts. Costs no message: it is so as long as the server has confirmed the lock recently enough, by this
    /// process's clock, so that it is also right in a process that was frozen.
    ///
    /// It can end right after this. What must not be done by a former leader needs the [`token`](Self::token).
    #[must_use]
    pub fn is_leader(&self) -> bool {
        let state = &self.0;
        if !state.signal.has_ended() && state.remaining().is_zero() {
            state
                .signal
                .lose("the server has not confirmed the lock in time");
        }
        !state.signal.has_ended()
    }

    /// Completes when the term ends: lost, resigned, or dropped.
    pub fn loss(&self) -> Loss {
        self.0.signal.loss()
    }

    fn ended(&self) -> Error {
        self.0.signal.error(&self.0.key)
    }

    /// The work's result; `None`, with the work dropped where it stands, if the term has ended before.
    ///
    /// Cancel safety: as the work's own.
    pub(super) async fn run<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut loss = self.loss();
        let mut work = pin!(work);
        poll_fn(|cx| {
            // A process that was frozen learns of it here, before the work's next step.
            if Pin::new(&mut loss).poll(cx).is_ready() || !self.is_leader() {
                return Poll::Ready(None);
            }
            work.as_mut().poll(cx).map(Some)
        })
        .await
    }
}

impl fmt::Debug for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Term")
            .field("key", &self.0.key)
            .field("token", &self.0.token)
            .field("has_ended", &self.0.signal.has_ended())
            .finish_non_exhaustive()
    }
}

enum Command {
    /// Ask the server now, and say whether the term lasts.
    Confirm(oneshot::Sender<bool>),
    Resign(oneshot::Sender<Result<(), Error>>),
}

/// The leadership, until it is resigned, dropped or lost: from [`Leader::campaign`](crate::Leader::campaign).
///
/// # Dropping
/// The term ends at once, without waiting. The lock is released as soon as the server has answered the question whether it is
/// held, if one is under way. The successor waits for its takeover delay, though: only [`resign`](Self::resign) tells it that it
/// need not.
#[must_use = "dropping the leadership ends the term"]
#[clippy::has_significant_drop]
pub struct Leadership {
    term: Term,
    commands: mpsc::UnboundedSender<Command>,
}

impl Leadership {
    /// A term that begins with a lock that the server has just confirmed.
    ///
    /// # Errors
    /// `Config` outside of a runtime.
    pub(super) fn begin(
        guard: SessionGuard,
        token: FencingToken,
        confirmed: Confirmed,
        step_down_after: Duration,
    ) -> Result<Self, Error> {
        let state = Arc::new(TermState {
            key: guard.held_keys()[0].clone(),
            token,
            signal: LossSignal::new(),
            confirmed: Mutex::new(confirmed),
            step_down_after,
        });
        let (commands, received) = mpsc::unbounded_channel();
        tracing::debug!(key = %state.key, %token, "leadership begins");
        // Whatever ends the task ends the term: a panic, and its runtime's end, also if that comes before its first step.
        let ends = scopeguard::guard(Arc::clone(&state), |state| {
            lose(&state, "the task that keeps its lock has ended");
        });
        let keeping = async move {
            let ends = ends;
            keep(guard, &ends, received).await;
        };
        if !run_in_background(keeping) {
            return Err(Error::config("called outside a tokio runtime"));
        }
        Ok(Self {
            term: Term(state),
            commands,
        })
    }

    /// The term.
    #[must_use]
    pub fn term(&self) -> &Term {
        &self.term
    }

    /// The number of the term: see [`Term::token`].
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.term.token()
    }

    /// Whether the term lasts: see [`Term::is_leader`].
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.term.is_leader()
    }

    /// Completes when the term ends: see [`Term::loss`].
    pub fn loss(&self) -> Loss {
        self.term.loss()
    }

    /// Ends the term in order, so that the successor need not wait for its takeover delay.
    ///
    /// The term ends in this process first, then the resignation is recorded, and then the lock is released. End the work of
    /// the leader before you call it.
    ///
    /// # SQL
    /// A transaction on the connection that holds the lock, which marks the token's row in `lockkeeper_fencing`; then as
    /// [`SessionGuard::release`](crate::SessionGuard::release).
    ///
    /// # Errors
    /// [`LockLost`](crate::ErrorKind::LockLost) where the term had ended before. As
    /// [`SessionGuard::transaction`](crate::SessionGuard::transaction) where the resignation could not be recorded: the lock is
    /// released all the same, and the successor waits.
    ///
    /// # Cancel safety
    /// Once polled, it continues in the background if this is dropped.
    ///
    /// # Longest silence
    /// The time after which a leader [steps down](crate::Leader::step_down_after), and then as
    /// [`SessionGuard::transaction`](crate::SessionGuard::transaction) and [`SessionGuard::release`](crate::SessionGuard::release).
    pub async fn resign(self) -> Result<(), Error> {
        if !self.is_leader() {
            return Err(self.term.ended());
        }
        self.term.0.signal.release();
        let (reply, answer) = oneshot::channel();
        // Not received where the lock was just lost.
        drop(self.commands.send(Command::Resign(reply)));
        answer.await.unwrap_or_else(|_| Err(self.term.ended()))
    }

    /// Has the server say now whether the term lasts.
    ///
    /// Cancel safety: the question is asked in the background.
    pub(super) async fn confirm(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        drop(self.commands.send(Command::Confirm(reply)));
        answer.await.unwrap_or(false) && self.is_leader()
    }
}

impl fmt::Debug for Leadership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leadership")
            .field("term", &self.term)
            .finish_non_exhaustive()
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        // Here at once; the task lets the lock go when it finds that this is gone.
        self.term.0.signal.release();
    }
}

/// Keeps the lock of a term, and ends the term when the server has not confirmed it in time.
///
/// Cancel safety: dropped, with its runtime, the lock is released.
async fn keep(
    guard: SessionGuard,
    state: &TermState,
    mut commands: mpsc::UnboundedReceiver<Command>,
) {
    let interval = state.step_down_after / 3;
    let mut lost = guard.loss();
    loop {
        let asked = tokio::select! {
            biased;
            command = commands.recv() => match command {
                None => return,
                Some(Command::Resign(reply)) => {
                    let resigned = resign(guard, state).await;
                    // The caller may have stopped waiting for it.
                    drop(reply.send(resigned));
                    return;
                }
                Some(Command::Confirm(reply)) => Some(reply),
            },
            () = &mut lost => {
                lose(state, "its connection has ended, or holds the lock no more");
                return;
            }
            () = tokio::time::sleep(interval.min(state.remaining())) => None,
        };
        let sent = Confirmed::now();
        match tokio::time::timeout(state.remaining(), guard.confirm()).await {
            Ok(Ok(())) => state.confirm(sent),
            Ok(Err(error)) => {
                tracing::debug!(%error, "the lock of a leader is not confirmed");
                lose(state, "its connection has ended, or holds the lock no more");
                return;
            }
            Err(_) => {
                lose(state, "the server has not confirmed the lock in time");
                return;
            }
        }
        // By the clock, in between.
        if state.signal.is_lost() {
            return;
        }
        if let Some(reply) = asked {
            // The caller may have stopped waiting for it.
            reply.send(true).ok();
        }
    }
}

fn lose(state: &TermState, why: &'static str) {
    if !state.signal.has_ended() {
        tracing::warn!(key = %state.key, token = %state.token, why, "leadership lost");
    }
    state.signal.lose(why);
}

async fn resign(mut guard: SessionGuard, state: &TermState) -> Result<(), Error> {
    let recorded = fencing::resign(&mut guard, state.token).await;
    let released = guard.release().await;
    tracing::debug!(key = %state.key, token = %state.token, "leadership resigned");
    recorded.and(released)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_that_has_gone_further_counts() {
        let sent = Confirmed::now();
        let remaining = |monotonic: u64, calendar: i64| {
            let by_the_calendar = match u64::try_from(calendar) {
                Ok(seconds) => sent.by_the_calendar + Duration::from_secs(seconds),
                Err(_) => sent.by_the_calendar - Duration::from_secs(calendar.unsigned_abs()),
            };
            let now = sent.sent + Duration::from_secs(monotonic);
            let time = Duration::from_secs(10);
            sent.remaining(time, now, by_the_calendar).as_secs()
        };
        assert_eq!(remaining(3, 3), 7);
        // Suspended for an hour.
        assert_eq!(remaining(3, 3603), 0);
        // Set back.
        assert_eq!(remaining(3, -3600), 7);
        assert_eq!(remaining(11, -3600), 0);
    }
}
