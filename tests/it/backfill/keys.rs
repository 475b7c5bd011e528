//! Tables and keys of every kind, and what is refused.

use std::time::Duration;

use futures::StreamExt as _;
use lockkeeper::{Error, ErrorKind, Keeper};
use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, assert_error, assert_error_in};

use super::{all_are, checkpoint, counted, number, scene};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_every_type() {
    let scene = Scene::new(2).await;
    let name = scene.database.name();
    // Settings that change how values are written.
    scene
        .observer
        .batch_execute(&format!(
            "ALTER DATABASE {name} SET DateStyle = 'SQL, DMY'; ALTER DATABASE {name} SET TimeZone = 'Asia/Kathmandu'; \
             ALTER DATABASE {name} SET IntervalStyle = 'sql_standard'; ALTER DATABASE {name} SET bytea_output = 'escape'; \
             CREATE TYPE mood AS ENUM ('bad', 'ok', 'good', 'ab''c\"d', 'z'); CREATE DOMAIN code AS text CHECK (value <> '')"
        ))
        .await
        .unwrap();
    for (n, (key, values)) in [
        ("smallint", "i - 100"),
        ("int", "i * 1000 - 100000"),
        ("bigint", "(i - 100)::bigint << 40"),
        ("numeric", "(i - 100) / 7.0"),
        ("real", "(i - 100)::real / 7"),
        ("double precision", "(i - 100) / 7.0::float8"),
        ("uuid", "md5(i::text)::uuid"),
        ("text", r#"CASE i % 5 WHEN 0 THEN 'É' WHEN 1 THEN '''\"' WHEN 2 THEN E'\n\\' ELSE 'a' END || i"#),
        ("text COLLATE \"C\"", "CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i"),
        ("varchar(20)", "'ä' || i"),
        ("char(20)", "'ä' || i"),
        ("name", "'x' || i"),
        ("code", "'x' || i"),
        ("date", "'0044-01-01 BC'::date + i * 4000"),
        ("timestamp", "CASE i WHEN 7 THEN '-infinity' ELSE '2024-10-27 01:00:00'::timestamp + i * interval '17 minutes 1 microsecond' END"),
        ("timestamptz", "CASE i WHEN 7 THEN 'infinity' ELSE '2024-10-27 00:00:00+00'::timestamptz + i * interval '17 minutes 1 microsecond' END"),
        ("interval", "i * interval '-3 days 4 hours 5.000001 seconds'"),
        ("bytea", "decode(md5(i::text), 'hex')"),
        ("inet", "'10.0.0.0'::inet + i"),
        ("oid", "4294967295 - i"),
        ("mood", "(ARRAY['bad', 'ok', 'good', 'ab''c\"d', 'z'])[i]::mood"),
        ("bool", "i = 1"),
        ("pg_lsn", "'0/0'::pg_lsn + i"),
        ("int[]", "ARRAY[i % 3, i]"),
    ]
    .into_iter()
    .enumerate()
    {
        let rows = match key {
            "mood" => 5,
            "bool" => 2,
            _ => 200,
        };
        scene
            .observer
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS t; CREATE TABLE t (id {key} PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT {values} FROM generate_series(1, {rows}) AS i"
            ))
            .await
            .unwrap_or_else(|error| panic!("{key}: {error:?}"));
        let size = if rows < 10 { 1 } else { 17 };
        let backfill = scene.keeper.backfill("t", "id").set("n = n + 1").name(format!("{n}"));
        let done = backfill.batch_rows(size..=size).run().await;
        let done = done.unwrap_or_else(|error| panic!("{key}: {error} {:?}", std::error::Error::source(&error).map(|error| format!("{error:?}"))));
        assert_eq!(done.rows_changed(), rows, "{key}");
        let wrong = number(&scene.observer, "SELECT count(*) FROM t WHERE n <> 1").await;
        assert_eq!(wrong, 0, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_several_columns_and_partitions_and_odd_names() {
    let scene = Scene::new(2).await;
    let name = scene.database.name();
    scene
        .observer
        .batch_execute(&format!(
            r#"CREATE SCHEMA "My ""Shop"; CREATE SCHEMA planted;
               CREATE FUNCTION planted.count() RETURNS bigint LANGUAGE sql AS 'SELECT 7::bigint';
               CREATE FUNCTION planted.gt(bigint, bigint) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''planted''; END';
               CREATE OPERATOR planted.> (FUNCTION = planted.gt, LEFTARG = bigint, RIGHTARG = bigint);
               CREATE OPERATOR planted.= (FUNCTION = planted.gt, LEFTARG = bigint, RIGHTARG = bigint);
               CREATE TABLE "My ""Shop"."t; DROP TABLE x" ("The ""Key" bigint PRIMARY KEY, n int NOT NULL DEFAULT 0);
               INSERT INTO "My ""Shop"."t; DROP TABLE x" SELECT i FROM generate_series(1, 100) AS i;
               CREATE TABLE parts (at date, id bigint, "End" text, n int NOT NULL DEFAULT 0, PRIMARY KEY (at, id, "End"))
                   PARTITION BY RANGE (at);
               CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM ('2024-06-01') TO ('2025-01-01') PARTITION BY HASH (id);
               CREATE TABLE parts_2a PARTITION OF parts_2 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
               CREATE TABLE parts_2b PARTITION OF parts_2 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
               CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2024-06-01');
               INSERT INTO parts SELECT '2024-01-01'::date + i % 7 * 30, i % 10, 'x''' || i FROM generate_series(1, 500) AS i;
               ALTER DATABASE {name} SET search_path = planted, public, pg_catalog"#
        ))
        .await
        .unwrap();
    let odd = scene
        .keeper
        .backfill(("My \"Shop", "t; DROP TABLE x"), "The \"Key");
    let done = odd
        .set("n = n OPERATOR(pg_catalog.+) 1")
        .batch_rows(7..=7)
        .name("it's \"odd\" \\")
        .run();
    assert_eq!(done.await.unwrap().rows_changed(), 100);
    let sql = r#"SELECT pg_catalog.count(*) FROM "My ""Shop"."t; DROP TABLE x" WHERE n OPERATOR(pg_catalog.<>) 1"#;
    assert_eq!(number(&scene.observer, sql).await, 0);
    let sql = r#"SELECT pg_catalog.count(*) FROM "My ""Shop".lockkeeper_backfill WHERE done"#;
    assert_eq!(number(&scene.observer, sql).await, 1);

    let parts = scene
        .keeper
        .backfill("parts", ["at", "id", "End"])
        .set("n = parts.n + 1");
    let done = parts.batch_rows(13..=13).run().await.unwrap();
    assert_eq!(done.rows_changed(), 500);
    assert_eq!(
        number(
            &scene.observer,
            "SELECT pg_catalog.count(*) FROM parts WHERE n <> 1"
        )
        .await,
        0
    );
}

/// Two sessions that write values differently continue from each other's checkpoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_is_read_as_it_was_written() {
    let scene = Scene::new(1).await;
    let name = scene.database.name();
    for (key, values, first, second) in [
        (
            "double precision",
            "1 + i * 1e-9::float8",
            "SET extra_float_digits = -9",
            "SET extra_float_digits = 1",
        ),
        (
            "interval",
            "i * interval '-3 days -4 hours'",
            "SET IntervalStyle = sql_standard",
            "SET IntervalStyle = postgres",
        ),
        (
            "date[]",
            "ARRAY['2024-01-01'::date + i]",
            "SET DateStyle = 'SQL, DMY'",
            "SET DateStyle = 'SQL, MDY'",
        ),
        (
            "daterange",
            "daterange('2024-01-01'::date + i, NULL)",
            "SET DateStyle = 'SQL, MDY'",
            "SET DateStyle = 'SQL, DMY'",
        ),
        (
            "tstzrange",
            "tstzrange('2024-10-27 00:00+00'::timestamptz + i * interval '10 minutes', NULL)",
            "SET TimeZone = 'Europe/Berlin'",
            "SET TimeZone = 'Asia/Kathmandu'",
        ),
        (
            "timestamptz",
            "'2024-10-27 00:00+00'::timestamptz + i * interval '10 minutes'",
            "SET TimeZone = 'Europe/Berlin'",
            "SET TimeZone = 'Asia/Kathmandu'",
        ),
    ] {
        scene
            .observer
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS t, lockkeeper_backfill; \
                 CREATE TABLE t (id {key} PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT {values} FROM generate_series(1, 100) AS i"
            ))
            .await
            .unwrap();
        for (setting, batches) in [(first, 3), (second, usize::MAX)] {
            let set = format!("ALTER DATABASE {name} {setting}");
            scene.observer.batch_execute(&set).await.unwrap();
            let keeper = Keeper::new(scene.database.pool(2));
            let backfill = counted(&keeper).batch_rows(7..=7).wait(GIVE_UP_AFTER);
            let mut steps = backfill.stream().take(batches);
            while let Some(step) = steps.next().await {
                step.unwrap_or_else(|error| panic!("{key}: {error}"));
            }
        }
        let wrong = number(&scene.observer, "SELECT count(*) FROM t WHERE n <> 1").await;
        assert_eq!(wrong, 0, "{key}");
        assert!(checkpoint(&scene).await.2, "{key}");
        let reset = format!("ALTER DATABASE {name} RESET ALL");
        scene.observer.batch_execute(&reset).await.unwrap();
    }
}

/// What is behind a key is something else where the keys' order has become another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_ordered_otherwise_is_no_place_to_continue_from() {
    let scene = Scene::new(2).await;
    let steps = async |n| {
        let backfill = counted(&scene.keeper).batch_rows(7..=7).wait(GIVE_UP_AFTER);
        let steps: Vec<_> = backfill.stream().take(n).collect().await;
        steps.into_iter().collect::<Result<Vec<_>, Error>>()
    };
    for (before, change) in [
        ("int PRIMARY KEY", "ALTER COLUMN id TYPE text"),
        (
            "text COLLATE \"C\" PRIMARY KEY",
            "ALTER COLUMN id TYPE text COLLATE \"POSIX\"",
        ),
        (
            "text PRIMARY KEY",
            "DROP CONSTRAINT t_pkey, ALTER id SET NOT NULL; CREATE UNIQUE INDEX ON t (id text_pattern_ops)",
        ),
    ] {
        scene
            .observer
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS t, lockkeeper_backfill; CREATE TABLE t (id {before}, n int NOT NULL DEFAULT 0); \
                 INSERT INTO t SELECT i FROM generate_series(1, 100) AS i"
            ))
            .await
            .unwrap();
        assert_eq!(steps(2).await.unwrap().len(), 2);
        let change = format!("ALTER TABLE t {change}");
        scene.observer.batch_execute(&change).await.unwrap();
        let error = steps(usize::MAX).await.unwrap_err();
        assert_error_in(
            &change,
            &error,
            ErrorKind::Config,
            r#""public"."t" is ordered otherwise"#,
        );
        assert!(error.to_string().contains("ordered otherwise"), "{error}");
        assert_eq!(
            number(&scene.observer, "SELECT sum(n) FROM t").await,
            14,
            "{change}"
        );
        let restarted = counted(&scene.keeper).restart().run().await.unwrap();
        assert_eq!(restarted.rows_changed(), 100);
    }
    // Wider, and in the same order.
    scene
        .observer
        .batch_execute(
            "DROP TABLE t, lockkeeper_backfill; CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0); \
             INSERT INTO t SELECT i FROM generate_series(1, 100) AS i",
        )
        .await
        .unwrap();
    steps(2).await.unwrap();
    let change = "ALTER TABLE t ALTER COLUMN id TYPE bigint";
    scene.observer.batch_execute(change).await.unwrap();
    steps(usize::MAX).await.unwrap();
    all_are(&scene, 1).await;
}

