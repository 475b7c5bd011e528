//! What a statement locks, seen from the statement, and what it does there.

use std::fmt;

/// What a statement locks, by the part it has in the statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LockedRelation {
    /// The table that the statement names or changes.
    Table,
    /// A table that it only reads.
    Source,
    /// The table that a foreign key of the table refers to.
    Referenced,
    /// A table with a foreign key that refers to the table.
    Referencing,
    /// A partitioned table or inheritance parent.
    Parent,
    /// A partition.
    Partition,
    /// The default partition of the parent, where it has one.
    DefaultPartition,
    /// An inheritance child that is no partition.
    Child,
    /// An index. A query locks every index of its tables when it is planned, used or not.
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

/// How much of a relation a statement goes through while it has its lock: what the length of the lock depends on, besides
/// the rest of the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TableWork {
    /// Nothing that grows with it: catalogs are changed, or nothing at all.
    Brief,
    /// The rows that the query asks for.
    Rows,
    /// All of it is read, to check it or to build an index.
    Scan,
    /// All of it is written anew.
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
