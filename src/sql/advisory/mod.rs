//! The texts that take and return advisory locks.
//!
//! A set of keys is locked in the order it is given; callers sort it.

mod attempt;
mod keys;
mod release;
mod wait;

pub(crate) use attempt::*;
pub(crate) use keys::Locks;
pub(crate) use release::*;
pub(crate) use wait::*;
