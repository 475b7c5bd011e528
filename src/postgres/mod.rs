//! What PostgreSQL says and how it is read: SQL text and its replies, the names of relations, statements, the messages
//! of the server in its languages, timestamps, and what a lock is on.

#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod lock_object;
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod message;
pub(crate) mod sql;
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod statement;
pub(crate) mod table_name;
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod timestamp;

pub use table_name::TableName;
pub(crate) use table_name::name_flaw;
