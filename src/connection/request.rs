//! A message and its answer, seen through to the end even if the caller goes away.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_core::Stream;
use tokio::runtime::Handle;
use tokio_postgres::SimpleQueryMessage;
use tracing::Instrument as _;

use super::cancel::{Canceller, SignalTarget, lock};
use super::silence::while_executing;
use super::{Reply, Session};
use crate::deadline::Deadline;
use crate::postgres::sql::{Message, PROBE};

pub(crate) type Answer = (Session, Result<Reply, tokio_postgres::Error>);
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// The same behind statements that we do not know of: they may be waiting for anything.
const ANSWER_TIMEOUT_UNTRACKED: Duration = Duration::from_millis(30);
/// How often a cancel is repeated until the statement it is for has answered. A signal that arrives before its
/// statement does is lost, so one is not enough.
const CANCEL_AGAIN: Duration = Duration::from_millis(100);
const CANCELS: usize = 10;
/// How often a waiter at the server looks up.
const LOOK_UP: Duration = Duration::from_secs(1);

/// What a reply leaves to be done.
pub(crate) enum AfterReply {
    /// Nothing is left on the connection.
    ReturnToPool,
    /// This is to be sent; once it has succeeded, nothing is left.
    Send(String),
    /// Somebody is waiting for the session.
    Pass(Box<dyn FnOnce(Session) + Send>),
    /// The reply is not what it should be.
    Close,
}

impl AfterReply {
    /// Does it. Where this returns without [`Session::return_to_pool`], the session closes its connection.
    pub(crate) async fn carry_out(self, session: Session) {
        match self {
            Self::Close => {}
            Self::ReturnToPool => {
                session.mark_nothing_left();
                session.return_to_pool();
            }
            Self::Pass(pass) => pass(session),
            Self::Send(sql) => {
                let request = session.send(sql, OnAbandon::Finish);
                if let Some((session, Ok(_))) = request.answered().await {
                    session.mark_nothing_left();
                    session.return_to_pool();
                }
            }
        }
    }
}

pub(crate) type ReplyHandler = Box<dyn FnOnce(&Reply) -> AfterReply + Send>;

/// What to do about a message whose answer nobody waits for any more.
pub(crate) enum OnAbandon {
    /// The message itself ends what there was (COMMIT, ROLLBACK, an unlock): once it has succeeded the connection goes
    /// back.
    Finish,
    /// The message does not wait for a lock. Once it has succeeded its reply says what is left to be done.
    Then(ReplyHandler),
    /// The message may wait for a lock: it is cancelled on the server, and the connection is closed.
    CancelAndClose,
}

impl OnAbandon {
    /// A transaction was begun: roll it back.
    pub(crate) fn rollback() -> Self {
        Self::Then(Box::new(|_| {
            AfterReply::Send(crate::postgres::sql::ROLLBACK.to_owned())
        }))
    }
}

/// A message under way together with the session it is on.
///
/// Cancel safety: may be dropped at any point. From then on it runs in the background, as its [`OnAbandon`] says.
///
/// Every wait for its answer has a bound, so it is not a future itself.
#[must_use = "a request sends nothing until its answer is awaited or it is detached"]
pub(crate) struct Request {
    sending: Sending,
    undo: Option<OnAbandon>,
    canceller: Canceller,
    runtime: Handle,
    timeout: Duration,
    untracked: bool,
    behind_unanswered: bool,
}

impl Request {
    /// The answer, unless it has to wait for statements of the caller that were given up: then the rest happens in the
    /// background, which cancels them.
    ///
    /// Cancel safety: as [`Request`] itself.
    pub(crate) async fn wait_or_detach(mut self) -> Option<Answer> {
        if self.behind_unanswered {
            self.detach();
            return None;
        }
        if !self.untracked {
            return self.answered().await;
        }
        // Behind statements that we do not know of, only for a moment. Then the background cancels them.
        self.wait(self.timeout).await
    }

    /// The answer, also behind statements of the caller that were given up: they are cancelled, and the connection does
    /// not go back then. `None` where none comes all the same.
    ///
    /// It waits for one [`longest_silence`](Connections::longest_silence) before it cancels, and for one after.
    ///
    /// Cancel safety: as [`Request`] itself.
    pub(crate) async fn wait_cancelling(mut self) -> Option<Answer> {
        let mut timeout = if self.behind_unanswered {
            Duration::ZERO
        } else {
            self.timeout
        };
        let mut end = None;
        loop {
            if let Some((session, answer)) = self.wait(timeout).await {
                if end.is_some() {
                    session.state.cancelling();
                }
                return Some((session, answer));
            }
            let silence = self.canceller.connections().longest_silence();
            let end = end.get_or_insert_with(|| Deadline::after(silence));
            if end.has_passed() {
                self.lose();
                return None;
            }
            Box::pin(end.bound(Duration::ZERO, self.canceller.cancel())).await;
            timeout = CANCEL_AGAIN.min(end.remaining());
        }
    }

