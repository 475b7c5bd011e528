//! Builds a snapshot from rows of `pg_locks` and results of `pg_blocking_pids`.
//!
//! A pile-up of n sessions on one lock has about n²/2 edges, so an edge costs only one map lookup by process id.

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
    /// The session that holds or requests the lock.
    pub(crate) owner: BackendId,
    pub(crate) object: LockObject,
    pub(crate) mode: LockMode,
    pub(crate) granted: bool,
    pub(crate) since: Option<SystemTime>,
    /// The result of `pg_blocking_pids`, for waiters that it was called for.
    pub(crate) blockers: Option<Vec<i32>>,
}

/// Builds the wait graph.
///
/// The rows must contain all locks, held or awaited, on objects that a session waits for, and the `tuple` locks that
/// waiters hold. The backends tell which processes are parallel workers. Backends that neither wait nor block are left out.
pub(crate) fn assemble(
    rows: &[LockRow],
    backends: Vec<Backend>,
    taken_at: SystemTime,
    duration: Duration,
) -> Snapshot {
    let mut graph = GraphBuilder::new(&backends, rows, taken_at);
    let mut by_object: HashMap<&LockObject, Vec<&LockRow>> = HashMap::new();
    let mut tuples: PidMap<&RowId> = PidMap::default();
    for row in rows {
        by_object.entry(&row.object).or_default().push(row);
        if let (true, Some(pid), Some(tuple)) = (row.granted, row.owner.pid(), row.object.row()) {
            tuples.insert(pid, tuple);
        }
    }
    for row in rows {
        // The first wait for an object handles all waits for it.
        if row.blockers.is_some()
            && let Some(rows) = by_object.remove(&row.object)
        {
            graph.add_waits(&rows, &tuples);
        }
    }
    graph.snapshot(backends, taken_at, duration)
}

/// A process id is hashed with one multiplication, because nobody can choose process ids to attack the map.
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
        // 2⁶⁴ over the golden ratio; the map takes the high bits for its tags and the low ones for the bucket.
        let spread = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = spread ^ (spread >> 32);
    }
}

/// A session or a prepared transaction, and its modes on the object whose waits are being added.
struct LockParticipant {
    id: BackendId,
    held: Modes,
    requested: Modes,
    /// The number of the last wait that it was found to block, so that each wait has one edge to it.
    last_blocked_wait: usize,
    has_edge: bool,
}

struct GraphBuilder {
    now: SystemTime,
    participants: Vec<LockParticipant>,
    /// For each process id the position of its session in `participants`: a parallel worker belongs to its leader.
    by_pid: PidMap<usize>,
    by_gid: HashMap<Option<Arc<str>>, usize>,
    wait_count: usize,
    edges: Vec<Edge>,
    /// Waiter and blocker of each edge, by position in `participants`.
    links: Vec<(usize, usize)>,
}

impl GraphBuilder {
    fn new(backends: &[Backend], rows: &[LockRow], now: SystemTime) -> Self {
        let max_edges = rows
            .iter()
            .filter_map(|row| row.blockers.as_ref().map(Vec::len))
            .sum();
        let mut graph = Self {
            now,
            participants: Vec::with_capacity(backends.len()),
            by_pid: PidMap::default(),
            by_gid: HashMap::new(),
            wait_count: 0,
            edges: Vec::with_capacity(max_edges),
            links: Vec::with_capacity(max_edges),
        };
        for backend in backends {
            let Some(pid) = backend.pid() else { continue };
            let session = graph.session(backend.leader_pid.unwrap_or(pid));
            graph.by_pid.insert(pid, session);
        }
        graph
    }

    fn add(&mut self, id: BackendId) -> usize {
        self.participants.push(LockParticipant {
            id,
            held: Modes::default(),
            requested: Modes::default(),
            last_blocked_wait: 0,
            has_edge: false,
        });
        self.participants.len() - 1
    }

    fn session(&mut self, pid: i32) -> usize {
        if let Some(position) = self.by_pid.get(&pid) {
            return *position;
        }
        let position = self.add(BackendId::Pid(pid));
        self.by_pid.insert(pid, position);
        position
    }

    fn participant(&mut self, id: &BackendId) -> usize {
        let gid = match id {
            BackendId::Pid(pid) => return self.session(*pid),
            BackendId::Prepared(gid) => gid,
        };
        if let Some(position) = self.by_gid.get(gid) {
            return *position;
        }
        let position = self.add(id.clone());
        self.by_gid.insert(gid.clone(), position);
        position
    }

