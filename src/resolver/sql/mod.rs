//! The SQL of the resolver: signals, and what is known about the sessions they are sent to.

pub(crate) mod sessions;
pub(crate) mod signal;
