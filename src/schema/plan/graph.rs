//! The relations that a batch is about and how they hang together, with what its own statements change.

use std::collections::{HashMap, HashSet};

use crate::error::Error;
use crate::postgres::TableName;
use crate::schema::Env;
use crate::schema::sql::catalog::{CatalogRelation, Relationship};
use crate::schema::sql::graph::{self, GraphKey, GraphRelation, GraphRow};

/// Oids from here on are those of relations that the batch creates. The server counts up from 16384, and these would be
/// its last.
const NEW: u32 = u32::MAX - 100_000;

#[derive(Debug)]
pub(super) struct Index {
    pub(super) index: u32,
    pub(super) table: u32,
    pub(super) is_clustered: bool,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) sequence: u32,
    pub(super) table: u32,
    pub(super) column: String,
    pub(super) is_identity: bool,
}

#[derive(Debug, Default)]
pub(super) struct Graph {
    names: HashMap<TableName, u32>,
    relations: HashMap<u32, GraphRelation>,
    /// Names that no longer mean what the catalogs say.
    gone: HashSet<TableName>,
    /// Schema and name that the batch gave to what the catalogs know under another name.
    renamed: HashMap<u32, (String, String)>,
    defaults: HashMap<u32, u32>,
    /// Child and parent.
    inherits: Vec<(u32, u32)>,
    pub(super) indexes: Vec<Index>,
    pub(super) keys: Vec<GraphKey>,
    pub(super) sequences: Vec<Sequence>,
    /// View, and relation that it reads.
    views: Vec<(u32, u32)>,
    next: u32,
}

impl Graph {
    /// Cancel safety: only reads the catalogs.
    pub(super) async fn load(env: &Env, names: &[TableName]) -> Result<Self, Error> {
        let mut loaded = Self {
            next: NEW,
            ..Self::default()
        };
        if names.is_empty() {
            return Ok(loaded);
        }
        for row in graph::read_graph(&env.ask(&graph::graph(names)).await?) {
            match row {
                GraphRow::Name(at, oid) => {
                    if let Some(name) = names.get(at) {
                        loaded.names.insert(name.clone(), oid);
                    }
                }
                GraphRow::Relation { relation, default } => {
                    if let Some(default) = default {
                        loaded.defaults.insert(relation.oid, default);
                    }
                    loaded.relations.insert(relation.oid, relation);
                }
                GraphRow::Inherits { child, parent } => loaded.inherits.push((child, parent)),
                GraphRow::Index {
                    index,
                    table,
                    is_clustered,
                } => loaded.indexes.push(Index {
                    index,
                    table,
                    is_clustered,
                }),
                GraphRow::Key(key) => loaded.keys.push(key),
                GraphRow::Sequence {
                    sequence,
                    table,
                    column,
                    is_identity,
                } => loaded.sequences.push(Sequence {
                    sequence,
                    table,
                    column,
                    is_identity,
                }),
                GraphRow::View { view, relation } => loaded.views.push((view, relation)),
            }
        }
        Ok(loaded)
    }

    /// The relation of this name at this point of the batch.
    pub(super) fn find(&self, name: &TableName) -> Option<u32> {
        if let Some(oid) = self.names.get(name).filter(|_| !self.gone.contains(name)) {
            return Some(*oid);
        }
        // A name of the batch's own, with a schema in one place and without one in the other.
        let same = |(other, oid): (&TableName, &u32)| {
            let differ = other.schema().is_some() && name.schema().is_some();
            (other.name() == name.name() && !differ && !self.gone.contains(other) && *oid >= NEW)
                .then_some(*oid)
        };
        let own = self.names.iter().find_map(same);
        own.or_else(|| {
            let renamed = |(oid, (schema, own)): (&u32, &(String, String))| {
                let is_here = name.schema().is_none_or(|of| of == schema);
                (own == name.name() && is_here).then_some(*oid)
            };
            self.renamed.iter().find_map(renamed)
        })
    }

    pub(super) fn get(&self, oid: u32) -> Option<&GraphRelation> {
        self.relations.get(&oid)
    }

    pub(super) fn kind(&self, oid: u32) -> char {
        self.get(oid).map_or(' ', |one| one.kind)
    }

    /// Whether the batch creates it.
    pub(super) fn is_new(oid: u32) -> bool {
        oid >= NEW
    }

    /// The relation as a plan has it; `None` of what the batch creates.
    pub(super) fn relation(&self, oid: u32) -> Option<CatalogRelation> {
        let one = self.get(oid).filter(|_| !Self::is_new(oid))?;
        Some(catalog_relation(one.clone()))
    }

    pub(super) fn children(&self, oid: u32) -> Vec<u32> {
        let of = |(child, parent): &(u32, u32)| (*parent == oid).then_some(*child);
        self.inherits.iter().filter_map(of).collect()
    }

    pub(super) fn parents(&self, oid: u32) -> Vec<u32> {
        let of = |(child, parent): &(u32, u32)| (*child == oid).then_some(*parent);
        self.inherits.iter().filter_map(of).collect()
    }

