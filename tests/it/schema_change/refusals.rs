//! What is refused before anything is sent.

use std::time::Duration;

use lockkeeper::{Change, ErrorKind, LockMode, TableName, TableWork};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error, assert_error_in};

use super::millis;

fn short(change: Change) -> Change {
    change.lock_timeout(millis(20)).deadline(GIVE_UP_AFTER)
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_anything_is_sent() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    let schema = scene.keeper.schema();
    for (change, word) in [
        (schema.change(""), "no statement"),
        (schema.change("BEGIN; DROP TABLE t; COMMIT"), "BEGIN"),
        (schema.change("DROP TABLE t; VACUUM t"), "batch"),
        (schema.change("SET search_path = a; DROP TABLE t"), "LOCAL"),
        (
            schema.change("SET LOCAL lock_timeout = 0; DROP TABLE t"),
            "timeout",
        ),
        (
            schema.change("SET LOCAL \"Lock_Timeout\" = 0; DROP TABLE t"),
            "timeout",
        ),
        (
            schema.change(r"COMMENT ON TABLE t IS 'C:\'; COMMIT; DROP TABLE t"),
            "C:",
        ),
        (
            schema.change("DROP TABLE t").lock_timeout(Duration::ZERO),
            "lock_timeout",
        ),
        (
            schema
                .change("DROP TABLE t")
                .statement_timeout(Duration::ZERO),
            "statement_timeout",
        ),
    ] {
        let error = change.await.unwrap_err();
        assert_error(&error, ErrorKind::Config, word);
    }
    // A dry run would commit.
    let smuggled = r"COMMENT ON TABLE t IS 'C:\'; DROP TABLE t; COMMIT";
    let error = schema.dry_run(smuggled).await.unwrap_err();
    assert_error(&error, ErrorKind::Config, r#"COMMIT" on"#);
    assert!(scene.is_true("to_regclass('t') IS NOT NULL").await);
}

#[tokio::test]
async fn what_goes_through_a_table_is_refused_with_the_better_way() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE empty (LIKE t); CREATE TABLE p (id int PRIMARY KEY); \
             CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
             CREATE FUNCTION same() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1'; \
             CREATE DOMAIN positive AS int CHECK (VALUE > 0); \
             ALTER TABLE t ADD COLUMN v varchar(10), ADD COLUMN n numeric(10, 2); \
             CREATE INDEX i ON t (a)",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    for (sql, better) in [
        ("CREATE INDEX ON t (a)", "create_index"),
        ("CREATE UNIQUE INDEX j ON public.t (a)", "create_index"),
        ("ALTER TABLE t ALTER a TYPE bigint", "new column"),
        ("ALTER TABLE t ALTER v TYPE varchar(5)", "new column"),
        ("ALTER TABLE t ALTER n TYPE numeric(10, 3)", "new column"),
        ("ALTER TABLE t ADD c float DEFAULT random()", "add_column"),
        ("ALTER TABLE t ADD c int DEFAULT mine()", "add_column"),
        ("ALTER TABLE t ADD c serial", "add_column"),
        ("ALTER TABLE t ADD c positive", "base type"),
        (
            "ALTER TABLE t ADD c int GENERATED ALWAYS AS (a + 1) STORED",
            "add_column",
        ),
        ("ALTER TABLE t ADD CHECK (a >= 0)", "add_check"),
        (
            "ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES p",
            "add_foreign_key",
        ),
        ("ALTER TABLE t ADD PRIMARY KEY (id)", "add_primary_key"),
        ("ALTER TABLE t ADD UNIQUE (id)", "create_index"),
        ("ALTER TABLE t ALTER id SET NOT NULL", "set_not_null"),
        ("VACUUM FULL t", "replace_table"),
        ("VACUUM (FULL) t", "replace_table"),
        ("VACUUM FULL", "replace_table"),
        ("CLUSTER t USING i", "replace_table"),
        ("REINDEX TABLE t", "CONCURRENTLY"),
        ("REINDEX INDEX i", "CONCURRENTLY"),
    ] {
        let error = schema.change(sql).await.unwrap_err();
        assert_error_in(sql, &error, ErrorKind::Config, better);
        assert_error_in(sql, &error, ErrorKind::Config, ".allow_");
    }
    // What is brief, or of an empty table, or allowed.
    for sql in [
        "ALTER TABLE t ADD c1 timestamptz DEFAULT now()",
        "ALTER TABLE t ADD c2 int NOT NULL DEFAULT same()",
        "ALTER TABLE t ALTER v TYPE varchar(20)",
        "ALTER TABLE t ALTER v TYPE text",
        "ALTER TABLE t ALTER n TYPE numeric(12, 2)",
        "ALTER TABLE t ADD CONSTRAINT k CHECK (a IS NOT NULL) NOT VALID",
        "ALTER TABLE t VALIDATE CONSTRAINT k",
        "ALTER TABLE t ALTER a SET NOT NULL",
        "CREATE INDEX ON empty (a)",
        "ALTER TABLE empty ALTER a TYPE bigint",
        "CREATE TABLE fresh (a int); CREATE INDEX ON fresh (a)",
        "VACUUM t",
        "ANALYZE t",
        "TRUNCATE empty",
    ] {
        schema
            .change(sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    schema
        .change("CREATE INDEX ON t (a)")
        .allow_scan()
        .await
        .unwrap();
    let error = schema
        .change("CLUSTER t USING i")
        .allow_scan()
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Config, ".allow_rewrite()");
    schema
        .change("CLUSTER t USING i")
        .allow_rewrite()
        .await
        .unwrap();
    schema
        .change("VACUUM FULL t")
        .allow_rewrite()
        .await
        .unwrap();
    // Who keeps us from asking for the size does not make it pass.
    let holder = scene.database.connect().await;
    holder.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let refused = short(schema.change("ALTER TABLE t ALTER a TYPE bigint")).await;
    assert_error(&refused.unwrap_err(), ErrorKind::Config, ".allow_rewrite()");
    drop(holder);
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn partitions_count_and_odd_names_are_found() {
    let scene = Scene::with_side_connection(4).await;
    scene
        .observer
        .batch_execute(
            "CREATE SCHEMA \"Odd Schema\"; \
             CREATE TABLE \"Odd Schema\".\"T.\"\"1\" (a int) PARTITION BY LIST (a); \
             CREATE TABLE \"Odd Schema\".one PARTITION OF \"Odd Schema\".\"T.\"\"1\" FOR VALUES IN (1); \
             INSERT INTO \"Odd Schema\".one VALUES (1)",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let table = "\"Odd Schema\".\"T.\"\"1\"";
    let error = schema
        .change(format!("CREATE INDEX ON {table} (a)"))
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Config, r#"on "Odd Schema"."one""#);
    let sql = format!("ALTER TABLE {table} ALTER a TYPE text");
    assert_error(
        &schema.change(&sql).await.unwrap_err(),
        ErrorKind::Config,
        r#"on "Odd Schema"."one""#,
    );
    let preflight = schema.preflight(sql).await.unwrap();
    let name = TableName::from(("Odd Schema", "T.\"1"));
    let lock = preflight.lock_on(&name).unwrap();
    assert_eq!(
        (lock.mode(), lock.work()),
        (LockMode::AccessExclusive, TableWork::Rewrite)
    );
    assert!(
        preflight.lock_on(("Odd Schema", "one")).is_some(),
        "{preflight}"
    );
}
