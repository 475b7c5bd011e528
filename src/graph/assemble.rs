//! From rows of `pg_locks` and what `pg_blocking_pids` said to edges.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::edge::{Mode, Wait};
use super::modes::{Modes, conflicting, strongest};
use super::{Backend, BackendId, Edge, EdgeKind, LockObject, RowId};

/// One row of `pg_locks`.
#[derive(Clone, Debug)]
pub(crate) struct LockRow {
    pub(crate) who: BackendId,
    pub(crate) object: LockObject,
    pub(crate) mode: Mode,
    pub(crate) granted: bool,
    pub(crate) since: Option<SystemTime>,
    /// What `pg_blocking_pids` said, for those who wait and were asked about.
    pub(crate) blockers: Option<Vec<i32>>,
}

/// The edges of all waits among the rows.
///
/// Rows must be there for all locks, held or awaited, on what somebody waits for, and for the `tuple` locks that waiters
/// hold. The backends say which of them are workers of others.
pub(crate) fn edges(rows: &[LockRow], backends: &[Backend], now: SystemTime) -> Vec<Edge> {
    let known = Known {
        backends: backends
            .iter()
            .filter_map(|backend| Some((backend.pid()?, backend)))
            .collect(),
        now,
    };
    let mut by_object: HashMap<&LockObject, Vec<&LockRow>> = HashMap::new();
    let mut tuples: HashMap<i32, &RowId> = HashMap::new();
    for row in rows {
        by_object.entry(&row.object).or_default().push(row);
        if let (true, Some(pid), Some(tuple)) = (row.granted, row.who.pid(), row.object.row()) {
            tuples.insert(pid, tuple);
        }
    }
    let mut edges = Vec::new();
    for row in rows {
        // All waits for one object at the first of them.
        if row.blockers.is_some()
            && let Some(rows) = by_object.remove(&row.object)
        {
            Contest::new(&rows, &known).edges(&rows, &known, &tuples, &mut edges);
        }
    }
    edges
}

struct Known<'a> {
    backends: HashMap<i32, &'a Backend>,
    now: SystemTime,
}

impl Known<'_> {
    /// The leader of a parallel worker; anybody else is a session itself.
    fn session(&self, pid: i32) -> i32 {
        let backend = self.backends.get(&pid);
        backend
            .and_then(|backend| backend.leader_pid)
            .unwrap_or(pid)
    }

    /// Whether its parallel workers, if it has any, could be seen.
    fn is_whole(&self, pid: i32) -> bool {
        let backend = self.backends.get(&pid);
        backend.is_some_and(|backend| !backend.is_hidden() && !backend.is_gone())
    }
}

/// Who holds, and who wants, one object.
struct Contest {
    sessions: HashMap<i32, Stake>,
    prepared: Vec<(BackendId, Modes)>,
}

#[derive(Default)]
struct Stake {
    held: Modes,
    wanted: Modes,
    /// The last wait for which it was found to be in the way.
    counted: usize,
}

impl Contest {
    fn new(rows: &[&LockRow], known: &Known<'_>) -> Self {
        let mut contest = Self {
            sessions: HashMap::with_capacity(rows.len()),
            prepared: Vec::new(),
        };
        for row in rows {
            let Some(pid) = row.who.pid() else {
                contest.hold_prepared(row);
                continue;
            };
            let stake = contest.sessions.entry(known.session(pid)).or_default();
            let modes = if row.granted {
                &mut stake.held
            } else {
                &mut stake.wanted
            };
            modes.add(&row.mode);
        }
        contest
    }

    fn hold_prepared(&mut self, row: &LockRow) {
        let place = match self.prepared.iter().position(|(id, _)| *id == row.who) {
            Some(place) => place,
            None => {
                self.prepared.push((row.who.clone(), Modes::default()));
                self.prepared.len() - 1
            }
        };
        self.prepared[place].1.add(&row.mode);
    }

