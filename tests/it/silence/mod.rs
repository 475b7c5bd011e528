//! A server that falls silent, at every message of every call: the call ends in time and says what is known, and when
//! the server speaks again nothing is left of it.

mod guards;
mod live;
mod locks;
mod matrix;
mod methods;
mod schema;
mod transactions;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use deadpool_postgres::Pool;
use futures::future::{BoxFuture, FutureExt};
use lockkeeper::{ErrorKind, Keeper};
use lockkeeper_testkit::{AppError, Fault, Proxy, Scene, StoppedBackend};
use tokio_postgres::NoTls;

/// How long the server may be silent.
const SILENCE: Duration = Duration::from_secs(2);

/// How long a lock is waited for.
const WAIT: Duration = Duration::from_secs(4);

/// What the calls lock. Another session holds it where a row says so.
const KEY: i64 = 81;

/// Free in every scene; sorted before and after [`KEY`].
const BEFORE: i64 = 80;
const AFTER: i64 = 82;

const POOL_SIZE: usize = 3;

/// The bounds of single messages. One message of a call meets the fault, so the bound of the call is that of its slowest.
const OWN: Duration = SILENCE;
const CALLERS: Duration = SILENCE.saturating_mul(2);
const RELEASE: Duration = SILENCE.saturating_mul(2);
const LOCK: Duration = WAIT.saturating_add(SILENCE);

/// How a call ended, as far as a caller would act on it differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Fine,
    /// The driver's error for a closed connection.
    Closed,
    Kind(ErrorKind),
    /// The test's own error.
    Own,
    /// Any other error of the driver.
    Driver,
}

impl Seen {
    fn of(outcome: &Result<(), AppError>) -> Self {
        match outcome {
            Ok(()) => Self::Fine,
            Err(AppError::Own(_)) => Self::Own,
            Err(AppError::Driver(error)) if error.is_closed() => Self::Closed,
            Err(AppError::Driver(_)) => Self::Driver,
            Err(AppError::Keeper(error)) => Self::Kind(error.kind()),
        }
    }
}

const LOST: Seen = Seen::Kind(ErrorKind::ConnectionLost);
const LOCK_LOST: Seen = Seen::Kind(ErrorKind::LockLost);
const UNKNOWN: Seen = Seen::Kind(ErrorKind::CommitUnknown);
const TIMEOUT: Seen = Seen::Kind(ErrorKind::LockTimeout);

/// How a server falls silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// Nothing passes on the connection any more.
    StalledConnection,
    /// The backend has got the message and stands still.
    StoppedBackend,
    /// Nothing passes on any connection.
    StalledNetwork,
    /// No silence: the connection ends before the message. What is lost by silence ends like it.
    CutConnection,
}

/// A call and how it may end when the server falls silent in it.
struct Row {
    name: String,
    /// Run before each cell.
    setup: &'static str,
    /// Another session holds [`KEY`].
    is_busy: bool,
    /// How long the call may take from when the server falls silent, besides what it takes anyway.
    bound: Duration,
    /// The outcomes that are right where the silent message is not COMMIT.
    right: &'static [Seen],
    /// Those where it is.
    right_at_commit: &'static [Seen],
    /// How many of its cells run at the same time.
    lanes: usize,
    call: Box<Call>,
}

type Call = dyn Fn(Arc<Cell>) -> BoxFuture<'static, Result<(), AppError>> + Send + Sync;

