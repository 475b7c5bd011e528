//! Taking connections from the pool until one of them can be used: those before it may be dead, silent, or left in a
//! transaction.

use std::sync::Arc;
use std::time::Duration;

use super::{Connections, Session};
use crate::deadline::Deadline;
use crate::error::Error;

/// The connections that are tried for one call.
pub(crate) struct Checkout<'a> {
    connections: &'a Arc<Connections>,
    /// How long a connection is waited for.
    wait: &'a Deadline,
    /// How long they may be silent in all.
    longest: Duration,
    silence: Deadline,
    /// Why the last one could not be used.
    last: Option<Error>,
    tried: usize,
}

impl<'a> Checkout<'a> {
    /// Those that are silent are replaced within one longest silence in all.
    pub(crate) fn new(connections: &'a Arc<Connections>, wait: &'a Deadline) -> Self {
        Self::within(connections, wait, connections.longest_silence())
    }

    /// The same within another time, at most a longest silence.
    pub(crate) fn within(
        connections: &'a Arc<Connections>,
        wait: &'a Deadline,
        longest: Duration,
    ) -> Self {
        let longest = longest.min(connections.longest_silence());
        Self {
            connections,
            wait,
            longest,
            silence: Deadline::after(longest),
            last: None,
            tried: 0,
        }
    }

    /// A connection, and how long to wait for its first answer: a third of the silence on the first one, and a second at
    /// most on those after it, since they may all lead to the same dead server.
    ///
    /// # Errors
    /// `Pool` where none was free in time; why the last one could not be used, where there was one.
    ///
    /// Cancel safety: nothing is taken before this returns.
    pub(crate) async fn next(&mut self) -> Result<(Session, Duration), Error> {
        let longest = self.longest;
        let Some(last) = self.last.take() else {
            let session = self.connections.check_out(self.wait).await?;
            // The wait for the first is no silence.
            self.silence = Deadline::after(longest);
            return Ok((session, longest / 3));
        };
        let wait = Deadline::after(self.wait.remaining().min(self.silence.remaining()));
        match self.connections.check_out(&wait).await {
            Ok(session) => {
                let patience = (longest / 6).min(Duration::from_secs(1));
                Ok((session, patience.min(self.silence.remaining())))
            }
            Err(_) => Err(last),
        }
    }

    /// Has the next one taken in the place of one that could not be used.
    ///
    /// # Errors
    /// The same error, where as many have been tried as the pool has.
    pub(crate) fn replace(&mut self, error: Error) -> Result<(), Error> {
        self.tried += 1;
        if self.tried > self.connections.most() {
            return Err(error);
        }
        tracing::debug!(%error, "a pool connection could not be used, taking another");
        self.last = Some(error);
        Ok(())
    }

    /// The same for one that was silent.
    ///
    /// # Errors
    /// The same error, where there is no time left either.
    pub(crate) fn replace_silent(&mut self, error: Error) -> Result<(), Error> {
        let error = error.with_waited(self.silence.waited());
        if self.silence.has_passed() {
            return Err(error);
        }
        self.replace(error)
    }
}
