//! A backfill as a stream of its progress.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;

use super::run::Run;
use super::{Backfill, BackfillProgress};
use crate::error::Error;

type Stepping = Pin<Box<dyn Future<Output = Result<(Box<Run>, BackfillProgress), Error>> + Send>>;

/// The steps of a backfill, which run while the stream is polled: from [`Backfill::stream`].
///
/// The stream has one item for each committed batch, and for each sample during a pause. It ends after the item that
/// [is done](BackfillProgress::is_done), or after an error.
///
/// # Cancel safety
/// The future of an item can be dropped; the future of the next item continues its step. Dropping the stream is the
/// same as dropping [`Backfill::run`].
#[must_use = "a stream does nothing until it is polled"]
pub struct BackfillStream {
    state: State,
}

enum State {
    Stepping(Stepping),
    Ended,
}

impl BackfillStream {
    pub(super) fn new(backfill: Backfill) -> Self {
        let first = async move {
            let run = backfill.begin().await?;
            step(Box::new(run)).await
        };
        Self {
            state: State::Stepping(Box::pin(first)),
        }
    }
}

async fn step(mut run: Box<Run>) -> Result<(Box<Run>, BackfillProgress), Error> {
    let progress = run.step().await?;
    Ok((run, progress))
}

impl Stream for BackfillStream {
    type Item = Result<BackfillProgress, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let State::Stepping(stepping) = &mut self.state else {
            return Poll::Ready(None);
        };
        let stepped = ready!(stepping.as_mut().poll(cx));
        self.state = State::Ended;
        Poll::Ready(Some(stepped.map(|(run, progress)| {
            if !progress.is_done() {
                self.state = State::Stepping(Box::pin(step(run)));
            }
            progress
        })))
    }
}

impl fmt::Debug for BackfillStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackfillStream").finish_non_exhaustive()
    }
}