    /// The children of all levels, each once, without the relation itself.
    pub(super) fn below(&self, oid: u32) -> Vec<u32> {
        let mut found: Vec<u32> = Vec::new();
        let mut open = self.children(oid);
        while let Some(next) = open.pop() {
            if next != oid && !found.contains(&next) {
                found.push(next);
                open.extend(self.children(next));
            }
        }
        found
    }

    /// The partitions of all levels.
    pub(super) fn partitions(&self, oid: u32) -> Vec<u32> {
        if !matches!(self.kind(oid), 'p' | 'I') {
            return Vec::new();
        }
        self.below(oid)
    }

    /// The default partition and its own partitions.
    pub(super) fn default_partitions(&self, parent: u32) -> Vec<u32> {
        let Some(default) = self.defaults.get(&parent).copied() else {
            return Vec::new();
        };
        let mut all = vec![default];
        all.extend(self.below(default));
        all
    }

    pub(super) fn indexes_of(&self, table: u32) -> impl Iterator<Item = &Index> {
        self.indexes.iter().filter(move |one| one.table == table)
    }

    /// An index of the table, by its name.
    pub(super) fn index_named(&self, table: u32, name: &str) -> Option<u32> {
        let mut all = self.indexes_of(table);
        let found = all.find(|one| self.get(one.index).is_some_and(|index| index.name == name));
        found.map(|one| one.index)
    }

    pub(super) fn table_of(&self, index: u32) -> Option<u32> {
        let found = self.indexes.iter().find(|one| one.index == index);
        found.map(|one| one.table)
    }

    /// The tables that this one's foreign keys refer to, and their partitions.
    pub(super) fn referenced(&self, table: u32) -> Vec<u32> {
        let of = (self.keys.iter())
            .filter(|key| key.table == table)
            .map(|key| key.referenced);
        self.with_partitions(of)
    }

    /// The tables whose foreign keys refer to this one, and their partitions.
    pub(super) fn referencing(&self, table: u32) -> Vec<u32> {
        let of = (self.keys.iter())
            .filter(|key| key.referenced == table)
            .map(|key| key.table);
        self.with_partitions(of)
    }

    pub(super) fn with_partitions(&self, tables: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut all = Vec::new();
        for table in tables {
            all.push(table);
            all.extend(self.partitions(table));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The relations that a view reads, through other views, too.
    pub(super) fn read_by(&self, view: u32) -> Vec<u32> {
        let mut found: Vec<u32> = Vec::new();
        let mut open = vec![view];
        while let Some(next) = open.pop() {
            for (of, relation) in &self.views {
                if *of == next && !found.contains(relation) {
                    found.push(*relation);
                    if self.kind(*relation) == 'v' {
                        open.push(*relation);
                    }
                }
            }
        }
        found
    }

    /// Something new of this name.
    pub(super) fn create(&mut self, name: &TableName, kind: char) {
        if self.find(name).is_some() {
            // It exists: the statement fails, or does nothing, or replaces a view.
            return;
        }
        self.gone.remove(name);
        let oid = self.next;
        self.next += 1;
        self.names.insert(name.clone(), oid);
        let relation = GraphRelation {
            oid,
            schema: name.schema().unwrap_or_default().to_owned(),
            name: name.name().to_owned(),
            kind,
            is_partition: false,
            rows: None,
        };
        self.relations.insert(oid, relation);
    }

    pub(super) fn rename(&mut self, oid: u32, name: Option<&str>, schema: Option<&str>) {
        let old: Vec<TableName> = (self.names.iter())
            .filter(|(_, of)| **of == oid)
            .map(|(name, _)| name.clone())
            .collect();
        let is_new = Self::is_new(oid);
        for old in old {
            if is_new {
                self.names.remove(&old);
            } else {
                self.gone.insert(old);
            }
        }
        let Some(relation) = self.relations.get_mut(&oid) else {
            return;
        };
        let now = self.renamed.get(&oid).cloned();
        let (old_schema, old_name) =
            now.unwrap_or_else(|| (relation.schema.clone(), relation.name.clone()));
        let schema = schema.map_or(old_schema, str::to_owned);
        let name = name.map_or(old_name, str::to_owned);
        if !is_new {
            self.renamed.insert(oid, (schema, name));
            return;
        }
        let full = if schema.is_empty() {
            TableName::new(&name)
        } else {
            TableName::in_schema(&schema, &name)
        };
        (relation.schema, relation.name) = (schema, name);
        self.gone.remove(&full);
        self.names.insert(full, oid);
    }

    pub(super) fn drop(&mut self, name: &TableName) {
        self.gone.insert(name.clone());
    }

    pub(super) fn attach(&mut self, child: u32, parent: u32) {
        if let Some(relation) = self.relations.get_mut(&child) {
            relation.is_partition = true;
        }
        self.inherits.push((child, parent));
    }

    pub(super) fn add_key(&mut self, table: u32, referenced: u32, name: &str) {
        self.keys.push(GraphKey {
            parent: None,
            table,
            referenced,
            name: name.to_owned(),
            columns: String::new(),
        });
    }
}

pub(super) fn catalog_relation(one: GraphRelation) -> CatalogRelation {
    CatalogRelation {
        relationship: Relationship::Itself,
        oid: one.oid,
        schema: one.schema,
        name: one.name,
        kind: one.kind,
        is_partition: one.is_partition,
        rows: one.rows,
    }
}
