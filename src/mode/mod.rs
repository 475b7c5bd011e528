//! How strongly a lock is held, in PostgreSQL's words: what conflicts with what, and which statement takes which lock.
//!
//! Plain values, one kind of lock a file: advisory locks have two modes ([`AdvisoryMode`]), tables eight ([`LockMode`]),
//! rows four ([`RowLock`]). `statements` says who takes them ([`StatementLock`]). What is said here of the server, all
//! of it, is asked of a live one in `tests/it/lock_modes`.

mod advisory;
mod parse;
mod row;
mod table;

pub use advisory::AdvisoryMode;
pub use parse::ParseModeError;
pub use row::RowLock;
pub use table::LockMode;
