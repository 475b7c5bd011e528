//! The readable names this process has used for its locks.
//!
//! One register for the whole process serves two ends: two different names that meet in one number are found before
//! they silently share a lock, and a number seen in `pg_locks` can be shown by its name.
//!
//! Names in use are never forgotten. Of those no longer in use the register remembers a bounded number; one that comes
//! back now and then stays longer than one used once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use super::{KeyId, LockKey};

/// Names remembered that are not in use.
const MAX_IDLE_NAMES: usize = 16 * 1024;
/// Bytes of text in those names.
const MAX_IDLE_BYTES: usize = 4 * 1024 * 1024;
/// Longer names are forgotten with their last use, so that one of them does not push out thousands of others.
const MAX_IDLE_NAME_BYTES: usize = 16 * 1024;

static REGISTER: LazyLock<Mutex<Register>> = LazyLock::new(Mutex::default);

/// Says that the key is in use, until the registration is dropped, and remembers its name.
///
/// A key without a name needs no register and never collides.
///
/// # Errors
///
/// [`Collision`] if another name has the same number, be it in use or only remembered.
pub(crate) fn register(key: &LockKey) -> Result<Registration, Collision> {
    if key.name.is_none() {
        return Ok(Registration { id: None });
    }
    match lock().acquire(key) {
        Ok(()) => Ok(Registration { id: Some(key.id) }),
        Err(known) => Err(Collision {
            refused: key.clone(),
            known,
        }),
    }
}

/// The named key that this process last used for the number, if it still remembers it.
#[cfg(any(
    feature = "incidents",
    feature = "server-log",
    feature = "coordination"
))]
pub(crate) fn lookup(id: KeyId) -> Option<LockKey> {
    lock().entries.get(&id).map(|entry| entry.key.clone())
}

/// The key with the name that this process knows for it, if it knows one.
#[cfg(any(feature = "incidents", feature = "coordination"))]
pub(crate) fn named(key: LockKey) -> LockKey {
    lookup(key.id()).unwrap_or(key)
}

/// A name in use. Dropping it ends the use; the name is remembered for a while.
#[derive(Debug)]
#[must_use = "the name counts as in use only while the registration lives"]
pub(crate) struct Registration {
    id: Option<KeyId>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            lock().release(id);
        }
    }
}

/// Two different names with one number: taking both as locks would let each exclude, or release, the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Collision {
    /// The key that was to be used.
    pub(crate) refused: LockKey,
    /// The key this process uses, or has used, under the same number.
    pub(crate) known: LockKey,
}

fn lock() -> MutexGuard<'static, Register> {
    // Nothing that panics runs while the lock is held, and no half-done change would be worse than a forgotten name.
    REGISTER.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Register {
    entries: BTreeMap<KeyId, Entry>,
    /// Each entry that was ever released, once, in the order in which they are considered for removal (“second
    /// chance”). Invariant: `idle` entries are in it; it is never longer than `entries`.
    queue: VecDeque<KeyId>,
    idle: usize,
    idle_bytes: usize,
}

#[derive(Debug)]
struct Entry {
    key: LockKey,
    uses: usize,
    /// Whether the entry is in the queue.
    queued: bool,
    /// Whether the entry has been used since it was queued.
    revived: bool,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.key.name.as_deref().map_or(0, super::Name::text_len)
    }
}

impl Register {
    /// Counts one more use, or gives back the key whose name is in the way.
    fn acquire(&mut self, key: &LockKey) -> Result<(), LockKey> {
        let entry = self.entries.entry(key.id).or_insert_with(|| Entry {
            key: key.clone(),
            uses: 0,
            queued: false,
            revived: false,
        });
        if entry.key != *key {
            return Err(entry.key.clone());
        }
        if entry.uses == 0 && entry.queued {
            entry.revived = true;
            self.idle -= 1;
            self.idle_bytes -= entry.bytes();
        }
        entry.uses += 1;
        Ok(())
    }

    fn release(&mut self, id: KeyId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        entry.uses = entry.uses.saturating_sub(1);
        if entry.uses > 0 {
            return;
        }
        if !entry.queued {
            // Never queued and too long to be kept: nothing else refers to it.
            if entry.bytes() > MAX_IDLE_NAME_BYTES {
                self.entries.remove(&id);
                return;
            }
            entry.queued = true;
            self.queue.push_back(id);
        }
        self.idle += 1;
        self.idle_bytes += entry.bytes();
        self.forget_the_surplus();
    }