    /// The answer, unless the server is silent for too long.
    ///
    /// Cancel safety: as [`Request`] itself.
    pub(crate) async fn answered(self) -> Option<Answer> {
        let most = self.canceller.connections().longest_silence();
        self.within(most).await
    }

    /// The answer, unless it takes longer than `most`, and a little more. Then the connection is closed, and what may be
    /// waiting on it is cancelled.
    ///
    /// Cancel safety: as [`Request`] itself.
    pub(crate) async fn within(mut self, most: Duration) -> Option<Answer> {
        let answer = self.wait(most).await;
        if answer.is_none() {
            self.lose();
        }
        answer
    }

    /// The answer to a statement that may take as long as its backend is executing it.
    ///
    /// Cancel safety: as [`Request`] itself.
    #[cfg(feature = "schema")]
    pub(crate) async fn while_executing(mut self) -> Option<Answer> {
        let (canceller, sending) = (&self.canceller, &mut self.sending);
        let (runtime, pid, may_copy) = (&self.runtime, canceller.server_pid(), self.untracked);
        let connections = canceller.connections();
        let answer = while_executing(connections, runtime, pid, may_copy, sending).await;
        if answer.is_none() {
            self.lose();
        }
        answer
    }

    /// The answer to a message that waits for locks, until `end` at the latest. Meanwhile `look_up` is called now and then.
    ///
    /// After each silence another connection is asked whether the backend is still waiting. If it is not, or nothing
    /// answers, this ends.
    ///
    /// Cancel safety: as [`Request`] itself.
    pub(crate) async fn while_waiting(
        &mut self,
        end: &Deadline,
        mut look_up: impl FnMut(),
    ) -> Option<Answer> {
        let (canceller, runtime, sending) = (&self.canceller, &self.runtime, &mut self.sending);
        let (connections, pid) = (canceller.connections(), canceller.server_pid());
        let executing = while_executing(connections, runtime, pid, false, sending);
        // Boxed, because it is rare to wait.
        let mut executing = Box::pin(executing);
        loop {
            let most = end.remaining().min(LOOK_UP);
            match connections.bound(runtime, most, &mut executing).await {
                Some(answered) => return answered,
                None if end.has_passed() => return None,
                None => look_up(),
            }
        }
    }

    async fn wait(&mut self, most: Duration) -> Option<Answer> {
        let connections = self.canceller.connections();
        connections
            .bound(&self.runtime, most, &mut self.sending)
            .await
    }

    /// Closes the connection now, so that the pool may open another.
    pub(crate) fn lose(&mut self) {
        let Some(undo) = self.undo.take() else { return };
        drop(self.sending.answering.take());
        // What ends a transaction or a lock waits for nothing, or is COMMIT, which is not to be cancelled.
        if !matches!(undo, OnAbandon::Finish) {
            let canceller = self.canceller.clone();
            drop(self.runtime.spawn(async move { canceller.cancel().await }));
        }
    }

    pub(super) fn new(session: Session, message: Message, undo: OnAbandon) -> Self {
        let unanswered = session.state.is_unanswered();
        let untracked = session.state.is_untracked();
        let canceller = session.canceller();
        // Behind a pooler the end of the transaction is not sent before the statements in it have ended: they are
        // cancelled, and it would free the backend for another client just then.
        let ends = matches!(undo, OnAbandon::Finish) && !session.state.holds_locks();
        let separately = ends && unanswered && canceller.is_pooled();
        Self {
            canceller,
            runtime: session.runtime.clone(),
            // Behind a statement that was given up there is no waiting for this one's turn.
            undo: Some(if unanswered {
                OnAbandon::CancelAndClose
            } else {
                undo
            }),
            untracked,
            timeout: if untracked {
                ANSWER_TIMEOUT_UNTRACKED
            } else {
                session.connections().longest_silence()
            },
            behind_unanswered: unanswered,
            sending: Sending {
                sent: false,
                answering: Some(Box::pin(async move {
                    if separately {
                        drop(session.client().simple_query(PROBE).await);
                    }
                    if ends {
                        let mut target = lock(session.canceller.target()).await;
                        if separately || !(unanswered || untracked) {
                            *target = SignalTarget::Nothing;
                        }
                    }
                    let answer = answer(&session, &message).await;
                    session.connections().heard(answer.as_ref().err());
                    // Answers come in order: with this one all earlier statements have ended.
                    session.state.all_answered();
                    (session, answer)
                })),
            },
        }
    }

    /// Sends the message now, and leaves the rest to the background: for `Drop`.
    pub(crate) fn detach(mut self) {
        if let Some(mut answering) = self.sending.answering.take() {
            self.sending.sent = true;
            // The answer can be there already, where this thread was interrupted for as long as a round trip takes.
            self.sending.answering = Some(match poll_once(answering.as_mut()) {
                Some(answer) => Box::pin(std::future::ready(answer)),
                None => answering,
            });
        }
    }
}

