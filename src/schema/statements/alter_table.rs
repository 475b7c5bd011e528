//! The forms of ALTER TABLE.
//!
//! `AlterTableGetLockLevel` in `src/backend/commands/tablecmds.c` decides the mode on the table itself. The code that
//! locks other tables is spread over that file.

use super::{LockMode, LockedRelation, StatementLock, TableWork, optional};

statements! {
    in_transaction_block: true;

    "ALTER TABLE … ADD COLUMN" => {
        Table: AccessExclusive Brief "with a default too that is the same for every row, and with NOT NULL";
    }
    "ALTER TABLE … ADD COLUMN (volatile default)" => {
        Table: AccessExclusive Rewrite "such as random() or clock_timestamp(); serial columns are of this kind";
    }
    "ALTER TABLE … ADD COLUMN … GENERATED … AS IDENTITY"
    | "ALTER TABLE … ADD COLUMN … GENERATED … STORED" => {
        Table: AccessExclusive Rewrite;
    }
    "ALTER TABLE … ADD COLUMN … GENERATED … VIRTUAL" => {
        Table: AccessExclusive Brief since 18;
    }
    "ALTER TABLE … ADD COLUMN (domain with a constraint)" => {
        Table: AccessExclusive Rewrite;
    }
    "ALTER TABLE … ADD COLUMN … CHECK"
    | "ALTER TABLE … ADD COLUMN … UNIQUE" => {
        Table: AccessExclusive Scan;
    }
    "ALTER TABLE … ADD COLUMN … REFERENCES" => {
        Table: AccessExclusive Brief;
        Referenced: ShareRowExclusive Brief;
    }
    "ALTER TABLE … DROP COLUMN" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … DROP COLUMN (foreign key)" => {
        Table: AccessExclusive Brief;
        Referenced: AccessExclusive Brief;
    }
    "ALTER TABLE … DROP COLUMN … CASCADE (key)" => {
        Table: AccessExclusive Brief;
        Referencing: AccessExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … TYPE" => {
        Table: AccessExclusive Rewrite;
    }
    "ALTER TABLE … ALTER COLUMN … TYPE (binary coercible)" => {
        Table: AccessExclusive Brief "such as varchar(10) to varchar(20) or text";
    }
    "ALTER TABLE … ALTER COLUMN … TYPE (foreign key)" => {
        Table: AccessExclusive Rewrite;
        Referenced: AccessExclusive Scan;
    }
    "ALTER TABLE … ALTER COLUMN … TYPE (key)" => {
        Table: AccessExclusive Rewrite;
        Referencing: AccessExclusive Scan;
    }
    "ALTER TABLE … ALTER COLUMN … SET DEFAULT"
    | "ALTER TABLE … ALTER COLUMN … DROP DEFAULT" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … SET NOT NULL" => {
        Table: AccessExclusive Scan;
    }
    "ALTER TABLE … ALTER COLUMN … SET NOT NULL (implied by a CHECK)" => {
        Table: AccessExclusive Brief "a valid CHECK (column IS NOT NULL) spares the scan";
    }
    "ALTER TABLE … ALTER COLUMN … DROP NOT NULL" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … SET EXPRESSION" => {
        Table: AccessExclusive Rewrite since 17;
    }
    "ALTER TABLE … ALTER COLUMN … DROP EXPRESSION"
    | "ALTER TABLE … ALTER COLUMN … ADD GENERATED … AS IDENTITY" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … SET GENERATED"
    | "ALTER TABLE … ALTER COLUMN … RESTART" => {
        Table: AccessExclusive Brief;
        Sequence: ShareRowExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … DROP IDENTITY" => {
        Table: AccessExclusive Brief;
        Sequence: AccessExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … SET STATISTICS" => {
        Table: ShareUpdateExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … SET (…)" => {
        Table: ShareUpdateExclusive Brief "n_distinct, n_distinct_inherited";
    }
    "ALTER TABLE … ALTER COLUMN … RESET (…)" => {
        Table: ShareUpdateExclusive Brief;
    }
    "ALTER TABLE … ALTER COLUMN … SET STORAGE"
    | "ALTER TABLE … ALTER COLUMN … SET COMPRESSION" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … ADD CHECK" => {
        Table: AccessExclusive Scan;
    }
    "ALTER TABLE … ADD CHECK … NOT VALID" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … ADD CHECK … NOT ENFORCED" => {
        Table: AccessExclusive Brief since 18;
    }
    "ALTER TABLE … ADD NOT NULL" => {
        Table: AccessExclusive Scan since 18;
    }
    "ALTER TABLE … ADD NOT NULL … NOT VALID" => {
        Table: AccessExclusive Brief since 18;
    }
    "ALTER TABLE … ADD UNIQUE"
    | "ALTER TABLE … ADD PRIMARY KEY"
    | "ALTER TABLE … ADD EXCLUDE" => {
        Table: AccessExclusive Scan;
    }
    "ALTER TABLE … ADD UNIQUE USING INDEX" => {
        Table: AccessExclusive Brief;
        Index: AccessShare Brief;
    }
    "ALTER TABLE … ADD PRIMARY KEY USING INDEX" => {
        Table: AccessExclusive Brief "when its columns are NOT NULL already";
        Index: AccessShare Brief;
    }
    "ALTER TABLE … ADD PRIMARY KEY USING INDEX (nullable column)" => {
        Table: AccessExclusive Scan;
        Index: AccessShare Brief;
    }
    "ALTER TABLE … ADD FOREIGN KEY" => {
        Table: ShareRowExclusive Scan;
        Referenced: ShareRowExclusive Scan;
    }
    "ALTER TABLE … ADD FOREIGN KEY … NOT VALID" => {
        Table: ShareRowExclusive Brief;
        Referenced: ShareRowExclusive Brief;
    }
    "ALTER TABLE … ADD FOREIGN KEY … NOT ENFORCED" => {
        Table: ShareRowExclusive Brief since 18;
        Referenced: ShareRowExclusive Brief since 18;
    }
    "ALTER TABLE … ALTER CONSTRAINT … DEFERRABLE" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … ALTER CONSTRAINT … ENFORCED" => {
        Table: AccessExclusive Scan since 18;
        Referenced: ShareRowExclusive Scan since 18;
    }
    "ALTER TABLE … ALTER CONSTRAINT … NOT ENFORCED" => {
        Table: AccessExclusive Brief since 18;
        Referenced: AccessExclusive Brief since 18;
    }
    "ALTER TABLE … ALTER CONSTRAINT … INHERIT"
    | "ALTER TABLE … ALTER CONSTRAINT … NO INHERIT" => {
        Table: AccessExclusive Brief since 18;
    }
    "ALTER TABLE … VALIDATE CONSTRAINT" => {
        Table: ShareUpdateExclusive Scan "a CHECK, since 18 a NOT NULL too";
    }
    "ALTER TABLE … VALIDATE CONSTRAINT (foreign key)" => {
        Table: ShareUpdateExclusive Scan;
        Referenced: RowShare Scan;
    }
    "ALTER TABLE … DROP CONSTRAINT" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … DROP CONSTRAINT (foreign key)" => {
        Table: AccessExclusive Brief;
        Referenced: AccessExclusive Brief;
    }
    "ALTER TABLE … DROP CONSTRAINT … CASCADE (key)" => {
        Table: AccessExclusive Brief;
        Index: AccessExclusive Brief;
        Referencing: AccessExclusive Brief;
    }
    "ALTER TABLE … DISABLE TRIGGER"
    | "ALTER TABLE … ENABLE TRIGGER"
    | "ALTER TABLE … ENABLE REPLICA TRIGGER"
    | "ALTER TABLE … ENABLE ALWAYS TRIGGER" => {
        Table: ShareRowExclusive Brief;
    }
    "ALTER TABLE … DISABLE RULE"
    | "ALTER TABLE … ENABLE RULE"
    | "ALTER TABLE … ENABLE REPLICA RULE"
    | "ALTER TABLE … ENABLE ALWAYS RULE"
    | "ALTER TABLE … DISABLE ROW LEVEL SECURITY"
    | "ALTER TABLE … ENABLE ROW LEVEL SECURITY"
    | "ALTER TABLE … FORCE ROW LEVEL SECURITY"
    | "ALTER TABLE … NO FORCE ROW LEVEL SECURITY" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … CLUSTER ON" => {
        Table: ShareUpdateExclusive Brief;
        Index: ShareUpdateExclusive Brief;
    }
    "ALTER TABLE … SET WITHOUT CLUSTER" => {
        Table: ShareUpdateExclusive Brief;
    }
    "ALTER TABLE … SET WITHOUT OIDS" => {
        Table: AccessExclusive Brief "does nothing";
    }
    "ALTER TABLE … SET ACCESS METHOD" => {
        Table: AccessExclusive Rewrite since 15;
    }
    "ALTER TABLE … SET TABLESPACE" => {
        Table: AccessExclusive Rewrite;
    }
    "ALTER TABLE ALL IN TABLESPACE … SET TABLESPACE" => {
        Table: AccessExclusive Rewrite "every table in it at once";
    }
    "ALTER TABLE … SET LOGGED"
    | "ALTER TABLE … SET UNLOGGED" => {
        Table: AccessExclusive Rewrite;
    }
    "ALTER TABLE … SET (…)" => {
        Table: ShareUpdateExclusive Brief "fillfactor, toast_tuple_target, parallel_workers, autovacuum and vacuum settings";
    }
    "ALTER TABLE … SET (user_catalog_table)" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … RESET (…)" => {
        Table: ShareUpdateExclusive Brief "ACCESS EXCLUSIVE for user_catalog_table";
    }
    "ALTER TABLE … INHERIT" => {
        Table: AccessExclusive Brief;
        Parent: ShareUpdateExclusive Brief;
    }
    "ALTER TABLE … NO INHERIT" => {
        Table: AccessExclusive Brief;
        Parent: AccessShare Brief;
    }
    "ALTER TABLE … OF"
    | "ALTER TABLE … NOT OF"
    | "ALTER TABLE … OWNER TO"
    | "ALTER TABLE … REPLICA IDENTITY" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … REPLICA IDENTITY USING INDEX" => {
        Table: AccessExclusive Brief;
        Index: Share Brief;
    }
    "ALTER TABLE … RENAME"
    | "ALTER TABLE … RENAME COLUMN"
    | "ALTER TABLE … RENAME CONSTRAINT" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TABLE … SET SCHEMA" => {
        Table: AccessExclusive Brief;
        Sequence: AccessExclusive Brief "those that its columns own";
    }
    "ALTER TABLE … ATTACH PARTITION" => {
        Parent: ShareUpdateExclusive Brief;
        Partition: AccessExclusive Scan;
        DefaultPartition: AccessExclusive Scan;
    }
    "ALTER TABLE … ATTACH PARTITION (implied by a CHECK)" => {
        Parent: ShareUpdateExclusive Brief;
        Partition: AccessExclusive Brief "a valid CHECK that implies the bounds spares the scan";
    }
    "ALTER TABLE … ATTACH PARTITION (foreign key)" => {
        Parent: ShareUpdateExclusive Brief;
        Partition: AccessExclusive Scan;
        Referenced: ShareRowExclusive Scan;
    }
    "ALTER TABLE … ATTACH PARTITION (referred to)" => {
        Parent: ShareUpdateExclusive Brief;
        Partition: AccessExclusive Scan;
        Referencing: AccessShare Brief until 14;
        Referencing: ShareRowExclusive Brief since 15;
    }
    "ALTER TABLE … DETACH PARTITION" => {
        Parent: AccessExclusive Brief;
        Partition: AccessExclusive Brief;
        DefaultPartition: AccessExclusive Brief;
    }
    "ALTER TABLE … DETACH PARTITION (foreign key)" => {
        Parent: AccessExclusive Brief;
        Partition: AccessExclusive Brief;
        Referenced: ShareRowExclusive Brief;
    }
    "ALTER TABLE … DETACH PARTITION (referred to)" => {
        Parent: AccessExclusive Brief;
        Partition: AccessExclusive Scan;
        Referencing: AccessExclusive Scan "its rows must not refer to the partition";
    }
    "ALTER TABLE … DETACH PARTITION … FINALIZE" => {
        Parent: ShareUpdateExclusive Brief;
        Partition: AccessExclusive Brief;
    }
}
