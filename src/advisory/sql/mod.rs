//! The texts that take and return advisory locks.
//!
//! A set of keys is locked in the order it is given; callers sort it.

pub(crate) mod blockers;
mod keys;
mod release;
mod try_lock;
mod virtual_xids;
mod wait;

pub(crate) use keys::Locks;
pub(crate) use release::*;
pub(crate) use try_lock::*;
pub(crate) use virtual_xids::*;
pub(crate) use wait::*;

pub(crate) use crate::postgres::sql::{ROLLBACK, rollback};
