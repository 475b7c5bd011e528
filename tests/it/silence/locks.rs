//! Locks that are acquired.

use std::sync::Arc;

use lockkeeper::{AdvisoryLock, ErrorKind, SessionAdvisoryLock};
use lockkeeper_testkit::AppError;
use tokio_postgres::IsolationLevel;

use super::{AFTER, BEFORE, Cell, KEY, LOCK, LOST, Row, Seen};

/// Another connection is taken, or this one is said to be lost.
const RIGHT: &[Seen] = &[Seen::Fine, LOST];

type Describe = fn(&Cell) -> AdvisoryLock;
type DescribeSession = fn(&Cell) -> SessionAdvisoryLock;

const XACT: &[(&str, Describe)] = &[
    ("1 key", |cell| cell.keeper.advisory_lock(KEY)),
    ("shared", |cell| cell.keeper.advisory_lock(KEY).shared()),
    ("several keys", |cell| {
        cell.keeper.advisory_locks([AFTER, KEY, BEFORE])
    }),
    ("130 keys", |cell| {
        cell.keeper.advisory_locks((0..130).map(|n| KEY + n))
    }),
    ("REPEATABLE READ", |cell| {
        let lock = cell.keeper.advisory_lock(KEY);
        lock.isolation(IsolationLevel::RepeatableRead)
    }),
    ("several keys, SERIALIZABLE", |cell| {
        let locks = cell.keeper.advisory_locks([AFTER, KEY]);
        locks.isolation(IsolationLevel::Serializable)
    }),
];

const SESSION: &[(&str, DescribeSession)] = &[
    ("1 key", |cell| cell.keeper.advisory_lock(KEY).session()),
    ("several keys", |cell| {
        cell.keeper.advisory_locks([AFTER, KEY, BEFORE]).session()
    }),
    ("130 keys", |cell| {
        cell.keeper
            .advisory_locks((0..130).map(|n| KEY + n))
            .session()
    }),
];

async fn acquire(cell: Arc<Cell>, describe: Describe) -> Result<(), AppError> {
    cell.begin();
    let guard = describe(&cell).acquire().await?;
    cell.end();
    guard.rollback().await;
    Ok(())
}

async fn try_acquire(cell: Arc<Cell>, describe: Describe) -> Result<(), AppError> {
    cell.begin();
    let guard = describe(&cell).try_acquire().await?;
    cell.end();
    guard.expect("a free lock").rollback().await;
    Ok(())
}

async fn acquire_session(cell: Arc<Cell>, describe: DescribeSession) -> Result<(), AppError> {
    cell.begin();
    let guard = describe(&cell).acquire().await?;
    cell.end();
    Ok(guard.release().await?)
}

async fn try_acquire_session(cell: Arc<Cell>, describe: DescribeSession) -> Result<(), AppError> {
    cell.begin();
    let guard = describe(&cell).try_acquire().await?;
    cell.end();
    Ok(guard.expect("a free lock").release().await?)
}

/// The lock is waited for in vain, and tried in vain. Whatever else may happen: it is not taken.
async fn find_busy(cell: Arc<Cell>, describe: Describe) -> Result<(), AppError> {
    cell.begin();
    match describe(&cell).acquire().await {
        Ok(_) => panic!("the lock is not free"),
        Err(error) if error.kind() == ErrorKind::LockTimeout => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn try_busy(cell: Arc<Cell>, describe: Describe) -> Result<(), AppError> {
    cell.begin();
    let tried = describe(&cell).try_acquire().await?;
    assert!(tried.is_none(), "the lock is not free");
    Ok(())
}

async fn find_session_busy(cell: Arc<Cell>, describe: DescribeSession) -> Result<(), AppError> {
    cell.begin();
    match describe(&cell).acquire().await {
        Ok(_) => panic!("the lock is not free"),
        Err(error) if error.kind() == ErrorKind::LockTimeout => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn try_session_busy(cell: Arc<Cell>, describe: DescribeSession) -> Result<(), AppError> {
    cell.begin();
    let tried = describe(&cell).try_acquire().await?;
    assert!(tried.is_none(), "the lock is not free");
    Ok(())
}

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for &(name, describe) in XACT {
        rows.extend([
            Row::new(format!("acquire, {name}"), LOCK, RIGHT, move |cell| {
                acquire(cell, describe)
            }),
            Row::new(format!("try_acquire, {name}"), LOCK, RIGHT, move |cell| {
                try_acquire(cell, describe)
            }),
            Row::new(format!("acquire, {name}, busy"), LOCK, RIGHT, move |cell| {
                find_busy(cell, describe)
            })
            .busy(),
            Row::new(
                format!("try_acquire, {name}, busy"),
                LOCK,
                RIGHT,
                move |cell| try_busy(cell, describe),
            )
            .busy(),
        ]);
    }
    for &(name, describe) in SESSION {
        rows.extend([
            Row::new(
                format!("session acquire, {name}"),
                LOCK,
                RIGHT,
                move |cell| acquire_session(cell, describe),
            ),
            Row::new(
                format!("session try_acquire, {name}"),
                LOCK,
                RIGHT,
                move |cell| try_acquire_session(cell, describe),
            ),
            Row::new(
                format!("session acquire, {name}, busy"),
                LOCK,
                RIGHT,
                move |cell| find_session_busy(cell, describe),
            )
            .busy(),
            Row::new(
                format!("session try_acquire, {name}, busy"),
                LOCK,
                RIGHT,
                move |cell| try_session_busy(cell, describe),
            )
            .busy(),
        ]);
    }
    // Nothing of the caller's is committed here.
    rows.into_iter().map(|row| row.at_commit(RIGHT)).collect()
}
