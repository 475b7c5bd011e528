//! Index statements that can run in a transaction block.

use super::{LockMode, LockedRelation, StatementLock, TableWork, optional};

statements! {
    in_transaction_block: true;

    "CREATE INDEX" => {
        Table: Share Scan;
    }
    "CREATE INDEX (partitioned)" => {
        Parent: Share Brief;
        Partition: Share Scan;
    }
    "CREATE INDEX … ON ONLY" => {
        Parent: Share Brief;
    }
    "DROP INDEX" => {
        Table: AccessExclusive Brief;
        Index: AccessExclusive Brief;
    }
    "DROP INDEX (partitioned)" => {
        Parent: AccessExclusive Brief;
        Partition: AccessExclusive Brief;
        Index: AccessExclusive Brief;
    }
    "REINDEX INDEX"
    | "REINDEX TABLE" => {
        Table: Share Scan;
        Index: AccessExclusive Rewrite "so that queries wait when they are planned, reads too";
    }
    "ALTER INDEX … RENAME" => {
        Index: ShareUpdateExclusive Brief "the table is not locked; ACCESS EXCLUSIVE when it is written ALTER TABLE";
    }
    "ALTER INDEX … SET (…)"
    | "ALTER INDEX … RESET (…)" => {
        Index: ShareUpdateExclusive Brief "fillfactor, deduplicate_items";
    }
    "ALTER INDEX … SET (fastupdate, …)" => {
        Index: AccessExclusive Brief "and what else GIN, GiST and BRIN indexes have of their own";
    }
    "ALTER INDEX … ALTER COLUMN … SET STATISTICS" => {
        Index: ShareUpdateExclusive Brief;
    }
    "ALTER INDEX … SET TABLESPACE" => {
        Index: AccessExclusive Rewrite;
    }
    "ALTER INDEX … ATTACH PARTITION" => {
        Index: ShareUpdateExclusive Brief;
        PartitionIndex: AccessExclusive Brief;
        Parent: AccessShare Brief;
        Partition: AccessShare Brief;
    }
    "ALTER INDEX … DEPENDS ON EXTENSION"
    | "ALTER TABLE … RENAME (of an index)" => {
        Index: AccessExclusive Brief;
    }
    "COMMENT ON INDEX" => {
        Index: ShareUpdateExclusive Brief;
    }
}
