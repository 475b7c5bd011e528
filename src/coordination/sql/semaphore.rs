//! The locks of a semaphore's permits.

use tokio_postgres::SimpleQueryMessage;

use crate::key::LockKey;
use crate::postgres::sql::{parsed, rows};

/// The bits of a permit's number, and as many for how many permits there are.
const BITS: u32 = 12;
/// The most permits of a semaphore.
pub(crate) const MOST: u32 = 1 << BITS;
pub(crate) const NAMESPACE: &str = "lockkeeper semaphore";

/// The keys of a semaphore's permits: 40 bits of its name's hash, 12 bits that say how many permits there are, and 12 bits
/// for the permit. So the locks that are held show which number of permits their holders have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PermitKeys {
    prefix: i64,
    permits: u32,
}

impl PermitKeys {
    /// Invariant: `permits` is between 1 and [`MOST`].
    pub(crate) fn new(name: &str, permits: u32) -> Self {
        let hash = LockKey::from((NAMESPACE, name)).as_i64();
        Self {
            prefix: hash.unwrap_or_default() & !((1 << (2 * BITS)) - 1),
            permits,
        }
    }

    pub(crate) fn key(&self, name: &str, permit: u32) -> LockKey {
        let number = self.prefix | i64::from(self.permits - 1) << BITS | i64::from(permit);
        let name = format!("{name}, permit {} of {}", permit + 1, self.permits);
        LockKey::numbered(NAMESPACE, &name, number)
    }

    /// The permits that are held.
    pub(crate) fn held(&self) -> String {
        let (classid, ..) = LockKey::from(self.prefix).id().pg_locks();
        format!(
            "SELECT l.objid FROM pg_catalog.pg_locks AS l WHERE pg_catalog.texteq(l.locktype, 'advisory') \
             AND l.objsubid OPERATOR(pg_catalog.=) 1 AND pg_catalog.oideq(l.classid, ('{classid}')::pg_catalog.oid) AND l.granted \
             AND pg_catalog.oideq(l.database, (SELECT d.oid FROM pg_catalog.pg_database AS d \
             WHERE pg_catalog.nameeq(d.datname, pg_catalog.current_database())))"
        )
    }

    /// Which of them are held; or how many permits there are elsewhere, where that differs.
    pub(crate) fn read_held(&self, reply: &[SimpleQueryMessage]) -> Result<Vec<u32>, u32> {
        let ours = rows(reply).filter_map(|row| self.read(parsed(row, "objid")?));
        let mut held = Vec::new();
        for (permits, permit) in ours {
            if permits != self.permits {
                return Err(permits);
            }
            held.push(permit);
        }
        Ok(held)
    }

    /// How many permits there are, and which one this is; `None` for a lock of something else.
    fn read(&self, objid: u32) -> Option<(u32, u32)> {
        let (_, prefix, _) = LockKey::from(self.prefix).id().pg_locks();
        let low = objid ^ prefix;
        (low >> (2 * BITS) == 0).then_some(((low >> BITS) + 1, low & (MOST - 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_tells_its_permit_and_how_many_there_are() {
        for (permits, permit) in [(1, 0), (4, 3), (MOST, MOST - 1), (MOST, 0)] {
            let keys = PermitKeys::new("thumbnails", permits);
            let key = keys.key("thumbnails", permit);
            assert_eq!(keys.read(key.objid()), Some((permits, permit)));
            assert_eq!(
                PermitKeys::new("thumbnails", 7).read(key.objid()),
                Some((permits, permit))
            );
            // Its last byte above the 24 bits.
            assert_eq!(keys.read(key.objid() ^ 1 << 24), None);
            assert!(keys.held().contains(&format!("'{}'", key.classid())));
        }
        let key = PermitKeys::new("thumbnails", 4).key("thumbnails", 2);
        assert_eq!(
            key.to_string(),
            r#""lockkeeper semaphore"/"thumbnails, permit 3 of 4""#
        );
    }
}
