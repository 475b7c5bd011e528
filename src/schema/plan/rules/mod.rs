//! What each statement locks, by the table of statement locks and by what the server's code adds to it: children,
//! partitions, indexes, sequences, and what depends on what is dropped.

mod columns;
mod dropped;
mod others;
mod partitions;

use std::collections::{HashMap, HashSet};

use super::PlannedLock;
use super::graph::Graph;
use crate::error::Error;
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::Env;
use crate::schema::ddl::{Action, CatalogCheck, Target};
use crate::schema::sql::facts;
use crate::schema::statements::{LockedRelation, StatementLock, TableWork};

pub(super) struct Rules<'e> {
    env: &'e Env,
    major: u32,
    graph: Graph,
    pub(super) locks: Vec<PlannedLock>,
    at: usize,
    /// The relations of which the batch has changed something that the catalogs still show.
    altered: HashSet<u32>,
    /// The same of the statement itself, whose forms do not see one another's effects.
    altering: Vec<u32>,
    /// Columns and constraints under the names that the batch gave them, with the names in the catalogs; `None` for those
    /// that are new.
    columns: HashMap<(u32, String), Option<String>>,
    constraints: HashMap<(u32, String), Option<String>>,
    /// Foreign keys that the batch adds.
    new_keys: HashSet<(u32, String)>,
}

/// The relations below its target that a statement locks in the target's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recursion {
    Itself,
    /// Children of the next level only.
    Children,
    Partitions,
    All,
}

impl<'e> Rules<'e> {
    pub(super) fn new(env: &'e Env, major: u32, graph: Graph) -> Self {
        Self {
            env,
            major,
            graph,
            locks: Vec::new(),
            at: 0,
            altered: HashSet::new(),
            altering: Vec::new(),
            columns: HashMap::new(),
            constraints: HashMap::new(),
            new_keys: HashSet::new(),
        }
    }

    /// Adds the locks of an action. Returns what of it is not understood.
    ///
    /// Cancel safety: only reads the catalogs.
    pub(super) async fn add(
        &mut self,
        at: usize,
        action: &Action,
    ) -> Result<Option<String>, Error> {
        if self.at != at {
            self.altered.extend(self.altering.drain(..));
        }
        self.at = at;
        let unknown = match &action.target {
            Target::Relation(name) => match self.graph.find(name) {
                Some(oid) => self.on_relation(action, name, oid).await?,
                // A statement about what does not exist fails, and one with IF EXISTS does nothing.
                None => None,
            },
            Target::Dropped(dropped) => {
                self.dropped(action.name, dropped).await?;
                None
            }
            Target::None => self.on_others(action).await?,
            _ => {
                self.on_many(action).await?;
                None
            }
        };
        self.take_effect(action);
        Ok(unknown)
    }

    fn lock(
        &mut self,
        oid: u32,
        name: &'static str,
        on: LockedRelation,
        mode: LockMode,
        work: TableWork,
    ) {
        if let Some(relation) = self.graph.relation(oid) {
            self.locks.push(PlannedLock {
                relation,
                statement: name,
                on,
                mode,
                work,
                at: self.at,
                under: mode,
            });
        }
    }

    fn lock_all(
        &mut self,
        oids: &[u32],
        name: &'static str,
        on: LockedRelation,
        mode: LockMode,
        work: TableWork,
    ) {
        for oid in oids {
            self.lock(*oid, name, on, mode, work);
        }
    }

    fn is_altered(&self, oid: u32) -> bool {
        self.altered.contains(&oid) || Graph::is_new(oid)
    }

    /// The column's name in the catalogs; `None` if the batch adds it.
    fn column<'a>(&'a self, oid: u32, name: &'a str) -> Option<&'a str> {
        match self.columns.get(&(oid, name.to_owned())) {
            Some(old) => old.as_deref(),
            None => Some(name),
        }
    }

