//! PostgreSQL locks that are safe inside an application.

mod advisory;
mod backoff;
mod blocker;
mod call_site;
mod deadline;
mod error;
mod keeper;
mod key;
mod mode;
mod session;
mod sql;
mod transaction;

pub use advisory::{AdvisoryLock, SessionAdvisoryLock, SessionGuard, TxAdvisoryLock, XactGuard};
pub use blocker::Blocker;
pub use call_site::CallSite;
pub use deadpool_postgres;
pub use error::{Error, ErrorKind};
pub use keeper::{Keeper, KeeperBuilder};
pub use key::LockKey;
#[cfg(feature = "compat")]
pub use key::compat;
pub use mode::AdvisoryMode;
pub use tokio_postgres;
pub use transaction::{AsyncFunc, TransactionOptions, Tx};
