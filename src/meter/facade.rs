//! The numbers as metrics of the facade of that name.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use metrics::{
    SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

use crate::key::LockKey;

/// How many values a label may have; all later ones are [`OTHER`].
const MOST_VALUES: usize = 100;
const OTHER: &str = "other";

const WAIT: &str = "lockkeeper_lock_wait_seconds";
const HOLD: &str = "lockkeeper_lock_hold_seconds";
const ACQUISITIONS: &str = "lockkeeper_lock_acquisitions_total";
const TIMEOUTS: &str = "lockkeeper_lock_timeouts_total";
const RETRIES: &str = "lockkeeper_transaction_retries_total";
const DEADLOCKS: &str = "lockkeeper_transaction_deadlocks_total";
const DISCARDED: &str = "lockkeeper_connections_discarded_total";
const WAITERS: &str = "lockkeeper_waiters";
const GUARDS: &str = "lockkeeper_guards";

/// The values that a label has had in this process.
struct Values(Mutex<Option<HashSet<Arc<str>>>>);

impl Values {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The value, unless there have been too many others.
    fn bounded(&self, value: &str) -> SharedString {
        let mut values = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let values = values.get_or_insert_default();
        if let Some(known) = values.get(value) {
            return SharedString::from_shared(Arc::clone(known));
        }
        if values.len() >= MOST_VALUES {
            return SharedString::const_str(OTHER);
        }
        let value: Arc<str> = value.into();
        values.insert(Arc::clone(&value));
        SharedString::from_shared(value)
    }
}

static NAMESPACES: Values = Values::new();
static FINGERPRINTS: Values = Values::new();

pub(super) type Label = SharedString;

pub(super) fn label(key: &LockKey) -> Label {
    NAMESPACES.bounded(key.namespace().unwrap_or_default())
}

pub(super) fn held(scope: &'static str) {
    gauge!(GUARDS, "scope" => scope).increment(1);
}

pub(super) fn held_until_now(namespace: &Label, scope: &'static str, held: Duration) {
    gauge!(GUARDS, "scope" => scope).decrement(1);
    histogram!(HOLD, "namespace" => namespace.clone()).record(held);
}

pub(super) fn waits() {
    gauge!(WAITERS).increment(1);
}

pub(super) fn waits_no_more() {
    gauge!(WAITERS).decrement(1);
}

/// Tells the recorder what the metrics are.
pub(crate) fn describe() {
    describe_histogram!(
        WAIT,
        Unit::Seconds,
        "How long a call took to get its locks, or to time out"
    );
    describe_histogram!(HOLD, Unit::Seconds, "How long locks were held");
    describe_counter!(ACQUISITIONS, Unit::Count, "Calls that got their locks");
    describe_counter!(
        TIMEOUTS,
        Unit::Count,
        "Calls that did not get their locks in time"
    );
    describe_counter!(
        RETRIES,
        Unit::Count,
        "Attempts of transactions that were followed by another one"
    );
    describe_counter!(
        DEADLOCKS,
        Unit::Count,
        "Attempts of transactions that were a deadlock's victim"
    );
    describe_counter!(
        DISCARDED,
        Unit::Count,
        "Connections that were closed instead of returned to the pool"
    );
    describe_gauge!(WAITERS, Unit::Count, "Calls that wait for locks");
    describe_gauge!(GUARDS, Unit::Count, "Guards and sections that hold locks");
}

pub(super) fn acquired(namespace: &Label, waited: Duration) {
    counter!(ACQUISITIONS, "namespace" => namespace.clone()).increment(1);
    histogram!(WAIT, "namespace" => namespace.clone()).record(waited);
}

pub(super) fn timed_out(namespace: &Label, waited: Duration) {
    counter!(TIMEOUTS, "namespace" => namespace.clone()).increment(1);
    histogram!(WAIT, "namespace" => namespace.clone()).record(waited);
}

/// By the SQLSTATE of what failed; empty where the caller has asked for another attempt.
pub(crate) fn retried(sqlstate: &str) {
    counter!(RETRIES, "sqlstate" => sqlstate.to_owned()).increment(1);
}

/// By the fingerprint of its report; empty where there is none.
pub(crate) fn deadlocked(fingerprint: &str) {
    let fingerprint = FINGERPRINTS.bounded(fingerprint);
    counter!(DEADLOCKS, "fingerprint" => fingerprint).increment(1);
}

pub(crate) fn discarded(reason: &'static str) {
    counter!(DISCARDED, "reason" => reason).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_has_a_bounded_number_of_values() {
        let values = Values::new();
        for n in 0..MOST_VALUES {
            assert_eq!(&*values.bounded(&n.to_string()), n.to_string());
        }
        assert_eq!(&*values.bounded("one more"), OTHER);
        assert_eq!(&*values.bounded("7"), "7");
    }
}
