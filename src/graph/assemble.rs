//! From rows of `pg_locks` and what `pg_blocking_pids` said to a snapshot.
//!
//! A pile-up of n sessions on one lock has about n²/2 edges, so that each of them costs one look-up of a number and
//! nothing more.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::mode::LockMode;

use super::edge::Wait;
use super::modes::Modes;
use super::{Backend, BackendId, Edge, EdgeKind, LockObject, RowId, Snapshot};

/// One row of `pg_locks`.
#[derive(Clone, Debug)]
pub(crate) struct LockRow {
    pub(crate) who: BackendId,
    pub(crate) object: LockObject,
    pub(crate) mode: LockMode,
    pub(crate) granted: bool,
    pub(crate) since: Option<SystemTime>,
    /// What `pg_blocking_pids` said, for those who wait and were asked about.
    pub(crate) blockers: Option<Vec<i32>>,
}

/// Who waits for whom.
///
/// Rows must be there for all locks, held or awaited, on what somebody waits for, and for the `tuple` locks that waiters
/// hold. The backends say which of them are workers of others; of these only those are kept that take part.
pub(crate) fn assemble(
    rows: &[LockRow],
    backends: Vec<Backend>,
    taken_at: SystemTime,
    took: Duration,
) -> Snapshot {
    let mut found = Found::new(&backends, rows, taken_at);
    let mut by_object: HashMap<&LockObject, Vec<&LockRow>> = HashMap::new();
    let mut tuples: PidMap<&RowId> = PidMap::default();
    for row in rows {
        by_object.entry(&row.object).or_default().push(row);
        if let (true, Some(pid), Some(tuple)) = (row.granted, row.who.pid(), row.object.row()) {
            tuples.insert(pid, tuple);
        }
    }
    for row in rows {
        // All waits for one object at the first of them.
        if row.blockers.is_some()
            && let Some(rows) = by_object.remove(&row.object)
        {
            found.contest(&rows, &tuples);
        }
    }
    found.snapshot(backends, taken_at, took)
}

/// Process ids are spread by one multiplication: nobody chooses them to harm a map.
type PidMap<T> = HashMap<i32, T, BuildHasherDefault<PidHasher>>;

#[derive(Default)]
struct PidHasher(u64);

impl Hasher for PidHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_i32(&mut self, pid: i32) {
        self.write_u64(u64::from(pid.cast_unsigned()));
    }

    fn write_u64(&mut self, number: u64) {
        // 2⁶⁴ over the golden ratio; the map takes the high bits for its tags and the low ones for the place.
        let spread = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = spread ^ (spread >> 32);
    }
}

/// A session or a prepared transaction that has come up, and its part in the contest at hand.
struct Partaker {
    id: BackendId,
    held: Modes,
    wanted: Modes,
    /// The last wait for which it was found to be in the way, so that it counts once.
    counted: usize,
    takes_part: bool,
}

/// What has been found so far.
struct Found {
    now: SystemTime,
    partakers: Vec<Partaker>,
    /// Of each process id its session's place in `partakers`: a parallel worker is its leader.
    by_pid: PidMap<usize>,
    by_gid: HashMap<Option<Arc<str>>, usize>,
    waits: usize,
    edges: Vec<Edge>,
    /// Waiter and blocker of each edge, by their place in `partakers`.
    links: Vec<(usize, usize)>,
}

impl Found {
    fn new(backends: &[Backend], rows: &[LockRow], now: SystemTime) -> Self {
        let most = rows
            .iter()
            .filter_map(|row| row.blockers.as_ref().map(Vec::len))
            .sum();
        let mut found = Self {
            now,
            partakers: Vec::with_capacity(backends.len()),
            by_pid: PidMap::default(),
            by_gid: HashMap::new(),
            waits: 0,
            edges: Vec::with_capacity(most),
            links: Vec::with_capacity(most),
        };
        for backend in backends {
            let Some(pid) = backend.pid() else { continue };
            let session = found.session(backend.leader_pid.unwrap_or(pid));
            found.by_pid.insert(pid, session);
        }
        found
    }

    fn add(&mut self, id: BackendId) -> usize {
        self.partakers.push(Partaker {
            id,
            held: Modes::default(),
            wanted: Modes::default(),
            counted: 0,
            takes_part: false,
        });
        self.partakers.len() - 1
    }

    fn session(&mut self, pid: i32) -> usize {
        if let Some(place) = self.by_pid.get(&pid) {
            return *place;
        }
        let place = self.add(BackendId::Pid(pid));
        self.by_pid.insert(pid, place);
        place
    }

