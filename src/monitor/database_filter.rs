//! Which databases are observed.

/// The names of the databases that something is limited to; all databases if none is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DatabaseFilter(pub(crate) Vec<Box<str>>);

impl DatabaseFilter {
    /// Whether sessions of this database are included. A session whose database is not known is included only if all
    /// are.
    pub(crate) fn includes(&self, database: Option<&str>) -> bool {
        self.0.is_empty() || database.is_some_and(|name| self.0.iter().any(|one| **one == *name))
    }
}
