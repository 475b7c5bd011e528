//! Sets for which the server's lock table has no room.

use lockkeeper::{Error, ErrorKind, LockKey};
use lockkeeper_testkit::{
    GIVE_UP_AFTER, Scene, Server, assert_error, assert_error_in, lock_by_sql, unlock_by_sql,
};
use tokio_postgres::Client;

use super::{SCOPES, acquire, try_acquire};

fn assert_refused_unsent(error: &Error, what: &str) {
    assert_error_in(
        what,
        error,
        ErrorKind::OutOfLocks,
        "max_locks_per_transaction",
    );
    assert_eq!(
        error.sqlstate(),
        None,
        "{what}: it was sent, and took the room of others until it failed"
    );
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_set_that_cannot_fit_is_refused_before_it_takes_the_room_of_others() {
    let scene = Scene::new(2).await;
    let row = scene
        .observer
        .query_one(
            "SELECT current_setting('max_locks_per_transaction')::int4 * (current_setting('max_connections')::int4 \
             + current_setting('max_prepared_transactions')::int4)",
            &[],
        )
        .await
        .unwrap();
    let keys: Vec<LockKey> = (0..=i64::from(row.get::<_, i32>(0)))
        .map(LockKey::from)
        .collect();
    for scope in SCOPES {
        let error = acquire(&scene.keeper, &keys, scope, GIVE_UP_AFTER)
            .await
            .unwrap_err();
        assert_refused_unsent(&error, "acquire");
        let error = try_acquire(&scene.keeper, &keys, scope).await.unwrap_err();
        assert_refused_unsent(&error, "try");
    }
    assert_eq!(scene.advisory_locks().await, 0);
    scene.nothing_left().await;
}

#[tokio::test]
async fn a_set_that_cannot_fit_is_refused_inside_a_transaction_too() {
    // Its own server: if it is not refused, it takes the room of others.
    let server = small_server();
    let scene = Scene::on(&server, 2).await;
    let keys: Vec<LockKey> = (0..20_000).map(LockKey::from).collect();
    let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
    let error = guard.advisory_locks(&keys).try_acquire().await.unwrap_err();
    assert_refused_unsent(&error, "try");
    let error = guard.advisory_locks(&keys).await.unwrap_err();
    assert_refused_unsent(&error, "wait");
    guard.query_one("SELECT 1", &[]).await.unwrap();
    assert_eq!(scene.advisory_locks().await, 1);
    guard.commit().await.unwrap();
    scene.nothing_left().await;
}

/// A server with a lock table that a test can fill.
fn small_server() -> Server {
    Server::start(&[
        ("max_locks_per_transaction", "10"),
        ("max_connections", "20"),
        ("max_prepared_transactions", "0"),
    ])
    .unwrap()
}

/// Fills the lock table but for about `room` locks.
async fn fill_but_for(client: &Client, room: i64) {
    let mut first = 1_000_000;
    let mut chunk = 512_i64;
    while chunk > 0 {
        let sql = format!(
            "SELECT pg_advisory_lock(n) FROM generate_series({first}, {first} + {chunk} - 1) n"
        );
        match client.batch_execute(&sql).await {
            Ok(()) => first += chunk,
            Err(error) => {
                assert_eq!(error.code().map(|code| code.code()), Some("53200"));
                // What it got before it failed is held on.
                client
                    .batch_execute(&format!(
                        "SELECT pg_advisory_unlock(objid::int8) FROM pg_locks WHERE locktype = 'advisory' \
                         AND pid = pg_backend_pid() AND objid >= {first}"
                    ))
                    .await
                    .unwrap();
                chunk /= 2;
            }
        }
    }
    let sql = format!(
        "SELECT pg_advisory_unlock(n) FROM generate_series({first} - {room}, {first} - 1) n"
    );
    client.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_table_that_is_full_after_all_leaves_nothing_held_and_others_unharmed() {
    let server = small_server();
    let scene = Scene::on(&server, 4).await;
    let keys: Vec<LockKey> = (0..100)
        .map(|n| {
            if n % 2 == 0 {
                LockKey::from(n)
            } else {
                LockKey::from((1, i32::try_from(n).unwrap()))
            }
        })
        .collect();
    let others = scene
        .keeper
        .advisory_lock("others")
        .session()
        .acquire()
        .await
        .unwrap();
    let holder = scene.database.connect().await;
    // Busy, so that there is waiting too.
    lock_by_sql(&holder, &keys[0]).await;
    // All connections exist, with the locks of their logins.
    scene.open_connections_but(1).await;
    fill_but_for(&holder, 40).await;
    let taken = scene.advisory_locks().await;
    assert!(taken > 200, "{taken}");

    for round in 0..3 {
        for scope in SCOPES {
            let error = try_acquire(&scene.keeper, &keys[1..], scope)
                .await
                .unwrap_err();
            assert_error_in(
                format_args!("{scope:?}"),
                &error,
                ErrorKind::OutOfLocks,
                "and 98 more (SQLSTATE 53200)",
            );
            assert_eq!(error.sqlstate().map(|code| code.code()), Some("53200"));
            assert!(error.key().is_some() && !error.is_retryable());
            scene.nothing_but(taken).await;

            let error = acquire(&scene.keeper, &keys[1..], scope, GIVE_UP_AFTER)
                .await
                .unwrap_err();
            assert_error_in(
                format_args!("{scope:?}"),
                &error,
                ErrorKind::OutOfLocks,
                "and 98 more (SQLSTATE 53200)",
            );
            scene.nothing_but(taken).await;

            // In the middle of a wait: the table is full when the busy key is free.
            let release = async {
                scene.until_awaited(&keys[0]).await;
                unlock_by_sql(&holder, &keys[0]).await;
            };
            let (result, ()) =
                tokio::join!(acquire(&scene.keeper, &keys, scope, GIVE_UP_AFTER), release);
            assert_error_in(
                format_args!("{scope:?}"),
                &result.unwrap_err(),
                ErrorKind::OutOfLocks,
                "and 99 more after",
            );
            scene.nothing_but(taken - 1).await;
            lock_by_sql(&holder, &keys[0]).await;
        }
        let mut guard = scene.keeper.advisory_lock("own").acquire().await.unwrap();
        let error = guard.advisory_locks(&keys[1..]).await.unwrap_err();
        assert_error(
            &error,
            ErrorKind::OutOfLocks,
            "and 98 more (SQLSTATE 53200)",
        );
        let error = guard.commit().await.unwrap_err();
        assert_error_in(
            format_args!("round {round}"),
            &error,
            ErrorKind::OutOfLocks,
            r#""own": an earlier statement of the transaction failed"#,
        );
        scene.nothing_but(taken).await;
    }
    // The others hold what they held, and there is room for small sets.
    assert!(!others.is_lost());
    assert!(scene.is_held("others").await);
    for scope in SCOPES {
        acquire(&scene.keeper, &keys[1..6], scope, GIVE_UP_AFTER)
            .await
            .unwrap()
            .end()
            .await;
    }
    others.release().await.unwrap();
    drop(holder);
    scene.nothing_left().await;
}