    fn partaker(&mut self, id: &BackendId) -> usize {
        let gid = match id {
            BackendId::Pid(pid) => return self.session(*pid),
            BackendId::Prepared(gid) => gid,
        };
        if let Some(place) = self.by_gid.get(gid) {
            return *place;
        }
        let place = self.add(id.clone());
        self.by_gid.insert(gid.clone(), place);
        place
    }

    /// The edges of all waits for one object, of which these are all rows.
    fn contest(&mut self, rows: &[&LockRow], tuples: &PidMap<&RowId>) {
        let mut prepared = Vec::new();
        for row in rows {
            let place = self.partaker(&row.who);
            if row.who.pid().is_none() && !prepared.contains(&place) {
                prepared.push(place);
            }
            let partaker = &mut self.partakers[place];
            if row.granted {
                partaker.held.add(row.mode);
            } else {
                partaker.wanted.add(row.mode);
            }
        }
        for row in rows {
            if let (Some(blockers), Some(pid)) = (&row.blockers, row.who.pid()) {
                self.wait(row, pid, blockers, &prepared, tuples.get(&pid).copied());
            }
        }
        for row in rows {
            let place = self.partaker(&row.who);
            self.partakers[place].held = Modes::default();
            self.partakers[place].wanted = Modes::default();
        }
    }

    fn wait(
        &mut self,
        row: &LockRow,
        pid: i32,
        blockers: &[i32],
        prepared: &[usize],
        tuple: Option<&RowId>,
    ) {
        let waiter = self.session(pid);
        let session = self.partakers[waiter].id.clone();
        let wait = Arc::new(Wait {
            worker: (session != BackendId::Pid(pid)).then_some(pid),
            waiter: session,
            object: row.object.clone(),
            row: tuple
                .filter(|_| matches!(row.object, LockObject::Transaction(_)))
                .cloned(),
            mode: row.mode,
            since: row.since,
            age: row
                .since
                .map(|since| self.now.duration_since(since).unwrap_or_default()),
        });
        self.waits += 1;
        let conflicting = Modes::conflicting(row.mode);
        for &pid in blockers {
            if pid == 0 {
                // Which of them, and how many, the server does not say.
                let mut unknown = true;
                for &place in prepared {
                    if let Some(mode) = self.partakers[place].held.strongest_of(conflicting) {
                        unknown = false;
                        self.edge(&wait, waiter, place, (EdgeKind::Hard, Some(mode)));
                    }
                }
                if unknown {
                    let place = self.partaker(&BackendId::Prepared(None));
                    self.edge(&wait, waiter, place, (EdgeKind::Hard, None));
                }
                continue;
            }
            // Parallel workers are given by their leader's pid, each of them (PostgreSQL's documentation,
            // `pg_blocking_pids`).
            let place = self.session(pid);
            let way = self.partakers[place].way(conflicting);
            self.edge(&wait, waiter, place, way);
        }
    }

    fn edge(
        &mut self,
        wait: &Arc<Wait>,
        waiter: usize,
        blocker: usize,
        (kind, blocker_mode): (EdgeKind, Option<LockMode>),
    ) {
        let partaker = &mut self.partakers[blocker];
        if std::mem::replace(&mut partaker.counted, self.waits) == self.waits {
            return;
        }
        partaker.takes_part = true;
        self.edges.push(Edge {
            wait: Arc::clone(wait),
            blocker: partaker.id.clone(),
            kind,
            blocker_mode,
        });
        self.links.push((waiter, blocker));
        self.partakers[waiter].takes_part = true;
    }

    fn snapshot(self, backends: Vec<Backend>, taken_at: SystemTime, took: Duration) -> Snapshot {
        let partaker = |id: &BackendId| match id {
            BackendId::Pid(pid) => self.by_pid.get(pid),
            BackendId::Prepared(gid) => self.by_gid.get(gid),
        };
        let mut described = vec![false; self.partakers.len()];
        let mut kept: Vec<(Option<usize>, Backend)> = Vec::with_capacity(backends.len());
        for backend in backends {
            let Some(&place) = partaker(backend.id()) else {
                continue;
            };
            if !self.partakers[place].takes_part {
                continue;
            }
            // Workers come with their leader, but take part under its name.
            let own = self.partakers[place].id == *backend.id();
            if !own || !std::mem::replace(&mut described[place], true) {
                kept.push((own.then_some(place), backend));
            }
        }
        for (place, partaker) in self.partakers.iter().enumerate() {
            if partaker.takes_part && !described[place] {
                kept.push((Some(place), Backend::unknown(partaker.id.clone())));
            }
        }
        kept.sort_by(|(_, a), (_, b)| a.id().cmp(b.id()));
        let mut places = vec![0; self.partakers.len()];
        for (at, (place, _)) in kept.iter().enumerate() {
            if let Some(place) = place {
                places[*place] = at;
            }
        }
        let links = self
            .links
            .iter()
            .map(|(waiter, blocker)| (places[*waiter], places[*blocker]));
        let backends = kept.into_iter().map(|(_, backend)| backend).collect();
        Snapshot::linked(backends, self.edges, links, taken_at, took)
    }
}

