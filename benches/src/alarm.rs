//! Wake-ups to within some microseconds. The runtime's own timers know whole milliseconds only, and most of what is to
//! be interrupted is over by then.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// A thread that sleeps until the next of the alarms. It ends with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct Alarm {
    set: Sender<(Instant, oneshot::Sender<()>)>,
}

impl Alarm {
    pub(crate) fn new() -> Self {
        let (set, alarms) = channel::<(Instant, oneshot::Sender<()>)>();
        thread::spawn(move || {
            // The number keeps two of one moment apart.
            let mut waiting = BTreeMap::<(Instant, u64), oneshot::Sender<()>>::new();
            let mut number = 0_u64;
            loop {
                while let Some(first) = waiting.first_entry()
                    && first.key().0 <= Instant::now()
                {
                    // An error says that nobody listens any more.
                    first.remove().send(()).ok();
                }
                let wait = waiting
                    .first_key_value()
                    .map_or(Duration::MAX, |((at, _), _)| {
                        at.saturating_duration_since(Instant::now())
                    });
                match alarms.recv_timeout(wait) {
                    Ok((at, sender)) => {
                        number += 1;
                        waiting.insert((at, number), sender);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Self { set }
    }

    pub(crate) async fn after(&self, wait: Duration) {
        let (sender, rings) = oneshot::channel();
        if self.set.send((Instant::now() + wait, sender)).is_ok() {
            // An error would mean that the thread is gone: then it is time too.
            rings.await.ok();
        }
    }
}