    fn forget_the_surplus(&mut self) {
        // Terminates: each turn takes an entry out of the queue or takes away the one second chance it had.
        while self.idle > MAX_IDLE_NAMES || self.idle_bytes > MAX_IDLE_BYTES {
            let Some(id) = self.queue.pop_front() else {
                return;
            };
            let Some(entry) = self.entries.get_mut(&id) else {
                continue;
            };
            if entry.uses > 0 {
                entry.queued = false;
                entry.revived = false;
            } else if entry.revived {
                entry.revived = false;
                self.queue.push_back(id);
            } else {
                self.idle -= 1;
                self.idle_bytes -= entry.bytes();
                self.entries.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A key with any name for any number.
    fn key(number: i64, name: &str) -> LockKey {
        let mut key = LockKey::from(name);
        key.id = KeyId::Int8(number);
        key
    }

    #[test]
    fn meeting_names_are_refused_until_forgotten() {
        let first = LockKey::from(("names-a\u{1f}b", "c"));
        let second = LockKey::from(("names-a", "b\u{1f}c"));
        let registration = register(&first).expect("the first of its number");
        let collision = register(&second).expect_err("the same number");
        assert_eq!((&collision.refused, &collision.known), (&second, &first));
        drop(registration);
        // No longer in use, but remembered.
        assert_eq!(lookup(second.id()), Some(first.clone()));
        register(&second).expect_err("still known");
        drop(register(&first).expect("its own name"));
    }

    #[test]
    fn numbers_need_no_register() {
        let named = LockKey::from("names-numbers");
        let number = LockKey::from(named.id());
        let _by_number = register(&number).expect("numbers never collide");
        assert_eq!(lookup(number.id()), None);
        let _by_name = register(&named).expect("numbers never collide");
        let _again = register(&number).expect("numbers never collide");
        assert_eq!(lookup(number.id()), Some(named));
    }

    #[test]
    fn a_poisoned_register_goes_on() {
        let panicked = std::thread::spawn(|| {
            let _guard = lock();
            panic!("poisons the register, on purpose");
        });
        panicked.join().expect_err("it panicked");
        let key = LockKey::from("names-poisoned");
        let registration = register(&key).expect("a name of its own");
        assert_eq!(lookup(key.id()), Some(key));
        drop(registration);
    }

    #[test]
    fn names_in_use_outlive_any_flood() {
        let mut register = Register::default();
        let (held, often) = (key(-1, "held"), key(-2, "often"));
        register.acquire(&held).expect("new");
        register.acquire(&often).expect("new");
        register.release(often.id());
        for number in 0..100_000 {
            let name = key(number, "once");
            register.acquire(&name).expect("new");
            register.release(name.id());
            if number % 1000 == 0 {
                register.acquire(&often).expect("its own name");
                register.release(often.id());
            }
        }
        assert!(register.entries.contains_key(&held.id()));
        assert!(register.entries.contains_key(&often.id()));
        assert_eq!(register.idle, MAX_IDLE_NAMES);
        assert_eq!(register.entries.len(), MAX_IDLE_NAMES + 1);
        assert_eq!(register.queue.len(), MAX_IDLE_NAMES);
    }

    #[test]
    fn memory_is_bounded_by_bytes_too() {
        let mut register = Register::default();
        let long = "x".repeat(MAX_IDLE_NAME_BYTES);
        for number in 0..1000 {
            register.acquire(&key(number, &long)).expect("new");
        }
        assert_eq!(register.entries.len(), 1000);
        for number in 0..1000 {
            register.release(KeyId::Int8(number));
        }
        assert!(register.idle_bytes <= MAX_IDLE_BYTES);
        assert_eq!(register.entries.len(), MAX_IDLE_BYTES / MAX_IDLE_NAME_BYTES);
        let huge = key(-1, &"x".repeat(1_000_000));
        register.acquire(&huge).expect("new");
        register.acquire(&huge).expect("its own name");
        register.release(huge.id());
        assert!(register.entries.contains_key(&huge.id()));
        register.release(huge.id());
        assert!(!register.entries.contains_key(&huge.id()));
    }

    proptest! {
        /// Any order of uses and releases leaves counts that agree with the entries.
        #[test]
        fn the_books_balance(steps in prop::collection::vec((0..6_i64, any::<bool>(), any::<bool>()), 0..80)) {
            let mut register = Register::default();
            let mut uses = BTreeMap::<i64, usize>::new();
            for (number, release, other_name) in steps {
                let held = uses.entry(number).or_default();
                if release && *held > 0 {
                    register.release(KeyId::Int8(number));
                    *held -= 1;
                } else {
                    let before = register.entries.get(&KeyId::Int8(number)).map(|entry| entry.key.clone());
                    let key = key(number, if other_name { "b" } else { "a" });
                    let result = register.acquire(&key);
                    prop_assert_eq!(result.is_ok(), before.is_none_or(|known| known == key));
                    *held += usize::from(result.is_ok());
                }
                let idle = register.entries.values().filter(|entry| entry.uses == 0);
                prop_assert_eq!(register.idle, idle.clone().count());
                prop_assert_eq!(register.idle_bytes, idle.map(Entry::bytes).sum::<usize>());
                for (number, held) in &uses {
                    let known = register.entries.get(&KeyId::Int8(*number));
                    prop_assert_eq!(known.map_or(0, |entry| entry.uses), *held);
                }
            }
        }
    }
}
