//! A throw-away PostgreSQL (and PgBouncer) for lockkeeper's tests, examples and benches.
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
//! # Skips
//!
//! What a machine cannot offer is a [`Skip`], which a test reports and which fails the test when
//! `LOCKKEEPER_DENY_SKIPS=1`.

#![allow(
    clippy::exhaustive_enums,
    reason = "a crate for this repository only: its enums are matched here and nowhere else"
)]

#[cfg(not(unix))]
compile_error!("the tests start their servers on Unix only");

mod account;
mod bouncer;
mod cluster;
mod database;
mod error;
mod find;
mod guardian;
mod npm;
mod probe;
mod server;
mod skip;
mod standby;

pub use bouncer::{PgBouncer, PoolMode};
pub use database::Database;
pub use error::SetupError;
pub use server::Server;
pub use skip::Skip;
