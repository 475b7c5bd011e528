//! Statements that name several relations, or none, and what a statement changes for those that follow it.

use super::{Recursion, Rules};
use crate::error::Error;
use crate::mode::LockMode;
use crate::schema::ddl::{Action, CatalogCheck, Effect, Target};
use crate::schema::plan::PlannedLock;
use crate::schema::plan::graph::{Graph, catalog_relation};
use crate::schema::sql::facts;
use crate::schema::sql::graph as graph_sql;
use crate::schema::statements::{LockedRelation, TableWork};

impl Rules<'_> {
    /// Returns the tables that are emptied.
    pub(super) fn truncate(&mut self, action: &Action, oid: u32) -> Vec<u32> {
        let mut all = self.targets(
            oid,
            if action.only {
                Recursion::Itself
            } else {
                Recursion::All
            },
        );
        let named = all.len();
        if action.name == "TRUNCATE … CASCADE" {
            let mut at = 0;
            while at < all.len() {
                for table in self.graph.referencing(all[at]) {
                    if !all.contains(&table) {
                        all.push(table);
                    }
                }
                at += 1;
            }
        }
        let mode = LockMode::AccessExclusive;
        for (at, table) in all.clone().into_iter().enumerate() {
            let role = if at < named {
                LockedRelation::Table
            } else {
                LockedRelation::Referencing
            };
            self.lock(table, action.name, role, mode, TableWork::Brief);
            if matches!(action.check, CatalogCheck::Sequences { .. }) {
                let owned = self.sequences(table, None, false);
                self.lock_all(
                    &owned,
                    "TRUNCATE … RESTART IDENTITY",
                    LockedRelation::Sequence,
                    mode,
                    TableWork::Brief,
                );
            }
        }
        all
    }

    pub(super) fn lock_table(&mut self, action: &Action, oid: u32) {
        let mode = action.mode.unwrap_or(LockMode::AccessExclusive);
        let mut named = vec![oid];
        if self.graph.kind(oid) == 'v' {
            named.extend(self.graph.read_by(oid));
        }
        for one in named {
            let all = self.targets(
                one,
                if action.only {
                    Recursion::Itself
                } else {
                    Recursion::All
                },
            );
            self.lock_all(
                &all,
                action.name,
                LockedRelation::Table,
                mode,
                TableWork::Brief,
            );
        }
    }

    /// VACUUM and ANALYZE.
    pub(super) fn maintain(&mut self, action: &Action, oid: u32) {
        let name = action.name;
        let is_partitioned = self.graph.kind(oid) == 'p';
        let recurses = !action.only && (is_partitioned || self.major >= 18);
        let targets = self.targets(
            oid,
            if recurses {
                Recursion::All
            } else {
                Recursion::Itself
            },
        );
        for target in targets {
            let analyzes = name.contains("ANALYZE");
            let has_rows = matches!(self.graph.kind(target), 'r' | 'm' | 'p' | 'f');
            if !has_rows || (self.graph.kind(target) == 'p' && !analyzes) {
                // Only its partitions have rows.
                continue;
            }
            self.row_locks(name, &[target], action);
            if name == "VACUUM FULL" {
                let indexes: Vec<u32> =
                    self.graph.indexes_of(target).map(|one| one.index).collect();
                let mode = LockMode::AccessExclusive;
                self.lock_all(
                    &indexes,
                    name,
                    LockedRelation::Index,
                    mode,
                    TableWork::Rewrite,
                );
            }
        }
        if name == "ANALYZE" && !is_partitioned && self.major < 18 && !action.only {
            let children = self.graph.below(oid);
            let name = "ANALYZE (inheritance parent)";
            self.lock_all(
                &children,
                name,
                LockedRelation::Child,
                LockMode::AccessShare,
                TableWork::Scan,
            );
        }
    }

    /// Statements about relations that they do not name.
    pub(super) async fn on_many(&mut self, action: &Action) -> Result<(), Error> {
        let sql = match &action.target {
            Target::Schema(schema) => graph_sql::of_schema(schema),
            Target::Database(is_clustered) => graph_sql::every_table(*is_clustered),
            Target::OwnedBy(roles) => graph_sql::owned_by(roles),
            Target::Domain(domain) => graph_sql::of_domain(domain),
            Target::Type(ty, with_tables) => graph_sql::of_type(ty, *with_tables),
            Target::Publication(name) => graph_sql::of_publication(name),
            _ => return Ok(()),
        };
        let rows: Vec<_> = self
            .rows(action.name)
            .filter(|row| row.on() != LockedRelation::Index)
            .collect();
        for (relation, _) in graph_sql::read_relations(&self.env.ask(&sql).await?) {
            if relation.kind == 'p'
                && action.name.starts_with("VACUUM")
                && !action.name.contains("ANALYZE")
            {
                continue;
            }
            for row in &rows {
                let mode = action.mode.unwrap_or(row.mode());
                self.locks.push(PlannedLock {
                    relation: catalog_relation(relation.clone()),
                    statement: action.name,
                    on: row.on(),
                    mode,
                    work: row.work(),
                    at: self.at,
                    under: mode,
                });
            }
        }
        Ok(())
    }

    /// Statements whose own relation is new, and queries.
    pub(super) async fn on_others(&mut self, action: &Action) -> Result<Option<String>, Error> {
        if let CatalogCheck::Calls(calls) = &action.check {
            let sql = facts::foreign_functions(calls);
            let found = if calls.is_empty() {
                Vec::new()
            } else {
                facts::read_names(&self.env.ask(&sql).await?)
            };
            return Ok(found.first().map(|name| format!("the function {name:?}")));
        }
        let rows: Vec<_> = self.rows(action.name).collect();
        // The new relation of the statement, if it is one.
        let own = (action.others.iter())
            .find(|(role, _)| *role == LockedRelation::Table)
            .and_then(|(_, name)| self.graph.find(name));
        if own.is_some_and(|oid| !Graph::is_new(oid)) {
            // CREATE TABLE IF NOT EXISTS of what is there.
            return Ok(None);
        }
        for (role, name) in &action.others {
            let Some(oid) = self.graph.find(name) else {
                continue;
            };
            for row in rows.iter().filter(|row| row.on() == *role) {
                let all = match role {
                    LockedRelation::Referenced => self.targets(oid, Recursion::Partitions),
                    _ => vec![oid],
                };
                self.lock_all(&all, action.name, *role, row.mode(), row.work());
            }
            match (role, own) {
                (LockedRelation::Referenced, Some(own)) => self.graph.add_key(own, oid, ""),
                (LockedRelation::Parent, Some(own)) => self.graph.attach(own, oid),
                _ => {}
            }
        }
        Ok(None)
    }

    pub(super) fn take_effect(&mut self, action: &Action) {
        let target = match &action.target {
            Target::Relation(name) => self.graph.find(name),
            _ => None,
        };
        if let Effect::Create(name, kind) = &action.effect {
            self.graph.create(name, *kind);
            return;
        }
        let Some(oid) = target else { return };
        let below = self.targets(oid, Recursion::All);
        match &action.effect {
            Effect::None | Effect::Create(..) => {}
            Effect::Alters => self.altering.extend(below),
            Effect::AddColumn(column) => {
                for one in below {
                    self.columns.insert((one, column.clone()), None);
                }
            }
            Effect::RenameColumn(old, new) => {
                for one in below {
                    let in_catalogs = self.column(one, old).map(str::to_owned);
                    self.columns.insert((one, new.clone()), in_catalogs);
                    self.columns.insert((one, old.clone()), None);
                }
            }
            Effect::RenameConstraint(old, new) => {
                let known = self.constraints.get(&(oid, old.clone())).cloned();
                let in_catalogs = known.unwrap_or_else(|| Some(old.clone()));
                self.constraints.insert((oid, new.clone()), in_catalogs);
                if self.new_keys.contains(&(oid, old.clone())) {
                    self.new_keys.insert((oid, new.clone()));
                }
            }
            Effect::AddConstraint(name, is_key) => {
                self.constraints.insert((oid, name.clone()), None);
                if *is_key {
                    self.new_keys.insert((oid, name.clone()));
                }
            }
            Effect::Rename(new) => self.graph.rename(oid, Some(new), None),
            Effect::SetSchema(schema) => self.graph.rename(oid, None, Some(schema)),
        }
    }
}
