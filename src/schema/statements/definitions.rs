//! CREATE, ALTER, DROP and other definition statements, except for indexes and the forms of ALTER TABLE.

use super::{LockMode, LockedRelation, StatementLock, TableWork, optional};

statements! {
    in_transaction_block: true;

    "CREATE TABLE … REFERENCES" => {
        Referenced: ShareRowExclusive Brief;
    }
    "CREATE TABLE … LIKE" => {
        Source: AccessShare Brief;
    }
    "CREATE TABLE … INHERITS" => {
        Parent: ShareUpdateExclusive Brief;
    }
    "CREATE TABLE … PARTITION OF" => {
        Parent: AccessExclusive Brief "ATTACH PARTITION takes less";
        DefaultPartition: AccessExclusive Scan;
    }
    "CREATE TABLE … PARTITION OF (foreign key)" => {
        Parent: AccessExclusive Brief;
        Referenced: ShareRowExclusive Brief;
    }
    "DROP TABLE" => {
        Table: AccessExclusive Brief;
        Referenced: AccessExclusive Brief;
    }
    "DROP TABLE … CASCADE" => {
        Table: AccessExclusive Brief;
        Referencing: AccessExclusive Brief "they lose their foreign keys";
    }
    "DROP TABLE (partition)" => {
        Partition: AccessExclusive Brief;
        Parent: AccessExclusive Brief "DETACH PARTITION CONCURRENTLY first takes less";
        DefaultPartition: AccessExclusive Brief;
    }
    "DROP TABLE (inheritance child)" => {
        Table: AccessExclusive Brief "the parent is not locked";
    }
    "DROP FOREIGN TABLE" => {
        Table: AccessExclusive Brief;
    }
    "DROP SCHEMA … CASCADE" => {
        Table: AccessExclusive Brief "every relation in it";
    }
    "CREATE VIEW" => {
        Source: AccessShare Brief;
    }
    "CREATE OR REPLACE VIEW" => {
        View: AccessExclusive Brief;
        Source: AccessShare Brief;
    }
    "ALTER VIEW … SET"
    | "ALTER VIEW … ALTER COLUMN … SET DEFAULT"
    | "ALTER VIEW … RENAME"
    | "ALTER VIEW … RENAME COLUMN"
    | "ALTER VIEW … OWNER TO"
    | "ALTER VIEW … SET SCHEMA" => {
        View: AccessExclusive Brief;
    }
    "DROP VIEW" => {
        View: AccessExclusive Brief "the tables it reads are not locked";
    }
    "ALTER MATERIALIZED VIEW … SET (…)" => {
        MaterializedView: ShareUpdateExclusive Brief;
    }
    "ALTER MATERIALIZED VIEW … CLUSTER ON" => {
        MaterializedView: ShareUpdateExclusive Brief;
        Index: ShareUpdateExclusive Brief;
    }
    "ALTER MATERIALIZED VIEW … ALTER COLUMN … SET STATISTICS" => {
        MaterializedView: ShareUpdateExclusive Brief;
    }
    "ALTER MATERIALIZED VIEW … RENAME"
    | "DROP MATERIALIZED VIEW" => {
        MaterializedView: AccessExclusive Brief;
    }
    "CREATE SEQUENCE … OWNED BY" => {
        Table: AccessShare Brief;
    }
    "ALTER SEQUENCE" => {
        Sequence: ShareRowExclusive Brief "its numbers: RESTART, INCREMENT BY, MAXVALUE, CYCLE and so on";
    }
    "ALTER SEQUENCE … OWNED BY" => {
        Sequence: ShareRowExclusive Brief;
        Table: AccessShare Brief;
    }
    "ALTER SEQUENCE … SET UNLOGGED" => {
        Sequence: AccessExclusive Brief since 15;
    }
    "ALTER SEQUENCE … RENAME"
    | "ALTER SEQUENCE … OWNER TO"
    | "ALTER SEQUENCE … SET SCHEMA"
    | "DROP SEQUENCE" => {
        Sequence: AccessExclusive Brief;
    }
    "CREATE TRIGGER"
    | "CREATE OR REPLACE TRIGGER" => {
        Table: ShareRowExclusive Brief;
    }
    "CREATE CONSTRAINT TRIGGER … FROM" => {
        Table: ShareRowExclusive Brief;
        Source: AccessShare Brief "the table behind FROM";
    }
    "ALTER TRIGGER … RENAME" => {
        Table: AccessExclusive Brief;
    }
    "ALTER TRIGGER … DEPENDS ON EXTENSION" => {
        Table: AccessShare Brief;
    }
    "DROP TRIGGER" => {
        Table: AccessExclusive Brief;
    }
    "DROP FUNCTION … CASCADE" => {
        Table: AccessExclusive Brief "tables with a trigger that calls it";
    }
    "CREATE FUNCTION … BEGIN ATOMIC" => {
        Source: AccessShare Brief;
    }
    "CREATE RULE" => {
        Table: AccessExclusive Brief;
        Source: AccessShare Brief "what its command reads; what it writes, in that command's mode";
    }
    "ALTER RULE … RENAME"
    | "DROP RULE" => {
        Table: AccessExclusive Brief;
    }
    "CREATE POLICY" => {
        Table: AccessExclusive Brief;
        Source: AccessShare Brief "what its expression reads";
    }
    "ALTER POLICY"
    | "ALTER POLICY … RENAME"
    | "DROP POLICY" => {
        Table: AccessExclusive Brief;
    }
    "CREATE STATISTICS"
    | "DROP STATISTICS"
    | "COMMENT ON TABLE"
    | "COMMENT ON COLUMN" => {
        Table: ShareUpdateExclusive Brief;
    }
    "COMMENT ON CONSTRAINT"
    | "COMMENT ON TRIGGER"
    | "COMMENT ON POLICY"
    | "COMMENT ON RULE" => {
        Table: AccessShare Brief;
    }
    "COMMENT ON VIEW" => {
        View: ShareUpdateExclusive Brief;
    }
    "COMMENT ON MATERIALIZED VIEW" => {
        MaterializedView: ShareUpdateExclusive Brief;
    }
    "COMMENT ON SEQUENCE" => {
        Sequence: ShareUpdateExclusive Brief;
    }
    "GRANT"
    | "REVOKE" => {
        Table: AccessShare Brief since 18 "none before";
    }
    "CREATE PUBLICATION … FOR TABLE"
    | "ALTER PUBLICATION … ADD TABLE" => {
        Table: ShareUpdateExclusive Brief;
    }
    "ALTER PUBLICATION … SET TABLE" => {
        Table: ShareUpdateExclusive Brief "those that come and those that go";
    }
    "ALTER PUBLICATION … DROP TABLE" => {
        Table: ShareUpdateExclusive Brief;
    }
    "ALTER DOMAIN … ADD CONSTRAINT" => {
        Table: Share Scan "each table with a column of the domain; none with NOT VALID";
    }
    "ALTER DOMAIN … VALIDATE CONSTRAINT"
    | "ALTER DOMAIN … SET NOT NULL" => {
        Table: Share Scan "each table with a column of the domain";
    }
    "DROP DOMAIN … CASCADE" => {
        Table: AccessExclusive Brief "tables that lose a column";
    }
    "ALTER TYPE … ADD ATTRIBUTE … CASCADE"
    | "ALTER TYPE … DROP ATTRIBUTE … CASCADE" => {
        Table: AccessExclusive Brief "each table OF the type";
    }
    "ALTER TYPE … ALTER ATTRIBUTE … CASCADE" => {
        Table: AccessExclusive Rewrite "each table OF the type";
    }
    "ALTER TYPE … RENAME ATTRIBUTE … CASCADE" => {
        Table: AccessExclusive Brief "each table OF the type";
    }
    "DROP TYPE … CASCADE" => {
        Table: AccessExclusive Brief "each table OF the type, and those that lose a column";
    }
    "ALTER FOREIGN TABLE … OPTIONS"
    | "ALTER FOREIGN TABLE … ALTER COLUMN … OPTIONS" => {
        Table: AccessExclusive Brief;
    }
    "ALTER EXTENSION … ADD TABLE" => {
        Table: ShareUpdateExclusive Brief;
    }
    "pg_restore_relation_stats(…)"
    | "pg_clear_relation_stats(…)" => {
        Table: ShareUpdateExclusive Brief since 18;
    }
}
