//! Where sessions come from: the application's pool, and the side connection.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use deadpool_postgres::{Pool, PoolError, TimeoutType};
use tokio::runtime::Handle;

use super::coarse_timeout::{CoarseTimeout, CoarseTimer};
use super::connection_cache::ConnectionCache;
use super::heartbeat::LossWatch;
use super::server_capabilities::Capabilities;
use super::side_connection::{Purpose, Turn};
use super::{HeartbeatOptions, Observer, Reply, Session, SideConnection};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
#[cfg(feature = "incidents")]
use crate::postgres::sql::PROBE;

/// How long a server may be silent, where the keeper's owner does not say.
pub(crate) const LONGEST_SILENCE: Duration = Duration::from_secs(15);
/// How much longer than the deadline a login under way may take.
const LOGIN: Duration = Duration::from_millis(500);
const ON_SIDE: &str = "on the side connection";
/// How long the side connection may take, its login included, before the pool is asked instead.
const SIDE: Duration = Duration::from_secs(1);
/// How long for an answer on one of the pool's: what is asked is small. Both, unless a server may not be silent for so long.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two questions to a server that does not answer.
const PAUSE: Duration = Duration::from_millis(50);
/// How long to wait for a pool connection to look or cancel with.
const SPARE: Duration = Duration::from_secs(1);
/// The same for what is not worth waiting for.
#[cfg(feature = "incidents")]
const SPARE_SOON: Duration = Duration::from_millis(20);

/// The size of a pool that can do without the connection of an [`Asker`].
const KEEPS_ONE: usize = 4;

static NEXT_SESSION: AtomicU64 = AtomicU64::new(1);

/// The connections one keeper may use.
pub(crate) struct Connections {
    pool: Pool,
    side: Option<SideConnection>,
    capabilities: Capabilities,
    cache: ConnectionCache,
    timeout: CoarseTimer,
    observer: Option<Arc<dyn Observer>>,
    longest_silence: Duration,
    heartbeat: HeartbeatOptions,
    loss_watch: LossWatch,
    /// Whether the pool may open one connection more at the moment.
    extended: AtomicBool,
    begun: Instant,
    /// When the server last answered on any of them, in milliseconds since then.
    heard: AtomicU64,
    /// The schema of the tables in which this crate keeps what outlives a session.
    #[cfg(feature = "coordination")]
    tables: std::sync::OnceLock<Box<str>>,
}

/// Without the pool's configuration, which names hosts and users.
impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections")
            .field("side", &self.side)
            .finish_non_exhaustive()
    }
}

