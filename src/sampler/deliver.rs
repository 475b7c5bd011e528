//! Handing reports out, without ever holding up or failing the transaction they are about.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;

use super::lock;
use crate::connection::task;
use crate::incident::{Incident, IncidentKind};

/// What an application does with a report.
pub(crate) type Sink = Arc<dyn Fn(&Incident) + Send + Sync>;

/// Reports that wait for a slow sink; more are dropped.
const QUEUE: usize = 64;

/// The way of a report to `tracing` and to the application.
pub(super) struct Delivery {
    sink: Option<Sink>,
    queue: Mutex<Option<mpsc::Sender<Incident>>>,
}

impl Delivery {
    pub(super) fn new(sink: Option<Sink>) -> Self {
        Self {
            sink,
            queue: Mutex::new(None),
        }
    }

    pub(super) fn deliver(&self, incident: &Incident) {
        trace(incident);
        let Some(sink) = &self.sink else { return };
        let mut queue = lock(&self.queue);
        let mut incident = incident.clone();
        if let Some(sender) = &*queue {
            match sender.try_send(incident) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    tracing::warn!("on_incident is too slow, a report is dropped");
                    return;
                }
                // The runtime that it ran on has ended.
                Err(mpsc::error::TrySendError::Closed(back)) => incident = back,
            }
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        if sender.try_send(incident).is_ok()
            && task::run_in_background(hand_out(receiver, Arc::clone(sink)))
        {
            *queue = Some(sender);
        }
    }
}

/// One after another, on a thread where blocking does no harm.
async fn hand_out(mut receiver: mpsc::Receiver<Incident>, sink: Sink) {
    while let Some(incident) = receiver.recv().await {
        let sink = Arc::clone(&sink);
        let handing =
            task::blocking(move || catch_unwind(AssertUnwindSafe(|| sink(&incident))).is_err());
        if handing.await.is_ok_and(|panicked| panicked) {
            tracing::error!("on_incident panicked; later reports are handed to it all the same");
        }
    }
}

/// One event for each report.
fn trace(incident: &Incident) {
    let fingerprint = incident.fingerprint();
    let call_site = incident.victim().call_site();
    let attempt = incident.attempt();
    let outcome = incident.outcome();
    let count = incident.count();
    macro_rules! event {
        ($level:ident, $message:literal) => {
            tracing::$level!(
                target: "lockkeeper::incident",
                kind = ?incident.kind(),
                %fingerprint,
                call_site,
                attempt,
                ?outcome,
                count,
                report = %incident,
                $message
            )
        };
    }
    match incident.kind() {
        IncidentKind::Deadlock | IncidentKind::HiddenDeadlock => {
            event!(warn, "a transaction was the victim of a deadlock");
        }
        IncidentKind::LockTimeout => event!(warn, "a transaction waited too long for a lock"),
        _ => event!(warn, "a transaction waits for long"),
    }
}
