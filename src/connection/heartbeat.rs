//! The watch over connections that hold session locks: it finds out that one has ended, or that its server is silent.
//!
//! The driver tells nobody that a connection has ended, but it answers when it is asked. So one task asks for all
//! connections of a keeper, more often while a [`Loss`](super::Loss) is awaited. On a current-thread runtime each connection has its
//! own. No query waits on a connection for it.
//!
//! A server that vanishes without a word is found out by the heartbeat, a small query on an idle connection. It is sent
//! neither in a transaction, whose `idle_in_transaction_session_timeout` it would put off, nor during a statement of the
//! caller, whose own silence is bounded (`silence.rs`).
//!
//! Task and heartbeat do not keep the connection. They reach it through a [`Link`], for as long as it takes to send.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use futures_core::Stream as _;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio_postgres::{Error as DriverError, SimpleQueryMessage};

use super::request::poll_once;
use super::sql::heartbeat::{NOT_KNOWN, heartbeat, idles, is_idle, lives, read_heartbeat};
use super::state::ConnectionState;
use super::{Connections, LossSignal, Reply, Session};
use crate::error::{Failure, classify};

/// Between two looks at the connections, while a loss is awaited, and else.
const AWAITED: Duration = Duration::from_millis(20);
const NOT_AWAITED: Duration = Duration::from_millis(100);
/// After so many looks at nothing the task ends.
const LOOKS_AT_NOTHING: u32 = 50;
/// The first heartbeat, which learns how long the session may idle.
const FIRST: Duration = Duration::from_millis(250);
/// How long another connection is waited for.
const SPARE: Duration = Duration::from_millis(500);
/// How long its answer is waited for, where the heartbeat had none.
const ALIVE: Duration = Duration::from_secs(1);
/// The patience is counted in so many steps: a runtime that stands still, and so reads no answer, uses up one of them.
const STEPS: u32 = 8;

/// How often a connection that holds session locks is asked whether it lives, and how long its answer may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeartbeatOptions {
    /// `None` for never.
    pub(crate) interval: Option<Duration>,
    pub(crate) patience: Duration,
}

impl HeartbeatOptions {
    /// Together less than 15 seconds.
    pub(crate) const DEFAULT: Self = Self {
        interval: Some(Duration::from_secs(5)),
        patience: Duration::from_secs(8),
    };
}

/// A session's connection, for those who do not own it.
pub(super) struct Link {
    /// Invariant: only [`Link::with`] makes another strong reference, and drops it before it unlocks this.
    object: Mutex<Weak<Object>>,
    loss: LossSignal,
}

impl Link {
    fn with<T>(&self, work: impl FnOnce(&Object) -> T) -> Option<T> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        let strong = object.upgrade()?;
        let done = work(&strong);
        drop(strong);
        Some(done)
    }

    /// After this nothing is sent on the connection through it, and its session has the only reference.
    pub(super) fn end(&self) {
        *self.object.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
        // Unless its holder has given it up before.
        self.loss.lose(None);
    }
}

