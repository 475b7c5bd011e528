//! The SQL of the monitor: the numbers of [`health`], and the server's [`settings`].

pub(crate) mod health;
pub(crate) mod settings;
