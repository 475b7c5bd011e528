//! What a change is refused for, and what preflight says of it, one kind of mistake after the other.

use lockkeeper::{ErrorKind, LockMode, Preflight, TableWork};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error, assert_error_in};

/// A scene with the table `t (id int PRIMARY KEY, a int, b int)` of 5000 rows.
async fn scene(more: &str) -> Scene {
    let scene = Scene::with_side_connection(4).await;
    scene
        .run(
            "CREATE TABLE t (id int PRIMARY KEY, a int, b int); \
             INSERT INTO t SELECT n, n, n FROM generate_series(1, 5000) n",
        )
        .await;
    scene.run(more).await;
    scene
}

async fn preflight(scene: &Scene, sql: &str) -> Preflight {
    match scene.keeper.schema().preflight(sql).await {
        Ok(preflight) => preflight,
        Err(error) => panic!("{sql}: {error}: {:?}", std::error::Error::source(&error)),
    }
}

async fn assert_work(scene: &Scene, sql: &str, table: &str, work: TableWork) {
    let preflight = preflight(scene, sql).await;
    let lock = preflight.lock_on(table);
    assert_eq!(
        lock.map(lockkeeper::PreflightLock::work),
        Some(work),
        "{sql}: {preflight}"
    );
}

async fn assert_mode(scene: &Scene, sql: &str, table: &str, mode: Option<LockMode>) {
    let preflight = preflight(scene, sql).await;
    let lock = preflight.lock_on(table);
    assert_eq!(
        lock.map(lockkeeper::PreflightLock::mode),
        mode,
        "{sql}: {table}: {preflight}"
    );
}

/// Refused with these words; nothing is changed.
async fn assert_refused(scene: &Scene, sql: &str, words: &str) {
    let Err(error) = scene.keeper.schema().change(sql).await else {
        panic!("{sql}: not refused");
    };
    assert_error_in(sql, &error, ErrorKind::Config, words);
}

/// Passes, and is rolled back, if it can be.
async fn assert_passes(scene: &Scene, sql: &str) {
    if let Err(error) = scene.keeper.schema().change(sql).await {
        panic!("{sql}: {error}: {:?}", std::error::Error::source(&error));
    }
}

const AX: Option<LockMode> = Some(LockMode::AccessExclusive);

#[tokio::test]
async fn a_new_column_is_judged_by_all_that_fills_and_checks_it() {
    let scene = scene(
        "CREATE TABLE r (id int PRIMARY KEY); INSERT INTO r VALUES (1); \
         CREATE DOMAIN random_id AS uuid DEFAULT gen_random_uuid(); CREATE DOMAIN above AS random_id; \
         CREATE SEQUENCE s; CREATE DOMAIN counted AS int DEFAULT nextval('s'); \
         CREATE DOMAIN constant AS int DEFAULT 7",
    )
    .await;
    for ty in ["random_id", "above", "counted"] {
        let sql = format!("ALTER TABLE t ADD COLUMN u {ty}");
        assert_work(&scene, &sql, "t", TableWork::Rewrite).await;
        assert_refused(&scene, &sql, "rewrites it").await;
    }
    // A default of its own takes the place of the domain's.
    let sql = "ALTER TABLE t ADD COLUMN u random_id DEFAULT '00000000-0000-0000-0000-000000000000'";
    assert_work(&scene, sql, "t", TableWork::Brief).await;
    assert_passes(&scene, "ALTER TABLE t ADD COLUMN c constant").await;
    let sql = "ALTER TABLE t ADD COLUMN u int DEFAULT 1 REFERENCES r";
    assert_work(&scene, sql, "t", TableWork::Scan).await;
    assert_refused(&scene, sql, "add_foreign_key").await;
    let sql = "ALTER TABLE t ADD COLUMN u int, ADD COLUMN w int REFERENCES r";
    assert_work(&scene, sql, "t", TableWork::Brief).await;
    assert_mode(&scene, sql, "r", Some(LockMode::ShareRowExclusive)).await;
    // What a form does not know is not read over.
    let sql = "ALTER TABLE t ADD COLUMN u int FROBNICATED";
    assert!(!preflight(&scene, sql).await.is_clear());
}

