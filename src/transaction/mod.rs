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
mod section;
mod spans;
pub(crate) mod sql;
mod tx;

pub use async_func::{AsyncFunc, RunsAgain};
pub(crate) use commit::{Carried, Carry, commit};
pub(crate) use held_lock::HeldLock;
pub(crate) use open::OpenPlain;
pub(crate) use options::Resolve;
pub use options::{NoRetry, RetryIf, TransactionOptions};
pub(crate) use report::Reporting;
#[cfg(feature = "incidents")]
pub(crate) use report::{AfterFailure, Deferred, FailedAttempt, Reporter};
pub use rows::LockRows;
pub(crate) use runner::{Open, Policy, Runner, run};
pub(crate) use section::check_not_held;

/// A future whose type its caller need not know, nor compile.
pub(crate) type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;
pub use tx::Tx;
