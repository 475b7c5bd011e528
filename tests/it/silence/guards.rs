//! Guards: how they end, and what is done with them.

use std::sync::Arc;

use lockkeeper::{SessionGuard, XactGuard};
use lockkeeper_testkit::AppError;

use super::{
    AFTER, BEFORE, CALLERS, Cell, KEY, LOCK, LOCK_LOST, LOST, OWN, RELEASE, Row, SILENCE, Seen,
    UNKNOWN,
};

/// A caller's statement has the driver's error; what the guard sends says that the connection is lost.
const RIGHT: &[Seen] = &[Seen::Closed, LOST];
/// The same where the lock was lost with its connection.
const ON_A_LOST_GUARD: &[Seen] = &[Seen::Closed, LOCK_LOST];

async fn xact(cell: &Cell) -> Result<XactGuard, AppError> {
    let guard = cell.keeper.advisory_lock(KEY).acquire().await?;
    guard.execute("INSERT INTO note VALUES (1)", &[]).await?;
    cell.begin();
    Ok(guard)
}

async fn session(cell: &Cell) -> Result<SessionGuard, AppError> {
    let guard = cell.keeper.advisory_lock(KEY).session().acquire().await?;
    cell.begin();
    Ok(guard)
}

/// Ends a guard that has outlived the fault, or has not met it.
async fn end_xact(cell: Arc<Cell>, guard: XactGuard) -> Result<(), AppError> {
    cell.end();
    guard.rollback().await;
    Ok(())
}

async fn end_session(cell: Arc<Cell>, guard: SessionGuard) -> Result<(), AppError> {
    cell.end();
    Ok(guard.release().await?)
}

pub(super) fn rows() -> Vec<Row> {
    let mut rows = xact_rows();
    rows.extend(session_rows());
    rows
}

fn xact_rows() -> Vec<Row> {
    vec![
        Row::new("XactGuard::commit", OWN, &[UNKNOWN], |cell| async move {
            Ok(xact(&cell).await?.commit().await?)
        }),
        // It has nothing to say: the connection is closed, and that rolls back.
        Row::new(
            "XactGuard::rollback",
            OWN,
            &[Seen::Fine],
            |cell| async move {
                xact(&cell).await?.rollback().await;
                Ok(())
            },
        ),
        Row::new(
            "XactGuard dropped",
            RELEASE + 2 * SILENCE,
            &[Seen::Fine],
            |cell| async move {
                drop(xact(&cell).await?);
                cell.until_returned().await;
                Ok(())
            },
        ),
        Row::new("XactGuard::savepoint", CALLERS, RIGHT, |cell| async move {
            let mut guard = xact(&cell).await?;
            let insert = guard.savepoint(async |tx| {
                tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                Ok::<_, AppError>(())
            });
            insert.await?;
            end_xact(cell, guard).await
        }),
        Row::new("XactGuard::lock_rows", CALLERS, RIGHT, |cell| async move {
            let guard = xact(&cell).await?;
            guard.lock_rows("t", "id", [1_i64, 2]).await?;
            end_xact(cell, guard).await
        }),
        Row::new(
            "XactGuard::advisory_lock",
            LOCK,
            &[LOST],
            |cell| async move {
                let mut guard = xact(&cell).await?;
                guard.advisory_lock(BEFORE).await?;
                end_xact(cell, guard).await
            },
        ),
        Row::new(
            "XactGuard::advisory_locks",
            LOCK,
            &[LOST],
            |cell| async move {
                let mut guard = xact(&cell).await?;
                guard.advisory_locks([AFTER, BEFORE]).await?;
                end_xact(cell, guard).await
            },
        ),
        Row::new(
            "XactGuard::advisory_lock try_acquire",
            CALLERS,
            &[LOST],
            |cell| async move {
                let mut guard = xact(&cell).await?;
                assert!(guard.advisory_lock(AFTER).try_acquire().await?);
                end_xact(cell, guard).await
            },
        ),
    ]
}

fn session_rows() -> Vec<Row> {
    vec![
        Row::new(
            "SessionGuard::release",
            RELEASE,
            &[LOCK_LOST],
            |cell| async move { Ok(session(&cell).await?.release().await?) },
        ),
        Row::new(
            "SessionGuard::release after its client was used",
            RELEASE,
            &[LOCK_LOST],
            |cell| async move {
                let guard = cell.keeper.advisory_lock(KEY).session().acquire().await?;
                guard.client().batch_execute("SELECT 1").await?;
                cell.begin();
                Ok(guard.release().await?)
            },
        ),
        Row::new(
            "SessionGuard::release in a failed transaction",
            2 * RELEASE,
            &[LOCK_LOST],
            |cell| async move {
                let guard = cell.keeper.advisory_lock(KEY).session().acquire().await?;
                assert!(guard.batch_execute("BEGIN; SELECT 1/0").await.is_err());
                cell.begin();
                Ok(guard.release().await?)
            },
        ),
        Row::new(
            "SessionGuard dropped",
            RELEASE + 2 * SILENCE,
            &[Seen::Fine],
            |cell| async move {
                drop(session(&cell).await?);
                cell.until_returned().await;
                Ok(())
            },
        ),
        Row::new(
            "SessionGuard::transaction",
            CALLERS,
            ON_A_LOST_GUARD,
            |cell| async move {
                let mut guard = session(&cell).await?;
                let insert = guard.transaction(async |tx| {
                    tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
                    Ok::<_, AppError>(())
                });
                insert.await?;
                end_session(cell, guard).await
            },
        ),
        // The own error comes back as it was; what the guard is asked next says what has become of the lock.
        Row::new(
            "SessionGuard::transaction that fails",
            CALLERS,
            &[LOCK_LOST],
            |cell| async move {
                let mut guard = session(&cell).await?;
                let failing = guard.transaction(async |tx| {
                    tx.batch_execute("SELECT 1").await.ok();
                    Err::<(), _>(AppError::Own(1))
                });
                match failing.await {
                    Err(AppError::Own(1)) => {}
                    other => return other,
                }
                end_session(cell, guard).await
            },
        ),
        Row::new(
            "SessionGuard::transaction that locks",
            LOCK,
            &[LOST, LOCK_LOST],
            |cell| async move {
                let mut guard = session(&cell).await?;
                let locking = guard.transaction(async |tx| {
                    tx.advisory_lock(AFTER).await?;
                    Ok::<_, AppError>(())
                });
                locking.await?;
                end_session(cell, guard).await
            },
        ),
    ]
}