impl Partaker {
    /// In which way it keeps a lock from being granted that conflicts with these modes.
    fn way(&self, conflicting: Modes) -> (EdgeKind, Option<LockMode>) {
        if let Some(mode) = self.held.strongest_of(conflicting) {
            return (EdgeKind::Hard, Some(mode));
        }
        if let Some(mode) = self.wanted.strongest_of(conflicting) {
            return (EdgeKind::Soft, Some(mode));
        }
        // It came by the lock, or into its queue, after the locks were read; or a parallel worker did whose leader the
        // role may not see.
        (EdgeKind::Hard, None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::Relation;
    use super::super::backend::Sight;
    use super::*;

    fn backend(pid: i32, sight: Sight, leader: Option<i32>) -> Backend {
        Backend {
            sight,
            leader_pid: leader,
            ..Backend::unknown(pid.into())
        }
    }

    fn row(who: i32, object: &LockObject, mode: &str, blockers: Option<&[i32]>) -> LockRow {
        LockRow {
            who: who.into(),
            object: object.clone(),
            mode: LockMode::from_pg_locks(mode).expect("a mode"),
            granted: blockers.is_none(),
            since: blockers.map(|_| SystemTime::UNIX_EPOCH),
            blockers: blockers.map(<[i32]>::to_vec),
        }
    }

    fn seen(rows: &[LockRow], backends: &[Backend]) -> Snapshot {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2);
        assemble(rows, backends.to_vec(), now, Duration::ZERO)
    }

    fn shown(rows: &[LockRow], backends: &[Backend]) -> Vec<String> {
        seen(rows, backends)
            .edges()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    fn users() -> Relation {
        Relation {
            oid: 16384,
            name: Some(("public".into(), "users".into())),
            kind: Some('r'),
            database: None,
        }
    }

    #[test]
    fn holders_are_hard_and_the_queue_is_soft() {
        let object = LockObject::Relation(users());
        let rows = [
            row(1, &object, "AccessShareLock", None),
            // Holds nothing in conflict, but waits ahead.
            row(2, &object, "AccessShareLock", None),
            row(2, &object, "AccessExclusiveLock", Some(&[1])),
            row(3, &object, "AccessShareLock", Some(&[2])),
        ];
        assert_eq!(
            shown(&rows, &[]),
            [
                "pid 2 waits 2.0s for AccessExclusiveLock on relation public.users, held by pid 1 in AccessShareLock",
                "pid 3 waits 2.0s for AccessShareLock on relation public.users, queued behind pid 2 which wants \
                 AccessExclusiveLock",
            ]
        );
    }

    #[test]
    fn the_strongest_mode_in_conflict_is_named() {
        let object = LockObject::Relation(users());
        let rows = [
            row(1, &object, "AccessShareLock", None),
            row(1, &object, "ShareRowExclusiveLock", None),
            row(1, &object, "RowExclusiveLock", None),
            row(2, &object, "RowExclusiveLock", Some(&[1])),
        ];
        let found = seen(&rows, &[]);
        let found = found.edges();
        assert_eq!(found[0].mode_held(), Some(LockMode::ShareRowExclusive));
    }

    #[test]
    fn a_wait_for_a_transaction_knows_its_row() {
        let tuple = LockObject::Tuple(RowId {
            relation: users(),
            page: 0,
            offset: 9,
        });
        let xid = LockObject::Transaction(733);
        let rows = [
            row(1, &xid, "ExclusiveLock", None),
            row(2, &tuple, "ExclusiveLock", None),
            row(2, &xid, "ShareLock", Some(&[1])),
            row(3, &tuple, "ExclusiveLock", Some(&[2])),
        ];
        let found = seen(&rows, &[]);
        let found = found.edges();
        let rows: Vec<_> = found
            .iter()
            .map(|edge| edge.row().map(RowId::ctid))
            .collect();
        assert_eq!(rows, [Some("(0,9)".into()), Some("(0,9)".into())]);
    }

    #[test]
    fn prepared_transactions_are_found_by_what_they_hold() {
        let object = LockObject::Relation(users());
        let prepared = |gid: &str, mode| LockRow {
            who: BackendId::Prepared(Some(gid.into())),
            ..row(0, &object, mode, None)
        };
        let rows = [
            prepared("reads", "AccessShareLock"),
            prepared("writes", "RowExclusiveLock"),
            row(2, &object, "ShareLock", Some(&[0, 0])),
        ];
        assert_eq!(
            shown(&rows, &[]),
            [
                "pid 2 waits 2.0s for ShareLock on relation public.users, held by prepared transaction \"writes\" in \
                 RowExclusiveLock"
            ]
        );
        // Committed in between.
        assert_eq!(
            shown(&rows[2..], &[]),
            [
                "pid 2 waits 2.0s for ShareLock on relation public.users, blocked by a prepared transaction"
            ]
        );
    }

    #[test]
    fn workers_are_their_leaders() {
        let object = LockObject::Relation(users());
        let backends = [
            backend(1, Sight::Whole, None),
            backend(11, Sight::Whole, Some(1)),
            backend(12, Sight::Whole, Some(1)),
            backend(2, Sight::Whole, None),
            backend(21, Sight::Whole, Some(2)),
        ];
        let rows = [
            row(11, &object, "AccessShareLock", None),
            row(12, &object, "AccessShareLock", None),
            row(21, &object, "AccessExclusiveLock", Some(&[1, 1])),
        ];
        let found = seen(&rows, &backends);
        let found = found.edges();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].waiter(), found[0].worker()),
            (&2.into(), Some(21))
        );
        assert_eq!(found[0].blocker(), &1.into());
        assert_eq!(found[0].mode_held(), Some(LockMode::AccessShare));
    }

    #[test]
    fn a_blocker_whose_lock_was_not_seen_is_one_all_the_same() {
        let object = LockObject::Transaction(733);
        let rows = [row(2, &object, "ShareLock", Some(&[1, 1]))];
        assert_eq!(
            shown(&rows, &[]),
            ["pid 2 waits 2.0s for ShareLock on transaction 733, blocked by pid 1"]
        );
    }

    /// Everybody waits for the holder, and behind all who came before: what a pile-up on one exclusive lock is.
    fn pile_up(sessions: i32) -> (Vec<LockRow>, Vec<Backend>) {
        let object = LockObject::Advisory {
            key: "invoice:42".into(),
            database: None,
        };
        let mut rows = vec![row(1, &object, "ExclusiveLock", None)];
        for waiter in 2..=sessions {
            let blockers: Vec<_> = (1..waiter).collect();
            rows.push(row(waiter, &object, "ExclusiveLock", Some(&blockers)));
        }
        let backends = (1..=sessions).map(|pid| backend(pid, Sight::Whole, None));
        (rows, backends.collect())
    }

    #[test]
    fn five_hundred_sessions_are_arranged_at_once() {
        let (few, many) = (pile_up(250), pile_up(500));
        let tree = seen(&many.0, &many.1).tree();
        assert_eq!(tree.snapshot().edges().len(), 500 * 499 / 2);
        assert_eq!(tree.walk().count(), 500);
        let root = tree.roots().next().expect("the holder");
        assert_eq!((root.blocks(), root.children().count()), (499, 499));
        // Some milliseconds when optimized; this only tells it from an algorithm of the wrong order, which has eight
        // times as much to do with twice as many. Half of them are arranged four times, so that a machine with other
        // work interrupts the one as often as the other.
        let took = |(rows, backends): &(Vec<LockRow>, Vec<Backend>), times: u32| {
            let started = Instant::now();
            for _ in 0..times {
                drop(seen(rows, backends).tree());
            }
            started.elapsed()
        };
        let (mut least_few, mut least_many) = (Duration::MAX, Duration::MAX);
        for round in 1..=30 {
            least_few = least_few.min(took(&few, 4));
            least_many = least_many.min(took(&many, 1));
            // Not by the first ones alone, of which those of the few can have been held up.
            if round >= 5 && 2 * least_many < 3 * least_few {
                return;
            }
        }
        panic!("{least_few:?} for four times 250, {least_many:?} for 500");
    }
}
