//! The crate in the hands of applications, beside the crates that they use. One binary, so that one throw-away server
//! serves all of it; each test has a database of its own.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    reason = "a test says what went wrong by panicking"
)]

mod common;

mod applications;
mod health_metrics;
