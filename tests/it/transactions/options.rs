//! What a transaction is begun with.

use std::time::Duration;

use lockkeeper::tokio_postgres::IsolationLevel;
use lockkeeper::{Error, ErrorKind, TransactionOptions};
use lockkeeper_testkit::{Scene, assert_error, sqlstate};

#[tokio::test]
async fn options_that_cannot_work_are_refused_before_any_sql() {
    let scene = Scene::new(1).await;
    let new = TransactionOptions::new;
    for (options, text) in [
        (new().attempts(0), "attempts is 0"),
        (new().lock_timeout(Duration::ZERO), ": lock_timeout is 0"),
        (
            new().statement_timeout(Duration::ZERO),
            ": statement_timeout is 0",
        ),
        (new().idle_timeout(Duration::ZERO), ": idle_timeout is 0"),
    ] {
        let error = scene
            .keeper
            .transaction_with(options, async |_| Ok::<_, Error>(()))
            .await
            .unwrap_err();
        assert_error(&error, ErrorKind::Config, text);
        assert_eq!(error.attempts(), 0);
    }
    assert_eq!(scene.pool.status().size, 0, "a connection was opened");
}

/// Less than a millisecond is one, not none; the most that fits is taken as it is.
#[tokio::test]
async fn timeouts_of_any_length_are_set() {
    let scene = Scene::new(1).await;
    for (timeout, shown) in [
        (Duration::from_nanos(1), "1ms"),
        (Duration::from_micros(1001), "2ms"),
        (Duration::from_secs(90), "90s"),
        (Duration::MAX, "2147483647ms"),
    ] {
        let options = TransactionOptions::new()
            .lock_timeout(timeout)
            .idle_timeout(Duration::from_secs(60));
        let found = scene
            .keeper
            .transaction_with(options, async |tx| {
                let lock = tx.query_one("SHOW lock_timeout", &[]).await?;
                Ok::<String, Error>(lock.get(0))
            })
            .await
            .unwrap();
        assert_eq!(found, shown, "{timeout:?}");
    }
    assert_eq!(scene.show("lock_timeout").await, "0");
    assert_eq!(scene.show("idle_in_transaction_session_timeout").await, "0");
}

#[tokio::test]
async fn isolation_and_access_mode_are_what_was_asked_for() {
    let scene = Scene::with_two_rows(1).await;
    for (level, shown) in [
        (IsolationLevel::ReadCommitted, "read committed"),
        (IsolationLevel::RepeatableRead, "repeatable read"),
        (IsolationLevel::Serializable, "serializable"),
    ] {
        let options = TransactionOptions::new()
            .isolation(level)
            .read_only(true)
            .deferrable(true);
        let answer = scene
            .keeper
            .transaction_with(options, async |tx| {
                for (setting, expected) in [
                    ("transaction_isolation", shown),
                    ("transaction_read_only", "on"),
                    ("transaction_deferrable", "on"),
                ] {
                    let row = tx.query_one(&format!("SHOW {setting}"), &[]).await?;
                    assert_eq!(row.get::<_, &str>(0), expected);
                }
                tx.execute("INSERT INTO t VALUES (10, 0)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await;
        assert_eq!(sqlstate(&answer.unwrap_err()), "25006");
    }
    assert_eq!(scene.show("transaction_isolation").await, "read committed");
    assert_eq!(scene.show("transaction_read_only").await, "off");
    scene.nothing_left().await;
}
