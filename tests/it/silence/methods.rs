//! The driver's methods, on each type that has them.

use futures::{SinkExt, TryStreamExt};
use lockkeeper_testkit::AppError;
use tokio_postgres::types::Type;

use super::{CALLERS, KEY, LOST, Row, SILENCE, Seen};

const METHODS: [&str; 16] = [
    "query",
    "query_one",
    "query_opt",
    "query_raw",
    "query_typed",
    "execute",
    "execute_typed",
    "execute_raw",
    "batch_execute",
    "simple_query",
    "prepare",
    "prepare_typed",
    "prepare_cached",
    "prepare_typed_cached",
    "copy_in",
    "copy_out",
];

/// A statement ends with the driver's error for a closed connection, and the wait for a stream with the caller's own.
const RIGHT: &[Seen] = &[Seen::Closed, Seen::Own];
/// A transaction may say the same in its own words.
const IN_A_TRANSACTION: &[Seen] = &[Seen::Closed, Seen::Own, LOST];

/// The wait for a stream of the driver's, which is the caller's to bound.
async fn in_time<T>(
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, AppError> {
    match tokio::time::timeout(SILENCE, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(AppError::Own(1)),
    }
}

/// Calls a method. A macro, since the methods belong to no trait.
macro_rules! call {
    ($on:expr, $method:expr) => {{
        let on = $on;
        match $method {
            "query" => drop(on.query("SELECT id FROM note WHERE id = $1", &[&1]).await?),
            "query_one" => drop(on.query_one("SELECT 1", &[]).await?),
            "query_opt" => drop(on.query_opt("SELECT 1 WHERE false", &[]).await?),
            "query_raw" => {
                let rows = on.query_raw("SELECT $1::int4", [7]).await?;
                in_time(rows.try_collect::<Vec<_>>()).await?;
            }
            "query_typed" => {
                on.query_typed("SELECT $1", &[(&7, Type::INT4)]).await?;
            }
            "execute" => {
                on.execute("INSERT INTO note VALUES ($1)", &[&2]).await?;
            }
            "execute_typed" => {
                let insert = "INSERT INTO note VALUES ($1)";
                on.execute_typed(insert, &[(&2, Type::INT4)]).await?;
            }
            "execute_raw" => {
                on.execute_raw("INSERT INTO note VALUES ($1)", [2]).await?;
            }
            "batch_execute" => on.batch_execute("INSERT INTO note VALUES (3)").await?,
            "simple_query" => drop(on.simple_query("SELECT 1").await?),
            "prepare" => drop(on.prepare("SELECT $1::int4").await?),
            "prepare_typed" => drop(on.prepare_typed("SELECT $1", &[Type::INT4]).await?),
            "prepare_cached" => drop(on.prepare_cached("SELECT $1::int4").await?),
            "prepare_typed_cached" => {
                on.prepare_typed_cached("SELECT $1", &[Type::INT4]).await?;
            }
            "copy_in" => {
                let sink = on.copy_in("COPY note FROM STDIN").await?;
                let mut sink = std::pin::pin!(sink);
                in_time(sink.send(bytes::Bytes::from_static(b"3\n"))).await?;
                in_time(sink.finish()).await?;
            }
            "copy_out" => {
                let rows = on.copy_out("COPY note TO STDOUT").await?;
                in_time(rows.try_collect::<Vec<_>>()).await?;
            }
            other => panic!("no method {other}"),
        }
    }};
}

pub(super) fn rows() -> Vec<Row> {
    METHODS.into_iter().flat_map(rows_of).collect()
}

fn rows_of(method: &'static str) -> [Row; 3] {
    [
        Row::new(
            format!("Tx::{method}"),
            CALLERS,
            IN_A_TRANSACTION,
            move |cell| async move {
                let calling = cell.keeper.transaction(async |tx| {
                    cell.begin();
                    call!(&*tx, method);
                    cell.end();
                    Ok::<_, AppError>(())
                });
                calling.await
            },
        ),
        Row::new(
            format!("XactGuard::{method}"),
            CALLERS,
            RIGHT,
            move |cell| async move {
                let guard = cell.keeper.advisory_lock(KEY).acquire().await?;
                cell.begin();
                call!(&guard, method);
                cell.end();
                guard.rollback().await;
                Ok(())
            },
        ),
        Row::new(
            format!("SessionGuard::{method}"),
            CALLERS,
            RIGHT,
            move |cell| async move {
                let guard = cell.keeper.advisory_lock(KEY).session().acquire().await?;
                cell.begin();
                call!(&guard, method);
                cell.end();
                Ok(guard.release().await?)
            },
        ),
    ]
}
