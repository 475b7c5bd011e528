//! Whose wait at the server holds up an index build.
//!
//! A waiting statement has a virtual transaction, and a snapshot. `CREATE INDEX CONCURRENTLY`, `REINDEX CONCURRENTLY` and
//! `DETACH PARTITION CONCURRENTLY` wait until such transactions have ended: in `pg_locks` for their `virtualxid`. Where the
//! builder holds the lock that is waited for, that is a deadlock, and the server would fail one of the two.
//!
//! So as long as anybody waits, one task asks which virtual transactions are waited for, for all of the keeper's
//! waiters at once, and well before `deadlock_timeout` has passed. A waiter whose transaction is among them is cancelled.
//! Its transaction has done nothing but wait, so it ends, and the build goes on. The waiter stands in the line of the
//! process meanwhile, and goes to the end of the server's queue when the builder does not wait any more.
//! `pg_blocking_pids` would not do: it also names those who merely stand behind in the queue.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sql::{AWAITED, VirtualXidWait, virtual_xid_waits};
use super::wait_queue::{Aside, WaitQueue};
use crate::connection::sql::server::Server;
use crate::connection::task::run_in_background;
use crate::connection::{Asker, Canceller, Connections, Session};
use crate::error::Error;

/// With a `deadlock_timeout` shorter than this, the answer could come too late.
const SHORTEST_DEADLOCK_TIMEOUT: Duration = Duration::from_millis(200);
/// How many questions in a row may be answered late.
const LATE: u32 = 1;
/// How many signals a wait may need: one that arrives before its statement does is lost.
const MOST_SIGNALS: u32 = 3;
/// For how long waits are short ones after more late answers or signals than that.
const MISTRUST: Duration = Duration::from_secs(10);

/// The watch of one keeper.
pub(super) struct BuildWatch {
    connections: Arc<Connections>,
    queue: Arc<WaitQueue>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waits: BTreeMap<u64, Arc<Wait>>,
    next_number: u64,
    /// Those who have stepped back, with the pid of the builder.
    aside: Vec<(i32, Aside)>,
    deadlock_timeout: Duration,
    asker: Asker,
    /// Whether there is something that the last question was not about.
    has_changed: bool,
    /// The task that asks, by its number, and when it last did.
    asks: Option<(u64, Instant)>,
    failed: Option<Instant>,
}

/// A wait at the server.
struct Wait {
    pid: i32,
    canceller: Canceller,
    fate: Mutex<Fate>,
    /// How often it has been signalled.
    signals: AtomicU32,
}

/// What has become of a wait. Once it has ended, it is not cancelled any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waits,
    Withdrawn(Withdrawn),
    /// It is cancelled in whatever way there is, which may hit what comes next.
    GivenUp,
    Ended,
}

/// Why a wait was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Withdrawn {
    /// The session of this pid waits for its transaction.
    ForBuild(i32),
    /// Others are to wait at the server.
    ForOthers,
    /// For one of these, or because it could not be watched any more. The cancel may still hit what comes next.
    Unsure,
}

impl BuildWatch {
    pub(super) fn new(connections: Arc<Connections>, queue: Arc<WaitQueue>) -> Arc<Self> {
        Arc::new(Self {
            connections,
            queue,
            state: Mutex::default(),
        })
    }

    /// Watches a wait that is about to begin; `None` where that cannot be done, and the wait has to be a short one.
    pub(super) fn begin(
        self: &Arc<Self>,
        session: &Session,
        server: Option<&Server>,
    ) -> Option<Watched> {
        let server = server.filter(|server| {
            server.deadlock_timeout >= SHORTEST_DEADLOCK_TIMEOUT && !server.denied.pg_locks
        })?;
        let pid = session.server_pid()?;
        let mut state = self.lock();
        let is_mistrusted = state.failed.is_some_and(|at| at.elapsed() < MISTRUST);
        if is_mistrusted || !self.connections.has_spare() {
            return None;
        }
        state.next_number += 1;
        let number = state.next_number;
        let wait = Arc::new(Wait {
            pid,
            canceller: session.canceller(),
            fate: Mutex::new(Fate::Waits),
            signals: AtomicU32::new(0),
        });
        drop(state.waits.insert(number, Arc::clone(&wait)));
        state.deadlock_timeout = server.deadlock_timeout;
        state.has_changed = true;
        drop(state);
        self.keep_asking();
        Some(Watched {
            watch: Arc::clone(self),
            number,
            wait,
        })
    }