impl Connections {
    pub(crate) fn new(
        pool: Pool,
        side: Option<SideConnection>,
        observer: Option<Arc<dyn Observer>>,
        longest_silence: Duration,
        heartbeat: HeartbeatOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            pool,
            side,
            capabilities: Capabilities::default(),
            cache: ConnectionCache::default(),
            timeout: CoarseTimer::default(),
            observer,
            longest_silence,
            heartbeat,
            loss_watch: LossWatch::default(),
            extended: AtomicBool::new(false),
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            #[cfg(feature = "coordination")]
            tables: std::sync::OnceLock::new(),
        })
    }

    /// Says once which schema this crate's tables are in.
    #[cfg(feature = "coordination")]
    pub(crate) fn set_tables_schema(&self, schema: impl Into<Box<str>>) {
        // The first one counts.
        drop(self.tables.set(schema.into()));
    }

    /// The schema of this crate's tables; `public` where nothing was said.
    #[cfg(feature = "coordination")]
    pub(crate) fn tables_schema(&self) -> &str {
        self.tables.get().map_or("public", |schema| schema)
    }

    /// What has been found out about the servers behind the pool.
    pub(crate) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// What has been found out about its connections.
    pub(crate) fn cache(&self) -> &ConnectionCache {
        &self.cache
    }

    /// Has all connections of the pool prepare their cached statements again.
    pub(super) fn forget_prepared(&self) {
        self.pool.manager().statement_caches.clear();
    }

    /// A message has ended: by the server's answer, unless its error is the driver's.
    pub(super) fn heard(&self, error: Option<&tokio_postgres::Error>) {
        if error.is_none_or(|error| error.as_db_error().is_some()) {
            self.heard.store(self.milliseconds(), Ordering::Relaxed);
        }
    }

    /// Whether the server has answered within this time, on any connection.
    pub(super) fn heard_within(&self, time: Duration) -> bool {
        let heard = self.heard.load(Ordering::Relaxed);
        u128::from(self.milliseconds().saturating_sub(heard)) <= time.as_millis()
    }

    fn milliseconds(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How long a server may be silent.
    pub(crate) fn longest_silence(&self) -> Duration {
        self.longest_silence
    }

    /// How often connections that hold session locks are asked whether they live.
    pub(super) fn heartbeat(&self) -> HeartbeatOptions {
        self.heartbeat
    }

    /// Who looks after those connections.
    pub(super) fn loss_watch(&self) -> &LossWatch {
        &self.loss_watch
    }

    /// Who is told of transactions and guards.
    pub(super) fn observer(&self) -> Option<&Arc<dyn Observer>> {
        self.observer.as_ref()
    }

    /// Bounds the time that an answer may take.
    pub(super) fn bound<F: Future + Unpin>(
        &self,
        runtime: &Handle,
        most: Duration,
        answer: F,
    ) -> CoarseTimeout<F> {
        self.timeout.bound(runtime, most, answer)
    }

    /// How many connections the pool may hold: as many of them may turn out to be dead before one is alive.
    pub(crate) fn most(&self) -> usize {
        self.pool.status().max_size
    }

    /// Whether somebody waits for a connection to come back to the pool.
    pub(crate) fn are_awaited(&self) -> bool {
        let status = self.pool.status();
        status.waiting > 0 && status.size >= status.max_size
    }

    pub(crate) fn side(&self) -> Option<&SideConnection> {
        self.side.as_ref()
    }

    /// Takes a connection from the pool, waiting for one until the deadline.
    ///
    /// Cancel safety: nothing is taken before this returns.
    pub(crate) async fn check_out(self: &Arc<Self>, deadline: &Deadline) -> Result<Session, Error> {
        let runtime = Handle::try_current()
            .map_err(|error| Error::config("called outside a tokio runtime").with_source(error))?;
        // Boxed, because it is most of the size of whatever takes a connection.
        let mut getting = Box::pin(self.pool.get());
        let mut got = deadline.bound(Duration::ZERO, &mut getting).await;
        let status = self.pool.status();
        let in_use = status.size.saturating_sub(status.available);
        if got.is_none() && in_use < status.max_size {
            // Not waiting for somebody to give one back, but for the server to let a new one in.
            got = tokio::time::timeout(LOGIN, getting).await.ok();
        }
        let object = match got {
            Some(Ok(object)) => object,
            Some(Err(PoolError::Timeout(TimeoutType::Wait))) | None => {
                return Err(Error::new(ErrorKind::Pool)
                    .with_detail(format!(
                        "none became free, {in_use} of {} in use",
                        status.max_size
                    ))
                    .with_waited(deadline.waited()));
            }
            Some(Err(error)) => {
                let hosts = super::hosts::hosts(&self.pool);
                return Err(Error::from(error).with_hosts(hosts));
            }
        };
        let id = NEXT_SESSION.fetch_add(1, Ordering::Relaxed);
        Ok(Session::new(object, Arc::clone(self), runtime, id))
    }

    /// Whether a side connection is configured.
    #[cfg(feature = "incidents")]
    pub(crate) fn has_side(&self) -> bool {
        self.side.is_some()
    }

    /// Opens the side connection, if there is to be one and it can be.
    #[cfg(feature = "incidents")]
    pub(crate) async fn open_side(self: &Arc<Self>) -> Result<(), Error> {
        if let Some(side) = &self.side {
            self.ask_side(side, Purpose::Sampling, PROBE).await?;
        }
        Ok(())
    }

    /// Asks what is worth knowing only at once, and does without an answer rather than wait for a connection.
    #[cfg(feature = "incidents")]
    pub(crate) async fn ask_soon(self: &Arc<Self>, sql: &str) -> Result<Reply, Error> {
        if let Some(side) = &self.side {
            let answered = self.ask_side(side, Purpose::Sampling, sql).await;
            return answered.map(|(_, reply)| reply);
        }
        let session = self.check_out(&Deadline::after(SPARE_SOON)).await?;
        // The settings of the side connection, until the end of the message.
        let bounded = crate::connection::sql::server::with_short_timeouts(sql);
        // Cancel safety: unanswered, its connection is closed.
        let reply = self.answer(session.message(&bounded)).await?;
        // What fails (for want of a privilege, or behind a lock) leaves nothing, unless there was a transaction already.
        let is_clean = reply.is_ok() || {
            let probed = self.answer(session.message(PROBE));
            probed.await?.is_ok()
        };
        if is_clean {
            session.return_to_pool();
        }
        Ok(reply?)
    }

    /// Asks the server something small on a connection that is not stuck: the side connection, else one of the
    /// pool's.
    pub(crate) async fn ask(self: &Arc<Self>, sql: &str) -> Result<Reply, Error> {
        self.ask_within(SPARE, sql).await
    }

    /// As [`ask`](Self::ask), with the time that one of the pool's may be waited for.
    pub(crate) async fn ask_within(
        self: &Arc<Self>,
        spare: Duration,
        sql: &str,
    ) -> Result<Reply, Error> {
        self.ask_for(Purpose::Urgent, spare, sql).await
    }

    /// As [`ask`](Self::ask), for what may take the server a while, and is not to hold up anything else.
    #[cfg(feature = "monitor")]
    pub(crate) async fn look(self: &Arc<Self>, sql: &str) -> Result<Reply, Error> {
        self.look_within(SPARE, sql).await
    }

    /// As `look`, with the time that one of the pool's may be waited for.
    #[cfg(any(feature = "monitor", feature = "schema"))]
    pub(crate) async fn look_within(
        self: &Arc<Self>,
        spare: Duration,
        sql: &str,
    ) -> Result<Reply, Error> {
        self.ask_for(Purpose::Monitoring, spare, sql).await
    }

    async fn ask_for(
        self: &Arc<Self>,
        purpose: Purpose,
        spare: Duration,
        sql: &str,
    ) -> Result<Reply, Error> {
        let (answered, reply) = self.ask_first(purpose, spare, sql).await?;
        answered.end();
        Ok(reply)
    }

    /// Asks within `most` whatever answers: the side connection, else one connection of the pool after another, since
    /// those may be silent too.
    ///
    /// # Errors
    /// The server's refusal; `ConnectionLost` or `Pool` where nothing has answered.
    pub(super) async fn ask_persistently(
        self: &Arc<Self>,
        most: Duration,
        sql: &str,
    ) -> Result<Reply, Error> {
        let deadline = Deadline::after(most);
        let patience = most / 4;
        loop {
            let asked = deadline.bound(Duration::ZERO, self.ask_any(patience, sql));
            match asked.await {
                Some(Err(error)) if error.as_db_error().is_none() && !deadline.has_passed() => {
                    tracing::debug!(%error, "nothing has answered yet");
                    tokio::time::sleep(patience.min(PAUSE)).await;
                }
                Some(answer) => return answer,
                None => return Err(no_answer("on any other connection", most)),
            }
        }
    }

    async fn ask_any(self: &Arc<Self>, patience: Duration, sql: &str) -> Result<Reply, Error> {
        if let Some(side) = &self.side {
            match ask_side(side, Purpose::Urgent, patience, sql).await {
                Err(error) if error.as_db_error().is_none() => {
                    tracing::debug!(%error, "side connection failed, using the pool");
                }
                answer => return answer.map(|(_, reply)| reply),
            }
        }
        // The pool's connections may all be busy, with long statements perhaps.
        let session = self.check_out_beyond(&Deadline::after(patience)).await?;
        ask_on(session, patience, sql).await
    }

    /// As [`check_out`](Self::check_out), from a pool that may open one connection more where all are in use.
    pub(crate) async fn check_out_beyond(
        self: &Arc<Self>,
        deadline: &Deadline,
    ) -> Result<Session, Error> {
        let extended = self.extend();
        let session = self.check_out(deadline).await;
        drop(extended);
        session
    }

    /// Lets the pool open one connection more where all are in use, until this is dropped. What is returned while the pool
    /// is too large is closed.
    fn extend(&self) -> Option<Extended<'_>> {
        let status = self.pool.status();
        let is_exhausted = status.available == 0 && status.size >= status.max_size;
        if !is_exhausted || self.extended.swap(true, Ordering::Relaxed) {
            return None;
        }
        self.pool.resize(status.max_size + 1);
        Some(Extended(self))
    }

    /// As [`ask`](Self::ask), for what must not be sent twice: it goes to the side connection only where that has just
    /// answered.
    #[cfg(feature = "resolver")]
    pub(crate) async fn ask_once(self: &Arc<Self>, sql: &str) -> Result<Reply, Error> {
        if let Some(side) = &self.side {
            match self.ask_side(side, Purpose::Urgent, PROBE).await {
                Ok((side, _)) => return side.ask(sql).await,
                Err(error) => tracing::debug!(%error, "side connection failed, using the pool"),
            }
        }
        let session = self.check_out(&Deadline::after(SPARE)).await?;
        ask_on(session, self.patience(), sql).await
    }

    /// Whether a connection to ask on can be had without waiting for it.
    pub(crate) fn has_spare(&self) -> bool {
        let status = self.pool.status();
        self.side.is_some() || status.available > 0 || status.size < status.max_size
    }

    /// Whether an [`Asker`] may keep one of the pool's connections: none where there is a side connection, which it asks first
    /// each time.
    fn can_keep_one(&self) -> bool {
        self.side.is_none() && self.most() >= KEEPS_ONE
    }

    /// As [`ask`](Self::ask), and the connection that has answered, for a question that must not be sent twice.
    pub(super) async fn ask_first(
        self: &Arc<Self>,
        purpose: Purpose,
        spare: Duration,
        sql: &str,
    ) -> Result<(Answered<'_>, Reply), Error> {
        if let Some(side) = &self.side {
            match self.ask_side(side, purpose, sql).await {
                Ok(answered) => return Ok(answered),
                Err(error) => tracing::debug!(%error, "side connection failed, using the pool"),
            }
        }
        let session = self.check_out(&Deadline::after(spare)).await?;
        // Cancel safety: a question of one statement; unanswered, its connection is closed.
        let reply = self.answer(session.message(sql)).await??;
        Ok((Answered::Pool(session), reply))
    }

    /// What is answered on a connection of the pool, unless the server is silent.
    pub(crate) async fn answer<T>(&self, asking: impl Future<Output = T>) -> Result<T, Error> {
        within(self.patience(), "on a connection of the pool", asking).await
    }

    /// How long for an answer on a connection of the pool.
    fn patience(&self) -> Duration {
        ANSWER.min(self.longest_silence)
    }

    async fn ask_side<'a>(
        &self,
        side: &'a SideConnection,
        purpose: Purpose,
        sql: &str,
    ) -> Result<(Answered<'a>, Reply), Error> {
        ask_side(side, purpose, SIDE.min(self.longest_silence), sql).await
    }
}

