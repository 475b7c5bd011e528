//! Every row, with the server silent from its first message on, from its second, …

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::FutureExt;
use lockkeeper_testkit::{Scene, Server};
use tokio::sync::Semaphore;

use super::{
    Cell, LOCK_LOST, LOST, Row, SILENCE, Seen, Silence, UNKNOWN, guards, locks, methods, schema,
    transactions,
};
use lockkeeper::ErrorKind;

/// What a call may take beyond its bound, for all that it does while the server is not silent; and so many times what the
/// machine takes, at that moment, to open the cell's connections.
const GRACE: Duration = Duration::from_secs(1);
const SETUPS: u32 = 5;

/// More messages than any call sends.
const MOST_MESSAGES: usize = 80;

/// Cells that run at the same time, of all tests here: each mostly waits, but its connections have to be opened.
static CELLS: Semaphore = Semaphore::const_new(80);
/// The same of one test.
const LANES: usize = 40;

fn all_rows() -> Vec<Row> {
    let mut rows = transactions::rows();
    rows.extend(locks::rows());
    rows.extend(guards::rows());
    rows.extend(methods::rows());
    rows.extend(schema::rows());
    rows
}

/// How the server was in a cell.
enum Met {
    Silent,
    /// The call sends fewer messages.
    NotSilent,
}

async fn new_scene(server: &Server) -> Scene {
    let scene = Scene::on(server, 1).await;
    scene
        .run(
            "CREATE TABLE note (id int4); INSERT INTO note VALUES (1), (2); \
              CREATE TABLE t (id bigint PRIMARY KEY, n int NOT NULL DEFAULT 0); \
              INSERT INTO t SELECT n FROM generate_series(1, 10) n",
        )
        .await;
    scene
}

/// Runs a row once. What is wrong about it comes as texts.
async fn run_cell(
    scene: &mut Scene,
    row: &Row,
    (silence, with_side): (Silence, bool),
    at: usize,
) -> (Met, Vec<String>) {
    scene.run(row.setup).await;
    let started = Instant::now();
    let cell = Arc::new(Cell::new(scene, silence, at, with_side).await);
    let grace = GRACE + started.elapsed() * SETUPS;
    scene.pool = cell.pool.clone();
    let holder = match row.is_busy {
        true => Some(scene.holder(super::KEY).await),
        false => None,
    };
    let bound = row.bound
        + match silence {
            // The connection that is asked, or taken instead, is silent too.
            Silence::StalledNetwork => SILENCE,
            _ => Duration::ZERO,
        };
    let mut stopped = None;
    let outcome = {
        let call = (row.call)(Arc::clone(&cell));
        let mut call = pin!(AssertUnwindSafe(call).catch_unwind());
        let mut late = pin!(cell.until_begun_for(bound + grace));
        let stop = cell.stop_backend(scene);
        tokio::select! {
            outcome = &mut call => Some(outcome),
            () = &mut late => None,
            backend = stop => {
                stopped = Some(backend);
                tokio::select! {
                    outcome = &mut call => Some(outcome),
                    () = &mut late => None,
                }
            }
        }
    };
    let message = cell.silent_message();
    cell.lift(stopped);
    drop(holder);
    let mut wrong = Vec::new();
    match outcome {
        None => wrong.push(format!("hangs for longer than {:?}", bound + grace)),
        Some(Err(_)) => wrong.push("panics".to_owned()),
        Some(Ok(outcome)) => {
            let seen = Seen::of(&outcome);
            if !is_right(row, message.as_deref(), silence, seen) {
                wrong.push(format!("ends with {outcome:?}"));
            }
        }
    }
    let left = AssertUnwindSafe(scene.nothing_left()).catch_unwind().await;
    if let Err(panic) = left {
        let text = panic.downcast_ref::<String>().cloned();
        wrong.push(text.unwrap_or_else(|| "something is left".to_owned()));
    }
    let met = match message {
        Some(_) => Met::Silent,
        None => Met::NotSilent,
    };
    let place = message.unwrap_or_else(|| "none".to_owned());
    let place = shortened(&place);
    let side = if with_side { ", side connection" } else { "" };
    let cell = format!("{}, {silence:?} at {at} {place:?}{side}", row.name);
    let wrong = wrong.into_iter().map(|wrong| format!("{cell}: {wrong}"));
    (met, wrong.collect())
}

