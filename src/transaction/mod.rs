//! Transactions that own their connection: [`Tx`], and the runner that repeats them.

mod async_func;
mod held;
mod options;
mod runner;
mod savepoint;
mod tx;

pub use async_func::AsyncFunc;
pub(crate) use held::Held;
pub use options::TransactionOptions;
pub(crate) use runner::{Policy, run};
pub use tx::Tx;
pub(crate) use tx::open;