impl Row {
    fn new<F>(
        name: impl Into<String>,
        bound: Duration,
        right: &'static [Seen],
        call: impl Fn(Arc<Cell>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), AppError>> + Send + 'static,
    {
        Self {
            name: name.into(),
            setup: "",
            is_busy: false,
            bound,
            right,
            right_at_commit: &[UNKNOWN],
            lanes: 1,
            call: Box::new(move |cell| call(cell).boxed()),
        }
    }

    fn busy(self) -> Self {
        // Each of its cells waits for the lock.
        Self {
            is_busy: true,
            lanes: 3,
            ..self
        }
    }

    fn setup(self, setup: &'static str) -> Self {
        Self { setup, ..self }
    }

    fn lanes(self, lanes: usize) -> Self {
        Self { lanes, ..self }
    }

    fn at_commit(self, right_at_commit: &'static [Seen]) -> Self {
        Self {
            right_at_commit,
            ..self
        }
    }
}

/// One run of one call: a keeper over a pool and a network of its own.
struct Cell {
    keeper: Keeper,
    pool: Pool,
    proxy: Proxy,
    silence: Silence,
    at: usize,
    begun: Mutex<Option<Instant>>,
}

impl Cell {
    /// With a side connection, which goes around the faults, or without one.
    async fn new(scene: &Scene, silence: Silence, at: usize, with_side: bool) -> Self {
        let proxy = Proxy::before(scene.database.server());
        let pool = proxy.pool(&scene.database.config(), POOL_SIZE);
        let builder = Keeper::builder(pool.clone())
            .application("test")
            .lock_wait(WAIT)
            .longest_silence(SILENCE)
            // Its questions would be counted as the call's messages.
            .watch(false);
        let builder = if with_side {
            builder.side_connection(scene.database.config(), NoTls)
        } else {
            builder
        };
        // Two connections that have been used, and room for one more.
        let two = [pool.get().await.unwrap(), pool.get().await.unwrap()];
        drop(two);
        Self {
            keeper: builder.build(),
            pool,
            proxy,
            silence,
            at,
            begun: Mutex::new(None),
        }
    }

    /// Messages count from here on. Called once.
    fn begin(&self) {
        *self.begun.lock().unwrap() = Some(Instant::now());
        match self.silence {
            Silence::StalledConnection => self.proxy.fault_later(self.at, Fault::Stall),
            Silence::StoppedBackend => self.proxy.fault_later(self.at, Fault::Hold),
            Silence::StalledNetwork => self.proxy.stall(true),
            Silence::CutConnection => self.proxy.fault_later(self.at, Fault::CutBefore),
        }
    }

    /// Messages count no more.
    fn end(&self) {
        self.proxy.clear_faults();
    }

    /// Waits until the counting began so long ago.
    async fn until_begun_for(&self, time: Duration) {
        let is_over = || {
            let begun = *self.begun.lock().unwrap();
            begun.is_some_and(|begun| begun.elapsed() > time)
        };
        while !is_over() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The message that met the fault.
    fn silent_message(&self) -> Option<String> {
        match self.silence {
            Silence::StalledNetwork => Some("any".to_owned()),
            _ => self.proxy.met().map(|site| site.text),
        }
    }

    /// Stops the backend when its message is on the way to it, and delivers the message.
    async fn stop_backend(&self, scene: &Scene) -> StoppedBackend {
        if self.silence != Silence::StoppedBackend {
            return std::future::pending().await;
        }
        loop {
            if let Some(site) = self.proxy.met() {
                let stopped = StoppedBackend::new(&scene.observer, site.backend).await;
                self.proxy.deliver();
                return stopped;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The server speaks again, and gets all that was sent to it meanwhile.
    fn lift(&self, stopped: Option<StoppedBackend>) {
        self.proxy.clear_faults();
        match (self.silence, stopped) {
            (Silence::StalledConnection, _) => self.proxy.resume(),
            (Silence::StalledNetwork, _) => self.proxy.stall(false),
            (Silence::CutConnection, _) => {}
            // The call ended before the backend was stopped.
            (Silence::StoppedBackend, None) => self.proxy.deliver(),
            (Silence::StoppedBackend, Some(stopped)) => drop(stopped),
        }
    }

    /// Waits until no connection of the pool is in use: for what goes on in the background.
    async fn until_returned(&self) {
        while self.pool.status().size > self.pool.status().available {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
