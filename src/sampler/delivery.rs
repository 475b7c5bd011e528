//! Delivers reports without delaying or failing the transaction that they are about.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;

use super::lock;
use crate::connection::task;
use crate::incident::{Incident, IncidentKind};

/// The application's callback for reports.
pub(crate) type IncidentSink = Arc<dyn Fn(&Incident) + Send + Sync>;

/// How many reports wait for a slow sink; more are dropped.
const QUEUE: usize = 64;

/// Delivers reports to `tracing` and to the application.
pub(super) struct Delivery {
    sink: Option<IncidentSink>,
    queue: Mutex<Option<mpsc::Sender<Incident>>>,
}

impl Delivery {
    pub(super) fn new(sink: Option<IncidentSink>) -> Self {
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
                // The runtime of the task has ended.
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

/// Calls the sink for one report after another, on a thread that may block.
async fn hand_out(mut receiver: mpsc::Receiver<Incident>, sink: IncidentSink) {
    while let Some(incident) = receiver.recv().await {
        let sink = Arc::clone(&sink);
        let handing =
            task::blocking(move || catch_unwind(AssertUnwindSafe(|| sink(&incident))).is_err());
        if handing.await.is_ok_and(|panicked| panicked) {
            tracing::error!("on_incident panicked; later reports are handed to it all the same");
        }
    }
}

/// Emits one event for each report.
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
