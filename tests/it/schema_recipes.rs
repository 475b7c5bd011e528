//! The recipes leave exactly the state that is wanted, also when they are begun again half-way.

use std::time::Duration;

use lockkeeper::{ErrorKind, ProcedureReport, ReferentialAction};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, assert_error, assert_error_in, eventually, poll_times_and_drop,
};

/// The constraints of a table as `name: definition`, those that only say NOT NULL left out.
async fn constraints(scene: &Scene, table: &str) -> Vec<String> {
    let sql = format!(
        "SELECT conname || ': ' || pg_get_constraintdef(oid) FROM pg_constraint \
         WHERE conrelid = '{table}'::regclass AND contype <> 'n' ORDER BY 1"
    );
    let rows = scene.observer.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn is_not_null(scene: &Scene, table: &str, column: &str) -> bool {
    let sql = format!(
        "(SELECT attnotnull FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attname = '{column}')"
    );
    scene.is_true(&sql).await
}

/// The statements sent, without the names.
fn verbs(report: &ProcedureReport) -> Vec<&'static str> {
    let all = report.steps().iter().map(|(sql, _)| {
        [
            "CREATE INDEX",
            "CREATE UNIQUE INDEX",
            "USING INDEX",
            "NOT VALID",
            "VALIDATE",
            "SET NOT NULL",
            "RENAME",
            "ADD COLUMN",
            "DROP CONSTRAINT",
            "DROP TABLE",
            "ATTACH",
            "CREATE TABLE",
            "PRIMARY KEY",
            "FOREIGN KEY",
        ]
        .into_iter()
        .find(|verb| sql.contains(verb))
        .unwrap_or_else(|| panic!("{sql}"))
    });
    all.collect()
}

