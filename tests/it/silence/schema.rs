//! Schema changes and backfills.

use std::time::Duration;

use lockkeeper::{ErrorKind, Intent};
use lockkeeper_testkit::AppError;

use super::{CALLERS, LOCK_LOST, LOST, Row, Seen, TIMEOUT, UNKNOWN};

/// A step that is silent is done again on another connection, or the change says what was lost. What it then finds locked
/// is locked by what it has lost itself.
const RIGHT: &[Seen] = &[
    Seen::Fine,
    LOST,
    LOCK_LOST,
    UNKNOWN,
    TIMEOUT,
    Seen::Kind(ErrorKind::RetriesExhausted),
];

/// Besides the silence, what is repeated has its pauses.
const BOUND: Duration = CALLERS.saturating_add(Duration::from_secs(5));

const TABLES: &str = "DROP TABLE IF EXISTS lockkeeper_migration, lockkeeper_backfill, child, parent, parent_new, parent_old; \
     CREATE TABLE parent (id int NOT NULL, a int); INSERT INTO parent SELECT n, n FROM generate_series(1, 10) n; \
     CREATE UNIQUE INDEX parent_id ON parent (id); \
     CREATE TABLE child (id bigint PRIMARY KEY, parent int, n int NOT NULL DEFAULT 0); \
     INSERT INTO child SELECT n, 1 FROM generate_series(1, 10) n";

fn row<F>(name: &str, call: impl Fn(lockkeeper::Keeper) -> F + Send + Sync + Copy + 'static) -> Row
where
    F: Future<Output = Result<(), lockkeeper::Error>> + Send + 'static,
{
    Row::new(name, BOUND, RIGHT, move |cell| async move {
        cell.begin();
        call(cell.keeper.clone()).await.map_err(AppError::Keeper)
    })
    .at_commit(RIGHT)
    .lanes(4)
    .setup(TABLES)
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        row("schema change", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema
                .change("ALTER TABLE parent ADD COLUMN b int")
                .await
                .map(drop)
        }),
        row("schema preflight", |keeper| async move {
            let schema = keeper.schema();
            let sql = "ALTER TABLE parent ADD COLUMN b int";
            schema.preflight(Intent::from(sql)).await.map(drop)
        }),
        row("schema dry_run", |keeper| async move {
            let schema = keeper.schema();
            schema
                .dry_run("ALTER TABLE parent ADD COLUMN b int")
                .await
                .map(drop)
        }),
        row("schema create_index", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema.create_index("parent", ["a"]).await.map(drop)
        }),
        row("schema drop_index", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema.drop_index("parent_id").await.map(drop)
        }),
        row("schema add_primary_key", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema.add_primary_key("parent", ["id"]).await.map(drop)
        }),
        row("schema add_foreign_key", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema
                .add_foreign_key("child", ["parent"], "parent", ["id"])
                .await
                .map(drop)
        }),
        row("schema add_check", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema
                .add_check("parent", "positive", "a > 0")
                .await
                .map(drop)
        }),
        row("schema set_not_null", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema.set_not_null("parent", "a").await.map(drop)
        }),
        row("schema add_column", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema
                .add_column("parent", "b", "int")
                .default("1")
                .not_null()
                .await
                .map(drop)
        }),
        row("schema replace_table", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema
                .replace_table("parent", "parent_new")
                .like_old()
                .build(
                    "DROP TABLE IF EXISTS parent_new; CREATE TABLE parent_new (LIKE parent); \
                        INSERT INTO parent_new SELECT * FROM parent",
                )
                .await
                .map(drop)
        }),
        row("schema migrate_once", |keeper| async move {
            let schema = keeper.schema().deadline(WITHIN);
            schema
                .migrate_once("silence", async |_| Ok::<_, lockkeeper::Error>(()))
                .await
                .map(drop)
        }),
        row("backfill run", |keeper| async move {
            backfill(&keeper).run().await.map(drop)
        }),
        row("backfill try_run", |keeper| async move {
            backfill(&keeper).try_run().await.map(drop)
        }),
    ]
}

fn backfill(keeper: &lockkeeper::Keeper) -> lockkeeper::Backfill {
    let fill = keeper.backfill("child", "id").set("n = n + 1");
    fill.batch_rows(5..=5).max_lock_wait(WITHIN)
}

/// In which a change may be repeated.
const WITHIN: Duration = Duration::from_secs(2);
