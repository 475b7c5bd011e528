//! The life of one pooled connection.
//!
//! This is the only module that takes connections from the pool, uses the driver's cancel, discards or spawns. Its one rule: a
//! connection goes back to the pool by [`Session::return_to_pool`] and in no other way, and that is called only after the
//! server has answered that nothing of ours is left on it. Whatever else happens to a [`Session`] (an error, a panic,
//! a dropped future, a runtime that shuts down), its `Drop` takes the connection out of the pool and closes it, which
//! makes the server roll back and unlock.

mod cancel;
mod checkout;
mod coarse_timeout;
mod connection_cache;
mod ending;
mod heartbeat;
mod hosts;
mod loss;
mod observer;
mod own_backends;
mod pool;
mod queries;
mod request;
mod server_capabilities;
mod side_connection;
mod silence;
pub(crate) mod sql;
mod state;
pub(crate) mod task;
mod tcp_timeouts;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use tokio::runtime::Handle;
use tokio::sync::OwnedMutexGuard;
use tokio_postgres::error::DbError;
use tokio_postgres::{SimpleQueryMessage, Statement};

use crate::call_site::CallSite;
use crate::connection::sql::server::Denied;
use crate::error::{Failure, classify};
use crate::meter;
use crate::postgres::sql::Message;
use crate::postgres::statement::{idle_timeout_set_by, may_begin, transaction_end, unlocks_all};

use self::sql::server;
pub(crate) use cancel::Canceller;
use cancel::SignalTarget;
pub(crate) use checkout::Checkout;
pub use ending::Connector;
pub(crate) use heartbeat::HeartbeatOptions;
pub use loss::Loss;
pub(crate) use loss::LossSignal;
pub use observer::ToStatement;
pub(crate) use observer::{
    Beginning, Observation, Observed, Observer, PendingStatement, Sent, StatementEnd,
};
pub(crate) use own_backends::is_own_backend;
pub(crate) use pool::{Asker, Connections, LONGEST_SILENCE};
pub(crate) use queries::query_methods;
pub(crate) use request::{AfterReply, OnAbandon, ReplyHandler, Request, run_shielded};
pub(crate) use server_capabilities::LockScope;
pub(crate) use side_connection::{SideConfig, SideConnection};
use silence::closed;
pub(crate) use state::UntilClean;
use state::{Clean, ConnectionState, State};
pub use tcp_timeouts::tcp_timeouts;

/// Within this time a statement fails that is sent on a connection that has ended.
const FOUND_ENDED: Duration = Duration::from_secs(1);

/// The rows and ends of statements of one simple-query message.
pub(crate) type Reply = Vec<SimpleQueryMessage>;

/// One connection that this crate has taken from the pool. The module's docs say how it ends.
///
/// Boxed, because sessions move through many futures.
pub(crate) struct Session(Box<Inner>);

/// What is in a [`Session`].
pub(crate) struct Inner {
    // Invariant: `Some` until `return_to_pool` or `drop` takes it.
    // Shared for as long as others reach the connection through the link.
    object: Option<Arc<Object>>,
    /// Through which others reach the connection.
    link: Option<Arc<heartbeat::Link>>,
    runtime: Handle,
    canceller: Canceller,
    own_backend: Option<own_backends::OwnBackend>,
    /// What we named the backend, to recognize it by.
    application_name: Option<Arc<str>>,
    state: Arc<ConnectionState>,
    /// Tells it from all other sessions of this process.
    id: u64,
    /// The transaction or the guard on it, where somebody observes it.
    observation: Option<Observation>,
    /// The server's error since which nothing has succeeded.
    failure: Mutex<Option<Box<DbError>>>,
    /// How many there were.
    failures: AtomicU64,
}

impl Deref for Session {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Inner {
        &mut self.0
    }
}

impl Session {
    fn new(object: Object, connections: Arc<Connections>, runtime: Handle, id: u64) -> Self {
        Self(Box::new(Inner {
            canceller: Canceller::new(object.cancel_token(), connections),
            object: Some(Arc::new(object)),
            link: None,
            runtime,
            own_backend: None,
            application_name: None,
            state: Arc::default(),
            id,
            observation: None,
            failure: Mutex::new(None),
            failures: AtomicU64::new(0),
        }))
    }

