//! The SQL of a backfill: catalogs, checkpoints, samples and batches.

mod batch;
mod catalog;
mod checkpoint;
mod load_sample;

pub(crate) use batch::{BatchQuery, BatchResult, End, batch, last_key, read_batch, read_last_key};
pub(crate) use catalog::{Target, estimate, read_estimate, read_target, target};
pub(crate) use checkpoint::{
    BatchStep, Checkpoint, CheckpointId, CheckpointTable, Sameness, TABLE, add_columns, adopt,
    advance, create_table, delete, find_table, has_kept_rows, load, read_advance, read_checkpoint,
    read_kept_rows, read_row_security, read_table, row_security,
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
fn text_array(texts: impl Iterator<Item: AsRef<str>>) -> String {
    let texts: Vec<String> = texts.map(|text| literal(text.as_ref())).collect();
    format!("ARRAY[{}]::pg_catalog.text[]", texts.join(", "))
}