    /// Adds the edges of all waits for one object. The rows are all rows of that object.
    fn add_waits(&mut self, rows: &[&LockRow], tuples: &PidMap<&RowId>) {
        let mut prepared = Vec::new();
        for row in rows {
            let position = self.participant(&row.owner);
            if row.owner.pid().is_none() && !prepared.contains(&position) {
                prepared.push(position);
            }
            let participant = &mut self.participants[position];
            if row.granted {
                participant.held.add(row.mode);
            } else {
                participant.requested.add(row.mode);
            }
        }
        for row in rows {
            if let (Some(blockers), Some(pid)) = (&row.blockers, row.owner.pid()) {
                self.add_wait(row, pid, blockers, &prepared, tuples.get(&pid).copied());
            }
        }
        for row in rows {
            let position = self.participant(&row.owner);
            self.participants[position].held = Modes::default();
            self.participants[position].requested = Modes::default();
        }
    }

    fn add_wait(
        &mut self,
        row: &LockRow,
        pid: i32,
        blockers: &[i32],
        prepared: &[usize],
        tuple: Option<&RowId>,
    ) {
        let waiter = self.session(pid);
        let session = self.participants[waiter].id.clone();
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
        self.wait_count += 1;
        let conflicting = Modes::conflicting(row.mode);
        for &pid in blockers {
            if pid == 0 {
                // A prepared transaction. The server tells neither which nor how many.
                let mut unknown = true;
                for &position in prepared {
                    if let Some(mode) = self.participants[position].held.strongest_of(conflicting) {
                        unknown = false;
                        self.add_edge(&wait, waiter, position, (EdgeKind::Hard, Some(mode)));
                    }
                }
                if unknown {
                    let position = self.participant(&BackendId::Prepared(None));
                    self.add_edge(&wait, waiter, position, (EdgeKind::Hard, None));
                }
                continue;
            }
            // For each parallel worker the result has its leader's pid (PostgreSQL's documentation, `pg_blocking_pids`).
            let position = self.session(pid);
            let conflict = self.participants[position].conflict(conflicting);
            self.add_edge(&wait, waiter, position, conflict);
        }
    }

    fn add_edge(
        &mut self,
        wait: &Arc<Wait>,
        waiter: usize,
        blocker: usize,
        (kind, blocker_mode): (EdgeKind, Option<LockMode>),
    ) {
        let participant = &mut self.participants[blocker];
        if std::mem::replace(&mut participant.last_blocked_wait, self.wait_count) == self.wait_count
        {
            return;
        }
        participant.has_edge = true;
        self.edges.push(Edge {
            wait: Arc::clone(wait),
            blocker: participant.id.clone(),
            kind,
            blocker_mode,
        });
        self.links.push((waiter, blocker));
        self.participants[waiter].has_edge = true;
    }

    fn snapshot(
        self,
        backends: Vec<Backend>,
        taken_at: SystemTime,
        duration: Duration,
    ) -> Snapshot {
        let position_of = |id: &BackendId| match id {
            BackendId::Pid(pid) => self.by_pid.get(pid),
            BackendId::Prepared(gid) => self.by_gid.get(gid),
        };
        let mut described = vec![false; self.participants.len()];
        let mut kept: Vec<(Option<usize>, Backend)> = Vec::with_capacity(backends.len());
        for backend in backends {
            let Some(&position) = position_of(backend.id()) else {
                continue;
            };
            if !self.participants[position].has_edge {
                continue;
            }
            // Workers are kept with their leader, which has their edges.
            let own = self.participants[position].id == *backend.id();
            if !own || !std::mem::replace(&mut described[position], true) {
                kept.push((own.then_some(position), backend));
            }
        }
        for (position, participant) in self.participants.iter().enumerate() {
            if participant.has_edge && !described[position] {
                kept.push((Some(position), Backend::unknown(participant.id.clone())));
            }
        }
        kept.sort_by(|(_, a), (_, b)| a.id().cmp(b.id()));
        let mut backend_positions = vec![0; self.participants.len()];
        for (at, (position, _)) in kept.iter().enumerate() {
            if let Some(position) = position {
                backend_positions[*position] = at;
            }
        }
        let links = self
            .links
            .iter()
            .map(|(waiter, blocker)| (backend_positions[*waiter], backend_positions[*blocker]));
        let backends = kept.into_iter().map(|(_, backend)| backend).collect();
        Snapshot::linked(backends, self.edges, links, taken_at, duration)
    }
}