/// Who asks again and again: on the side connection, or on a connection that is kept for it, where the pool has enough.
#[derive(Default)]
pub(crate) struct Asker(Option<Session>);

impl Asker {
    /// Cancel safety: unanswered, its connection is closed.
    pub(crate) async fn ask(
        &mut self,
        connections: &Arc<Connections>,
        sql: &str,
    ) -> Result<Reply, Error> {
        let asker = std::mem::take(self);
        let (answered, reply) = asker.ask_first(connections, sql).await?;
        match answered {
            Answered::Pool(session) if connections.can_keep_one() => self.0 = Some(session),
            answered => answered.end(),
        }
        Ok(reply)
    }

    /// Asks, and what follows is to be asked on the connection that has answered.
    pub(super) async fn ask_first<'a>(
        mut self,
        connections: &'a Arc<Connections>,
        sql: &str,
    ) -> Result<(Answered<'a>, Reply), Error> {
        let kept = self.0.take().filter(|session| !session.is_closed());
        let Some(session) = kept else {
            return connections.ask_first(Purpose::Urgent, SPARE, sql).await;
        };
        let reply = connections.answer(session.message(sql)).await??;
        Ok((Answered::Pool(session), reply))
    }

    /// Gives its connection back.
    pub(crate) fn end(&mut self) {
        if let Some(session) = self.0.take() {
            session.return_to_pool();
        }
    }
}

