//! What each statement locks, by the table of statement locks and by what the server's code adds to it: children,
//! partitions, indexes, sequences, and what depends on what is dropped.

use std::collections::{HashMap, HashSet};

use super::graph::{Graph, catalog_relation};
use super::{PlannedLock, types};
use crate::error::Error;
use crate::mode::LockMode;
use crate::postgres::TableName;
use crate::schema::Env;
use crate::schema::ddl::{Action, CatalogCheck, Dropped, Effect, Target};
use crate::schema::sql::catalog;
use crate::schema::sql::graph::{self as facts, ColumnFacts, ConstraintFacts, Start};
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
        self.details(action, oid);
        Ok(None)
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
        } else if begins(&of_partitions) || (self.major >= 17 && begins(&identity)) {
            Recursion::Partitions
        } else if matches!(name, "CREATE TRIGGER" | "CREATE CONSTRAINT TRIGGER … FROM") {
            Recursion::Partitions
        } else if name.starts_with("ALTER TRIGGER") && self.major >= 15 {
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

    /// Returns the tables that are emptied.
    fn truncate(&mut self, action: &Action, oid: u32) -> Vec<u32> {
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

    fn lock_table(&mut self, action: &Action, oid: u32) {
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

    /// REINDEX and DROP INDEX CONCURRENTLY: the table of the index, or the indexes of the table.
    fn by_index(&mut self, action: &Action, oid: u32) {
        let name = action.name;
        let rows: Vec<_> = self.rows(name).collect();
        for one in self.targets(oid, Recursion::Partitions) {
            let is_index = matches!(self.graph.kind(one), 'i' | 'I');
            let table = if is_index {
                self.graph.table_of(one)
            } else {
                Some(one)
            };
            let indexes: Vec<u32> = if is_index {
                vec![one]
            } else {
                self.graph
                    .indexes_of(one)
                    .map(|index| index.index)
                    .collect()
            };
            for row in &rows {
                if row.on() == LockedRelation::Index {
                    self.lock_all(&indexes, name, row.on(), row.mode(), row.work());
                } else if let Some(table) = table {
                    self.lock(table, name, row.on(), row.mode(), row.work());
                }
            }
        }
    }

    fn create_index(&mut self, action: &Action, oid: u32) {
        let is_partitioned = self.graph.kind(oid) == 'p';
        if !is_partitioned {
            // ONLY means nothing here: the index has no part elsewhere.
            self.row_locks("CREATE INDEX", &[oid], action);
            return;
        }
        if action.only {
            self.row_locks("CREATE INDEX … ON ONLY", &[oid], action);
            return;
        }
        let name = "CREATE INDEX (partitioned)";
        self.lock(
            oid,
            name,
            LockedRelation::Parent,
            LockMode::Share,
            TableWork::Brief,
        );
        for partition in self.graph.partitions(oid) {
            self.lock(
                partition,
                name,
                LockedRelation::Partition,
                LockMode::Share,
                TableWork::Scan,
            );
            // Those that could become a part of the new one are opened in the same mode.
            let loose: Vec<u32> = (self.graph.indexes_of(partition))
                .filter(|one| self.graph.parents(one.index).is_empty())
                .map(|one| one.index)
                .collect();
            self.lock_all(
                &loose,
                name,
                LockedRelation::PartitionIndex,
                LockMode::Share,
                TableWork::Brief,
            );
        }
    }

    /// A new key of a partitioned table: indexes of partitions that could become a part of it.
    fn attached_indexes(&mut self, action: &Action, oid: u32) {
        for partition in self.graph.partitions(oid) {
            let loose: Vec<u32> = (self.graph.indexes_of(partition))
                .filter(|one| self.graph.parents(one.index).is_empty())
                .map(|one| one.index)
                .collect();
            self.lock_all(
                &loose,
                action.name,
                LockedRelation::PartitionIndex,
                LockMode::Share,
                TableWork::Brief,
            );
        }
    }

    /// Locks the default partition and its own partitions, which are searched for rows of the new one.
    fn search_default(&mut self, name: &'static str, parent: u32, except: Option<u32>) {
        for default in self.graph.default_partitions(parent) {
            if Some(default) != except {
                let role = LockedRelation::DefaultPartition;
                self.lock(
                    default,
                    name,
                    role,
                    LockMode::AccessExclusive,
                    TableWork::Scan,
                );
            }
        }
    }

    /// The foreign keys of a parent that a partition gets, and those that refer to the parent.
    fn keys_of_partition(&mut self, name: &'static str, parent: u32, partition: Option<u32>) {
        let referenced = self.graph.referenced(parent);
        for table in referenced {
            let has_same =
                partition.is_some_and(|partition| self.has_key_to(parent, partition, table));
            // The partition's own key is taken over, and its triggers on the other table dropped.
            let mode = if has_same {
                LockMode::AccessExclusive
            } else {
                LockMode::ShareRowExclusive
            };
            let work = if partition.is_some() {
                TableWork::Scan
            } else {
                TableWork::Brief
            };
            self.lock(table, name, LockedRelation::Referenced, mode, work);
        }
        let mode = match (partition, self.major) {
            (Some(_), ..15) => LockMode::AccessShare,
            _ => LockMode::ShareRowExclusive,
        };
        // The key of a partition follows from that of its parent.
        let follows = |key: &facts::GraphKey| {
            let parents = self.graph.parents(key.table);
            (self.graph.keys.iter())
                .any(|one| parents.contains(&one.table) && one.referenced == key.referenced)
        };
        let referencing: Vec<u32> = (self.graph.keys.iter())
            .filter(|key| key.referenced == parent && !follows(key))
            .map(|key| key.table)
            .collect();
        self.lock_all(
            &referencing,
            name,
            LockedRelation::Referencing,
            mode,
            TableWork::Brief,
        );
    }

    /// Whether a partition, or one below it, has a key of the parent's columns to the same table.
    fn has_key_to(&self, parent: u32, partition: u32, referenced: u32) -> bool {
        let below = self.targets(partition, Recursion::All);
        let of_parent = |key: &&facts::GraphKey| key.table == parent;
        self.graph.keys.iter().filter(of_parent).any(|key| {
            let same = self.graph.with_partitions(std::iter::once(key.referenced));
            same.contains(&referenced)
                && (self.graph.keys.iter()).any(|own| {
                    below.contains(&own.table)
                        && own.parent.is_none()
                        && own.referenced == key.referenced
                })
        })
    }

    /// The parent's indexes get a part for the new partition. Whether an index that the partition has can be that part
    /// depends on more than its columns, so each is taken as one that is built.
    fn indexes_of_partition(&mut self, name: &'static str, parent: u32) {
        let all: Vec<u32> = self.graph.indexes_of(parent).map(|one| one.index).collect();
        let mode = LockMode::ShareUpdateExclusive;
        self.lock_all(&all, name, LockedRelation::Index, mode, TableWork::Brief);
    }

    fn partition_of(&mut self, action: &Action, parent: u32) {
        let name = action.name;
        self.lock(
            parent,
            name,
            LockedRelation::Parent,
            LockMode::AccessExclusive,
            TableWork::Brief,
        );
        self.search_default(name, parent, None);
        self.keys_of_partition("CREATE TABLE … PARTITION OF (foreign key)", parent, None);
        self.indexes_of_partition(name, parent);
        for (_, new) in &action.others {
            if let Some(new) = self.graph.find(new).filter(|oid| Graph::is_new(*oid)) {
                self.graph.attach(new, parent);
            }
        }
    }

    fn attach(&mut self, action: &Action, parent: u32) {
        let name = action.name;
        self.lock(
            parent,
            name,
            LockedRelation::Parent,
            LockMode::ShareUpdateExclusive,
            TableWork::Brief,
        );
        for (_, partition) in &action.others {
            let Some(partition) = self.graph.find(partition) else {
                continue;
            };
            for one in self.targets(partition, Recursion::All) {
                let role = LockedRelation::Partition;
                self.lock(one, name, role, LockMode::AccessExclusive, TableWork::Scan);
            }
            self.search_default(name, parent, Some(partition));
            self.keys_of_partition(
                "ALTER TABLE … ATTACH PARTITION (foreign key)",
                parent,
                Some(partition),
            );
            self.indexes_of_partition(name, parent);
            self.graph.attach(partition, parent);
            self.altering.push(partition);
        }
    }

    fn detach(&mut self, action: &Action, parent: u32) {
        let name = action.name;
        let is_concurrent = name.ends_with("CONCURRENTLY") || name.ends_with("FINALIZE");
        let (mode, work) = if is_concurrent {
            (LockMode::ShareUpdateExclusive, TableWork::Brief)
        } else {
            (LockMode::AccessExclusive, TableWork::Brief)
        };
        self.lock(parent, name, LockedRelation::Parent, mode, work);
        let strongest = LockMode::AccessExclusive;
        if !is_concurrent {
            let default = self.graph.default_partitions(parent);
            if let Some(default) = default.first() {
                self.lock(
                    *default,
                    name,
                    LockedRelation::DefaultPartition,
                    strongest,
                    TableWork::Brief,
                );
            }
        }
        for (_, partition) in &action.others {
            let Some(partition) = self.graph.find(partition) else {
                continue;
            };
            let referencing = self.graph.referencing(parent);
            let work = if referencing.is_empty() {
                TableWork::Brief
            } else {
                TableWork::Scan
            };
            let below = if is_concurrent {
                Recursion::Itself
            } else {
                Recursion::All
            };
            let below = self.targets(partition, below);
            self.lock_all(&below, name, LockedRelation::Partition, strongest, work);
            for table in self.graph.referenced(partition) {
                let name = "ALTER TABLE … DETACH PARTITION (foreign key)";
                self.lock(
                    table,
                    name,
                    LockedRelation::Referenced,
                    LockMode::ShareRowExclusive,
                    TableWork::Brief,
                );
            }
            for table in referencing {
                let name = "ALTER TABLE … DETACH PARTITION (referred to)";
                self.lock(
                    table,
                    name,
                    LockedRelation::Referencing,
                    strongest,
                    TableWork::Scan,
                );
            }
        }
    }

    fn add_foreign_key(&mut self, action: &Action, oid: u32) {
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
    async fn facts(&self, oids: &[u32], column: &str, ty: &str) -> Result<Vec<ColumnFacts>, Error> {
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

    async fn new_type(&mut self, action: &Action, oid: u32) -> Result<(), Error> {
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

    async fn not_null(&mut self, action: &Action, oid: u32) -> Result<(), Error> {
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

    async fn add_column(&mut self, action: &Action, oid: u32) -> Result<(), Error> {
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

    async fn using_index(
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
    async fn constraint(&mut self, action: &Action, oid: u32) -> Result<Option<String>, Error> {
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
            } else if found.is_alone {
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

    /// VACUUM and ANALYZE.
    fn maintain(&mut self, action: &Action, oid: u32) {
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

    /// What is dropped, and what with it.
    async fn dropped(&mut self, name: &'static str, dropped: &Dropped) -> Result<(), Error> {
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

    async fn closure(&mut self, name: &'static str, start: &Start<'_>) -> Result<(), Error> {
        let reply = self.env.ask(&facts::dropped(start)).await?;
        for (relation, lock) in facts::read_relations(&reply) {
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

    /// Statements about relations that they do not name.
    async fn on_many(&mut self, action: &Action) -> Result<(), Error> {
        let sql = match &action.target {
            Target::Schema(schema) => facts::of_schema(schema),
            Target::Database(is_clustered) => facts::every_table(*is_clustered),
            Target::OwnedBy(roles) => facts::owned_by(roles),
            Target::Domain(domain) => facts::of_domain(domain),
            Target::Type(ty, with_tables) => facts::of_type(ty, *with_tables),
            Target::Publication(name) => facts::of_publication(name),
            _ => return Ok(()),
        };
        let rows: Vec<_> = self
            .rows(action.name)
            .filter(|row| row.on() != LockedRelation::Index)
            .collect();
        for (relation, _) in facts::read_relations(&self.env.ask(&sql).await?) {
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
    async fn on_others(&mut self, action: &Action) -> Result<Option<String>, Error> {
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

    fn take_effect(&mut self, action: &Action) {
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