/// An extension's type, whose operators are wherever the extension is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_with_operators_of_their_own() {
    let scene = Scene::new(2).await;
    let create = "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; \
                  CREATE TABLE t (id ext.citext PRIMARY KEY, n int NOT NULL DEFAULT 0); \
                  INSERT INTO t SELECT CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i FROM generate_series(1, 100) AS i";
    if let Err(error) = scene.observer.batch_execute(create).await {
        lockkeeper_testkit::Skip::new("citext", format!("{error:?}"))
            .report("keys_with_operators_of_their_own");
        return;
    }
    counted(&scene.keeper)
        .batch_rows(9..=9)
        .run()
        .await
        .unwrap();
    all_are(&scene, 1).await;
    scene
        .observer
        .batch_execute(
            "DROP TABLE t; CREATE TABLE t (id text NOT NULL, n int NOT NULL DEFAULT 0); \
             CREATE UNIQUE INDEX ON t (id text_pattern_ops) INCLUDE (n); \
             INSERT INTO t SELECT CASE i % 2 WHEN 0 THEN 'a' ELSE 'B' END || i FROM generate_series(1, 100) AS i",
        )
        .await
        .unwrap();
    counted(&scene.keeper)
        .restart()
        .batch_rows(9..=9)
        .run()
        .await
        .unwrap();
    all_are(&scene, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_is_refused_before_anything_is_changed() {
    let scene = scene(2, 10).await;
    scene
        .observer
        .batch_execute(
            "ALTER TABLE t ADD COLUMN nullable int UNIQUE, ADD COLUMN twice int NOT NULL DEFAULT 1, \
             ADD COLUMN part int NOT NULL DEFAULT 1, ADD COLUMN gone int; ALTER TABLE t DROP COLUMN gone; \
             CREATE UNIQUE INDEX ON t (part) WHERE id < 0; CREATE UNIQUE INDEX ON t (lower(twice::text)) WHERE id < 0; \
             CREATE UNIQUE INDEX ON t (id, twice); CREATE VIEW v AS SELECT * FROM t; \
             CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child () INHERITS (parent)",
        )
        .await
        .unwrap();
    let keeper = &scene.keeper;
    let t = |key: &'static str| keeper.backfill("t", key).set("n = 1");
    let cases = [
        (t("nullable"), "may be NULL"),
        (t("twice"), "no unique index"),
        (t("part"), "no unique index"),
        (t("gone"), "no column \"gone\""),
        (t("ID"), "no column \"ID\""),
        (t("ctid"), "no column \"ctid\""),
        (
            keeper.backfill("t", ["twice", "id"]).set("n = 1"),
            "in this order",
        ),
        (keeper.backfill("t", ["id", "id"]).set("n = 1"), "twice"),
        (
            keeper.backfill("t", Vec::<String>::new()).set("n = 1"),
            "no columns",
        ),
        (
            keeper.backfill("T", "id").set("n = 1"),
            "there is no table \"T\"",
        ),
        (keeper.backfill("v", "id").set("n = 1"), "is not a table"),
        (keeper.backfill("parent", "id").set("n = 1"), "inherit"),
        (keeper.backfill("", "id").set("n = 1"), "empty name"),
        (keeper.backfill("t", "id"), "sets nothing"),
        (keeper.backfill("t", "id").set(" "), "sets nothing"),
        (t("id").set("n = 2\0"), "NUL"),
        (t("id").filter(""), "filter is empty"),
        (t("id").name(""), "name is empty"),
        (t("id").name("x".repeat(201)), "200"),
        (t("id").batch_rows(0..=5), "batch_rows"),
        (
            t("id").batch_rows(std::ops::RangeInclusive::new(5, 4)),
            "batch_rows",
        ),
        (t("id").batch_time(Duration::ZERO), "batch_time is 0"),
        (t("id").lock_timeout(Duration::ZERO), "lock_timeout is 0"),
        (
            Keeper::new(scene.database.pool(1))
                .backfill("t", "id")
                .set("n = 1"),
            "needs two",
        ),
    ];
    for (backfill, text) in cases {
        let error = backfill.run().await.unwrap_err();
        assert_error(&error, ErrorKind::Config, text);
    }
    all_are(&scene, 0).await;
    let made = "SELECT count(*) FROM pg_class WHERE relname = 'lockkeeper_backfill'";
    assert_eq!(number(&scene.observer, made).await, 0);
    // What the server refuses is the server's error.
    let error = t("id").filter("no_such = 1").run().await.unwrap_err();
    assert_error(&error, ErrorKind::Database, "SQLSTATE 42703");
    scene.nothing_left().await;
}
