//! Waiting for what the server shows, and for nothing else.
//!
//! A test orders events by states that it can see: in `pg_locks`, in `pg_stat_activity`, in the counters of a
//! [`Proxy`](crate::Proxy). It never sleeps for as long as something is thought to take.

use std::time::{Duration, Instant};

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config};

use crate::probe;

/// When a state that must come is given up, and the test has failed. Far longer than anything takes on a slow machine,
/// so it shows nothing but that the state does not come.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

/// Within this time everything is as if a call that was dropped had never been.
///
/// It takes some milliseconds. This is the bound of what is asserted, and not [`GIVE_UP_AFTER`], because after ten seconds
/// the library closes a connection that does not answer. That frees a lock too, but it is no release.
pub const CLEANED_UP_WITHIN: Duration = Duration::from_secs(8);

/// A wait for a lock that outlasts every test.
pub const ENDLESS: Duration = Duration::from_secs(3600);

/// How often a state is asked for.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits for a state; panics with `what` if it does not come.
pub async fn eventually(what: &str, state: impl AsyncFnMut() -> bool) {
    eventually_within(GIVE_UP_AFTER, what, state).await;
}

/// The same where the time itself is asserted.
pub async fn eventually_within(within: Duration, what: &str, mut state: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !state().await {
        assert!(started.elapsed() < within, "{what} (after {within:?})");
        tokio::time::sleep(PAUSE).await;
    }
}

/// What a future gives that must come to its end; panics with `what` if it does not.
pub async fn in_time<F: Future>(what: &str, future: F) -> F::Output {
    in_time_of(GIVE_UP_AFTER, what, future).await
}

/// The same where the time itself is asserted.
pub async fn in_time_of<F: Future>(within: Duration, what: &str, future: F) -> F::Output {
    match tokio::time::timeout(within, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} (after {within:?})"),
    }
}

/// Waits until a query gives one row that is `true`; panics with `what` if it does not.
///
/// Unlike [`eventually`] it can be used in a task and in a transaction's body: rustc cannot see that a future with an
/// async closure in it is `Send`.
pub async fn until_true(
    client: &Client,
    what: &str,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
) {
    until_true_within(GIVE_UP_AFTER, client, what, sql, parameters).await;
}

/// The same where the time itself is asserted.
pub(crate) async fn until_true_within(
    within: Duration,
    client: &Client,
    what: &str,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
) {
    let started = Instant::now();
    loop {
        let row = client.query_one(sql, parameters).await;
        if row.expect(sql).get(0) {
            return;
        }
        assert!(started.elapsed() < within, "{what} (after {within:?})");
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits until a backend waits for a lock.
///
/// The server shows a wait a moment before it shows when the wait began, and the library goes by that: so does this.
pub async fn until_waiting(observer: &Client, pid: i32) {
    let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted AND waitstart IS NOT NULL)";
    until_true(observer, "the backend waits for no lock", sql, &[&pid]).await;
}

/// Waits until a backend has waited for a lock for so long without a pause, by the server's clock.
pub async fn until_waiting_for(observer: &Client, pid: i32, time: Duration) {
    let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted \
               AND waitstart < clock_timestamp() - make_interval(secs => $2))";
    let what = format!("the backend does not wait for a lock for {time:?}");
    until_true(observer, &what, sql, &[&pid, &time.as_secs_f64()]).await;
}

/// Waits until another session waits for a lock of this client's session.
pub async fn until_blocking(client: &Client) {
    let sql = "SELECT EXISTS (SELECT FROM pg_locks \
               WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)))";
    until_true(client, "no session waits for this one", sql, &[]).await;
}

/// Waits until a backend sleeps in `pg_sleep`.
pub async fn until_sleeping(observer: &Client, pid: i32) {
    let sql =
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep')";
    until_true(observer, "the backend does not sleep", sql, &[&pid]).await;
}

/// Waits until a backend is in a state of `pg_stat_activity`, such as `idle in transaction`.
pub async fn until_in_state(observer: &Client, pid: i32, state: &str) {
    let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND state = $2)";
    let what = format!("{pid} is not {state}");
    until_true(observer, &what, sql, &[&pid, &state]).await;
}

/// Waits until the driver has seen the end of a connection.
pub async fn until_closed(client: &Client) {
    let started = Instant::now();
    while !client.is_closed() {
        assert!(
            started.elapsed() < GIVE_UP_AFTER,
            "the connection stays open"
        );
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits until a server takes connections to a database, and gives one.
pub async fn until_connected(config: &Config) -> Client {
    let started = Instant::now();
    loop {
        match probe::connect(config).await {
            Ok(client) => return client,
            Err(error) => assert!(
                started.elapsed() < GIVE_UP_AFTER,
                "{}",
                probe::describe(&error)
            ),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits until a backend has ended.
pub async fn until_gone(observer: &Client, pid: i32) {
    let sql = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)";
    until_true(observer, "the backend has not ended", sql, &[&pid]).await;
}
