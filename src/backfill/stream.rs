//! A backfill's progress as a stream.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;

use super::job::Job;
use super::{Backfill, BackfillProgress};
use crate::error::Error;

type Stepping = Pin<Box<dyn Future<Output = Result<(Box<Job>, BackfillProgress), Error>> + Send>>;

/// The steps of a backfill, which are done as they are asked for: from [`Backfill::stream`].
///
/// One item for each batch that was committed, and for each look during a pause. It ends behind the item that
/// [is done](BackfillProgress::is_done), or behind an error.
///
/// # Cancel safety
/// A future of one item may be dropped, and the next one goes on with it. Dropped, the stream itself is as a dropped
/// [`Backfill::run`].
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
            let job = backfill.begin().await?;
            step(Box::new(job)).await
        };
        Self {
            state: State::Stepping(Box::pin(first)),
        }
    }
}

async fn step(mut job: Box<Job>) -> Result<(Box<Job>, BackfillProgress), Error> {
    let progress = job.step().await?;
    Ok((job, progress))
}

impl Stream for BackfillStream {
    type Item = Result<BackfillProgress, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let State::Stepping(stepping) = &mut self.state else {
            return Poll::Ready(None);
        };
        let stepped = ready!(stepping.as_mut().poll(cx));
        self.state = State::Ended;
        Poll::Ready(Some(stepped.map(|(job, progress)| {
            if !progress.is_done() {
                self.state = State::Stepping(Box::pin(step(job)));
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
