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
    getters! {
        /// Every process that `pg_stat_activity` showed.
        activity: &[Backend];

        /// Which session waited for which.
        snapshot: &Snapshot;

        /// The settings about locks, timeouts and connections, as the monitoring session has them.
        settings: &[Setting];
    }
}

impl Setting {
    getters! {
        /// `deadlock_timeout`
        name: &str;

        /// The number, without its unit, or the text.
        value: &str;

        /// The unit of a number, such as `ms` or `8kB`.
        text unit;

        /// The origin of the value: `default`, `configuration file`, `session`, …
        text source;
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
