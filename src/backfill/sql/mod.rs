//! The SQL of a backfill: catalogs, checkpoints, samples and batches.

mod batch;
mod catalog;
mod checkpoint;
mod load_sample;

pub(crate) use batch::{BatchQuery, BatchResult, batch, read_batch};
pub(crate) use catalog::{Target, estimate, read_estimate, read_target, target};
pub(crate) use checkpoint::{
    Checkpoint, CheckpointId, CheckpointTable, TABLE, advance, create_table, delete, find_table,
    load, read_advance, read_checkpoint, read_table,
};
pub(crate) use load_sample::{LoadSample, Standbys, load_sample, read_load_sample};

use crate::postgres::sql::literal;

/// `left = right`, with the operator of `pg_catalog`.
fn equal(left: &str, right: &str) -> String {
    format!("{left} OPERATOR(pg_catalog.=) {right}")
}

/// A literal of type `name`, the type of the catalogs' columns.
fn name_literal(name: &str) -> String {
    format!("{}::pg_catalog.name", literal(name))
}

/// An array of texts.
fn text_array<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let texts: Vec<String> = texts.map(literal).collect();
    format!("ARRAY[{}]::pg_catalog.text[]", texts.join(", "))
}