    /// What the rows of the table of statement locks say of the target and its index, by the role of each relation.
    fn rows(&self, name: &'static str) -> impl Iterator<Item = &'static StatementLock> + use<> {
        let major = self.major;
        StatementLock::all().filter(move |lock| lock.statement() == name && lock.applies_to(major))
    }

    async fn on_relation(
        &mut self,
        action: &Action,
        table: &TableName,
        oid: u32,
    ) -> Result<Option<String>, Error> {
        let kind = self.graph.kind(oid);
        match action.name {
            "TRUNCATE" | "TRUNCATE … CASCADE" => {
                let all = self.truncate(action, oid);
                let sql = facts::truncate_triggers(&all);
                let names = facts::read_names(&self.env.ask(&sql).await?);
                return Ok(names
                    .first()
                    .map(|name| format!("the function of the trigger {name:?}")));
            }
            "LOCK TABLE" => self.lock_table(action, oid),
            "REINDEX TABLE"
            | "REINDEX INDEX"
            | "REINDEX TABLE CONCURRENTLY"
            | "REINDEX INDEX CONCURRENTLY"
            | "DROP INDEX CONCURRENTLY" => self.by_index(action, oid),
            "CREATE INDEX" | "CREATE INDEX … ON ONLY" => self.create_index(action, oid),
            "CREATE TABLE … PARTITION OF" => self.partition_of(action, oid),
            "ALTER TABLE … ATTACH PARTITION" => self.attach(action, oid),
            "ALTER TABLE … DETACH PARTITION"
            | "ALTER TABLE … DETACH PARTITION CONCURRENTLY"
            | "ALTER TABLE … DETACH PARTITION … FINALIZE" => self.detach(action, oid),
            "ALTER INDEX … ATTACH PARTITION" => {
                self.row_locks(action.name, &[oid], action);
                for (_, part) in &action.others {
                    if let Some(part) = self.graph.find(part) {
                        let role = LockedRelation::PartitionIndex;
                        self.lock(
                            part,
                            action.name,
                            role,
                            LockMode::AccessExclusive,
                            TableWork::Brief,
                        );
                    }
                }
            }
            "ALTER TABLE … ADD FOREIGN KEY"
            | "ALTER TABLE … ADD FOREIGN KEY … NOT VALID"
            | "ALTER TABLE … ADD FOREIGN KEY … NOT ENFORCED"
            | "ALTER TABLE … ADD COLUMN … REFERENCES" => self.add_foreign_key(action, oid),
            "ALTER TABLE … ALTER COLUMN … TYPE" => self.new_type(action, oid).await?,
            "ALTER TABLE … ALTER COLUMN … SET NOT NULL" | "ALTER TABLE … ADD NOT NULL" => {
                self.not_null(action, oid).await?;
            }
            "ALTER TABLE … ADD COLUMN" => self.add_column(action, oid).await?,
            "ALTER TABLE … VALIDATE CONSTRAINT"
            | "ALTER TABLE … RENAME CONSTRAINT"
            | "ALTER TABLE … DROP CONSTRAINT" => return self.constraint(action, oid).await,
            name if name.starts_with("ALTER TABLE … ALTER CONSTRAINT") => {
                return self.constraint(action, oid).await;
            }
            "ALTER TABLE … ADD PRIMARY KEY USING INDEX" => {
                self.using_index(action, table, oid).await?
            }
            "VACUUM" | "VACUUM FULL" | "VACUUM (ANALYZE)" | "ANALYZE" => self.maintain(action, oid),
            "COMMENT ON INDEX" => self.lock(
                oid,
                "COMMENT ON INDEX",
                LockedRelation::Index,
                LockMode::ShareUpdateExclusive,
                TableWork::Brief,
            ),
            "ALTER INDEX … RENAME" if !matches!(kind, 'i' | 'I') => {
                let role = LockedRelation::Table;
                self.lock(
                    oid,
                    action.name,
                    role,
                    LockMode::AccessExclusive,
                    TableWork::Brief,
                );
            }
            "CREATE OR REPLACE VIEW" if kind != 'v' => {}
            _ => self.by_rows(action, oid),
        }
        if self.major >= 18 && !action.only && kind == 'r' {
            self.children_of_constraint(action, oid);
        }
        self.details(action, oid);
        Ok(None)
    }

    /// Since 18 a constraint that does not recurse locks the children of its table all the same (`ATPrepCmd`,
    /// AT_AddConstraint, in `src/backend/commands/tablecmds.c`).
    fn children_of_constraint(&mut self, action: &Action, oid: u32) {
        let mode = match action.name {
            "ALTER TABLE … ADD UNIQUE" | "ALTER TABLE … ADD EXCLUDE" => {
                LockMode::AccessExclusive
            }
            "ALTER TABLE … ADD FOREIGN KEY"
            | "ALTER TABLE … ADD FOREIGN KEY … NOT VALID"
            | "ALTER TABLE … ADD FOREIGN KEY … NOT ENFORCED" => LockMode::ShareRowExclusive,
            _ => return,
        };
        let (below, role) = (self.graph.below(oid), LockedRelation::Child);
        self.lock_all(&below, action.name, role, mode, TableWork::Brief);
    }

    /// What the action's details add: options, a named index, sequences.
    fn details(&mut self, action: &Action, oid: u32) {
        match &action.check {
            CatalogCheck::NamedIndex { index } => {
                if let Some(index) = self.graph.index_named(oid, index) {
                    let rows: Vec<_> = self
                        .rows(action.name)
                        .filter(|row| row.on() == LockedRelation::Index)
                        .collect();
                    for row in rows {
                        self.lock(index, action.name, row.on(), row.mode(), row.work());
                    }
                }
            }
            CatalogCheck::Sequences { column } => {
                let mode = match action.name {
                    // A sequence follows its table since it can be unlogged.
                    "ALTER TABLE … SET LOGGED" | "ALTER TABLE … SET UNLOGGED"
                        if self.major < 15 =>
                    {
                        return;
                    }
                    "ALTER TABLE … ALTER COLUMN … SET GENERATED"
                    | "ALTER TABLE … ALTER COLUMN … RESTART" => LockMode::ShareRowExclusive,
                    _ => LockMode::AccessExclusive,
                };
                let owned = self.sequences(oid, column.as_deref(), false);
                let role = LockedRelation::Sequence;
                self.lock_all(&owned, action.name, role, mode, TableWork::Brief);
            }
            _ => {}
        }
    }

    fn sequences(&self, table: u32, column: Option<&str>, identity: bool) -> Vec<u32> {
        let column = match column {
            Some(column) => match self.column(table, column) {
                Some(column) => Some(column),
                None => return Vec::new(),
            },
            None => None,
        };
        (self.graph.sequences.iter())
            .filter(|one| one.table == table && (one.is_identity || !identity))
            .filter(|one| column.is_none_or(|column| one.column == column))
            .map(|one| one.sequence)
            .collect()
    }

    /// The target and what is below it, as far as the statement recurses.
    fn targets(&self, oid: u32, recursion: Recursion) -> Vec<u32> {
        let mut all = vec![oid];
        all.extend(match recursion {
            Recursion::Itself => Vec::new(),
            Recursion::Children => self.graph.children(oid),
            Recursion::Partitions => self.graph.partitions(oid),
            Recursion::All => self.graph.below(oid),
        });
        all
    }

    /// Locks these relations as the rows of a statement say of the table that it names.
    fn row_locks(&mut self, name: &'static str, oids: &[u32], action: &Action) {
        let rows: Vec<_> = self.rows(name).collect();
        let is_target = |row: &&&StatementLock| {
            matches!(
                row.on(),
                LockedRelation::Table
                    | LockedRelation::View
                    | LockedRelation::MaterializedView
                    | LockedRelation::Sequence
                    | LockedRelation::Index
                    | LockedRelation::Parent
                    | LockedRelation::Partition
            )
        };
        // The first row is about what the statement names.
        let Some(row) = rows.iter().find(is_target) else {
            return;
        };
        for oid in oids {
            let mode = action
                .mode
                .unwrap_or_else(|| self.mode_for(action, *oid, row.mode()));
            self.lock(
                *oid,
                name,
                row.on(),
                mode,
                action.work.unwrap_or(row.work()),
            );
        }
    }

    /// Settings are locked for by their names.
    fn mode_for(&self, action: &Action, oid: u32, mode: LockMode) -> LockMode {
        let CatalogCheck::Options(names) = &action.check else {
            return mode;
        };
        if self.graph.kind(oid) == 'v' {
            return LockMode::AccessExclusive;
        }
        // `src/backend/access/common/reloptions.c`; what is not listed there takes the strongest lock.
        let is_mild = |name: &String| {
            name.starts_with("autovacuum_")
                || [
                    "fillfactor",
                    "toast_tuple_target",
                    "parallel_workers",
                    "vacuum_index_cleanup",
                    "vacuum_truncate",
                    "vacuum_max_eager_freeze_failure_rate",
                    "log_autovacuum_min_duration",
                    "log_autoanalyze_min_duration",
                    "deduplicate_items",
                ]
                .contains(&name.as_str())
        };
        if names.iter().all(is_mild) {
            mode
        } else {
            LockMode::AccessExclusive
        }
    }

    /// By the rows of the table alone, with the recursion of the statement.
    fn by_rows(&mut self, action: &Action, oid: u32) {
        let name = action.name;
        let targets = self.targets(oid, self.recursion(action, oid));
        if action.check == CatalogCheck::NoInherit {
            self.row_locks(name, &[oid], action);
            // Since 18 the children are locked all the same.
            if self.major >= 18 {
                let (role, mode) = (LockedRelation::Child, LockMode::AccessExclusive);
                self.lock_all(&targets[1..], name, role, mode, TableWork::Brief);
            }
            return;
        }
        self.row_locks(name, &targets, action);
        let rows: Vec<_> = self.rows(name).collect();
        for row in rows {
            let role = row.on();
            let found: Vec<u32> = match role {
                LockedRelation::Index if name == "CLUSTER" => self.clustered(action, oid),
                LockedRelation::Referenced if name.starts_with("INSERT") => {
                    self.graph.referenced(oid)
                }
                LockedRelation::Parent if name.ends_with("INHERIT") => (action.others.iter())
                    .filter_map(|(_, name)| self.graph.find(name))
                    .collect(),
                _ => continue,
            };
            self.lock_all(&found, name, role, row.mode(), row.work());
        }
        // A column of a key's index or a default can be needed by others, which CASCADE then drops.
        if name == "ALTER TABLE … ADD PRIMARY KEY" || name == "ALTER TABLE … ADD UNIQUE" {
            self.attached_indexes(action, oid);
        }
    }

    /// The index that CLUSTER names, or that the table was clustered by before.
    fn clustered(&self, action: &Action, oid: u32) -> Vec<u32> {
        if let CatalogCheck::NamedIndex { index } = &action.check {
            return self.graph.index_named(oid, index).into_iter().collect();
        }
        let all = self.graph.indexes_of(oid);
        all.filter(|one| one.is_clustered)
            .map(|one| one.index)
            .collect()
    }

    /// `ATPrepCmd` and what it calls in `src/backend/commands/tablecmds.c`.
    fn recursion(&self, action: &Action, oid: u32) -> Recursion {
        let name = action.name;
        let form = name.strip_prefix("ALTER TABLE … ").unwrap_or("");
        let of_all = [
            "ADD COLUMN",
            "ALTER COLUMN … TYPE",
            "ALTER COLUMN … SET DEFAULT",
            "ALTER COLUMN … DROP DEFAULT",
            "ALTER COLUMN … SET NOT NULL",
            "ALTER COLUMN … DROP NOT NULL",
            "ALTER COLUMN … SET STATISTICS",
            "ALTER COLUMN … SET STORAGE",
            "ALTER COLUMN … SET EXPRESSION",
            "ALTER COLUMN … DROP EXPRESSION",
            "ADD CHECK",
            "ADD NOT NULL",
            "ADD PRIMARY KEY",
            "RENAME COLUMN",
        ];
        let of_partitions = ["ADD UNIQUE", "ADD EXCLUDE", "DISABLE TRIGGER"];
        // Partitions share identity columns since 17.
        let identity = [
            "ALTER COLUMN … ADD GENERATED",
            "ALTER COLUMN … SET GENERATED",
            "ALTER COLUMN … RESTART",
            "ALTER COLUMN … DROP IDENTITY",
        ];
        let begins = |all: &[&str]| all.iter().any(|one| form.starts_with(one));
        if form == "DROP COLUMN" {
            // Without recursion, the children's columns become their own.
            if action.only {
                Recursion::Children
            } else {
                Recursion::All
            }
        } else if (form == "ADD PRIMARY KEY" || form == "ALTER COLUMN … DROP NOT NULL")
            && action.only
        {
            // The children's columns have to be NOT NULL, too, or become so on their own.
            Recursion::Children
        } else if form == "RESET (…)" || action.only {
            Recursion::Itself
        } else if form.starts_with("ADD COLUMN … UNIQUE") {
            Recursion::Partitions
        } else if begins(&of_all) {
            Recursion::All
        } else if begins(&of_partitions)
            || (self.major >= 17 && begins(&identity))
            || matches!(name, "CREATE TRIGGER" | "CREATE CONSTRAINT TRIGGER … FROM")
            || (name.starts_with("ALTER TRIGGER") && self.major >= 15)
        {
            Recursion::Partitions
        } else if name.contains("PUBLICATION") && self.graph.kind(oid) != 'p' {
            Recursion::All
        } else if name == "CLUSTER" {
            Recursion::Partitions
        } else if matches!(name, "SELECT" | "UPDATE" | "DELETE" | "MERGE … UPDATE")
            || name.starts_with("INSERT")
        {
            Recursion::All
        } else {
            Recursion::Itself
        }
    }
}
