//! Changing all rows of a table, a batch at a time.

mod batch;
mod catalog;
mod checkpoint;
mod look;

pub(crate) use batch::{Batch, Done, batch, done};
pub(crate) use catalog::{Found, Target, catalog, estimate, estimated, found};
pub(crate) use checkpoint::{
    Checkpoint, Saved, TABLE, Table, advance, advanced, create, forget, load, loaded, look_for,
    seen,
};
pub(crate) use look::{Look, Standbys, look, looked};

use crate::postgres::sql::literal;

/// `a = b`, by PostgreSQL's own operator.
fn equal(left: &str, right: &str) -> String {
    format!("{left} OPERATOR(pg_catalog.=) {right}")
}

/// A literal of type `name`, as the catalogs' columns are.
fn name_literal(name: &str) -> String {
    format!("{}::pg_catalog.name", literal(name))
}

/// An array of texts.
fn text_array<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let texts: Vec<String> = texts.map(literal).collect();
    format!("ARRAY[{}]::pg_catalog.text[]", texts.join(", "))
}
