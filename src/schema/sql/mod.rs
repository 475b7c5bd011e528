//! What schema changes ask and send: catalogs read without locking what they are about, and the statements of the
//! recipes.

pub(crate) mod catalog;
pub(crate) mod index;
pub(crate) mod once;
pub(crate) mod recipe;
pub(crate) mod run;

use crate::postgres::sql::identifier;

/// A list of quoted names.
fn columns<S: AsRef<str>>(names: &[S]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| identifier(name.as_ref())).collect();
    quoted.join(", ")
}