    /// Begins to ask where somebody waits and nobody asks, or who did stands still: its runtime may do so, or have ended.
    pub(super) fn keep_asking(self: &Arc<Self>) {
        let number = {
            let mut state = self.lock();
            let longest = state.deadlock_timeout * 2;
            let is_asked = state.asks.is_some_and(|(_, last)| last.elapsed() < longest);
            if is_asked || state.is_empty() {
                return;
            }
            state.next_number += 1;
            state.asks = Some((state.next_number, Instant::now()));
            state.next_number
        };
        let asking = Asking(Arc::clone(self), number);
        let _ = run_in_background(Arc::clone(self).ask_on(asking));
    }

    async fn ask_on(self: Arc<Self>, asking: Asking) {
        let (mut had_builds, mut late) = (true, 0);
        loop {
            let pause = {
                let state = self.lock();
                let often = state.has_changed || had_builds;
                state.deadlock_timeout / if often { 3 } else { 2 }
            };
            tokio::time::sleep(pause).await;
            let (mut asker, longest) = {
                let mut state = self.lock();
                state.aside.retain(|(_, aside)| self.queue.is_aside(aside));
                if state.is_empty() || state.asks.is_none_or(|(by, _)| by != asking.1) {
                    return;
                }
                state.asks = Some((asking.1, Instant::now()));
                state.has_changed = false;
                (std::mem::take(&mut state.asker), state.deadlock_timeout / 3)
            };
            let began = Instant::now();
            // An answer that is late is better than none.
            let asked = tokio::time::timeout(longest * 2, self.ask(&mut asker)).await;
            self.keep(asker);
            late = if began.elapsed() > longest {
                late + 1
            } else {
                0
            };
            match asked {
                Ok(Ok(builds)) => had_builds = builds,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "not found out whether a build waits for a waiter");
                    late = late.max(1) + 1;
                }
                Err(_) => tracing::debug!("no answer whether a build waits for a waiter"),
            }
            if late > LATE {
                self.give_up();
            }
        }
    }

    /// Keeps the connection to ask on as long as somebody waits.
    fn keep(&self, mut asker: Asker) {
        let mut state = self.lock();
        if state.is_empty() {
            drop(state);
            asker.end();
        } else {
            state.asker = asker;
        }
    }

    /// One question, and what follows from it. Whether anybody waits for a virtual transaction.
    async fn ask(&self, asker: &mut Asker) -> Result<bool, Error> {
        let reply = asker.ask(&self.connections, AWAITED).await?;
        let awaited = virtual_xid_waits(&reply);
        let (rejoining, holding_up) = {
            let mut state = self.lock();
            let is_builder =
                |(builder, _): &(i32, Aside)| awaited.iter().any(|wait| wait.waiter == *builder);
            let aside = std::mem::take(&mut state.aside);
            let (aside, rejoining): (Vec<_>, Vec<_>) = aside.into_iter().partition(is_builder);
            state.aside = aside;
            let of = |VirtualXidWait { holder, waiter }: &VirtualXidWait| {
                let wait = state.waits.values().find(|wait| wait.pid == *holder)?;
                Some((Arc::clone(wait), *waiter))
            };
            (rejoining, awaited.iter().filter_map(of).collect::<Vec<_>>())
        };
        for (_, aside) in rejoining {
            self.queue.rejoin(&aside);
        }
        for (wait, builder) in holding_up {
            let pid = wait.pid;
            tracing::debug!(pid, builder, "a waiter steps back for an index build");
            let why = Withdrawn::ForBuild(builder);
            if !wait.withdraw(why, std::mem::take(asker)).await? {
                self.give_up();
            }
        }
        Ok(!awaited.is_empty())
    }

    /// Ends the long waits, since they cannot be watched.
    fn give_up(&self) {
        let mut state = self.lock();
        state.failed = Some(Instant::now());
        for wait in state.waits.values() {
            let mut fate = wait.fate();
            if *fate != Fate::Ended {
                *fate = Fate::GivenUp;
                wait.cancel();
            }
        }
    }

    /// Has one that has stepped back rejoin when this builder does not wait any more.
    pub(super) fn rejoin_after(self: &Arc<Self>, builder: i32, aside: Aside) {
        self.lock().aside.push((builder, aside));
        self.keep_asking();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wait {
    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_given_up(&self) -> bool {
        *self.fate() == Fate::GivenUp
    }

    /// Whether it was waiting, and nothing was done to it.
    fn end_waiting(&self) -> bool {
        let mut fate = self.fate();
        let waits = *fate == Fate::Waits;
        if waits {
            *fate = Fate::Ended;
        }
        waits
    }

    /// Signals it, unless it has ended. False where that does not help: the role may not see or signal it.
    async fn withdraw(self: &Arc<Self>, why: Withdrawn, asker: Asker) -> Result<bool, Error> {
        let (this, confirmed) = (Arc::clone(self), Arc::clone(self));
        let is_wanted = move || {
            let mut fate = this.fate();
            let is_wanted = !matches!(*fate, Fate::Ended | Fate::GivenUp);
            is_wanted.then(|| std::mem::replace(&mut *fate, Fate::Withdrawn(Withdrawn::Unsure)))
        };
        let confirm = move |before| {
            let mut fate = confirmed.fate();
            // Of two signals the first may come late all the same.
            if before != Fate::Withdrawn(Withdrawn::Unsure) && *fate != Fate::GivenUp {
                *fate = Fate::Withdrawn(why);
            }
        };
        let signals = self.signals.fetch_add(1, Ordering::Relaxed);
        self.canceller.signal_if(asker, is_wanted, confirm).await?;
        Ok(signals < MOST_SIGNALS)
    }

    /// Cancels it in whatever way there is.
    fn cancel(&self) {
        let canceller = self.canceller.clone();
        let _ = run_in_background(async move { canceller.cancel().await });
    }
}

/// The task that asks. Dropped with its runtime, another may begin.
struct Asking(Arc<BuildWatch>, u64);

impl Drop for Asking {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if state.asks.is_some_and(|(by, _)| by == self.1) {
            state.asks = None;
        }
    }
}

