//! A test that cannot run here.

use std::env;
use std::fmt;
use std::io::Write;

/// Why a test cannot run here: one word for the missing feature (`standby`, `pgbouncer`), and a reason.
#[must_use = "a skip that is not reported is a test that silently did nothing"]
#[derive(Clone, PartialEq, Eq)]
pub struct Skip {
    feature: String,
    why: String,
}

impl Skip {
    /// A skip for want of `feature`, the word that `LOCKKEEPER_ALLOW_SKIPS` lists.
    pub fn new(feature: &str, why: impl Into<String>) -> Skip {
        Skip {
            feature: feature.to_owned(),
            why: why.into(),
        }
    }

    /// The missing feature, in one word.
    #[must_use]
    pub fn feature(&self) -> &str {
        &self.feature
    }

    /// Writes `SKIPPED <test>: <why>` to the standard error of the process, past the capture of the test harness.
    ///
    /// # Panics
    ///
    /// When `LOCKKEEPER_DENY_SKIPS=1`, unless `LOCKKEEPER_ALLOW_SKIPS` (words separated by commas) lists the feature.
    #[track_caller]
    pub fn report(&self, test: &str) {
        let deny = env::var("LOCKKEEPER_DENY_SKIPS").unwrap_or_default();
        let allowed = env::var("LOCKKEEPER_ALLOW_SKIPS").unwrap_or_default();
        assert!(
            self.is_allowed(&deny, &allowed),
            "{test} must not be skipped here: {self}"
        );
        let line = format!("SKIPPED {test}: {self}\n");
        // A closed stderr is no reason to fail a test.
        std::io::stderr().write_all(line.as_bytes()).ok();
    }

    fn is_allowed(&self, deny: &str, allowed: &str) -> bool {
        deny != "1" || allowed.split(',').any(|word| word.trim() == self.feature)
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no {}: {}", self.feature, self.why)
    }
}

impl fmt::Debug for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Skip({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::Skip;

    #[test]
    fn only_listed_features_may_be_skipped() {
        let skip = Skip::new("standby", "none here");
        assert!(skip.is_allowed("", ""));
        assert!(!skip.is_allowed("1", ""));
        assert!(!skip.is_allowed("1", "pgbouncer,standbys"));
        assert!(skip.is_allowed("1", "pgbouncer, standby"));
    }
}