/// A connection that has just answered.
pub(super) enum Answered<'a> {
    /// The side connection, and for how long its next answer is waited for.
    Side(Turn<'a>, Duration),
    Pool(Session),
}

impl Answered<'_> {
    pub(super) async fn ask(self, sql: &str) -> Result<Reply, Error> {
        match self {
            Self::Side(mut turn, most) => within(most, ON_SIDE, turn.ask(sql)).await?,
            Self::Pool(session) => {
                let most = session.connections().patience();
                ask_on(session, most, sql).await
            }
        }
    }

    /// Asks nothing more.
    pub(super) fn end(self) {
        if let Self::Pool(session) = self {
            session.return_to_pool();
        }
    }
}

/// A pool that may open one connection more.
struct Extended<'a>(&'a Connections);

impl Drop for Extended<'_> {
    fn drop(&mut self) {
        let pool = &self.0.pool;
        pool.resize(pool.status().max_size.saturating_sub(1));
        self.0.extended.store(false, Ordering::Relaxed);
    }
}

async fn ask_side<'a>(
    side: &'a SideConnection,
    purpose: Purpose,
    most: Duration,
    sql: &str,
) -> Result<(Answered<'a>, Reply), Error> {
    let asking = async {
        let mut turn = side.turn(purpose).await;
        let reply = turn.ask(sql).await?;
        Ok((Answered::Side(turn, most), reply))
    };
    within(most, ON_SIDE, asking).await?
}

/// Cancel safety: a question of one statement; unanswered, its connection is closed.
async fn ask_on(session: Session, most: Duration, sql: &str) -> Result<Reply, Error> {
    let reply = within(most, "on a connection of the pool", session.message(sql)).await??;
    session.return_to_pool();
    Ok(reply)
}

/// What is answered in time.
async fn within<T>(
    most: Duration,
    place: &str,
    asking: impl Future<Output = T>,
) -> Result<T, Error> {
    let answered = tokio::time::timeout(most, asking).await;
    answered.map_err(|_| no_answer(place, most))
}

fn no_answer(place: &str, waited: Duration) -> Error {
    Error::new(ErrorKind::ConnectionLost)
        .with_detail(format!("no answer {place}"))
        .with_waited(waited)
}
