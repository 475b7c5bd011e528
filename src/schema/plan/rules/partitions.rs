//! What statements about partitions and indexes lock beside the table that they name.

use super::{Recursion, Rules};
use crate::mode::LockMode;
use crate::schema::ddl::Action;
use crate::schema::plan::graph::Graph;
use crate::schema::sql::graph as graph_sql;
use crate::schema::statements::{LockedRelation, TableWork};

impl Rules<'_> {
    /// REINDEX and DROP INDEX CONCURRENTLY: the table of the index, or the indexes of the table.
    pub(super) fn by_index(&mut self, action: &Action, oid: u32) {
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

    pub(super) fn create_index(&mut self, action: &Action, oid: u32) {
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
    pub(super) fn attached_indexes(&mut self, action: &Action, oid: u32) {
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
    pub(super) fn search_default(&mut self, name: &'static str, parent: u32, except: Option<u32>) {
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
    pub(super) fn keys_of_partition(
        &mut self,
        name: &'static str,
        parent: u32,
        partition: Option<u32>,
    ) {
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
        let follows = |key: &graph_sql::GraphKey| {
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
    pub(super) fn has_key_to(&self, parent: u32, partition: u32, referenced: u32) -> bool {
        let below = self.targets(partition, Recursion::All);
        let of_parent = |key: &&graph_sql::GraphKey| key.table == parent;
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
    pub(super) fn indexes_of_partition(&mut self, name: &'static str, parent: u32) {
        let all: Vec<u32> = self.graph.indexes_of(parent).map(|one| one.index).collect();
        let mode = LockMode::ShareUpdateExclusive;
        self.lock_all(&all, name, LockedRelation::Index, mode, TableWork::Brief);
    }

    pub(super) fn partition_of(&mut self, action: &Action, parent: u32) {
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

    pub(super) fn attach(&mut self, action: &Action, parent: u32) {
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

    pub(super) fn detach(&mut self, action: &Action, parent: u32) {
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
}
