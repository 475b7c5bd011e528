//! What is dropped, with all that depends on it.

use super::{Recursion, Rules};
use crate::error::Error;
use crate::mode::LockMode;
use crate::schema::ddl::Dropped;
use crate::schema::plan::PlannedLock;
use crate::schema::plan::graph::{Graph, catalog_relation};
use crate::schema::sql::dropped::{self as dropped_sql, Start};
use crate::schema::sql::graph as graph_sql;
use crate::schema::statements::{LockedRelation, TableWork};

impl Rules<'_> {
    /// What is dropped, and what with it.
    pub(super) async fn dropped(
        &mut self,
        name: &'static str,
        dropped: &Dropped,
    ) -> Result<(), Error> {
        let start = match dropped {
            Dropped::Relation(of) => match self.graph.find(of) {
                Some(oid) => {
                    self.graph.drop(of);
                    if Graph::is_new(oid) {
                        return Ok(());
                    }
                    // Partitioned tables lock their partitions before anything else.
                    let below = match self.graph.table_of(oid) {
                        Some(table) => self.targets(table, Recursion::Partitions),
                        None => vec![oid],
                    };
                    let role = LockedRelation::Table;
                    let partitioned_only = self.graph.kind(oid) == 'I' || below.len() == 1;
                    if partitioned_only {
                        self.lock_all(
                            &below,
                            name,
                            role,
                            LockMode::AccessExclusive,
                            TableWork::Brief,
                        );
                    }
                    Start::Relation(oid)
                }
                None => return Ok(()),
            },
            Dropped::Column(table, column) => match self.graph.find(table) {
                Some(oid) if !Graph::is_new(oid) => match self.column(oid, column) {
                    Some(column) => {
                        let column = column.to_owned();
                        return self.closure(name, &Start::Column(oid, &column)).await;
                    }
                    None => return Ok(()),
                },
                _ => return Ok(()),
            },
            Dropped::Constraint(table, of) => match self.graph.find(table) {
                Some(oid) if !Graph::is_new(oid) => {
                    let old = self.constraints.get(&(oid, of.clone())).cloned();
                    match old.unwrap_or_else(|| Some(of.clone())) {
                        Some(of) => return self.closure(name, &Start::Constraint(oid, &of)).await,
                        None => return Ok(()),
                    }
                }
                _ => return Ok(()),
            },
            Dropped::OfTable(catalog, table, of) => match self.graph.find(table) {
                Some(oid) if !Graph::is_new(oid) => Start::OfTable(catalog, oid, of),
                _ => return Ok(()),
            },
            Dropped::Object(catalog, of) => Start::Object(catalog, of),
            Dropped::Owned(roles) => Start::Owned(roles),
        };
        self.closure(name, &start).await
    }

    pub(super) async fn closure(
        &mut self,
        name: &'static str,
        start: &Start<'_>,
    ) -> Result<(), Error> {
        let reply = self.env.ask(&dropped_sql::dropped(start)).await?;
        for (relation, lock) in graph_sql::read_relations(&reply) {
            let on = match relation.kind {
                'v' => LockedRelation::View,
                'm' => LockedRelation::MaterializedView,
                'S' => LockedRelation::Sequence,
                'i' | 'I' => LockedRelation::Index,
                _ => LockedRelation::Table,
            };
            let mode = if lock == "statistics" {
                LockMode::ShareUpdateExclusive
            } else {
                LockMode::AccessExclusive
            };
            self.locks.push(PlannedLock {
                relation: catalog_relation(relation),
                statement: name,
                on,
                mode,
                work: TableWork::Brief,
                at: self.at,
                under: mode,
            });
        }
        Ok(())
    }
}
