//! The SQL of a connection: what is asked of its server once, what is prepared on it, and how its statement is cancelled.

mod prepared;
pub(crate) mod server;

pub(crate) use prepared::{Ask, Preparable, hand_over_of, unlock_of};