    /// The connection, for statements whose fate is not ours to know.
    pub(crate) fn untracked_client(&self) -> &Object {
        self.state.given_out();
        self.client()
    }

    pub(crate) fn client(&self) -> &Object {
        self.object
            .as_ref()
            .expect("a session keeps its connection until it ends")
    }

    /// Whether the connection has ended. The driver learns of a server's goodbye (a terminated backend, a shutdown)
    /// and of a closed socket without being used. One whose server was silent for too long counts as ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_lost() || self.client().is_closed()
    }

    /// Whether the server was silent for too long.
    pub(crate) fn is_lost(&self) -> bool {
        self.state.is_lost()
    }

    /// Tells this session from all others, wherever it is moved.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Notes that a transaction has begun on it.
    pub(crate) fn mark_begun(&self) {
        self.state.began();
    }

    /// Notes that the server has answered that the transaction has ended.
    pub(crate) fn mark_ended(&self) {
        self.state.ended();
    }

    /// Notes that a guard holds session locks on it.
    pub(crate) fn mark_locked(&self) {
        self.state.locked();
    }

    /// Notes that the server has answered that the session locks are returned.
    pub(crate) fn mark_unlocked(&self) {
        self.state.unlocked();
    }

    /// Notes that the server has answered that neither a transaction nor a session lock is left.
    pub(crate) fn mark_nothing_left(&self) {
        self.state.ended();
        self.state.unlocked();
    }

    /// Keeps something as long as a transaction or session locks are on it, at most as long as the connection.
    pub(crate) fn keep_until_clean(&self, kept: UntilClean) {
        self.state.keep_until_clean(kept);
    }

    /// Notes what the server said of its backend and of the transaction that has begun there, and what we have named it.
    pub(crate) fn identify(
        &mut self,
        pid: i32,
        xact_start: Option<i64>,
        application_name: Option<&Arc<str>>,
    ) {
        self.canceller.set_server_pid(pid);
        self.set_xact_start(xact_start);
        if let Some(observed) = self.observed() {
            observed.identify(pid);
        }
        self.own_backend = Some(own_backends::OwnBackend::of(pid));
        self.application_name = application_name.cloned();
    }

    /// Notes when the transaction has begun, or that this is not known.
    pub(crate) fn set_xact_start(&self, xact_start: Option<i64>) {
        self.state.began_at(xact_start);
        // Where a signal is under way the connection never goes back, and is closed after it.
        if let Ok(mut target) = self.canceller.target().try_lock() {
            *target = xact_start.map_or(SignalTarget::Backend, SignalTarget::Transaction);
        }
    }

    /// Whether anything was run on it beyond what takes and returns its locks.
    pub(crate) fn was_used(&self) -> bool {
        self.state.was_used()
    }

    /// Whether a cancel is on its way that may hit a later statement.
    pub(crate) fn has_pending_cancel(&self) -> bool {
        self.state.is_cancelling()
    }

    /// Notes that a statement has failed.
    pub(crate) fn mark_failed(&self) {
        self.state.failed();
    }

    /// Has another runtime see to what nobody waits for.
    pub(crate) fn set_runtime(&mut self, runtime: Option<&Handle>) {
        if let Some(runtime) = runtime {
            self.runtime = runtime.clone();
        }
    }

    /// Where the connection comes from.
    pub(crate) fn connections(&self) -> &Arc<Connections> {
        self.canceller.connections()
    }

    /// What its role may not read, as far as that is known.
    pub(crate) fn denied(&self) -> Denied {
        let known = self.connections().cache().server(self);
        known.map_or_else(
            || self.connections().capabilities().denied(),
            |server| server.denied,
        )
    }

    /// The backend's pid by its own word; `None` before it was asked.
    pub(crate) fn server_pid(&self) -> Option<i32> {
        self.canceller.server_pid()
    }

    /// The backend's pid as it was given at login. A pooler hands out one of its own there, so a backend that answers
    /// with another pid is behind one.
    pub(crate) fn login_pid(&self) -> Option<i32> {
        self.canceller.login_pid()
    }

    /// What cancels what runs on this session.
    pub(crate) fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Cancels what runs on this session, in the background, and sees to it that the connection never goes back.
    pub(crate) fn cancel_in_background(&self) {
        self.state.cancelling();
        let canceller = self.canceller();
        drop(self.runtime.spawn(async move { canceller.cancel().await }));
    }

    /// The server's last error, unless something has succeeded since.
    pub(crate) fn failure(&self) -> Option<Box<DbError>> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How often the server has answered with an error of its own: tells one failure from another.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// When the pool opened the connection: what tells it from all others of the pool.
    pub(crate) fn created(&self) -> Instant {
        Object::metrics(
            self.object
                .as_ref()
                .expect("a session keeps its connection until it ends"),
        )
        .created
    }

    /// Puts an error in the place of the last one, or nothing where it has been dealt with.
    pub(crate) fn remember_failure(&self, failure: Option<Box<DbError>>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// Has the pool's connections prepare their cached statements again: one of them gives rows of another type than when
    /// it was prepared, and would fail for ever.
    fn forget_prepared(&self) {
        tracing::debug!("a cached statement's result has changed, cached statements are forgotten");
        self.connections().forget_prepared();
        self.client().statement_cache.clear();
    }

    /// The same for this connection, where statements may have failed that are not known.
    pub(crate) fn forget_prepared_if_untracked(&self) {
        if self.state.is_untracked() {
            self.client().statement_cache.clear();
        }
    }

    /// For how long no statement has been under way, where that is known.
    pub(crate) fn idle(&self) -> Option<Duration> {
        self.state.idle()
    }

    /// Notes the transaction's `idle_in_transaction_session_timeout`, where it was set for it.
    pub(crate) fn set_idle_timeout(&self, timeout: Option<Duration>) {
        if let Some(timeout) = timeout {
            self.state.idles_for(timeout);
        }
    }

    /// Notes when a transaction has begun on a session that keeps its backend.
    pub(crate) fn mark_begun_at(&self, xact_start: Option<i64>) {
        self.state.began_at(xact_start);
    }

    /// Whether the answer to [`commit_message`](Self::commit_message) shows that the transaction had ended before, and
    /// another one was committed, or none.
    pub(crate) fn has_ended_before(&self, reply: &Reply) -> bool {
        server::is_fresh(reply) || self.state.is_another(server::xact_start(reply))
    }

    /// What ends the transaction on this session well.
    pub(crate) fn commit_message(&self) -> Message {
        if self.state.may_have_failed() {
            server::check_and_commit()
        } else {
            Message::of(1, crate::postgres::sql::COMMIT)
        }
    }

    /// Begins a statement of the caller, which the observer is told of.
    pub(crate) fn begin_logged(&self, statement: Sent<'_>) -> RunningStatement<'_> {
        let mut running = self.begin_tracked();
        if let Sent::Text(text) = statement {
            running.refusal = self.refusal(text);
        }
        if running.refusal.is_none() {
            running.pending = self.begin_statement(statement);
        }
        running
    }

    /// What is sent in the place of a text that shows that it would take away what is on this connection: it fails, and
    /// says why.
    fn refusal(&self, text: &str) -> Option<Box<str>> {
        self.set_idle_timeout(idle_timeout_set_by(text));
        match transaction_end(text) {
            Some(end) if self.state.is_in_transaction() => {
                return Some(sql::refuse(&end, "transaction, which ends by itself").into());
            }
            // Prepared, it may be executed in a transaction: COMMIT has to show it.
            Some(_) => self.state.failed(),
            // So it has where a string may end there, and what follows is not known.
            None if text.contains('\\') => self.state.failed(),
            None => {}
        }
        if !self.state.holds_locks() {
            return None;
        }
        if !self.state.is_in_transaction() && may_begin(text) {
            self.state.may_begin();
        }
        let unlocks = unlocks_all(text)?;
        Some(
            sql::refuse(
                unlocks,
                "session locks, which are for their guard to release",
            )
            .into(),
        )
    }

    /// Begins a statement of which it is tracked whether it was answered and how.
    fn begin_tracked(&self) -> RunningStatement<'_> {
        RunningStatement {
            session: self,
            idle: self.state.idle(),
            sent_at: Instant::now(),
            may_copy: self.state.is_untracked(),
            number: Some(self.state.sent()),
            pending: None,
            refusal: None,
        }
    }

    fn note_end(&self, number: u64, error: Option<&tokio_postgres::Error>) {
        self.connections().heard(error);
        self.state.answered(number, error.is_some());
        let Some(error) = error else {
            return self.remember_failure(None);
        };
        if classify(error) == Failure::StalePlan {
            self.forget_prepared();
        }
        // 25P02 only says that there was an error before: that one is kept.
        if classify(error) == Failure::Aborted && self.failure().is_some() {
            return;
        }
        if let Some(error) = error.as_db_error() {
            self.failures.fetch_add(1, Ordering::Relaxed);
            self.remember_failure(Some(Box::new(error.clone())));
        }
    }

    /// Tells the observer of a statement that is about to be sent.
    pub(crate) fn begin_statement(&self, statement: Sent<'_>) -> Option<PendingStatement> {
        Some(PendingStatement::begin(self.observed()?, statement))
    }

    /// Has what is run from now on observed as a transaction or a guard of its own; gives the one before.
    pub(crate) fn begin_observation(
        &mut self,
        call_site: Option<CallSite>,
        lock_timeout: Option<Duration>,
        is_guard: bool,
    ) -> Option<Observation> {
        let beginning = Beginning {
            call_site,
            application_name: self.application_name.as_ref(),
            lock_timeout,
            is_guard,
        };
        let observation = Observation::begin(self.connections().observer()?, beginning);
        if let Some(pid) = self.server_pid() {
            observation.observed().identify(pid);
        }
        self.observation.replace(observation)
    }

    /// Continues with one that was begun before, or none.
    pub(crate) fn resume_observation(&mut self, observation: Option<Observation>) {
        self.observation = observation;
    }

    pub(crate) fn observed(&self) -> Option<&Arc<dyn Observed>> {
        self.observation.as_ref().map(Observation::observed)
    }

    /// One message on a session that stays where it is, and its answer, which waits for nothing but the server.
    pub(crate) async fn message(&self, sql: &str) -> Result<Reply, tokio_postgres::Error> {
        self.message_waiting(sql, Duration::ZERO).await
    }

    /// The same for a message that waits at the server, for so long at most.
    pub(crate) async fn message_waiting(
        &self,
        sql: &str,
        wait: Duration,
    ) -> Result<Reply, tokio_postgres::Error> {
        let statement = self.begin_tracked();
        let most = wait.saturating_add(self.connections().longest_silence());
        let answer = pin!(self.client().simple_query(sql));
        statement.end(self.bounded(most, answer).await)
    }

    /// The error of a message that fails.
    async fn refused(&self, refusal: &str) -> tokio_postgres::Error {
        let most = self.connections().longest_silence();
        let sent = pin!(self.client().batch_execute(refusal));
        self.bounded(most, sent).await.err().unwrap_or_else(closed)
    }

    /// Puts a message on its way without waiting for the answer, in order with all others: the driver queues it at the
    /// first poll.
    pub(crate) fn queue(&self, sql: &str) {
        // Nobody will see whether it fails.
        self.state.failed();
        drop(request::poll_once(std::pin::pin!(
            self.client().batch_execute(sql)
        )));
    }

    /// One message on a session that goes with it, so that it can be finished or undone even if nobody waits.
    pub(crate) fn send(self, message: impl Into<Message>, undo: OnAbandon) -> Request {
        Request::new(self, message.into(), undo)
    }

    /// Back to the pool, if its state proves it clean; closed if not.
    pub(crate) fn return_to_pool(mut self) {
        match self.state.prove_clean() {
            Some(clean) => self.give_back(clean),
            None => tracing::debug!(state = ?self.state.state(), "connection not given back"),
        }
    }

    fn give_back(&mut self, _: Clean) {
        drop(self.take_object());
    }

    /// Why it does not go back to the pool, as a metric's label.
    fn why_discarded(&self, is_closed: bool) -> &'static str {
        match self.state.state() {
            _ if self.is_lost() => "silent",
            _ if is_closed => "ended",
            State::Unknown => "cancelled",
            State::Unanswered => "unanswered",
            State::HoldsLocks => "holds_locks",
            State::InTransaction => "in_transaction",
            // Before anything is known to be on it: what was sent first has failed.
            State::Clean => "failed",
        }
    }

    /// The connection, which nobody else reaches any more.
    fn take_object(&mut self) -> Option<Object> {
        self.end_watch();
        // Invariant: only the link has made other references, and it has ended.
        self.object.take().and_then(Arc::into_inner)
    }
}

