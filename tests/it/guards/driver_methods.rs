//! The driver's methods on guards and transactions.

use futures::{SinkExt as _, StreamExt as _, TryStreamExt as _, pin_mut};
use lockkeeper::Error;
use lockkeeper_testkit::Scene;
use tokio_postgres::types::Type;

use super::{notes, scene_with_notes};

/// Generic over the driver's trait.
async fn one_by_driver(client: &impl tokio_postgres::GenericClient) -> i32 {
    client.query_one("SELECT 1", &[]).await.unwrap().get(0)
}

/// Generic over the pool's trait.
async fn one_by_pool(client: &impl deadpool_postgres::GenericClient) -> i32 {
    let statement = client.prepare_cached("SELECT 1").await.unwrap();
    client.query_one(&statement, &[]).await.unwrap().get(0)
}

/// Every query method of `$owner`, all of them on one backend; leaves the rows 1 to 7 in `note`.
macro_rules! use_every_method {
    ($owner:expr) => {{
        let owner = $owner;
        let pid = owner.backend_pid().unwrap();
        const PID: &str = "SELECT pg_backend_pid()";

        let rows = owner.query(PID, &[]).await.unwrap();
        assert_eq!(rows[0].get::<_, i32>(0), pid);
        let row = owner
            .query_one("SELECT $1::int4 + 1", &[&1_i32])
            .await
            .unwrap();
        assert_eq!(row.get::<_, i32>(0), 2);
        owner
            .query_one("SELECT 1 WHERE false", &[])
            .await
            .unwrap_err();
        assert!(
            owner
                .query_opt("SELECT 1 WHERE false", &[])
                .await
                .unwrap()
                .is_none()
        );
        assert!(owner.query_opt(PID, &[]).await.unwrap().is_some());
        let rows = owner
            .query_raw("SELECT generate_series(1, $1)", [3_i32])
            .await
            .unwrap();
        assert_eq!(rows.try_collect::<Vec<_>>().await.unwrap().len(), 3);
        let rows = owner
            .query_typed("SELECT $1 || 'b'", &[(&"a", Type::TEXT)])
            .await
            .unwrap();
        assert_eq!(rows[0].get::<_, &str>(0), "ab");

        let insert = "INSERT INTO note VALUES ($1)";
        assert_eq!(owner.execute(insert, &[&1_i32]).await.unwrap(), 1);
        assert_eq!(
            owner
                .execute_typed(insert, &[(&2_i32, Type::INT4)])
                .await
                .unwrap(),
            1
        );
        assert_eq!(owner.execute_raw(insert, [3_i32]).await.unwrap(), 1);
        owner
            .batch_execute("INSERT INTO note VALUES (4); SELECT 1")
            .await
            .unwrap();
        let messages = owner.simple_query("SELECT 1; SELECT 2").await.unwrap();
        let rows = messages
            .iter()
            .filter(|message| matches!(message, tokio_postgres::SimpleQueryMessage::Row(_)));
        assert_eq!(rows.count(), 2);

        let statement = owner.prepare(insert).await.unwrap();
        assert_eq!(owner.execute(&statement, &[&5_i32]).await.unwrap(), 1);
        let statement = owner
            .prepare_typed("SELECT $1", &[Type::INT8])
            .await
            .unwrap();
        assert_eq!(
            owner
                .query_one(&statement, &[&6_i64])
                .await
                .unwrap()
                .get::<_, i64>(0),
            6
        );
        let statement = owner.prepare_cached(insert).await.unwrap();
        assert_eq!(owner.execute(&statement, &[&6_i32]).await.unwrap(), 1);
        let statement = owner
            .prepare_typed_cached("SELECT $1", &[Type::INT4])
            .await
            .unwrap();
        assert_eq!(
            owner
                .query_one(&statement, &[&6_i32])
                .await
                .unwrap()
                .get::<_, i32>(0),
            6
        );

        let sink = owner.copy_in("COPY note FROM STDIN").await.unwrap();
        pin_mut!(sink);
        sink.send(bytes_of("7\n")).await.unwrap();
        assert_eq!(sink.finish().await.unwrap(), 1);
        let out = owner
            .copy_out("COPY (SELECT n FROM note ORDER BY n) TO STDOUT")
            .await
            .unwrap();
        pin_mut!(out);
        let mut copied = Vec::new();
        while let Some(chunk) = out.next().await {
            copied.extend_from_slice(&chunk.unwrap());
        }
        assert_eq!(String::from_utf8_lossy(&copied), "1\n2\n3\n4\n5\n6\n7\n");

        assert_eq!(one_by_driver(&***owner.client()).await, 1);
        assert_eq!(one_by_pool(owner.client()).await, 1);
        let row = owner.client().query_one(PID, &[]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), pid);
        pid
    }};
}

/// Tries a few times whether a connection is kept. One whose plain client was given to the caller has only some
/// milliseconds for the answer that tells its state, which not every machine always has.
async fn keeps_its_connection(mut is_kept: impl AsyncFnMut() -> bool) {
    for _ in 0..5 {
        if is_kept().await {
            return;
        }
    }
    panic!("the connection is never kept");
}

async fn delete_notes(scene: &Scene) {
    let delete = scene.observer.batch_execute("DELETE FROM note");
    delete.await.unwrap();
}

fn bytes_of(text: &'static str) -> std::io::Cursor<&'static [u8]> {
    std::io::Cursor::new(text.as_bytes())
}

#[tokio::test]
async fn a_transaction_guard_offers_the_drivers_methods_inside_its_transaction() {
    let scene = scene_with_notes(1).await;
    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    let pid = use_every_method!(&guard);
    assert_eq!(notes(&scene).await, [0; 0], "not before the commit");
    guard.commit().await.unwrap();
    assert_eq!(notes(&scene).await, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(scene.next_pid().await, pid, "the connection is kept");

    // And a drop undoes all of it.
    delete_notes(&scene).await;
    keeps_its_connection(async || {
        let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
        let pid = use_every_method!(&guard);
        drop(guard);
        scene.nothing_left().await;
        assert_eq!(notes(&scene).await, [0; 0]);
        pid == scene.next_pid().await
    })
    .await;
}

#[tokio::test]
async fn a_transaction_offers_the_drivers_methods() {
    let scene = scene_with_notes(1).await;
    let pid = scene
        .keeper
        .transaction(async |tx| {
            let pid = use_every_method!(&*tx);
            assert_eq!(notes(&scene).await, [0; 0], "not before the commit");
            Ok::<_, Error>(pid)
        })
        .await
        .unwrap();
    assert_eq!(notes(&scene).await, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(scene.next_pid().await, pid, "the connection is kept");
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_session_guard_offers_the_drivers_methods() {
    let scene = scene_with_notes(1).await;
    let lock = scene.keeper.advisory_lock("k").session();
    keeps_its_connection(async || {
        delete_notes(&scene).await;
        let guard = lock.clone().acquire().await.unwrap();
        let pid = use_every_method!(&guard);
        assert_eq!(
            notes(&scene).await,
            [1, 2, 3, 4, 5, 6, 7],
            "each for itself"
        );
        assert_eq!(scene.holders("k").await, [pid]);
        guard.release().await.unwrap();
        pid == scene.next_pid().await
    })
    .await;

    keeps_its_connection(async || {
        delete_notes(&scene).await;
        let mut guard = lock.clone().acquire().await.unwrap();
        let pid = guard.backend_pid().unwrap();
        guard
            .transaction(async |tx| {
                assert_eq!(use_every_method!(&*tx), pid);
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        drop(guard);
        scene.nothing_left().await;
        pid == scene.next_pid().await
    })
    .await;
}