/// The beginning and the end of a message.
fn shortened(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    match chars.len() {
        0..=70 => text.to_owned(),
        length => {
            let (begin, end) = (&chars[..40], &chars[length - 25..]);
            format!("{} … {}", String::from_iter(begin), String::from_iter(end))
        }
    }
}

fn is_right(row: &Row, message: Option<&str>, silence: Silence, seen: Seen) -> bool {
    let Some(message) = message else {
        return seen == Seen::Fine;
    };
    if silence == Silence::StalledNetwork {
        let pool = Seen::Kind(ErrorKind::Pool);
        return [LOST, UNKNOWN, pool].contains(&seen) || row.right.contains(&seen);
    }
    if message.ends_with("COMMIT") {
        return row.right_at_commit.contains(&seen);
    }
    // The driver gives a statement back in the background; it is the next message that has no answer.
    let is_next = message == "C S" && [Seen::Fine, LOST, UNKNOWN, LOCK_LOST].contains(&seen);
    is_next || row.right.contains(&seen)
}

/// A row at every so many of its messages from one on, until it sends fewer.
async fn run_lane(
    server: &Server,
    row: Arc<Row>,
    first: usize,
    how: (Silence, bool),
) -> Vec<String> {
    let mut scene = {
        let _permit = CELLS.acquire().await.unwrap();
        new_scene(server).await
    };
    let mut failures = Vec::new();
    let messages = match how.0 {
        Silence::StalledNetwork => 1,
        _ => MOST_MESSAGES,
    };
    for at in (first..messages).step_by(row.lanes) {
        let _permit = CELLS.acquire().await.unwrap();
        let (met, wrong) = run_cell(&mut scene, &row, how, at).await;
        if !wrong.is_empty() {
            failures.extend(wrong);
            // What is left there is no failure of the next one.
            scene = new_scene(server).await;
        }
        if matches!(met, Met::NotSilent) {
            return failures;
        }
    }
    if messages == MOST_MESSAGES {
        failures.push(format!("{}: not done after {messages} messages", row.name));
    }
    failures
}

async fn run_matrix(server: &Server, silence: Silence, with_side: bool) {
    // For one row, or a few, while one looks for a fault.
    let only = std::env::var("LOCKKEEPER_SILENCE_ROW").unwrap_or_default();
    let mut rows = all_rows();
    rows.retain(|row| row.name.contains(&only));
    // Those with the most cells first.
    rows.sort_by_key(|row| std::cmp::Reverse(row.lanes));
    let lanes = rows.into_iter().flat_map(|row| {
        let lanes = match silence {
            Silence::StalledNetwork => 1,
            _ => row.lanes,
        };
        let row = Arc::new(row);
        (0..lanes).map(move |first| (Arc::clone(&row), first))
    });
    let failures: Vec<String> = futures::stream::iter(lanes)
        .map(|(row, first)| run_lane(server, row, first, (silence, with_side)))
        .buffer_unordered(LANES)
        .collect::<Vec<_>>()
        .await
        .concat();
    assert!(
        failures.is_empty(),
        "{} cells fail:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// With room for all of these connections.
fn server() -> &'static Server {
    static SERVER: LazyLock<Server> =
        LazyLock::new(|| Server::start(&[("max_connections", "1500")]).unwrap());
    &SERVER
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_that_fall_silent_hold_up_no_call() {
    run_matrix(server(), Silence::StalledConnection, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn backends_that_stand_still_hold_up_no_call() {
    // One of its own: some statements of other tests wait for every backend of their server.
    let server = Server::start(&[("max_connections", "1500")]).unwrap();
    run_matrix(&server, Silence::StoppedBackend, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_network_that_falls_silent_holds_up_no_call() {
    run_matrix(server(), Silence::StalledNetwork, false).await;
}

/// What the others are compared with.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_that_end_hold_up_no_call() {
    run_matrix(server(), Silence::CutConnection, false).await;
}
