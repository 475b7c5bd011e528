//! Without the feature `metrics` nothing is counted.

use std::time::Duration;

use crate::key::LockKey;

#[derive(Clone, Debug)]
pub(super) struct Label;

pub(super) fn label(_: &LockKey) -> Label {
    Label
}

pub(super) fn acquired(_: &Label, _: Duration) {}

pub(super) fn timed_out(_: &Label, _: Duration) {}

pub(super) fn held(_: &'static str) {}

pub(super) fn held_until_now(_: &Label, _: &'static str, _: Duration) {}

pub(super) fn waits() {}

pub(super) fn waits_no_more() {}

pub(crate) fn describe() {}

pub(crate) fn retried(_: &str) {}

pub(crate) fn deadlocked(_: &str) {}

pub(crate) fn discarded(_: &'static str) {}