/// A message under way.
struct Sending {
    // `None` once answered.
    answering: Option<Answering>,
    sent: bool,
}

impl Future for Sending {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        self.sent = true;
        let answering = self
            .answering
            .as_mut()
            .expect("a request is not polled after its answer");
        let answer = std::task::ready!(answering.as_mut().poll(cx));
        self.answering = None;
        Poll::Ready(answer)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let (Some(answering), Some(undo)) = (self.sending.answering.take(), self.undo.take())
        else {
            return;
        };
        if self.sending.sent {
            // On a runtime that has shut down the task is dropped unrun, and the session in it closes its connection.
            let busy = matches!(undo, OnAbandon::CancelAndClose) || self.untracked;
            let canceller = CancelOnDrop::new(self.canceller.clone(), busy);
            drop(
                self.runtime
                    .spawn(drive_abandoned(answering, undo, canceller, self.timeout)),
            );
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("sent", &self.sending.sent)
            .finish_non_exhaustive()
    }
}

/// Goes on with `work` in the background, whether this is polled again or not: somebody else waits for what comes of it.
/// What it sends at its first poll is sent at once. `None` where the runtime ends before.
///
/// Cancel safety: once polled, the work goes on if this is dropped.
pub(crate) async fn run_shielded<F>(work: F) -> Option<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    let mut work = Box::pin(work.in_current_span());
    let first = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
    if let Poll::Ready(output) = first {
        return Some(output);
    }
    match Handle::try_current() {
        Ok(runtime) => runtime.spawn(work).await.ok(),
        Err(_) => Some(work.await),
    }
}

/// The answer to a message, up to the end of its last statement.
async fn answer(session: &Session, message: &Message) -> Result<Reply, tokio_postgres::Error> {
    let client = session.client();
    let Some(statements) = message.statements else {
        return client.simple_query(&message.text).await;
    };
    let mut replies = std::pin::pin!(client.simple_query_raw(&message.text).await?);
    let mut answer = Vec::with_capacity(statements + 2);
    let mut ended = 0;
    // What comes behind it is read by the driver, which has forgotten us by then.
    while ended < statements
        && let Some(reply) = poll_fn(|cx| replies.as_mut().poll_next(cx)).await
    {
        let reply = reply?;
        ended += usize::from(matches!(reply, SimpleQueryMessage::CommandComplete(_)));
        answer.push(reply);
    }
    Ok(answer)
}

/// Sees an abandoned message through. Wherever this returns without [`Session::return_to_pool`], the session closes its
/// connection.
async fn drive_abandoned(
    mut answering: Answering,
    undo: OnAbandon,
    mut canceller: CancelOnDrop,
    timeout: Duration,
) {
    let undo = match undo {
        OnAbandon::CancelAndClose => return cancel_until_answered(answering, canceller).await,
        OnAbandon::Finish => None,
        OnAbandon::Then(text) => Some(text),
    };
    let connections = canceller.canceller.connections().clone();
    let answered = connections.bound(&Handle::current(), timeout, &mut answering);
    let Some((session, answer)) = answered.await else {
        canceller.armed = true;
        return cancel_until_answered(answering, canceller).await;
    };
    canceller.armed = false;
    let Ok(reply) = answer else { return };
    let then = undo.map_or(AfterReply::ReturnToPool, |then| then(&reply));
    then.carry_out(session).await;
}

/// Cancels what the backend is running until the answer is there, and closes the connection even then: a cancel that
/// was sent and did not hit its statement may still hit the next one.
async fn cancel_until_answered(mut answering: Answering, mut canceller: CancelOnDrop) {
    for _ in 0..CANCELS {
        tokio::select! {
            biased;
            _ = &mut answering => {
                canceller.armed = false;
                return;
            }
            () = canceller.canceller.cancel() => {}
        }
        if tokio::time::timeout(CANCEL_AGAIN, &mut answering)
            .await
            .is_ok()
        {
            canceller.armed = false;
            return;
        }
    }
    canceller.armed = false;
    tracing::warn!("a cancelled statement did not end, its connection is closed all the same");
}

/// Cancels a statement even if the runtime shuts down first: a backend that is busy does not notice that its client has
/// gone, and would hold its locks until the statement ends.
struct CancelOnDrop {
    canceller: Canceller,
    armed: bool,
}

impl CancelOnDrop {
    fn new(canceller: Canceller, armed: bool) -> Self {
        Self { canceller, armed }
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let canceller = self.canceller.clone();
        // The runtime that could do it is gone, so a thread with one of its own does: once, bounded, and then it ends.
        let thread = std::thread::Builder::new().name("lockkeeper-cancel".to_owned());
        let spawned = thread.spawn(move || {
            if let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
            {
                runtime.block_on(canceller.cancel());
            }
        });
        drop(spawned);
    }
}

/// One poll with nobody to wake: what the driver sends, it sends at the first.
pub(super) fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}
