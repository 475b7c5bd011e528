//! The SQL of schema changes: catalog queries that do not lock the relations they describe, and the statements of the
//! procedures.

pub(crate) mod bounds;
pub(crate) mod catalog;
pub(crate) mod dropped;
pub(crate) mod facts;
pub(crate) mod graph;
pub(crate) mod index;
pub(crate) mod likeness;
pub(crate) mod migrate_once;
pub(crate) mod procedure;
pub(crate) mod session_settings;

use crate::postgres::sql::identifier;

/// The quoted names, separated by commas.
fn columns<S: AsRef<str>>(names: &[S]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| identifier(name.as_ref())).collect();
    quoted.join(", ")
}
