//! Keys of every kind, and code that knows only the driver.

use std::borrow::Cow;
use std::pin::pin;

use futures::{SinkExt as _, TryStreamExt as _};
use lockkeeper::tokio_postgres::{self};
use lockkeeper::{LockKey, deadpool_postgres};
use lockkeeper_testkit::Scene;

use crate::{BankError, accounts, balance, withdraw};

// Keys.

#[tokio::test]
async fn keys_of_every_kind() {
    let scene = Scene::new(2).await;
    let keeper = &scene.keeper;
    let (owned, id) = (String::from("acct"), 42);
    let borrowed: &String = &owned;
    let cow: Cow<'_, str> = Cow::Borrowed("acct");
    let key = LockKey::from("acct");
    let named = [
        keeper.advisory_lock("acct"),
        keeper.advisory_lock(owned.clone()),
        keeper.advisory_lock(borrowed),
        keeper.advisory_lock(cow),
        keeper.advisory_lock(&key),
        keeper.advisory_lock(key.clone()),
        keeper.advisory_lock(owned.to_string()),
        keeper.advisory_lock(owned.as_str()),
    ];
    for lock in named {
        let guard = lock.acquire().await.unwrap();
        assert!(scene.is_held("acct").await);
        guard.rollback().await;
    }
    let spaced = [
        keeper.advisory_lock(("acct", "42")),
        keeper.advisory_lock(("acct", id.to_string())),
        keeper.advisory_lock((owned.clone(), id.to_string())),
        keeper.advisory_lock((borrowed, "42")),
        keeper.advisory_lock(("acct", &id.to_string())),
    ];
    for lock in spaced {
        let guard = lock.acquire().await.unwrap();
        assert!(scene.is_held(("acct", "42")).await);
        guard.rollback().await;
    }
    for (lock, key) in [
        (keeper.advisory_lock(0), LockKey::from(0)),
        (keeper.advisory_lock(-1_i64), LockKey::from(-1)),
        (keeper.advisory_lock(i64::from(id)), LockKey::from(42)),
        (keeper.advisory_lock((1, -2)), LockKey::from((1, -2))),
    ] {
        let guard = lock.acquire().await.unwrap();
        assert!(scene.is_held(key).await);
        guard.rollback().await;
    }

    // Sets, from what callers have at hand.
    let list = vec![String::from("x"), String::from("y")];
    let sets = [
        keeper.advisory_locks(&list),
        keeper.advisory_locks(list.clone()),
        keeper.advisory_locks(["x", "y"]),
        keeper.advisory_locks(list.iter().map(String::as_str)),
        keeper.advisory_locks(list.iter().rev().chain(&list)),
        keeper.advisory_locks([LockKey::from("x"), LockKey::from("y")]),
    ];
    for set in sets {
        let guard = set.acquire().await.unwrap();
        assert_eq!(scene.advisory_locks().await, 2);
        assert!(scene.is_held("x").await && scene.is_held("y").await);
        guard.rollback().await;
    }
    let numbers = keeper.advisory_locks(1..=3_i64).acquire().await.unwrap();
    assert_eq!(scene.advisory_locks().await, 3);
    numbers.rollback().await;
    scene.nothing_left().await;
}

// Code that knows only the driver.

/// Code generic over the driver's trait.
async fn driver_total<C: tokio_postgres::GenericClient>(
    client: &C,
) -> Result<i64, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT sum(n)::int8 FROM acct WHERE id = ANY($1)",
            &[&vec!["a", "b"]],
        )
        .await?;
    Ok(row.get(0))
}

/// Code generic over the pool's trait.
async fn pool_total<C: deadpool_postgres::GenericClient>(
    client: &C,
) -> Result<i64, tokio_postgres::Error> {
    let statement = client
        .prepare_cached("SELECT sum(n)::int8 FROM acct")
        .await?;
    let row = client.query_one(&statement, &[]).await?;
    Ok(row.get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn code_that_is_generic_over_either_client() {
    let scene = accounts(2).await;
    let keeper = scene.keeper.clone();
    let task = tokio::spawn(async move {
        keeper
            .transaction(async |tx| {
                withdraw(tx, "a", 10).await?;
                let totals = (
                    driver_total(&***tx.client()).await?,
                    pool_total(tx.client()).await?,
                );
                Ok::<_, BankError>(totals)
            })
            .await
    });
    // Both see what the transaction did, so they ran in it.
    assert_eq!(task.await.unwrap().unwrap(), (190, 190));

    let guard = scene.keeper.advisory_lock("k").acquire().await.unwrap();
    assert_eq!(driver_total(&***guard.client()).await.unwrap(), 190);
    guard.commit().await.unwrap();
    let guard = scene.keeper.advisory_lock("k").session().acquire().await;
    let guard = guard.unwrap();
    assert_eq!(pool_total(guard.client()).await.unwrap(), 190);
    guard.release().await.unwrap();
    scene.nothing_left().await;
}

/// Every query method, once, with the driver's own types.
#[tokio::test]
async fn the_drivers_methods() {
    let scene = accounts(1).await;
    scene
        .keeper
        .transaction(async |tx| {
            let statement = tx.prepare("SELECT n FROM acct WHERE id = $1").await?;
            assert_eq!(tx.query(&statement, &[&"a"]).await?.len(), 1);
            assert_eq!(
                tx.query_one(&statement, &[&"a"]).await?.get::<_, i64>(0),
                100
            );
            assert!(tx.query_opt(&statement, &[&"no"]).await?.is_none());
            let typed = tokio_postgres::types::Type::TEXT;
            let rows = tx
                .query_typed("SELECT n FROM acct WHERE id = $1", &[(&"a", typed.clone())])
                .await?;
            assert_eq!(rows.len(), 1);
            let prepared = tx
                .prepare_typed("SELECT $1", std::slice::from_ref(&typed))
                .await?;
            assert_eq!(prepared.params(), [typed]);
            let rows = tx.query_raw(&statement, [&"a"]).await?;
            let rows: Vec<_> = pin!(rows).try_collect().await?;
            assert_eq!(rows[0].get::<_, i64>(0), 100);

            let sink = tx.copy_in("COPY acct FROM STDIN").await?;
            let mut sink = pin!(sink);
            sink.send(bytes::Bytes::from_static(b"c\t1\nd\t2\n"))
                .await?;
            assert_eq!(sink.finish().await?, 2);
            let out = tx
                .copy_out("COPY (SELECT id FROM acct ORDER BY id) TO STDOUT")
                .await?;
            let out: Vec<bytes::Bytes> = pin!(out).try_collect().await?;
            assert_eq!(out.concat(), b"a\nb\nc\nd\n");

            assert_eq!(
                tx.execute("DELETE FROM acct WHERE id = ANY($1)", &[&vec!["c", "d"]])
                    .await?,
                2
            );
            assert_eq!(tx.simple_query("SELECT 1; SELECT 2").await?.len(), 6);
            tx.batch_execute("SELECT 1; SELECT 2").await?;
            Ok::<_, BankError>(())
        })
        .await
        .unwrap();
    assert_eq!(balance(&scene, "a").await, 100);
    scene.nothing_left().await;
}
