//! A throw-away PostgreSQL (and PgBouncer) for lockkeeper's tests, examples and benches, and what the tests share.
//!
//! ```no_run
//! # async fn example() -> Result<(), tokio_postgres::Error> {
//! let database = lockkeeper_testkit::Server::shared().database().await;
//! let client = database.connect().await;
//! client.batch_execute("SELECT pg_advisory_lock(1)").await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Which server
//!
//! The first of these that there is:
//!
//! 1. `DATABASE_URL`: an existing server, used as it is.
//! 2. An installed PostgreSQL: in the folder named by `LOCKKEEPER_PG_BIN`, the one `pg_config` names, on `PATH`, or in
//!    the usual folders of distributions.
//! 3. A server fetched once with `npm` into a cache folder.
//!
//! For 2 and 3 a private cluster is made in a temporary folder and listens on a free port of 127.0.0.1.
//! `LOCKKEEPER_PG_MAJOR` (14 to 18) demands one major version. A program run by root starts its servers under the
//! account `postgres`, or else `nobody`, since PostgreSQL refuses to run as root.
//!
//! # How long it lives
//!
//! No longer than the process that started it, however that one ends: see `guardian.rs`. Statics are not dropped in
//! Rust and a killed process runs no code at all, so a small shell process waits for the end and cleans up.
//!
//! # What the tests share
//!
//! - [`Scene`]: a database, a keeper and an observer; [`MonitorScene`], [`IncidentScene`] and [`BouncerScene`]
//!   are such scenes for a monitor, for incidents and behind a PgBouncer. [`Session`] is a connection that does not use the library.
//! - [`eventually`], [`until_waiting`] and other waits for what the server shows; [`GIVE_UP_AFTER`] is the one long timeout.
//! - [`Proxy`]: a network between a client and its server that can be cut, reset, stalled and delayed.
//! - [`StoppedBackend`]: a backend that stands still. [`TlsServer`]: a server that takes encrypted connections only.
//! - [`poll_times_and_drop`], to drop a call at any point; [`Random`]; [`CapturedLog`]; [`assert_error`].
//!
//! # Skips
//!
//! What a machine cannot offer is a [`Skip`], which a test reports and which fails the test when
//! `LOCKKEEPER_DENY_SKIPS=1`.

#![allow(
    clippy::exhaustive_enums,
    reason = "a crate for this repository only: its enums are matched here and nowhere else"
)]
#![allow(
    clippy::missing_panics_doc,
    reason = "what helps a test says what went wrong by panicking"
)]

#[cfg(not(unix))]
compile_error!("the tests start their servers on Unix only");

mod account;
mod app_error;
mod assert_error;
mod bouncer;
mod bouncer_scene;
mod captured_log;
mod cluster;
mod database;
mod error;
mod find;
mod guardian;
mod incident_scene;
mod monitor_scene;
mod npm;
mod poll;
pub mod prediction;
mod probe;
mod proxy;
mod random;
mod scene;
mod server;
mod session;
mod skip;
mod standby;
mod stopped;
mod tls_server;
mod wait;

pub use app_error::AppError;
pub use assert_error::{assert_error, assert_error_in, raise, server_error, sqlstate};
pub use bouncer::{PgBouncer, PoolMode};
pub use bouncer_scene::{BouncerScene, until_pooler_is_known};
pub use captured_log::CapturedLog;
pub use database::{Database, pool_of};
pub use error::SetupError;
pub use incident_scene::IncidentScene;
pub use monitor_scene::{MonitorScene, NINE_ROWS, keeper_as, seen_by};
pub use poll::{is_pending, poll_times_and_drop};
pub use proxy::{Fault, FaultSite, Proxy, Traffic};
pub use random::Random;
pub use scene::{Scene, median};
pub use server::Server;
pub use session::{
    Running, Session, cancel, connect, lock_by_sql, pid_of, quoted, signal, sql_key, terminate,
    unlock_by_sql,
};
pub use skip::Skip;
pub use stopped::StoppedBackend;
pub use tls_server::TlsServer;
pub use wait::{
    CLEANED_UP_WITHIN, ENDLESS, GIVE_UP_AFTER, eventually, eventually_within, in_time, in_time_of,
    until_blocking, until_closed, until_connected, until_gone, until_in_state, until_sleeping,
    until_true, until_waiting, until_waiting_for,
};