async fn rows(scene: &Scene, sql: &str) -> i64 {
    scene.observer.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_check_is_added_and_validated() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    let schema = scene.keeper.schema();
    let report = schema
        .add_check("t", "small", "a < 10 -- always")
        .await
        .unwrap();
    assert_eq!(verbs(&report), ["NOT VALID", "VALIDATE"]);
    assert_eq!(constraints(&scene, "t").await, ["small: CHECK ((a < 10))"]);
    assert!(
        schema
            .add_check("t", "small", "a < 10")
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    // A row that does not pass: it stays not valid, keeps out new ones, and is validated the next time.
    let error = schema
        .add_check("t", "positive", "a > 0")
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "23514");
    assert_eq!(
        constraints(&scene, "t").await[0],
        "positive: CHECK ((a > 0)) NOT VALID"
    );
    scene
        .observer
        .batch_execute("DELETE FROM t WHERE a = 0")
        .await
        .unwrap();
    let report = schema.add_check("t", "positive", "a > 0").await.unwrap();
    assert_eq!(verbs(&report), ["VALIDATE"]);
    assert_eq!(
        constraints(&scene, "t").await[0],
        "positive: CHECK ((a > 0))"
    );
    // One of another kind under the name.
    scene
        .observer
        .batch_execute("ALTER TABLE t ADD CONSTRAINT uniq UNIQUE (id)")
        .await
        .unwrap();
    let error = schema.add_check("t", "uniq", "a > 0").await.unwrap_err();
    assert_error(&error, ErrorKind::Config, r#"a constraint "uniq" already"#);
    for (wrong, text) in [
        (
            schema.add_check("nowhere", "c", "true"),
            r#"no table "nowhere""#,
        ),
        (schema.add_check("t", "", "true"), "empty name"),
    ] {
        assert_error(&wrong.await.unwrap_err(), ErrorKind::Config, text);
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_foreign_key_is_added_and_validated() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute("CREATE SCHEMA far; CREATE TABLE far.\"P\" (\"Id\" int PRIMARY KEY); INSERT INTO far.\"P\" SELECT generate_series(1, 9)")
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let error = schema
        .add_foreign_key("t", ["a"], "far.P", ["Id"])
        .await
        .unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "23503");
    scene
        .observer
        .batch_execute("INSERT INTO far.\"P\" VALUES (0)")
        .await
        .unwrap();
    let report = schema
        .add_foreign_key("t", ["a"], "far.P", ["Id"])
        .await
        .unwrap();
    assert_eq!(verbs(&report), ["VALIDATE"]);
    let named = schema
        .add_foreign_key("t", ["a"], ("far", "P"), Vec::<String>::new())
        .name("Other \"fk")
        .on_delete(ReferentialAction::SetNull)
        .on_update(ReferentialAction::Cascade);
    assert_eq!(verbs(&named.await.unwrap()), ["NOT VALID", "VALIDATE"]);
    assert_eq!(
        constraints(&scene, "t").await,
        [
            "Other \"fk: FOREIGN KEY (a) REFERENCES far.\"P\"(\"Id\") ON UPDATE CASCADE ON DELETE SET NULL",
            "t_a_fkey: FOREIGN KEY (a) REFERENCES far.\"P\"(\"Id\")",
        ]
    );
    // Another one under the name.
    let other = schema.add_foreign_key("t", ["id"], "far.P", ["Id"]);
    let error = other.name("t_a_fkey").await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Config,
        r#"a foreign key "t_a_fkey" already"#,
    );
    assert!(
        schema
            .add_foreign_key("t", ["a"], "far.P", ["Id"])
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_column_becomes_not_null() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute("UPDATE t SET a = NULL WHERE id = 5")
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let error = schema.set_not_null("t", "a").await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "23514");
    scene
        .observer
        .batch_execute("UPDATE t SET a = 0 WHERE a IS NULL")
        .await
        .unwrap();
    let report = schema.set_not_null("t", "a").await.unwrap();
    assert_eq!(verbs(&report), ["VALIDATE", "SET NOT NULL"]);
    assert!(is_not_null(&scene, "t", "a").await);
    assert_eq!(constraints(&scene, "t").await, [""; 0]);
    assert!(
        schema
            .set_not_null("t", "a")
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    // What an earlier run has left behind.
    scene
        .observer
        .batch_execute(
            "ALTER TABLE t ADD CONSTRAINT t_a_is_not_null CHECK (a IS NOT NULL) NOT VALID",
        )
        .await
        .unwrap();
    schema.set_not_null("t", "a").await.unwrap();
    assert_eq!(constraints(&scene, "t").await, [""; 0]);
    // PostgreSQL 18 has constraints NOT NULL that are not valid.
    if scene.database.server().major() >= 18 {
        let sql = "ALTER TABLE t ADD CONSTRAINT b_there NOT NULL b NOT VALID";
        scene.observer.batch_execute(sql).await.unwrap();
        let report = schema.set_not_null("t", "b").await.unwrap();
        assert_eq!(verbs(&report), ["VALIDATE"]);
        let valid = "(SELECT convalidated FROM pg_constraint WHERE conname = 'b_there')";
        assert!(scene.is_true(valid).await);
    }
    let error = schema.set_not_null("t", "nothing").await.unwrap_err();
    assert_error(&error, ErrorKind::Config, r#"no column "nothing""#);
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_primary_key_is_added() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    scene
        .observer
        .batch_execute("ALTER TABLE t RENAME id TO \"Id\"; INSERT INTO t (\"Id\", a) VALUES (1, 1)")
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    let error = schema.add_primary_key("t", ["Id", "a"]).await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().code(), "23505");
    assert!(scene.is_true("to_regclass('t_pkey') IS NULL").await);
    scene
        .observer
        .batch_execute("DELETE FROM t WHERE b IS NULL")
        .await
        .unwrap();
    let report = schema.add_primary_key("t", ["Id", "a"]).await.unwrap();
    let all = [
        "CREATE UNIQUE INDEX",
        "NOT VALID",
        "VALIDATE",
        "NOT VALID",
        "VALIDATE",
        "USING INDEX",
    ];
    assert_eq!(verbs(&report), all);
    assert_eq!(
        constraints(&scene, "t").await,
        ["t_pkey: PRIMARY KEY (\"Id\", a)"]
    );
    assert!(is_not_null(&scene, "t", "Id").await && is_not_null(&scene, "t", "a").await);
    assert!(
        schema
            .add_primary_key("t", ["Id", "a"])
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    let error = schema.add_primary_key("t", ["a"]).await.unwrap_err();
    assert_error(&error, ErrorKind::Config, "has a primary key already");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// Dropped anywhere, and begun again: the same end.
#[tokio::test]
async fn recipes_dropped_half_way_continue() {
    let scene = Scene::with_side_connection(4).await;
    let schema = scene.keeper.schema();
    for polls in [
        1, 5, 9, 13, 17, 21, 25, 29, 33, 38, 43, 48, 55, 62, 70, 80, 90,
    ] {
        let name = format!("t{polls}");
        scene.table(&name, 50).await;
        drop(poll_times_and_drop(schema.add_primary_key(&name, ["id"]).run(), polls).await);
        eventually("a statement still runs", async || {
            let condition = format!(
                "NOT EXISTS (SELECT FROM pg_locks WHERE relation = '{name}'::regclass) \
                 AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database())"
            );
            scene.is_true(&condition).await
        })
        .await;
        schema.add_primary_key(&name, ["id"]).await.unwrap();
        assert_eq!(
            constraints(&scene, &name).await,
            [format!("{name}_pkey: PRIMARY KEY (id)")]
        );
        assert!(is_not_null(&scene, &name, "id").await);
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn of_a_partitioned_table() {
    let scene = Scene::with_side_connection(4).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE r (id int PRIMARY KEY); INSERT INTO r SELECT generate_series(0, 19); \
             CREATE TABLE p (id int, a int) PARTITION BY RANGE (id); \
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); \
             CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20); \
             INSERT INTO p SELECT n, n FROM generate_series(0, 19) n",
        )
        .await
        .unwrap();
    let schema = scene.keeper.schema();
    schema.add_check("p", "positive", "a >= 0").await.unwrap();
    schema.set_not_null("p", "a").await.unwrap();
    assert!(is_not_null(&scene, "p", "a").await && is_not_null(&scene, "p2", "a").await);
    schema
        .add_foreign_key("p", ["a"], "r", ["id"])
        .await
        .unwrap();
    schema.add_primary_key("p", ["id"]).await.unwrap();
    for table in ["p", "p1", "p2"] {
        let found = constraints(&scene, table).await;
        let expected = [
            format!("{table}_a_fkey: FOREIGN KEY (a) REFERENCES r(id)"),
            format!("{table}_pkey: PRIMARY KEY (id)"),
            "positive: CHECK ((a >= 0))".to_owned(),
        ];
        assert_eq!(found, expected, "{table}");
    }
    // One constraint of the whole, valid, with those of the partitions below it.
    assert!(scene.is_true("(SELECT count(*) = 4 FROM pg_constraint WHERE conparentid <> 0 AND conrelid IN ('p1'::regclass, 'p2'::regclass))").await);
    assert!(
        scene
            .is_true("(SELECT indisvalid FROM pg_index WHERE indexrelid = 'p_pkey'::regclass)")
            .await
    );
    assert!(
        schema
            .add_foreign_key("p", ["a"], "r", ["id"])
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    assert!(
        schema
            .add_primary_key("p", ["id"])
            .await
            .unwrap()
            .steps()
            .is_empty()
    );
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_column_is_added_without_a_rewrite() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    let file = async || rows(&scene, "SELECT pg_relation_filenode('t')::int8").await;
    let before = file().await;
    let schema = scene.keeper.schema();
    schema
        .add_column("t", "plain", "numeric(10, 2)")
        .await
        .unwrap();
    schema
        .add_column("t", "Fixed", "text")
        .default("'x' -- always")
        .not_null()
        .await
        .unwrap();
    schema
        .add_column("t", "at", "timestamptz")
        .default("now()")
        .await
        .unwrap();
    let report = schema
        .add_column("t", "chance", "float8")
        .default("random()")
        .not_null()
        .await
        .unwrap();
    let backfill = report.backfill().unwrap().to_owned();
    assert_eq!(file().await, before, "the table was rewritten");
    assert_eq!(
        rows(
            &scene,
            "SELECT count(*) FROM t WHERE \"Fixed\" = 'x' AND at IS NOT NULL AND chance IS NULL"
        )
        .await,
        100
    );
    scene
        .observer
        .batch_execute("INSERT INTO t (id) VALUES (0)")
        .await
        .unwrap();
    assert_eq!(
        rows(&scene, "SELECT count(*) FROM t WHERE chance IS NULL").await,
        100
    );
    // Asked for again while something is left to do: that is what is done.
    let report = schema
        .add_column("t", "chance", "float8")
        .default("random()")
        .await
        .unwrap();
    assert!(report.steps().is_empty() && report.backfill() == Some(&*backfill));
    scene.observer.batch_execute(&backfill).await.unwrap();
    assert_eq!(
        rows(&scene, "SELECT count(*) FROM t WHERE chance IS NULL").await,
        0
    );
    schema.set_not_null("t", "chance").await.unwrap();
    let report = schema
        .add_column("t", "chance", "double precision")
        .default("random()")
        .await
        .unwrap();
    assert!(report.steps().is_empty() && report.backfill().is_none());
    assert!(is_not_null(&scene, "t", "Fixed").await);
    let error = schema.add_column("t", "plain", "text").await.unwrap_err();
    assert_error(&error, ErrorKind::Config, r#"a column "plain" already"#);
    for rewriting in ["serial", "bigint GENERATED ALWAYS AS IDENTITY"] {
        let error = schema
            .add_column("t", "number", rewriting)
            .await
            .unwrap_err();
        assert_error_in(rewriting, &error, ErrorKind::Config, r#"on "public"."t""#);
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test]
async fn a_table_is_replaced() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 100).await;
    let schema = scene.keeper.schema();
    let nothing = schema.replace_table("t", "t_new").await.unwrap_err();
    assert_error_in(
        &nothing,
        &nothing,
        ErrorKind::Config,
        r#"no table "public"."t_new""#,
    );
    let build = "CREATE TABLE t_new (LIKE t); INSERT INTO t_new SELECT * FROM t ORDER BY a";
    let replace = schema
        .replace_table("t", "t_new")
        .build(build)
        .catch_up("INSERT INTO t_new SELECT * FROM t WHERE id > 100;");
    // It has to wait for its turn, and rows that come meanwhile are caught up with.
    let reader = scene.database.connect().await;
    reader.batch_execute("BEGIN; SELECT FROM t").await.unwrap();
    let replacing = tokio::spawn(
        replace
            .clone()
            .lock_timeout(Duration::from_millis(50))
            .run(),
    );
    eventually("the new table is not built", async || {
        scene.is_true("to_regclass('t_new') IS NOT NULL").await
    })
    .await;
    reader
        .batch_execute("INSERT INTO t VALUES (101, 1, 'late'); COMMIT")
        .await
        .unwrap();
    let report = replacing.await.unwrap().unwrap();
    assert_eq!(report.steps().len(), 2, "{report}");
    assert_eq!(rows(&scene, "SELECT count(*) FROM t").await, 101);
    assert!(
        scene
            .is_true("to_regclass('t_old') IS NOT NULL AND to_regclass('t_new') IS NULL")
            .await
    );
    // It is done; what is left to do is to drop the old one, if that is wanted.
    let again = replace.clone().drop_old().await.unwrap();
    assert_eq!(verbs(&again), ["DROP TABLE"]);
    assert_eq!(rows(&scene, "SELECT count(*) FROM t").await, 101);
    scene
        .observer
        .batch_execute("ALTER TABLE t ADD PRIMARY KEY (id); CREATE TABLE c (t int REFERENCES t)")
        .await
        .unwrap();
    let error = replace.await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::Config,
        r#"a foreign key of "public"."c""#,
    );
    assert!(error.to_string().contains("foreign key"), "{error}");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// What has the name that a recipe would give, and is not what the recipe would make, is refused: never taken for done, and
/// never dropped.
#[tokio::test]
async fn a_name_that_is_taken_by_something_else_is_refused() {
    let scene = Scene::with_side_connection(4).await;
    scene.table("t", 10).await;
    scene.table("t_old", 3).await;
    scene
        .observer
        .batch_execute(
            "CREATE TABLE p (id int PRIMARY KEY, other int UNIQUE); INSERT INTO p SELECT n, n FROM generate_series(0, 9) n; \
             ALTER TABLE t ADD CONSTRAINT t_a_is_not_null CHECK (a >= 0), ADD CONSTRAINT small CHECK (a < 10), \
             ADD CONSTRAINT t_b_is_not_null CHECK (length(b) IS NOT NULL), ADD CONSTRAINT t_a_fkey FOREIGN KEY (a) REFERENCES p",
        )
        .await
        .unwrap();
    let before = constraints(&scene, "t").await;
    let schema = scene.keeper.schema();
    let key = || schema.add_foreign_key("t", ["a"], "p", ["id"]);
    let replacement = schema
        .replace_table("t", "t_new")
        .build("CREATE TABLE t_new (LIKE t)");
    for (outcome, text) in [
        (
            schema.set_not_null("t", "a").await,
            r#"a constraint "t_a_is_not_null" already"#,
        ),
        (
            schema.set_not_null("t", "b").await,
            r#"a constraint "t_b_is_not_null" already"#,
        ),
        (
            schema.add_primary_key("t", ["a"]).name("new_key").await,
            r#"a constraint "t_a_is_not_null" already"#,
        ),
        (
            schema.add_check("t", "small", "a < 5").await,
            r#"a CHECK "small" already"#,
        ),
        (
            schema.add_foreign_key("t", ["a"], "p", ["other"]).await,
            r#"a foreign key "t_a_fkey" already"#,
        ),
        (
            key().on_delete(ReferentialAction::Cascade).await,
            r#"a foreign key "t_a_fkey" already"#,
        ),
        (
            key().on_update(ReferentialAction::SetNull).await,
            r#"a foreign key "t_a_fkey" already"#,
        ),
        (replacement.drop_old().await, r#""public"."t_old" already"#),
    ] {
        assert_error(&outcome.unwrap_err(), ErrorKind::Config, text);
    }
    // The same in other words is the same.
    for same in [
        schema
            .add_check("t", "small", "(a) < 10 /* as ever */")
            .await,
        key().await,
        key().on_delete(ReferentialAction::NoAction).await,
    ] {
        assert!(same.unwrap().steps().is_empty());
    }
    assert_eq!(constraints(&scene, "t").await, before);
    assert_eq!(rows(&scene, "SELECT count(*) FROM t_old").await, 3);
    assert!(scene.is_true("to_regclass('t_new') IS NULL").await);
    // Nor where there is nothing left to do but to tidy up.
    scene
        .observer
        .batch_execute("ALTER TABLE t ALTER a SET NOT NULL")
        .await
        .unwrap();
    schema.set_not_null("t", "a").await.unwrap();
    assert_eq!(constraints(&scene, "t").await, before);
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

/// A name without a schema is resolved along the search_path of the pool's connections.
#[tokio::test]
async fn another_schema_on_the_search_path() {
    let scene = Scene::with_side_connection(4).await;
    scene
        .observer
        .batch_execute("CREATE SCHEMA app; CREATE TABLE app.t (id int, a int); CREATE TABLE public.t (id int, a int); \
                        INSERT INTO app.t VALUES (1, 1); INSERT INTO public.t VALUES (1, 1)")
        .await
        .unwrap();
    let mut config = scene.database.config();
    config.options("-c search_path=app,public");
    let manager = lockkeeper::deadpool_postgres::Manager::new(config, tokio_postgres::NoTls);
    let pool = lockkeeper::deadpool_postgres::Pool::builder(manager)
        .max_size(2)
        .build()
        .unwrap();
    let keeper = lockkeeper::Keeper::new(pool);
    let schema = keeper.schema();
    schema.add_primary_key("t", ["id"]).await.unwrap();
    schema.create_index("t", ["a"]).await.unwrap();
    let preflight = schema.preflight("ALTER TABLE t ADD b int").await.unwrap();
    assert_eq!(preflight.locks()[0].relation(), ("app", "t").into());
    schema.drop_index("t_a_idx").await.unwrap();
    assert_eq!(
        constraints(&scene, "app.t").await,
        ["t_pkey: PRIMARY KEY (id)"]
    );
    assert_eq!(constraints(&scene, "public.t").await, [""; 0]);
}
