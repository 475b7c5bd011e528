//! Lock modes, and which of them conflict.
//!
//! Pure values, one file for each kind of lock: advisory locks have two modes ([`AdvisoryMode`]), tables eight
//! ([`LockMode`]), rows four ([`RowLock`]). Which statement takes which lock is in `schema::statements`. The tests in
//! `tests/it/lock_modes` verify all of these facts on a live server.

mod advisory;
mod parse;
mod row;
mod table;

pub use advisory::AdvisoryMode;
pub use parse::ParseModeError;
pub use row::RowLock;
pub use table::LockMode;
