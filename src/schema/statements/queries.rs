//! Statements that read or write rows, explicit locks, and other statements that do not change a table's definition.

use super::{LockMode, LockedRelation, RowLock, StatementLock, TableWork, optional};

statements! {
    in_transaction_block: true;

    "SELECT" => {
        Table: AccessShare Rows;
    }
    "SELECT … FOR UPDATE" => {
        Table: RowShare Rows rows Update;
        Source: AccessShare Rows "tables that FOR UPDATE OF leaves out";
    }
    "SELECT … FOR NO KEY UPDATE" => {
        Table: RowShare Rows rows NoKeyUpdate;
    }
    "SELECT … FOR SHARE" => {
        Table: RowShare Rows rows Share;
    }
    "SELECT … FOR KEY SHARE" => {
        Table: RowShare Rows rows KeyShare;
    }
    "INSERT" => {
        Table: RowExclusive Rows;
        Referenced: RowShare Rows rows KeyShare;
    }
    "INSERT … SELECT" => {
        Table: RowExclusive Rows;
        Source: AccessShare Rows;
    }
    "INSERT (serial or identity column)" => {
        Table: RowExclusive Rows;
        Sequence: RowExclusive Brief;
    }
    "INSERT … ON CONFLICT DO UPDATE" => {
        Table: RowExclusive Rows rows NoKeyUpdate "FOR UPDATE when it sets a column of the key";
    }
    "INSERT … ON CONFLICT DO NOTHING" => {
        Table: RowExclusive Rows;
    }
    "UPDATE" => {
        Table: RowExclusive Rows rows NoKeyUpdate;
        Source: AccessShare Rows "the tables of FROM";
    }
    "UPDATE (of a key)" => {
        Table: RowExclusive Rows rows Update "a column of a unique index that a foreign key could refer to";
        Referencing: RowShare Rows;
    }
    "UPDATE (of a key, ON UPDATE CASCADE)" => {
        Table: RowExclusive Rows rows Update;
        Referencing: RowExclusive Rows rows NoKeyUpdate;
    }
    "UPDATE (of a foreign key)" => {
        Table: RowExclusive Rows rows NoKeyUpdate;
        Referenced: RowShare Rows rows KeyShare;
    }
    "DELETE" => {
        Table: RowExclusive Rows rows Update;
        Source: AccessShare Rows "the tables of USING";
    }
    "DELETE (from a table referred to)" => {
        Table: RowExclusive Rows rows Update;
        Referencing: RowShare Rows;
    }
    "DELETE (ON DELETE CASCADE)" => {
        Table: RowExclusive Rows rows Update;
        Referencing: RowExclusive Rows rows Update;
    }
    "DELETE (ON DELETE SET NULL)" => {
        Table: RowExclusive Rows rows Update;
        Referencing: RowExclusive Rows rows NoKeyUpdate;
    }
    "MERGE … UPDATE" => {
        Table: RowExclusive Rows rows NoKeyUpdate since 15;
        Source: AccessShare Rows since 15;
    }
    "MERGE … DELETE" => {
        Table: RowExclusive Rows rows Update since 15;
        Source: AccessShare Rows since 15;
    }
    "COPY … TO" => {
        Table: AccessShare Scan;
    }
    "COPY … FROM" => {
        Table: RowExclusive Rows;
        Referenced: RowShare Rows rows KeyShare;
    }
    "EXPLAIN UPDATE" => {
        Table: RowExclusive Brief "without ANALYZE too";
    }
    "PREPARE … UPDATE" => {
        Table: RowExclusive Brief;
    }
    "nextval(…)"
    | "setval(…)" => {
        Sequence: RowExclusive Brief;
    }
    "SELECT (from a sequence)" => {
        Sequence: AccessShare Brief;
    }
    "LOCK TABLE" => {
        Table: AccessExclusive Brief;
    }
    "LOCK TABLE … IN ACCESS SHARE MODE" => {
        Table: AccessShare Brief;
    }
    "LOCK TABLE … IN ROW SHARE MODE" => {
        Table: RowShare Brief;
    }
    "LOCK TABLE … IN ROW EXCLUSIVE MODE" => {
        Table: RowExclusive Brief;
    }
    "LOCK TABLE … IN SHARE UPDATE EXCLUSIVE MODE" => {
        Table: ShareUpdateExclusive Brief;
    }
    "LOCK TABLE … IN SHARE MODE" => {
        Table: Share Brief;
    }
    "LOCK TABLE … IN SHARE ROW EXCLUSIVE MODE" => {
        Table: ShareRowExclusive Brief;
    }
    "LOCK TABLE … IN EXCLUSIVE MODE" => {
        Table: Exclusive Brief;
    }
    "LOCK TABLE … IN ACCESS EXCLUSIVE MODE" => {
        Table: AccessExclusive Brief;
    }
    "LOCK TABLE (view)" => {
        View: AccessExclusive Brief;
        Source: AccessExclusive Brief "the tables of the view, in the same mode";
    }
    "LOCK TABLE (partitioned)" => {
        Parent: AccessExclusive Brief;
        Partition: AccessExclusive Brief "in the same mode, without ONLY";
    }
    "TRUNCATE" => {
        Table: AccessExclusive Brief;
    }
    "TRUNCATE … CASCADE" => {
        Table: AccessExclusive Brief;
        Referencing: AccessExclusive Brief "they are emptied too";
    }
    "TRUNCATE … RESTART IDENTITY" => {
        Table: AccessExclusive Brief;
        Sequence: AccessExclusive Brief;
    }
    "REFRESH MATERIALIZED VIEW" => {
        MaterializedView: AccessExclusive Rewrite;
        Source: AccessShare Rows;
    }
    "REFRESH MATERIALIZED VIEW CONCURRENTLY" => {
        MaterializedView: Exclusive Scan "only the rows that differ are written";
        Source: AccessShare Rows;
    }
    "CREATE TABLE AS"
    | "SELECT INTO"
    | "CREATE MATERIALIZED VIEW" => {
        Source: AccessShare Rows;
    }
    "ANALYZE" => {
        Table: ShareUpdateExclusive Scan "a sample of it, when it is large";
        Index: AccessShare Brief;
    }
    "ANALYZE (inheritance parent)" => {
        Parent: ShareUpdateExclusive Scan;
        Child: AccessShare Scan until 17;
        Child: ShareUpdateExclusive Scan since 18 "analyzed too, without ONLY";
    }
    "CLUSTER" => {
        Table: AccessExclusive Rewrite;
        Index: AccessExclusive Rewrite;
    }
}
