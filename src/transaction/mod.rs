//! Transactions that own their connection: [`Tx`], and the runner that repeats them.

mod async_func;
mod commit;
mod commit_outcome;
mod held_lock;
mod hooks;
mod open;
mod options;
mod report;
mod rows;
mod runner;
mod savepoint;
pub(crate) mod sql;
mod tx;

pub use async_func::AsyncFunc;
pub(crate) use held_lock::HeldLock;
pub(crate) use open::open;
pub use options::{NoRetry, RetryIf, TransactionOptions};
#[cfg(feature = "incidents")]
pub(crate) use report::{FailedAttempt, Reporter};
pub use rows::LockRows;
pub(crate) use runner::{Policy, run};
pub use tx::Tx;