/// The lock is lost, and why, where there is more to say than that its connection has ended.
struct Lost(Option<&'static str>);

/// The connections that one task watches.
#[derive(Clone, Default)]
pub(super) struct LossWatch(Arc<Mutex<Watching>>);

#[derive(Default)]
struct Watching {
    ticking: bool,
    watched: Vec<Arc<Watched>>,
}

struct Watched {
    link: Arc<Link>,
    state: Arc<ConnectionState>,
    connections: Weak<Connections>,
    runtime: Handle,
    pid: Option<i32>,
    /// Makes the expression that says whether it holds what it should.
    held: Box<dyn Fn() -> String + Send + Sync>,
    /// That expression has failed.
    by_pid_alone: AtomicBool,
    /// When it is asked next; `None` while it is asked, and where it is never.
    next: Mutex<Option<Instant>>,
}

impl Session {
    /// Watches the connection until its session ends, or [`end_watch`](Self::end_watch), and says by `loss` when it is lost.
    /// `held` makes an SQL expression that is true while the backend holds what it should.
    pub(crate) fn watch(
        &mut self,
        loss: &LossSignal,
        held: impl Fn() -> String + Send + Sync + 'static,
    ) {
        self.end_watch();
        let Some(object) = &self.object else { return };
        let link = Arc::new(Link {
            object: Mutex::new(Arc::downgrade(object)),
            loss: loss.clone(),
        });
        self.link = Some(Arc::clone(&link));
        let interval = self.connections().heartbeat().interval;
        let watched = Arc::new(Watched {
            link,
            state: Arc::clone(&self.state),
            connections: Arc::downgrade(self.connections()),
            runtime: self.runtime.clone(),
            pid: self.server_pid(),
            held: Box::new(held),
            by_pid_alone: AtomicBool::new(self.denied().pg_locks),
            next: Mutex::new(interval.map(|interval| Instant::now() + interval.min(FIRST))),
        });
        // A current-thread runtime stands still outside of `block_on`, and only its own are to stand still with it.
        let own = self.runtime.runtime_flavor() == RuntimeFlavor::CurrentThread;
        if own {
            LossWatch::default().add(watched, false);
        } else {
            self.connections().loss_watch().add(watched, true);
        }
    }

    /// Ends the watch. What it has sent before is answered before whatever is sent now.
    pub(crate) fn end_watch(&mut self) {
        if let Some(link) = self.link.take() {
            link.end();
        }
    }
}

impl LossWatch {
    fn lock(&self) -> MutexGuard<'_, Watching> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, watched: Arc<Watched>, is_shared: bool) {
        let runtime = watched.runtime.clone();
        let mut watching = self.lock();
        watching.watched.push(watched);
        if std::mem::replace(&mut watching.ticking, true) {
            return;
        }
        drop(watching);
        let mut ticking = Ticking {
            watch: self.clone(),
            is_shared,
            has_stopped: false,
        };
        drop(runtime.spawn(async move {
            let mut looks_at_nothing = 0;
            // Nothing joins the task of a single connection.
            let most = if is_shared { LOOKS_AT_NOTHING } else { 0 };
            loop {
                let look = ticking.look();
                looks_at_nothing = match look {
                    Look::Nothing => looks_at_nothing + 1,
                    Look::Awaited | Look::NotAwaited => 0,
                };
                if looks_at_nothing > most && ticking.stop() {
                    break;
                }
                tokio::time::sleep(match look {
                    Look::Awaited => AWAITED,
                    Look::Nothing | Look::NotAwaited => NOT_AWAITED,
                })
                .await;
            }
        }));
    }
}

#[derive(Clone, Copy)]
enum Look {
    Nothing,
    Awaited,
    NotAwaited,
}

/// The task.
struct Ticking {
    watch: LossWatch,
    /// Whether it watches for all runtimes, not for one connection.
    is_shared: bool,
    has_stopped: bool,
}

impl Ticking {
    fn look(&self) -> Look {
        let mut watching = self.watch.lock();
        let mut is_awaited = false;
        watching.watched.retain(|watched| {
            let goes_on = watched.lives();
            is_awaited |= goes_on && watched.link.loss.is_awaited();
            goes_on
        });
        for watched in &watching.watched {
            watched.ask_if_due();
        }
        match (watching.watched.is_empty(), is_awaited) {
            (true, _) => Look::Nothing,
            (false, true) => Look::Awaited,
            (false, false) => Look::NotAwaited,
        }
    }

    /// Stops where there is nothing to watch. What is to be watched next starts another task.
    fn stop(&mut self) -> bool {
        let mut watching = self.watch.lock();
        self.has_stopped = watching.watched.is_empty();
        watching.ticking = !self.has_stopped;
        self.has_stopped
    }
}

/// Its runtime has ended, if it has not stopped by itself. Others are watched by their own runtimes; whose runtime has ended
/// too is not watched any more, which counts as lost.
impl Drop for Ticking {
    fn drop(&mut self) {
        if self.has_stopped {
            return;
        }
        let mut watching = self.watch.lock();
        watching.ticking = false;
        let left = std::mem::take(&mut watching.watched);
        drop(watching);
        for watched in left {
            if self.is_shared {
                LossWatch::default().add(watched, false);
            } else {
                watched
                    .link
                    .loss
                    .lose("the runtime that watched its connection has ended");
            }
        }
    }
}

impl Watched {
    fn next(&self) -> MutexGuard<'_, Option<Instant>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is to be watched on.
    fn lives(&self) -> bool {
        let loss = &self.link.loss;
        if !loss.has_ended() {
            match self.link.with(|object| object.is_closed()) {
                Some(false) if !self.state.is_lost() => return true,
                Some(false) => loss.lose("the server was silent for too long"),
                Some(true) => loss.lose(None),
                // Whoever has ended it says what has become of it.
                None => {}
            }
        }
        false
    }