/// A statement that was sent, until its answer is there.
///
/// Cancel safety: dropped without its answer, the statement stays unanswered, and [`drive_abandoned`](request) cancels it
/// before the connection is closed.
pub(crate) struct RunningStatement<'a> {
    session: &'a Session,
    /// For how long the session was idle before.
    idle: Option<Duration>,
    sent_at: Instant,
    /// Whether the caller may be sending the rows of a COPY that was begun before.
    may_copy: bool,
    // `None` once it has ended.
    number: Option<u64>,
    pending: Option<PendingStatement>,
    /// What is sent instead.
    refusal: Option<Box<str>>,
}

impl RunningStatement<'_> {
    /// Runs a statement of the caller, which may take as long as its backend is executing it.
    ///
    /// It is pinned by the caller, whose future would else have several times its size.
    pub(crate) async fn run<T>(
        self,
        answer: Pin<&mut impl Future<Output = Result<T, tokio_postgres::Error>>>,
    ) -> Result<T, tokio_postgres::Error> {
        let result = self.answered(answer).await;
        let result = self.explained(result).await;
        self.end(result)
    }

    /// With the reason for which the server has closed the connection, where it has.
    async fn explained<T>(
        &self,
        result: Result<T, tokio_postgres::Error>,
    ) -> Result<T, tokio_postgres::Error> {
        match result {
            // Boxed, because it is rare and every statement's future would have its size.
            Err(error) => {
                // What ended later was not ended for being idle.
                let idle = self.idle.filter(|_| self.sent_at.elapsed() < FOUND_ENDED);
                Err(Box::pin(self.session.explained(error, idle)).await)
            }
            answered => answered,
        }
    }

    async fn answered<T>(
        &self,
        answer: Pin<&mut impl Future<Output = Result<T, tokio_postgres::Error>>>,
    ) -> Result<T, tokio_postgres::Error> {
        if let Some(refusal) = &self.refusal {
            // Boxed, because it is rare and every statement's future would have its size.
            return Err(Box::pin(self.session.refused(refusal)).await);
        }
        self.session.while_executing(answer, self.may_copy).await
    }

    fn end<T>(
        mut self,
        result: Result<T, tokio_postgres::Error>,
    ) -> Result<T, tokio_postgres::Error> {
        let error = result.as_ref().err();
        if let Some(number) = self.number.take() {
            self.session.note_end(number, error);
        }
        if let Some(pending) = self.pending.take() {
            pending.end(error.map(classify));
        }
        result
    }

    /// Prepares a statement, which may wait for a lock and takes none that matters later.
    pub(crate) async fn prepare(
        mut self,
        sql: &str,
        answer: Pin<&mut impl Future<Output = Result<Statement, tokio_postgres::Error>>>,
    ) -> Result<Statement, tokio_postgres::Error> {
        let result = self.answered(answer).await;
        let result = self.explained(result).await;
        if let Ok(statement) = &result
            && let Some(pending) = self.pending.take()
        {
            pending.end_with(StatementEnd::Prepared(sql, statement));
        }
        self.end(result)
    }
}

impl Drop for RunningStatement<'_> {
    fn drop(&mut self) {
        if self.number.take().is_some() {
            self.session.state.dropped();
        }
    }
}

/// Without the pool's configuration, which names hosts and users.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("server_pid", &self.server_pid())
            .finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(object) = self.take_object() {
            let reason = self.why_discarded(object.is_closed());
            tracing::debug!(pid = self.server_pid(), reason, "connection discarded");
            meter::discarded(reason);
            // Out of the pool, which may open another, and closed: the pool's wrapper ends its socket's task.
            let client = Object::take(object);
            let close = |mut target: OwnedMutexGuard<SignalTarget>| {
                if *target == SignalTarget::Backend {
                    *target = SignalTarget::Nothing;
                }
                drop(client);
            };
            match Arc::clone(self.canceller.target()).try_lock_owned() {
                Ok(target) => close(target),
                Err(_) => {
                    let target = Arc::clone(self.canceller.target());
                    let closing = async move { close(cancel::lock(&target).await) };
                    drop(self.runtime.spawn(closing));
                }
            }
        }
        // A heartbeat can still have the state.
        self.state.closed();
    }
}
