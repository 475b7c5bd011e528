//! The SQL of the resolver: signals, and what else is known of the sessions they are for.

pub(crate) mod sessions;
pub(crate) mod signal;
