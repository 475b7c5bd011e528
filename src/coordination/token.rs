//! Fencing tokens as values.

use std::fmt;

use crate::error::Error;
use crate::key::{KeyId, LockKey};

/// The bits of [`FencingToken::to_i64`] that are the counter's.
const COUNTER_BITS: u32 = 48;

/// The number of one tenure of a lock: each later holder of the same lock has a greater one.
///
/// From [`SessionGuard::fencing_token`](crate::SessionGuard::fencing_token). It has two parts, which are compared in this
/// order:
///
/// - the **epoch**: the server's timeline, which increases with each promotion of a standby, and what
///   [`Fencing::set_up`](crate::Fencing::set_up) adds to it where a timeline alone would not increase;
/// - the **counter** of the lock within the database.
///
/// So they are stored in two columns of type `bigint`, or packed into one with [`to_i64`](Self::to_i64). Both forms compare as
/// the tokens do. It shows as `epoch:counter`.
///
/// A token belongs to its lock's key. Tokens of different keys have an order too, so that they can be sorted, but it means
/// nothing.
///
/// # Examples
/// ```
/// use lockkeeper::FencingToken;
///
/// let (before, after) = (FencingToken::new("k", (1, 43)), FencingToken::new("k", (2, 43)));
/// assert!(before < after);
/// assert_eq!(after.to_string(), "2:43");
/// assert_eq!(<(i64, i64)>::from(after), (2, 43));
/// assert_eq!(FencingToken::from_i64("k", after.to_i64()?), after);
/// # Ok::<_, lockkeeper::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken {
    epoch: i64,
    counter: i64,
    key: KeyId,
}

impl FencingToken {
    /// A token that was kept as its two numbers, epoch and counter.
    #[must_use]
    pub fn new(key: impl Into<LockKey>, (epoch, counter): (i64, i64)) -> Self {
        Self::of(&key.into(), (epoch, counter))
    }

    pub(super) fn of(key: &LockKey, (epoch, counter): (i64, i64)) -> Self {
        Self {
            epoch,
            counter,
            key: key.id(),
        }
    }

    getters! {
        /// The first part: the server's timeline, and what was added to it.
        epoch: i64;

        /// The second part.
        counter: i64;
    }

    /// The lock that it is a token of, without the name.
    #[must_use]
    pub fn key(&self) -> LockKey {
        LockKey::from(self.key)
    }

    /// Both parts in one number, which compares as the token does: the epoch's 15 bits above the counter's 48.
    ///
    /// # Errors
    /// [`Config`](crate::ErrorKind::Config) where a part does not fit: an epoch of 2¹⁵ or more, a counter of 2⁴⁸ or more, or
    /// one below zero.
    pub fn to_i64(&self) -> Result<i64, Error> {
        let fits = |part: i64, bits: u32| (0..1_i64 << bits).contains(&part);
        if fits(self.epoch, i64::BITS - 1 - COUNTER_BITS) && fits(self.counter, COUNTER_BITS) {
            Ok(self.epoch << COUNTER_BITS | self.counter)
        } else {
            Err(Error::config(format!(
                "the fencing token {self} does not fit in one number; its epoch has 15 bits there, its counter 48"
            ))
            .with_key(&self.key()))
        }
    }

    /// A token that was kept as the number of [`to_i64`](Self::to_i64).
    #[must_use]
    pub fn from_i64(key: impl Into<LockKey>, number: i64) -> Self {
        let counter = number & ((1 << COUNTER_BITS) - 1);
        Self::new(key, (number >> COUNTER_BITS, counter))
    }
}

/// Epoch and counter.
impl From<FencingToken> for (i64, i64) {
    fn from(token: FencingToken) -> Self {
        (token.epoch, token.counter)
    }
}

/// `epoch:counter`.
impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.counter)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let fits = |epoch, counter| FencingToken::new(1, (epoch, counter)).to_i64();
        assert_eq!(fits((1 << 15) - 1, (1 << 48) - 1).ok(), Some(i64::MAX));
        assert_eq!(fits(0, 0).ok(), Some(0));
        for (epoch, counter) in [(1 << 15, 0), (0, 1 << 48), (-1, 0), (0, -1), (i64::MAX, 1)] {
            let error = fits(epoch, counter).expect_err("too large");
            assert!(error.to_string().contains("does not fit"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn one_number_compares_as_two_do(
            a in (0_i64..1 << 15, 0_i64..1 << 48), b in (0_i64..1 << 15, 0_i64..1 << 48),
        ) {
            let (one, other) = (FencingToken::new("k", a), FencingToken::new("k", b));
            prop_assert_eq!(one.cmp(&other), a.cmp(&b));
            let (first, second) = (one.to_i64().expect("it fits"), other.to_i64().expect("it fits"));
            prop_assert_eq!(first.cmp(&second), a.cmp(&b));
            prop_assert_eq!(FencingToken::from_i64("k", first), one);
        }
    }
}
