//! Recipes whose connection is lost at any of their messages: begun again, they come to the same end.

use lockkeeper::{Error, ErrorKind, Keeper, Schema};
use lockkeeper_testkit::{Fault, GIVE_UP_AFTER, Proxy, Scene, eventually};

/// What each run begins with, in a schema of its own.
const TABLES: &str = "CREATE TABLE r (id int PRIMARY KEY); INSERT INTO r SELECT generate_series(0, 9); \
    CREATE TABLE t (id int, a int, b text); INSERT INTO t SELECT n, n % 10, 'row ' || n FROM generate_series(1, 50) n; \
    CREATE INDEX t_b ON t (b); \
    CREATE TABLE p (id int, a int) PARTITION BY RANGE (id); \
    CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); \
    CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20); \
    INSERT INTO p SELECT n, n % 10 FROM generate_series(0, 19) n";

#[derive(Clone, Copy, Debug)]
enum Recipe {
    AddCheck,
    AddColumn,
    AddForeignKey,
    AddPrimaryKey,
    CreateIndex,
    CreateIndexOfPartitions,
    DropIndex,
    PartitionsPrimaryKey,
    ReplaceTable,
    SetNotNull,
}

impl Recipe {
    async fn run(self, schema: &Schema, place: &str) -> Result<(), Error> {
        let table = |name: &str| format!("{place}.{name}");
        let done = match self {
            Self::AddCheck => {
                let check = schema.add_check(table("t"), "positive", "a >= 0");
                check.run().await
            }
            Self::AddColumn => {
                let column = schema.add_column(table("t"), "c", "text");
                column.default("'x'").not_null().run().await
            }
            Self::AddForeignKey => {
                let key = schema.add_foreign_key(table("t"), ["a"], table("r"), ["id"]);
                key.run().await
            }
            Self::AddPrimaryKey => schema.add_primary_key(table("t"), ["id"]).run().await,
            Self::CreateIndex => schema.create_index(table("t"), ["a"]).run().await,
            Self::CreateIndexOfPartitions => schema.create_index(table("p"), ["a"]).run().await,
            Self::DropIndex => schema.drop_index(table("t_b")).run().await,
            Self::PartitionsPrimaryKey => schema.add_primary_key(table("p"), ["id"]).run().await,
            Self::ReplaceTable => {
                let (old, new) = (table("t"), table("t_new"));
                let build = format!(
                    "CREATE TABLE {new} (LIKE {old}); INSERT INTO {new} SELECT * FROM {old}"
                );
                let replace = schema.replace_table(&*old, "t_new").build(build);
                replace.like_old().drop_old().run().await
            }
            Self::SetNotNull => schema.set_not_null(table("t"), "a").run().await,
        };
        done.map(drop)
    }
}

/// Everything there is in a schema, without its name.
async fn shape(scene: &Scene, place: &str) -> Vec<String> {
    let sql = format!(
        "SELECT concat_ws(' ', 'relation', c.relname, c.relkind, 'valid ' || i.indisvalid, 'under ' || h.inhparent::regclass) \
         FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid LEFT JOIN pg_inherits h ON h.inhrelid = c.oid \
         WHERE c.relnamespace = '{place}'::regnamespace \
         UNION ALL SELECT concat_ws(' ', 'constraint', conrelid::regclass, conname, pg_get_constraintdef(oid)) \
         FROM pg_constraint WHERE connamespace = '{place}'::regnamespace \
         UNION ALL SELECT concat_ws(' ', 'column', attrelid::regclass, attname, attnotnull, atthasdef) \
         FROM pg_attribute WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = '{place}'::regnamespace) \
         AND attnum > 0 AND NOT attisdropped \
         UNION ALL SELECT concat_ws(' ', 'rows', count(*), sum(id)) FROM {place}.t \
         ORDER BY 1"
    );
    let rows = scene.observer.query(&sql, &[]).await.unwrap();
    let lines = rows.iter().map(|row| row.get::<_, String>(0));
    lines
        .map(|line| line.replace(&format!("{place}."), ""))
        .collect()
}

/// Runs it with the connection cut at the first message, the second and so on, and then once more without.
async fn at_any_message(recipe: Recipe) {
    let scene = Scene::new(2).await;
    let proxy = Proxy::before(scene.database.server());
    let cut_off = proxy.pool(&scene.database.config(), 2);
    let cut_off = Keeper::builder(cut_off).watch(false).build().schema();
    let schema = scene.keeper.schema();
    let begin = async |place: &str| {
        let sql = format!("CREATE SCHEMA {place}; SET search_path = {place}; {TABLES}");
        scene.observer.batch_execute(&sql).await.unwrap();
        scene
            .observer
            .batch_execute("RESET search_path")
            .await
            .unwrap();
    };
    begin("clean").await;
    recipe.run(&schema, "clean").await.unwrap();
    let expected = shape(&scene, "clean").await;
    let mut cuts = 0;
    for cut in [Fault::CutBefore, Fault::CutDuring] {
        for message in 0.. {
            let place = format!("s{message}_{cut:?}").to_lowercase();
            begin(&place).await;
            proxy.fault_later(message, cut);
            let ran = recipe.run(&cut_off, &place).await;
            let was_cut = proxy.faults_left() == 0;
            proxy.clear_faults();
            let what = format!("{recipe:?}: {cut:?} message {message}");
            match ran {
                Ok(()) => assert_eq!(shape(&scene, &place).await, expected, "{what}"),
                Err(error) => {
                    let lost = [ErrorKind::ConnectionLost, ErrorKind::CommitUnknown];
                    assert!(lost.contains(&error.kind()), "{what}: {error}");
                }
            }
            if !was_cut {
                break;
            }
            cuts += 1;
            // What the server got it may still be at work on.
            let mut ran = recipe.run(&schema, &place).await;
            if matches!(recipe, Recipe::ReplaceTable) && ran.is_err() {
                // The caller's own statement, of which two are not run at once.
                eventually(&what, async || {
                    let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                                  AND pid <> pg_backend_pid() AND state <> 'idle'";
                    scene.observer.query_one(others, &[]).await.unwrap().get::<_, i64>(0) == 0
                })
                .await;
                ran = recipe.run(&schema, &place).await;
            }
            ran.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(shape(&scene, &place).await, expected, "{what}");
            eventually(&what, async || {
                let sql = format!("DROP SCHEMA {place} CASCADE");
                scene.observer.batch_execute(&sql).await.is_ok()
            })
            .await;
        }
    }
    assert!(cuts > 10, "only {cuts} messages");
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn add_check() {
    at_any_message(Recipe::AddCheck).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn add_column() {
    at_any_message(Recipe::AddColumn).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn add_foreign_key() {
    at_any_message(Recipe::AddForeignKey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn add_primary_key() {
    at_any_message(Recipe::AddPrimaryKey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn add_primary_key_of_partitions() {
    at_any_message(Recipe::PartitionsPrimaryKey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_index() {
    at_any_message(Recipe::CreateIndex).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_index_of_partitions() {
    at_any_message(Recipe::CreateIndexOfPartitions).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_index() {
    at_any_message(Recipe::DropIndex).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replace_table() {
    at_any_message(Recipe::ReplaceTable).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_not_null() {
    at_any_message(Recipe::SetNotNull).await;
}
