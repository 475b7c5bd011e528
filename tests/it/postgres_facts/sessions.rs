//! Sessions, their settings, and the driver.

use std::time::Duration;

use futures::FutureExt as _;
use lockkeeper_testkit::{eventually, pid_of, until_waiting, until_waiting_for};

use super::{advisory, database, texts};

/// One poll puts a simple query on its way, in order with what follows; a `query` has only asked for preparation then.
#[tokio::test]
async fn the_driver_sends_a_simple_query_at_the_first_poll() {
    let database = database().await;
    let (client, observer) = (database.connect().await, database.connect().await);
    let pid = pid_of(&client).await;
    assert!(
        client
            .batch_execute("SELECT pg_advisory_lock(1)")
            .now_or_never()
            .is_none()
    );
    eventually("batch_execute was not sent", async || {
        advisory(&observer, pid, true).await == 1
    })
    .await;
    assert!(
        client
            .simple_query("SELECT pg_advisory_lock(2)")
            .now_or_never()
            .is_none()
    );
    eventually("simple_query was not sent", async || {
        advisory(&observer, pid, true).await == 2
    })
    .await;
    // Two at once, in order: the second fails if it comes first.
    assert!(
        client
            .batch_execute("CREATE TABLE t (n int)")
            .now_or_never()
            .is_none()
    );
    client
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();

    assert!(
        client
            .execute("SELECT pg_advisory_lock(3)", &[])
            .now_or_never()
            .is_none()
    );
    // What is answered after it shows that it was never run.
    client.batch_execute("SELECT 1").await.unwrap();
    assert_eq!(advisory(&observer, pid, true).await, 2);
}

/// A statement whose client has gone away keeps waiting, and a cancel request ends it.
#[tokio::test]
async fn a_waiter_without_a_client_stays_queued_until_it_is_cancelled() {
    let database = database().await;
    let (holder, waiter, observer) = (
        database.connect().await,
        database.connect().await,
        database.connect().await,
    );
    holder
        .batch_execute("SELECT pg_advisory_lock(1)")
        .await
        .unwrap();
    let pid = pid_of(&waiter).await;
    let token = waiter.cancel_token();
    let wait =
        tokio::spawn(async move { waiter.batch_execute("SELECT pg_advisory_lock(1)").await });
    until_waiting(&observer, pid).await;
    wait.abort();
    assert!(wait.await.is_err());
    until_waiting_for(&observer, pid, Duration::from_millis(50)).await;
    assert_eq!(advisory(&observer, pid, false).await, 1);
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    eventually("the cancelled waiter is queued still", async || {
        advisory(&observer, pid, false).await == 0
    })
    .await;
}

/// The head of an `application_name` is kept. Until PostgreSQL 15 what is not printable ASCII becomes `?`, then an
/// escape of its bytes.
#[tokio::test]
async fn application_name_is_cut_at_63_bytes_and_keeps_its_head() {
    let database = database().await;
    let client = database.connect().await;
    let name: String = ('a'..='z').chain('0'..='9').cycle().take(100).collect();
    let shown = texts(
        &client,
        &format!("BEGIN; SET LOCAL application_name = '{name}'; SHOW application_name; ROLLBACK; SHOW application_name"),
    )
    .await;
    assert_eq!(shown, [&name[..63], ""]);
    let longest = &name[..63];
    let set = format!("SELECT set_config('application_name', '{longest}', false)");
    assert_eq!(texts(&client, &set).await, [longest]);

    let zoe = texts(
        &client,
        "SELECT set_config('application_name', 'zoë', false)",
    )
    .await;
    let expected = if database.server().major() < 16 {
        "zo??"
    } else {
        r"zo\xc3\xab"
    };
    assert_eq!(zoe, [expected]);
}

/// The text of a time setting is an interval, whatever its unit: seconds can be had from it.
#[tokio::test]
async fn a_time_setting_as_shown_is_an_interval() {
    let client = database().await.connect().await;
    for (set, seconds) in [
        ("0", "0"),
        ("1500", "1.5"),
        ("60000", "60"),
        ("7200000", "7200"),
        ("86400000", "86400"),
    ] {
        let shown = texts(
            &client,
            &format!(
                "BEGIN; SET LOCAL statement_timeout = {set}; \
                 SELECT date_part('epoch', current_setting('statement_timeout')::interval); ROLLBACK"
            ),
        )
        .await;
        assert_eq!(shown, [seconds], "{set}");
    }
}
