//! A part of a transaction that can fail by itself.

use super::{AsyncFunc, Tx, sql};
use crate::error::Error;

impl Tx {
    /// Runs the closure inside a savepoint: `Ok` releases it, `Err` rolls back to it and leaves the transaction usable.
    ///
    /// A deadlock or a serialization failure inside is not undone by a savepoint: the locks taken before it are still
    /// held, and the same statement would deadlock again. Pass the error on, and the runner repeats the whole
    /// transaction. A deadlock or a lock timeout that is not passed on is reported as caught by a savepoint.
    ///
    /// # SQL
    /// `SAVEPOINT lockkeeper_n` before; `RELEASE SAVEPOINT` or `ROLLBACK TO SAVEPOINT` and `RELEASE` after. One round
    /// trip each.
    ///
    /// # Errors
    /// The closure's own; an [`Error`] where the savepoint cannot be set (the transaction has failed already) or
    /// cannot be released (a statement inside failed, and the closure returned `Ok` all the same).
    ///
    /// # Cancel safety
    /// Dropped, the transaction is rolled back to the savepoint before anything else runs in it; dropped while the
    /// savepoint is being released, after the closure has returned `Ok`, what was done inside stays.
    ///
    /// # Longest silence
    /// [`longest_silence`](crate::KeeperBuilder::longest_silence) for each of its own statements.
    pub async fn savepoint<R, E, F>(&mut self, f: F) -> Result<R, E>
    where
        for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E>
            + AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send>
            + Send,
        E: From<Error> + Send,
        R: Send,
    {
        // Set before the first byte leaves: a SAVEPOINT that was sent and not awaited is undone too.
        let mut inside = Inside::enter(self);
        let set = sql::savepoint(&inside.name);
        if let Err(error) = inside.tx.session().message(&set).await {
            inside.end(true);
            return Err(Error::from(error).into());
        }
        let result = f(inside.tx).await;
        let undo = inside.undo();
        match result {
            Ok(value) => {
                let release = sql::release_savepoint(&inside.name);
                // Cancel safety: on its way, it ends the savepoint; to undo it too would fail the transaction.
                inside.ended = true;
                match inside.tx.session().message(&release).await {
                    Ok(_) => {
                        inside.end(false);
                        Ok(value)
                    }
                    Err(error) => {
                        let failure = inside.tx.session().failure();
                        let error = match inside.tx.session().message(&undo).await {
                            Ok(_) => Error::from(error)
                                .with_detail("a statement inside the savepoint failed"),
                            Err(lost) => lost.into(),
                        };
                        inside.end(true);
                        if let Some(failure) = failure {
                            inside.tx.note_caught(&failure).await;
                        }
                        Err(error.into())
                    }
                }
            }
            Err(error) => {
                let failure = inside.tx.session().failure();
                // Cancel safety: on its way, it need not be sent by a drop.
                inside.end(true);
                let undone = inside.tx.session().message(&undo).await;
                // The undo succeeded, but the failure is the transaction's still: until another statement succeeds, the
                // closure may be about to pass it on.
                inside.tx.session().remember_failure(failure.clone());
                if let Some(failure) = failure {
                    inside.tx.note_caught(&failure).await;
                }
                match undone {
                    Ok(_) => Err(error),
                    Err(lost) => {
                        tracing::debug!(error = %lost, "savepoint not rolled back");
                        Err(error)
                    }
                }
            }
        }
    }
}

/// The time spent inside one savepoint.
struct Inside<'a> {
    tx: &'a mut Tx,
    depth: u32,
    name: String,
    ended: bool,
}

impl<'a> Inside<'a> {
    fn enter(tx: &'a mut Tx) -> Self {
        let depth = tx.enter_savepoint();
        Self {
            tx,
            depth,
            name: format!("lockkeeper_{depth}"),
            ended: false,
        }
    }

    fn undo(&self) -> String {
        sql::undo_savepoint(&self.name)
    }

    fn end(&mut self, rolled_back: bool) {
        self.ended = true;
        self.tx.leave_savepoint(self.depth, rolled_back);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // Queued behind whatever is under way, and before whatever comes.
            let undo = self.undo();
            self.tx.session().queue(&undo);
            self.end(true);
        } else if self.tx.depth() >= self.depth {
            // Dropped while it was being released.
            self.end(false);
        }
    }
}
