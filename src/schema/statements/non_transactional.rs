//! Statements that cannot run in a transaction block because they begin and end transactions themselves.

use super::{LockMode, LockedRelation, StatementLock, TableWork, optional};

statements! {
    in_transaction_block: false;

    "CREATE INDEX CONCURRENTLY" => {
        Table: ShareUpdateExclusive Scan "twice, and it waits for the end of older transactions and snapshots";
    }
    "DROP INDEX CONCURRENTLY" => {
        Table: ShareUpdateExclusive Brief "it waits for the end of transactions that use the table";
        Index: AccessExclusive Brief "at the very end, when nobody uses it any more";
    }
    "REINDEX INDEX CONCURRENTLY"
    | "REINDEX TABLE CONCURRENTLY" => {
        Table: ShareUpdateExclusive Scan;
        Index: AccessExclusive Rewrite "on the old one, at the very end, when nobody uses it any more";
    }
    "REINDEX SCHEMA" => {
        Table: Share Scan "a transaction for each table";
        Index: AccessExclusive Rewrite;
    }
    "VACUUM" => {
        Table: ShareUpdateExclusive Scan "what the visibility map does not leave out";
    }
    "VACUUM (cutting off empty pages)" => {
        Table: AccessExclusive Brief "only when it is free at once, and given back when others wait; not with TRUNCATE off";
    }
    "VACUUM (ANALYZE)" => {
        Table: ShareUpdateExclusive Scan;
    }
    "VACUUM FULL" => {
        Table: AccessExclusive Rewrite;
        Index: AccessExclusive Rewrite;
    }
    "CLUSTER (all)" => {
        Table: AccessExclusive Rewrite "a transaction for each table that was clustered before";
    }
    "CLUSTER (partitioned)" => {
        Parent: AccessExclusive Brief since 15;
        Partition: AccessExclusive Rewrite since 15 "a transaction for each";
    }
    "ALTER TABLE … DETACH PARTITION CONCURRENTLY" => {
        Parent: ShareUpdateExclusive Brief "it waits for the end of transactions that use the parent";
        Partition: AccessExclusive Brief "in its second transaction, SHARE UPDATE EXCLUSIVE in its first";
    }
    "ALTER TABLE … DETACH PARTITION CONCURRENTLY (foreign key)" => {
        Parent: ShareUpdateExclusive Brief;
        Partition: AccessExclusive Brief;
        Referenced: ShareRowExclusive Brief;
    }
}
