//! The advisory locks that a transaction holds.

use std::time::Instant;

use crate::key::LockKey;
use crate::key::names::Registration;
use crate::meter::Held;
use crate::mode::AdvisoryMode;

/// One transaction-level advisory lock, granted.
#[derive(Debug)]
pub(crate) struct HeldLock {
    pub(crate) key: LockKey,
    pub(crate) mode: AdvisoryMode,
    /// When it was granted, as far as the client knows.
    pub(crate) since: Instant,
    /// How many savepoints were open when it was granted: rolling one of them back returns it.
    pub(crate) depth: u32,
    /// What the locks of one call count as: with the first of them.
    pub(crate) counted: Option<Held>,
    /// Keep the readable names known.
    pub(crate) _names: Vec<Registration>,
}