impl LockParticipant {
    /// How it blocks a request that these modes conflict with.
    fn conflict(&self, conflicting: Modes) -> (EdgeKind, Option<LockMode>) {
        if let Some(mode) = self.held.strongest_of(conflicting) {
            return (EdgeKind::Hard, Some(mode));
        }
        if let Some(mode) = self.requested.strongest_of(conflicting) {
            return (EdgeKind::Soft, Some(mode));
        }
        // It got the lock, or joined its queue, after the locks were read. Or one of its parallel workers has it, and the
        // role may not see the worker's leader.
        (EdgeKind::Hard, None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::Relation;
    use super::super::backend::Visibility;
    use super::*;

    fn backend(pid: i32, visibility: Visibility, leader: Option<i32>) -> Backend {
        Backend {
            visibility,
            leader_pid: leader,
            ..Backend::unknown(pid.into())
        }
    }

    fn row(pid: i32, object: &LockObject, mode: &str, blockers: Option<&[i32]>) -> LockRow {
        LockRow {
            owner: pid.into(),
            object: object.clone(),
            mode: LockMode::from_pg_locks(mode).expect("a mode"),
            granted: blockers.is_none(),
            since: blockers.map(|_| SystemTime::UNIX_EPOCH),
            blockers: blockers.map(<[i32]>::to_vec),
        }
    }

    fn assembled(rows: &[LockRow], backends: &[Backend]) -> Snapshot {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2);
        assemble(rows, backends.to_vec(), now, Duration::ZERO)
    }

    fn shown(rows: &[LockRow], backends: &[Backend]) -> Vec<String> {
        assembled(rows, backends)
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
            // Holds no conflicting mode, but waits ahead.
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
    fn the_strongest_conflicting_mode_is_named() {
        let object = LockObject::Relation(users());
        let rows = [
            row(1, &object, "AccessShareLock", None),
            row(1, &object, "ShareRowExclusiveLock", None),
            row(1, &object, "RowExclusiveLock", None),
            row(2, &object, "RowExclusiveLock", Some(&[1])),
        ];
        let found = assembled(&rows, &[]);
        let found = found.edges();
        assert_eq!(found[0].mode_held(), Some(LockMode::ShareRowExclusive));
    }

    #[test]
    fn a_wait_for_a_transaction_has_its_row() {
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
        let found = assembled(&rows, &[]);
        let found = found.edges();
        let rows: Vec<_> = found
            .iter()
            .map(|edge| edge.row().map(RowId::ctid))
            .collect();
        assert_eq!(rows, [Some("(0,9)".into()), Some("(0,9)".into())]);
    }

    #[test]
    fn prepared_transactions_are_found_by_their_locks() {
        let object = LockObject::Relation(users());
        let prepared = |gid: &str, mode| LockRow {
            owner: BackendId::Prepared(Some(gid.into())),
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
        // It committed in between.
        assert_eq!(
            shown(&rows[2..], &[]),
            [
                "pid 2 waits 2.0s for ShareLock on relation public.users, blocked by a prepared transaction"
            ]
        );
    }

    #[test]
    fn workers_belong_to_their_leaders() {
        let object = LockObject::Relation(users());
        let backends = [
            backend(1, Visibility::Full, None),
            backend(11, Visibility::Full, Some(1)),
            backend(12, Visibility::Full, Some(1)),
            backend(2, Visibility::Full, None),
            backend(21, Visibility::Full, Some(2)),
        ];
        let rows = [
            row(11, &object, "AccessShareLock", None),
            row(12, &object, "AccessShareLock", None),
            row(21, &object, "AccessExclusiveLock", Some(&[1, 1])),
        ];
        let found = assembled(&rows, &backends);
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
    fn a_blocker_without_a_known_lock_is_kept() {
        let object = LockObject::Transaction(733);
        let rows = [row(2, &object, "ShareLock", Some(&[1, 1]))];
        assert_eq!(
            shown(&rows, &[]),
            ["pid 2 waits 2.0s for ShareLock on transaction 733, blocked by pid 1"]
        );
    }

    /// A pile-up on one exclusive lock: each session waits for the holder and for all sessions before it.
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
        let backends = (1..=sessions).map(|pid| backend(pid, Visibility::Full, None));
        (rows, backends.collect())
    }

    #[test]
    fn five_hundred_sessions_do_not_take_cubic_time() {
        let (few, many) = (pile_up(250), pile_up(500));
        let tree = assembled(&many.0, &many.1).tree();
        assert_eq!(tree.snapshot().edges().len(), 500 * 499 / 2);
        assert_eq!(tree.walk().count(), 500);
        let root = tree.roots().next().expect("the holder");
        assert_eq!((root.blocked_count(), root.children().count()), (499, 499));
        // It takes some milliseconds when optimized. This only detects an algorithm of the wrong order, for which twice as
        // many sessions are eight times the work. The smaller graph is built four times, so that a busy machine interrupts
        // both measurements equally often.
        let measure = |(rows, backends): &(Vec<LockRow>, Vec<Backend>), times: u32| {
            let started = Instant::now();
            for _ in 0..times {
                drop(assembled(rows, backends).tree());
            }
            started.elapsed()
        };
        let (mut least_few, mut least_many) = (Duration::MAX, Duration::MAX);
        for round in 1..=30 {
            least_few = least_few.min(measure(&few, 4));
            least_many = least_many.min(measure(&many, 1));
            // Not after the first rounds, in which the smaller graph may have been interrupted each time.
            if round >= 5 && 2 * least_many < 3 * least_few {
                return;
            }
        }
        panic!("{least_few:?} for four times 250, {least_many:?} for 500");
    }
}