    fn ask_if_due(self: &Arc<Self>) {
        let mut next = self.next();
        if next.is_none_or(|next| Instant::now() < next) {
            return;
        }
        let Some(connections) = self.connections.upgrade() else {
            return;
        };
        let Some(interval) = connections.heartbeat().interval else {
            return;
        };
        *next = None;
        drop(next);
        let watched = Arc::clone(self);
        let asking = scopeguard::guard(interval, move |interval| {
            *watched.next() = Some(Instant::now() + interval);
        });
        let watched = Arc::clone(self);
        drop(Handle::current().spawn(async move {
            let mut asking = asking;
            match watched.ask(&connections).await {
                // Well before the server would end the session.
                Ok(Some(idle)) => *asking = interval.min(idle / 2),
                Ok(None) => {}
                Err(lost) => {
                    tracing::warn!(pid = watched.pid, why = lost.0, "session lock lost");
                    watched.link.loss.lose(lost.0);
                }
            }
        }));
    }

    /// One heartbeat: how long the session may idle, or why it is lost.
    async fn ask(&self, connections: &Arc<Connections>) -> Result<Option<Duration>, Lost> {
        let statements = self.state.statements();
        if self.state.may_be_in_transaction() && !self.idles(connections).await {
            return Ok(None);
        }
        let held = if self.by_pid_alone.load(Ordering::Relaxed) {
            NOT_KNOWN.to_owned()
        } else {
            (self.held)()
        };
        let question = heartbeat(&held);
        let sent = self.link.with(|object| {
            // The driver sends at the first poll, and what is sent next comes after it.
            let send = || poll_once(pin!(object.simple_query_raw(&question)));
            self.state.if_idle(statements, send).flatten()
        });
        let Some(Some(sent)) = sent else {
            return Ok(None);
        };
        let answer = async {
            let mut replies = pin!(sent?);
            let mut answer = Reply::new();
            while let Some(reply) = poll_fn(|cx| replies.as_mut().poll_next(cx)).await {
                answer.push(reply?);
            }
            Ok::<Vec<SimpleQueryMessage>, DriverError>(answer)
        };
        let mut answer = pin!(answer);
        let step = connections.heartbeat().patience / STEPS;
        for _ in 0..STEPS {
            if let Ok(answer) = tokio::time::timeout(step, answer.as_mut()).await {
                connections.heard(answer.as_ref().err());
                return self.judge(answer);
            }
            if self.link.loss.has_ended() {
                return Ok(None);
            }
        }
        // The driver reads no answer while the caller leaves the rows of a stream before it unread.
        if self.state.is_untracked() && self.lives_on(connections).await {
            return Ok(None);
        }
        self.state.lost();
        Err(Lost(Some("the server did not answer a heartbeat")))
    }

    /// Whether another connection says that the backend is there.
    async fn lives_on(&self, connections: &Arc<Connections>) -> bool {
        let Some(pid) = self.pid else { return false };
        let question = lives(pid);
        let asking = connections.ask_within(SPARE, &question);
        let asked = tokio::time::timeout(ALIVE, asking).await;
        asked.is_ok_and(|asked| asked.is_ok_and(|reply| idles(&reply)))
    }

    fn judge(&self, answer: Result<Reply, DriverError>) -> Result<Option<Duration>, Lost> {
        let reply = match answer.as_deref().map_err(classify) {
            Ok(reply) => reply,
            Err(Failure::ConnectionLost | Failure::Driver) => return Err(Lost(None)),
            Err(failure) => {
                if failure == Failure::Aborted {
                    self.state.may_begin();
                } else if failure == Failure::Other {
                    self.by_pid_alone.store(true, Ordering::Relaxed);
                }
                tracing::debug!(pid = self.pid, ?failure, "heartbeat failed");
                return Ok(None);
            }
        };
        let Some(heartbeat) = read_heartbeat(reply) else {
            return Ok(None);
        };
        // The server counts the idle time from here.
        self.state.heard();
        if heartbeat.in_transaction {
            self.state.may_begin();
        }
        if self.pid.is_some_and(|pid| pid != heartbeat.pid) {
            self.state.lost();
            return Err(Lost(Some("another backend answers on its connection")));
        }
        if heartbeat.is_missing {
            return Err(Lost(Some("pg_locks does not show it any more")));
        }
        Ok(heartbeat.idle_session_timeout)
    }

    /// Whether another connection says that the backend idles outside of a transaction.
    async fn idles(&self, connections: &Arc<Connections>) -> bool {
        let Some(pid) = self.pid else { return false };
        let asked = connections.ask_within(SPARE, &is_idle(pid)).await;
        asked.is_ok_and(|reply| idles(&reply))
    }
}
