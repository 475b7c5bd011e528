//! Columns and constraints, whose locks and work the catalogs decide on.

use super::{Recursion, Rules};
use crate::error::Error;
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::ddl::{Action, CatalogCheck, Effect};
use crate::schema::plan::graph::Graph;
use crate::schema::plan::types;
use crate::schema::sql::catalog;
use crate::schema::sql::facts::{self, ColumnFacts, ConstraintFacts};
use crate::schema::statements::{LockedRelation, TableWork};

impl Rules<'_> {
    pub(super) fn add_foreign_key(&mut self, action: &Action, oid: u32) {
        let name = action.name;
        let targets = self.targets(oid, Recursion::Partitions);
        let rows: Vec<_> = self.rows(name).collect();
        let of_table = rows.iter().find(|row| row.on() == LockedRelation::Table);
        let Some(of_table) = of_table else { return };
        for target in &targets {
            let work = action.work.unwrap_or(of_table.work());
            self.lock(*target, name, LockedRelation::Table, of_table.mode(), work);
        }
        for (_, referenced) in &action.others {
            let Some(referenced) = self.graph.find(referenced) else {
                continue;
            };
            let is_taken_over = targets[1..].iter().any(|partition| {
                (self.graph.keys.iter())
                    .any(|key| key.table == *partition && key.referenced == referenced)
            });
            for row in rows
                .iter()
                .filter(|row| row.on() == LockedRelation::Referenced)
            {
                let mode = if is_taken_over {
                    LockMode::AccessExclusive
                } else {
                    row.mode()
                };
                let all = self.targets(referenced, Recursion::Partitions);
                self.lock_all(
                    &all,
                    name,
                    row.on(),
                    mode,
                    action.work.unwrap_or(row.work()),
                );
            }
            let key = match &action.effect {
                Effect::AddConstraint(key, _) => key.clone(),
                _ => String::new(),
            };
            self.graph.add_key(oid, referenced, &key);
        }
    }

    /// The facts of a column in these relations; empty for a column that the batch adds.
    pub(super) async fn facts(
        &self,
        oids: &[u32],
        column: &str,
        ty: &str,
    ) -> Result<Vec<ColumnFacts>, Error> {
        let oids: Vec<u32> = oids
            .iter()
            .copied()
            .filter(|oid| !Graph::is_new(*oid))
            .collect();
        let Some(column) = oids.first().and_then(|oid| self.column(*oid, column)) else {
            return Ok(Vec::new());
        };
        let sql = facts::column_facts(&oids, column, ty);
        Ok(facts::read_column_facts(&self.env.ask(&sql).await?))
    }

    pub(super) async fn new_type(&mut self, action: &Action, oid: u32) -> Result<(), Error> {
        let CatalogCheck::NewType { column, ty, using } = &action.check else {
            return Ok(());
        };
        let targets = self.targets(oid, Recursion::All);
        let all = self.facts(&targets, column, ty).await?;
        let is_new = self.column(oid, column).is_none();
        let changed = is_new || targets.iter().any(|target| self.altered.contains(target));
        let mut is_brief = true;
        for target in &targets {
            let found = all.iter().find(|one| one.relation == *target);
            let keeps = !using && !changed && found.is_some_and(|one| types::keeps_bytes(one, ty));
            // The index of a partitioned table is built again in every partition: it has no file that could be kept.
            let of_partitions = self.graph.kind(oid) == 'p'
                && (all.iter().find(|one| one.relation == oid)).is_some_and(|one| one.is_indexed);
            let (name, work) = match found {
                Some(one) if keeps && !one.is_checked && !one.rebuilds_index && !of_partitions => (
                    "ALTER TABLE … ALTER COLUMN … TYPE (binary coercible)",
                    TableWork::Brief,
                ),
                Some(_) if keeps => (
                    "ALTER TABLE … ALTER COLUMN … TYPE (binary coercible)",
                    TableWork::Scan,
                ),
                _ => {
                    is_brief = false;
                    ("ALTER TABLE … ALTER COLUMN … TYPE", TableWork::Rewrite)
                }
            };
            self.lock(
                *target,
                name,
                LockedRelation::Table,
                LockMode::AccessExclusive,
                work,
            );
            // Keys are built again, or at least checked for whether they have to be.
            let old = self.column(*target, column).map(str::to_owned);
            let keys: Vec<(u32, u32)> = (self.graph.keys.iter())
                .filter(|key| key.table == *target || key.referenced == *target)
                .filter(|key| {
                    key.referenced == *target
                        || old
                            .as_deref()
                            .is_none_or(|old| key.columns.split(',').any(|own| own == old))
                })
                .map(|key| (key.table, key.referenced))
                .collect();
            for (table, referenced) in keys {
                let work = if is_brief {
                    TableWork::Brief
                } else {
                    TableWork::Scan
                };
                let strongest = LockMode::AccessExclusive;
                if table == *target {
                    let name = "ALTER TABLE … ALTER COLUMN … TYPE (foreign key)";
                    let all = self.graph.with_partitions(std::iter::once(referenced));
                    self.lock_all(&all, name, LockedRelation::Referenced, strongest, work);
                } else if (all.iter().find(|one| one.relation == *target))
                    .is_none_or(|one| one.is_indexed)
                {
                    let name = "ALTER TABLE … ALTER COLUMN … TYPE (key)";
                    let all = self.graph.with_partitions(std::iter::once(table));
                    self.lock_all(&all, name, LockedRelation::Referencing, strongest, work);
                }
            }
            // The sequence of an identity column gets the type, too.
            let owned = self.sequences(*target, Some(column), true);
            let (name, mode) = ("ALTER SEQUENCE", LockMode::ShareRowExclusive);
            self.lock_all(
                &owned,
                name,
                LockedRelation::Sequence,
                mode,
                TableWork::Brief,
            );
        }
        Ok(())
    }

    pub(super) async fn not_null(&mut self, action: &Action, oid: u32) -> Result<(), Error> {
        let CatalogCheck::NotNull { column } = &action.check else {
            self.by_rows(action, oid);
            return Ok(());
        };
        let recursion = if action.only {
            Recursion::Itself
        } else {
            Recursion::All
        };
        let targets = self.targets(oid, recursion);
        let all = self.facts(&targets, column, "").await?;
        for target in targets {
            let found = all.iter().find(|one| one.relation == target);
            let is_proven = found.is_some_and(|one| {
                one.is_not_null
                    || (one.checks.iter()).any(|tree| types::proves_not_null(tree, one.number))
            });
            // Under ADD NOT NULL, the same scan finds the same proof.
            let (name, work) = if is_proven && !self.is_altered(target) {
                (
                    "ALTER TABLE … ALTER COLUMN … SET NOT NULL (implied by a CHECK)",
                    TableWork::Brief,
                )
            } else {
                (action.name, TableWork::Scan)
            };
            self.lock(
                target,
                name,
                LockedRelation::Table,
                LockMode::AccessExclusive,
                work,
            );
        }
        Ok(())
    }

    pub(super) async fn add_column(&mut self, action: &Action, oid: u32) -> Result<(), Error> {
        let CatalogCheck::NewColumn {
            ty,
            calls,
            operators,
            has_default,
        } = &action.check
        else {
            self.by_rows(action, oid);
            return Ok(());
        };
        let sql = facts::new_column(ty, calls, *operators, *has_default);
        let (volatile, domain) =
            catalog::read_two(&self.env.ask(&sql).await?, "volatile", "domain");
        let name = if volatile {
            "ALTER TABLE … ADD COLUMN (volatile default)"
        } else if domain {
            "ALTER TABLE … ADD COLUMN (domain with a constraint)"
        } else {
            "ALTER TABLE … ADD COLUMN"
        };
        let recursion = if action.only {
            Recursion::Itself
        } else {
            Recursion::All
        };
        let targets = self.targets(oid, recursion);
        self.row_locks(name, &targets, action);
        Ok(())
    }

    pub(super) async fn using_index(
        &mut self,
        action: &Action,
        table: &TableName,
        oid: u32,
    ) -> Result<(), Error> {
        let CatalogCheck::UsingIndex { index } = &action.check else {
            return Ok(());
        };
        let name = match self.graph.relation(oid) {
            Some(relation) if !self.is_altered(oid) => relation.table_name(),
            _ => table.clone(),
        };
        let nullable = self.is_altered(oid) || {
            let sql = catalog::index_nullable(&name, index);
            catalog::read_two(&self.env.ask(&sql).await?, "nullable", "other").0
        };
        let name = if nullable {
            "ALTER TABLE … ADD PRIMARY KEY USING INDEX (nullable column)"
        } else {
            action.name
        };
        let targets = self.targets(oid, Recursion::All);
        self.row_locks(name, &targets, action);
        Ok(())
    }

    /// VALIDATE, RENAME, ALTER and DROP of a constraint, by what it is.
    pub(super) async fn constraint(
        &mut self,
        action: &Action,
        oid: u32,
    ) -> Result<Option<String>, Error> {
        let CatalogCheck::Constraint { name: of } = &action.check else {
            return Ok(None);
        };
        let key = (oid, of.clone());
        let in_catalogs = match self.constraints.get(&key) {
            Some(old) => old.clone(),
            None => Some(of.clone()),
        };
        let found = match &in_catalogs {
            Some(name) if !Graph::is_new(oid) => {
                facts::read_constraint(&self.env.ask(&facts::constraint(oid, name)).await?)
            }
            _ => None,
        };
        let found = found.unwrap_or(ConstraintFacts {
            is_foreign_key: self.new_keys.contains(&key),
            is_alone: false,
            referenced: 0,
        });
        let recursion =
            if action.only && action.name.ends_with("DROP CONSTRAINT") && !found.is_alone {
                // The children's constraints become their own.
                if self.major >= 18 {
                    Recursion::All
                } else {
                    Recursion::Children
                }
            } else if action.only {
                Recursion::Itself
            // INHERIT ends that.
            } else if found.is_alone && action.name != "ALTER TABLE … ALTER CONSTRAINT … INHERIT"
            {
                if action.name.ends_with("RENAME CONSTRAINT") {
                    Recursion::Itself
                } else {
                    Recursion::Partitions
                }
            } else {
                Recursion::All
            };
        let targets = self.targets(oid, recursion);
        let name = action.name;
        match name {
            "ALTER TABLE … VALIDATE CONSTRAINT" if found.is_foreign_key => {
                let name = "ALTER TABLE … VALIDATE CONSTRAINT (foreign key)";
                self.row_locks(name, &targets, action);
                let referenced: Vec<u32> = (self.graph.keys.iter())
                    .filter(|key| {
                        key.table == oid
                            && (key.name == *of || Some(&key.name) == in_catalogs.as_ref())
                    })
                    .map(|key| key.referenced)
                    .collect();
                let referenced = self.graph.with_partitions(referenced.into_iter());
                self.lock_all(
                    &referenced,
                    name,
                    LockedRelation::Referenced,
                    LockMode::RowShare,
                    TableWork::Scan,
                );
            }
            _ if name.contains("ENFORCED") && found.referenced != 0 => {
                let all = self.targets(oid, Recursion::Partitions);
                self.row_locks(name, &all, action);
                let rows: Vec<_> = self
                    .rows(name)
                    .filter(|row| row.on() == LockedRelation::Referenced)
                    .collect();
                let referenced = self
                    .graph
                    .with_partitions(std::iter::once(found.referenced));
                for row in rows {
                    self.lock_all(&referenced, name, row.on(), row.mode(), row.work());
                }
            }
            _ => self.row_locks(name, &targets, action),
        }
        Ok(None)
    }
}
