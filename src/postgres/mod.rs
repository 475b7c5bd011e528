//! PostgreSQL's texts and how to parse them: SQL and its replies, relation names, statements, the server's messages in
//! its languages, timestamps, and locked objects.

#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod lock_object;
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod message;
pub(crate) mod sql;
pub(crate) mod statement;
pub(crate) mod table_name;
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod text;
#[cfg(any(feature = "incidents", feature = "server-log"))]
pub(crate) mod timestamp;

pub use table_name::TableName;
pub(crate) use table_name::name_flaw;