impl State {
    /// Whether nobody is watched any more.
    fn is_empty(&self) -> bool {
        self.waits.is_empty() && self.aside.is_empty()
    }
}

impl fmt::Debug for BuildWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BuildWatch")
            .field("waits", &self.lock().waits.len())
            .finish_non_exhaustive()
    }
}

/// A wait that is watched until this is dropped.
pub(super) struct Watched {
    watch: Arc<BuildWatch>,
    number: u64,
    wait: Arc<Wait>,
}

impl Watched {
    /// To be called now and then: sees to it that somebody asks, and withdraws the wait if others are to wait.
    pub(super) fn look_up(&self, is_for_others: bool) {
        self.watch.keep_asking();
        if self.wait.is_given_up() {
            // A cancel that arrives before its statement does is lost.
            self.wait.cancel();
        } else if is_for_others {
            let (watch, wait) = (Arc::clone(&self.watch), Arc::clone(&self.wait));
            let _ = run_in_background(async move {
                let withdrawn = wait.withdraw(Withdrawn::ForOthers, Asker::default()).await;
                if !withdrawn.unwrap_or(true) {
                    watch.give_up();
                }
            });
        }
    }

    /// The wait has been answered: why it was withdrawn, if it was. Where it is sure why, no signal is under way
    /// afterwards, which takes this long at most.
    pub(super) async fn end(self, most: Duration) -> Option<Withdrawn> {
        if self.wait.end_waiting() {
            return None;
        }
        let settled = tokio::time::timeout(most, self.wait.canceller.settled()).await;
        match std::mem::replace(&mut *self.wait.fate(), Fate::Ended) {
            Fate::Withdrawn(why) if settled.is_ok() => Some(why),
            Fate::Withdrawn(_) | Fate::GivenUp => Some(Withdrawn::Unsure),
            Fate::Waits | Fate::Ended => None,
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        *self.wait.fate() = Fate::Ended;
        let asker = {
            let mut state = self.watch.lock();
            drop(state.waits.remove(&self.number));
            state.is_empty().then(|| std::mem::take(&mut state.asker))
        };
        if let Some(mut asker) = asker {
            asker.end();
        }
    }
}
