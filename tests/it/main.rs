//! The crate against a real server. One binary, so that one throw-away server serves all of it; each test has a
//! database of its own.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    reason = "a test says what went wrong by panicking"
)]

mod common;
/// The room itself: what it reads is not public.
#[path = "../../src/server_message/mod.rs"]
mod server_message;

mod cancel_safety;
mod drops;
mod environment;
mod guards;
mod isolation;
mod keys;
mod languages;
mod modes;
mod pgbouncer;
mod postgres_facts;
mod processes;
mod session_guard;
mod settings;
mod several;
mod tidy;
mod timeouts;
mod transactions;
mod uses;
