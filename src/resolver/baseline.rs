//! The state of the server before a run.

use std::fmt;

use crate::graph::{Backend, Snapshot};

/// The state of the server before a run did anything, as evidence of what was changed and why.
///
/// It contains statements with their literals; `Debug` and `Display` show none of them.
#[derive(Clone, Debug)]
pub struct Baseline {
    pub(super) activity: Vec<Backend>,
    pub(super) snapshot: Snapshot,
    pub(super) settings: Vec<Setting>,
}

/// A setting of the server, as `pg_settings` has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Setting {
    pub(super) name: Box<str>,
    pub(super) value: Box<str>,
    pub(super) unit: Option<Box<str>>,
    pub(super) source: Option<Box<str>>,
}

impl Baseline {
    /// Every process that `pg_stat_activity` showed.
    #[must_use]
    pub fn activity(&self) -> &[Backend] {
        &self.activity
    }

    /// Which session waited for which.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The settings about locks, timeouts and connections, as the monitoring session has them.
    #[must_use]
    pub fn settings(&self) -> &[Setting] {
        &self.settings
    }
}

impl Setting {
    /// `deadlock_timeout`
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number, without its unit, or the text.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// The unit of a number, such as `ms` or `8kB`.
    #[must_use]
    pub fn unit(&self) -> Option<&str> {
        self.unit.as_deref()
    }

    /// The origin of the value: `default`, `configuration file`, `session`, …
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }
}

/// `lock_timeout = 0 ms`
impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.name, self.value)?;
        match &self.unit {
            Some(unit) => write!(f, " {unit}"),
            None => Ok(()),
        }
    }
}
