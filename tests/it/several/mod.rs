//! Several keys at once: sorted, without repeats, all or none, under one total wait.

mod all_or_none;
mod lock_table;
mod order;
mod waits;

use std::time::Duration;

use lockkeeper::{Error, Keeper, LockKey, SessionGuard, XactGuard};
use tokio_postgres::IsolationLevel;

/// A set of locks held in either scope.
#[derive(Debug)]
enum Guard {
    Xact(XactGuard),
    Session(SessionGuard),
}

impl Guard {
    fn keys(&self) -> Vec<LockKey> {
        match self {
            Self::Xact(guard) => guard.held_keys().cloned().collect(),
            Self::Session(guard) => guard.held_keys().to_vec(),
        }
    }

    fn pid(&self) -> i32 {
        match self {
            Self::Xact(guard) => guard.backend_pid(),
            Self::Session(guard) => guard.backend_pid(),
        }
        .unwrap()
    }

    async fn end(self) {
        match self {
            Self::Xact(guard) => guard.commit().await.unwrap(),
            Self::Session(guard) => guard.release().await.unwrap(),
        }
    }
}

/// How a set is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Xact,
    Snapshot,
    Session,
}

const SCOPES: [Scope; 3] = [Scope::Xact, Scope::Snapshot, Scope::Session];

async fn acquire(
    keeper: &Keeper,
    keys: impl IntoIterator<Item = impl Into<LockKey>>,
    scope: Scope,
    wait: Duration,
) -> Result<Guard, Error> {
    let lock = keeper.advisory_locks(keys).wait(wait);
    match scope {
        Scope::Xact => lock.acquire().await.map(Guard::Xact),
        Scope::Snapshot => {
            let lock = lock.isolation(IsolationLevel::RepeatableRead);
            lock.acquire().await.map(Guard::Xact)
        }
        Scope::Session => lock.session().acquire().await.map(Guard::Session),
    }
}

async fn try_acquire(
    keeper: &Keeper,
    keys: impl IntoIterator<Item = impl Into<LockKey>>,
    scope: Scope,
) -> Result<Option<Guard>, Error> {
    let lock = keeper.advisory_locks(keys);
    Ok(match scope {
        Scope::Xact => lock.try_acquire().await?.map(Guard::Xact),
        Scope::Snapshot => {
            let lock = lock.isolation(IsolationLevel::Serializable);
            lock.try_acquire().await?.map(Guard::Xact)
        }
        Scope::Session => lock.session().try_acquire().await?.map(Guard::Session),
    })
}

/// Numbers of both key spaces.
fn many_keys(count: i32) -> Vec<LockKey> {
    (0..count)
        .map(|n| match n % 3 {
            0 => LockKey::from(i64::from(n) * 4_294_967_311 - 7),
            1 => LockKey::from((n, -n)),
            _ => LockKey::from(format!("several {n}")),
        })
        .collect()
}
