//! The crate against a real server. One binary, so that one throw-away server serves all of it; each test has a
//! database of its own.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    reason = "a test says what went wrong by panicking"
)]

mod autovacuum;
mod backfill;
mod cancel_safety;
mod caught;
mod causes;
mod citations;
mod commit_outcome;
mod comparison;
mod conflict_group;
mod coordination;
mod diagnoses;
mod doctor;
mod drops;
mod environment;
mod guards;
mod health;
mod hooks;
mod incidents;
mod isolation;
mod json;
mod keys;
mod life_cycle;
mod line;
mod lock_modes;
mod lock_rows;
mod migrate_once;
mod million;
mod missing_rights;
mod modes;
mod monitor_silence;
mod monitor_tree;
mod pgbouncer;
mod pictures;
mod postgres_facts;
mod processes;
mod recovery;
mod resolver;
mod retry;
mod schema_change;
mod schema_index;
mod schema_killed;
mod schema_recipes;
mod schema_refusals;
mod schema_replace;
mod sections;
mod server_log;
mod session_guard;
mod settings;
mod several;
mod side_connections;
mod signals;
mod silence;
mod spans;
mod tidy;
mod timeouts;
mod tls;
mod transactions;
mod waiters;
mod watchdog;
mod watching;