#[tokio::test]
async fn a_new_type_is_judged_by_indexes_and_constraints_too() {
    let scene = scene(
        "ALTER TABLE t ADD v varchar(10) CHECK (v <> ''), ADD w varchar(10), ADD x varchar(10), ADD i interval(0), \
         ADD y varchar(10); \
         CREATE INDEX ON t (x); CREATE INDEX ON t (lower(y)); \
         CREATE TABLE p (id int, name varchar(64), UNIQUE (id, name)) PARTITION BY RANGE (id); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (1000); INSERT INTO p VALUES (1, 'a')",
    )
    .await;
    for (column, ty, work) in [
        ("v", "varchar(20)", TableWork::Scan),
        ("w", "varchar(20)", TableWork::Brief),
        ("x", "varchar(20)", TableWork::Brief),
        ("x", "text", TableWork::Brief),
        ("y", "varchar(20)", TableWork::Scan),
        ("id", "oid", TableWork::Scan),
        ("a", "oid", TableWork::Brief),
        ("a", "bigint", TableWork::Rewrite),
        ("i", "interval(3)", TableWork::Brief),
        ("i", "interval hour", TableWork::Rewrite),
    ] {
        let sql = format!("ALTER TABLE t ALTER {column} TYPE {ty}");
        assert_work(&scene, &sql, "t", work).await;
        // And so it is.
        scene.run("BEGIN").await;
        let file = "SELECT relfilenode::int FROM pg_class WHERE relname = 't'";
        let scans = "SELECT pg_stat_get_xact_numscans('t'::regclass)::int";
        let (before, read_before) = (scene.column(file).await, scene.column(scans).await);
        scene.run(&sql).await;
        let did = if scene.column(file).await != before {
            TableWork::Rewrite
        } else if scene.column(scans).await != read_before {
            TableWork::Scan
        } else {
            TableWork::Brief
        };
        scene.run("ROLLBACK").await;
        assert_eq!(did, work, "{sql}");
    }
    let sql = "ALTER TABLE p ALTER name TYPE varchar(127)";
    assert_work(&scene, sql, "p1", TableWork::Scan).await;
    assert_refused(&scene, sql, r#""p1""#).await;
}

#[tokio::test]
async fn a_batch_is_judged_as_one_transaction() {
    let scene = scene("CREATE TABLE versions (v text); INSERT INTO versions VALUES ('1')").await;
    for (sql, words) in [
        (
            "ALTER TABLE t ADD CONSTRAINT c CHECK (id > 0) NOT VALID; ALTER TABLE t VALIDATE CONSTRAINT c",
            "ACCESS EXCLUSIVE on it",
        ),
        (
            "ALTER TABLE t ADD CONSTRAINT c CHECK (id > 0) NOT VALID, VALIDATE CONSTRAINT c",
            "ACCESS EXCLUSIVE on it",
        ),
        (
            "ALTER TABLE t ADD COLUMN c int; UPDATE t SET c = 1",
            "works on its rows",
        ),
        (
            "ALTER TABLE t ADD COLUMN c int; DELETE FROM t WHERE a = 1",
            "works on its rows",
        ),
        (
            "ALTER TABLE t ADD COLUMN c int; INSERT INTO t SELECT id + 9999 FROM t",
            "works on its rows",
        ),
        (
            "LOCK TABLE t; ALTER TABLE t ADD COLUMN c int; SELECT count(*) FROM t",
            "works on its rows",
        ),
        (
            "ALTER TABLE t RENAME TO tt; CREATE INDEX ON tt (a)",
            "create_index",
        ),
        (
            "ALTER TABLE t RENAME a TO y; ALTER TABLE t ALTER y SET NOT NULL",
            "set_not_null",
        ),
        (
            "CREATE SCHEMA s; ALTER TABLE t SET SCHEMA s; ALTER TABLE s.t ALTER a TYPE bigint",
            "new column",
        ),
        (
            "ALTER TABLE versions ADD COLUMN x int; ALTER TABLE t ADD CONSTRAINT c CHECK (id > 0) NOT VALID; \
             ALTER TABLE t VALIDATE CONSTRAINT c",
            "others wait as long",
        ),
        (
            "CREATE TABLE new (LIKE t); ALTER TABLE t RENAME TO old; ALTER TABLE old ALTER a TYPE text",
            "new column",
        ),
    ] {
        assert_refused(&scene, sql, words).await;
        assert!(scene.is_true("to_regclass('t') IS NOT NULL").await, "{sql}");
    }
    // One lock on one table does not make work on another one harmless.
    scene
        .run("ALTER TABLE t ADD CONSTRAINT d CHECK (id > 0) NOT VALID")
        .await;
    let sql = "ALTER TABLE versions ADD COLUMN x int; ALTER TABLE t VALIDATE CONSTRAINT d";
    assert_refused(&scene, sql, r#"ACCESS EXCLUSIVE on "public"."versions""#).await;
    for sql in [
        // Few rows, or rows of what the batch has made itself.
        "ALTER TABLE t ADD COLUMN c int; UPDATE versions SET v = '2'",
        "ALTER TABLE t ADD COLUMN d int; INSERT INTO versions VALUES ('3')",
        "CREATE TABLE fresh (id int, a int); INSERT INTO fresh SELECT id, a FROM t; CREATE INDEX ON fresh (a); \
         ALTER TABLE fresh ALTER a SET NOT NULL",
        "ALTER TABLE t RENAME TO u; ALTER TABLE u RENAME TO t",
        "ALTER TABLE t VALIDATE CONSTRAINT d",
    ] {
        assert_passes(&scene, sql).await;
    }
    scene
        .keeper
        .schema()
        .change("ALTER TABLE t ADD COLUMN e int; UPDATE t SET e = 1")
        .allow_scan()
        .await
        .unwrap();
    // What a statement changes is not proven by what the catalogs still say.
    scene
        .run("ALTER TABLE t ADD CONSTRAINT n CHECK (a IS NOT NULL)")
        .await;
    assert_work(
        &scene,
        "ALTER TABLE t ALTER a SET NOT NULL",
        "t",
        TableWork::Brief,
    )
    .await;
    for sql in [
        "ALTER TABLE t DROP CONSTRAINT n; ALTER TABLE t ALTER a SET NOT NULL",
        "ALTER TABLE t DROP CONSTRAINT n, ALTER a SET NOT NULL",
        "ALTER TABLE t RENAME a TO z; ALTER TABLE t RENAME b TO a; ALTER TABLE t ALTER a SET NOT NULL",
    ] {
        assert_work(&scene, sql, "t", TableWork::Scan).await;
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn what_is_not_understood_is_not_clear() {
    let scene = scene(
        "CREATE DOMAIN d AS int; CREATE TABLE with_d (a d); INSERT INTO with_d VALUES (1); \
         CREATE TYPE ct AS (a int); CREATE TABLE of_ct OF ct; INSERT INTO of_ct VALUES (1); \
         CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    )
    .await;
    for (sql, part) in [
        (
            "DO $$ BEGIN EXECUTE 'ALTER TABLE t ADD c int'; END $$",
            "DO",
        ),
        ("CALL something()", "CALL"),
        ("SELECT mine()", "mine"),
        ("REINDEX DATABASE", "REINDEX"),
        ("ALTER TABLE t ADD c int, FROBNICATE", "FROBNICATE"),
        ("ALTER TABLE t ALTER a SET GENERATION 5", "SET GENERATION"),
        (
            "CREATE SCHEMA s CREATE TABLE x (a int REFERENCES t)",
            "CREATE SCHEMA",
        ),
        (
            "WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
            "WITH",
        ),
        (
            "SET LOCAL search_path = elsewhere; DROP TABLE t",
            "search_path",
        ),
    ] {
        let preflight = preflight(&scene, sql).await;
        assert!(!preflight.is_clear(), "{sql}");
        assert_eq!(preflight.unrecognized().len(), 1, "{sql}");
        let found = &preflight.unrecognized_parts()[0];
        assert!(found.contains(part), "{sql}: {found}");
        assert!(
            preflight.to_string().contains("not understood"),
            "{preflight}"
        );
        assert_refused(&scene, sql, ".allow_unknown()").await;
    }
    // What is known of a statement is said.
    assert_mode(&scene, "ALTER TABLE t ADD c int, FROBNICATE", "t", AX).await;
    let allowed = scene
        .keeper
        .schema()
        .change("DO $$ BEGIN PERFORM 1; END $$");
    allowed.allow_unknown().await.unwrap();
    for sql in [
        "SELECT 1",
        "SELECT count(*) FROM t",
        "SELECT setval('t_seq', 1) WHERE false AND now() IS NULL",
    ] {
        assert!(preflight(&scene, sql).await.is_clear(), "{sql}");
    }
    // What was not understood once is.
    let sql = "ALTER DOMAIN d ADD CONSTRAINT c CHECK (VALUE > 0)";
    assert_mode(&scene, sql, "with_d", Some(LockMode::Share)).await;
    assert_refused(&scene, sql, "reads all of it").await;
    let sql = "ALTER TYPE ct ALTER ATTRIBUTE a TYPE bigint CASCADE";
    assert_work(&scene, sql, "of_ct", TableWork::Rewrite).await;
    assert_refused(&scene, sql, "rewrites it").await;
    assert_passes(
        &scene,
        "ALTER DOMAIN d ADD CONSTRAINT c CHECK (VALUE > 0) NOT VALID",
    )
    .await;
    scene
        .run(
            "CREATE FUNCTION on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; \
             CREATE EVENT TRIGGER watch ON ddl_command_start EXECUTE FUNCTION on_ddl()",
        )
        .await;
    let watched = preflight(&scene, "ALTER TABLE t ADD c int").await;
    assert!(
        watched.unrecognized_parts()[0].contains("watch"),
        "{watched}"
    );
}

#[tokio::test]
async fn statements_without_a_table_name_the_tables_that_they_lock() {
    let scene = scene(
        "CREATE VIEW v AS SELECT 1 AS x; CREATE TABLE u (id int); CREATE INDEX u_id ON u (id); CLUSTER u USING u_id; \
         CREATE MATERIALIZED VIEW m AS SELECT 1 AS x; CREATE ROLE role_of_preflight; \
         CREATE TABLE owned (id serial); ALTER TABLE owned OWNER TO role_of_preflight",
    )
    .await;
    let update = Some(LockMode::ShareUpdateExclusive);
    for (sql, table, mode) in [
        ("VACUUM FULL", "t", AX),
        ("VACUUM FULL", "u", AX),
        ("VACUUM", "m", update),
        ("ANALYZE", "t", update),
        ("CLUSTER", "u", AX),
        ("CLUSTER", "t", None),
        ("CREATE PUBLICATION p FOR TABLE t", "t", update),
        ("CREATE TEMP TABLE x (c int) INHERITS (t)", "t", update),
        ("COMMENT ON VIEW v IS 'x'", "v", update),
        ("COMMENT ON MATERIALIZED VIEW m IS 'x'", "m", update),
        (
            "REASSIGN OWNED BY role_of_preflight TO CURRENT_USER",
            "owned",
            AX,
        ),
        (
            "REASSIGN OWNED BY role_of_preflight TO CURRENT_USER",
            "owned_id_seq",
            AX,
        ),
        ("DROP OWNED BY role_of_preflight", "owned", AX),
        ("ALTER VIEW v SET (security_barrier)", "v", AX),
        ("ALTER TABLE v SET (security_barrier)", "v", AX),
        ("ALTER TABLE t SET (fillfactor = 70)", "t", update),
        (
            "ALTER TABLE t SET (fillfactor = 70, user_catalog_table = false)",
            "t",
            AX,
        ),
        ("ANALYZE t (a), u", "u", update),
        ("ANALYZE t (a), u", "t", update),
        ("VACUUM (ANALYZE) t (a, b), u (id)", "u", update),
        (
            "CREATE TABLE IF NOT EXISTS t (a int REFERENCES u)",
            "u",
            None,
        ),
    ] {
        assert_mode(&scene, sql, table, mode).await;
    }
    assert_refused(&scene, "VACUUM FULL", "rewrites it").await;
    scene
        .run("DROP OWNED BY role_of_preflight; DROP ROLE role_of_preflight")
        .await;
}

#[tokio::test]
async fn partitions_indexes_and_dependents_are_among_the_locks() {
    let scene = scene(
        "CREATE TABLE p (id int, k int) PARTITION BY LIST (id); CREATE INDEX p_id ON p (id); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE pd PARTITION OF p DEFAULT PARTITION BY LIST (k); CREATE TABLE pd1 PARTITION OF pd DEFAULT; \
         INSERT INTO p SELECT n, n FROM generate_series(1, 100) n; \
         CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY REFERENCES a); \
         CREATE TABLE c (id int REFERENCES b); \
         CREATE VIEW v AS SELECT * FROM a; CREATE VIEW vv AS SELECT * FROM v; \
         CREATE TABLE s (id serial, n int GENERATED ALWAYS AS IDENTITY); \
         CREATE TABLE keyed (id int REFERENCES a) PARTITION BY LIST (id); CREATE TABLE same (id int REFERENCES a); \
         CREATE TABLE other (id int); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
         CREATE TRIGGER g BEFORE INSERT ON p FOR EACH ROW EXECUTE FUNCTION f(); \
         CREATE POLICY pp ON p USING (true)",
    )
    .await;
    let row_exclusive = Some(LockMode::ShareRowExclusive);
    for (sql, table, mode) in [
        (
            "CREATE TRIGGER h BEFORE INSERT ON p FOR EACH ROW EXECUTE FUNCTION f()",
            "p1",
            row_exclusive,
        ),
        (
            "CREATE TRIGGER h BEFORE INSERT ON p FOR EACH STATEMENT EXECUTE FUNCTION f()",
            "p1",
            None,
        ),
        ("DROP TRIGGER g ON p", "p1", AX),
        ("DROP POLICY pp ON p", "p1", None),
        ("DROP INDEX p_id", "p1", AX),
        ("DROP INDEX p_id", "pd1", AX),
        ("CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2)", "pd", AX),
        (
            "CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2)",
            "pd1",
            AX,
        ),
        ("TRUNCATE a CASCADE", "b", AX),
        ("TRUNCATE a CASCADE", "c", AX),
        ("DROP TABLE a CASCADE", "vv", AX),
        ("DROP TABLE a CASCADE", "b", AX),
        ("DROP TABLE a CASCADE", "c", None),
        ("DROP TABLE s", "s_id_seq", AX),
        ("ALTER TABLE s OWNER TO CURRENT_USER", "s_id_seq", AX),
        (
            "ALTER TABLE s ALTER n TYPE bigint",
            "s_n_seq",
            row_exclusive,
        ),
        (
            "ALTER TABLE keyed ATTACH PARTITION same FOR VALUES IN (1)",
            "a",
            AX,
        ),
        (
            "ALTER TABLE keyed ATTACH PARTITION other FOR VALUES IN (1)",
            "a",
            row_exclusive,
        ),
        ("DROP TYPE v CASCADE", "vv", AX),
        ("DROP FUNCTION f CASCADE", "p1", AX),
        ("LOCK TABLE vv IN SHARE MODE", "a", Some(LockMode::Share)),
    ] {
        assert_mode(&scene, sql, table, mode).await;
    }
    let sql = "CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2)";
    assert_work(&scene, sql, "pd1", TableWork::Scan).await;
    assert_refused(&scene, sql, r#""pd1""#).await;
    let is_18 = scene.database.server().major() >= 18;
    if is_18 {
        scene
            .run(
                "CREATE TABLE parent (id int CONSTRAINT nn NOT NULL NO INHERIT); CREATE TABLE child () INHERITS (parent); \
                 INSERT INTO child VALUES (1)",
            )
            .await;
        let sql = "ALTER TABLE parent ALTER CONSTRAINT nn INHERIT";
        assert_work(&scene, sql, "child", TableWork::Scan).await;
        assert_refused(&scene, sql, r#""child""#).await;
    }
}

#[tokio::test]
async fn what_is_not_touched_is_not_named() {
    let scene = scene(
        "CREATE TABLE parent (id int, a int); CREATE TABLE child () INHERITS (parent); \
         INSERT INTO child SELECT n, n FROM generate_series(1, 100) n; \
         ALTER TABLE t ADD CONSTRAINT both_set CHECK (a IS NOT NULL AND b > 0); \
         ALTER TABLE t ADD CONSTRAINT one_of CHECK (a IS NOT NULL OR b IS NOT NULL)",
    )
    .await;
    for sql in [
        "ALTER TABLE ONLY parent ADD CONSTRAINT c CHECK (id > 0) NO INHERIT",
        "CREATE INDEX ON parent (a)",
        "ALTER TABLE parent ADD CONSTRAINT d CHECK (a > 0) NO INHERIT",
        "ALTER TABLE ONLY parent ALTER a SET DEFAULT 1",
    ] {
        // Since 18 the children of a CHECK with NO INHERIT are locked, though not read.
        let is_locked =
            scene.database.server().major() >= 18 && sql.starts_with("ALTER TABLE parent");
        assert_mode(&scene, sql, "child", AX.filter(|_| is_locked)).await;
        assert_passes(&scene, sql).await;
    }
    assert_passes(&scene, "ALTER TABLE t ALTER a SET NOT NULL").await;
    assert_refused(&scene, "ALTER TABLE t ALTER b SET NOT NULL", "set_not_null").await;
    // A table that the same batch makes has no rows that others wait for.
    let sql = "CREATE TABLE fresh (id int); ALTER TABLE fresh ADD PRIMARY KEY (id); ALTER TABLE fresh ALTER id TYPE bigint";
    assert!(preflight(&scene, sql).await.locks().is_empty());
    assert_passes(&scene, sql).await;
}

#[tokio::test]
async fn attach_reads_the_partition_unless_a_check_implies_its_bounds() {
    let scene = scene(
        "CREATE TABLE p (v int NOT NULL, w int) PARTITION BY RANGE (v); CREATE TABLE l (v int, w int) PARTITION BY LIST (v); \
         CREATE TABLE q (v int NOT NULL, w int CHECK (w > 0)); INSERT INTO q VALUES (1, 1)",
    )
    .await;
    let ranged = "ALTER TABLE p ATTACH PARTITION q FOR VALUES FROM (0) TO (10)";
    let listed = "ALTER TABLE l ATTACH PARTITION q FOR VALUES IN (1, 2)";
    for check in [
        "w > 0",
        "v > 0",
        "v >= 0 AND v < 11",
        "v >= 0 OR v < 10",
        "v >= 0 AND v <= 10",
        "v <> 3",
    ] {
        scene
            .run(&format!(
                "ALTER TABLE q ADD CONSTRAINT bounds CHECK ({check})"
            ))
            .await;
        assert_refused(&scene, ranged, "add_check").await;
        assert_refused(&scene, listed, "add_check").await;
        scene.run("ALTER TABLE q DROP CONSTRAINT bounds").await;
    }
    scene
        .run("ALTER TABLE q ADD CONSTRAINT bounds CHECK (v >= 0 AND v < 10) NOT VALID")
        .await;
    assert_refused(&scene, ranged, "add_check").await;
    scene.run("ALTER TABLE q VALIDATE CONSTRAINT bounds").await;
    assert_passes(&scene, ranged).await;
    scene.run("ALTER TABLE p DETACH PARTITION q; ALTER TABLE q ADD CONSTRAINT listed CHECK (v IN (1, 2))").await;
    assert_passes(&scene, listed).await;
}

#[tokio::test]
async fn control_characters_in_names_are_escaped() {
    let scene = scene("CREATE TABLE \"esc\u{1b}[31m\u{7}\nbell\" (id int); INSERT INTO \"esc\u{1b}[31m\u{7}\nbell\" VALUES (1)").await;
    let sql = "ALTER TABLE \"esc\u{1b}[31m\u{7}\nbell\" ALTER id TYPE bigint; DO 'x\u{1b}'";
    let text = preflight(&scene, sql).await.to_string();
    assert!(text.contains("esc\\u{1b}[31m"), "{text:?}");
    assert!(
        !text.contains(['\u{1b}', '\u{7}']) && text.lines().count() == 2,
        "{text:?}"
    );
    let error = scene
        .keeper
        .schema()
        .change(sql)
        .allow_unknown()
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("esc\\u{1b}[31m") && !text.contains(['\u{1b}', '\n']),
        "{text:?}"
    );
    let error = scene
        .keeper
        .schema()
        .change("\u{feff}DROP TABLE t")
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Config, "byte-order mark");
    let error = scene
        .keeper
        .schema()
        .change("COPY t FROM STDIN;\n1\t2\n\\.\n")
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Config, "copy_in");
}
