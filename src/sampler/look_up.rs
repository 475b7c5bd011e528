//! Looks up names that a server's error leaves out: a DETAIL has the oids of relations, and a CONTEXT has the place of a row.

use super::{Sampler, lock, sql};
use crate::error::Error;
use crate::graph::{LockObject, Relation, RowId};
use crate::incident::RowKey;
use crate::postgres::message::{self, ContextKind, RowContext};
use crate::transaction::FailedAttempt;

/// How many relations are remembered, and how many rows.
const MAX_RELATIONS: usize = 1024;
const MAX_ROWS: usize = 16;

impl Sampler {
    /// Looks up what a report about this failure needs, and remembers it.
    pub(super) async fn look_up_names(&self, failed: &FailedAttempt<'_>) {
        let looked_up = async {
            if let Some(detail) = failed.error.detail() {
                self.look_up_relations(detail).await?;
            }
            if let Some(row) = failed.error.where_().and_then(context_row) {
                self.look_up_row(row).await?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = looked_up.await {
            tracing::debug!(%error, "names for a report could not be looked up");
        }
    }

    async fn look_up_relations(&self, detail: &str) -> Result<(), Error> {
        let mut unknown = oids(detail);
        unknown.retain(|oid| !lock(&self.relations).contains_key(oid));
        if unknown.is_empty() {
            return Ok(());
        }
        let reply = self.query(&sql::relations_by_oid(&unknown)).await?;
        let found = sql::found_relations(&reply);
        let mut relations = lock(&self.relations);
        if relations.len() >= MAX_RELATIONS {
            relations.clear();
        }
        relations.extend(found.into_iter().map(|relation| (relation.oid(), relation)));
        Ok(())
    }

    async fn look_up_row(&self, row: RowContext) -> Result<(), Error> {
        // Another row may have had its place before.
        lock(&self.context_rows).retain(|(known, _, _)| *known != row);
        // The entry of an index is not there yet.
        if row.index_entry {
            return Ok(());
        }
        let reply = self.query(&sql::relations_by_name(&row.relation)).await?;
        // Of two tables with that name it is not known which one it is.
        let [relation] = &sql::found_relations(&reply)[..] else {
            return Ok(());
        };
        let id = RowId {
            relation: relation.clone(),
            page: row.page,
            offset: row.offset,
        };
        let Some(key) = self.row_key(&id).await? else {
            return Ok(());
        };
        let mut rows = lock(&self.context_rows);
        if rows.len() >= MAX_ROWS {
            rows.pop_front();
        }
        rows.push_back((row, relation.clone(), key));
        Ok(())
    }

    /// The relations in this DETAIL, as far as they are known.
    pub(super) fn relations_of(&self, detail: Option<&str>) -> Vec<Relation> {
        let relations = lock(&self.relations);
        let oids = detail.map(oids).unwrap_or_default();
        let known = oids.iter().filter_map(|oid| relations.get(oid));
        known.cloned().collect()
    }

    /// The row in this CONTEXT, as far as it is known.
    pub(super) fn context_row(&self, context: Option<&str>) -> Option<(Relation, RowKey)> {
        let row = context_row(context?)?;
        let rows = lock(&self.context_rows);
        let (_, relation, key) = rows.iter().find(|(known, _, _)| *known == row)?;
        Some((relation.clone(), key.clone()))
    }
}

fn context_row(context: &str) -> Option<RowContext> {
    let first = message::context(context).into_iter().next()?;
    match first.kind {
        ContextKind::Row(row) => Some(row),
        _ => None,
    }
}

fn oids(detail: &str) -> Vec<u32> {
    let detail = message::deadlock_detail(detail);
    let mut oids = Vec::new();
    for wait in detail.waits() {
        let unnamed = |oid| Relation {
            oid,
            name: None,
            kind: None,
            database: None,
        };
        let object = LockObject::from_tag(&wait.object, unnamed);
        let of_row = object.row().map(RowId::relation);
        oids.extend(object.relation().or(of_row).map(Relation::oid));
    }
    oids.sort_unstable();
    oids.dedup();
    oids
}
