//! Bounded waits: they end when they should, name the blocker, and leave nothing held.

mod at_server;
mod blockers;
mod crowds;
mod interrupted;
mod length;
mod pools;

use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, Keeper, LockKey, SessionGuard, XactGuard};
use lockkeeper_testkit::{CLEANED_UP_WITHIN, Scene, assert_error};
use tokio_postgres::IsolationLevel;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Either guard.
#[allow(dead_code, reason = "held, and dropped")]
enum Guard {
    Xact(XactGuard),
    Session(SessionGuard),
}

impl Guard {
    fn pid(&self) -> Option<i32> {
        match self {
            Self::Xact(guard) => guard.backend_pid(),
            Self::Session(guard) => guard.backend_pid(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Xact,
    Session,
    /// A transaction lock before a REPEATABLE READ snapshot: waited for as a session lock.
    Snapshot,
    /// In a transaction that has begun.
    Later,
}

const SCOPES: [Scope; 4] = [Scope::Xact, Scope::Session, Scope::Snapshot, Scope::Later];

/// Takes a key in one of the ways there are.
async fn take(keeper: &Keeper, scope: Scope, key: LockKey, wait: Duration) -> Result<Guard, Error> {
    let lock = keeper.advisory_lock(key.clone()).wait(wait);
    match scope {
        Scope::Xact => lock.acquire().await.map(Guard::Xact),
        Scope::Session => lock.session().acquire().await.map(Guard::Session),
        Scope::Snapshot => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await.map(Guard::Xact)
        }
        Scope::Later => {
            let own = keeper.advisory_lock(("timeouts", "own")).shared();
            let mut guard = own.acquire().await?;
            guard.advisory_lock(key).wait(wait).await?;
            Ok(Guard::Xact(guard))
        }
    }
}

#[track_caller]
fn timed_out(outcome: Result<Guard, Error>) -> Error {
    let Err(error) = outcome else {
        panic!("granted what another session holds");
    };
    assert_error(&error, ErrorKind::LockTimeout, " after ");
    error
}

/// A wait that has ended.
struct Took {
    all: Duration,
    /// What the call takes besides the wait, on this machine at this moment.
    besides: Duration,
}

impl Took {
    fn is_on_time(&self, asked: Duration) -> bool {
        self.all <= asked + ms(50) + 2 * self.besides
    }
}

/// Waits that were to take `asked`: none is early, the best is on time, none is late beyond what a slow machine does.
#[track_caller]
fn assert_on_time(asked: Duration, took: &[Took], what: &str) {
    for Took { all, .. } in took {
        assert!(
            *all >= asked,
            "{what}: ended after {all:?}, before its {asked:?}"
        );
        assert!(
            *all < asked + CLEANED_UP_WITHIN,
            "{what}: ended after {all:?} instead of {asked:?}"
        );
    }
    assert!(
        took.iter().any(|took| took.is_on_time(asked)),
        "{what}: at best it ended after {:?} instead of {asked:?}",
        took.iter().map(|took| took.all).min()
    );
}

/// Runs `call` a few times, as long as none was on time; each time without a wait first.
async fn time(asked: Duration, what: &str, mut call: impl AsyncFnMut(Duration)) {
    time_beside(asked, what, async |asked| {
        let mut besides = Duration::ZERO;
        if !asked.is_zero() {
            besides = elapsed(call(Duration::ZERO)).await;
        }
        (elapsed(call(asked)).await, besides)
    })
    .await;
}

async fn elapsed(call: impl Future<Output = ()>) -> Duration {
    let started = Instant::now();
    call.await;
    started.elapsed()
}

/// The same, where `call` takes both times: its own, and the one that this machine needs for the like without a wait.
async fn time_beside(
    asked: Duration,
    what: &str,
    mut call: impl AsyncFnMut(Duration) -> (Duration, Duration),
) {
    let mut took = Vec::new();
    for _ in 0..12 {
        let (all, besides) = call(asked).await;
        took.push(Took { all, besides });
        if took.last().is_some_and(|took| took.is_on_time(asked)) {
            break;
        }
    }
    assert_on_time(asked, &took, what);
}

/// A scene with all of its connections open: a login may take longer than a short wait has for it.
async fn warm(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene.pool_is_whole_within(Duration::from_secs(30)).await;
    scene
}
