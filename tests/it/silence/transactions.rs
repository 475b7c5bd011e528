//! Transactions that the keeper runs.

use lockkeeper::{Keeper, TransactionOptions, Tx};
use lockkeeper_testkit::AppError;
use tokio_postgres::IsolationLevel;

use super::{CALLERS, KEY, LOCK, LOST, Row, Seen, TIMEOUT, UNKNOWN};

/// A statement has the driver's error; BEGIN gets another connection, or says that this one is lost.
const RIGHT: &[Seen] = &[Seen::Fine, Seen::Closed, LOST];
/// The same where an own error is given back.
const OWN_ERROR: &[Seen] = &[Seen::Fine, LOST];

async fn insert(tx: &mut Tx) -> Result<(), AppError> {
    tx.execute("INSERT INTO note VALUES (1)", &[]).await?;
    Ok(())
}

async fn run_with(keeper: &Keeper, options: TransactionOptions) -> Result<(), AppError> {
    keeper
        .transaction_with(options, async |tx| insert(tx).await)
        .await
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("transaction", CALLERS, RIGHT, |cell| async move {
            cell.begin();
            cell.keeper.transaction(async |tx| insert(tx).await).await
        }),
        Row::new(
            "transaction that fails",
            CALLERS,
            OWN_ERROR,
            |cell| async move {
                cell.begin();
                let failing = cell.keeper.transaction(async |tx| {
                    tx.batch_execute("SELECT 1").await.ok();
                    Err::<(), _>(AppError::Own(1))
                });
                match failing.await {
                    Err(AppError::Own(1)) => Ok(()),
                    other => other,
                }
            },
        ),
        Row::new(
            "transaction_with resolve_commit",
            2 * CALLERS,
            RIGHT,
            |cell| async move {
                cell.begin();
                run_with(&cell.keeper, TransactionOptions::new().resolve_commit()).await
            },
        )
        .at_commit(&[Seen::Fine, LOST, UNKNOWN]),
        Row::new(
            "transaction_with conflict_group",
            LOCK,
            RIGHT,
            |cell| async move {
                cell.begin();
                run_with(&cell.keeper, TransactionOptions::new().conflict_group(KEY)).await
            },
        ),
        Row::new(
            "transaction_with conflict_group, busy",
            LOCK,
            &[Seen::Fine, LOST, TIMEOUT],
            |cell| async move {
                cell.begin();
                let options = TransactionOptions::new().conflict_group(KEY);
                timed_out(run_with(&cell.keeper, options).await)
            },
        )
        .busy(),
        Row::new(
            "transaction_with isolation",
            CALLERS,
            RIGHT,
            |cell| async move {
                cell.begin();
                let options = TransactionOptions::new().isolation(IsolationLevel::Serializable);
                run_with(&cell.keeper, options).await
            },
        ),
        Row::new("with_advisory_lock", LOCK, RIGHT, |cell| async move {
            cell.begin();
            cell.keeper
                .with_advisory_lock(KEY, async |tx| insert(tx).await)
                .await
        }),
        Row::new(
            "with_advisory_lock, busy",
            LOCK,
            &[Seen::Fine, LOST, TIMEOUT],
            |cell| async move {
                cell.begin();
                let section = cell
                    .keeper
                    .with_advisory_lock(KEY, async |tx| insert(tx).await);
                timed_out(section.await)
            },
        )
        .busy(),
        Row::new("try_with_advisory_lock", LOCK, RIGHT, |cell| async move {
            cell.begin();
            let section = cell
                .keeper
                .try_with_advisory_lock(KEY, async |tx| insert(tx).await);
            assert!(section.await?.is_some());
            Ok(())
        }),
        Row::new(
            "try_with_advisory_lock, busy",
            LOCK,
            OWN_ERROR,
            |cell| async move {
                cell.begin();
                let section = cell
                    .keeper
                    .try_with_advisory_lock(KEY, async |tx| insert(tx).await);
                assert!(section.await?.is_none());
                Ok(())
            },
        )
        .busy(),
        Row::new("Tx::savepoint", CALLERS, RIGHT, |cell| async move {
            let in_savepoint = cell.keeper.transaction(async |tx| {
                cell.begin();
                tx.savepoint(async |tx| insert(tx).await).await?;
                cell.end();
                Ok(())
            });
            in_savepoint.await
        }),
        Row::new(
            "Tx::savepoint that fails",
            CALLERS,
            RIGHT,
            |cell| async move {
                let in_savepoint = cell.keeper.transaction(async |tx| {
                    cell.begin();
                    let failing = tx.savepoint(async |tx| {
                        insert(tx).await?;
                        Err::<(), _>(AppError::Own(1))
                    });
                    match failing.await {
                        Err(AppError::Own(1)) => {}
                        other => return other,
                    }
                    // It shows whether the rollback went well.
                    insert(tx).await?;
                    cell.end();
                    Ok(())
                });
                in_savepoint.await
            },
        ),
        Row::new("Tx::advisory_lock", LOCK, &[LOST], |cell| async move {
            let locking = cell.keeper.transaction(async |tx| {
                cell.begin();
                tx.advisory_lock(KEY).await?;
                cell.end();
                Ok(())
            });
            locking.await
        }),
        Row::new(
            "Tx::advisory_lock, busy",
            LOCK,
            &[LOST, Seen::Fine],
            |cell| async move {
                let locking = cell.keeper.transaction_with(once(), async |tx| {
                    cell.begin();
                    tx.advisory_lock(KEY).await?;
                    Ok(())
                });
                timed_out(locking.await)
            },
        )
        .busy(),
        Row::new("Tx::advisory_locks", LOCK, &[LOST], |cell| async move {
            let locking = cell.keeper.transaction(async |tx| {
                cell.begin();
                tx.advisory_locks([super::AFTER, KEY, super::BEFORE])
                    .await?;
                cell.end();
                Ok(())
            });
            locking.await
        }),
        Row::new(
            "Tx::advisory_locks, busy",
            LOCK,
            &[LOST, Seen::Fine],
            |cell| async move {
                let locking = cell.keeper.transaction_with(once(), async |tx| {
                    cell.begin();
                    tx.advisory_locks([super::AFTER, KEY, super::BEFORE])
                        .await?;
                    Ok(())
                });
                timed_out(locking.await)
            },
        )
        .busy(),
        Row::new(
            "Tx::advisory_lock try_acquire",
            CALLERS,
            &[LOST],
            |cell| async move {
                let locking = cell.keeper.transaction(async |tx| {
                    cell.begin();
                    assert!(tx.advisory_lock(KEY).try_acquire().await?);
                    cell.end();
                    Ok(())
                });
                locking.await
            },
        ),
        Row::new(
            "Tx::advisory_locks try_acquire, busy",
            CALLERS,
            &[LOST],
            |cell| async move {
                let locking = cell.keeper.transaction(async |tx| {
                    cell.begin();
                    assert!(
                        !tx.advisory_locks([super::BEFORE, KEY])
                            .try_acquire()
                            .await?
                    );
                    cell.end();
                    Ok(())
                });
                locking.await
            },
        )
        .busy(),
        Row::new("Tx::lock_rows", CALLERS, RIGHT, |cell| async move {
            let locking = cell.keeper.transaction(async |tx| {
                cell.begin();
                tx.lock_rows("t", "id", [1_i64, 2]).await?;
                cell.end();
                Ok(())
            });
            locking.await
        }),
    ]
}

/// One attempt: a lock that is not granted in time is asked for once.
fn once() -> TransactionOptions {
    TransactionOptions::new().attempts(1)
}

/// A busy lock is not granted in time.
fn timed_out(outcome: Result<(), AppError>) -> Result<(), AppError> {
    match outcome {
        Ok(()) => panic!("the lock is not free"),
        Err(AppError::Keeper(error)) if error.kind() == lockkeeper::ErrorKind::LockTimeout => {
            Ok(())
        }
        other => other,
    }
}