    fn edges(
        &mut self,
        rows: &[&LockRow],
        known: &Known<'_>,
        tuples: &HashMap<i32, &RowId>,
        edges: &mut Vec<Edge>,
    ) {
        for (number, row) in rows.iter().enumerate() {
            let (Some(blockers), Some(pid)) = (&row.blockers, row.who.pid()) else {
                continue;
            };
            let waiter = known.session(pid);
            let wait = Arc::new(Wait {
                waiter: BackendId::Pid(waiter),
                worker: (waiter != pid).then_some(pid),
                object: row.object.clone(),
                row: tuples
                    .get(&pid)
                    .filter(|_| matches!(row.object, LockObject::Transaction(_)))
                    .map(|tuple| RowId::clone(tuple)),
                mode: row.mode.clone(),
                since: row.since,
                age: row
                    .since
                    .map(|since| known.now.duration_since(since).unwrap_or_default()),
            });
            let mut push = |blocker, (kind, blocker_mode)| {
                edges.push(Edge {
                    wait: Arc::clone(&wait),
                    blocker,
                    kind,
                    blocker_mode,
                });
            };
            let mut prepared = false;
            let mut unseen = Vec::new();
            for &blocker in blockers {
                if blocker == 0 {
                    prepared = true;
                    continue;
                }
                // Parallel workers of one leader are given by the leader's pid, each of them (PostgreSQL's
                // documentation, `pg_blocking_pids`).
                let blocker = known.session(blocker);
                match self.sessions.get_mut(&blocker) {
                    Some(stake) => {
                        if stake.counted != number + 1 {
                            stake.counted = number + 1;
                            push(BackendId::Pid(blocker), stake.way(&row.mode));
                        }
                    }
                    // Not a row of it, though all of them would be seen: the waiter has been granted this lock and
                    // waits for another one already.
                    None if known.is_whole(blocker) => {}
                    None => {
                        if !unseen.contains(&blocker) {
                            unseen.push(blocker);
                            push(BackendId::Pid(blocker), (EdgeKind::Hard, None));
                        }
                    }
                }
            }
            if prepared {
                let mut found = false;
                for (id, held) in &self.prepared {
                    if let Some(mode) = strongest(held, conflicting(&row.mode)) {
                        push(id.clone(), (EdgeKind::Hard, Some(mode)));
                        found = true;
                    }
                }
                if !found {
                    push(BackendId::Prepared(None), (EdgeKind::Hard, None));
                }
            }
        }
    }
}

impl Stake {
    /// In which way it keeps the mode from being granted.
    fn way(&self, wanted: &Mode) -> (EdgeKind, Option<Mode>) {
        let conflicting = conflicting(wanted);
        if let Some(mode) = strongest(&self.held, conflicting) {
            return (EdgeKind::Hard, Some(mode));
        }
        if let Some(mode) = strongest(&self.wanted, conflicting) {
            return (EdgeKind::Soft, Some(mode));
        }
        // It held, or wanted, something else in the moment in which the locks were read.
        let kind = if self.held.is_empty() && !self.wanted.is_empty() {
            EdgeKind::Soft
        } else {
            EdgeKind::Hard
        };
        (kind, None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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

    fn row(who: i32, object: &LockObject, mode: &'static str, blockers: Option<&[i32]>) -> LockRow {
        LockRow {
            who: who.into(),
            object: object.clone(),
            mode: mode.into(),
            granted: blockers.is_none(),
            since: blockers.map(|_| SystemTime::UNIX_EPOCH),
            blockers: blockers.map(<[i32]>::to_vec),
        }
    }

    fn shown(rows: &[LockRow], backends: &[Backend]) -> Vec<String> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2);
        edges(rows, backends, now)
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
        let found = edges(&rows, &[], SystemTime::UNIX_EPOCH);
        assert_eq!(found[0].mode_held(), Some("ShareRowExclusiveLock"));
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
        let found = edges(&rows, &[], SystemTime::UNIX_EPOCH);
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
        let found = edges(&rows, &backends, SystemTime::UNIX_EPOCH);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].waiter(), found[0].worker()),
            (&2.into(), Some(21))
        );
        assert_eq!(found[0].blocker(), &1.into());
        assert_eq!(found[0].mode_held(), Some("AccessShareLock"));
    }

    #[test]
    fn an_edge_of_another_wait_is_left_out() {
        let object = LockObject::Transaction(733);
        let rows = [row(2, &object, "ShareLock", Some(&[1, 1]))];
        let whole = [backend(1, Sight::Whole, None)];
        assert_eq!(shown(&rows, &whole), [""; 0]);
        // It may be a parallel query whose workers are hidden.
        let hidden = [backend(1, Sight::Hidden, None)];
        assert_eq!(
            shown(&rows, &hidden),
            ["pid 2 waits 2.0s for ShareLock on transaction 733, blocked by pid 1"]
        );
    }
}
