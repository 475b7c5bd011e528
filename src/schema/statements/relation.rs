//! The role of a locked relation in a statement, and how much of it the statement processes.

use std::fmt;

/// A relation that a statement locks, by its role in the statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LockedRelation {
    /// The table that the statement names or changes.
    Table,
    /// A table that the statement only reads.
    Source,
    /// The table that a foreign key of the table refers to.
    Referenced,
    /// A table with a foreign key that refers to the table.
    Referencing,
    /// A partitioned table or inheritance parent.
    Parent,
    /// A partition.
    Partition,
    /// The default partition of the parent, if it has one.
    DefaultPartition,
    /// An inheritance child that is not a partition.
    Child,
    /// An index. When a query is planned, it locks every index of its tables, even unused ones.
    Index,
    /// The index of a partition.
    PartitionIndex,
    /// A view.
    View,
    /// A materialized view.
    MaterializedView,
    /// A sequence.
    Sequence,
}

impl fmt::Display for LockedRelation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Table => "the table",
            Self::Source => "what it reads",
            Self::Referenced => "the table referred to",
            Self::Referencing => "tables that refer to it",
            Self::Parent => "the parent",
            Self::Partition => "the partition",
            Self::DefaultPartition => "the default partition",
            Self::Child => "inheritance children",
            Self::Index => "the index",
            Self::PartitionIndex => "the partition's index",
            Self::View => "the view",
            Self::MaterializedView => "the materialized view",
            Self::Sequence => "the sequence",
        })
    }
}

/// How much of a relation a statement processes while it holds the lock. The duration of the lock depends on this, and
/// on the rest of the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TableWork {
    /// Nothing that depends on the relation's size: at most, catalogs are changed.
    Brief,
    /// The rows that the query selects.
    Rows,
    /// The whole relation is read, to check it or to build an index.
    Scan,
    /// The whole relation is rewritten.
    Rewrite,
}

impl fmt::Display for TableWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Brief => "is brief",
            Self::Rows => "reads or writes rows",
            Self::Scan => "reads all of it",
            Self::Rewrite => "rewrites it",
        })
    }
}
